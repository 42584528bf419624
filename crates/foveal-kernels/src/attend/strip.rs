//! The microkernels: one strip of queries against one tile of keys.
//!
//! Queries lie in vector lanes. With Qᵀ packed once per strip, S = K·Qᵀ broadcasts elements of
//! K rows against vectors of queries, and Oᵀ += Vᵀ·P broadcasts elements of V rows against
//! vectors of weights. So K and V are read where they lie, row by row through pointers (strided,
//! scattered and gathered rows cost the same), the softmax runs down the lanes with no
//! horizontal step, and a mask is one bit a lane.
//!
//! Scores stay plain q·k until the exponential: e^(scale · (s − m)) = 2^(c · (s − m)) with
//! c = scale · log₂ e. Scaling Q beforehand, or folding c into a multiply-add, would save one
//! operation in seventeen there and cost a rounding that is felt at logits in the thousands.

// One contract for the file: the caller runs under an instruction set that has `S`, and the
// pointers of `Step` reach what its fields say.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::dispatch::with_isa;
use crate::exp::{exp2, logistic2, tanh};
use crate::isa::Isa;
use crate::simd::{Portable, Simd};

/// Keys of a tile: a multiple of the 6 and 12 rows of the score microkernels, and with 64
/// queries a tile of scores (24 KiB) stays in the first-level cache beside Qᵀ.
pub(super) const KEY_TILE: usize = 96;
/// Readable key pointers (and score rows) wanted behind a tile.
pub(super) const KEY_PAD: usize = 2;
/// Most queries of a strip on any instruction set, and the bits of a mask.
pub(super) const MAX_STRIP: usize = 64;

/// Start of a row maximum: finite, so that a masked score less it is −∞, never NaN.
pub(super) const NO_MAX: f32 = f32::MIN;

/// One strip × tile visit. `w` = `nv` · lanes.
///
/// With `nv` = 0 the few queries stay rows: `q` and `o` are `nq` rows of `d` and `dv`, scores are
/// `nq` rows of KEY_TILE.
pub(super) struct Step {
    /// Vectors of queries.
    pub nv: usize,
    /// Queries.
    pub nq: usize,
    /// Width of q and k rows.
    pub d: usize,
    /// Width of v rows.
    pub dv: usize,
    /// Keys, 1..=KEY_TILE.
    pub nk: usize,
    /// Qᵀ: `d` rows of `w`.
    pub q: *const f32,
    /// `nk` key rows, then KEY_PAD more readable ones.
    pub k: *const *const f32,
    /// `nk` value rows.
    pub v: *const *const f32,
    /// `nk` masks, bit i for lane i; null when every lane sees every key.
    pub masks: *const u64,
    /// With a softcap, the factor on q·k inside the tanh; else 0.
    pub squash: f32,
    /// `nk` rows of `w` (with `nv` = 0, of `nq`) to add to scores, in units of plain scores; or null.
    pub bias: *const f32,
    /// Positive factor on scores inside the 2^x.
    pub c: f32,
    /// With a sigmoid its bias times log₂ e; then `m` and `l` are not touched.
    pub sigmoid: Option<f32>,
    /// Scratch for KEY_TILE + KEY_PAD rows of `w` scores.
    pub s: *mut f32,
    /// Oᵀ: `dv` rows of `w`.
    pub o: *mut f32,
    /// Running maximum, `w`.
    pub m: *mut f32,
    /// Running sum, `w`.
    pub l: *mut f32,
}

/// S rows for R keys.
#[inline(always)]
unsafe fn scores<S: Simd, const R: usize, const NV: usize>(d: usize, q: *const f32, k: *const *const f32, s: *mut f32) {
    let w = NV * S::LANES;
    let rows: [*const f32; R] = std::array::from_fn(|r| *k.add(r));
    let mut acc = [[S::splat(0.0); NV]; R];
    for c in 0..d {
        let mut qv = [S::splat(0.0); NV];
        for v in 0..NV {
            qv[v] = S::load(q.add(c * w + v * S::LANES));
        }
        for r in 0..R {
            let x = S::splat(*rows[r].add(c));
            for v in 0..NV {
                acc[r][v] = S::fma(x, qv[v], acc[r][v]);
            }
        }
    }
    for r in 0..R {
        for v in 0..NV {
            S::store(s.add(r * w + v * S::LANES), acc[r][v]);
        }
    }
}

