//! Feature attention against its f64 twin: error rule, gradients, and the forms against each other.

mod common;

use common::{f64s, noise, worst};
use foveal_kernels::feature::{FeatureAttend, FeatureGrads, FeatureState, ToeplitzForm, twin};
use foveal_kernels::{Isa, View, ViewMut, Work};
use half::bf16;

fn within(what: &str, factor: f64, got: &[f32], plain: &[f32], want: &[f64]) {
    common::within(what, factor, 2.0, got, plain, want);
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    b: usize,
    h: usize,
    hkv: usize,
    tq: usize,
    tk: usize,
    r: usize,
    dv: usize,
}

const SHAPES: [Shape; 6] = [
    Shape { b: 1, h: 1, hkv: 1, tq: 1, tk: 1, r: 1, dv: 1 },
    Shape { b: 2, h: 4, hkv: 2, tq: 37, tk: 50, r: 7, dv: 5 },
    Shape { b: 1, h: 2, hkv: 1, tq: 300, tk: 300, r: 16, dv: 24 },
    Shape { b: 1, h: 3, hkv: 3, tq: 129, tk: 400, r: 8, dv: 8 },
    Shape { b: 1, h: 2, hkv: 2, tq: 128, tk: 128, r: 33, dv: 17 },
    Shape { b: 1, h: 1, hkv: 1, tq: 0, tk: 3, r: 4, dv: 4 },
];

struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    c: Vec<f32>,
    dout: Vec<f32>,
}

/// Positive features and weights, so that the denominator is far from zero.
fn data(s: Shape) -> Data {
    let positive = |n, seed| noise(n, seed).into_iter().map(|x| x * x + 0.05).collect::<Vec<_>>();
    Data {
        q: positive(s.b * s.h * s.tq * s.r, 1),
        k: positive(s.b * s.hkv * s.tk * s.r, 2),
        v: noise(s.b * s.hkv * s.tk * s.dv, 3),
        c: positive(s.h * (2 * s.tk - 1), 4),
        dout: noise(s.b * s.h * s.tq * s.dv, 5),
    }
}

/// Output and gradients (dq, dk, dv, dc), pair by pair, in the arithmetic of `F`.
macro_rules! reference {
    ($name:ident, $f:ty) => {
        fn $name(s: Shape, x: &Data, causal: bool, eps: Option<f32>, weighted: bool) -> [Vec<$f>; 5] {
            let f = |x: &[f32]| x.iter().map(|&x| <$f>::from(x)).collect::<Vec<_>>();
            let (q, k, v, c, go) = (f(&x.q), f(&x.k), f(&x.v), f(&x.c), f(&x.dout));
            let mut out = vec![0.0; go.len()];
            let (mut dq, mut dk, mut dv, mut dc) =
                (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()], vec![0.0; c.len()]);
            for row in 0..s.b * s.h * s.tq {
                let (head, i) = (row / s.tq, row % s.tq);
                let kv = head / s.h * s.hkv + head % s.h / (s.h / s.hkv);
                let keys = if causal { s.tk - s.tq + i + 1 } else { s.tk };
                let at = |j: usize| head % s.h * (2 * s.tk - 1) + i + s.tk - 1 - j;
                let dot = |j: usize| (0..s.r).map(|r| q[row * s.r + r] * k[(kv * s.tk + j) * s.r + r]).sum::<$f>();
                let mut den: $f = eps.map_or(0.0, <$f>::from);
                let mut a = Vec::new();
                for j in 0..keys {
                    let w = if weighted { c[at(j)] } else { 1.0 };
                    a.push((dot(j), w));
                    den += w * dot(j);
                }
                if eps.is_none() {
                    den = 1.0;
                }
                let o = &mut out[row * s.dv..(row + 1) * s.dv];
                for (j, (s0, w)) in a.iter().enumerate() {
                    (0..s.dv).for_each(|d| o[d] += s0 * w * v[(kv * s.tk + j) * s.dv + d]);
                }
                o.iter_mut().for_each(|o| *o /= den);
                let go = &go[row * s.dv..(row + 1) * s.dv];
                let dden: $f =
                    if eps.is_some() { -o.iter().zip(go).map(|(o, g)| o * g).sum::<$f>() / den } else { 0.0 };
                for (j, (s0, w)) in a.iter().enumerate() {
                    let key = kv * s.tk + j;
                    let da = (0..s.dv).map(|d| go[d] / den * v[key * s.dv + d]).sum::<$f>() + dden;
                    (0..s.dv).for_each(|d| dv[key * s.dv + d] += s0 * w * go[d] / den);
                    dc[at(j)] += da * s0;
                    for r in 0..s.r {
                        dq[row * s.r + r] += da * w * k[key * s.r + r];
                        dk[key * s.r + r] += da * w * q[row * s.r + r];
                    }
                }
            }
            [out, dq, dk, dv, dc]
        }
    };
}
reference!(reference_f32, f32);
reference!(reference_f64, f64);

