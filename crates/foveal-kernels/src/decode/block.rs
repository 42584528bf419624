//! Kernels on a block of up to [`BLOCK`] stored rows: scores, and the weighted sum of values.

use super::Codec;
use super::vector::{Bf16, F32, Int8, Rows, Stored};
use crate::dispatch::with_isa;
use crate::exp::{exp, tanh};
use crate::simd::Simd;

/// Rows of a block. Its keys and values stay in the second-level cache while all queries use them.
pub(super) const BLOCK: usize = 128;

/// Queries of one K/V head, each padded with zeros to a multiple of 16.
pub(super) struct Queries {
    data: Vec<f32>,
    stride: usize,
    width: usize,
    pub(super) rows: usize,
}

impl Queries {
    /// `row(r, c)` is channel `c` of query `r`.
    pub(super) fn new(rows: usize, width: usize, row: impl Fn(usize, usize) -> f32) -> Self {
        let stride = width.next_multiple_of(16);
        let mut data = vec![0f32; rows * stride];
        for r in 0..rows {
            for c in 0..width {
                data[r * stride + c] = row(r, c);
            }
        }
        Self { data, stride, width, rows }
    }
}

/// Scores of all queries against the stored rows `at`: `out[r * BLOCK + t]`, without any factor but
/// the int8 scale. Entries from `at.len()` on are unspecified.
///
/// # Safety
/// As in [`crate::simd`]; every row of `at` lies in `keys` at the queries' width, `out` holds
/// `queries.rows * BLOCK`, and `at` has 1 to BLOCK entries.
#[inline(always)]
pub(super) unsafe fn scores<S: Rows>(queries: &Queries, keys: &Codec, at: &[u32], out: *mut f32) {
    // SAFETY: passed on.
    unsafe {
        match keys {
            Codec::F32 { data, stride } => scores_of::<S, F32>(queries, data.as_ptr(), *stride, at, out),
            Codec::Bf16 { data, stride } => scores_of::<S, Bf16>(queries, data.as_ptr().cast(), *stride, at, out),
            Codec::Int8 { data, stride, scales } => {
                scores_of::<S, Int8>(queries, data.as_ptr(), *stride, at, out);
                let mut factors = [0f32; BLOCK];
                for (f, &j) in factors.iter_mut().zip(at) {
                    *f = scales[j as usize];
                }
                for r in 0..queries.rows {
                    scale_row::<S>(out.add(r * BLOCK), factors.as_ptr());
                }
            }
        }
    }
}

/// x[0..BLOCK] *= factors.
#[inline(always)]
unsafe fn scale_row<S: Simd>(x: *mut f32, factors: *const f32) {
    // SAFETY: both hold BLOCK elements, a multiple of LANES.
    unsafe {
        let mut i = 0;
        while i < BLOCK {
            S::store(x.add(i), S::mul(S::load(x.add(i)), S::load(factors.add(i))));
            i += S::LANES;
        }
    }
}

#[inline(always)]
unsafe fn scores_of<S: Rows, C: Stored>(q: &Queries, keys: *const C::Item, stride: usize, at: &[u32], out: *mut f32) {
    let mut r = 0;
    // SAFETY: passed on.
    unsafe {
        if S::QUERIES == 4 {
            while r + 4 <= q.rows {
                scores_tile::<S, C, 4>(q, r, keys, stride, at, out);
                r += 4;
            }
            if r + 3 <= q.rows {
                scores_tile::<S, C, 3>(q, r, keys, stride, at, out);
                r += 3;
            }
        }
        while r + 2 <= q.rows {
            scores_tile::<S, C, 2>(q, r, keys, stride, at, out);
            r += 2;
        }
        if r < q.rows {
            scores_tile::<S, C, 1>(q, r, keys, stride, at, out);
        }
    }
}

