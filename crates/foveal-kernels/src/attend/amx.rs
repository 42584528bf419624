//! The bf16 path on AMX tiles: both products on tiles, softmax in f32 between them.
//!
//! The layout is that of `strip`, queries in lanes, because it suits the tiles: rows of K are the
//! left operand as they lie in memory; the transposed queries, two channels to a lane, are the
//! right one; the weights of two keys, rounded to bf16 and interleaved, are the right operand of
//! the second product, whose left one, Vᵀ, is packed once per key tile for all strips of a task.
//!
//! The softmax is cut to the bone. Its exponential is one fused product, a fraction, a cubic good to
//! 9e-5 (weights are rounded to 4e-3 right after, by adding half a step to the cubic's constant and
//! dropping the low bits) and `vscalef`, which also sends −∞ to 0. The denominator sums the weights
//! as they are used. And where the scores of a tile cannot exceed the references so far by more than
//! a factor of 2^[`ROOM`] (by Cauchy and Schwarz |q|·max|k| bounds them), maxima are not looked for
//! and Oᵀ is not rescaled: bf16 reaches as far as f32, so weights above 1 do no harm. That is nearly
//! every tile but a row's first, and it lets lanes work on one set of scores while tiles make the next.
//!
//! Sixteen weights take six operations of a vector: the product, the fraction, three of the cubic and the scale. With
//! AVX-512 FP16 the cubic of 32 fractions would be three instead of six, but the fractions would have to be narrowed
//! (two conversions of two operations and a shuffle) and its values widened for the scale, whose range FP16 does
//! not have: more operations than it saves. Whole exponents in FP16 would be off by 2⁻⁷ at −16, which breaks the error
//! rule; AVX-512 BF16 has no product but the dot product of pairs.

#![allow(unsafe_op_in_unsafe_fn)]

use super::Normalizer;
use super::amx_sigmoid::visit_sigmoid;
use super::drive::{Call, Scratch};
use super::scope::{Source, WORK_TILE};
use super::strip::{Finish, MAX_STRIP, NO_MAX};
use crate::amx::Tiles;
use crate::exp::LOG2_E;
use crate::simd::transpose;
use crate::work::Work;
use half::bf16;
use rayon::prelude::*;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Keys of a tile: a multiple of 32. Four times that many bytes times [`STRIP`] are the scores.
pub(super) const KEYS: usize = 256;
/// Bytes of a row, rows, and bytes of an AMX tile.
pub(super) const LINE: usize = 64;
pub(super) const ROWS: usize = 16;
pub(super) const TILE: usize = LINE * ROWS;
/// Queries of a strip: what stays in tiles while its keys go by.
pub(super) const STRIP: usize = 32;

/// Operands of one product of up to 2 × 2 tiles, C = Σ A·B over `steps`; all distances in bytes.
pub(super) struct Product {
    pub(super) steps: usize,
    /// Where A lies: its start with a distance from step to step, or (`LIST`) one start a step
    /// and a distance common to all.
    pub(super) a: *const u8,
    pub(super) a_list: *const *const u8,
    pub(super) a_step: usize,
    /// From the first row tile of A to the second.
    pub(super) a_next: usize,
    pub(super) a_line: usize,
    /// The second column tile of B (and of C) lies 64 bytes on.
    pub(super) b: *const u8,
    pub(super) b_step: usize,
    pub(super) b_line: usize,
    pub(super) c: *mut u8,
    pub(super) c_line: usize,
}

