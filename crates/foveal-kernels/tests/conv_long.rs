//! Long convolution against its f64 twin, under every instruction set, within the error rule: at most twice
//! the error of plain f32 code (three times for gradients).
//!
//! The plain code is what everyone writes: pad to a power of two, a textbook radix-2 transform in f32, a
//! product, and back.

mod common;

use common::{f64s, noise, transposed, worst};
use foveal_kernels::conv::{Boundary, LongConv, LongGrads, Signal, SignalMut, long_conv, long_conv_backward, twin};
use foveal_kernels::{Element, Isa};
use half::bf16;

fn within(what: &str, factor: f64, got: &[f32], plain: &[f32], want: &[f64]) {
    common::within(what, factor, 0.0, got, plain, want);
}

/// Textbook transform of (re, im), length a power of two.
fn fft(x: &mut [(f32, f32)], sign: f32) {
    let n = x.len();
    if n == 1 {
        return;
    }
    let (mut a, mut b): (Vec<_>, Vec<_>) =
        (x.iter().step_by(2).copied().collect(), x.iter().skip(1).step_by(2).copied().collect());
    fft(&mut a, sign);
    fft(&mut b, sign);
    for k in 0..n / 2 {
        let (sin, cos) = (sign * 2.0 * std::f32::consts::PI * k as f32 / n as f32).sin_cos();
        let t = (b[k].0 * cos - b[k].1 * sin, b[k].0 * sin + b[k].1 * cos);
        x[k] = (a[k].0 + t.0, a[k].1 + t.1);
        x[k + n / 2] = (a[k].0 - t.0, a[k].1 - t.1);
    }
}

/// Linear convolution (or, with `conj`, correlation) by the textbook, all 2·max samples of it, cyclic.
fn plain_product(x: &[f32], h: &[f32], conj: bool) -> Vec<f32> {
    let n = (x.len() + h.len()).next_power_of_two();
    let lift = |x: &[f32]| (0..n).map(|i| (x.get(i).copied().unwrap_or(0.0), 0.0)).collect::<Vec<_>>();
    let (mut a, mut b) = (lift(x), lift(h));
    fft(&mut a, -1.0);
    fft(&mut b, -1.0);
    for (a, b) in a.iter_mut().zip(b) {
        let i = if conj { -b.1 } else { b.1 };
        *a = (a.0 * b.0 - a.1 * i, a.0 * i + a.1 * b.0);
    }
    fft(&mut a, 1.0);
    a.iter().map(|x| x.0 / n as f32).collect()
}

/// Indices of a linear result folded to a sequence of t.
fn fold(x: &[f32], t: usize, boundary: Boundary) -> Vec<f32> {
    match boundary {
        Boundary::Causal => x[..t].to_vec(),
        Boundary::Circular => (0..t).map(|i| x[i] + x[i + t]).collect(),
    }
}

#[derive(Clone, Copy)]
struct Case {
    shape: [usize; 3],
    l: usize,
    boundary: Boundary,
}

const fn case(shape: [usize; 3], l: usize, boundary: Boundary) -> Case {
    Case { shape, l, boundary }
}

const CASES: [Case; 17] = [
    case([1, 1, 1], 1, Boundary::Causal),
    case([2, 3, 37], 37, Boundary::Causal),
    case([1, 2, 256], 256, Boundary::Causal),
    case([1, 1, 1000], 999, Boundary::Causal),
    case([2, 1, 700], 5, Boundary::Causal),
    case([1, 2, 5000], 100, Boundary::Causal),
    case([1, 1, 20], 64, Boundary::Causal),
    case([1, 1, 3000], 2500, Boundary::Causal),
    case([1, 1, 1], 1, Boundary::Circular),
    case([2, 2, 10], 10, Boundary::Circular),
    case([1, 2, 513], 200, Boundary::Circular),
    case([1, 1, 2048], 2048, Boundary::Circular),
    case([2, 3, 1024], 700, Boundary::Circular),
    case([1, 2, 3072], 3072, Boundary::Circular),
    case([1, 1, 4096], 3000, Boundary::Circular),
    case([1, 1, 5000], 64, Boundary::Circular),
    case([1, 18, 130], 130, Boundary::Causal),
];

struct Data {
    h: Vec<f32>,
    u: Vec<f32>,
    d: Vec<f32>,
    dy: Vec<f32>,
}

fn data(k: Case) -> Data {
    let [b, c, t] = k.shape;
    Data { h: noise(c * k.l, 1), u: noise(b * c * t, 2), d: noise(c, 3), dy: noise(b * c * t, 4) }
}

