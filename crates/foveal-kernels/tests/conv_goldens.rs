//! The convolutions and feature attention against PyTorch renditions of their papers in float64, gradients by its
//! autograd (`goldens/make_conv.py`).

use foveal_kernels::conv::{
    Boundary, DampedEma, EmaGrads, EmaParameterGrads, LongGrads, ShortConv, ShortGrads, Signal, SignalMut, long_conv,
    long_conv_backward,
};
use foveal_kernels::feature::{FeatureAttend, FeatureGrads, ToeplitzForm};
use foveal_kernels::{Isa, View, ViewMut};
use safetensors::SafeTensors;
use std::path::Path;

struct Golden(Vec<u8>);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/conv.safetensors");
        Golden(std::fs::read(path).unwrap())
    }
    fn get(&self, case: &str, name: &str) -> (Vec<f32>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let t = file.tensor(&format!("{case}.{name}")).unwrap();
        (t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(), t.shape().to_vec())
    }
    /// Within 2e-6 of the largest value (a few roundings of f32).
    fn check(&self, case: &str, name: &str, got: &[f32]) {
        self.near(case, name, got, 2e-6);
    }
    fn near(&self, case: &str, name: &str, got: &[f32], bound: f32) {
        let want = self.get(case, name).0;
        assert_eq!(got.len(), want.len(), "{case}.{name}");
        let top = want.iter().fold(0f32, |a, x| a.max(x.abs()));
        let e = got
            .iter()
            .zip(&want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |m: f32, e| if e > m || e.is_nan() { e } else { m });
        assert!(e <= bound * top, "{case}.{name}: {e:e} of {top:e}");
    }
}

fn three(x: &[usize]) -> [usize; 3] {
    x.try_into().unwrap()
}

fn four(x: &[usize]) -> [usize; 4] {
    x.try_into().unwrap()
}

#[test]
fn long() {
    let g = Golden::open();
    for (case, boundary) in [("long.causal", Boundary::Causal), ("long.circular", Boundary::Circular)] {
        let ((h, hs), (u, us), (d, _)) = (g.get(case, "h"), g.get(case, "u"), g.get(case, "d"));
        let (dy, shape) = (g.get(case, "dy").0, three(&us));
        let (mut y, mut du, mut dh, mut dd) = (u.clone(), u.clone(), h.clone(), d.clone());
        let h = Signal::channel_major("h", &h, [1, hs[0], hs[1]]).unwrap();
        let us = Signal::channel_major("u", &u, shape).unwrap();
        let dys = Signal::channel_major("dy", &dy, shape).unwrap();
        let mut out = SignalMut::channel_major("y", &mut y, shape).unwrap();
        long_conv(&h, &us, Some(&d), &mut out, boundary, Isa::active()).unwrap();
        let mut dus = SignalMut::channel_major("du", &mut du, shape).unwrap();
        let grads = LongGrads { du: Some(&mut dus), dh: Some(&mut dh), dd: Some(&mut dd) };
        long_conv_backward(&h, &us, Some(&d), &dys, grads, boundary, Isa::active()).unwrap();
        for (name, got) in [("y", &y), ("du", &du), ("dh", &dh), ("dd", &dd)] {
            g.check(case, name, got);
        }
    }
}

#[test]
fn short() {
    let g = Golden::open();
    for (case, silu) in [("short.silu", true), ("short.plain", false)] {
        let ((x, xs), (w, _), (bias, _), (past, ps)) =
            (g.get(case, "x"), g.get(case, "w"), g.get(case, "bias"), g.get(case, "past"));
        let (dy, shape) = (g.get(case, "dy").0, three(&xs));
        let (mut y, mut dx, mut dw, mut db, mut dp) = (x.clone(), x.clone(), w.clone(), bias.clone(), past.clone());
        let conv = ShortConv::new(&w, shape[1], Some(&bias), silu, Isa::active()).unwrap();
        let xs = Signal::channel_major("x", &x, shape).unwrap();
        let past = Signal::channel_major("past", &past, three(&ps)).unwrap();
        let dys = Signal::channel_major("dy", &dy, shape).unwrap();
        let mut out = SignalMut::channel_major("y", &mut y, shape).unwrap();
        conv.forward(&xs, None, Some(&past), &mut out, None).unwrap();
        let mut dxs = SignalMut::channel_major("dx", &mut dx, shape).unwrap();
        let mut dps = SignalMut::channel_major("dpast", &mut dp, three(&ps)).unwrap();
        let grads =
            ShortGrads { dx: Some(&mut dxs), dweight: Some(&mut dw), dbias: Some(&mut db), dpast: Some(&mut dps) };
        conv.backward(&xs, None, Some(&past), &dys, None, grads).unwrap();
        for (name, got) in [("y", &y), ("dx", &dx), ("dw", &dw), ("dbias", &db), ("dpast", &dp)] {
            g.check(case, name, got);
        }
    }
}