/// C = [C +] Σ A·B with one or two row tiles (`A2`) and column tiles (`B2`).
#[inline(always)]
pub(super) unsafe fn product<const ADD: bool, const LIST: bool, const A2: bool, const B2: bool>(p: &Product) {
    // Tiles 0..=3 are C, 4 and 5 A, 6 and 7 B; nobody else uses any between these statements.
    macro_rules! tile {
        ($op:literal, $p:expr, $line:expr) => {
            asm!($op, p = in(reg) $p, l = in(reg) $line, options(nostack, preserves_flags))
        };
    }
    let (mut a, mut b, c) = (p.a, p.b, p.c);
    let low = c.wrapping_add(ROWS * p.c_line);
    if ADD {
        tile!("tileloadd tmm0, [{p} + {l}*1]", c, p.c_line);
        if B2 {
            tile!("tileloadd tmm1, [{p} + {l}*1 + 64]", c, p.c_line);
        }
        if A2 {
            tile!("tileloadd tmm2, [{p} + {l}*1]", low, p.c_line);
        }
        if A2 && B2 {
            tile!("tileloadd tmm3, [{p} + {l}*1 + 64]", low, p.c_line);
        }
    } else {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
        asm!("tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
    }
    for i in 0..p.steps {
        if LIST {
            a = (*p.a_list.add(i)).add(p.a_step);
        }
        tile!("tileloadd tmm6, [{p} + {l}*1]", b, p.b_line);
        tile!("tileloadd tmm4, [{p} + {l}*1]", a, p.a_line);
        asm!("tdpbf16ps tmm0, tmm4, tmm6", options(nostack, preserves_flags));
        if B2 {
            tile!("tileloadd tmm7, [{p} + {l}*1 + 64]", b, p.b_line);
            asm!("tdpbf16ps tmm1, tmm4, tmm7", options(nostack, preserves_flags));
        }
        asm!("tilezero tmm4", options(nostack, preserves_flags));
        if A2 {
            tile!("tileloadd tmm4, [{p} + {l}*1]", a.wrapping_add(p.a_next), p.a_line);
            asm!("tdpbf16ps tmm2, tmm4, tmm6", options(nostack, preserves_flags));
        }
        asm!("tilezero tmm6", options(nostack, preserves_flags));
        if A2 && B2 {
            asm!("tdpbf16ps tmm3, tmm4, tmm7", options(nostack, preserves_flags));
        }
        asm!("tilezero tmm4", "tilezero tmm7", options(nostack, preserves_flags));
        if !LIST {
            a = a.wrapping_add(p.a_step);
        }
        b = b.wrapping_add(p.b_step);
    }
    tile!("tilestored [{p} + {l}*1], tmm0", c, p.c_line);
    if B2 {
        tile!("tilestored [{p} + {l}*1 + 64], tmm1", c, p.c_line);
    }
    if A2 {
        tile!("tilestored [{p} + {l}*1], tmm2", low, p.c_line);
    }
    if A2 && B2 {
        tile!("tilestored [{p} + {l}*1 + 64], tmm3", low, p.c_line);
    }
    asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
    asm!("tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
}

/// Scores of 32 keys and 32 queries for heads 64 wide, the commonest.
#[inline(always)]
unsafe fn scores_64(k: *const u8, k_line: usize, q: *const u8, q_line: usize, s: *mut u8, s_line: usize) {
    macro_rules! tile {
        ($op:literal, $p:expr, $line:expr) => {
            asm!($op, p = in(reg) $p, l = in(reg) $line, options(nostack, preserves_flags))
        };
    }
    let q1 = q.add(ROWS * q_line);
    for r in 0..2 {
        let (k, s) = (k.add(r * ROWS * k_line), s.add(r * ROWS * s_line));
        tile!("tileloadd tmm2, [{p} + {l}*1]", k, k_line);
        tile!("tileloadd tmm3, [{p} + {l}*1 + 64]", k, k_line);
        asm!("tilezero tmm0", options(nostack, preserves_flags));
        tile!("tileloadd tmm4, [{p} + {l}*1]", q, q_line);
        asm!("tdpbf16ps tmm0, tmm2, tmm4", "tilezero tmm4", options(nostack, preserves_flags));
        tile!("tileloadd tmm5, [{p} + {l}*1]", q1, q_line);
        asm!("tdpbf16ps tmm0, tmm3, tmm5", "tilezero tmm5", options(nostack, preserves_flags));
        tile!("tilestored [{p} + {l}*1], tmm0", s, s_line);
        asm!("tilezero tmm1", options(nostack, preserves_flags));
        tile!("tileloadd tmm4, [{p} + {l}*1 + 64]", q, q_line);
        asm!("tdpbf16ps tmm1, tmm2, tmm4", "tilezero tmm4", "tilezero tmm2", options(nostack, preserves_flags));
        tile!("tileloadd tmm5, [{p} + {l}*1 + 64]", q1, q_line);
        asm!("tdpbf16ps tmm1, tmm3, tmm5", "tilezero tmm5", "tilezero tmm3", options(nostack, preserves_flags));
        tile!("tilestored [{p} + {l}*1 + 64], tmm1", s, s_line);
    }
    asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
}

/// One strip × tile visit. `w` = 16 · `nv` queries.
pub(super) struct Visit {
    nv: usize,
    /// Channels of q and k, a multiple of 32.
    pub(super) dp: usize,
    /// Tiles of 16 value channels.
    pub(super) dv_tiles: usize,
    /// Keys; rows of K and Vᵀ are readable (and finite) to the next multiple of 32.
    pub(super) nk: usize,
    /// Qᵀ: dp/2 rows of `w` pairs of channels.
    pub(super) q: *const u8,
    /// For each 32 keys, where their rows start and the bytes from row to row.
    k: *const (*const u8, usize),
    /// For each 32 keys, Vᵀ: one tile for each 16 channels.
    pub(super) v: *const *const u8,
    /// As in `strip`.
    pub(super) masks: *const u64,
    pub(super) squash: f32,
    pub(super) bias: *const f32,
    pub(super) c: f32,
    /// With a sigmoid its bias times log₂ e; then `m` and `l` are not touched.
    sigmoid: Option<f32>,
    /// Factor on a repeated maximum, or 0.
    beta: f32,
    /// Room for KEYS rows of `w` f32: scores, then weights.
    pub(super) s: *mut f32,
    /// Oᵀ: 16 · dv_tiles rows of `w`.
    pub(super) o: *mut f32,
    m: *mut f32,
    l: *mut f32,
    /// Lengths of the `w` queries, and of the longest key (∞ if unknown or not a number).
    q_len: *const f32,
    k_len: f32,
}

/// Weights stay below 2^ROOM, so that their sums stay below 2^128.
const ROOM: f32 = 96.0;
/// Of a cubic that is 2^f on 0..=1 to 9e-5 and exact at 0.
const CUBIC: [f32; 4] = [7.706_72e-2, 0.227_644_8, 0.695_116_8, 1.0];

/// 2^x to 9e-5, exact at 0, with `half` added to the mantissa; −∞ gives 0, NaN stays NaN.
#[inline(always)]
pub(super) unsafe fn exp2(x: __m512, half: f32) -> __m512 {
    // r = x − ⌊x⌋; `scalef` takes the floor of its exponent itself.
    let r = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x);
    let mut p = _mm512_set1_ps(CUBIC[0]);
    for c in [CUBIC[1], CUBIC[2], CUBIC[3] + half] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, x)
}

