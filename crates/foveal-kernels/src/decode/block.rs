//! Kernels on a block of up to [`BLOCK`] stored rows, wherever each of them lies: scores, a step of the
//! running softmax, and the weighted sum of values.

use super::codec::Kind;
use super::tiles;
use super::vector::{Bf16, F32, Int4, Int8, Rows, Stored};
use crate::dispatch::with_isa;
use crate::exp::{exp, tanh};

/// Rows of a block. Its keys and values stay in the second-level cache while all queries use them.
pub(super) const BLOCK: usize = 128;
const INT4_CHANNELS: usize = super::codec::INT4_GROUP;

/// Queries of one K/V head, each padded with zeros to a multiple of 16.
pub(super) struct Queries {
    pub(super) data: Vec<f32>,
    pub(super) stride: usize,
    pub(super) width: usize,
    pub(super) rows: usize,
    /// The same as the tiles read them, made when first asked for.
    pub(super) packed: tiles::Packs,
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
        Self { data, stride, width, rows, packed: Default::default() }
    }
}

/// Where the rows of a block lie. Rows of pages, or of a list of keys, are as good as consecutive ones.
pub(super) struct Block {
    /// Rows; those from `len` on repeat the last, so that kernels may work on whole vectors.
    pub(super) k: [*const u8; BLOCK],
    pub(super) v: [*const u8; BLOCK],
    /// Scales of int8 rows, zero from `len` on.
    pub(super) k_scale: [f32; BLOCK],
    pub(super) v_scale: [f32; BLOCK],
    /// Rows, at least 1.
    pub(super) len: usize,
    pub(super) k_kind: Kind,
    pub(super) v_kind: Kind,
}

impl Block {
    pub(super) fn new() -> Self {
        let none = [std::ptr::null(); BLOCK];
        let zero = [0f32; BLOCK];
        Self { k: none, v: none, k_scale: zero, v_scale: zero, len: 0, k_kind: Kind::F32, v_kind: Kind::F32 }
    }

    /// Repeat the last row after the end.
    pub(super) fn close(&mut self) {
        let n = self.len;
        if n > 0 && n < BLOCK {
            let (k, v) = (self.k[n - 1], self.v[n - 1]);
            self.k[n..].fill(k);
            self.v[n..].fill(v);
            self.k_scale[n..].fill(0.0);
            self.v_scale[n..].fill(0.0);
        }
    }
}

