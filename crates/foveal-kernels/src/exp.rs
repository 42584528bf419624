//! Vector functions of the softmax: e^x and 2^x within 2 ULP, tanh within 3.
//!
//! 2^x = 2^n · 2^r with n the nearest integer and |r| ≤ ½; 2^r is a polynomial fitted for the
//! least relative error. Results under 2⁻¹²⁵ are flushed to zero: in a softmax they are lost
//! beside the leading 1, and subnormal operands would slow the multiply-adds that follow.

#![allow(unsafe_op_in_unsafe_fn)]

use crate::dispatch::with_isa;
use crate::error::{Result, same};
use crate::isa::Isa;
use crate::simd::Simd;

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
    S::pow2_unless_below(n, p, x, S::splat(FLUSH))
}

/// e^x for x ≤ 88; −∞ gives 0, NaN stays NaN.
///
/// # Safety
/// As in [`crate::simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // 1.5 · 2²³: adding it leaves no fraction bits, which rounds, and costs one fused operation with the product.
    let magic = S::splat(12_582_912.0);
    let n = S::sub(S::fma(x, S::splat(LOG2_E), magic), magic);
    // ln 2 in two parts; the first has few enough bits that n · hi is exact.
    const HI: f32 = 0.693_359_4;
    const LO: f32 = -2.121_944_4e-4;
    let r = S::fma(n, S::splat(-HI), x);
    let r = S::fma(n, S::splat(-LO), r);
    let mut p = S::splat(1.381_453_8e-3);
    for c in [8.368_745e-3, 4.166_839e-2, 0.166_665_21, 0.499_999_94, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    S::pow2_unless_below(n, p, x, S::splat(FLUSH * LN_2))
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

/// Vectors that are under way at once: enough to hide the latency of one's chain of operations.
const TOGETHER: usize = 4;

/// `src` may be `dst`.
#[inline(always)]
unsafe fn apply_on<S: Simd>(f: Fun, src: *const f32, dst: *mut f32, n: usize) {
    // SAFETY: both reach `n` elements; the vectors of a step are read before they are written.
    unsafe {
        let mut i = 0;
        while i + TOGETHER * S::LANES <= n {
            let mut v = [S::splat(0.0); TOGETHER];
            for c in 0..TOGETHER {
                v[c] = one::<S>(f, S::load(src.add(i + c * S::LANES)));
            }
            for c in 0..TOGETHER {
                S::store(dst.add(i + c * S::LANES), v[c]);
            }
            i += TOGETHER * S::LANES;
        }
        while i + S::LANES <= n {
            S::store(dst.add(i), one::<S>(f, S::load(src.add(i))));
            i += S::LANES;
        }
        let mut rest = [0f32; 16];
        std::ptr::copy_nonoverlapping(src.add(i), rest.as_mut_ptr(), n - i);
        S::store(rest.as_mut_ptr(), one::<S>(f, S::load(rest.as_ptr())));
        std::ptr::copy_nonoverlapping(rest.as_ptr(), dst.add(i), n - i);
    }
}

/// One function each, so that the choice is made outside the loop.
macro_rules! function {
    ($name:ident, $body:ident, $fun:expr) => {
        #[inline(always)]
        unsafe fn $body<S: Simd>(src: *const f32, dst: *mut f32, n: usize) {
            // SAFETY: passed on.
            unsafe { apply_on::<S>($fun, src, dst, n) }
        }
        with_isa!(simd, unsafe fn $name => $body(src: *const f32, dst: *mut f32, n: usize));
    };
}
function!(exp_all, exp_all_on, Fun::Exp);
function!(exp2_all, exp2_all_on, Fun::Exp2);
function!(tanh_all, tanh_all_on, Fun::Tanh);

/// # Safety
/// Both reach `n` elements, and do not overlap unless they are the same.
unsafe fn run(f: Fun, src: *const f32, dst: *mut f32, n: usize, isa: Isa) {
    let isa = isa.min(Isa::detect());
    // SAFETY: passed on; `isa` is at most what `detect` found.
    unsafe {
        match f {
            Fun::Exp => exp_all(isa, src, dst, n),
            Fun::Exp2 => exp2_all(isa, src, dst, n),
            Fun::Tanh => tanh_all(isa, src, dst, n),
        }
    }
}

/// Apply `f` to every element in place, within 2 ULP (`Tanh`: 3) for results of at least 2⁻¹²⁵;
/// `Exp` and `Exp2` give 0 below that.
pub fn apply(f: Fun, xs: &mut [f32], isa: Isa) {
    let p = xs.as_mut_ptr();
    // SAFETY: one slice, uniquely borrowed.
    unsafe { run(f, p, p, xs.len(), isa) }
}

/// [`apply`] from `xs` into `out`, of the same length.
pub fn apply_to(f: Fun, xs: &[f32], out: &mut [f32], isa: Isa) -> Result<()> {
    same("apply_to", "elements", "out", out.len(), "xs", xs.len())?;
    // SAFETY: two slices of one length, one of them uniquely borrowed.
    unsafe { run(f, xs.as_ptr(), out.as_mut_ptr(), xs.len(), isa) };
    Ok(())
}
