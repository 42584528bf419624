//! ULP tests of the vector functions, over a dense sweep of f32 patterns.

use foveal_kernels::Isa;
use foveal_kernels::exp::{Fun, apply};

/// |got − want| in units of the last place of f32 at `want`.
fn ulps(got: f32, want: f64) -> f64 {
    let near = want as f32;
    let ulp = f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs());
    (f64::from(got) - want).abs() / ulp
}

/// The worst of `f` over every `step`-th pattern between the magnitudes `lo` and `hi`, with `sign`.
fn sweep(fun: Fun, f: impl Fn(f64) -> f64, isa: Isa, lo: f32, hi: f32, sign: f32) -> f64 {
    let xs: Vec<f32> = (lo.to_bits()..=hi.to_bits()).step_by(211).map(|b| sign * f32::from_bits(b)).collect();
    let mut ys = xs.clone();
    apply(fun, &mut ys, isa);
    xs.iter()
        .zip(&ys)
        .map(|(&x, &y)| ulps(y, f(f64::from(x))))
        .fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

#[test]
fn within_their_ulp_bounds() {
    for isa in Isa::available() {
        let exp = sweep(Fun::Exp, f64::exp, isa, 1e-6, 86.6, -1.0);
        let up = sweep(Fun::Exp, f64::exp, isa, 1e-3, 88.0, 1.0);
        let exp2 = sweep(Fun::Exp2, f64::exp2, isa, 1e-6, 125.0, -1.0);
        let tanh = sweep(Fun::Tanh, f64::tanh, isa, 1e-6, 40.0, -1.0);
        println!("{isa}: exp {exp:.3} (x > 0: {up:.3}), exp2 {exp2:.3}, tanh {tanh:.3} ULP");
        for (name, e, bound) in [("exp", exp, 2.0), ("exp up", up, 2.0), ("exp2", exp2, 2.0), ("tanh", tanh, 3.0)] {
            assert!(e <= bound, "{isa} {name}: {e} ULP");
        }
    }
}

#[test]
fn ends_of_the_range() {
    for isa in Isa::available() {
        let mut x = [f32::NEG_INFINITY, f32::MIN, -1e30, -200.0, -126.0, 0.0, -0.0, 1e-40, f32::NAN];
        let mut y = x;
        apply(Fun::Exp2, &mut x, isa);
        assert_eq!(x[..8], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "{isa}");
        assert!(x[8].is_nan(), "{isa}");
        y[4] = -88.0;
        apply(Fun::Exp, &mut y, isa);
        assert_eq!(y[..8], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "{isa}");
        assert!(y[8].is_nan(), "{isa}");
        let mut t = [f32::INFINITY, f32::NEG_INFINITY, 0.0, f32::NAN];
        apply(Fun::Tanh, &mut t, isa);
        assert_eq!(t[..3], [1.0, -1.0, 0.0], "{isa}");
        assert!(t[3].is_nan(), "{isa}");
    }
}