fn plain_forward(k: Case, x: &Data) -> Vec<f32> {
    let [b, c, t] = k.shape;
    let row = |r: usize| {
        let (u, h) = (&x.u[r * t..][..t], &x.h[r % c * k.l..][..k.l]);
        let mut pad = plain_product(u, h, false);
        pad.resize(pad.len().max(2 * t), 0.0);
        fold(&pad, t, k.boundary).iter().zip(u).map(|(y, u)| y + x.d[r % c] * u).collect::<Vec<_>>()
    };
    (0..b * c).flat_map(row).collect()
}

#[test]
fn forward_both_layouts_every_isa() {
    for k in CASES {
        let x = data(k);
        let [b, c, t] = k.shape;
        let want =
            twin::long_conv(&f64s(&x.h), &f64s(&x.u), &f64s(&x.d), k.shape, k.l, k.boundary == Boundary::Circular);
        let plain = plain_forward(k, &x);
        let mut work = Vec::new();
        for isa in Isa::available() {
            let what = format!("{:?} {} {:?} {isa}", k.shape, k.l, k.boundary);
            let h = Signal::channel_major("h", &x.h, [1, c, k.l]).unwrap();
            let u = Signal::channel_major("u", &x.u, k.shape).unwrap();
            let mut y = vec![f32::NAN; b * c * t];
            let mut out = SignalMut::channel_major("y", &mut y, k.shape).unwrap();
            work.push(long_conv(&h, &u, Some(&x.d), &mut out, k.boundary, isa).unwrap());
            within(&what, 2.0, &y, &plain, &want);

            let ready = LongConv::new(&h, t, k.boundary, isa).unwrap();
            let ut = transposed(&x.u, k.shape);
            let ut = Signal::time_major("u", &ut, k.shape).unwrap();
            let mut yt = vec![f32::NAN; b * c * t];
            let mut out = SignalMut::time_major("y", &mut yt, k.shape).unwrap();
            ready.forward(&ut, Some(&x.d), &mut out).unwrap();
            assert_eq!(yt, transposed(&y, k.shape), "{what}: layouts and plans agree to the bit");
        }
        assert!(work.windows(2).all(|w| w[0] == w[1]), "work depends on the instruction set: {work:?}");
    }
}

#[test]
fn backward_both_layouts_every_isa() {
    for k in CASES {
        let x = data(k);
        let [b, c, t] = k.shape;
        let circular = k.boundary == Boundary::Circular;
        let (want_u, want_h, want_d) =
            twin::long_conv_backward(&f64s(&x.h), &f64s(&x.u), &f64s(&x.d), &f64s(&x.dy), k.shape, k.l, circular);
        // Plain gradients: correlations by the textbook, summed over the batch.
        let (mut plain_u, mut plain_h, mut plain_d) = (vec![0f32; b * c * t], vec![0f32; c * k.l], vec![0f32; c]);
        for r in 0..b * c {
            let (u, dy, h) = (&x.u[r * t..][..t], &x.dy[r * t..][..t], &x.h[r % c * k.l..][..k.l]);
            let lag = |x: &[f32], s: isize| x[s.rem_euclid(x.len() as isize) as usize];
            let (cu, ch) = (plain_product(dy, h, true), plain_product(dy, u, true));
            for i in 0..t {
                let i = i as isize;
                let wrap = if circular { lag(&cu, i - t as isize) } else { 0.0 };
                plain_u[r * t + i as usize] = lag(&cu, i) + wrap + x.d[r % c] * dy[i as usize];
            }
            for s in 0..k.l.min(t) {
                let s = s as isize;
                let wrap = if circular { lag(&ch, s - t as isize) } else { 0.0 };
                plain_h[r % c * k.l + s as usize] += lag(&ch, s) + wrap;
            }
            plain_d[r % c] += u.iter().zip(dy).map(|(u, g)| u * g).sum::<f32>();
        }
        for isa in Isa::available() {
            let what = format!("{:?} {} {:?} {isa}", k.shape, k.l, k.boundary);
            let h = Signal::channel_major("h", &x.h, [1, c, k.l]).unwrap();
            let u = Signal::channel_major("u", &x.u, k.shape).unwrap();
            let dy = Signal::channel_major("dy", &x.dy, k.shape).unwrap();
            let (mut du, mut dh, mut dd) = (vec![f32::NAN; b * c * t], vec![f32::NAN; c * k.l], vec![f32::NAN; c]);
            let mut out = SignalMut::channel_major("du", &mut du, k.shape).unwrap();
            let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh), dd: Some(&mut dd) };
            long_conv_backward(&h, &u, Some(&x.d), &dy, grads, k.boundary, isa).unwrap();
            // One product and one rounding of f32 are always allowed: the plain sum may be exact by luck.
            let floor = |w: &[f64]| w.iter().fold(0f64, |a, x| a.max(x.abs())) * f64::from(f32::EPSILON);
            for (name, got, plain, want) in
                [("du", &du, &plain_u, &want_u), ("dh", &dh, &plain_h, &want_h), ("dd", &dd, &plain_d, &want_d)]
            {
                let (g, p) = (worst(got, want), worst(plain, want));
                assert!(g <= (3.0 * p).max(floor(want)), "{what} {name}: error {g:e}, plain {p:e}");
            }

            let (ut, dyt) = (transposed(&x.u, k.shape), transposed(&x.dy, k.shape));
            let ut = Signal::time_major("u", &ut, k.shape).unwrap();
            let dyt = Signal::time_major("dy", &dyt, k.shape).unwrap();
            let (mut du2, mut dh2) = (vec![f32::NAN; b * c * t], vec![f32::NAN; c * k.l]);
            let mut out = SignalMut::time_major("du", &mut du2, k.shape).unwrap();
            let ready = LongConv::new(&h, t, k.boundary, isa).unwrap();
            let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh2), dd: None };
            ready.backward(&ut, Some(&x.d), &dyt, grads).unwrap();
            assert_eq!((du2, dh2), (transposed(&du, k.shape), dh), "{what}: layouts agree");
        }
    }
}

