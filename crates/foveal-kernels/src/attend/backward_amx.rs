//! The backward pass on AMX tiles: the five products in bf16, what lies between them in f32.
//!
//! Scores and their gradients are computed as `amx` does, queries in lanes; rounded to bf16 they are wanted in
//! two orders. As left operands of dV = Pᵀ-rows · dO and dK they are rows of 32 queries, one row a key, against
//! queries paired up; these products run over all strips of a task at once. As right operand of dQᵀ = Kᵀ · dS
//! two keys share a lane. K, V and the sums of a tile of keys are gathered and scattered row by row, so that
//! listed keys cost what consecutive ones do.

#![allow(unsafe_op_in_unsafe_fn)]

use super::amx::{LINE, Product, ROWS, STRIP, TILE, pack_pairs, pad_row, product};
use super::backward::{Call, Pointers, Scratch};
use super::grad::{self, Step};
use super::packed::pack_values;
use crate::amx::Tiles;
use crate::exp::LOG2_E;
use crate::simd::Avx512;
use half::bf16;
use std::arch::x86_64::*;
use std::ops::Range;
use std::ptr::{null, null_mut};

/// Keys of a tile.
const KEYS: usize = 64;
/// Bytes of a row of a strip in f32 (or of pairs of bf16).
const WIDE: usize = 2 * LINE;

/// C = [C +] Σ A·B for two row tiles and `columns` column tiles of B and C.
#[inline(always)]
unsafe fn columns(p: &Product, columns: usize) {
    for j in (0..columns).step_by(2) {
        let part = Product { b: p.b.add(j * LINE), c: p.c.add(j * LINE), ..*p };
        if j + 1 < columns {
            product::<false, false, true, true>(&part);
        } else {
            product::<false, false, true, false>(&part);
        }
    }
}

/// Round `n` f32 to bf16, zero up to `padded`.
#[inline(always)]
unsafe fn narrow_row(from: *const f32, n: usize, padded: usize, to: *mut u16) {
    for c in (0..padded).step_by(16) {
        let some = if n >= c + 16 { 0xffff } else { (1u16 << n.saturating_sub(c)) - 1 };
        let x = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from.wrapping_add(c)));
        _mm256_storeu_si256(to.add(c).cast(), std::mem::transmute::<__m256bh, __m256i>(x));
    }
}

/// Two rows of `n` (a multiple of 16) as one of pairs.
#[inline(always)]
unsafe fn interleave(a: *const u16, b: *const u16, n: usize, to: *mut u32) {
    for c in (0..n).step_by(16) {
        let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.add(c).cast()));
        let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b.add(c).cast()));
        _mm512_storeu_si512(to.add(c).cast(), _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)));
    }
}

/// Rows of 32 f32 to rows of 32 bf16, `line` bytes apart, and (if `pairs` is not null) pairs of rows interleaved.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn narrow(from: *const f32, rows: usize, to: *mut u8, line: usize, pairs: *mut u32) {
    let row = |j: usize| {
        let (low, high) = (_mm512_loadu_ps(from.add(j * STRIP)), _mm512_loadu_ps(from.add(j * STRIP + 16)));
        let x = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(to.add(j * line).cast(), x);
        x
    };
    for j in (0..rows).step_by(2) {
        let (a, b) = (row(j), row(j + 1));
        if pairs.is_null() {
            continue;
        }
        for v in 0..2 {
            let half = |x: __m512i| {
                _mm512_cvtepu16_epi32(if v == 0 {
                    _mm512_castsi512_si256(x)
                } else {
                    _mm512_extracti64x4_epi64::<1>(x)
                })
            };
            let x = _mm512_or_si512(half(a), _mm512_slli_epi32::<16>(half(b)));
            _mm512_storeu_si512(pairs.add(j / 2 * STRIP + v * 16).cast(), x);
        }
    }
}

