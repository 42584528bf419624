//! Short convolution against its f64 twin, under every instruction set and memory order.

mod common;

use common::{f64s, noise, transposed, view, view_mut};
use foveal_kernels::conv::{ShortConv, ShortGrads, Signal, SignalMut, twin};
use foveal_kernels::{Element, Isa};
use half::bf16;

/// The error rule, with one rounding of the largest value as floor (the plain code may be exact by luck).
fn within(what: &str, factor: f64, got: &[f32], plain: &[f32], want: &[f64]) {
    common::within(what, factor, 1.0, got, plain, want);
}

struct Problem {
    shape: [usize; 3],
    width: usize,
    silu: bool,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    past: Vec<f32>,
    dy: Vec<f32>,
    dlast: Vec<f32>,
}

fn problems() -> Vec<Problem> {
    [
        ([1, 1, 1], 2, false),
        ([2, 3, 7], 4, true),
        ([1, 17, 300], 4, true),
        ([1, 40, 2], 8, false),
        ([2, 16, 129], 3, true),
        ([1, 2, 5000], 2, false),
        ([1, 33, 600], 1, true),
    ]
    .into_iter()
    .map(|(shape, width, silu)| {
        let [b, c, t] = shape;
        let n = b * c * t;
        let s = b * c * (width - 1);
        let (x, w, bias) = (noise(n, 1), noise(c * width, 2), noise(c, 3));
        Problem { shape, width, silu, x, w, bias, past: noise(s, 4), dy: noise(n, 5), dlast: noise(s, 6) }
    })
    .collect()
}

/// Plain f32: (y, dz), and the padded input.
fn plain(p: &Problem) -> (Vec<f32>, Vec<f32>, Vec<Vec<f32>>) {
    let ([b, c, t], k) = (p.shape, p.width);
    let (mut y, mut dz, mut padded) = (Vec::new(), Vec::new(), Vec::new());
    for r in 0..b * c {
        let seq: Vec<f32> = p.past[r * (k - 1)..][..k - 1].iter().chain(&p.x[r * t..][..t]).copied().collect();
        for i in 0..t {
            let mut z = p.bias[r % c];
            for j in 0..k {
                z += p.w[r % c * k + j] * seq[i + j];
            }
            let s = 1.0 / (1.0 + (-z).exp());
            y.push(if p.silu { z * s } else { z });
            dz.push(p.dy[r * t + i] * if p.silu { s * (1.0 + z * (1.0 - s)) } else { 1.0 });
        }
        padded.push(seq);
    }
    (y, dz, padded)
}

/// f64 gradients by the chain rule on the twin's formula: (dx, dw, dbias, dpast).
fn gradients(p: &Problem) -> [Vec<f64>; 4] {
    let ([b, c, t], k) = (p.shape, p.width);
    let z = twin::short_conv(&f64s(&p.x), &f64s(&p.w), &f64s(&p.bias), &f64s(&p.past), p.shape, k, false);
    let (mut dw, mut db) = (vec![0.0; c * k], vec![0.0; c]);
    let (mut dx, mut dpast) = (Vec::new(), Vec::new());
    for r in 0..b * c {
        let seq: Vec<f64> =
            p.past[r * (k - 1)..][..k - 1].iter().chain(&p.x[r * t..][..t]).map(|&x| f64::from(x)).collect();
        let mut dseq = vec![0.0; k - 1 + t];
        for i in 0..t {
            let s = 1.0 / (1.0 + (-z[r * t + i]).exp());
            let g = f64::from(p.dy[r * t + i]) * if p.silu { s * (1.0 + z[r * t + i] * (1.0 - s)) } else { 1.0 };
            for j in 0..k {
                dseq[i + j] += g * f64::from(p.w[r % c * k + j]);
                dw[r % c * k + j] += g * seq[i + j];
            }
            db[r % c] += g;
        }
        for j in 0..k - 1 {
            dseq[t + j] += f64::from(p.dlast[r * (k - 1) + j]);
        }
        dpast.extend_from_slice(&dseq[..k - 1]);
        dx.extend_from_slice(&dseq[k - 1..]);
    }
    [dx, dw, db, dpast]
}