/// S of `nk` keys, R a microkernel. The last may read a padding row behind the tile, whose scores nobody
/// looks at.
#[inline(always)]
pub(super) unsafe fn all_scores<S: Simd, const R: usize, const NV: usize>(
    nk: usize,
    d: usize,
    q: *const f32,
    k: *const *const f32,
    s: *mut f32,
) {
    let w = NV * S::LANES;
    let mut j = 0;
    while j + R <= nk {
        scores::<S, R, NV>(d, q, k.add(j), s.add(j * w));
        j += R;
    }
    while j < nk {
        scores::<S, 2, NV>(d, q, k.add(j), s.add(j * w));
        j += 2;
    }
}

/// R rows of Oᵀ, rescaled by `corr` and added to over `nk` keys; `c0` is their channel.
#[inline(always)]
unsafe fn values<S: Simd, const R: usize, const NV: usize>(
    nk: usize,
    p: *const f32,
    v: *const *const f32,
    c0: usize,
    o: *mut f32,
    corr: &[S::V; NV],
) {
    let w = NV * S::LANES;
    let o = o.add(c0 * w);
    let mut acc = [[S::splat(0.0); NV]; R];
    for r in 0..R {
        for x in 0..NV {
            acc[r][x] = S::mul(S::load(o.add(r * w + x * S::LANES)), corr[x]);
        }
    }
    for j in 0..nk {
        let row = (*v.add(j)).add(c0);
        let mut pv = [S::splat(0.0); NV];
        for x in 0..NV {
            pv[x] = S::load(p.add(j * w + x * S::LANES));
        }
        for r in 0..R {
            let y = S::splat(*row.add(r));
            for x in 0..NV {
                acc[r][x] = S::fma(y, pv[x], acc[r][x]);
            }
        }
    }
    for r in 0..R {
        for x in 0..NV {
            S::store(o.add(r * w + x * S::LANES), acc[r][x]);
        }
    }
}

/// All `dv` rows of Oᵀ, R a microkernel.
#[inline(always)]
pub(super) unsafe fn all_values<S: Simd, const R: usize, const NV: usize>(
    nk: usize,
    dv: usize,
    p: *const f32,
    v: *const *const f32,
    o: *mut f32,
    corr: &[S::V; NV],
) {
    let mut c = 0;
    while c + R <= dv {
        values::<S, R, NV>(nk, p, v, c, o, corr);
        c += R;
    }
    while c + 4 <= dv {
        values::<S, 4, NV>(nk, p, v, c, o, corr);
        c += 4;
    }
    while c < dv {
        values::<S, 1, NV>(nk, p, v, c, o, corr);
        c += 1;
    }
}