/// Output and gradients (dq, dk, dv) without weights in f32, token by token with running sums Σ kᵀv and Σ k: the plain
/// code of the linear form, whose gradients cancel more than those of a sum over pairs.
fn plain_recurrence(s: Shape, x: &Data, causal: bool, eps: Option<f32>) -> [Vec<f32>; 4] {
    let (r, d) = (s.r, s.dv);
    let mut out = vec![0f32; x.dout.len()];
    let (mut dq, mut dk, mut dv) = (vec![0f32; x.q.len()], vec![0f32; x.k.len()], vec![0f32; x.v.len()]);
    for head in 0..s.b * s.h {
        let kv = head / s.h * s.hkv + head % s.h / (s.h / s.hkv);
        // One column more, of ones: the denominator.
        let value = |j: usize, c: usize| if c < d { x.v[(kv * s.tk + j) * d + c] } else { 1.0 };
        let key = |j: usize| &x.k[(kv * s.tk + j) * r..][..r];
        let query = |i: usize| &x.q[(head * s.tq + i) * r..][..r];
        let seen = |i: usize| if causal { s.tk - s.tq + i + 1 } else { s.tk };
        let (mut sum, mut next) = (vec![0f32; r * (d + 1)], 0);
        let mut g = vec![0f32; s.tq * (d + 1)];
        for i in 0..s.tq {
            for j in next..seen(i) {
                (0..r * (d + 1)).for_each(|x| sum[x] += key(j)[x / (d + 1)] * value(j, x % (d + 1)));
            }
            next = seen(i);
            let row = (head * s.tq + i) * d;
            let num = |c: usize| (0..r).map(|a| query(i)[a] * sum[a * (d + 1) + c]).sum::<f32>();
            let den = eps.map_or(1.0, |e| num(d) + e);
            for c in 0..d {
                out[row + c] = num(c) / den;
                g[i * (d + 1) + c] = x.dout[row + c] / den;
                g[i * (d + 1) + d] -= if eps.is_some() { out[row + c] * x.dout[row + c] / den } else { 0.0 };
            }
            for a in 0..r {
                let sum = &sum[a * (d + 1)..][..d + 1];
                dq[(head * s.tq + i) * r + a] = sum.iter().zip(&g[i * (d + 1)..]).map(|(s, g)| s * g).sum();
            }
        }
        // The other way: what the queries that see a key give to it.
        let (mut sum, mut next) = (vec![0f32; r * (d + 1)], s.tq);
        for j in (0..s.tk).rev() {
            while next > 0 && seen(next - 1) > j {
                next -= 1;
                (0..r * (d + 1)).for_each(|x| sum[x] += query(next)[x / (d + 1)] * g[next * (d + 1) + x % (d + 1)]);
            }
            for a in 0..r {
                for c in 0..=d {
                    dk[(kv * s.tk + j) * r + a] += sum[a * (d + 1) + c] * value(j, c);
                    if c < d {
                        dv[(kv * s.tk + j) * d + c] += sum[a * (d + 1) + c] * key(j)[a];
                    }
                }
            }
        }
    }
    [out, dq, dk, dv]
}