fn plain_gradients(p: &Problem) -> [Vec<f32>; 4] {
    let ([b, c, t], k) = (p.shape, p.width);
    let (_, dz, padded) = plain(p);
    let (mut dw, mut db) = (vec![0f32; c * k], vec![0f32; c]);
    let (mut dx, mut dpast) = (Vec::new(), Vec::new());
    for r in 0..b * c {
        let mut dseq = vec![0f32; k - 1 + t];
        for i in 0..t {
            for j in 0..k {
                dseq[i + j] += dz[r * t + i] * p.w[r % c * k + j];
                dw[r % c * k + j] += dz[r * t + i] * padded[r][i + j];
            }
            db[r % c] += dz[r * t + i];
        }
        for j in 0..k - 1 {
            dseq[t + j] += p.dlast[r * (k - 1) + j];
        }
        dpast.extend_from_slice(&dseq[..k - 1]);
        dx.extend_from_slice(&dseq[k - 1..]);
    }
    [dx, dw, db, dpast]
}

#[test]
fn forward_and_backward_every_isa_and_layout() {
    for p in problems() {
        let ([b, c, t], k) = (p.shape, p.width);
        let state = [b, c, k - 1];
        let want = twin::short_conv(&f64s(&p.x), &f64s(&p.w), &f64s(&p.bias), &f64s(&p.past), p.shape, k, p.silu);
        let (plain_y, _, padded) = plain(&p);
        let (want_grads, plain_grads) = (gradients(&p), plain_gradients(&p));
        let want_last: Vec<f32> = padded.iter().flat_map(|s| s[s.len() - (k - 1)..].to_vec()).collect();
        for isa in Isa::available() {
            for time_major in [false, true] {
                let what = format!("{:?} width {k} silu {} {isa} time-major {time_major}", p.shape, p.silu);
                let conv = ShortConv::new(&p.w, c, Some(&p.bias), p.silu, isa).unwrap();
                let lay = |x: &[f32]| if time_major { transposed(x, p.shape) } else { x.to_vec() };
                let back = |x: &[f32]| if time_major { transposed(x, [b, t, c]) } else { x.to_vec() };
                let (x, dy) = (lay(&p.x), lay(&p.dy));
                let (xs, dys) =
                    (view(time_major, "x", &x, p.shape).unwrap(), view(time_major, "dy", &dy, p.shape).unwrap());
                let past = Signal::channel_major("past", &p.past, state).unwrap();
                let dlast = Signal::channel_major("dlast", &p.dlast, state).unwrap();
                let (mut y, mut last) = (vec![f32::NAN; b * c * t], vec![f32::NAN; b * c * (k - 1)]);
                let mut out = view_mut(time_major, "y", &mut y, p.shape).unwrap();
                let mut end = SignalMut::channel_major("last", &mut last, state).unwrap();
                let work = conv.forward(&xs, None, Some(&past), &mut out, Some(&mut end)).unwrap();
                within(&what, 2.0, &back(&y), &plain_y, &want);
                assert_eq!(last, want_last, "{what}");
                let per = 2 * k + 1 + if p.silu { 4 } else { 0 };
                assert_eq!((work.flops, work.bytes), ((b * c * t * per) as u64, (8 * b * c * t) as u64));

                let (mut dx, mut dpast) = (vec![f32::NAN; b * c * t], vec![f32::NAN; b * c * (k - 1)]);
                let (mut dw, mut db) = (vec![f32::NAN; c * k], vec![f32::NAN; c]);
                let mut dxs = view_mut(time_major, "dx", &mut dx, p.shape).unwrap();
                let mut dps = SignalMut::channel_major("dpast", &mut dpast, state).unwrap();
                let grads = ShortGrads {
                    dx: Some(&mut dxs),
                    dweight: Some(&mut dw),
                    dbias: Some(&mut db),
                    dpast: Some(&mut dps),
                };
                conv.backward(&xs, None, Some(&past), &dys, Some(&dlast), grads).unwrap();
                let got = [back(&dx), dw, db, dpast];
                for (i, name) in ["dx", "dweight", "dbias", "dpast"].iter().enumerate() {
                    within(&format!("{what} {name}"), 3.0, &got[i], &plain_grads[i], &want_grads[i]);
                }
            }
        }
    }
}