/// Mask, exponentiate and sum one tile of scores in place; the factor on what was there before.
#[inline(always)]
unsafe fn softmax<S: Simd, const NV: usize>(t: &Step) -> [S::V; NV] {
    let w = NV * S::LANES;
    if t.squash != 0.0 {
        let squash = S::splat(t.squash);
        for i in 0..t.nk * NV {
            let at = t.s.add(i * S::LANES);
            S::store(at, tanh::<S>(S::mul(S::load(at), squash)));
        }
    }
    if !t.bias.is_null() {
        for i in 0..t.nk * NV {
            let at = t.s.add(i * S::LANES);
            S::store(at, S::add(S::load(at), S::load(t.bias.add(i * S::LANES))));
        }
    }
    if !t.masks.is_null() {
        let full = if w == 64 { u64::MAX } else { (1 << w) - 1 };
        let none = S::splat(f32::NEG_INFINITY);
        for j in 0..t.nk {
            let bits = *t.masks.add(j);
            if bits & full != full {
                for v in 0..NV {
                    let at = t.s.add(j * w + v * S::LANES);
                    S::store(at, S::select((bits >> (v * S::LANES)) as u32, S::load(at), none));
                }
            }
        }
    }
    if let Some(bias) = t.sigmoid {
        for i in 0..t.nk * NV {
            let at = t.s.add(i * S::LANES);
            S::store(at, logistic2::<S>(S::fma(S::load(at), S::splat(t.c), S::splat(bias))));
        }
        return [S::splat(1.0); NV];
    }
    let mut old = [S::splat(0.0); NV];
    for v in 0..NV {
        old[v] = S::load(t.m.add(v * S::LANES));
    }
    // Two chains a lane vector: one would wait for the latency of `max`.
    let mut even = old;
    let mut odd = old;
    let mut j = 0;
    while j + 1 < t.nk {
        for v in 0..NV {
            even[v] = S::max(even[v], S::load(t.s.add(j * w + v * S::LANES)));
            odd[v] = S::max(odd[v], S::load(t.s.add((j + 1) * w + v * S::LANES)));
        }
        j += 2;
    }
    if j < t.nk {
        for v in 0..NV {
            even[v] = S::max(even[v], S::load(t.s.add(j * w + v * S::LANES)));
        }
    }
    let mut corr = [S::splat(0.0); NV];
    let mut sum = [S::splat(0.0); NV];
    let c = S::splat(t.c);
    for v in 0..NV {
        even[v] = S::max(even[v], odd[v]);
        S::store(t.m.add(v * S::LANES), even[v]);
        corr[v] = exp2::<S>(S::mul(S::sub(old[v], even[v]), c));
    }
    for j in 0..t.nk {
        for v in 0..NV {
            let at = t.s.add(j * w + v * S::LANES);
            let p = exp2::<S>(S::mul(S::sub(S::load(at), even[v]), c));
            S::store(at, p);
            sum[v] = S::add(sum[v], p);
        }
    }
    for v in 0..NV {
        let at = t.l.add(v * S::LANES);
        S::store(at, S::fma(S::load(at), corr[v], sum[v]));
    }
    corr
}

/// Products of NQ query rows with one key.
#[inline(always)]
unsafe fn dots<S: Simd, const NQ: usize>(d: usize, q: *const f32, k: *const f32) -> [f32; NQ] {
    let mut acc = [S::splat(0.0); NQ];
    let mut c = 0;
    while c + S::LANES <= d {
        let x = S::load(k.add(c));
        for r in 0..NQ {
            acc[r] = S::fma(x, S::load(q.add(r * d + c)), acc[r]);
        }
        c += S::LANES;
    }
    let mut out: [f32; NQ] = std::array::from_fn(|r| S::sum(acc[r]));
    while c < d {
        for r in 0..NQ {
            out[r] += *k.add(c) * *q.add(r * d + c);
        }
        c += 1;
    }
    out
}

/// `C` vectors of channels of NQ output rows.
#[inline(always)]
unsafe fn add_rows<S: Simd, const NQ: usize, const C: usize>(t: &Step, c: usize, corr: &[f32; NQ]) {
    let mut acc = [[S::splat(0.0); C]; NQ];
    for r in 0..NQ {
        for x in 0..C {
            acc[r][x] = S::mul(S::load(t.o.add(r * t.dv + c + x * S::LANES)), S::splat(corr[r]));
        }
    }
    for j in 0..t.nk {
        let row = (*t.v.add(j)).add(c);
        for x in 0..C {
            let y = S::load(row.add(x * S::LANES));
            for r in 0..NQ {
                acc[r][x] = S::fma(y, S::splat(*t.s.add(r * KEY_TILE + j)), acc[r][x]);
            }
        }
    }
    for r in 0..NQ {
        for x in 0..C {
            S::store(t.o.add(r * t.dv + c + x * S::LANES), acc[r][x]);
        }
    }
}

