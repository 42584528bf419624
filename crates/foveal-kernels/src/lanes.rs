//! Sixteen f32 lanes under each instruction set.
//!
//! A kernel written once over [`Lanes`] with `#[inline(always)]` bodies becomes AVX-512,
//! AVX2 or portable code by being called from a function with that target feature
//! (see [`crate::dispatch`]).

/// Sixteen f32 values.
///
/// # Safety
/// Every method may use the instructions of its implementor: call it only from code that
/// was entered through [`crate::dispatch`] with an [`crate::Isa`] the machine has. Pointer
/// arguments must be valid for the 16 elements (no alignment needed).
pub(crate) trait Lanes: Copy {
    /// Rows of a GEMM register block that fit beside two 16-wide panels of weights.
    const ROWS: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    /// self · a + b. Fused where the instruction set has it.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// 16 consecutive pairs of bf16: (first of each pair, second of each pair).
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self);
    /// 16 consecutive quads of int8: the first two of each quad, or the last two.
    unsafe fn load_i8_quads(p: *const i8, last: bool) -> (Self, Self);
    /// 16 consecutive quads of 4-bit numbers, in the low or high halves of bytes: the first two of each
    /// quad, or the last two.
    unsafe fn load_u4_quads(p: *const u8, high: bool, last: bool) -> (Self, Self);
    /// 16 consecutive finite f16.
    unsafe fn load_f16(p: *const u16) -> Self;
}

/// Plain Rust lanes.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

/// f16 magnitude bits shifted into f32 position are the value times 2^-112.
const F16_REBIAS: f32 = f32::from_bits((127 + 112) << 23);

