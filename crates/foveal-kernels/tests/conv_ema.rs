//! Damped EMA: the recurrence against its f64 twin under every instruction set, the kernel form against the
//! recurrence, and the gradients of both.

mod common;

use common::{f64s, noise, transposed, view, view_mut, worst};
use foveal_kernels::Isa;
use foveal_kernels::conv::{
    Boundary, DampedEma, EmaGrads, EmaParameterGrads, LongGrads, Signal, SignalMut, long_conv, long_conv_backward, twin,
};

fn within(what: &str, factor: f64, got: &[f32], plain: &[f32], want: &[f64]) {
    common::within(what, factor, 1.0, got, plain, want);
}

struct Problem {
    shape: [usize; 3],
    n: usize,
    u: Vec<f32>,
    dy: Vec<f32>,
    init: Vec<f32>,
    dlast: Vec<f32>,
    /// alpha, delta, beta, eta.
    k: [Vec<f32>; 4],
}

fn problem(shape: [usize; 3], n: usize) -> Problem {
    let [b, c, t] = shape;
    let gate = |seed| noise(c * n, seed).into_iter().map(|x| 0.5 + 0.49 * x).collect::<Vec<_>>();
    let (u, dy) = (noise(b * c * t, 1), noise(b * c * t, 2));
    let k = [gate(5), gate(6), noise(c * n, 7), noise(c * n, 8)];
    Problem { shape, n, u, dy, init: noise(b * c * n, 3), dlast: noise(b * c * n, 4), k }
}

fn problems() -> Vec<Problem> {
    let shapes = [([1, 1, 1], 1), ([2, 3, 65], 2), ([1, 17, 200], 16), ([3, 16, 128], 5), ([1, 2, 0], 4)];
    shapes.into_iter().map(|(s, n)| problem(s, n)).collect()
}

/// y, last, and gradients (du, dinit, dalpha, ddelta, dbeta, deta), in the arithmetic of `F`.
macro_rules! reference {
    ($name:ident, $f:ty) => {
        fn $name(p: &Problem) -> [Vec<$f>; 8] {
            let ([b, c, t], n) = (p.shape, p.n);
            let f = |x: f32| <$f>::from(x);
            let (mut y, mut last) = (vec![0.0; b * c * t], vec![0.0; b * c * n]);
            let (mut du, mut dinit) = (vec![0.0; b * c * t], vec![0.0; b * c * n]);
            let mut dk: [Vec<$f>; 4] = std::array::from_fn(|_| vec![0.0; c * n]);
            for r in 0..b * c {
                for i in 0..n {
                    let j = r % c * n + i;
                    let [a, d, be, e] = std::array::from_fn(|x| f(p.k[x][j]));
                    let (q, w) = (1.0 - a * d, a * be);
                    let mut h = vec![f(p.init[r * n + i])];
                    for s in 0..t {
                        h.push(w * f(p.u[r * t + s]) + q * h[s]);
                        y[r * t + s] += e * h[s + 1];
                    }
                    last[r * n + i] = h[t];
                    let (mut g, mut dq, mut dw) = (f(p.dlast[r * n + i]), 0.0, 0.0);
                    for s in (0..t).rev() {
                        g += e * f(p.dy[r * t + s]);
                        du[r * t + s] += w * g;
                        dw += g * f(p.u[r * t + s]);
                        dq += g * h[s];
                        dk[3][j] += f(p.dy[r * t + s]) * h[s + 1];
                        g *= q;
                    }
                    dinit[r * n + i] = g;
                    dk[0][j] += be * dw - d * dq;
                    dk[1][j] += -a * dq;
                    dk[2][j] += a * dw;
                }
            }
            let [a, d, be, e] = dk;
            [y, last, du, dinit, a, d, be, e]
        }
    };
}
reference!(reference_f32, f32);
reference!(reference_f64, f64);

