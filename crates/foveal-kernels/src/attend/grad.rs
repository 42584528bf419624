//! The microkernels of the backward pass: one strip of queries against one tile of keys.
//!
//! Layout and products are those of `strip`, queries in lanes: S = K·Qᵀ and dP = V·dOᵀ broadcast rows of K
//! and V against packed queries, dQᵀ += Kᵀ·dS is the second product of the forward pass with K in V's place.
//! Log-sum-exp and row sums lie in lanes too, so that dS = P (dP − D) has no horizontal step. Only
//! dV += P·dO and dK += dS·Q are of another kind: their sums run over the lanes, so they broadcast elements
//! of P and dS against rows of dO and Q as they lie in memory, channels in lanes.

// One contract for the file: the caller runs under an instruction set that has `S`, and the
// pointers of `Step` reach what its fields say.
#![allow(unsafe_op_in_unsafe_fn)]

use super::strip::{all_scores, all_values, by_registers};
use crate::dispatch::with_isa;
use crate::exp::{LOG2_E, exp2, logistic2, tanh};
use crate::simd::Simd;

/// Keys of a tile: a multiple of the 6, 8 and 12 rows of the microkernels; scores and their gradients of 64
/// queries are 24 KiB.
pub(super) const KEY_TILE: usize = 48;

/// One strip × tile visit. `w` = `nv` · lanes.
pub(super) struct Step {
    /// Vectors of queries, at least 1.
    pub nv: usize,
    /// Queries.
    pub nq: usize,
    /// Widths of q and k rows, and of v and dout rows.
    pub d: usize,
    pub dv: usize,
    /// The same in whole vectors: distance of the rows of `q` and `dk`, `dout` and `dv_rows`.
    pub dp: usize,
    pub dvp: usize,
    /// Keys, 1..=KEY_TILE.
    pub nk: usize,
    /// Qᵀ and dOᵀ: `d` and `dv` rows of `w`.
    pub qt: *const f32,
    pub dot: *const f32,
    /// Q and dO: `nq` rows of `dp` and `dvp`, zero past `d` and `dv`.
    pub q: *const f32,
    pub dout: *const f32,
    /// Rows of K and V, then KEY_PAD more readable ones.
    pub k: *const *const f32,
    pub v: *const *const f32,
    /// Rows of `dp` and `dvp` to add to.
    pub dk: *const *mut f32,
    pub dv_rows: *const *mut f32,
    /// dQᵀ, `d` rows of `w` to add to.
    pub dqt: *mut f32,
    /// Log-sum-exp of each query, ∞ where a lane has no say; D = Σ dO·O. With a sigmoid, less its bias and 0.
    pub lse: *const f32,
    pub delta: *const f32,
    /// `nk` masks, bit i for lane i; null when every lane sees every key.
    pub masks: *const u64,
    /// `nk` rows of `w` to add to scaled scores; or null.
    pub bias: *const f32,
    /// Factor on q·k; with a softcap (`cap` not 0) the factor inside the tanh.
    pub factor: f32,
    pub cap: f32,
    /// Whether weights are sigmoids.
    pub sigmoid: bool,
    /// Room for KEY_TILE + KEY_PAD rows of `w`: scores, then P.
    pub s: *mut f32,
    /// The same: dP, then the gradient of q·k up to the scale.
    pub ds: *mut f32,
    /// `nk` rows of `w`: the gradient of the scores as they enter the softmax; or null.
    pub dbias: *mut f32,
}

impl Step {
    /// No keys, no operands: for those who need only some.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn none() -> Self {
        use std::ptr::{null, null_mut};
        Step {
            nv: 0,
            nq: 0,
            d: 0,
            dv: 0,
            dp: 0,
            dvp: 0,
            nk: 0,
            qt: null(),
            dot: null(),
            q: null(),
            dout: null(),
            k: null(),
            v: null(),
            dk: null(),
            dv_rows: null(),
            dqt: null_mut(),
            lse: null(),
            delta: null(),
            masks: null(),
            bias: null(),
            factor: 0.0,
            cap: 0.0,
            sigmoid: false,
            s: null_mut(),
            ds: null_mut(),
            dbias: null_mut(),
        }
    }

    /// Whether nothing but e^ stands between scores and weights.
    #[inline(always)]
    fn plain(&self) -> bool {
        self.masks.is_null() && self.bias.is_null() && self.cap == 0.0 && self.dbias.is_null() && !self.sigmoid
    }
}