/// The kernel's five results.
fn run(s: Shape, x: &Data, p: &FeatureAttend) -> ([Vec<f32>; 5], Work) {
    let q = View::contiguous("q", &x.q, [s.b, s.h, s.tq, s.r]).unwrap();
    let k = View::contiguous("k", &x.k, [s.b, s.hkv, s.tk, s.r]).unwrap();
    let v = View::contiguous("v", &x.v, [s.b, s.hkv, s.tk, s.dv]).unwrap();
    let g = View::contiguous("dout", &x.dout, [s.b, s.h, s.tq, s.dv]).unwrap();
    let nan = |n: usize| vec![f32::NAN; n];
    let mut out = nan(x.dout.len());
    let mut o = ViewMut::contiguous("out", &mut out, g.shape).unwrap();
    let work = p.run(&q, &k, &v, &mut o, None).unwrap();
    let (mut dq, mut dk, mut dv, mut dc) = (nan(x.q.len()), nan(x.k.len()), nan(x.v.len()), nan(x.c.len()));
    let grads = FeatureGrads {
        dq: &mut ViewMut::contiguous("dq", &mut dq, q.shape).unwrap(),
        dk: &mut ViewMut::contiguous("dk", &mut dk, k.shape).unwrap(),
        dv: &mut ViewMut::contiguous("dv", &mut dv, v.shape).unwrap(),
        dweights: p.weights.is_some().then_some(&mut dc[..]),
    };
    p.backward(&q, &k, &v, &g, grads).unwrap();
    ([out, dq, dk, dv, dc], work)
}

const NAMES: [&str; 5] = ["out", "dq", "dk", "dv", "dweights"];

#[test]
fn unweighted_forward_and_backward() {
    for s in SHAPES {
        let x = data(s);
        for (causal, eps) in [(false, Some(0.05)), (true, Some(0.01)), (true, None), (false, None)] {
            let what = format!("{s:?} causal {causal} {eps:?}");
            let want = reference_f64(s, &x, causal, eps, false);
            let (pairs, steps) = (reference_f32(s, &x, causal, eps, false), plain_recurrence(s, &x, causal, eps));
            let (got, _) = run(s, &x, &FeatureAttend { causal, normalise: eps, ..FeatureAttend::default() });
            for i in 0..4 {
                // A chunk is both a sum over pairs and a step of the recurrence: the worse of the two plain codes counts.
                let worse = worst(&pairs[i], &want[i]) > worst(&steps[i], &want[i]);
                let plain = if worse { &pairs[i] } else { &steps[i] };
                within(&format!("{what} {}", NAMES[i]), if i == 0 { 2.0 } else { 3.0 }, &got[i], plain, &want[i]);
            }
            let dims = [s.b, s.h, s.tq, s.r];
            let (q, k, v) = (f64s(&x.q), f64s(&x.k), f64s(&x.v));
            let twin = twin::feature_attend(&q, &k, &v, dims, [s.hkv, s.tk, s.dv], causal, eps.map(f64::from), None);
            assert!(twin.iter().zip(&want[0]).all(|(a, b)| (a - b).abs() < 1e-10), "{what}");
        }
    }
}

#[test]
fn weighted_both_forms_every_isa() {
    // A sequence whose last sums are far larger than its first.
    let long = Shape { b: 1, h: 1, hkv: 1, tq: 1200, tk: 1200, r: 3, dv: 2 };
    for s in SHAPES.into_iter().filter(|s| s.tq == s.tk).chain([long]) {
        let x = data(s);
        for (causal, eps) in [(false, Some(0.05)), (true, Some(0.01)), (true, None)] {
            let (plain, want) = (reference_f32(s, &x, causal, eps, true), reference_f64(s, &x, causal, eps, true));
            let dims = [s.b, s.h, s.tq, s.r];
            let (q, k, v, c) = (f64s(&x.q), f64s(&x.k), f64s(&x.v), f64s(&x.c));
            let twin =
                twin::feature_attend(&q, &k, &v, dims, [s.hkv, s.tk, s.dv], causal, eps.map(f64::from), Some(&c));
            assert!(twin.iter().zip(&want[0]).all(|(a, b)| (a - b).abs() < 1e-10));
            let p = FeatureAttend { causal, normalise: eps, weights: Some(&x.c), ..FeatureAttend::default() };
            let (got, _) = run(s, &x, &FeatureAttend { form: ToeplitzForm::Direct, ..p.clone() });
            for i in 0..5 {
                let what = format!("{s:?} causal {causal} {eps:?} direct {}", NAMES[i]);
                within(&what, if i == 0 { 2.0 } else { 3.0 }, &got[i], &plain[i], &want[i]);
            }
            let plain_out = plain_fourier(s, &x, causal, eps);
            for isa in Isa::available() {
                let (got, _) = run(s, &x, &FeatureAttend { form: ToeplitzForm::Fourier, isa: Some(isa), ..p.clone() });
                within(&format!("{s:?} causal {causal} {eps:?} {isa} out"), 2.0, &got[0], &plain_out, &want[0]);
                for i in 1..5 {
                    let what = format!("{s:?} causal {causal} {eps:?} {isa} {}", NAMES[i]);
                    within(&what, 3.0, &got[i], &plain[i], &want[i]);
                }
            }
        }
    }
}