/// All eight results of the kernel.
fn run(p: &Problem, isa: Isa, time_major: bool) -> [Vec<f32>; 8] {
    let ([b, c, t], n) = (p.shape, p.n);
    let nan = |n: usize| vec![f32::NAN; n];
    let lay = |x: &[f32]| if time_major { transposed(x, p.shape) } else { x.to_vec() };
    let back = |x: &[f32]| if time_major { transposed(x, [b, t, c]) } else { x.to_vec() };
    let ema = DampedEma::new(&p.k[0], &p.k[1], &p.k[2], &p.k[3], c, isa).unwrap();
    let (u, dy) = (lay(&p.u), lay(&p.dy));
    let (u, dy) = (view(time_major, "u", &u, p.shape).unwrap(), view(time_major, "dy", &dy, p.shape).unwrap());
    let (mut y, mut last, mut du, mut dinit) = (nan(b * c * t), nan(b * c * n), nan(b * c * t), nan(b * c * n));
    let mut out = view_mut(time_major, "y", &mut y, p.shape).unwrap();
    let work = ema.forward(&u, Some(&p.init), &mut out, Some(&mut last)).unwrap();
    assert_eq!((work.flops, work.bytes), ((5 * b * c * t * n) as u64, (8 * b * c * t) as u64));
    let mut dk: [Vec<f32>; 4] = std::array::from_fn(|_| nan(c * n));
    let [alpha, delta, beta, eta] = &mut dk;
    let mut dus = view_mut(time_major, "du", &mut du, p.shape).unwrap();
    let grads = EmaGrads {
        du: Some(&mut dus),
        parameters: Some(EmaParameterGrads { alpha, delta, beta, eta }),
        dinit: Some(&mut dinit),
    };
    ema.backward(&u, Some(&p.init), &dy, Some(&p.dlast), grads).unwrap();
    let [alpha, delta, beta, eta] = dk;
    [back(&y), last, back(&du), dinit, alpha, delta, beta, eta]
}

#[test]
fn recurrence_every_isa_and_layout() {
    const NAMES: [&str; 8] = ["y", "last", "du", "dinit", "dalpha", "ddelta", "dbeta", "deta"];
    for p in problems() {
        let (plain, want) = (reference_f32(&p), reference_f64(&p));
        for isa in Isa::available() {
            for time_major in [false, true] {
                let got = run(&p, isa, time_major);
                for i in 0..8 {
                    let what = format!("{:?} N {} {isa} time-major {time_major} {}", p.shape, p.n, NAMES[i]);
                    within(&what, if i < 2 { 2.0 } else { 3.0 }, &got[i], &plain[i], &want[i]);
                }
            }
        }
    }
}

#[test]
fn the_reference_is_the_twin() {
    let p = problem([1, 2, 30], 3);
    let want = reference_f64(&p);
    for c in 0..2 {
        let [a, d, b, e] = std::array::from_fn(|i| f64s(&p.k[i][c * 3..][..3]));
        let mut state = f64s(&p.init[c * 3..][..3]);
        let y = twin::damped_ema(&f64s(&p.u[c * 30..][..30]), &a, &d, &b, &e, &mut state);
        assert!(y.iter().zip(&want[0][c * 30..]).all(|(a, b)| (a - b).abs() < 1e-13));
        assert!(state.iter().zip(&want[1][c * 3..]).all(|(a, b)| (a - b).abs() < 1e-13));
    }
}

