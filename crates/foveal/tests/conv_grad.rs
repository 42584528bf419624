//! Convolutions, feature attention and row operations inside candle's autograd: directional derivatives against central differences.

mod gradients;

use candle_core::{DType, Device, Tensor, Var};
use foveal::prim::{Boundary, FeatureOptions, damped_ema, feature_attend, long_conv, rms_norm, short_conv, softmax};
use gradients::{check, number, wave};

#[test]
fn long() {
    for boundary in [Boundary::Causal, Boundary::Circular] {
        let inputs = [wave(1, &[3, 20], -1.0, 1.0), wave(2, &[2, 3, 40], -1.0, 1.0), wave(3, &[3], -1.0, 1.0)];
        check("long", &inputs, 0.25, |x| vec![long_conv(&x[0], &x[1], Some(&x[2]), boundary).unwrap().out]);
        // (B, T, C) memory through a transpose, and no skip.
        let inputs = [wave(1, &[3, 20], -1.0, 1.0), wave(2, &[2, 40, 3], -1.0, 1.0)];
        check("long transposed", &inputs, 0.25, |x| {
            vec![long_conv(&x[0], &x[1].transpose(1, 2).unwrap(), None, boundary).unwrap().out]
        });
    }
}

#[test]
fn short() {
    let inputs = [
        wave(1, &[2, 17, 30], -1.0, 1.0),
        wave(2, &[17, 4], -1.0, 1.0),
        wave(3, &[17], -1.0, 1.0),
        wave(4, &[2, 17, 3], -1.0, 1.0),
    ];
    check("short", &inputs, 1e-2, |x| {
        let y = short_conv(&x[0], &x[1], Some(&x[2]), true, Some(&x[3])).unwrap();
        vec![y.out, y.state.unwrap()]
    });
    check("short plain", &inputs[..2], 0.25, |x| vec![short_conv(&x[0], &x[1], None, false, None).unwrap().out]);
}

#[test]
fn ema() {
    let gate = |seed| wave(seed, &[3, 4], 0.2, 0.8);
    let inputs = [
        wave(1, &[2, 3, 70], -1.0, 1.0),
        gate(2),
        gate(3),
        wave(4, &[3, 4], -1.0, 1.0),
        wave(5, &[3, 4], -1.0, 1.0),
        wave(6, &[2, 3, 4], -1.0, 1.0),
    ];
    check("ema", &inputs, 5e-3, |x| {
        let y = damped_ema(&x[0], &x[1], &x[2], &x[3], &x[4], Some(&x[5])).unwrap();
        vec![y.out, y.state.unwrap()]
    });
}

#[test]
fn feature() {
    let inputs = [
        wave(1, &[1, 4, 20, 5], 0.1, 1.0),
        wave(2, &[1, 2, 20, 5], 0.1, 1.0),
        wave(3, &[1, 2, 20, 3], -1.0, 1.0),
        wave(4, &[4, 39], 0.2, 1.0),
    ];
    for causal in [false, true] {
        let options = FeatureOptions { causal, normalise: Some(0.1) };
        check("feature", &inputs[..3], 5e-3, |x| vec![feature_attend(&x[0], &x[1], &x[2], None, &options).unwrap().0]);
        check("feature weighted", &inputs, 5e-3, |x| {
            vec![feature_attend(&x[0], &x[1], &x[2], Some(&x[3]), &options).unwrap().0]
        });
    }
}

#[test]
fn rows() {
    // Odd widths, one element, many dimensions, and memory that is not contiguous.
    for shape in [&[7][..], &[3, 33], &[2, 3, 4, 17], &[5, 1]] {
        let x = wave(1, shape, -3.0, 3.0);
        check("softmax", std::slice::from_ref(&x), 1e-2, |x| vec![softmax(&x[0]).unwrap().0]);
        let weight = wave(2, &shape[shape.len() - 1..], 0.5, 1.5);
        check("rms_norm", &[x, weight], 5e-3, |x| vec![rms_norm(&x[0], &x[1], 1e-3).unwrap().0]);
    }
    let x = wave(3, &[6, 5, 9], -2.0, 2.0);
    check("softmax turned", std::slice::from_ref(&x), 1e-2, |x| {
        vec![softmax(&x[0].transpose(0, 2).unwrap()).unwrap().0]
    });
    check("rms_norm turned", &[x, wave(4, &[6], 0.5, 1.5)], 5e-3, |x| {
        vec![rms_norm(&x[0].transpose(0, 2).unwrap(), &x[1], 1e-3).unwrap().0]
    });
}