/// What only the general case does between the products: softcap, bias, maxima, and Oᵀ and the sums
/// rescaled where a maximum rose.
#[inline(always)]
unsafe fn references<const NV: usize>(t: &Visit) {
    use crate::simd::{Avx512, Simd};
    let w = NV * 16;
    if t.squash != 0.0 {
        for i in 0..t.nk * NV {
            let at = t.s.add(i * 16);
            let x = Avx512::mul(Avx512::load(at), Avx512::splat(t.squash));
            Avx512::store(at, crate::exp::tanh::<Avx512>(x));
        }
    }
    if !t.bias.is_null() {
        for i in 0..t.nk * NV {
            let at = t.s.add(i * 16);
            Avx512::store(at, Avx512::add(Avx512::load(at), Avx512::load(t.bias.add(i * 16))));
        }
    }
    if !t.masks.is_null() {
        hide::<NV>(t.masks, t.nk, t.s);
    }
    let zero = _mm512_setzero_ps();
    let (mut old, mut top) = ([zero; NV], [zero; NV]);
    for v in 0..NV {
        old[v] = _mm512_loadu_ps(t.m.add(v * 16));
        top[v] = old[v];
    }
    let mut odd = top;
    for j in (0..t.nk & !1).step_by(2) {
        for v in 0..NV {
            top[v] = _mm512_max_ps(top[v], _mm512_loadu_ps(t.s.add(j * w + v * 16)));
            odd[v] = _mm512_max_ps(odd[v], _mm512_loadu_ps(t.s.add((j + 1) * w + v * 16)));
        }
    }
    if t.nk % 2 == 1 {
        for v in 0..NV {
            top[v] = _mm512_max_ps(top[v], _mm512_loadu_ps(t.s.add((t.nk - 1) * w + v * 16)));
        }
    }
    let c = _mm512_set1_ps(t.c);
    let mut corr = [zero; NV];
    let mut rose = 0;
    for v in 0..NV {
        top[v] = _mm512_max_ps(top[v], odd[v]);
        if t.beta != 0.0 {
            top[v] = _mm512_max_ps(old[v], without_ones::<NV>(t, v));
        }
        rose |= _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(top[v], old[v]);
        _mm512_storeu_ps(t.m.add(v * 16), top[v]);
        corr[v] = exp2(_mm512_mul_ps(_mm512_sub_ps(old[v], top[v]), c), 0.0);
    }
    no_keys::<NV>(t.s, t.nk);
    for v in 0..NV {
        let at = t.l.add(v * 16);
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), corr[v]));
    }
    if rose != 0 {
        for r in 0..t.dv_tiles * 16 {
            for v in 0..NV {
                let at = t.o.add(r * w + v * 16);
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), corr[v]));
            }
        }
    }
}