/// Queries `first..first + R`, four keys at a time.
#[inline(always)]
unsafe fn scores_tile<S: Rows, C: Stored, const R: usize>(
    q: &Queries,
    first: usize,
    keys: *const C::Item,
    stride: usize,
    at: &[u32],
    out: *mut f32,
) {
    // SAFETY: `at` names rows inside `keys`; queries are padded to whole vectors and the last
    // part of a key row is loaded by its length; BLOCK is a multiple of 4.
    unsafe {
        let (whole, part) = (q.width / S::LANES, q.width % S::LANES);
        let query = q.data.as_ptr().add(first * q.stride);
        let last = at.len() - 1;
        let mut t = 0;
        while t < at.len() {
            let mut k = [keys; 4];
            for i in 0..4 {
                k[i] = keys.add(at[(t + i).min(last)] as usize * stride);
            }
            let mut acc = [[S::splat(0.0); 4]; R];
            for c in 0..whole {
                let mut row = [S::splat(0.0); 4];
                for i in 0..4 {
                    row[i] = C::load::<S>(k[i].add(c * S::LANES));
                }
                for r in 0..R {
                    let x = S::load(query.add(r * q.stride + c * S::LANES));
                    for i in 0..4 {
                        acc[r][i] = S::fma(x, row[i], acc[r][i]);
                    }
                }
            }
            if part > 0 {
                let mut row = [S::splat(0.0); 4];
                for i in 0..4 {
                    row[i] = C::load_part::<S>(k[i].add(whole * S::LANES), part);
                }
                for r in 0..R {
                    let x = S::load(query.add(r * q.stride + whole * S::LANES));
                    for i in 0..4 {
                        acc[r][i] = S::fma(x, row[i], acc[r][i]);
                    }
                }
            }
            for r in 0..R {
                S::sum4(acc[r], out.add((first + r) * BLOCK + t));
            }
            t += 4;
        }
    }
}

/// Running softmax of each query over the blocks seen so far.
pub(super) struct Running {
    /// Largest score.
    top: Vec<f32>,
    /// Σ e^(s − top).
    sum: Vec<f32>,
    /// Σ e^(s − top) v, each row padded to a multiple of 16.
    acc: Vec<f32>,
    stride: usize,
    width: usize,
    /// Scores, then weights, of the block in hand.
    p: Vec<f32>,
    /// Factor on what was accumulated under the previous `top`.
    decay: Vec<f32>,
}

impl Running {
    pub(super) fn new(rows: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(16);
        Self {
            top: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            acc: vec![0.0; rows * stride],
            stride,
            width,
            p: vec![0.0; rows * BLOCK],
            decay: vec![1.0; rows],
        }
    }

    /// Normalised output and log-sum-exp of row `r`; a row that saw nothing is zero and −∞.
    pub(super) fn finish(&self, r: usize, out: &mut [f32]) -> f32 {
        let sum = self.sum[r];
        if sum == 0.0 {
            out.fill(0.0);
            return f32::NEG_INFINITY;
        }
        let inv = 1.0 / sum;
        for (o, a) in out.iter_mut().zip(&self.acc[r * self.stride..]) {
            *o = a * inv;
        }
        self.top[r] + sum.ln()
    }
}

/// One block: scores, softmax step, values.
pub(super) struct Step<'a> {
    pub(super) queries: &'a Queries,
    pub(super) keys: Codec<'a>,
    pub(super) values: Codec<'a>,
    /// Rows of the segment, 1 to BLOCK, ascending.
    pub(super) at: &'a [u32],
    /// For each query, how many of `at` it sees.
    pub(super) seen: &'a [usize],
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
}

