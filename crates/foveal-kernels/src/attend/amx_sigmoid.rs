//! Sigmoid weights on AMX tiles: the same products as `amx`, and no statistics between them.

#![allow(unsafe_op_in_unsafe_fn)]

use super::amx::{KEYS, Visit, bend, exp2, no_keys, scores, values};
use std::arch::x86_64::*;

/// Scores of 32 keys (rows of `s`) to weights (16 rows of pairs, `to`): 1 / (1 + 2^−(c·s + bias)) to 2e-4, which
/// rounding to bf16 right after takes to 4e-3. In place if `to` is `s`.
#[inline(always)]
unsafe fn weights<const NV: usize>(c: f32, bias: f32, s: *const f32, to: *mut f32) {
    let (c, bias, one) = (_mm512_set1_ps(-c), _mm512_set1_ps(-bias), _mm512_set1_ps(1.0));
    let narrow = |x: __m512| {
        // −∞ gives 1 / (1 + ∞) = 0; a NaN stays one.
        let y = _mm512_rcp14_ps(_mm512_add_ps(one, exp2(_mm512_fmadd_ps(x, c, bias), 0.0)));
        _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(y)))
    };
    for r in 0..16 {
        for v in 0..NV {
            let at = s.add((2 * r * NV + v) * 16);
            let (a, b) = (narrow(_mm512_loadu_ps(at)), narrow(_mm512_loadu_ps(at.add(NV * 16))));
            let pair = _mm512_or_si512(a, _mm512_slli_epi32::<16>(b));
            _mm512_storeu_si512(to.add((r * NV + v) * 16).cast(), pair);
        }
    }
}

/// A whole visit; `bias` is the sigmoid's times log₂ e.
#[inline(always)]
pub(super) unsafe fn visit_sigmoid<const NV: usize>(t: &Visit, bias: f32) {
    let chunks = t.nk.div_ceil(32);
    for j in 0..chunks {
        // Weights fill the first half of the room, so that tiles and lanes work on different scores.
        let s = t.s.add((KEYS / 2 + j % 2 * 32) * NV * 16);
        scores::<NV>(t, j, s.cast());
        let nk = (t.nk - 32 * j).min(32);
        bend::<NV>(t, 32 * j, nk, s);
        no_keys::<NV>(s, nk);
        weights::<NV>(t.c, bias, s, t.s.add(j * 16 * NV * 16));
    }
    values::<NV>(t);
}