/// A visit of too few queries to fill vectors: channels lie in the lanes instead.
#[inline(always)]
unsafe fn step_few<S: Simd, const NQ: usize>(t: &Step) {
    for j in 0..t.nk {
        let s = dots::<S, NQ>(t.d, t.q, *t.k.add(j));
        for r in 0..NQ {
            *t.s.add(r * KEY_TILE + j) = s[r];
        }
    }
    let end = t.nk.next_multiple_of(S::LANES);
    let mut corr = [0f32; NQ];
    for r in 0..NQ {
        let s = t.s.add(r * KEY_TILE);
        if t.squash != 0.0 {
            for j in (0..end).step_by(S::LANES) {
                S::store(s.add(j), tanh::<S>(S::mul(S::load(s.add(j)), S::splat(t.squash))));
            }
        }
        if !t.bias.is_null() {
            for j in 0..t.nk {
                *s.add(j) += *t.bias.add(j * NQ + r);
            }
        }
        if !t.masks.is_null() {
            for j in 0..t.nk {
                if *t.masks.add(j) >> r & 1 == 0 {
                    *s.add(j) = f32::NEG_INFINITY;
                }
            }
        }
        for j in t.nk..end {
            *s.add(j) = f32::NEG_INFINITY;
        }
        if let Some(bias) = t.sigmoid {
            for j in (0..end).step_by(S::LANES) {
                S::store(s.add(j), logistic2::<S>(S::fma(S::load(s.add(j)), S::splat(t.c), S::splat(bias))));
            }
            corr[r] = 1.0;
            continue;
        }
        let old = *t.m.add(r);
        let mut top = S::splat(old);
        for j in (0..end).step_by(S::LANES) {
            top = S::max(top, S::load(s.add(j)));
        }
        let m = S::top(top);
        *t.m.add(r) = m;
        let (m, c) = (S::splat(m), S::splat(t.c));
        let mut sum = S::splat(0.0);
        for j in (0..end).step_by(S::LANES) {
            let p = exp2::<S>(S::mul(S::sub(S::load(s.add(j)), m), c));
            S::store(s.add(j), p);
            sum = S::add(sum, p);
        }
        let factor = exp2::<S>(S::mul(S::sub(S::splat(old), m), c));
        corr[r] = S::top(factor);
        *t.l.add(r) = *t.l.add(r) * corr[r] + S::sum(sum);
    }
    let mut c = 0;
    while c + 4 * S::LANES <= t.dv {
        add_rows::<S, NQ, 4>(t, c, &corr);
        c += 4 * S::LANES;
    }
    while c + S::LANES <= t.dv {
        add_rows::<S, NQ, 1>(t, c, &corr);
        c += S::LANES;
    }
    while c < t.dv {
        for r in 0..NQ {
            let mut o = *t.o.add(r * t.dv + c) * corr[r];
            for j in 0..t.nk {
                o += *t.s.add(r * KEY_TILE + j) * *(*t.v.add(j)).add(c);
            }
            *t.o.add(r * t.dv + c) = o;
        }
        c += 1;
    }
}

/// A whole visit with R score rows a microkernel.
#[inline(always)]
unsafe fn step_tiled<S: Simd, const R: usize, const NV: usize>(t: &Step) {
    all_scores::<S, R, NV>(t.nk, t.d, t.q, t.k, t.s);
    let corr = softmax::<S, NV>(t);
    all_values::<S, R, NV>(t.nk, t.dv, t.s, t.v, t.o, &corr);
}

/// `f::<S, R, NV>(args)` with the rows R of a microkernel of NV vectors chosen so that accumulators, one set of
/// vectors and a broadcast fill the register file: 32 vectors with 16 lanes, 16 otherwise.
macro_rules! by_registers {
    ($s:ident, $nv:expr, $f:ident($($arg:expr),* $(,)?)) => {
        match ($s::LANES, $nv) {
            (16, 1) => $f::<$s, 12, 1>($($arg),*),
            (16, 2) => $f::<$s, 8, 2>($($arg),*),
            (16, 3) => $f::<$s, 8, 3>($($arg),*),
            (16, _) => $f::<$s, 6, 4>($($arg),*),
            (_, 1) => $f::<$s, 8, 1>($($arg),*),
            (_, _) => $f::<$s, 6, 2>($($arg),*),
        }
    };
}
pub(super) use by_registers;