#[test]
fn each_batch_row_with_its_own_filter() {
    let ([b, c, t], l) = ([3, 2, 300], 150);
    let (h, u, dy) = (noise(b * c * l, 1), noise(b * c * t, 2), noise(b * c * t, 3));
    let isa = Isa::active();
    let mut y = vec![f32::NAN; b * c * t];
    let mut dh = vec![f32::NAN; b * c * l];
    {
        let h = Signal::channel_major("h", &h, [b, c, l]).unwrap();
        let u = Signal::channel_major("u", &u, [b, c, t]).unwrap();
        let dy = Signal::channel_major("dy", &dy, [b, c, t]).unwrap();
        let mut out = SignalMut::channel_major("y", &mut y, [b, c, t]).unwrap();
        long_conv(&h, &u, None, &mut out, Boundary::Causal, isa).unwrap();
        let grads = LongGrads { dh: Some(&mut dh), ..LongGrads::default() };
        long_conv_backward(&h, &u, None, &dy, grads, Boundary::Causal, isa).unwrap();
    }
    let zero = vec![0.0; c];
    for i in 0..b {
        let (x, f) = (f64s(&u[i * c * t..][..c * t]), f64s(&h[i * c * l..][..c * l]));
        let g = f64s(&dy[i * c * t..][..c * t]);
        let want = twin::long_conv(&f, &x, &zero, [1, c, t], l, false);
        assert!(worst(&y[i * c * t..][..c * t], &want) < 1e-5);
        let want = twin::long_conv_backward(&f, &x, &zero, &g, [1, c, t], l, false).1;
        assert!(worst(&dh[i * c * l..][..c * l], &want) < 1e-5);
    }
}

#[test]
fn bf16_input_is_the_rounded_input() {
    let shape = [2, 3, 777];
    let (h, u) = (noise(3 * 777, 1), noise(2 * 3 * 777, 2));
    let narrow: Vec<bf16> = u.iter().map(|&x| bf16::from_f32(x)).collect();
    let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
    fn run<T: Element>(h: &[f32], u: &[T], shape: [usize; 3]) -> Vec<f32> {
        let mut y = vec![f32::NAN; u.len()];
        let h = Signal::channel_major("h", h, [1, shape[1], shape[2]]).unwrap();
        let u = Signal::channel_major("u", u, shape).unwrap();
        let mut out = SignalMut::channel_major("y", &mut y, shape).unwrap();
        long_conv(&h, &u, Some(&[0.5, 0.0, -2.0]), &mut out, Boundary::Causal, Isa::active()).unwrap();
        y
    }
    assert_eq!(run(&h, &narrow, shape), run(&h, &wide, shape));
}