/// Scores to P and dP to dS, in place.
#[inline(always)]
unsafe fn gradients<S: Simd, const NV: usize, const PLAIN: bool>(t: &Step) {
    let w = NV * S::LANES;
    let (factor, cap, one, zero) = (S::splat(t.factor), S::splat(t.cap), S::splat(1.0), S::splat(0.0));
    let log2_e = S::splat(LOG2_E);
    let mut lse = [zero; NV];
    let mut delta = [zero; NV];
    for v in 0..NV {
        lse[v] = S::sub(zero, S::load(t.lse.add(v * S::LANES)));
        delta[v] = S::load(t.delta.add(v * S::LANES));
    }
    for j in 0..t.nk {
        let bits = if PLAIN || t.masks.is_null() { u64::MAX } else { *t.masks.add(j) };
        for v in 0..NV {
            let at = j * w + v * S::LANES;
            let (s, dp) = (S::load(t.s.add(at)), S::load(t.ds.add(at)));
            // In units of scores until the difference is small: logits in the thousands lose nothing.
            let mut slope = one;
            let x = if PLAIN {
                S::fma(s, factor, lse[v])
            } else {
                let base = if t.bias.is_null() { lse[v] } else { S::add(S::load(t.bias.add(at)), lse[v]) };
                if t.cap == 0.0 {
                    S::fma(s, factor, base)
                } else {
                    let bent = tanh::<S>(S::mul(s, factor));
                    slope = S::sub(one, S::mul(bent, bent));
                    S::fma(bent, cap, base)
                }
            };
            let x = S::mul(x, log2_e);
            let logistic = !PLAIN && t.sigmoid;
            let mut p = if logistic { logistic2::<S>(x) } else { exp2::<S>(x) };
            let mut ds = S::mul(p, S::sub(dp, delta[v]));
            if logistic {
                ds = S::mul(ds, S::sub(one, p));
            }
            if !PLAIN {
                // Both: a hidden key may hold anything.
                let lanes = (bits >> (v * S::LANES)) as u32;
                p = S::select(lanes, p, zero);
                ds = S::select(lanes, ds, zero);
                if !t.dbias.is_null() {
                    S::store(t.dbias.add(at), ds);
                }
                if t.cap != 0.0 {
                    ds = S::mul(ds, slope);
                }
            }
            S::store(t.s.add(at), p);
            S::store(t.ds.add(at), ds);
        }
    }
}

/// `NV` vectors of channels of R rows of C += A·B: row r of A starts at `a + r · w`, B has `n` rows.
#[inline(always)]
unsafe fn outer<S: Simd, const R: usize, const NV: usize>(
    n: usize,
    a: *const f32,
    w: usize,
    b: *const f32,
    width: usize,
    c: *const *mut f32,
    at: usize,
) {
    let rows: [*mut f32; R] = std::array::from_fn(|r| (*c.add(r)).add(at));
    let mut acc = [[S::splat(0.0); NV]; R];
    for r in 0..R {
        for v in 0..NV {
            acc[r][v] = S::load(rows[r].add(v * S::LANES));
        }
    }
    let b = b.add(at);
    for i in 0..n {
        let mut bv = [S::splat(0.0); NV];
        for v in 0..NV {
            bv[v] = S::load(b.add(i * width + v * S::LANES));
        }
        for r in 0..R {
            let x = S::splat(*a.add(r * w + i));
            for v in 0..NV {
                acc[r][v] = S::fma(x, bv[v], acc[r][v]);
            }
        }
    }
    for r in 0..R {
        for v in 0..NV {
            S::store(rows[r].add(v * S::LANES), acc[r][v]);
        }
    }
}

/// [`outer`] for all `nk` rows.
#[inline(always)]
unsafe fn outer_rows<S: Simd, const R: usize, const NV: usize>(
    nk: usize,
    n: usize,
    a: *const f32,
    w: usize,
    b: *const f32,
    width: usize,
    c: *const *mut f32,
    at: usize,
) {
    let mut j = 0;
    while j + R <= nk {
        outer::<S, R, NV>(n, a.add(j * w), w, b, width, c.add(j), at);
        j += R;
    }
    // No row past the last is touched: behind a part of a tile lie rows of others.
    while j + 2 <= nk {
        outer::<S, 2, NV>(n, a.add(j * w), w, b, width, c.add(j), at);
        j += 2;
    }
    if j < nk {
        outer::<S, 1, NV>(n, a.add(j * w), w, b, width, c.add(j), at);
    }
}