#[test]
fn steps_continue_a_prompt() {
    let ([b, c, t], k) = ([2, 19, 12], 4);
    let (x, w, bias) = (noise(b * c * t, 1), noise(c * k, 2), noise(c, 3));
    for isa in Isa::available() {
        let conv = ShortConv::new(&w, c, Some(&bias), true, isa).unwrap();
        let mut want = vec![f32::NAN; b * c * t];
        let xs = Signal::time_major("x", &x, [b, c, t]).unwrap();
        conv.forward(&xs, None, None, &mut SignalMut::time_major("y", &mut want, [b, c, t]).unwrap(), None).unwrap();
        let half = t / 2;
        let (mut y, mut state) = (vec![f32::NAN; b * c * t], vec![0f32; b * c * (k - 1)]);
        // The first half as a prompt, read through strides of the whole.
        let first = Signal::new("x", &x, [b, c, half], [t * c, 1, c]).unwrap();
        let mut out = SignalMut::new("y", &mut y, [b, c, half], [t * c, 1, c]).unwrap();
        let mut last = SignalMut::channel_major("state", &mut state, [b, c, k - 1]).unwrap();
        conv.forward(&first, None, None, &mut out, Some(&mut last)).unwrap();
        for i in half..t {
            let xi = Signal::new("x", &x[i * c..], [b, c, 1], [t * c, 1, c]).unwrap();
            let mut yi = SignalMut::new("y", &mut y[i * c..], [b, c, 1], [t * c, 1, c]).unwrap();
            let mut s = SignalMut::channel_major("state", &mut state, [b, c, k - 1]).unwrap();
            conv.step(&xi, &mut s, &mut yi).unwrap();
        }
        assert_eq!(y, want, "{isa}");
    }
}