#[test]
fn ema() {
    let g = Golden::open();
    let k = ["alpha", "delta", "beta", "eta"].map(|n| g.get("ema", n).0);
    let (u, us) = g.get("ema", "u");
    let (dy, shape) = (g.get("ema", "dy").0, three(&us));
    let (mut y, mut du, mut dk) = (u.clone(), u.clone(), k.clone());
    let ema = DampedEma::new(&k[0], &k[1], &k[2], &k[3], shape[1], Isa::active()).unwrap();
    let us = Signal::channel_major("u", &u, shape).unwrap();
    let dys = Signal::channel_major("dy", &dy, shape).unwrap();
    ema.forward(&us, None, &mut SignalMut::channel_major("y", &mut y, shape).unwrap(), None).unwrap();
    let mut dus = SignalMut::channel_major("du", &mut du, shape).unwrap();
    let [alpha, delta, beta, eta] = &mut dk;
    let parameters = Some(EmaParameterGrads { alpha, delta, beta, eta });
    ema.backward(&us, None, &dys, None, EmaGrads { du: Some(&mut dus), parameters, dinit: None }).unwrap();
    g.check("ema", "y", &y);
    g.check("ema", "du", &du);
    for (name, got) in ["dalpha", "ddelta", "dbeta", "deta"].iter().zip(&dk) {
        g.check("ema", name, got);
    }
}

#[test]
fn feature() {
    let g = Golden::open();
    let plain = FeatureAttend::default();
    for (case, causal, normalise, form) in [
        ("feature.full", false, Some(0.1), ToeplitzForm::Auto),
        ("feature.causal", true, Some(1e-3), ToeplitzForm::Auto),
        ("feature.plain", true, None, ToeplitzForm::Auto),
        ("feature.toeplitz", false, Some(1e-3), ToeplitzForm::Direct),
        ("feature.toeplitz", false, Some(1e-3), ToeplitzForm::Fourier),
        ("feature.toeplitz-causal", true, Some(1e-3), ToeplitzForm::Direct),
        ("feature.toeplitz-causal", true, Some(1e-3), ToeplitzForm::Fourier),
    ] {
        let ((q, qs), (k, ks), (v, vs)) = (g.get(case, "q"), g.get(case, "k"), g.get(case, "v"));
        let (dout, os) = g.get(case, "dy");
        let c = case.contains("toeplitz").then(|| g.get(case, "c").0);
        let p = FeatureAttend { causal, normalise, form, weights: c.as_deref(), ..plain.clone() };
        let (mut y, mut dq, mut dk, mut dv) = (dout.clone(), q.clone(), k.clone(), v.clone());
        let mut dc = c.clone();
        let q = View::contiguous("q", &q, four(&qs)).unwrap();
        let k = View::contiguous("k", &k, four(&ks)).unwrap();
        let v = View::contiguous("v", &v, four(&vs)).unwrap();
        let go = View::contiguous("dout", &dout, four(&os)).unwrap();
        p.run(&q, &k, &v, &mut ViewMut::contiguous("out", &mut y, four(&os)).unwrap(), None).unwrap();
        let grads = FeatureGrads {
            dq: &mut ViewMut::contiguous("dq", &mut dq, four(&qs)).unwrap(),
            dk: &mut ViewMut::contiguous("dk", &mut dk, four(&ks)).unwrap(),
            dv: &mut ViewMut::contiguous("dv", &mut dv, four(&vs)).unwrap(),
            dweights: dc.as_deref_mut(),
        };
        p.backward(&q, &k, &v, &go, grads).unwrap();
        // A transform's error follows the largest value of the sequence, and rows with few keys divide by little.
        let bound = if form == ToeplitzForm::Fourier { 2e-5 } else { 2e-6 };
        for (name, got) in [("y", &y), ("dq", &dq), ("dk", &dk), ("dv", &dv)] {
            g.near(case, name, got, bound);
        }
        if let Some(dc) = &dc {
            g.near(case, "dc", dc, bound);
        }
    }
}