#[inline(always)]
unsafe fn step_on<S: Simd>(t: &Step) {
    match (t.nv, t.nq) {
        (0, 1) => step_few::<S, 1>(t),
        (0, 2) => step_few::<S, 2>(t),
        (0, 3) => step_few::<S, 3>(t),
        (0, _) => step_few::<S, 4>(t),
        (nv, _) => by_registers!(S, nv, step_tiled(t)),
    }
}

/// Products alone: [`all_scores`] of strips of `nv` vectors.
#[inline(always)]
unsafe fn score_tile_on<S: Simd>(nv: usize, nk: usize, d: usize, q: *const f32, k: *const *const f32, s: *mut f32) {
    by_registers!(S, nv, all_scores(nk, d, q, k, s))
}
with_isa!(simd, pub(super) unsafe fn score_tile => score_tile_on(nv: usize, nk: usize, d: usize, q: *const f32, k: *const *const f32, s: *mut f32));

/// Transpose `rows` (each `n` wide) times `scale` into `n` rows of `w`, lanes past the rows zero.
#[inline(always)]
unsafe fn pack_on(rows: &[*const f32], n: usize, scale: f32, w: usize, to: *mut f32) {
    let full = rows.len() / 4 * 4;
    let mut i = 0;
    while i < full {
        let r: [*const f32; 4] = std::array::from_fn(|x| rows[i + x]);
        let mut c = 0;
        while c + 4 <= n {
            let x: [[f32; 4]; 4] = std::array::from_fn(|y| r[y].add(c).cast::<[f32; 4]>().read_unaligned());
            for y in 0..4 {
                let line = [x[0][y] * scale, x[1][y] * scale, x[2][y] * scale, x[3][y] * scale];
                to.add((c + y) * w + i).cast::<[f32; 4]>().write_unaligned(line);
            }
            c += 4;
        }
        while c < n {
            for y in 0..4 {
                *to.add(c * w + i + y) = *r[y].add(c) * scale;
            }
            c += 1;
        }
        i += 4;
    }
    for i in full..w {
        for c in 0..n {
            *to.add(c * w + i) = if i < rows.len() { *rows[i].add(c) * scale } else { 0.0 };
        }
    }
}

/// What remains once all keys are seen: sink, division, and rows out of Oᵀ.
pub(super) struct Finish<'a> {
    /// Strip width; 0 when `o` holds rows.
    pub w: usize,
    /// Width of v rows.
    pub dv: usize,
    /// Oᵀ (or O).
    pub o: *const f32,
    /// Running maxima of plain scores.
    pub m: *const f32,
    /// Running sums.
    pub l: *const f32,
    /// Positive factor on scores inside the e^x.
    pub unit: f32,
    /// Whether rows are divided by their sums, as they are unless weights are sigmoids.
    pub summed: bool,
    /// Sink logit.
    pub sink: Option<f32>,
    /// Output rows.
    pub rows: &'a [*mut f32],
    /// Natural log-sum-exp of each row.
    pub lse: *mut f32,
}

/// Fill in the log-sum-exp of each row and return the factor on its values.
#[inline(always)]
unsafe fn factors(f: &Finish) -> [f32; MAX_STRIP] {
    let mut factor = [0f32; MAX_STRIP];
    if !f.summed {
        return [1.0; MAX_STRIP];
    }
    for i in 0..f.rows.len() {
        let l = *f.l.add(i);
        // Rounded once, at the end: the backward pass takes e^(s − lse) at logits in the thousands.
        let m = f64::from(*f.m.add(i)) * f64::from(f.unit);
        let (mut top, mut sum, mut keep) = (m, l, 1.0);
        if let Some(s) = f.sink.map(f64::from) {
            top = m.max(s);
            keep = ((m - top) as f32).exp();
            sum = l * keep + ((s - top) as f32).exp();
        }
        // A row that saw no key has l = 0. A NaN sum must reach the output, so no `sum > 0`.
        let none = sum == 0.0;
        *f.lse.add(i) = if none { f32::NEG_INFINITY } else { (top + f64::from(sum.ln())) as f32 };
        factor[i] = if l == 0.0 { 0.0 } else { keep / sum };
    }
    factor
}