/// Maxima of the scores of vector `v`, moved where they are repeated: see [`Attend::repeated_max`](super::Attend).
#[inline(always)]
unsafe fn without_ones<const NV: usize>(t: &Visit, v: usize) -> __m512 {
    let score = |j: usize| _mm512_loadu_ps(t.s.add((j * NV + v) * 16));
    let mut top = _mm512_set1_ps(NO_MAX);
    for j in 0..t.nk {
        top = _mm512_max_ps(top, score(j));
    }
    // Weights so near to 1 are 1 in bf16.
    let near = _mm512_sub_ps(top, _mm512_set1_ps(1e-3 * LOG2_E / t.c));
    let (mut once, mut twice) = (0u16, 0u16);
    for j in 0..t.nk {
        let here = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(score(j), near);
        twice |= once & here;
        once |= here;
    }
    let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, _mm512_setzero_ps());
    let factor = _mm512_mask_blend_ps(positive, _mm512_set1_ps(-1.0), _mm512_set1_ps(t.beta - 1.0));
    // In natural units; what would leave nothing of the weights is taken into 4..8.
    let shift = _mm512_mul_ps(_mm512_mul_ps(top, factor), _mm512_set1_ps(t.c / LOG2_E));
    let part =
        _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(shift, _mm512_set1_ps(0.25)));
    let within = _mm512_fmadd_ps(part, _mm512_set1_ps(4.0), _mm512_set1_ps(4.0));
    let far = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(shift, _mm512_set1_ps(8.0));
    let shift = _mm512_mul_ps(_mm512_mask_blend_ps(far, shift, within), _mm512_set1_ps(LOG2_E / t.c));
    _mm512_mask_add_ps(top, twice, top, shift)
}

/// Whether `weights` can serve a visit: see the head of this file.
#[inline(always)]
unsafe fn bounded<const NV: usize>(t: &Visit) -> bool {
    if t.squash != 0.0 || !t.bias.is_null() || t.beta != 0.0 {
        return false;
    }
    let mut fits = 0xffff;
    for v in 0..NV {
        let c = _mm512_set1_ps(t.c);
        let bound = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(t.q_len.add(v * 16)), _mm512_set1_ps(t.k_len)), c);
        // A row that saw nothing yet has m = −3e38, which does not fit.
        let m = _mm512_mul_ps(_mm512_loadu_ps(t.m.add(v * 16)), c);
        fits &= _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_sub_ps(bound, m), _mm512_set1_ps(ROOM));
    }
    fits == 0xffff
}

/// Scores of 32 keys (rows of `s`) to weights (16 rows of pairs, `to`), with the references in `m` as
/// they are; adds to `l`. In place if `to` is `s`: rows are read no later than they are written.
#[inline(always)]
unsafe fn weights<const NV: usize>(t: &Visit, s: *const f32, to: *mut f32) {
    // Half a step of bf16 between 1 and 2.
    const HALF: f32 = 1.0 / 256.0;
    let c = _mm512_set1_ps(t.c);
    let ones = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(0x3f80));
    let mut base = [_mm512_setzero_ps(); NV];
    let mut sum = [[_mm512_setzero_ps(); 2]; NV];
    for v in 0..NV {
        // Finite, so that −∞ less the reference of a row that saw nothing is −∞.
        base[v] = _mm512_mul_ps(_mm512_loadu_ps(t.m.add(v * 16)), c);
        base[v] = _mm512_max_ps(base[v], _mm512_set1_ps(NO_MAX));
        sum[v][0] = _mm512_loadu_ps(t.l.add(v * 16));
    }
    for r in (0..16).step_by(2) {
        for v in 0..NV {
            for odd in 0..2 {
                let r = r + odd;
                let at = s.add((2 * r * NV + v) * 16);
                let a = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at), c, base[v]), HALF);
                let b = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at.add(NV * 16)), c, base[v]), HALF);
                // High halves, paired as a right operand wants them.
                let a = _mm512_srli_epi32::<16>(_mm512_castps_si512(a));
                let pair = _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_castps_si512(b));
                let weights = std::mem::transmute::<__m512i, __m512bh>(pair);
                sum[v][odd] = _mm512_dpbf16_ps(sum[v][odd], weights, ones);
                _mm512_storeu_si512(to.add((r * NV + v) * 16).cast(), pair);
            }
        }
    }
    for v in 0..NV {
        _mm512_storeu_ps(t.l.add(v * 16), _mm512_add_ps(sum[v][0], sum[v][1]));
    }
}

