//! Times of the convolutions and of feature attention, one JSON line a case: `conv_bench [case] [repeats]` runs the
//! cases whose names begin with `case`.
//!
//! `benches/peers/fft.py` runs this binary and PyTorch in turns.

use foveal_kernels::conv::{
    Boundary, DampedEma, LongConv, LongGrads, ShortConv, ShortGrads, Signal, SignalMut, long_conv, long_conv_backward,
};
use foveal_kernels::feature::{FeatureAttend, ToeplitzForm};
use foveal_kernels::{Isa, View, ViewMut};
use std::time::Instant;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let next = || {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

struct Bench {
    only: Option<String>,
    repeats: usize,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|o| name.starts_with(o))
    }

    /// Seconds of each of `repeats` calls after one to warm up.
    fn time(&self, name: &str, mut f: impl FnMut()) {
        if !self.wants(name) {
            return;
        }
        f();
        let seconds: Vec<f64> = (0..self.repeats)
            .map(|_| {
                let start = Instant::now();
                f();
                start.elapsed().as_secs_f64()
            })
            .collect();
        println!("{{\"case\": \"{name}\", \"isa\": \"{}\", \"seconds\": {seconds:?}}}", Isa::active());
    }
}

fn long(bench: &Bench, c: usize, t: usize) {
    let isa = Isa::active();
    let names = ["long", "long-ready", "long-backward", "long-circular"].map(|n| format!("{n}-{c}x{t}"));
    if !names.iter().any(|n| bench.wants(n)) {
        return;
    }
    let (h, u, d) = (noise(c * t, 1), noise(c * t, 2), noise(c, 3));
    let mut y = vec![0f32; c * t];
    let h = Signal::channel_major("h", &h, [1, c, t]).expect("shape");
    let u = Signal::channel_major("u", &u, [1, c, t]).expect("shape");
    let mut out = SignalMut::channel_major("y", &mut y, [1, c, t]).expect("shape");
    bench.time(&names[0], || {
        long_conv(&h, &u, Some(&d), &mut out, Boundary::Causal, isa).expect("shape");
    });
    bench.time(&names[3], || {
        long_conv(&h, &u, Some(&d), &mut out, Boundary::Circular, isa).expect("shape");
    });
    if bench.wants(&names[1]) {
        let ready = LongConv::new(&h, t, Boundary::Causal, isa).expect("shape");
        bench.time(&names[1], || {
            ready.forward(&u, Some(&d), &mut out).expect("shape");
        });
    }
    let (mut dh, mut dd) = (vec![0f32; c * t], vec![0f32; c]);
    bench.time(&names[2], || {
        let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh), dd: Some(&mut dd) };
        long_conv_backward(&h, &u, Some(&d), &u, grads, Boundary::Causal, isa).expect("shape");
    });
}

fn short(bench: &Bench, c: usize, t: usize) {
    let (x, w, bias) = (noise(c * t, 1), noise(c * 4, 2), noise(c, 3));
    let (mut y, mut dw, mut db) = (vec![0f32; c * t], vec![0f32; c * 4], vec![0f32; c]);
    let conv = ShortConv::new(&w, c, Some(&bias), true, Isa::active()).expect("shape");
    for time_major in [true, false] {
        let order = if time_major { "btc" } else { "bct" };
        let strides = if time_major { [0, 1, c] } else { [0, t, 1] };
        let xs = Signal::new("x", &x, [1, c, t], strides).expect("shape");
        let mut out = SignalMut::new("y", &mut y, [1, c, t], strides).expect("shape");
        bench.time(&format!("short-{order}-{c}x{t}"), || {
            conv.forward(&xs, None, None, &mut out, None).expect("shape");
        });
        bench.time(&format!("short-backward-{order}-{c}x{t}"), || {
            let grads = ShortGrads { dx: Some(&mut out), dweight: Some(&mut dw), dbias: Some(&mut db), dpast: None };
            conv.backward(&xs, None, None, &xs, None, grads).expect("shape");
        });
    }
}

fn ema(bench: &Bench, c: usize, t: usize, n: usize) {
    let gate: Vec<f32> = noise(c * n, 1).into_iter().map(|x| 0.5 + 0.4 * x).collect();
    let (beta, u) = (noise(c * n, 2), noise(c * t, 3));
    let mut y = vec![0f32; c * t];
    let ema = DampedEma::new(&gate, &gate, &beta, &beta, c, Isa::active()).expect("shape");
    let u = Signal::time_major("u", &u, [1, c, t]).expect("shape");
    let mut out = SignalMut::time_major("y", &mut y, [1, c, t]).expect("shape");
    bench.time(&format!("ema-recurrent-{c}x{t}x{n}"), || {
        ema.forward(&u, None, &mut out, None).expect("shape");
    });
    bench.time(&format!("ema-kernel-{c}x{t}x{n}"), || {
        let kernel = ema.kernel(t).expect("shape");
        let h = Signal::channel_major("kernel", &kernel, [1, c, t]).expect("shape");
        long_conv(&h, &u, None, &mut out, Boundary::Causal, Isa::active()).expect("shape");
    });
}

fn feature(bench: &Bench, name: &str, t: usize, p: &FeatureAttend) {
    let (h, r, d) = (8, 64, 64);
    let (q, k, v) = (noise(h * t * r, 1), noise(h * t * r, 2), noise(h * t * d, 3));
    let mut y = vec![0f32; h * t * d];
    let q = View::contiguous("q", &q, [1, h, t, r]).expect("shape");
    let k = View::contiguous("k", &k, [1, h, t, r]).expect("shape");
    let v = View::contiguous("v", &v, [1, h, t, d]).expect("shape");
    let mut out = ViewMut::contiguous("out", &mut y, [1, h, t, d]).expect("shape");
    bench.time(&format!("feature-{name}-{t}"), || {
        p.run(&q, &k, &v, &mut out, None).expect("shape");
    });
}

fn main() {
    let only = std::env::args().nth(1);
    let repeats = std::env::args().nth(2).and_then(|n| n.parse().ok()).unwrap_or(3);
    let bench = Bench { only, repeats };
    for (c, t) in [(1024, 65_536), (1024, 8192), (1024, 1024)] {
        long(&bench, c, t);
    }
    short(&bench, 4096, 2048);
    ema(&bench, 1024, 2048, 16);
    let causal = FeatureAttend { causal: true, normalise: Some(1e-3), ..FeatureAttend::default() };
    feature(&bench, "causal", 8192, &causal);
    for t in [512, 2048] {
        let c = noise(8 * (2 * t - 1), 4);
        for (name, form) in [("toeplitz-direct", ToeplitzForm::Direct), ("toeplitz-fourier", ToeplitzForm::Fourier)] {
            feature(&bench, name, t, &FeatureAttend { weights: Some(&c), form, ..causal.clone() });
        }
    }
}