/// Ask for `bytes` bytes of a row before they are needed: pages and heads end before a hardware
/// prefetcher has learnt them, and while weights are computed it learns nothing.
#[inline(always)]
pub(super) fn prefetch(row: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let mut at = 0;
        while at < bytes {
            // SAFETY: a prefetch of any address has no effect but on caches.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(at).cast()) };
            // Lines come in pairs.
            at += 128;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (row, bytes);
}

/// Scores of all queries against the keys of a block: `out[r * BLOCK + t]`, without any factor, not even the int8
/// scale. Entries from `block.len` on are unspecified. Meanwhile the keys of `next` are fetched.
///
/// # Safety
/// As in [`crate::simd`]; the block has 1 to BLOCK rows, all readable at the queries' width; `out` holds
/// `queries.rows * BLOCK`.
#[inline(always)]
pub(super) unsafe fn scores<S: Rows>(queries: &Queries, block: &Block, next: &Block, out: *mut f32) {
    // SAFETY: passed on.
    unsafe {
        match block.k_kind {
            Kind::F32 => scores_of::<S, F32>(queries, block, next, out),
            Kind::Bf16 => scores_of::<S, Bf16>(queries, block, next, out),
            Kind::Int8 => scores_of::<S, Int8>(queries, block, next, out),
            Kind::Int4 => scores_of::<S, Int4>(queries, block, next, out),
        }
    }
}

#[inline(always)]
unsafe fn scores_of<S: Rows, C: Stored>(q: &Queries, block: &Block, next: &Block, out: *mut f32) {
    let mut r = 0;
    // SAFETY: passed on.
    unsafe {
        if S::QUERIES == 4 {
            while r + 4 <= q.rows {
                scores_tile::<S, C, 4>(q, r, block, next, out);
                r += 4;
            }
            if r + 3 <= q.rows {
                scores_tile::<S, C, 3>(q, r, block, next, out);
                r += 3;
            }
        }
        while r + 2 <= q.rows {
            scores_tile::<S, C, 2>(q, r, block, next, out);
            r += 2;
        }
        if r < q.rows {
            scores_tile::<S, C, 1>(q, r, block, next, out);
        }
    }
}

/// Queries `first..first + R`, four keys at a time.
#[inline(always)]
unsafe fn scores_tile<S: Rows, C: Stored, const R: usize>(
    q: &Queries,
    first: usize,
    block: &Block,
    next: &Block,
    out: *mut f32,
) {
    // SAFETY: rows of the block are readable, repeated beyond its end; queries are padded to whole
    // vectors and the last part of a key row is loaded by its length; BLOCK is a multiple of 4.
    unsafe {
        let query = q.data.as_ptr().add(first * q.stride);
        let ahead = if first == 0 { next.k_kind.bytes(q.width) } else { 0 };
        let mut t = 0;
        while t < block.len {
            let mut k = [std::ptr::null(); 4];
            for i in 0..4 {
                k[i] = block.k[t + i];
                prefetch(next.k[t + i], ahead);
            }
            let mut acc = [[S::splat(0.0); 4]; R];
            macro_rules! multiply {
                ($c:expr, $load:ident $(, $n:expr)?) => {{
                    let mut row = [S::splat(0.0); 4];
                    for i in 0..4 {
                        row[i] = C::$load::<S>(k[i], $c $(, $n)?);
                    }
                    for r in 0..R {
                        let x = S::load(query.add(r * q.stride + $c));
                        for i in 0..4 {
                            acc[r][i] = S::fma(x, row[i], acc[r][i]);
                        }
                    }
                }};
            }
            // 32 channels at a time: what a group of int4 shares is then read once.
            let mut c = 0;
            while c + INT4_CHANNELS <= q.width {
                for u in 0..INT4_CHANNELS / S::LANES {
                    multiply!(c + u * S::LANES, load);
                }
                c += INT4_CHANNELS;
            }
            while c + S::LANES <= q.width {
                multiply!(c, load);
                c += S::LANES;
            }
            if c < q.width {
                multiply!(c, load_part, q.width - c);
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
    pub(super) acc: Vec<f32>,
    pub(super) stride: usize,
    pub(super) width: usize,
    /// Scores, then weights, of the block in hand, for a multiple of four rows.
    pub(super) p: Vec<f32>,
    /// Factor on what was accumulated under the previous `top`.
    pub(super) decay: Vec<f32>,
    /// Operations that the tiles could not do.
    pub(super) fallback: u64,
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
            p: vec![0.0; rows.next_multiple_of(4) * BLOCK],
            decay: vec![1.0; rows],
            fallback: 0,
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
    pub(super) block: &'a Block,
    /// The block after it, or the same one.
    pub(super) next: &'a Block,
    /// For each query, how many rows of the block it sees.
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
    // SAFETY: passed on.
    unsafe {
        scores::<S>(b.queries, b.block, b.next, run.p.as_mut_ptr());
        softmax::<S>(b, None, run);
        if b.block.v_kind == Kind::Int8 {
            scale_weights::<S>(b, run);
        }
        values::<S>(b.block, b.next, b.queries.rows, run);
    }
}

/// Scores to weights, maxima, sums and decays. `units` are factors of the queries' scores.
///
/// # Safety
/// As in [`crate::simd`]; `run` has the rows of the queries.
#[inline(always)]
pub(super) unsafe fn softmax<S: Rows>(b: &Step, units: Option<&[f32]>, run: &mut Running) {
    // SAFETY: buffers hold rows * BLOCK; BLOCK is a multiple of LANES.
    unsafe {
        let padded = b.block.len.next_multiple_of(S::LANES);
        let factors = (b.block.k_kind == Kind::Int8).then_some(b.block.k_scale.as_ptr());
        for r in 0..b.queries.rows {
            let p = run.p.as_mut_ptr().add(r * BLOCK);
            let scale = S::splat(b.scale * units.map_or(1.0, |u| u[r]));
            // Scale and cap; −∞ beyond what the query sees.
            let mut top = S::splat(f32::NEG_INFINITY);
            let mut i = 0;
            while i < padded {
                let mut s = S::mul(S::load(p.add(i)), scale);
                if let Some(f) = factors {
                    s = S::mul(s, S::load(f.add(i)));
                }
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
    }
}

/// Weights times the scales of int8 values.
///
/// # Safety
/// As of [`softmax`].
#[inline(always)]
pub(super) unsafe fn scale_weights<S: Rows>(b: &Step, run: &mut Running) {
    let padded = b.block.len.next_multiple_of(S::LANES);
    for r in 0..b.queries.rows {
        // SAFETY: both hold BLOCK elements a row, a multiple of LANES.
        unsafe {
            let (p, f) = (run.p.as_mut_ptr().add(r * BLOCK), b.block.v_scale.as_ptr());
            let mut i = 0;
            while i < padded {
                S::store(p.add(i), S::mul(S::load(p.add(i)), S::load(f.add(i))));
                i += S::LANES;
            }
        }
    }
}

/// acc = acc · decay + p · V. Meanwhile the values of `next` are fetched.
///
/// # Safety
/// As in [`crate::simd`]; the rows of the block are readable at the width of `run`, which has `rows` rows.
#[inline(always)]
pub(super) unsafe fn values<S: Rows>(block: &Block, next: &Block, rows: usize, run: &mut Running) {
    // SAFETY: passed on.
    unsafe {
        match block.v_kind {
            Kind::F32 => values_of::<S, F32>(block, next, rows, run),
            Kind::Bf16 => values_of::<S, Bf16>(block, next, rows, run),
            Kind::Int8 => values_of::<S, Int8>(block, next, rows, run),
            Kind::Int4 => values_of::<S, Int4>(block, next, rows, run),
        }
    }
}

#[inline(always)]
unsafe fn values_of<S: Rows, C: Stored>(block: &Block, next: &Block, rows: usize, run: &mut Running) {
    let mut r = 0;
    // SAFETY: passed on.
    unsafe {
        if S::QUERIES == 4 {
            while r + 4 <= rows {
                values_rows::<S, C, 4>(block, next, r, run);
                r += 4;
            }
            if r + 3 <= rows {
                values_rows::<S, C, 3>(block, next, r, run);
                r += 3;
            }
        }
        while r + 2 <= rows {
            values_rows::<S, C, 2>(block, next, r, run);
            r += 2;
        }
        if r < rows {
            values_rows::<S, C, 1>(block, next, r, run);
        }
    }
}

/// acc = acc · decay + p · V for queries `first..first + R`.
#[inline(always)]
unsafe fn values_rows<S: Rows, C: Stored, const R: usize>(
    block: &Block,
    next: &Block,
    first: usize,
    run: &mut Running,
) {
    let mut c = 0;
    // SAFETY: channels stay below the width; the last part is loaded by its length.
    unsafe {
        while c + 4 * S::LANES <= run.width {
            values_tile::<S, C, R, 4>(block, next, first, c, S::LANES, run);
            c += 4 * S::LANES;
        }
        while c < run.width {
            values_tile::<S, C, R, 1>(block, next, first, c, S::LANES.min(run.width - c), run);
            c += S::LANES;
        }
    }
}

#[inline(always)]
unsafe fn values_tile<S: Rows, C: Stored, const R: usize, const N: usize>(
    block: &Block,
    next: &Block,
    first: usize,
    channel: usize,
    lanes: usize,
    run: &mut Running,
) {
    // SAFETY: rows of the block are readable; accumulators are padded to whole vectors.
    unsafe {
        let out = run.acc.as_mut_ptr().add(first * run.stride + channel);
        let p = run.p.as_ptr().add(first * BLOCK);
        let ahead = if first == 0 && channel == 0 { next.v_kind.bytes(run.width) } else { 0 };
        let mut acc = [[S::splat(0.0); N]; R];
        for r in 0..R {
            let decay = S::splat(run.decay[first + r]);
            for n in 0..N {
                acc[r][n] = S::mul(S::load(out.add(r * run.stride + n * S::LANES)), decay);
            }
        }
        for t in 0..block.len {
            let v = block.v[t];
            prefetch(next.v[t], ahead);
            let mut row = [S::splat(0.0); N];
            for n in 0..N {
                row[n] = if lanes == S::LANES {
                    C::load::<S>(v, channel + n * S::LANES)
                } else {
                    C::load_part::<S>(v, channel, lanes)
                };
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

with_isa!(simd, unsafe fn run_step => step_on(b: &Step, run: &mut Running));
with_isa!(simd, unsafe fn run_scores => scores(q: &Queries, block: &Block, next: &Block, out: *mut f32));

/// Take one block into the running softmax, on `tiles` where the instruction set has them.
///
/// # Safety
/// The machine has `isa`; the rows of the blocks are readable at the widths of the queries and of `run`, which has
/// the rows of the queries.
pub(super) unsafe fn step(isa: crate::Isa, b: &Step, run: &mut Running, tiles: &mut tiles::State) {
    // SAFETY: passed on.
    unsafe {
        if isa == crate::Isa::Amx && tiles.step(b, run) {
            return;
        }
        run_step(isa, b, run)
    }
}

/// Scores of a block, the int8 scale among them, into `out[r * BLOCK + t]`.
///
/// # Safety
/// The machine has `isa`; the rows of the block are readable at the queries' width; `out` holds a multiple
/// of four rows of BLOCK, at least the queries'.
pub(super) unsafe fn raw(isa: crate::Isa, q: &Queries, block: &Block, out: &mut [f32], tiles: &mut tiles::State) {
    // SAFETY: passed on.
    unsafe {
        let units = if isa == crate::Isa::Amx { tiles.scores(q, block, block, out.as_mut_ptr()) } else { None };
        if units.is_none() {
            run_scores(isa, q, block, block, out.as_mut_ptr());
        }
        for (r, out) in out.chunks_exact_mut(BLOCK).take(q.rows).enumerate() {
            let unit = units.map_or(1.0, |u| u[r]);
            if block.k_kind == Kind::Int8 {
                out.iter_mut().zip(&block.k_scale).for_each(|(s, f)| *s *= f * unit);
            }
        }
    }
}
