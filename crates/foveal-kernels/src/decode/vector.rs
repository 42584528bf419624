//! What decode needs of a vector beyond [`Simd`]: stored elements, partial loads, sums.

// One contract for the whole file, that of `crate::simd`: the caller runs under an instruction set
// that has the operation, and pointers reach the elements named.
#![allow(unsafe_op_in_unsafe_fn)]

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
    /// Sums of the lanes of a, b, c, d into `out[0..4]`.
    unsafe fn sum4(v: [Self::V; 4], out: *mut f32);
}

/// How a row is stored.
pub(super) trait Stored: Copy {
    /// Element.
    type Item;
    /// LANES elements as f32 (int8 without its scale).
    unsafe fn load<S: Rows>(p: *const Self::Item) -> S::V;
    /// The first `n` < LANES elements, zeros after.
    unsafe fn load_part<S: Rows>(p: *const Self::Item, n: usize) -> S::V;
}

#[derive(Clone, Copy)]
pub(super) struct F32;
#[derive(Clone, Copy)]
pub(super) struct Bf16;
#[derive(Clone, Copy)]
pub(super) struct Int8;

impl Stored for F32 {
    type Item = f32;
    #[inline(always)]
    unsafe fn load<S: Rows>(p: *const f32) -> S::V {
        S::load(p)
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(p: *const f32, n: usize) -> S::V {
        S::load_part(p, n)
    }
}

impl Stored for Bf16 {
    type Item = u16;
    #[inline(always)]
    unsafe fn load<S: Rows>(p: *const u16) -> S::V {
        S::load_bf16(p)
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(p: *const u16, n: usize) -> S::V {
        S::load_bf16_part(p, n)
    }
}

impl Stored for Int8 {
    type Item = i8;
    #[inline(always)]
    unsafe fn load<S: Rows>(p: *const i8) -> S::V {
        S::load_i8(p)
    }
    #[inline(always)]
    unsafe fn load_part<S: Rows>(p: *const i8, n: usize) -> S::V {
        S::load_i8_part(p, n)
    }
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
    unsafe fn sum4(v: [[f32; 4]; 4], out: *mut f32) {
        for (i, v) in v.into_iter().enumerate() {
            *out.add(i) = (v[0] + v[2]) + (v[1] + v[3]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Rows, padded};
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
