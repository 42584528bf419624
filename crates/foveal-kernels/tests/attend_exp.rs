//! ULP tests of the vector functions, over a dense sweep of f32 patterns.

use foveal_kernels::Isa;
use foveal_kernels::exp::{Fun, apply, apply_to};

/// |got − want| in units of the last place of f32 at `want`.
fn ulps(got: f32, want: f64) -> f64 {
    let near = want as f32;
    let ulp = f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs());
    (f64::from(got) - want).abs() / ulp
}

/// The worst of `f` over every 211th pattern between the magnitudes `lo` and `hi`, with `sign`.
fn sweep(fun: Fun, f: impl Fn(f64) -> f64, isa: Isa, lo: f32, hi: f32, sign: f32) -> f64 {
    sweep_by(211, fun, f, isa, lo, hi, sign)
}

fn sweep_by(step: usize, fun: Fun, f: impl Fn(f64) -> f64, isa: Isa, lo: f32, hi: f32, sign: f32) -> f64 {
    let xs: Vec<f32> = (lo.to_bits()..=hi.to_bits()).step_by(step).map(|b| sign * f32::from_bits(b)).collect();
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

#[test]
fn any_length_in_place_or_not() {
    for isa in Isa::available() {
        for n in [0, 1, 15, 16, 17, 63, 64, 65, 200] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
            for fun in [Fun::Exp, Fun::Exp2, Fun::Tanh] {
                let (mut a, mut b) = (x.clone(), vec![f32::NAN; n]);
                apply(fun, &mut a, isa);
                apply_to(fun, &x, &mut b, isa).unwrap();
                assert_eq!(a, b, "{isa} {fun:?} {n}");
                // As it is alone, whatever its place.
                for (x, y) in x.iter().zip(&a) {
                    let mut alone = [*x];
                    apply(fun, &mut alone, isa);
                    assert_eq!(alone[0], *y, "{isa} {fun:?} {n}");
                }
            }
        }
    }
    assert!(apply_to(Fun::Exp, &[0.0; 2], &mut [0.0; 1], Isa::active()).is_err());
}

/// Every f32 of the range, not only a sweep: minutes, run by hand (`--ignored`).
#[test]
#[ignore = "takes minutes"]
fn every_number_is_within_the_bound() {
    let e = sweep_by(1, Fun::Exp, f64::exp, Isa::active(), 1e-6, 86.6, -1.0);
    let up = sweep_by(1, Fun::Exp, f64::exp, Isa::active(), 1e-3, 88.0, 1.0);
    println!("exp {e:.4}, x > 0: {up:.4} ULP");
    assert!(e <= 2.0 && up <= 2.0);
}