/// Scores of 32 keys, 32·j.. of a visit. Heads 64 wide and whole strips: with the queries loaded.
#[inline(always)]
pub(super) unsafe fn scores<const NV: usize>(t: &Visit, j: usize, s: *mut u8) {
    let line = NV * LINE;
    let (k, k_line) = *t.k.add(j);
    if t.dp == 64 && NV == 2 {
        return scores_64(k, k_line, t.q, line, s, line);
    }
    let p = Product {
        steps: t.dp / 32,
        a: k,
        a_list: std::ptr::null(),
        a_step: LINE,
        a_next: ROWS * k_line,
        a_line: k_line,
        b: t.q,
        b_step: ROWS * line,
        b_line: line,
        c: s,
        c_line: line,
    };
    if NV == 2 {
        product::<false, false, true, true>(&p);
    } else {
        product::<false, false, true, false>(&p);
    }
}

/// −∞ where a query of the strip does not see a key.
#[inline(always)]
pub(super) unsafe fn hide<const NV: usize>(masks: *const u64, nk: usize, s: *mut f32) {
    let none = _mm512_set1_ps(f32::NEG_INFINITY);
    for j in 0..nk {
        let bits = *masks.add(j);
        if bits != u64::MAX {
            for v in 0..NV {
                let hidden = !(bits >> (v * 16)) as u16;
                _mm512_mask_storeu_ps(s.add((j * NV + v) * 16), hidden, none);
            }
        }
    }
}

/// −∞ in the rows past `nk` of the last 32 keys.
#[inline(always)]
pub(super) unsafe fn no_keys<const NV: usize>(s: *mut f32, nk: usize) {
    let w = NV * 16;
    let rows = nk.next_multiple_of(32) - nk;
    std::slice::from_raw_parts_mut(s.add(nk * w), rows * w).fill(f32::NEG_INFINITY);
}

/// Oᵀ += Vᵀ · P, the weights being in `t.s`.
#[inline(always)]
pub(super) unsafe fn values<const NV: usize>(t: &Visit) {
    let line = NV * LINE;
    for i in (0..t.dv_tiles).step_by(2) {
        let p = Product {
            steps: t.nk.div_ceil(32),
            a: std::ptr::null(),
            a_list: t.v,
            a_step: i * TILE,
            a_next: TILE,
            a_line: LINE,
            b: t.s.cast(),
            b_step: ROWS * line,
            b_line: line,
            c: t.o.add(i * ROWS * NV * 16).cast(),
            c_line: line,
        };
        match (i + 1 < t.dv_tiles, NV == 2) {
            (true, true) => product::<true, true, true, true>(&p),
            (true, false) => product::<true, true, true, false>(&p),
            (false, true) => product::<true, true, false, true>(&p),
            (false, false) => product::<true, true, false, false>(&p),
        }
    }
}

#[inline(always)]
unsafe fn visit_wide<const NV: usize>(t: &Visit) {
    let chunks = t.nk.div_ceil(32);
    if bounded::<NV>(t) {
        // Weights fill the first half of the room; the second holds the scores of two times 32 keys,
        // so that tiles and lanes work on different ones.
        for j in 0..chunks {
            let s = t.s.add((KEYS / 2 + j % 2 * 32) * NV * 16);
            scores::<NV>(t, j, s.cast());
            let nk = (t.nk - 32 * j).min(32);
            if !t.masks.is_null() {
                hide::<NV>(t.masks.add(32 * j), nk, s);
            }
            no_keys::<NV>(s, nk);
            weights::<NV>(t, s, t.s.add(j * 16 * NV * 16));
        }
    } else {
        for j in 0..chunks {
            scores::<NV>(t, j, t.s.add(j * 32 * NV * 16).cast());
        }
        references::<NV>(t);
        for j in 0..chunks {
            weights::<NV>(t, t.s.add(j * 32 * NV * 16), t.s.add(j * 16 * NV * 16));
        }
    }
    values::<NV>(t);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn visit(t: &Visit) {
    const { assert!(STRIP == 32, "a strip is one or two vectors") };
    match (t.nv, t.sigmoid) {
        (1, None) => visit_wide::<1>(t),
        (_, None) => visit_wide::<2>(t),
        (1, Some(bias)) => visit_sigmoid::<1>(t, bias),
        (_, Some(bias)) => visit_sigmoid::<2>(t, bias),
    }
}

/// Transpose `rows` of `n` u32 (a multiple of 16) into `n` rows of `w`, lanes past the rows zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_pairs(rows: &[*const u32], n: usize, w: usize, to: *mut u32) {
    for i in (0..w).step_by(16) {
        for c in (0..n).step_by(16) {
            let mut x = [_mm512_setzero_si512(); 16];
            for (x, row) in x.iter_mut().zip(rows.iter().skip(i)) {
                *x = _mm512_loadu_si512(row.add(c).cast());
            }
            let y = transpose(x);
            for r in 0..16 {
                _mm512_storeu_si512(to.add((c + r) * w + i).cast(), y[r]);
            }
        }
    }
}