/// Textbook transform, length a power of two.
fn fft(x: &mut [(f32, f32)], sign: f32) {
    let n = x.len();
    if n == 1 {
        return;
    }
    let mut half: [Vec<_>; 2] = [0, 1].map(|i| x.iter().skip(i).step_by(2).copied().collect());
    half.iter_mut().for_each(|h| fft(h, sign));
    for k in 0..n / 2 {
        let (sin, cos) = (sign * 2.0 * std::f32::consts::PI * k as f32 / n as f32).sin_cos();
        let (a, b) = (half[0][k], half[1][k]);
        let t = (b.0 * cos - b.1 * sin, b.0 * sin + b.1 * cos);
        (x[k], x[k + n / 2]) = ((a.0 + t.0, a.1 + t.1), (a.0 - t.0, a.1 - t.1));
    }
}

/// The weighted output by textbook transforms in f32: the plain code of the same form.
fn plain_fourier(s: Shape, x: &Data, causal: bool, eps: Option<f32>) -> Vec<f32> {
    let (t, n) = (s.tk, (2 * s.tk).next_power_of_two());
    let mut out = vec![0f32; x.dout.len()];
    for head in 0..s.b * s.h {
        let kv = head / s.h * s.hkv + head % s.h / (s.h / s.hkv);
        let mut c = vec![(0f32, 0f32); n];
        for d in 0..t {
            c[d].0 = x.c[head % s.h * (2 * t - 1) + t - 1 + d];
            if d > 0 && !causal {
                c[n - d].0 = x.c[head % s.h * (2 * t - 1) + t - 1 - d];
            }
        }
        fft(&mut c, -1.0);
        let mut num = vec![vec![0f32; t]; s.dv + 1];
        for r in 0..s.r {
            for (d, num) in num.iter_mut().enumerate() {
                let value = |j: usize| if d < s.dv { x.v[(kv * t + j) * s.dv + d] } else { 1.0 };
                let product = |j: usize| x.k[(kv * t + j) * s.r + r] * value(j);
                let mut y: Vec<_> = (0..n).map(|j| (if j < t { product(j) } else { 0.0 }, 0.0)).collect();
                fft(&mut y, -1.0);
                y.iter_mut().zip(&c).for_each(|(y, c)| *y = (y.0 * c.0 - y.1 * c.1, y.0 * c.1 + y.1 * c.0));
                fft(&mut y, 1.0);
                num.iter_mut().enumerate().for_each(|(i, o)| *o += x.q[(head * t + i) * s.r + r] * (y[i].0 / n as f32));
            }
        }
        for i in 0..t {
            let den = eps.map_or(1.0, |e| num[s.dv][i] + e);
            (0..s.dv).for_each(|d| out[(head * t + i) * s.dv + d] = num[d][i] / den);
        }
    }
    out
}