// SAFETY (whole impl): plain loads and stores of 16 elements that the caller vouches for.
impl Lanes for Portable {
    const ROWS: usize = 2;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 16])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by the trait's contract.
        Portable(unsafe { p.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: by the trait's contract.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] + o.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * o.0[i]))
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * a.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        // SAFETY: by the trait's contract.
        let x = unsafe { p.cast::<[[u16; 2]; 16]>().read_unaligned() };
        (
            Portable(x.map(|b| f32::from_bits(u32::from(b[0]) << 16))),
            Portable(x.map(|b| f32::from_bits(u32::from(b[1]) << 16))),
        )
    }
    #[inline(always)]
    unsafe fn load_i8_quads(p: *const i8, last: bool) -> (Self, Self) {
        // SAFETY: by the trait's contract.
        let x = unsafe { p.cast::<[[i8; 4]; 16]>().read_unaligned() };
        let at = if last { 2 } else { 0 };
        (Portable(x.map(|b| f32::from(b[at]))), Portable(x.map(|b| f32::from(b[at + 1]))))
    }
    #[inline(always)]
    unsafe fn load_u4_quads(p: *const u8, high: bool, last: bool) -> (Self, Self) {
        // SAFETY: by the trait's contract.
        let x = unsafe { p.cast::<[[u8; 4]; 16]>().read_unaligned() };
        let (at, shift) = (2 * usize::from(last), 4 * u32::from(high));
        (Portable(x.map(|b| f32::from(b[at] >> shift & 15))), Portable(x.map(|b| f32::from(b[at + 1] >> shift & 15))))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: by the trait's contract.
        let x = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        Portable(x.map(|b| {
            let magnitude = f32::from_bits(u32::from(b & 0x7fff) << 13) * F16_REBIAS;
            if b & 0x8000 == 0 { magnitude } else { -magnitude }
        }))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{F16_REBIAS, Lanes};
    use std::arch::x86_64::*;

    /// Two AVX2 registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Lanes for Avx2 {
        const ROWS: usize = 2;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller has AVX2.
            unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the caller has AVX2 and 16 readable elements.
            unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the caller has AVX2 and 16 writable elements.
            unsafe {
                _mm256_storeu_ps(p, self.0);
                _mm256_storeu_ps(p.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            // SAFETY: the caller has AVX2.
            unsafe { Avx2(_mm256_add_ps(self.0, o.0), _mm256_add_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            // SAFETY: the caller has AVX2.
            unsafe { Avx2(_mm256_mul_ps(self.0, o.0), _mm256_mul_ps(self.1, o.1)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller has AVX2 and FMA.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
            // SAFETY: the caller has AVX2 and 32 readable elements.
            unsafe {
                let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast()));
                let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let (a_lo, b_lo) = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
                let (a_hi, b_hi) = (_mm256_and_si256(a, high), _mm256_and_si256(b, high));
                (
                    Avx2(_mm256_castsi256_ps(a_lo), _mm256_castsi256_ps(b_lo)),
                    Avx2(_mm256_castsi256_ps(a_hi), _mm256_castsi256_ps(b_hi)),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_i8_quads(p: *const i8, last: bool) -> (Self, Self) {
            // SAFETY: the caller has AVX2 and 64 readable elements.
            unsafe {
                let (mut a, mut b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
                if !last {
                    (a, b) = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
                }
                let (a0, b0) = (_mm256_slli_epi32::<8>(a), _mm256_slli_epi32::<8>(b));
                let (a0, b0) = (_mm256_srai_epi32::<24>(a0), _mm256_srai_epi32::<24>(b0));
                let (a1, b1) = (_mm256_srai_epi32::<24>(a), _mm256_srai_epi32::<24>(b));
                (
                    Avx2(_mm256_cvtepi32_ps(a0), _mm256_cvtepi32_ps(b0)),
                    Avx2(_mm256_cvtepi32_ps(a1), _mm256_cvtepi32_ps(b1)),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_u4_quads(p: *const u8, high: bool, last: bool) -> (Self, Self) {
            // SAFETY: the caller has AVX2 and 64 readable elements.
            unsafe {
                let shift = 4 * i32::from(high) + 16 * i32::from(last);
                let (first, second) = (_mm_cvtsi32_si128(shift), _mm_cvtsi32_si128(shift + 8));
                let mask = _mm256_set1_epi32(15);
                let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
                let (a0, b0) = (_mm256_srl_epi32(a, first), _mm256_srl_epi32(b, first));
                let (a1, b1) = (_mm256_srl_epi32(a, second), _mm256_srl_epi32(b, second));
                let (a0, b0) = (_mm256_and_si256(a0, mask), _mm256_and_si256(b0, mask));
                let (a1, b1) = (_mm256_and_si256(a1, mask), _mm256_and_si256(b1, mask));
                (
                    Avx2(_mm256_cvtepi32_ps(a0), _mm256_cvtepi32_ps(b0)),
                    Avx2(_mm256_cvtepi32_ps(a1), _mm256_cvtepi32_ps(b1)),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self {
            // SAFETY: the caller has AVX2 and 16 readable elements.
            unsafe {
                let rebias = _mm256_set1_ps(F16_REBIAS);
                let widen = |p: *const u16| {
                    let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    let sign = _mm256_slli_epi32::<16>(_mm256_and_si256(x, _mm256_set1_epi32(0x8000)));
                    let magnitude = _mm256_slli_epi32::<13>(_mm256_and_si256(x, _mm256_set1_epi32(0x7fff)));
                    let magnitude = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), rebias);
                    _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign))
                };
                Avx2(widen(p), widen(p.add(8)))
            }
        }
    }

    impl Lanes for Avx512 {
        const ROWS: usize = 12;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the caller has AVX-512 and 16 readable elements.
            unsafe { Avx512(_mm512_loadu_ps(p)) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the caller has AVX-512 and 16 writable elements.
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe { Avx512(_mm512_add_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe { Avx512(_mm512_mul_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe { Avx512(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
            // SAFETY: the caller has AVX-512 and 32 readable elements.
            unsafe {
                let x = _mm512_loadu_si512(p.cast());
                let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let lo = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
                (Avx512(lo), Avx512(_mm512_castsi512_ps(_mm512_and_si512(x, high))))
            }
        }
        #[inline(always)]
        unsafe fn load_i8_quads(p: *const i8, last: bool) -> (Self, Self) {
            // SAFETY: the caller has AVX-512 and 64 readable elements.
            unsafe {
                let mut x = _mm512_loadu_si512(p.cast());
                if !last {
                    x = _mm512_slli_epi32::<16>(x);
                }
                let a = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(x));
                let b = _mm512_srai_epi32::<24>(x);
                (Avx512(_mm512_cvtepi32_ps(a)), Avx512(_mm512_cvtepi32_ps(b)))
            }
        }
        #[inline(always)]
        unsafe fn load_u4_quads(p: *const u8, high: bool, last: bool) -> (Self, Self) {
            // SAFETY: the caller has AVX-512 and 64 readable elements.
            unsafe {
                let shift = 4 * i32::from(high) + 16 * i32::from(last);
                let x = _mm512_loadu_si512(p.cast());
                let mask = _mm512_set1_epi32(15);
                let a = _mm512_and_si512(_mm512_srl_epi32(x, _mm_cvtsi32_si128(shift)), mask);
                let b = _mm512_and_si512(_mm512_srl_epi32(x, _mm_cvtsi32_si128(shift + 8)), mask);
                (Avx512(_mm512_cvtepi32_ps(a)), Avx512(_mm512_cvtepi32_ps(b)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self {
            // SAFETY: the caller has AVX-512 and 16 readable elements.
            unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
        }
    }
}