#[test]
fn ragged_sequences_do_not_see_each_other() {
    let (c, k, cu) = (18, 4, [0usize, 3, 3, 50, 51]);
    let (t, s) = (51, cu.len() - 1);
    let (x, w, past, dy) = (noise(c * t, 1), noise(c * k, 2), noise(s * c * (k - 1), 3), noise(c * t, 4));
    let isa = Isa::active();
    let conv = ShortConv::new(&w, c, None, true, isa).unwrap();
    let xs = Signal::time_major("x", &x, [1, c, t]).unwrap();
    let dys = Signal::time_major("dy", &dy, [1, c, t]).unwrap();
    let ps = Signal::channel_major("past", &past, [s, c, k - 1]).unwrap();
    let (mut y, mut last) = (vec![f32::NAN; c * t], vec![f32::NAN; s * c * (k - 1)]);
    let mut out = SignalMut::time_major("y", &mut y, [1, c, t]).unwrap();
    let mut end = SignalMut::channel_major("last", &mut last, [s, c, k - 1]).unwrap();
    conv.forward(&xs, Some(&cu), Some(&ps), &mut out, Some(&mut end)).unwrap();
    let (mut dx, mut dw, mut dpast) = (vec![f32::NAN; c * t], vec![f32::NAN; c * k], vec![f32::NAN; s * c * (k - 1)]);
    let mut dxs = SignalMut::time_major("dx", &mut dx, [1, c, t]).unwrap();
    let mut dps = SignalMut::channel_major("dpast", &mut dpast, [s, c, k - 1]).unwrap();
    let grads = ShortGrads { dx: Some(&mut dxs), dweight: Some(&mut dw), dpast: Some(&mut dps), dbias: None };
    conv.backward(&xs, Some(&cu), Some(&ps), &dys, None, grads).unwrap();
    let mut dw_sum = vec![0f32; c * k];
    for (i, at) in cu.windows(2).enumerate() {
        let n = at[1] - at[0];
        let part = |x: &[f32]| x[at[0] * c..at[1] * c].to_vec();
        let own = |x: &[f32]| x[i * c * (k - 1)..][..c * (k - 1)].to_vec();
        let (x1, dy1, p1) = (part(&x), part(&dy), own(&past));
        let (mut y1, mut l1) = (vec![f32::NAN; n * c], vec![f32::NAN; c * (k - 1)]);
        let xs = Signal::time_major("x", &x1, [1, c, n]).unwrap();
        let dys = Signal::time_major("dy", &dy1, [1, c, n]).unwrap();
        let ps = Signal::channel_major("past", &p1, [1, c, k - 1]).unwrap();
        let mut out = SignalMut::time_major("y", &mut y1, [1, c, n]).unwrap();
        let mut end = SignalMut::channel_major("last", &mut l1, [1, c, k - 1]).unwrap();
        conv.forward(&xs, None, Some(&ps), &mut out, Some(&mut end)).unwrap();
        assert_eq!((part(&y), own(&last)), (y1, l1), "sequence {i}");
        let (mut dx1, mut dw1, mut dp1) = (vec![f32::NAN; n * c], vec![f32::NAN; c * k], vec![f32::NAN; c * (k - 1)]);
        let mut dxs = SignalMut::time_major("dx", &mut dx1, [1, c, n]).unwrap();
        let mut dps = SignalMut::channel_major("dpast", &mut dp1, [1, c, k - 1]).unwrap();
        let grads = ShortGrads { dx: Some(&mut dxs), dweight: Some(&mut dw1), dpast: Some(&mut dps), dbias: None };
        conv.backward(&xs, None, Some(&ps), &dys, None, grads).unwrap();
        assert_eq!((part(&dx), own(&dpast)), (dx1, dp1), "sequence {i}");
        dw_sum.iter_mut().zip(dw1).for_each(|(a, b)| *a += b);
    }
    assert!(dw.iter().zip(&dw_sum).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn bf16_and_extreme_inputs() {
    let (c, t, k) = (20, 70, 4);
    let x: Vec<bf16> = noise(c * t, 1).into_iter().map(|x| bf16::from_f32(x * 1e4)).collect();
    let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let w = noise(c * k, 2);
    fn run<T: Element>(x: &[T], w: &[f32], [c, t]: [usize; 2], isa: Isa) -> Vec<f32> {
        let conv = ShortConv::new(w, c, None, true, isa).unwrap();
        let mut y = vec![f32::NAN; c * t];
        let xs = Signal::time_major("x", x, [1, c, t]).unwrap();
        conv.forward(&xs, None, None, &mut SignalMut::time_major("y", &mut y, [1, c, t]).unwrap(), None).unwrap();
        y
    }
    for isa in Isa::available() {
        let y = run(&x, &w, [c, t], isa);
        assert_eq!(y, run(&wide, &w, [c, t], isa));
        assert!(y.iter().all(|y| y.is_finite()));
    }
}

#[test]
fn refusals_name_the_trouble() {
    let isa = Isa::active();
    let x = [0f32; 24];
    let bad = |w: &[f32], c| ShortConv::new(w, c, None, false, isa).err().unwrap().to_string();
    assert!(bad(&x[..7], 2).contains("(channels, width)"));
    assert!(bad(&x, 1).contains("long_conv"));
    assert!(bad(&[], 0).contains("weight"));
    let conv = ShortConv::new(&x[..8], 4, None, false, isa).unwrap();
    let xs = Signal::channel_major("x", &x, [2, 4, 3]).unwrap();
    let mut y = [0f32; 24];
    let mut out = SignalMut::channel_major("y", &mut y, [2, 4, 3]).unwrap();
    let say = |r: foveal_kernels::Result<foveal_kernels::Work>| r.unwrap_err().to_string();
    assert!(say(conv.forward(&xs, Some(&[0, 3]), None, &mut out, None)).contains("batch of 2"));
    let past = Signal::channel_major("past", &x, [2, 4, 2]).unwrap();
    assert!(say(conv.forward(&xs, None, Some(&past), &mut out, None)).contains("width - 1"));
    let one = Signal::channel_major("x", &x, [1, 4, 6]).unwrap();
    let mut out = SignalMut::channel_major("y", &mut y, [1, 4, 6]).unwrap();
    assert!(say(conv.forward(&one, Some(&[0, 4, 2, 6]), None, &mut out, None)).contains("never fall"));
    assert!(say(conv.forward(&one, Some(&[0, 7]), None, &mut out, None)).contains("end at"));
}
