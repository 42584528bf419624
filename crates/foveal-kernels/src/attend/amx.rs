//! The bf16 path on AMX tiles: both products on tiles, softmax in f32 between them.
//!
//! The layout is that of `strip`, queries in lanes, because it suits the tiles: rows of K are the
//! left operand as they lie in memory; the transposed queries, two channels to a lane, are the
//! right one; the weights of two keys, rounded to bf16 and interleaved, are the right operand of
//! the second product, whose left one is Vᵀ (`packed`).
//!
//! The softmax is cut to the bone. Its exponential is one fused product, a fraction, a cubic good to
//! 9e-5 (weights are rounded to 4e-3 right after, by adding half a step to the cubic's constant and
//! dropping the low bits) and `vscalef`, which also sends −∞ to 0. The denominator sums the weights
//! as they are used. A query's reference is the maximum of the first 32 keys it sees of and stays that: bf16 reaches as
//! far as f32, so weights above 1 do no harm, maxima are not looked for again, Oᵀ is not rescaled, and lanes
//! work on one set of scores while tiles make the next. Where the sum of a tile then passes [`LIMIT`], a score
//! far above the reference was there (by 66 in units of logits), and the tile is done again in general.
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
use super::packed::{Keys, Shelf, pack_keys, pack_values};
use super::scope::Source;
use super::strip::{Finish, MAX_STRIP, NO_MAX};
use crate::amx::Tiles;
use crate::exp::LOG2_E;
use crate::simd::transpose;
use crate::work::Work;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Keys of a tile: a multiple of 32. Four times that many bytes times [`STRIP`] are the scores.
pub(super) const KEYS: usize = 256;
/// Keys of a product with values.
pub(super) const CHUNK: usize = 32;
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
unsafe fn scores_64(keys: Keys, q: *const u8, q_line: usize, s: *mut u8, s_line: usize) {
    macro_rules! tile {
        ($op:literal, $p:expr, $line:expr) => {
            asm!($op, p = in(reg) $p, l = in(reg) $line, options(nostack, preserves_flags))
        };
    }
    let q1 = q.add(ROWS * q_line);
    for r in 0..2 {
        let (k, s) = (keys.at.add(r * keys.next), s.add(r * ROWS * s_line));
        tile!("tileloadd tmm2, [{p} + {l}*1]", k, keys.line);
        tile!("tileloadd tmm3, [{p} + {l}*1]", k.add(keys.step), keys.line);
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
    /// For each 32 keys, where they lie.
    k: *const Keys,
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
}

/// 2^96: most that sums of weights may be while references stay, so that products with values stay below 2^128.
const LIMIT: f32 = f32::from_bits((127 + 96) << 23);
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

/// Softcap, bias and masks of `nk` keys from `j` on.
#[inline(always)]
pub(super) unsafe fn bend<const NV: usize>(t: &Visit, j: usize, nk: usize, s: *mut f32) {
    use crate::simd::{Avx512, Simd};
    if t.squash != 0.0 {
        for i in 0..nk * NV {
            let at = s.add(i * 16);
            let x = Avx512::mul(Avx512::load(at), Avx512::splat(t.squash));
            Avx512::store(at, crate::exp::tanh::<Avx512>(x));
        }
    }
    if !t.bias.is_null() {
        let bias = t.bias.add(j * NV * 16);
        for i in 0..nk * NV {
            let at = s.add(i * 16);
            Avx512::store(at, Avx512::add(Avx512::load(at), Avx512::load(bias.add(i * 16))));
        }
    }
    if !t.masks.is_null() {
        hide::<NV>(t.masks.add(j), nk, s);
    }
}

/// What the general case does between the products: softcap, bias, masks, maxima, and Oᵀ and the sums
/// rescaled where a maximum rose.
#[inline(always)]
unsafe fn references<const NV: usize>(t: &Visit) {
    let w = NV * 16;
    bend::<NV>(t, 0, t.nk, t.s);
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

/// References for those queries that have none, from the 32 keys in `s`.
#[inline(always)]
unsafe fn first_references<const NV: usize>(t: &Visit, s: *const f32) {
    let none = _mm512_set1_ps(NO_MAX);
    for v in 0..NV {
        let m = _mm512_loadu_ps(t.m.add(v * 16));
        let new = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(m, none);
        if new != 0 {
            let mut top = [none; 2];
            for j in 0..CHUNK {
                top[j % 2] = _mm512_max_ps(top[j % 2], _mm512_loadu_ps(s.add((j * NV + v) * 16)));
            }
            _mm512_storeu_ps(t.m.add(v * 16), _mm512_mask_max_ps(m, new, top[0], top[1]));
        }
    }
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
    let k = *t.k.add(j);
    if t.dp == 64 && NV == 2 {
        return scores_64(k, t.q, line, s, line);
    }
    let p = Product {
        steps: t.dp / 32,
        a: k.at,
        a_list: std::ptr::null(),
        a_step: k.step,
        a_next: k.next,
        a_line: k.line,
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

/// Weights of a visit with the references there are; false, and sums as they were, if those do not serve.
#[inline(always)]
unsafe fn quick<const NV: usize>(t: &Visit) -> bool {
    let mut before = [_mm512_setzero_ps(); NV];
    for v in 0..NV {
        before[v] = _mm512_loadu_ps(t.l.add(v * 16));
    }
    // Weights fill the first half of the room; the second holds the scores of two times 32 keys, so that
    // tiles and lanes work on different ones.
    for j in 0..t.nk.div_ceil(CHUNK) {
        let s = t.s.add((KEYS / 2 + j % 2 * CHUNK) * NV * 16);
        scores::<NV>(t, j, s.cast());
        let nk = (t.nk - CHUNK * j).min(CHUNK);
        bend::<NV>(t, CHUNK * j, nk, s);
        no_keys::<NV>(s, nk);
        first_references::<NV>(t, s);
        weights::<NV>(t, s, t.s.add(j * CHUNK / 2 * NV * 16));
    }
    let mut fits = 0xffff;
    for v in 0..NV {
        fits &= _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_loadu_ps(t.l.add(v * 16)), _mm512_set1_ps(LIMIT));
    }
    if fits != 0xffff {
        for v in 0..NV {
            _mm512_storeu_ps(t.l.add(v * 16), before[v]);
        }
    }
    fits == 0xffff
}

#[inline(always)]
unsafe fn visit_wide<const NV: usize>(t: &Visit) {
    // A bias may fall by hundreds between a row's first keys and those that count.
    let settled = t.bias.is_null() && t.beta == 0.0;
    if !(settled && quick::<NV>(t)) {
        let chunks = t.nk.div_ceil(CHUNK);
        for j in 0..chunks {
            scores::<NV>(t, j, t.s.add(j * CHUNK * NV * 16).cast());
        }
        references::<NV>(t);
        for j in 0..chunks {
            weights::<NV>(t, t.s.add(j * CHUNK * NV * 16), t.s.add(j * CHUNK / 2 * NV * 16));
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
            if let Some(rows) = rows.get(i..i + 16) {
                for r in 0..16 {
                    x[r] = _mm512_loadu_si512(rows[r].add(c).cast());
                }
            } else {
                for (x, row) in x.iter_mut().zip(rows.iter().skip(i)) {
                    *x = _mm512_loadu_si512(row.add(c).cast());
                }
            }
            let y = transpose(x);
            for r in 0..16 {
                _mm512_storeu_si512(to.add((c + r) * w + i).cast(), y[r]);
            }
        }
    }
}

/// Copy a row of `n` to one of `padded`, zero beyond.
#[inline(always)]
pub(super) unsafe fn pad_row(from: *const u16, n: usize, padded: usize, to: *mut u16) {
    std::ptr::copy_nonoverlapping(from, to, n);
    std::ptr::write_bytes(to.add(n), 0, padded - n);
}

impl Call<'_, bf16> {
    /// Whether this path can serve the call: maxima of scores need a positive factor on them.
    pub(super) fn suits_amx(&self) -> bool {
        let p = self.scope.p;
        p.scale > 0.0 || p.softcap.is_some() && p.scale < 0.0
    }

    /// Room for packed keys and values, where tasks (so many a K/V head) come to more of them than there are.
    pub(super) fn shelf(&self, tasks: Vec<usize>) -> Option<Shelf> {
        let [b, hkv, tk, dv] = self.v.shape;
        let visited = match self.scope.source {
            Source::Dense => usize::MAX,
            Source::Table(t) | Source::Both(t, _) if t.iter().all(|t| t.block_k.is_multiple_of(CHUNK)) => {
                t.iter().map(|t| t.blocks.len() * t.block_k).sum()
            }
            _ => 0,
        };
        if visited < b * hkv * tk || self.v.shape.contains(&0) || self.q.shape.contains(&0) {
            return None;
        }
        Some(Shelf::new(tasks, tk, self.q.shape[3].next_multiple_of(32), dv.div_ceil(16)))
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
        let stat = s.stat.at_least(2 * padded);
        let scores = s.s.at_least(KEYS * STRIP);
        let wide_q: *mut u16 = s.wide_q.at_least(MAX_STRIP * dp / 2).cast();
        let own_k: *mut u8 = s.wide_k.at_least(KEYS * dp / 2).cast();
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

        // Output rows come to the cache while the last products run: at least so many a visit.
        let mut to_come = s.listed.keys.len().div_ceil(KEYS) * n.div_ceil(STRIP);
        let at_once = n.div_ceil(to_come.max(1)).max(4);
        let mut fetched = 0;
        let tiles = Tiles::new();
        for at in (0..s.listed.keys.len()).step_by(KEYS) {
            let keys = &s.listed.keys[at..(at + KEYS).min(s.listed.keys.len())];
            let nk = keys.len();
            let mut k_at = [Keys::NONE; KEYS / CHUNK];
            let mut v_at = [std::ptr::null(); KEYS / CHUNK];
            for (x, chunk) in keys.chunks(CHUNK).enumerate() {
                let (first, last) = (chunk[0] as usize, chunk[chunk.len() - 1] as usize);
                // Rows that follow each other serve as they lie; others are gathered.
                let run = last - first + 1 == chunk.len();
                let gather = || {
                    let (mut k, mut v) = ([std::ptr::null::<u16>(); CHUNK], [std::ptr::null::<u16>(); CHUNK]);
                    for (y, &j) in chunk.iter().enumerate() {
                        k[y] = self.k.row(bi, kh, j as usize).as_ptr().cast();
                        v[y] = self.v.row(bi, kh, j as usize).as_ptr().cast();
                    }
                    (k, v)
                };
                // A chunk cut short (by causality) is packed by itself: weights of zero would not keep
                // an infinite value of the future out.
                let whole = run && first.is_multiple_of(CHUNK) && (chunk.len() == CHUNK || first + chunk.len() == tk);
                (k_at[x], v_at[x]) = match &s.packed {
                    Some(p) if whole => p.get(first / CHUNK, |k, v| {
                        let (k_rows, v_rows) = gather();
                        pack_keys(&k_rows[..chunk.len()], d, dp, k);
                        pack_values(&v_rows[..chunk.len()], dv, v);
                    }),
                    _ => {
                        let (k_rows, v_rows) = gather();
                        let k = own_k.add(x * CHUNK * dp * 2);
                        let v = vt.add(x * dv_tiles * TILE);
                        pack_values(&v_rows[..chunk.len()], dv, v);
                        if run && chunk.len() == CHUNK && d == dp {
                            (Keys::rows(k_rows[0].cast(), 2 * self.k.strides[2]), v.cast_const())
                        } else {
                            pack_keys(&k_rows[..chunk.len()], d, dp, k);
                            (Keys::tiles(k, dp), v.cast_const())
                        }
                    }
                };
            }
            for i in (0..n).step_by(STRIP) {
                let (b, w) = strip(i);
                let of = rows.start + i..rows.start + b;
                to_come -= 1;
                while fetched + to_come * at_once < n {
                    let row = self.out.row_mut(bi, hi, rows.start + fetched);
                    for line in row.chunks(LINE / 4) {
                        _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().cast());
                    }
                    fetched += 1;
                }
                // Whole chunks of Vᵀ; what that adds at either end is masked.
                let marks = s.listed.marks_of(at, nk);
                let Some(seen) = self.scope.part(&mut s.masks, keys, marks, &of, i, CHUNK) else { continue };
                let (from, to) = (seen.keys.start, seen.keys.end);
                let bias = self.scope.bias_tile(&mut s.bias, [bi, hi], &keys[from..to], of, w, c);
                visit(&Visit {
                    nv: w / 16,
                    dp,
                    dv_tiles,
                    nk: to - from,
                    q: q.add(i * dp / 2).cast_const().cast(),
                    k: k_at.as_ptr().add(from / CHUNK),
                    v: v_at.as_ptr().add(from / CHUNK),
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