/// Vᵀ of up to 32 rows as tiles of 16 channels; missing rows and channels are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_values(rows: &[*const u16], dv: usize, to: *mut u8) {
    for i in 0..dv.div_ceil(16) {
        let some = if dv - i * 16 >= 16 { 0xffff } else { (1u16 << (dv - i * 16)) - 1 };
        let row = |j: usize| match rows.get(j) {
            None => _mm512_setzero_si512(),
            Some(r) => _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, r.add(i * 16).cast())),
        };
        let mut x = [_mm512_setzero_si512(); 16];
        for r in 0..16 {
            x[r] = _mm512_or_si512(row(2 * r), _mm512_slli_epi32::<16>(row(2 * r + 1)));
        }
        let y = transpose(x);
        for r in 0..16 {
            _mm512_storeu_si512(to.add(i * TILE + r * LINE).cast(), y[r]);
        }
    }
}

/// Euclidean length of a row, rounding included: no shorter than it is; ∞ if it is not a number.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn length(row: &[bf16]) -> f32 {
    let mut sums = _mm512_setzero_ps();
    for part in row.chunks(32) {
        let x = _mm512_maskz_loadu_epi16(u32::MAX >> (32 - part.len()), part.as_ptr().cast());
        let x = std::mem::transmute::<__m512i, __m512bh>(x);
        sums = _mm512_dpbf16_ps(sums, x, x);
    }
    let sum = _mm512_reduce_add_ps(sums);
    if sum.is_nan() { f32::INFINITY } else { sum.sqrt() * 1.000_1 }
}

/// Copy a row of `n` to one of `padded`, zero beyond.
#[inline(always)]
pub(super) unsafe fn pad_row(from: *const u16, n: usize, padded: usize, to: *mut u16) {
    std::ptr::copy_nonoverlapping(from, to, n);
    std::ptr::write_bytes(to.add(n), 0, padded - n);
}

/// Vᵀ of every (batch, K/V head), 32 keys after 32 keys, in tiles.
pub(super) struct PackedValues {
    data: Vec<f32>,
    /// Of the first tile, on a cache line.
    start: usize,
    /// Sets of 32 keys of a head.
    chunks: usize,
    /// Elements of the tiles of 32 keys.
    size: usize,
}

impl PackedValues {
    fn chunk(&self, head: usize, chunk: usize) -> *const u8 {
        self.data[self.start + (head * self.chunks + chunk) * self.size..].as_ptr().cast()
    }
}