/// Fold 16 lanes in four steps (a chain of 16 would wait for each).
#[inline(always)]
fn tree(mut lanes: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

#[inline(always)]
unsafe fn step_on<S: Rows>(b: &Step, run: &mut Running) {
    // SAFETY: `Decode::run` checked that the rows lie in both codecs; buffers hold rows * BLOCK.
    unsafe {
        let rows = b.queries.rows;
        let p = run.p.as_mut_ptr();
        scores::<S>(b.queries, &b.keys, b.at, p);
        let padded = b.at.len().next_multiple_of(S::LANES);
        let scale = S::splat(b.scale);
        for r in 0..rows {
            let p = p.add(r * BLOCK);
            // Scale and cap; −∞ beyond what the query sees.
            let mut top = S::splat(f32::NEG_INFINITY);
            let mut i = 0;
            while i < padded {
                let mut s = S::mul(S::load(p.add(i)), scale);
                if let Some(cap) = b.softcap {
                    s = S::mul(tanh::<S>(S::div(s, S::splat(cap))), S::splat(cap));
                }
                let left = b.seen[r].saturating_sub(i);
                if left < S::LANES {
                    s = S::select((1u32 << left) - 1, s, S::splat(f32::NEG_INFINITY));
                }
                S::store(p.add(i), s);
                top = S::max(s, top);
                i += S::LANES;
            }
            let mut lanes = [f32::NEG_INFINITY; 16];
            S::store(lanes.as_mut_ptr(), top);
            let top = tree(lanes, |a, b| if b > a { b } else { a }).max(run.top[r]);
            // Nothing seen yet: any finite shift keeps −∞ − shift from being a NaN.
            let shift = if top == f32::NEG_INFINITY { 0.0 } else { top };
            let mut sums = S::splat(0.0);
            let mut i = 0;
            while i < padded {
                let e = exp::<S>(S::sub(S::load(p.add(i)), S::splat(shift)));
                S::store(p.add(i), e);
                sums = S::add(sums, e);
                i += S::LANES;
            }
            let mut lanes = [0f32; 16];
            S::store(lanes.as_mut_ptr(), sums);
            run.decay[r] = if run.top[r] == top { 1.0 } else { (run.top[r] - shift).exp() };
            run.sum[r] = run.sum[r] * run.decay[r] + tree(lanes, |a, b| a + b);
            run.top[r] = top;
        }
        match &b.values {
            Codec::F32 { data, stride } => values_of::<S, F32>(b.at, data.as_ptr(), *stride, rows, run),
            Codec::Bf16 { data, stride } => values_of::<S, Bf16>(b.at, data.as_ptr().cast(), *stride, rows, run),
            Codec::Int8 { data, stride, scales } => {
                let mut factors = [0f32; BLOCK];
                for (f, &j) in factors.iter_mut().zip(b.at) {
                    *f = scales[j as usize];
                }
                for r in 0..rows {
                    scale_row::<S>(p.add(r * BLOCK), factors.as_ptr());
                }
                values_of::<S, Int8>(b.at, data.as_ptr(), *stride, rows, run);
            }
        }
    }
}

#[inline(always)]
unsafe fn values_of<S: Rows, C: Stored>(
    at: &[u32],
    values: *const C::Item,
    stride: usize,
    rows: usize,
    run: &mut Running,
) {
    let mut r = 0;
    // SAFETY: passed on.
    unsafe {
        if S::QUERIES == 4 {
            while r + 4 <= rows {
                values_rows::<S, C, 4>(at, values, stride, r, run);
                r += 4;
            }
            if r + 3 <= rows {
                values_rows::<S, C, 3>(at, values, stride, r, run);
                r += 3;
            }
        }
        while r + 2 <= rows {
            values_rows::<S, C, 2>(at, values, stride, r, run);
            r += 2;
        }
        if r < rows {
            values_rows::<S, C, 1>(at, values, stride, r, run);
        }
    }
}

/// acc = acc · decay + p · V for queries `first..first + R`.
#[inline(always)]
unsafe fn values_rows<S: Rows, C: Stored, const R: usize>(
    at: &[u32],
    values: *const C::Item,
    stride: usize,
    first: usize,
    run: &mut Running,
) {
    let mut c = 0;
    // SAFETY: channels stay below the width; the last part is loaded by its length.
    unsafe {
        while c + 4 * S::LANES <= run.width {
            values_tile::<S, C, R, 4>(at, values, stride, first, c, S::LANES, run);
            c += 4 * S::LANES;
        }
        while c < run.width {
            values_tile::<S, C, R, 1>(at, values, stride, first, c, S::LANES.min(run.width - c), run);
            c += S::LANES;
        }
    }
}

#[inline(always)]
unsafe fn values_tile<S: Rows, C: Stored, const R: usize, const N: usize>(
    at: &[u32],
    values: *const C::Item,
    stride: usize,
    first: usize,
    channel: usize,
    lanes: usize,
    run: &mut Running,
) {
    // SAFETY: `at` names rows inside `values`; accumulators are padded to whole vectors.
    unsafe {
        let out = run.acc.as_mut_ptr().add(first * run.stride + channel);
        let p = run.p.as_ptr().add(first * BLOCK);
        let mut acc = [[S::splat(0.0); N]; R];
        for r in 0..R {
            let decay = S::splat(run.decay[first + r]);
            for n in 0..N {
                acc[r][n] = S::mul(S::load(out.add(r * run.stride + n * S::LANES)), decay);
            }
        }
        for t in 0..at.len() {
            let v = values.add(at[t] as usize * stride + channel);
            let mut row = [S::splat(0.0); N];
            for n in 0..N {
                row[n] =
                    if lanes == S::LANES { C::load::<S>(v.add(n * S::LANES)) } else { C::load_part::<S>(v, lanes) };
            }
            for r in 0..R {
                let w = S::splat(*p.add(r * BLOCK + t));
                for n in 0..N {
                    acc[r][n] = S::fma(w, row[n], acc[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                S::store(out.add(r * run.stride + n * S::LANES), acc[r][n]);
            }
        }
    }
}

/// Raw scores of rows `from..from + count` of `keys` into `out[r * ld ..]`.
#[inline(always)]
unsafe fn raw_on<S: Rows>(queries: &Queries, keys: &Codec, from: usize, count: usize, out: *mut f32, ld: usize) {
    let mut buf = vec![0f32; queries.rows * BLOCK];
    let mut at = [0u32; BLOCK];
    let mut done = 0;
    while done < count {
        let n = BLOCK.min(count - done);
        for (i, at) in at[..n].iter_mut().enumerate() {
            *at = (from + done + i) as u32;
        }
        // SAFETY: the caller checked that the rows exist and that `out` holds `count` a query.
        unsafe {
            scores::<S>(queries, keys, &at[..n], buf.as_mut_ptr());
            for r in 0..queries.rows {
                std::ptr::copy_nonoverlapping(buf.as_ptr().add(r * BLOCK), out.add(r * ld + done), n);
            }
        }
        done += n;
    }
}

with_isa!(simd, unsafe fn run_step => step_on(b: &Step, run: &mut Running));
with_isa!(simd, unsafe fn run_raw => raw_on(queries: &Queries, keys: &Codec, from: usize, count: usize, out: *mut f32, ld: usize));

/// Take one block into the running softmax.
///
/// # Safety
/// The machine has `isa`; the rows `b.at` lie in both codecs at their widths; `run` has the rows
/// of the queries.
pub(super) unsafe fn step(isa: crate::Isa, b: &Step, run: &mut Running) {
    // SAFETY: passed on.
    unsafe { run_step(isa, b, run) }
}

/// Raw scores of consecutive rows.
///
/// # Safety
/// The machine has `isa`; rows `from..from + count` lie in `keys`; `out` is writable for `count`
/// elements of each query, `ld` apart.
pub(super) unsafe fn raw(
    isa: crate::Isa,
    queries: &Queries,
    keys: &Codec,
    from: usize,
    count: usize,
    out: *mut f32,
    ld: usize,
) {
    // SAFETY: passed on.
    unsafe { run_raw(isa, queries, keys, from, count, out, ld) }
}