/// Rows of a strip that was never transposed.
#[inline(always)]
unsafe fn finish_rows(f: &Finish, factor: &[f32; MAX_STRIP]) {
    for (r, row) in f.rows.iter().enumerate() {
        for c in 0..f.dv {
            *row.add(c) = *f.o.add(r * f.dv + c) * factor[r];
        }
    }
}

#[inline(always)]
unsafe fn finish_on(f: &Finish) {
    let factor = factors(f);
    if f.w == 0 {
        return finish_rows(f, &factor);
    }
    let n = f.rows.len();
    let mut i = 0;
    while i < n {
        let many = (n - i).min(4);
        let mut c = 0;
        if many == 4 {
            while c + 4 <= f.dv {
                let x: [[f32; 4]; 4] =
                    std::array::from_fn(|y| f.o.add((c + y) * f.w + i).cast::<[f32; 4]>().read_unaligned());
                for y in 0..4 {
                    let k = factor[i + y];
                    let line = [x[0][y] * k, x[1][y] * k, x[2][y] * k, x[3][y] * k];
                    f.rows[i + y].add(c).cast::<[f32; 4]>().write_unaligned(line);
                }
                c += 4;
            }
        }
        while c < f.dv {
            for y in i..i + many {
                *f.rows[y].add(c) = *f.o.add(c * f.w + y) * factor[y];
            }
            c += 1;
        }
        i += many;
    }
}

#[inline(always)]
unsafe fn widen_on<S: Simd>(from: *const u16, n: usize, to: *mut f32) {
    let mut c = 0;
    while c + S::LANES <= n {
        S::store(to.add(c), S::load_bf16(from.add(c)));
        c += S::LANES;
    }
    while c < n {
        *to.add(c) = f32::from_bits(u32::from(*from.add(c)) << 16);
        c += 1;
    }
}

/// The kernels of one instruction set.
pub(super) struct Kernels {
    /// Lanes of a vector.
    pub lanes: usize,
    /// Vectors of a full strip.
    pub vecs: usize,
    /// Up to so many queries (of a task) stay rows; at most 4.
    pub few: usize,
    /// One strip × tile visit.
    pub step: unsafe fn(&Step),
    /// Rows → transposed strip: (rows, row width, scale, strip width, target).
    pub pack: unsafe fn(&[*const f32], usize, f32, usize, *mut f32),
    /// Strip → rows.
    pub finish: unsafe fn(&Finish),
    /// bf16 bits → f32.
    pub widen: unsafe fn(*const u16, usize, *mut f32),
}

impl Kernels {
    /// The kernels for `isa`, lowered to what the machine has.
    pub(super) fn of(isa: Isa) -> &'static Kernels {
        match isa.min(Isa::detect()) {
            Isa::Portable => &PORTABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &x86::AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => &x86::AVX512,
            #[cfg(not(target_arch = "x86_64"))]
            _ => &PORTABLE,
        }
    }
}

