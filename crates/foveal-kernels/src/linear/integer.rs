//! Few rows on int8 and int4 weights with byte dot products (AVX-512 VNNI): decode.
//!
//! Widening int8 to f32 costs eight instructions for 32 weights and cannot keep up with memory.
//! Here x becomes 16-bit integers with a scale for each 32 inputs, which is 128 times finer than
//! the weights, and each 16-bit integer is two bytes: with u = x + 2^15 = 256 h + l,
//! Σ x w = 256 Σ h w + Σ l w − 2^15 Σ w, three byte dot products for 64 weights, exact in i32. The
//! minimum of an int4 group meets the group's Σ x.

use super::{BLOCK, OutPtr, PackedLinear};

/// Most rows for which this kernel is the fastest.
pub(super) const MAX_ROWS: usize = 8;

/// 32 inputs of one row as two planes of bytes and a scale.
#[derive(Clone, Copy)]
#[repr(C)]
struct Inputs {
    high: [u8; BLOCK],
    low: [u8; BLOCK],
    scale: f32,
    /// Of the rounded inputs.
    sum: f32,
}

/// y = x · Wᵀ; false, with nothing written, where this kernel cannot serve: the machine lacks the
/// instructions, or x holds a NaN or an infinity, which has no integer and must reach the output.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn forward(_: &PackedLinear, _: &[f32], _: usize, _: OutPtr) -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::forward;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::pack::{INT4_MINIMA, INT4_SCALES, INT8_SCALES};
    use super::super::{PANEL, WeightFormat, grid};
    use super::*;
    use rayon::prelude::*;
    use std::arch::x86_64::*;

    /// The inputs to within max|x| / 65534 of their group of 32; `None` if one is not finite.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn inputs(x: &[f32], k: usize) -> Option<Vec<Inputs>> {
        let mut all = Vec::with_capacity(x.len() / k.max(1) * k.div_ceil(BLOCK));
        for group in x.chunks_exact(k.max(1)).flat_map(|row| row.chunks(BLOCK)) {
            let mask = u32::MAX >> (BLOCK - group.len());
            // SAFETY: reads are masked to the group.
            let (a, b) = unsafe {
                let p = group.as_ptr();
                (_mm512_maskz_loadu_ps(mask as u16, p), _mm512_maskz_loadu_ps((mask >> 16) as u16, p.wrapping_add(16)))
            };
            // Magnitudes order like their bits, infinities and NaN last.
            let bits = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
            let top = f32::from_bits(_mm512_reduce_max_epi32(bits) as u32);
            if !top.is_finite() {
                return None;
            }
            let scale = top / 32767.0;
            // A scale that is no normal number would overflow its inverse.
            let inv = _mm512_set1_ps(if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 });
            let half = _mm512_set1_epi32(1 << 15);
            let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, inv));
            let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, inv));
            let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)) as f32 * scale;
            let (a, b) = (_mm512_add_epi32(a, half), _mm512_add_epi32(b, half));
            let mut this = Inputs { high: [0; BLOCK], low: [0; BLOCK], scale, sum };
            // SAFETY: four stores of 16 bytes into two arrays of 32.
            unsafe {
                let (low, high) = (this.low.as_mut_ptr(), this.high.as_mut_ptr());
                _mm_storeu_si128(low.cast(), _mm512_cvtepi32_epi8(a));
                _mm_storeu_si128(low.add(16).cast(), _mm512_cvtepi32_epi8(b));
                _mm_storeu_si128(high.cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(a)));
                _mm_storeu_si128(high.add(16).cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(b)));
            }
            all.push(this);
        }
        Some(all)
    }

    pub(in super::super) fn forward(w: &PackedLinear, x: &[f32], m: usize, out: OutPtr) -> bool {
        if !std::is_x86_feature_detected!("avx512vnni") {
            return false;
        }
        // SAFETY: the caller's `Isa::Avx512` was detected.
        let Some(inputs) = (unsafe { inputs(x, w.k) }) else {
            return false;
        };
        let units = w.panels / 2;
        let (_, step) = grid(m, units, w.k, MAX_ROWS);
        let run = |t: usize| {
            for u in t * step..((t + 1) * step).min(units) {
                let mut r = 0;
                // SAFETY: the instructions were found above; rows and panels are inside x, W and out, and
                // tasks have panels of their own.
                unsafe {
                    while r < m {
                        let (rows, tile): (usize, Tile) = match (m - r, w.format == WeightFormat::Int4) {
                            (4.., false) => (4, tile::<4, false>),
                            (2.., false) => (2, tile::<2, false>),
                            (_, false) => (1, tile::<1, false>),
                            (4.., true) => (4, tile::<4, true>),
                            (2.., true) => (2, tile::<2, true>),
                            (_, true) => (1, tile::<1, true>),
                        };
                        tile(w, &inputs, r, 2 * u, out);
                        r += rows;
                    }
                }
            }
        };
        match units.div_ceil(step) {
            1 => run(0),
            tasks => (0..tasks).into_par_iter().with_max_len(1).for_each(run),
        }
        true
    }

    type Tile = unsafe fn(&PackedLinear, &[Inputs], usize, usize, OutPtr);

    /// `MR` rows × 2 panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn tile<const MR: usize, const INT4: bool>(
        w: &PackedLinear,
        inputs: &[Inputs],
        row: usize,
        panel: usize,
        out: OutPtr,
    ) {
        let bytes = if INT4 { WeightFormat::Int4 } else { WeightFormat::Int8 }.block_bytes();
        let blocks = w.blocks();
        // SAFETY: each panel holds `blocks` blocks and each row of `inputs` as many; the output is
        // written below `n` only.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            let base = w.data.ptr().add(panel * w.panel_bytes());
            let ones = _mm512_set1_epi8(1);
            for b in 0..blocks {
                for j in 0..2 {
                    let block = base.add(j * w.panel_bytes() + b * bytes);
                    let scales = _mm512_cvtph_ps(_mm256_loadu_si256(block.cast()));
                    let q = block.add(if INT4 { INT4_SCALES } else { INT8_SCALES });
                    let mut total = _mm512_setzero_si512();
                    let mut high = [_mm512_setzero_si512(); MR];
                    let mut low = [_mm512_setzero_si512(); MR];
                    for s in 0..BLOCK / 4 {
                        let line = if INT4 {
                            let two = _mm512_loadu_si512(q.add(s % 4 * 64).cast());
                            let two = if s < 4 { two } else { _mm512_srli_epi16::<4>(two) };
                            _mm512_and_si512(two, _mm512_set1_epi8(15))
                        } else {
                            _mm512_loadu_si512(q.add(s * 64).cast())
                        };
                        total = _mm512_dpbusd_epi32(total, ones, line);
                        for i in 0..MR {
                            let x = inputs.as_ptr().add((row + i) * blocks + b);
                            let h = (&raw const (*x).high).cast::<i32>().add(s).read_unaligned();
                            let l = (&raw const (*x).low).cast::<i32>().add(s).read_unaligned();
                            high[i] = _mm512_dpbusd_epi32(high[i], _mm512_set1_epi32(h), line);
                            low[i] = _mm512_dpbusd_epi32(low[i], _mm512_set1_epi32(l), line);
                        }
                    }
                    let total = _mm512_slli_epi32::<15>(total);
                    for i in 0..MR {
                        let dot = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[i]), low[i]);
                        let dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, total));
                        let x = inputs.as_ptr().add((row + i) * blocks + b);
                        let scale = _mm512_mul_ps(scales, _mm512_set1_ps((*x).scale));
                        acc[i][j] = _mm512_fmadd_ps(dot, scale, acc[i][j]);
                        if INT4 {
                            let minima = _mm512_cvtph_ps(_mm256_loadu_si256(block.add(INT4_MINIMA).cast()));
                            acc[i][j] = _mm512_fmadd_ps(minima, _mm512_set1_ps((*x).sum), acc[i][j]);
                        }
                    }
                }
            }
            let unit = _mm512_set1_ps(w.unit);
            for i in 0..MR {
                for j in 0..2 {
                    let col = (panel + j) * PANEL;
                    let bias = _mm512_loadu_ps(w.bias.ptr().cast::<f32>().add(col));
                    let y = _mm512_fmadd_ps(acc[i][j], unit, bias);
                    let left = w.n.saturating_sub(col);
                    let mask = if left >= PANEL { 0xffff } else { (1u16 << left) - 1 };
                    _mm512_mask_storeu_ps(out.get().wrapping_add((row + i) * w.n + col), mask, y);
                }
            }
        }
    }
}