#[test]
fn auto_takes_the_transform_for_long_sequences() {
    let work = |t: usize| {
        let s = Shape { b: 1, h: 1, hkv: 1, tq: t, tk: t, r: 2, dv: 2 };
        run(s, &data(s), &FeatureAttend { weights: Some(&data(s).c), ..FeatureAttend::default() }).1
    };
    assert!(work(100).tiles > 0);
    assert_eq!(work(6000).tiles, 0);
    // One transform for the weights, two for each of 2 x 2 pairs, and the products: exact, and T log T.
    let flops = |n: u64| (1 + 8) * (5.0 * n as f64 * (n as f64).log2()) as u64 + 8 * 7 * n;
    assert_eq!(work(6000).flops, flops(6144));
}

#[test]
fn work_of_the_causal_form_is_linear() {
    let work = |t: usize| {
        let s = Shape { b: 1, h: 2, hkv: 1, tq: t, tk: t, r: 8, dv: 4 };
        run(s, &data(s), &FeatureAttend { causal: true, normalise: Some(0.0), ..FeatureAttend::default() }).1
    };
    let (one, four) = (work(512), work(2048));
    assert_eq!(
        (one.flops * 4, one.bytes * 4, one.pairs * 4, one.tiles * 4),
        (four.flops, four.bytes, four.pairs, four.tiles)
    );
    assert_eq!(one.pairs, 2 * 512 * 32);
    assert_eq!(one.bytes, 4 * (2 * 512 * 8 + 512 * (8 + 4) + 2 * 512 * 4));
}

#[test]
fn state_carries_over_calls_and_steps() {
    let s = Shape { b: 2, h: 4, hkv: 2, tq: 200, tk: 200, r: 6, dv: 5 };
    let x = data(s);
    let p = FeatureAttend { causal: true, normalise: Some(1e-3), ..FeatureAttend::default() };
    let (want, _) = run(s, &x, &p);
    let mut out = vec![f32::NAN; x.dout.len()];
    let mut state = FeatureState::zeros(s.b, s.hkv, s.r, s.dv);
    for (from, to) in [(0, 150), (150, 151), (151, 152), (152, 200)] {
        let t = to - from;
        let part = |x: &'static str, data, h: usize, d: usize| {
            View::new(x, data, [s.b, h, t, d], [h * s.tq * d, s.tq * d, d]).unwrap()
        };
        let q = part("q", &x.q[from * s.r..], s.h, s.r);
        let k = part("k", &x.k[from * s.r..], s.hkv, s.r);
        let v = part("v", &x.v[from * s.dv..], s.hkv, s.dv);
        let strides = [s.h * s.tq * s.dv, s.tq * s.dv, s.dv];
        let mut o = ViewMut::new("out", &mut out[from * s.dv..], [s.b, s.h, t, s.dv], strides).unwrap();
        p.run(&q, &k, &v, &mut o, Some(&mut state)).unwrap();
    }
    let e = worst(&out, &f64s(&want[0]));
    assert!(e < 1e-6, "{e:e}");
}

#[test]
fn bf16_is_the_rounded_input_and_layouts_agree() {
    let s = Shape { b: 1, h: 2, hkv: 1, tq: 140, tk: 140, r: 8, dv: 6 };
    let x = data(s);
    let narrow = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (q, k, v) = (narrow(&x.q), narrow(&x.k), narrow(&x.v));
    let p = FeatureAttend { causal: true, normalise: Some(0.0), ..FeatureAttend::default() };
    let rounded = Data { q: wide(&q), k: wide(&k), v: wide(&v), c: x.c.clone(), dout: x.dout.clone() };
    let (want, _) = run(s, &rounded, &p);
    let mut out = vec![f32::NAN; x.dout.len()];
    // The output in (B, T, H, D) memory.
    let mut o = ViewMut::new("out", &mut out, [s.b, s.h, s.tq, s.dv], [0, s.dv, s.h * s.dv]).unwrap();
    let qs = View::contiguous("q", &q, [s.b, s.h, s.tq, s.r]).unwrap();
    let ks = View::contiguous("k", &k, [s.b, s.hkv, s.tk, s.r]).unwrap();
    let vs = View::contiguous("v", &v, [s.b, s.hkv, s.tk, s.dv]).unwrap();
    p.run(&qs, &ks, &vs, &mut o, None).unwrap();
    for h in 0..s.h {
        for t in 0..s.tq {
            let (a, b) = ((t * s.h + h) * s.dv, (h * s.tq + t) * s.dv);
            assert_eq!(out[a..a + s.dv], want[0][b..b + s.dv]);
        }
    }
}

