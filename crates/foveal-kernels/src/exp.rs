//! Vector functions of the softmax: e^x and 2^x within 2 ULP, tanh within 3.
//!
//! 2^x = 2^n · 2^r with n the nearest integer and |r| ≤ ½; 2^r is a polynomial fitted for the
//! least relative error. Results under 2⁻¹²⁵ are flushed to zero: in a softmax they are lost
//! beside the leading 1, and subnormal operands would slow the multiply-adds that follow.

#![allow(unsafe_op_in_unsafe_fn)]

use crate::isa::Isa;
use crate::simd::{Portable, Simd};

/// log₂ e.
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2.
pub(crate) const LN_2: f32 = std::f32::consts::LN_2;
/// Results below 2 to this power are flushed.
const FLUSH: f32 = -125.0;

/// 2^x for x ≤ 127; −∞ gives 0, NaN stays NaN.
///
/// # Safety
/// As in [`crate::simd`].
#[inline(always)]
pub(crate) unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
    let n = S::round(x);
    let r = S::sub(x, n);
    let mut p = S::splat(1.535_336e-4);
    for c in [1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 0.240_226_48, std::f32::consts::LN_2, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    S::zero_below(x, S::splat(FLUSH), S::pow2(n, p))
}

/// e^x for x ≤ 88; −∞ gives 0, NaN stays NaN.
///
/// # Safety
/// As in [`crate::simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    let n = S::round(S::mul(x, S::splat(LOG2_E)));
    // ln 2 in two parts; the first has few enough bits that n · hi is exact.
    const HI: f32 = 0.693_359_4;
    const LO: f32 = -2.121_944_4e-4;
    let r = S::fma(n, S::splat(-HI), x);
    let r = S::fma(n, S::splat(-LO), r);
    let mut p = S::splat(1.381_453_8e-3);
    for c in [8.368_745e-3, 4.166_839e-2, 0.166_665_21, 0.499_999_94, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    S::zero_below(x, S::splat(FLUSH * LN_2), S::pow2(n, p))
}

/// 1 / (1 + 2^−x); −∞ and what is below 2⁻¹²⁵ give 0, NaN stays NaN.
///
/// # Safety
/// As in [`crate::simd`].
#[inline(always)]
pub(crate) unsafe fn logistic2<S: Simd>(x: S::V) -> S::V {
    let one = S::splat(1.0);
    // x stands second in `max`, which hands a NaN through.
    let low = S::max(S::splat(FLUSH), x);
    let y = S::div(one, S::add(one, exp2::<S>(S::sub(S::splat(0.0), low))));
    S::zero_below(x, S::splat(FLUSH), y)
}

/// tanh x: a polynomial near zero, 1 − 2/(e^2x + 1) beyond.
///
/// # Safety
/// As in [`crate::simd`].
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    let z = S::mul(x, x);
    let mut p = S::splat(-5.717_037e-3);
    for c in [2.065_057_9e-2, -5.374_349_7e-2, 0.133_314_9, -0.333_332_84] {
        p = S::fma(p, z, S::splat(c));
    }
    let small = S::fma(S::mul(p, z), x, x);
    // tanh is 1 to f32 from 10 on; the clamp keeps e^2x finite. x stands second in each
    // `max`, which hands a NaN through. −(−10 max −x) = x min 10.
    let zero = S::splat(0.0);
    let low = S::splat(-10.0);
    let lim = S::max(low, S::sub(zero, S::max(low, S::sub(zero, x))));
    let e = exp::<S>(S::add(lim, lim));
    let one = S::splat(1.0);
    let big = S::sub(one, S::div(S::splat(2.0), S::add(e, one)));
    S::select(S::abs_lt(x, S::splat(0.625)), small, big)
}

/// Which function [`apply`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fun {
    /// e^x, x ≤ 88.
    Exp,
    /// 2^x, x ≤ 127.
    Exp2,
    /// tanh x.
    Tanh,
}

#[inline(always)]
unsafe fn one<S: Simd>(f: Fun, v: S::V) -> S::V {
    match f {
        Fun::Exp => exp::<S>(v),
        Fun::Exp2 => exp2::<S>(v),
        Fun::Tanh => tanh::<S>(v),
    }
}

#[inline(always)]
unsafe fn apply_on<S: Simd>(f: Fun, xs: &mut [f32]) {
    let mut chunks = xs.chunks_exact_mut(S::LANES);
    for c in &mut chunks {
        S::store(c.as_mut_ptr(), one::<S>(f, S::load(c.as_ptr())));
    }
    let rest = chunks.into_remainder();
    let mut buf = [0f32; 16];
    buf[..rest.len()].copy_from_slice(rest);
    S::store(buf.as_mut_ptr(), one::<S>(f, S::load(buf.as_ptr())));
    rest.copy_from_slice(&buf[..rest.len()]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn apply_avx2(f: Fun, xs: &mut [f32]) {
    apply_on::<crate::simd::Avx2>(f, xs)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn apply_avx512(f: Fun, xs: &mut [f32]) {
    apply_on::<crate::simd::Avx512>(f, xs)
}

/// Apply `f` to every element in place, within 2 ULP (`Tanh`: 3) for results of at least 2⁻¹²⁵;
/// `Exp` and `Exp2` give 0 below that.
pub fn apply(f: Fun, xs: &mut [f32], isa: Isa) {
    match isa.min(Isa::detect()) {
        // SAFETY: the portable path needs no instruction beyond the target's baseline.
        Isa::Portable => unsafe { apply_on::<Portable>(f, xs) },
        // SAFETY: `isa` is at most what `detect` found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { apply_avx2(f, xs) },
        // SAFETY: `isa` is at most what `detect` found.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { apply_avx512(f, xs) },
        // SAFETY: as for the portable path.
        #[cfg(not(target_arch = "x86_64"))]
        _ => unsafe { apply_on::<Portable>(f, xs) },
    }
}
