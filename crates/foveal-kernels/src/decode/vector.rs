//! What decode needs of a vector beyond [`Simd`]: stored elements, partial loads, sums.

// One contract for the whole file, that of `crate::simd`: the caller runs under an instruction set
// that has the operation, and pointers reach the elements named.
#![allow(unsafe_op_in_unsafe_fn)]

use super::codec::{INT4_GROUP, INT4_GROUP_BYTES};
use crate::simd::{Portable, Simd};

/// Loads of stored rows, and sums.
pub(super) trait Rows: Simd {
    /// Rows of queries that a kernel keeps in registers beside four rows of keys.
    const QUERIES: usize;
    /// The first `n` < LANES elements, zeros after.
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V;
    /// As [`Rows::load_part`] for bf16.
    unsafe fn load_bf16_part(p: *const u16, n: usize) -> Self::V;
    /// LANES int8.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// As [`Rows::load_part`] for int8.
    unsafe fn load_i8_part(p: *const i8, n: usize) -> Self::V;
    /// LANES values of a group of int4 from channel `at` of the group on, a multiple of LANES.
    unsafe fn load_int4(group: *const u8, at: usize) -> Self::V;
    /// Sums of the lanes of a, b, c, d into `out[0..4]`.
    unsafe fn sum4(v: [Self::V; 4], out: *mut f32);
}

/// How a row is stored.
pub(super) trait Stored: Copy {
    /// LANES elements from channel `c` of a row on (a multiple of LANES), as f32 (int8 without its scale).
    unsafe fn load<S: Rows>(row: *const u8, c: usize) -> S::V;
    /// The first `n` < LANES of them; what comes after is finite where the row is.
    unsafe fn load_part<S: Rows>(row: *const u8, c: usize, n: usize) -> S::V;
}

#[derive(Clone, Copy)]
pub(super) struct F32;
#[derive(Clone, Copy)]
pub(super) struct Bf16;
#[derive(Clone, Copy)]
pub(super) struct Int8;
#[derive(Clone, Copy)]
pub(super) struct Int4;