#[test]
fn rows_keep_the_dtype_and_tell_their_work() {
    let x = wave(1, &[2, 3, 8], -2.0, 2.0);
    let narrow = Var::from_tensor(&x.to_dtype(DType::BF16).unwrap()).unwrap();
    let weight = Var::from_tensor(&wave(2, &[8], 0.5, 1.5).to_dtype(DType::BF16).unwrap()).unwrap();
    let (y, work) = rms_norm(&narrow, &weight, 1e-5).unwrap();
    assert_eq!((y.dtype(), y.dims(), work.flops), (DType::BF16, &[2, 3, 8][..], 4 * 48));
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&weight).unwrap().dtype(), DType::BF16);
    let grad = grads.get(&narrow).unwrap();
    assert_eq!(grad.dtype(), DType::BF16);
    assert!(number(&grad.abs().unwrap()) > 0.0);
    let (y, work) = softmax(&narrow).unwrap();
    assert_eq!((y.dtype(), work.flops), (DType::BF16, 4 * 48));
    assert!((number(&y) - 6.0).abs() < 0.05);
    // A row that is masked throughout: zeros, and no gradient.
    let masked = Var::from_tensor(&Tensor::full(f32::NEG_INFINITY, (2, 4), &Device::Cpu).unwrap()).unwrap();
    let (y, _) = softmax(&masked).unwrap();
    let grads = (y * wave(5, &[2, 4], -1.0, 1.0)).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(number(&grads.get(&masked).unwrap().abs().unwrap()), 0.0);
}

#[test]
fn bf16_inputs_states_and_work() {
    let u = wave(1, &[1, 2, 50], -1.0, 1.0).to_dtype(DType::BF16).unwrap();
    let (h, w) = (wave(2, &[2, 50], -1.0, 1.0), wave(3, &[2, 4], -1.0, 1.0));
    let var = Var::from_tensor(&u).unwrap();
    let y = long_conv(&h, var.as_tensor(), None, Boundary::Causal).unwrap();
    assert_eq!((y.out.dtype(), y.work.tiles), (DType::F32, 2));
    let grads = y.out.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&var).unwrap().dtype(), DType::BF16);
    // A prompt and its continuation are the whole.
    let whole = short_conv(&u, &w, None, true, None).unwrap();
    let a = short_conv(&u.narrow(2, 0, 30).unwrap(), &w, None, true, None).unwrap();
    let b = short_conv(&u.narrow(2, 30, 20).unwrap(), &w, None, true, a.state.as_ref()).unwrap();
    let joined = Tensor::cat(&[&a.out, &b.out], 2).unwrap();
    assert_eq!(number(&(joined - whole.out).unwrap().abs().unwrap()), 0.0);
}

#[test]
fn refusals_name_the_trouble() {
    let u = wave(1, &[1, 2, 10], -1.0, 1.0);
    let say = |r: foveal::Result<foveal::prim::Convolved>| r.unwrap_err().to_string();
    let h = wave(2, &[3, 10], -1.0, 1.0);
    assert!(say(long_conv(&h, &u, None, Boundary::Causal)).contains("channels"));
    assert!(say(long_conv(&h, &u.squeeze(0).unwrap(), None, Boundary::Causal)).contains("(batch, channels, time)"));
    assert!(say(long_conv(&h, &u.to_dtype(DType::F64).unwrap(), None, Boundary::Causal)).contains("f32, bf16"));
    assert!(say(short_conv(&u, &wave(3, &[2, 0], 0.0, 1.0), None, false, None)).contains("width"));
    let rows = |r: foveal::Result<(Tensor, foveal_kernels::Work)>| r.unwrap_err().to_string();
    assert!(rows(softmax(&wave(1, &[], 0.0, 1.0))).contains("width"));
    assert!(rows(softmax(&Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap())).contains("at least one element"));
    assert!(rows(rms_norm(&u, &wave(2, &[3], 0.0, 1.0), 1e-5)).contains("last dimension"));
    assert!(rows(softmax(&u.to_dtype(DType::F64).unwrap())).contains("f32, bf16"));
    let (a, b) = (wave(4, &[2, 3], 0.1, 0.9), wave(5, &[2, 4], 0.1, 0.9));
    assert!(say(damped_ema(&u, &a, &b, &a, &a, None)).contains("alpha"));
}