impl Call<'_, bf16> {
    /// Whether this path can serve the call: maxima of scores need a positive factor on them.
    pub(super) fn suits_amx(&self) -> bool {
        let p = self.scope.p;
        p.scale > 0.0 || p.softcap.is_some() && p.scale < 0.0
    }

    /// Vᵀ of the given (up to 32) rows.
    ///
    /// # Safety
    /// The machine has AVX-512; `to` has room for the tiles of all value channels.
    unsafe fn pack_values(&self, b: usize, kh: usize, keys: impl Iterator<Item = usize>, to: *mut u8) {
        let (mut from, mut n) = ([std::ptr::null(); 32], 0);
        for j in keys {
            from[n] = self.v.row(b, kh, j).as_ptr().cast();
            n += 1;
        }
        pack_values(&from[..n], self.v.shape[3], to);
    }

    /// Pack all of V, where tasks will come to more than that.
    ///
    /// # Safety
    /// The machine has AVX-512.
    pub(super) unsafe fn pack_all_values(&self) -> Option<PackedValues> {
        let [b, hkv, tk, dv] = self.v.shape;
        let visited = match self.scope.source {
            Source::Dense => usize::MAX,
            Source::Table(t) if t.iter().all(|t| t.block_k.is_multiple_of(32)) => {
                t.iter().map(|t| t.blocks.len() * t.block_k).sum()
            }
            _ => 0,
        };
        if visited < b * hkv * tk || self.v.shape.contains(&0) || self.q.shape.contains(&0) {
            return None;
        }
        let (chunks, size) = (tk.div_ceil(32), dv.div_ceil(16) * TILE / 4);
        // Zeroed by the system, page by page, in the threads that write them.
        let mut data = vec![0f32; b * hkv * chunks * size + LINE / 4];
        let start = data.as_ptr().align_offset(LINE);
        data[start..].par_chunks_exact_mut(size).take(b * hkv * chunks).enumerate().for_each(|(i, to)| {
            let (bk, first) = (i / chunks, i % chunks * 32);
            let keys = first..(first + 32).min(tk);
            // SAFETY: by the contract; `to` is of the size for all value channels.
            unsafe { self.pack_values(bk / hkv, bk % hkv, keys, to.as_mut_ptr().cast()) };
        });
        Some(PackedValues { data, start, chunks, size })
    }

    /// Length of the longest of each 32 keys, (B, H_kv, Tk / 32 rounded up), where there are enough
    /// queries to make up for it.
    pub(super) fn lengths_of_keys(&self) -> Vec<f32> {
        let [b, hkv, tk, _] = self.k.shape;
        let chunks = tk.div_ceil(32);
        if self.q.shape[2] < 2 * WORK_TILE {
            return Vec::new();
        }
        let mut lengths = vec![0f32; b * hkv * chunks];
        lengths.par_iter_mut().with_min_len(16).enumerate().for_each(|(i, l)| {
            let (bk, first) = (i / chunks, i % chunks * 32);
            // SAFETY: a call on tiles is on a machine with AVX-512.
            let row = |j| unsafe { length(self.k.row(bk / hkv, bk % hkv, j)) };
            *l = (first..(first + 32).min(tk)).map(row).fold(0.0, f32::max);
        });
        lengths
    }

    /// As `rows`, on tiles.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it.
    pub(super) unsafe fn rows_amx(&self, s: &mut Scratch, bh: usize, rows: Range<usize>) -> Work {
        let h = self.q.shape[1];
        let (bi, hi) = (bh / h, bh % h);
        let kh = hi / (h / self.k.shape[1]);
        let (d, dv, tk) = (self.q.shape[3], self.v.shape[3], self.k.shape[2]);
        let work = self.list(&mut s.listed, bh, &rows);

        let n = rows.len();
        let padded = n.next_multiple_of(16);
        let strip = |i: usize| ((i + STRIP).min(n), STRIP.min(padded - i));
        let (dp, dv_tiles) = (d.next_multiple_of(32), dv.div_ceil(16));
        let dv_rows = dv_tiles * 16;
        let q = s.q.at_least(padded * dp / 2);
        let o = s.o.at_least(padded * dv_rows);
        let stat = s.stat.at_least(3 * padded);
        let scores = s.s.at_least(KEYS * STRIP);
        let wide_q: *mut u16 = s.wide_q.at_least(MAX_STRIP * dp / 2).cast();
        let own_k: *mut u16 = s.wide_k.at_least(KEYS * dp / 2).cast();
        let vt: *mut u8 = s.wide_v.at_least(KEYS * dv_rows / 2).cast();
        let (squash, unit) = match self.scope.p.softcap {
            Some(cap) => (self.scope.p.scale / cap, cap),
            None => (0.0, self.scope.p.scale),
        };
        let c = unit * LOG2_E;

        let mut pairs = [std::ptr::null(); MAX_STRIP];
        for i in (0..n).step_by(STRIP) {
            let (b, w) = strip(i);
            for x in 0..b - i {
                let row = self.q.row(bi, hi, rows.start + i + x);
                *stat.add(2 * padded + i + x) = length(row);
                pairs[x] = if d == dp {
                    row.as_ptr().cast()
                } else {
                    let to = wide_q.add(x * dp);
                    pad_row(row.as_ptr().cast(), d, dp, to);
                    to.cast_const().cast()
                };
            }
            pack_pairs(&pairs[..b - i], dp / 2, w, q.add(i * dp / 2).cast());
        }
        std::slice::from_raw_parts_mut(o, padded * dv_rows).fill(0.0);
        std::slice::from_raw_parts_mut(stat, n).fill(NO_MAX);
        // Lanes past the last query, all zeros, have seen a score of zero.
        std::slice::from_raw_parts_mut(stat.add(n), padded - n).fill(0.0);
        std::slice::from_raw_parts_mut(stat.add(padded), padded).fill(0.0);
        std::slice::from_raw_parts_mut(stat.add(2 * padded + n), padded - n).fill(0.0);

        let chunks = tk.div_ceil(32);
        let lengths = self.key_lengths.chunks(chunks.max(1)).nth(bi * self.k.shape[1] + kh).unwrap_or(&[]);
        let tiles = Tiles::new();
        for at in (0..s.listed.keys.len()).step_by(KEYS) {
            let keys = &s.listed.keys[at..(at + KEYS).min(s.listed.keys.len())];
            let nk = keys.len();
            let mut k_len = if lengths.is_empty() { f32::INFINITY } else { 0f32 };
            let mut k_at = [(std::ptr::null(), 0); KEYS / 32];
            let mut v_at = [std::ptr::null(); KEYS / 32];
            for (x, chunk) in keys.chunks(32).enumerate() {
                let first = chunk[0] as usize;
                // Rows that follow each other serve as they lie; others are gathered.
                let last = chunk[chunk.len() - 1] as usize;
                let run = last - first + 1 == chunk.len();
                if run && !lengths.is_empty() {
                    k_len = k_len.max(lengths[first / 32]).max(lengths[last / 32]);
                } else if !lengths.is_empty() {
                    k_len = chunk.iter().fold(k_len, |m, &j| m.max(lengths[j as usize / 32]));
                }
                k_at[x] = if run && chunk.len() == 32 && d == dp {
                    let step = self.k.strides[2];
                    (self.k.head(bi, kh).as_ptr().add(first * step).cast::<u8>(), 2 * step)
                } else {
                    let to = own_k.add(x * 32 * dp);
                    for (y, &j) in chunk.iter().enumerate() {
                        pad_row(self.k.row(bi, kh, j as usize).as_ptr().cast(), d, dp, to.add(y * dp));
                    }
                    std::ptr::write_bytes(to.add(chunk.len() * dp), 0, (32 - chunk.len()) * dp);
                    (to.cast_const().cast(), 2 * dp)
                };
                // A chunk cut short (by causality) is packed anew: weights of zero would not keep
                // an infinite value of the future out.
                let whole = run && first.is_multiple_of(32) && (chunk.len() == 32 || first + chunk.len() == tk);
                v_at[x] = match &self.packed {
                    Some(p) if whole => p.chunk(bi * self.k.shape[1] + kh, first / 32),
                    _ => {
                        let to = vt.add(x * dv_tiles * TILE);
                        self.pack_values(bi, kh, chunk.iter().map(|&j| j as usize), to);
                        to
                    }
                };
            }
            for i in (0..n).step_by(STRIP) {
                let (b, w) = strip(i);
                let of = rows.start + i..rows.start + b;
                // Whole chunks of Vᵀ; what that adds at either end is masked.
                let marks = s.listed.marks_of(at, nk);
                let Some(seen) = self.scope.part(&mut s.masks, keys, marks, &of, i, 32) else { continue };
                let (from, to) = (seen.keys.start, seen.keys.end);
                let bias = self.scope.bias_tile(&mut s.bias, [bi, hi], &keys[from..to], of, w, c);
                visit(&Visit {
                    nv: w / 16,
                    dp,
                    dv_tiles,
                    nk: to - from,
                    q: q.add(i * dp / 2).cast_const().cast(),
                    k: k_at.as_ptr().add(from / 32),
                    v: v_at.as_ptr().add(from / 32),
                    masks: seen.masks,
                    squash,
                    bias,
                    c,
                    sigmoid: self.scope.p.normalizer.sigmoid().map(|b| b * LOG2_E),
                    beta: self.scope.p.repeated_max.unwrap_or(0.0),
                    s: scores,
                    o: o.add(i * dv_rows),
                    m: stat.add(i),
                    l: stat.add(padded + i),
                    q_len: stat.add(2 * padded + i),
                    // Where a query does not see all keys, those must not decide how it is served.
                    k_len: if seen.edge { f32::INFINITY } else { k_len },
                });
            }
        }
        drop(tiles);

        for i in (0..n).step_by(STRIP) {
            let (b, w) = strip(i);
            self.finish(
                [bi, hi],
                rows.start + i..rows.start + b,
                &Finish {
                    w,
                    dv,
                    o: o.add(i * dv_rows),
                    m: stat.add(i),
                    l: stat.add(padded + i),
                    unit,
                    summed: self.scope.p.normalizer == Normalizer::Softmax,
                    sink: None,
                    rows: &[],
                    lse: std::ptr::null_mut(),
                },
            );
        }
        work
    }
}