static PORTABLE: Kernels = Kernels {
    lanes: Portable::LANES,
    vecs: 2,
    few: 1,
    step: step_on::<Portable>,
    pack: pack_on,
    finish: finish_on,
    widen: widen_on::<Portable>,
};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::simd::{Avx2, Avx512, transpose};
    use std::arch::x86_64::*;

    /// The lowest `n` (or all 16) lanes.
    #[inline(always)]
    fn lanes(n: usize) -> u16 {
        if n >= 16 { 0xffff } else { (1 << n) - 1 }
    }

    /// [`pack_on`], 16 × 16 at a time.
    #[inline(always)]
    unsafe fn pack_16(rows: &[*const f32], n: usize, scale: f32, w: usize, to: *mut f32) {
        let scale = _mm512_set1_ps(scale);
        for i in (0..w).step_by(16) {
            for c in (0..n).step_by(16) {
                let mut x = [_mm512_setzero_si512(); 16];
                match rows.get(i..i + 16) {
                    Some(rows) if c + 16 <= n => {
                        for r in 0..16 {
                            x[r] = _mm512_loadu_si512(rows[r].add(c).cast());
                        }
                    }
                    _ => {
                        for (x, row) in x.iter_mut().zip(rows.iter().skip(i)) {
                            *x = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(n - c), row.add(c)));
                        }
                    }
                }
                let y = transpose(x);
                for r in 0..(n - c).min(16) {
                    _mm512_storeu_ps(to.add((c + r) * w + i), _mm512_mul_ps(_mm512_castsi512_ps(y[r]), scale));
                }
            }
        }
    }

    /// [`finish_on`], 16 × 16 at a time.
    #[inline(always)]
    unsafe fn finish_16(f: &Finish) {
        let factor = factors(f);
        if f.w == 0 {
            return finish_rows(f, &factor);
        }
        for i in (0..f.rows.len()).step_by(16) {
            let rows = &f.rows[i..f.rows.len().min(i + 16)];
            let factor = _mm512_loadu_ps(factor.as_ptr().add(i));
            for c in (0..f.dv).step_by(16) {
                let mut x = [_mm512_setzero_si512(); 16];
                let line = |r: usize| {
                    let o = _mm512_loadu_ps(f.o.add((c + r) * f.w + i));
                    _mm512_castps_si512(_mm512_mul_ps(o, factor))
                };
                // Fixed counts, so that all of it stays in registers.
                if c + 16 <= f.dv {
                    for r in 0..16 {
                        x[r] = line(r);
                    }
                } else {
                    for (r, x) in x.iter_mut().enumerate().take(f.dv - c) {
                        *x = line(r);
                    }
                }
                let y = transpose(x);
                if rows.len() == 16 && c + 16 <= f.dv {
                    for r in 0..16 {
                        _mm512_storeu_si512(rows[r].add(c).cast(), y[r]);
                    }
                } else {
                    for (r, row) in rows.iter().enumerate() {
                        _mm512_mask_storeu_ps(row.add(c), lanes(f.dv - c), _mm512_castsi512_ps(y[r]));
                    }
                }
            }
        }
    }

    macro_rules! kernels {
        ($name:ident, $set:ty, $features:literal, $vecs:literal, $few:literal, $pack:ident, $finish:ident, $module:ident) => {
            mod $module {
                use super::*;
                #[target_feature(enable = $features)]
                pub(super) unsafe fn step(t: &Step) {
                    step_on::<$set>(t)
                }
                #[target_feature(enable = $features)]
                pub(super) unsafe fn pack(rows: &[*const f32], n: usize, scale: f32, w: usize, to: *mut f32) {
                    $pack(rows, n, scale, w, to)
                }
                #[target_feature(enable = $features)]
                pub(super) unsafe fn finish(f: &Finish) {
                    $finish(f)
                }
                #[target_feature(enable = $features)]
                pub(super) unsafe fn widen(from: *const u16, n: usize, to: *mut f32) {
                    widen_on::<$set>(from, n, to)
                }
            }
            pub(super) static $name: Kernels = Kernels {
                lanes: <$set>::LANES,
                vecs: $vecs,
                few: $few,
                step: $module::step,
                pack: $module::pack,
                finish: $module::finish,
                widen: $module::widen,
            };
        };
    }
    kernels!(AVX2, Avx2, "avx2,fma", 2, 2, pack_on, finish_on, avx2);
    kernels!(AVX512, Avx512, "avx512f,avx512bw,avx512dq,avx512vl", 4, 4, pack_16, finish_16, avx512);
}