#[test]
fn kernel_form_agrees_forward_and_backward() {
    let mut p = problem([2, 19, 333], 16);
    p.init.fill(0.0);
    p.dlast.fill(0.0);
    let [b, c, t] = p.shape;
    let want = reference_f64(&p);
    for isa in Isa::available() {
        let ema = DampedEma::new(&p.k[0], &p.k[1], &p.k[2], &p.k[3], c, isa).unwrap();
        let kernel = ema.kernel(t).unwrap();
        let h = Signal::channel_major("kernel", &kernel, [1, c, t]).unwrap();
        let u = Signal::channel_major("u", &p.u, p.shape).unwrap();
        let dy = Signal::channel_major("dy", &p.dy, p.shape).unwrap();
        let (mut y, mut du, mut dh) = (vec![f32::NAN; b * c * t], vec![f32::NAN; b * c * t], vec![f32::NAN; c * t]);
        let mut out = SignalMut::channel_major("y", &mut y, p.shape).unwrap();
        long_conv(&h, &u, None, &mut out, Boundary::Causal, isa).unwrap();
        let mut dus = SignalMut::channel_major("du", &mut du, p.shape).unwrap();
        let grads = LongGrads { du: Some(&mut dus), dh: Some(&mut dh), dd: None };
        long_conv_backward(&h, &u, None, &dy, grads, Boundary::Causal, isa).unwrap();
        let mut dk: [Vec<f32>; 4] = std::array::from_fn(|_| vec![f32::NAN; c * p.n]);
        let [alpha, delta, beta, eta] = &mut dk;
        ema.kernel_backward(&dh, t, EmaParameterGrads { alpha, delta, beta, eta }).unwrap();
        let top = |x: &[f64]| x.iter().fold(0f64, |a, x| a.max(x.abs()));
        for (name, got, want) in [
            ("y", &y, &want[0]),
            ("du", &du, &want[2]),
            ("dalpha", &dk[0], &want[4]),
            ("ddelta", &dk[1], &want[5]),
            ("dbeta", &dk[2], &want[6]),
            ("deta", &dk[3], &want[7]),
        ] {
            let e = worst(got, want);
            assert!(e < 2e-6 * top(want), "{isa} {name}: {e:e} of {:e}", top(want));
        }
    }
}

#[test]
fn steps_continue_a_prompt() {
    let p = problem([2, 20, 40], 6);
    let ([b, c, t], n) = (p.shape, p.n);
    for isa in Isa::available() {
        let ema = DampedEma::new(&p.k[0], &p.k[1], &p.k[2], &p.k[3], c, isa).unwrap();
        let u = Signal::channel_major("u", &p.u, p.shape).unwrap();
        let (mut want, mut last) = (vec![0f32; b * c * t], vec![0f32; b * c * n]);
        let mut out = SignalMut::channel_major("y", &mut want, p.shape).unwrap();
        ema.forward(&u, None, &mut out, Some(&mut last)).unwrap();
        let (mut y, mut state) = (vec![f32::NAN; b * c * t], vec![0f32; b * c * n]);
        for (from, to) in [(0, 17), (17, 18), (18, 19), (19, 40)] {
            let shape = [b, c, to - from];
            let u = Signal::new("u", &p.u[from..], shape, [c * t, t, 1]).unwrap();
            let mut out = SignalMut::new("y", &mut y[from..], shape, [c * t, t, 1]).unwrap();
            let init = state.clone();
            ema.forward(&u, Some(&init), &mut out, Some(&mut state)).unwrap();
        }
        assert_eq!((y, state), (want, last), "{isa}");
    }
}

#[test]
fn refusals_name_the_trouble() {
    let isa = Isa::active();
    let x = [0.5f32; 12];
    assert!(DampedEma::new(&x, &x, &x, &x, 5, isa).err().unwrap().to_string().contains("channels x states"));
    assert!(DampedEma::new(&x, &x[..6], &x, &x, 4, isa).err().unwrap().to_string().contains("delta"));
    let ema = DampedEma::new(&x, &x, &x, &x, 4, isa).unwrap();
    assert_eq!(ema.states(), 3);
    let u = Signal::channel_major("u", &x, [1, 4, 3]).unwrap();
    let mut y = [0f32; 12];
    let mut out = SignalMut::channel_major("y", &mut y, [1, 4, 3]).unwrap();
    let e = ema.forward(&u, Some(&x[..5]), &mut out, None).unwrap_err().to_string();
    assert!(e.contains("initial states"), "{e}");
}