/// ⟨dy, J·v⟩ by central differences equals ⟨gradient, v⟩: the operation is bilinear, so the difference
/// quotient is exact but for rounding.
#[test]
fn finite_differences() {
    let ([b, c, t], l) = ([2, 2, 90], 40);
    let (h, u, d) = (noise(c * l, 1), noise(b * c * t, 2), noise(c, 3));
    let (dy, v) = (noise(b * c * t, 4), noise(c * l, 5));
    let y = |h: &[f32]| {
        let mut y = vec![0f32; b * c * t];
        let h = Signal::channel_major("h", h, [1, c, l]).unwrap();
        let u = Signal::channel_major("u", &u, [b, c, t]).unwrap();
        let mut out = SignalMut::channel_major("y", &mut y, [b, c, t]).unwrap();
        long_conv(&h, &u, Some(&d), &mut out, Boundary::Causal, Isa::active()).unwrap();
        y.iter().zip(&dy).map(|(y, g)| f64::from(*y) * f64::from(*g)).sum::<f64>()
    };
    let moved = |s: f32| h.iter().zip(&v).map(|(h, v)| h + s * v).collect::<Vec<_>>();
    let quotient = (y(&moved(0.5)) - y(&moved(-0.5))) / 1.0;
    let mut dh = vec![0f32; c * l];
    let hs = Signal::channel_major("h", &h, [1, c, l]).unwrap();
    let us = Signal::channel_major("u", &u, [b, c, t]).unwrap();
    let dys = Signal::channel_major("dy", &dy, [b, c, t]).unwrap();
    let grads = LongGrads { dh: Some(&mut dh), ..LongGrads::default() };
    long_conv_backward(&hs, &us, Some(&d), &dys, grads, Boundary::Causal, Isa::active()).unwrap();
    let product: f64 = dh.iter().zip(&v).map(|(g, v)| f64::from(*g) * f64::from(*v)).sum();
    assert!((quotient - product).abs() < 1e-4 * product.abs().max(1.0), "{quotient} {product}");
}

#[test]
fn work_is_counted_and_grows_as_t_log_t() {
    let work = |t: usize| {
        let (h, u) = (vec![0f32; t], vec![0f32; t]);
        let mut y = vec![0f32; t];
        let h = Signal::channel_major("h", &h, [1, 1, t]).unwrap();
        let u = Signal::channel_major("u", &u, [1, 1, t]).unwrap();
        let mut out = SignalMut::channel_major("y", &mut y, [1, 1, t]).unwrap();
        long_conv(&h, &u, None, &mut out, Boundary::Causal, Isa::active()).unwrap()
    };
    let w = work(1024);
    assert_eq!(w.flops, 3 * 5 * 1024 * 10 + 6 * 1024 + 1024);
    assert_eq!(w.bytes, 3 * 4 * 1024);
    let big = work(4096);
    assert_eq!(big.flops, 3 * 5 * 4096 * 12 + 7 * 4096);
}

#[test]
fn refusals_name_the_trouble() {
    let x = [0f32; 64];
    let isa = Isa::active();
    let h = Signal::channel_major("h", &x, [1, 2, 32]).unwrap();
    let u = Signal::channel_major("u", &x, [1, 2, 16]).unwrap();
    let mut y = [0f32; 64];
    let mut out = SignalMut::channel_major("y", &mut y, [1, 2, 16]).unwrap();
    let say = |r: foveal_kernels::Result<foveal_kernels::Work>| r.unwrap_err().to_string();
    assert!(say(long_conv(&h, &u, None, &mut out, Boundary::Circular, isa)).contains("at most the 16 taps"));
    assert!(say(long_conv(&h, &u, Some(&[1.0]), &mut out, Boundary::Causal, isa)).contains("channels"));
    let h3 = Signal::channel_major("h", &x, [3, 2, 8]).unwrap();
    assert!(say(long_conv(&h3, &u, None, &mut out, Boundary::Causal, isa)).contains("shared"));
    let none = Signal::channel_major("h", &x, [1, 2, 0]).unwrap();
    assert!(say(long_conv(&none, &u, None, &mut out, Boundary::Causal, isa)).contains("at least one tap"));
    let ready = LongConv::new(&h, 20, Boundary::Causal, isa).unwrap();
    assert!(say(ready.forward(&u, None, &mut out)).contains("the plan"));
    assert!(Signal::channel_major("u", &x, [1, 2, 33]).is_err());
    assert!(Signal::new("u", &x, [2, 2, 2], [usize::MAX, 1, 1]).is_err());
    let mut z = [0f32; 64];
    assert!(SignalMut::new("y", &mut z, [2, 2, 2], [1, 1, 4]).is_err());
}