/// [`outer_rows`] for all `width` channels.
#[inline(always)]
unsafe fn outer_all<S: Simd>(
    nk: usize,
    n: usize,
    a: *const f32,
    w: usize,
    b: *const f32,
    width: usize,
    c: *const *mut f32,
) {
    let mut at = 0;
    while at < width {
        let nv = ((width - at) / S::LANES).min(if S::LANES == 16 { 4 } else { 2 });
        by_registers!(S, nv, outer_rows(nk, n, a, w, b, width, c, at));
        at += nv * S::LANES;
    }
}

/// [`gradients`] of strips of two vectors.
#[inline(always)]
pub(super) unsafe fn gradients_of_two<S: Simd>(t: &Step) {
    if t.plain() {
        gradients::<S, 2, true>(t);
    } else {
        gradients::<S, 2, false>(t);
    }
}

#[inline(always)]
unsafe fn step_tiled<S: Simd, const R: usize, const NV: usize>(t: &Step) {
    let w = NV * S::LANES;
    all_scores::<S, R, NV>(t.nk, t.d, t.qt, t.k, t.s);
    all_scores::<S, R, NV>(t.nk, t.dv, t.dot, t.v, t.ds);
    if t.plain() {
        gradients::<S, NV, true>(t);
    } else {
        gradients::<S, NV, false>(t);
    }
    values_of::<S, R, NV>(t.nk, t.d, t.ds, t.k, t.dqt);
    outer_all::<S>(t.nk, t.nq, t.s, w, t.dout, t.dvp, t.dv_rows);
    outer_all::<S>(t.nk, t.nq, t.ds, w, t.q, t.dp, t.dk);
}

#[inline(always)]
unsafe fn step_on<S: Simd>(t: &Step) {
    by_registers!(S, t.nv, step_tiled(t))
}
with_isa!(simd, pub(super) unsafe fn step => step_on(t: &Step));

/// to[i] += factor · from[i].
#[inline(always)]
unsafe fn add_scaled_on<S: Simd>(from: *const f32, n: usize, factor: f32, to: *mut f32) {
    let mut i = 0;
    while i + S::LANES <= n {
        S::store(to.add(i), S::fma(S::load(from.add(i)), S::splat(factor), S::load(to.add(i))));
        i += S::LANES;
    }
    while i < n {
        *to.add(i) += *from.add(i) * factor;
        i += 1;
    }
}
with_isa!(simd, pub(super) unsafe fn add_scaled => add_scaled_on(from: *const f32, n: usize, factor: f32, to: *mut f32));

/// Σ a[i] · b[i].
#[inline(always)]
unsafe fn dot_on<S: Simd>(a: *const f32, b: *const f32, n: usize) -> f32 {
    let mut acc = S::splat(0.0);
    let mut i = 0;
    while i + S::LANES <= n {
        acc = S::fma(S::load(a.add(i)), S::load(b.add(i)), acc);
        i += S::LANES;
    }
    let mut sum = S::sum(acc);
    while i < n {
        sum += *a.add(i) * *b.add(i);
        i += 1;
    }
    sum
}
with_isa!(simd, pub(super) unsafe fn dot => dot_on(a: *const f32, b: *const f32, n: usize) -> f32);

/// Of a tile of gradients of scores, `nk` rows of `w` = `nv` · lanes: dQᵀ += Kᵀ·T for `k` of width `r`, and
/// dK += T·Q for `n` queries in rows of `rp`, `r` in whole vectors.
#[inline(always)]
unsafe fn factors_on<S: Simd>(
    nv: usize,
    nk: usize,
    n: usize,
    r: usize,
    rp: usize,
    t: *const f32,
    k: *const *const f32,
    q: *const f32,
    dqt: *mut f32,
    dk: *const *mut f32,
) {
    by_registers!(S, nv, values_of(nk, r, t, k, dqt));
    outer_all::<S>(nk, n, t, nv * S::LANES, q, rp, dk);
}
with_isa!(simd, pub(super) unsafe fn factors => factors_on(
    nv: usize, nk: usize, n: usize, r: usize, rp: usize,
    t: *const f32, k: *const *const f32, q: *const f32, dqt: *mut f32, dk: *const *mut f32,
));

/// [`all_values`] without a rescaling.
#[inline(always)]
unsafe fn values_of<S: Simd, const R: usize, const NV: usize>(
    nk: usize,
    d: usize,
    t: *const f32,
    k: *const *const f32,
    to: *mut f32,
) {
    all_values::<S, R, NV>(nk, d, t, k, to, &[S::splat(1.0); NV]);
}
