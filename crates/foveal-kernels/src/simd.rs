//! One small set of vector operations, so that each kernel is written once.
//!
//! A kernel is a generic `#[inline(always)]` function over [`Simd`]; one thin wrapper per
//! instruction set, carrying `#[target_feature]`, makes the compiler emit that set. Hence the
//! contract of every function here, and the only reason they are `unsafe`: the caller runs
//! under an [`crate::Isa`] that has the instructions, and pointers reach `LANES` elements.

// The whole file is one contract (above); a block per intrinsic would only repeat it.
#![allow(unsafe_op_in_unsafe_fn)]

/// A vector of f32 lanes. See the module for the safety contract of all functions.
pub(crate) trait Simd: Copy + 'static {
    /// The vector register.
    type V: Copy;
    /// f32 lanes of a register.
    const LANES: usize;
    /// Every lane `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// Unaligned load.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Unaligned store.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Load `LANES` bf16 (as bits), widened.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// a + b
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// Lane-wise maximum; b where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, fused where the set has it.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Nearest integer, ties to even; anything for |a| ≥ 2²².
    unsafe fn round(a: Self::V) -> Self::V;
    /// p · 2ⁿ for integer n in −126..=127 and p near 1; anything elsewhere.
    unsafe fn pow2(n: Self::V, p: Self::V) -> Self::V;
    /// y, but 0 in lanes with x < limit (a NaN in x keeps y).
    unsafe fn zero_below(x: Self::V, limit: Self::V, y: Self::V) -> Self::V;
    /// [`Simd::pow2`], but 0 in lanes with x < limit (a NaN in x keeps p · 2ⁿ).
    #[inline(always)]
    unsafe fn pow2_unless_below(n: Self::V, p: Self::V, x: Self::V, limit: Self::V) -> Self::V {
        Self::zero_below(x, limit, Self::pow2(n, p))
    }
    /// Lane i of a where bit i is set, else of b.
    unsafe fn select(bits: u32, a: Self::V, b: Self::V) -> Self::V;
    /// Bits of the lanes with |a| < b.
    unsafe fn abs_lt(a: Self::V, b: Self::V) -> u32;
    /// Sum of lanes.
    unsafe fn sum(v: Self::V) -> f32;
    /// Largest lane.
    unsafe fn top(v: Self::V) -> f32;
}

/// Plain Rust on four lanes: what baseline x86-64 and AArch64 registers hold.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; 4], b: [f32; 4], f: impl Fn(f32, f32) -> f32) -> [f32; 4] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        p.cast::<[f32; 4]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        p.cast::<[f32; 4]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; 4] {
        p.cast::<[u16; 4]>().read_unaligned().map(|x| f32::from_bits(u32::from(x) << 16))
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Not `mul_add`: without an FMA instruction that is a library call.
        Self::add(Self::mul(a, b), c)
    }
    #[inline(always)]
    unsafe fn round(a: [f32; 4]) -> [f32; 4] {
        // 1.5 · 2²³: adding it leaves no fraction bits; again no library call.
        a.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn pow2(n: [f32; 4], p: [f32; 4]) -> [f32; 4] {
        zip(n, p, |n, p| {
            // The low mantissa bits of n + 1.5·2²³ are n in two's complement.
            let n = (n + 12_582_912.0).to_bits();
            f32::from_bits(p.to_bits().wrapping_add(n << 23))
        })
    }
    #[inline(always)]
    unsafe fn zero_below(x: [f32; 4], limit: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    unsafe fn select(bits: u32, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if bits >> i & 1 == 1 { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn abs_lt(a: [f32; 4], b: [f32; 4]) -> u32 {
        (0..4).map(|i| u32::from(a[i].abs() < b[i]) << i).sum()
    }
    #[inline(always)]
    unsafe fn sum(v: [f32; 4]) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn top(v: [f32; 4]) -> f32 {
        v[0].max(v[2]).max(v[1].max(v[3]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, transpose};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// AVX2 and FMA, eight lanes.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            _mm256_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            _mm256_loadu_ps(p)
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            _mm256_storeu_ps(p, v)
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m256 {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            _mm256_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            _mm256_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            _mm256_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            _mm256_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            _mm256_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn round(a: __m256) -> __m256 {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        }
        #[inline(always)]
        unsafe fn pow2(n: __m256, p: __m256) -> __m256 {
            let n = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n))
        }
        #[inline(always)]
        unsafe fn zero_below(x: __m256, limit: __m256, y: __m256) -> __m256 {
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit), y)
        }
        #[inline(always)]
        unsafe fn select(bits: u32, a: __m256, b: __m256) -> __m256 {
            // Bit i moved to the sign of lane i.
            let at = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
            let sign = _mm256_sllv_epi32(_mm256_set1_epi32(bits as i32), at);
            _mm256_blendv_ps(b, a, _mm256_castsi256_ps(sign))
        }
        #[inline(always)]
        unsafe fn abs_lt(a: __m256, b: __m256) -> u32 {
            let a = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) as u32
        }
        #[inline(always)]
        unsafe fn sum(v: __m256) -> f32 {
            let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
        #[inline(always)]
        unsafe fn top(v: __m256) -> f32 {
            let x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    /// AVX-512, sixteen lanes.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            _mm512_loadu_ps(p)
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            _mm512_storeu_ps(p, v)
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            _mm512_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn round(a: __m512) -> __m512 {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        }
        #[inline(always)]
        unsafe fn pow2(n: __m512, p: __m512) -> __m512 {
            _mm512_scalef_ps(p, n)
        }
        #[inline(always)]
        unsafe fn zero_below(x: __m512, limit: __m512, y: __m512) -> __m512 {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), y)
        }
        #[inline(always)]
        unsafe fn pow2_unless_below(n: __m512, p: __m512, x: __m512, limit: __m512) -> __m512 {
            _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), p, n)
        }
        #[inline(always)]
        unsafe fn select(bits: u32, a: __m512, b: __m512) -> __m512 {
            _mm512_mask_blend_ps(bits as u16, b, a)
        }
        #[inline(always)]
        unsafe fn abs_lt(a: __m512, b: __m512) -> u32 {
            u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(a), b))
        }
        #[inline(always)]
        unsafe fn sum(v: __m512) -> f32 {
            _mm512_reduce_add_ps(v)
        }
        #[inline(always)]
        unsafe fn top(v: __m512) -> f32 {
            _mm512_reduce_max_ps(v)
        }
    }

    /// Transpose a 16 × 16 matrix of u32.
    #[inline(always)]
    pub(crate) unsafe fn transpose(x: [__m512i; 16]) -> [__m512i; 16] {
        let mut a = x;
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
        }
        // b[4i + c]: column 4l + c of rows 4i.. in 128-bit lane l.
        let mut b = a;
        for i in 0..4 {
            b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        let mut y = b;
        for c in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(b[c], b[4 + c]);
            let high = _mm512_shuffle_i32x4::<0xdd>(b[c], b[4 + c]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + c], b[12 + c]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + c], b[12 + c]);
            y[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            y[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
            y[4 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            y[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
        }
        y
    }
}