/// The directional derivative by central differences of the f64 twin, against the kernel's gradients.
#[test]
fn finite_differences() {
    let s = Shape { b: 1, h: 2, hkv: 1, tq: 20, tk: 20, r: 3, dv: 4 };
    let x = data(s);
    let (grads, _) = run(
        s,
        &x,
        &FeatureAttend { causal: true, normalise: Some(0.01), weights: Some(&x.c), ..FeatureAttend::default() },
    );
    let inputs = [f64s(&x.q), f64s(&x.k), f64s(&x.v), f64s(&x.c)];
    for i in 0..4 {
        let dir = f64s(&noise(inputs[i].len(), 50 + i as u64));
        let loss = |step: f64| {
            let mut y = inputs.clone();
            y[i].iter_mut().zip(&dir).for_each(|(y, d)| *y += step * d);
            let o = twin::feature_attend(
                &y[0],
                &y[1],
                &y[2],
                [s.b, s.h, s.tq, s.r],
                [s.hkv, s.tk, s.dv],
                true,
                Some(0.01),
                Some(&y[3]),
            );
            o.iter().zip(&x.dout).map(|(o, g)| o * f64::from(*g)).sum::<f64>()
        };
        let quotient = (loss(1e-5) - loss(-1e-5)) / 2e-5;
        let product: f64 = grads[i + 1].iter().zip(&dir).map(|(g, d)| f64::from(*g) * d).sum();
        assert!((quotient - product).abs() < 2e-5 * quotient.abs().max(1.0), "{}: {quotient} {product}", NAMES[i + 1]);
    }
}

#[test]
fn zero_denominators_and_refusals() {
    let s = Shape { b: 1, h: 1, hkv: 1, tq: 3, tk: 3, r: 2, dv: 2 };
    let mut x = data(s);
    x.q.fill(0.0);
    let (got, _) = run(s, &x, &FeatureAttend { causal: true, normalise: Some(0.0), ..FeatureAttend::default() });
    assert!(got[0].iter().all(|&o| o == 0.0));
    assert!(got[..4].iter().flatten().all(|g| g.is_finite()));

    let q = View::contiguous("q", &x.q, [1, 1, 3, 2]).unwrap();
    let k = View::contiguous("k", &x.k, [1, 1, 2, 2]).unwrap();
    let v = View::contiguous("v", &x.v, [1, 1, 2, 2]).unwrap();
    let mut out = [0f32; 6];
    let mut say = |p: FeatureAttend, k, v, state| {
        let mut o = ViewMut::contiguous("out", &mut out, [1, 1, 3, 2]).unwrap();
        p.run(&q, &k, &v, &mut o, state).unwrap_err().to_string()
    };
    let causal = FeatureAttend { causal: true, ..FeatureAttend::default() };
    assert!(say(causal.clone(), k, v, None).contains("at least as many keys"));
    let c = [1.0; 5];
    assert!(say(FeatureAttend { weights: Some(&c), ..FeatureAttend::default() }, k, v, None).contains("Tq = Tk"));
    let (k, v) =
        (View::contiguous("k", &x.k, [1, 1, 3, 2]).unwrap(), View::contiguous("v", &x.v, [1, 1, 3, 2]).unwrap());
    assert!(say(FeatureAttend { weights: Some(&c[..4]), ..FeatureAttend::default() }, k, v, None).contains("2T - 1"));
    assert!(
        say(FeatureAttend { normalise: Some(f32::NAN), ..FeatureAttend::default() }, k, v, None).contains("finite")
    );
    let mut state = FeatureState::zeros(1, 1, 2, 2);
    assert!(say(FeatureAttend::default(), k, v, Some(&mut state)).contains("pass None"));
    let mut small = FeatureState::zeros(1, 1, 1, 2);
    assert!(say(causal, k, v, Some(&mut small)).contains("state kv"));
}