impl Stored for F32 {
    #[inline(always)]
    unsafe fn load<S: Rows>(row: *const u8, c: usize) -> S::V {
        S::load(row.cast::<f32>().add(c))
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(row: *const u8, c: usize, n: usize) -> S::V {
        S::load_part(row.cast::<f32>().add(c), n)
    }
}

impl Stored for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Rows>(row: *const u8, c: usize) -> S::V {
        S::load_bf16(row.cast::<u16>().add(c))
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(row: *const u8, c: usize, n: usize) -> S::V {
        S::load_bf16_part(row.cast::<u16>().add(c), n)
    }
}

impl Stored for Int8 {
    #[inline(always)]
    unsafe fn load<S: Rows>(row: *const u8, c: usize) -> S::V {
        S::load_i8(row.cast::<i8>().add(c))
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(row: *const u8, c: usize, n: usize) -> S::V {
        S::load_i8_part(row.cast::<i8>().add(c), n)
    }
}

impl Stored for Int4 {
    #[inline(always)]
    unsafe fn load<S: Rows>(row: *const u8, c: usize) -> S::V {
        S::load_int4(row.add(c / INT4_GROUP * INT4_GROUP_BYTES), c % INT4_GROUP)
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(row: *const u8, c: usize, _: usize) -> S::V {
        // Groups are stored whole.
        Self::load::<S>(row, c)
    }
}

/// An f16 as f32, in plain code: shifted in place, its exponent is short by 112.
#[inline(always)]
fn wide(h: u16) -> f32 {
    let bits = u32::from(h & 0x7fff) << 13;
    // Infinities and NaN have all bits of the exponent set, and keep them.
    let special = if h & 0x7c00 == 0x7c00 { 0xff << 23 } else { 0 };
    let x = f32::from_bits(bits) * f32::from_bits((112 + 127) << 23);
    f32::from_bits(x.to_bits() | special | u32::from(h & 0x8000) << 16)
}

/// Scale and minimum of a group of int4.
#[inline(always)]
unsafe fn head(group: *const u8) -> (f32, f32) {
    let [a, b, c, d] = group.cast::<[u8; 4]>().read_unaligned();
    (wide(u16::from_le_bytes([a, b])), wide(u16::from_le_bytes([c, d])))
}

/// The first `n` of up to 16 elements, zeros after.
#[inline(always)]
unsafe fn padded<T: Copy + Default>(p: *const T, n: usize) -> [T; 16] {
    let mut buf = [T::default(); 16];
    std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n);
    buf
}

impl Rows for Portable {
    const QUERIES: usize = 2;
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> [f32; 4] {
        Self::load(padded(p, n).as_ptr())
    }
    #[inline(always)]
    unsafe fn load_bf16_part(p: *const u16, n: usize) -> [f32; 4] {
        Self::load_bf16(padded(p, n).as_ptr())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> [f32; 4] {
        p.cast::<[i8; 4]>().read_unaligned().map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_i8_part(p: *const i8, n: usize) -> [f32; 4] {
        Self::load_i8(padded(p, n).as_ptr())
    }
    #[inline(always)]
    unsafe fn load_int4(group: *const u8, at: usize) -> [f32; 4] {
        let (scale, min) = head(group);
        let q = group.add(4 + at % 16).cast::<[u8; 4]>().read_unaligned();
        q.map(|q| min + scale * f32::from(q >> (at / 16 * 4) & 15))
    }
    #[inline(always)]
    unsafe fn sum4(v: [[f32; 4]; 4], out: *mut f32) {
        for (i, v) in v.into_iter().enumerate() {
            *out.add(i) = (v[0] + v[2]) + (v[1] + v[3]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Rows, head, padded};
    use crate::simd::{Avx2, Avx512, Simd};
    use std::arch::x86_64::*;

    impl Rows for Avx2 {
        const QUERIES: usize = 2;
        #[inline(always)]
        unsafe fn load_part(p: *const f32, n: usize) -> __m256 {
            Self::load(padded(p, n).as_ptr())
        }
        #[inline(always)]
        unsafe fn load_bf16_part(p: *const u16, n: usize) -> __m256 {
            Self::load_bf16(padded(p, n).as_ptr())
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> __m256 {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
        }
        #[inline(always)]
        unsafe fn load_i8_part(p: *const i8, n: usize) -> __m256 {
            Self::load_i8(padded(p, n).as_ptr())
        }
        #[inline(always)]
        unsafe fn load_int4(group: *const u8, at: usize) -> __m256 {
            let (scale, min) = head(group);
            let q = _mm256_cvtepu8_epi32(_mm_loadl_epi64(group.add(4 + at % 16).cast()));
            let q = if at < 16 { q } else { _mm256_srli_epi32::<4>(q) };
            let q = _mm256_cvtepi32_ps(_mm256_and_si256(q, _mm256_set1_epi32(15)));
            _mm256_fmadd_ps(q, _mm256_set1_ps(scale), _mm256_set1_ps(min))
        }
        #[inline(always)]
        unsafe fn sum4([a, b, c, d]: [__m256; 4], out: *mut f32) {
            let t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t)));
        }
    }

    impl Rows for Avx512 {
        const QUERIES: usize = 4;
        #[inline(always)]
        unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
            _mm512_maskz_loadu_ps((1u16 << n) - 1, p)
        }
        #[inline(always)]
        unsafe fn load_bf16_part(p: *const u16, n: usize) -> __m512 {
            let x = _mm256_maskz_loadu_epi16((1u16 << n) - 1, p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> __m512 {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
        }
        #[inline(always)]
        unsafe fn load_i8_part(p: *const i8, n: usize) -> __m512 {
            let x = _mm_maskz_loadu_epi8((1u16 << n) - 1, p);
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))
        }
        #[inline(always)]
        unsafe fn load_int4(group: *const u8, at: usize) -> __m512 {
            // Scale and minimum in lanes 0 and 1, then the group's sixteen values in one register, of which
            // each channel picks its own (a permutation looks at the low four bits of its indices).
            let head = _mm_cvtsi32_si128(group.cast::<i32>().read_unaligned());
            let head = _mm512_cvtph_ps(_mm256_castsi128_si256(head));
            let scale = _mm512_broadcastss_ps(_mm512_castps512_ps128(head));
            let min = _mm512_permutexvar_ps(_mm512_set1_epi32(1), head);
            let count = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            let values = _mm512_fmadd_ps(count, scale, min);
            let q = _mm512_cvtepu8_epi32(_mm_loadu_si128(group.add(4).cast()));
            _mm512_permutexvar_ps(if at < 16 { q } else { _mm512_srli_epi32::<4>(q) }, values)
        }
        #[inline(always)]
        unsafe fn sum4([a, b, c, d]: [__m512; 4], out: *mut f32) {
            // Pairs, then quads, inside each 128 bits; then the four 128-bit parts.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let t = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let t = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps::<1>(t));
            _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::wide;
    use half::f16;

    #[test]
    fn every_f16_widens() {
        for h in 0..=u16::MAX {
            let (a, b) = (wide(h), f16::from_bits(h).to_f32());
            assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{h:#x}: {a} {b}");
        }
    }
}
