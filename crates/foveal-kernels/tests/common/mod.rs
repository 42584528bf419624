//! What the tests of convolutions and feature attention share: data, errors, memory orders.
#![allow(dead_code)]

use foveal_kernels::Result;
use foveal_kernels::conv::{Signal, SignalMut};

/// Deterministic values, even in −1..1.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed;
    let next = || {
        s = s.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (s ^ (s >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The largest difference; NaN if there is one.
pub fn worst(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let e = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs();
    a.iter().zip(b).map(e).fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

/// The error rule: at most `factor` times the error of the plain code. `roundings` of the largest value
/// are always allowed, where the plain code may be exact by luck.
pub fn within(what: &str, factor: f64, roundings: f64, got: &[f32], plain: &[f32], want: &[f64]) {
    let (g, p) = (worst(got, want), worst(plain, want));
    let floor = want.iter().fold(0f64, |a, x| a.max(x.abs())) * roundings * f64::from(f32::EPSILON);
    assert!(g <= (factor * p).max(floor), "{what}: error {g:e}, plain code {p:e}, floor {floor:e}");
}

/// (B, C, T) as (B, T, C).
pub fn transposed(x: &[f32], [b, c, t]: [usize; 3]) -> Vec<f32> {
    (0..b * c * t).map(|i| x[i / (c * t) * c * t + i % c * t + i / c % t]).collect()
}

/// (B, C, T) in either memory order.
pub fn view<'a>(time_major: bool, what: &'static str, x: &'a [f32], shape: [usize; 3]) -> Result<Signal<'a, f32>> {
    if time_major { Signal::time_major(what, x, shape) } else { Signal::channel_major(what, x, shape) }
}

/// As [`view`], to write to.
pub fn view_mut<'a>(
    time_major: bool,
    what: &'static str,
    x: &'a mut [f32],
    shape: [usize; 3],
) -> Result<SignalMut<'a, f32>> {
    if time_major { SignalMut::time_major(what, x, shape) } else { SignalMut::channel_major(what, x, shape) }
}