impl Call<'_, bf16> {
    /// As `rows`, on tiles, for keys that are listed already.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn rows_amx(
        &self,
        s: &mut Scratch,
        [bi, hi]: [usize; 2],
        rows: Range<usize>,
        part: &Range<usize>,
        pointers: &[Pointers],
    ) {
        let (h, hkv) = (self.q.shape[1], self.k.shape[1]);
        let kh = hi / (h / hkv);
        let (d, dv) = (self.q.shape[3], self.v.shape[3]);
        let (dp, dvp) = (d.next_multiple_of(16), dv.next_multiple_of(16));
        let (dl, dvl) = (d.next_multiple_of(32), dv.next_multiple_of(32));
        let n = rows.len();
        let strips = n.div_ceil(STRIP);
        let padded = strips * STRIP;
        // Rows of all strips, a key a row.
        let line = strips * LINE;
        let q: *mut u16 = s.q.at_least(padded * dl / 2).cast();
        let dout: *mut u16 = s.dout.at_least(padded * dvl / 2).cast();
        let (qt, dot) = (s.qt.at_least(padded * dl / 2), s.dot.at_least(padded * dvl / 2));
        let (dqt, stat) = (s.dqt.at_least(padded * dp), s.stat.at_least(2 * padded));
        let (q_pairs, dout_pairs) = (s.wide_k.at_least(padded * dp / 2), s.wide_v.at_least(padded * dvp / 2));
        let (scores, ds) = (s.s.at_least(KEYS * STRIP), s.ds.at_least(KEYS * STRIP));
        let narrowed = s.narrow.at_least(KEYS * line / 2 + KEYS * STRIP / 2);
        let p_rows: *mut u8 = narrowed.cast();
        let ds_rows = p_rows.add(KEYS * line);
        let ds_pairs: *mut u32 = ds_rows.add(KEYS * line).cast();
        let tile = s.tile.at_least(KEYS * (dl + dvl) / 2 + KEYS * dp / 2 + KEYS * dp.max(dvp));
        let k: *mut u16 = tile.cast();
        let v = k.add(KEYS * dl);
        let kt: *mut u8 = v.add(KEYS * dvl).cast();
        let sums: *mut f32 = kt.add(KEYS * dp * 2).cast();

        for x in 0..padded {
            let (to_q, to_d) = (q.add(x * dl), dout.add(x * dvl));
            if x < n {
                let i = rows.start + x;
                pad_row(self.q.row(bi, hi, i).as_ptr().cast(), d, dl, to_q);
                narrow_row(self.dout.row(bi, hi, i).as_ptr(), dv, dvl, to_d);
            } else {
                std::slice::from_raw_parts_mut(to_q, dl).fill(0);
                std::slice::from_raw_parts_mut(to_d, dvl).fill(0);
            }
        }
        for x in (0..padded).step_by(2) {
            interleave(q.add(x * dl), q.add((x + 1) * dl), dp, q_pairs.add(x / 2 * dp).cast());
            interleave(dout.add(x * dvl), dout.add((x + 1) * dvl), dvp, dout_pairs.add(x / 2 * dvp).cast());
        }
        for i in (0..padded).step_by(STRIP) {
            let of = |base: *mut u16, width: usize| -> [*const u32; STRIP] {
                let mut p = [null(); STRIP];
                for (x, p) in p.iter_mut().enumerate() {
                    *p = base.wrapping_add((i + x) * width).cast_const().cast();
                }
                p
            };
            pack_pairs(&of(q, dl), dl / 2, STRIP, qt.add(i * dl / 2).cast());
            pack_pairs(&of(dout, dvl), dvl / 2, STRIP, dot.add(i * dvl / 2).cast());
        }
        self.statistics(stat, [bi, hi], &rows, padded);
        std::slice::from_raw_parts_mut(dqt, padded * dp).fill(0.0);
        let (factor, cap) = self.factors();
        let dbias = if self.sums.wanted() { s.dbias.at_least(KEYS * STRIP) } else { null_mut() };
        self.begin_rows(&mut s.sums, [bi, hi], &rows, padded);

        let tiles = Tiles::new();
        for (at, keys) in (0..).step_by(KEYS).zip(s.listed.keys.chunks(KEYS)) {
            let nk = keys.len();
            let whole = nk.next_multiple_of(32);
            let chunks = whole / 32;
            let mut from = [null::<u16>(); KEYS];
            for (x, &j) in keys.iter().enumerate() {
                from[x] = self.k.row(bi, kh, j as usize).as_ptr().cast();
                pad_row(from[x], d, dl, k.add(x * dl));
                pad_row(self.v.row(bi, kh, j as usize).as_ptr().cast(), dv, dvl, v.add(x * dvl));
            }
            std::slice::from_raw_parts_mut(k.add(nk * dl), (whole - nk) * dl).fill(0);
            std::slice::from_raw_parts_mut(v.add(nk * dvl), (whole - nk) * dvl).fill(0);
            let mut kt_at = [null::<u8>(); KEYS / 32];
            for ch in 0..chunks {
                let to = kt.add(ch * dp / 16 * TILE);
                pack_values(&from[32 * ch..nk.min(32 * ch + 32)], d, to);
                kt_at[ch] = to;
            }
            let mut any = false;
            for i in (0..n).step_by(STRIP) {
                let b = (i + STRIP).min(n);
                let (p_to, ds_to) = (p_rows.add(i / STRIP * LINE), ds_rows.add(i / STRIP * LINE));
                let of = rows.start + i..rows.start + b;
                let marks = s.listed.marks_of(at, nk);
                let Some(seen) = self.scope.part(&mut s.masks, keys, marks, &of, i, KEYS) else {
                    for j in 0..whole {
                        _mm512_storeu_si512(p_to.add(j * line).cast(), _mm512_setzero_si512());
                        _mm512_storeu_si512(ds_to.add(j * line).cast(), _mm512_setzero_si512());
                    }
                    continue;
                };
                any = true;
                let bias = self.scope.bias_tile(&mut s.bias, [bi, hi], keys, of.clone(), STRIP, LOG2_E);
                let score = |a: *mut u16, width: usize, b: *mut f32, c: *mut f32| {
                    for ch in 0..chunks {
                        product::<false, false, true, true>(&Product {
                            steps: width / 32,
                            a: a.add(ch * 32 * width).cast_const().cast(),
                            a_list: null(),
                            a_step: LINE,
                            a_next: ROWS * 2 * width,
                            a_line: 2 * width,
                            b: b.cast_const().cast(),
                            b_step: ROWS * WIDE,
                            b_line: WIDE,
                            c: c.add(ch * 32 * STRIP).cast(),
                            c_line: WIDE,
                        });
                    }
                };
                score(k, dl, qt.add(i * dl / 2), scores);
                score(v, dvl, dot.add(i * dvl / 2), ds);
                grad::gradients_of_two::<Avx512>(&Step {
                    nk,
                    lse: stat.add(i),
                    delta: stat.add(padded + i),
                    masks: seen.masks,
                    bias,
                    factor,
                    cap,
                    sigmoid: self.scope.p.normalizer.sigmoid().is_some(),
                    s: scores,
                    ds,
                    dbias,
                    ..Step::none()
                });
                if self.sums.wanted() {
                    self.sum_tile(&mut s.sums, [bi, hi], keys, of, dbias, STRIP);
                }
                let rest = (whole - nk) * STRIP;
                std::slice::from_raw_parts_mut(scores.add(nk * STRIP), rest).fill(0.0);
                std::slice::from_raw_parts_mut(ds.add(nk * STRIP), rest).fill(0.0);
                narrow(scores, whole, p_to, line, null_mut());
                narrow(ds, whole, ds_to, line, ds_pairs);
                for t in (0..dp / 16).step_by(2) {
                    let part = Product {
                        steps: chunks,
                        a: null(),
                        a_list: kt_at.as_ptr(),
                        a_step: t * TILE,
                        a_next: TILE,
                        a_line: LINE,
                        b: ds_pairs.cast_const().cast(),
                        b_step: ROWS * WIDE,
                        b_line: WIDE,
                        c: dqt.add(i * dp + t * ROWS * STRIP).cast(),
                        c_line: WIDE,
                    };
                    if t + 1 < dp / 16 {
                        product::<true, true, true, true>(&part);
                    } else {
                        product::<true, true, false, true>(&part);
                    }
                }
            }
            if !any {
                continue;
            }
            let turns = [(p_rows, dout_pairs, dvp, false), (ds_rows, q_pairs, dp, true)];
            for (a, b, width, is_k) in turns {
                for ch in 0..chunks {
                    let whole_rows = Product {
                        steps: strips,
                        a: a.add(ch * 32 * line),
                        a_list: null(),
                        a_step: LINE,
                        a_next: ROWS * line,
                        a_line: line,
                        b: b.cast_const().cast(),
                        b_step: ROWS * 4 * width,
                        b_line: 4 * width,
                        c: sums.add(ch * 32 * width).cast(),
                        c_line: 4 * width,
                    };
                    columns(&whole_rows, width / 16);
                }
                for (x, &j) in keys.iter().enumerate() {
                    let p = &pointers[j as usize - part.start];
                    let to = if is_k { p.dk } else { p.dv };
                    for c in (0..width).step_by(16) {
                        let sum = _mm512_add_ps(_mm512_loadu_ps(to.add(c)), _mm512_loadu_ps(sums.add(x * width + c)));
                        _mm512_storeu_ps(to.add(c), sum);
                    }
                }
            }
        }
        drop(tiles);
        for i in (0..n).step_by(STRIP) {
            let of = rows.start + i..rows.start + (i + STRIP).min(n);
            self.add_to_dq(&mut s.dq, [bi, hi], of.clone(), dqt.add(i * dp), STRIP);
            self.end_rows(&mut s.sums, [bi, hi], of, STRIP);
        }
    }
}
