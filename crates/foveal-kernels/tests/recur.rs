//! The chunked recurrences against their token by token definition in f64, under every instruction
//! set of the machine.
//!
//! Error rule: max|x − ref64| ≤ 2 · max|plain same-precision code − ref64| (3 for gradients), with a
//! floor of a few units in the last place of the largest element. The plain code is the definition in
//! f32; where the kernel multiplies in bf16 (bf16 inputs on tiles), with the operands of its products
//! rounded to bf16. Its k and v are exact there, so that its final state under a mere decay would have no bf16
//! error at all; the state of these gates is held against the textbook's chunks instead ([`chunked_state`]),
//! which round decayed keys. The floor is 2⁻¹⁷ where the kernel splits operands in two bf16.

use foveal_kernels::recur::twin::{self, Head};
use foveal_kernels::recur::{Gate, Recur, RecurGrads};
use foveal_kernels::{Element, Isa, KernelError, View, ViewMut, Work};
use half::bf16;

/// Splitmix: a few lines, seeded, the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }
    /// Roughly normal.
    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit() - 0.5).sum::<f32>() * std::f32::consts::SQRT_2
    }
    /// Log decay: mostly mild, now and then strong, so that a chunk spans hundreds of nats.
    fn log_decay(&mut self) -> f32 {
        let x = self.unit();
        if x < 0.05 { -20.0 * self.unit() } else { -0.3 * self.unit() * self.unit() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Identity,
    Scalar,
    Channel,
    Delta,
    GatedDelta,
    ChannelDelta,
    LowRank,
    Ssd,
    Selective,
}

const KINDS: [Kind; 9] = [
    Kind::Identity,
    Kind::Scalar,
    Kind::Channel,
    Kind::Delta,
    Kind::GatedDelta,
    Kind::ChannelDelta,
    Kind::LowRank,
    Kind::Ssd,
    Kind::Selective,
];

#[derive(Clone, Copy, Debug)]
struct Shape {
    kind: Kind,
    b: usize,
    t: usize,
    /// Heads of the output, q, k, v and the gate.
    h: usize,
    hq: usize,
    hk: usize,
    hv: usize,
    hg: usize,
    d: usize,
    dv: usize,
}

impl Shape {
    fn new(kind: Kind, t: usize, d: usize, dv: usize) -> Self {
        Shape { kind, b: 1, t, h: 2, hq: 2, hk: 2, hv: 2, hg: 2, d, dv }
    }
    /// Width of g and of dt.
    fn gate_width(&self) -> usize {
        match self.kind {
            Kind::Channel | Kind::ChannelDelta | Kind::LowRank => self.d,
            Kind::Selective => self.dv,
            _ => 1,
        }
    }
}

/// One problem; operands are contiguous (B, heads, T, width).
struct Data<T> {
    s: Shape,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    a: Vec<T>,
    b: Vec<T>,
    /// g or dt.
    g: Vec<f32>,
    beta: Vec<f32>,
    /// a of the scans.
    fixed: Vec<f32>,
    cu: Option<Vec<u32>>,
    initial: Vec<f32>,
    dout: Vec<f32>,
    dlast: Vec<f32>,
}

fn data<T: Element>(s: Shape, cu: Option<Vec<u32>>, seed: u64) -> Data<T> {
    let mut r = Rng(seed);
    let mut rows = |heads: usize, width: usize, unit: bool| -> Vec<T> {
        let mut x: Vec<f32> = (0..s.b * heads * s.t * width).map(|_| r.normal()).collect();
        if unit {
            for row in x.chunks_exact_mut(width) {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt() + 1e-6;
                row.iter_mut().for_each(|x| *x /= norm);
            }
        }
        x.into_iter().map(T::from_f32).collect()
    };
    let delta = matches!(s.kind, Kind::Delta | Kind::GatedDelta | Kind::ChannelDelta);
    let q = rows(s.hq, s.d, false);
    let k = rows(s.hk, s.d, delta);
    let v = rows(s.hv, s.dv, false);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    if s.kind == Kind::LowRank {
        b = rows(s.hg, s.d, true);
        a = b.iter().map(|x| T::from_f32(-x.to_f32() * 0.7)).collect();
    }
    let n = s.b * s.hg * s.t;
    let g = (0..n * s.gate_width())
        .map(|_| match s.kind {
            Kind::Ssd | Kind::Selective => 0.01 + 0.2 * r.unit(),
            _ => r.log_decay(),
        })
        .collect();
    let beta = (0..n).map(|_| r.unit()).collect();
    let fixed = match s.kind {
        Kind::Ssd => (0..s.h).map(|_| -2.0 * r.unit()).collect(),
        Kind::Selective => (0..s.h * s.dv * s.d).map(|i| -(1.0 + (i % s.d) as f32) * (0.5 + r.unit())).collect(),
        _ => Vec::new(),
    };
    let sequences = cu.as_ref().map_or(s.b, |c| c.len() - 1);
    let mut fill = |n: usize| (0..n).map(|_| r.normal()).collect::<Vec<f32>>();
    let states = sequences * s.h * s.d * s.dv;
    let (initial, dout, dlast) = (fill(states), fill(s.b * s.h * s.t * s.dv), fill(states));
    Data { s, q, k, v, a, b, g, beta, fixed, cu, initial, dout, dlast }
}

impl<T: Element> Data<T> {
    fn sequences(&self) -> Vec<(usize, usize, usize)> {
        match &self.cu {
            None => (0..self.s.b).map(|b| (b, 0, self.s.t)).collect(),
            Some(c) => c.windows(2).map(|w| (0, w[0] as usize, w[1] as usize)).collect(),
        }
    }

    /// The definition of head `h` of one sequence.
    fn head<F: twin::Real>(&self, at: (usize, usize, usize), h: usize, real: &dyn Fn(f32) -> F) -> Head<F> {
        let s = self.s;
        let rows = |x: &dyn Fn(usize) -> f32, heads: usize, width: usize| -> Vec<F> {
            let head = at.0 * heads + h / (s.h / heads);
            ((head * s.t + at.1) * width..(head * s.t + at.2) * width).map(|i| real(x(i))).collect()
        };
        let of = |x: &[T], heads, width| rows(&|i| x[i].to_f32(), heads, width);
        let g = || rows(&|i| self.g[i], s.hg, s.gate_width());
        let beta = || rows(&|i| self.beta[i], s.hg, 1);
        let gate = match s.kind {
            Kind::Identity => twin::Gate::Identity,
            Kind::Scalar => twin::Gate::Scalar(g()),
            Kind::Channel => twin::Gate::Channel(g()),
            Kind::Delta => twin::Gate::Delta(beta()),
            Kind::GatedDelta => twin::Gate::GatedDelta(g(), beta()),
            Kind::ChannelDelta => twin::Gate::ChannelDelta(g(), beta()),
            Kind::LowRank => twin::Gate::LowRank(g(), of(&self.a, s.hg, s.d), of(&self.b, s.hg, s.d)),
            Kind::Ssd => twin::Gate::Ssd(g(), real(self.fixed[h])),
            Kind::Selective => {
                let fixed = &self.fixed[h * s.dv * s.d..(h + 1) * s.dv * s.d];
                twin::Gate::Selective(g(), fixed.iter().map(|x| real(*x)).collect())
            }
        };
        let (d, dv, scale) = (s.d, s.dv, real(scale(s.d)));
        Head { d, dv, scale, q: of(&self.q, s.hq, d), k: of(&self.k, s.hk, d), v: of(&self.v, s.hv, dv), gate }
    }

    /// Outputs, final states and gradients by the definition, in the layouts of the kernel.
    fn reference<F: twin::Real>(
        &self,
        real: &dyn Fn(f32) -> F,
        back: &dyn Fn(F) -> f64,
        round: &dyn Fn(F) -> F,
        gradients: bool,
    ) -> Results {
        let s = self.s;
        let mut r = Results::default();
        let shape = |heads: usize, width: usize| vec![0f64; s.b * heads * s.t * width];
        r.out = shape(s.h, s.dv);
        r.last = vec![0.0; self.initial.len()];
        if gradients {
            (r.q, r.k, r.v) = (shape(s.hq, s.d), shape(s.hk, s.d), shape(s.hv, s.dv));
            r.initial = vec![0.0; self.initial.len()];
            match s.kind {
                Kind::Identity => {}
                Kind::Scalar | Kind::Channel => r.g = shape(s.hg, s.gate_width()),
                Kind::Delta => r.beta = shape(s.hg, 1),
                Kind::GatedDelta | Kind::ChannelDelta => {
                    (r.g, r.beta) = (shape(s.hg, s.gate_width()), shape(s.hg, 1));
                }
                Kind::LowRank => (r.g, r.a, r.b) = (shape(s.hg, s.d), shape(s.hg, s.d), shape(s.hg, s.d)),
                Kind::Ssd | Kind::Selective => {
                    (r.dt, r.a) = (shape(s.hg, s.gate_width()), vec![0.0; self.fixed.len()]);
                }
            }
        }
        let size = s.d * s.dv;
        for (i, at) in self.sequences().into_iter().enumerate() {
            for h in 0..s.h {
                let x = self.head(at, h, real);
                let state = (i * s.h + h) * size;
                let initial: Vec<F> = self.initial[state..state + size].iter().map(|x| real(*x)).collect();
                let mut last = initial.clone();
                let out = x.forward(&mut last, round);
                let put = |to: &mut Vec<f64>, heads: usize, width: usize, from: &[F]| {
                    let start = ((at.0 * heads + h / (s.h / heads)) * s.t + at.1) * width;
                    // Heads that share an operand share its gradient.
                    to.iter_mut().skip(start).zip(from).for_each(|(to, x)| *to += back(*x));
                };
                put(&mut r.out, s.h, s.dv, &out);
                (0..size).for_each(|j| r.last[state + j] = back(last[j]));
                if !gradients {
                    continue;
                }
                let row = ((at.0 * s.h + h) * s.t + at.1) * s.dv;
                let dout: Vec<F> = self.dout[row..row + (at.2 - at.1) * s.dv].iter().map(|x| real(*x)).collect();
                let dlast: Vec<F> = self.dlast[state..state + size].iter().map(|x| real(*x)).collect();
                let g = x.backward(&initial, &dout, &dlast, round);
                put(&mut r.q, s.hq, s.d, &g.q);
                put(&mut r.k, s.hk, s.d, &g.k);
                put(&mut r.v, s.hv, s.dv, &g.v);
                put(&mut r.g, s.hg, s.gate_width(), &g.g);
                put(&mut r.beta, s.hg, 1, &g.beta);
                put(&mut r.b, s.hg, s.d, &g.b);
                put(&mut r.dt, s.hg, s.gate_width(), &g.dt);
                (0..size).for_each(|j| r.initial[state + j] = back(g.initial[j]));
                if s.kind == Kind::LowRank {
                    put(&mut r.a, s.hg, s.d, &g.a);
                } else {
                    let n = g.a.len();
                    (0..n).for_each(|j| r.a[h * n + j] += back(g.a[j]));
                }
            }
        }
        r
    }

    /// Hand the call to `f`.
    fn call<R>(&self, isa: Isa, f: impl FnOnce(Recur<T>, [View<T>; 3]) -> R) -> R {
        let s = self.s;
        fn view<'a, E: Copy>(s: Shape, x: &'a [E], heads: usize, width: usize) -> View<'a, E> {
            View::contiguous("operand", x, [s.b, heads, s.t, width]).unwrap()
        }
        let g = || view(s, &self.g, s.hg, s.gate_width());
        let beta = || view(s, &self.beta, s.hg, 1);
        let gate = match s.kind {
            Kind::Identity => Gate::Identity,
            Kind::Scalar => Gate::Scalar { g: g() },
            Kind::Channel => Gate::Channel { g: g() },
            Kind::Delta => Gate::Delta { beta: beta() },
            Kind::GatedDelta => Gate::GatedDelta { g: g(), beta: beta() },
            Kind::ChannelDelta => Gate::ChannelDelta { g: g(), beta: beta() },
            Kind::LowRank => Gate::LowRank { g: g(), a: view(s, &self.a, s.hg, s.d), b: view(s, &self.b, s.hg, s.d) },
            Kind::Ssd => Gate::Ssd { dt: g(), a: &self.fixed },
            Kind::Selective => Gate::Selective { dt: g(), a: &self.fixed },
        };
        let qkv = [view(s, &self.q, s.hq, s.d), view(s, &self.k, s.hk, s.d), view(s, &self.v, s.hv, s.dv)];
        f(Recur::new(gate, scale(s.d)).isa(isa).cu_seqlens(self.cu.as_deref()), qkv)
    }

    fn forward(&self, isa: Isa) -> (Vec<f32>, Vec<f32>, Work) {
        let s = self.s;
        let mut out = vec![f32::NAN; s.b * s.h * s.t * s.dv];
        let mut last = vec![f32::NAN; self.initial.len()];
        let work = self.call(isa, |r, [q, k, v]| {
            let mut o = ViewMut::contiguous("out", &mut out, [s.b, s.h, s.t, s.dv]).unwrap();
            r.forward(&q, &k, &v, Some(&self.initial), &mut o, Some(&mut last)).unwrap()
        });
        (out, last, work)
    }

    fn backward(&self, isa: Isa) -> (RecurGrads, Work) {
        let s = self.s;
        self.call(isa, |r, [q, k, v]| {
            let dout = View::contiguous("dout", &self.dout, [s.b, s.h, s.t, s.dv]).unwrap();
            r.backward(&q, &k, &v, Some(&self.initial), &dout, Some(&self.dlast)).unwrap()
        })
    }

    fn exact(&self, gradients: bool) -> Results {
        self.reference(&f64::from, &|x: f64| x, &|x| x, gradients)
    }

    /// Whether the kernel multiplies in bf16.
    fn narrow(&self, isa: Isa) -> bool {
        T::NAME == "bf16" && isa == Isa::Amx && self.s.kind != Kind::Selective
    }

    /// The plain code in the kernel's own precision.
    fn plain(&self, isa: Isa, gradients: bool) -> Results {
        let narrow = self.narrow(isa);
        let round = move |x: f32| if narrow { bf16::from_f32(x).to_f32() } else { x };
        let mut r = self.reference(&|x| x, &|x: f32| f64::from(x), &round, gradients);
        if narrow && matches!(self.s.kind, Kind::Identity | Kind::Scalar | Kind::Channel | Kind::Ssd) {
            let size = self.s.d * self.s.dv;
            for (i, at) in self.sequences().into_iter().enumerate() {
                for h in 0..self.s.h {
                    let state = (i * self.s.h + h) * size;
                    let last = chunked_state(&self.head(at, h, &|x| x), &self.initial[state..state + size], &round);
                    (0..size).for_each(|j| r.last[state + j] = f64::from(last[j]));
                }
            }
        }
        r
    }
}

/// The state after all tokens as the chunked form has it: for each 64 tokens, S ← e^{g} S + Σ (k decayed to the
/// chunk's end) vᵀ, operands of the product rounded.
fn chunked_state(x: &Head<f32>, initial: &[f32], round: &dyn Fn(f32) -> f32) -> Vec<f32> {
    let (d, dv) = (x.d, x.dv);
    let g = |t: usize, i: usize| match &x.gate {
        twin::Gate::Scalar(g) => g[t],
        twin::Gate::Channel(g) => g[t * d + i],
        twin::Gate::Ssd(dt, a) => dt[t] * a,
        _ => 0.0,
    };
    let strength = |t: usize| if let twin::Gate::Ssd(dt, _) = &x.gate { dt[t] } else { 1.0 };
    let (mut s, tokens) = (initial.to_vec(), x.k.len() / d);
    for start in (0..tokens).step_by(64) {
        for i in 0..d {
            let (mut sum, mut to_end) = (vec![0f32; dv], 0.0);
            for t in (start..tokens.min(start + 64)).rev() {
                let k = round(x.k[t * d + i] * f32::exp(to_end) * strength(t));
                (0..dv).for_each(|c| sum[c] += k * x.v[t * dv + c]);
                to_end += g(t, i);
            }
            (0..dv).for_each(|c| s[i * dv + c] = s[i * dv + c] * to_end.exp() + sum[c]);
        }
    }
    s
}

fn scale(d: usize) -> f32 {
    1.0 / (d as f32).sqrt()
}

#[derive(Default, Clone)]
struct Results {
    out: Vec<f64>,
    last: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    g: Vec<f64>,
    beta: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    dt: Vec<f64>,
    initial: Vec<f64>,
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

/// The error rule for one tensor.
fn judge(what: &str, got: &[f32], exact: &[f64], plain: &[f64], factor: f64, narrow: bool) {
    let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
    let (error, allowed) = (worst(&got, exact), worst(plain, exact));
    let top = exact.iter().fold(0f64, |m, x| m.max(x.abs()));
    let floor = if narrow { 0.5f64.powi(17) } else { 4.0 * f64::from(f32::EPSILON) };
    let limit = factor * allowed + floor * top;
    assert!(error <= limit, "{what}: error {error:.3e}, plain code's {allowed:.3e}, largest element {top:.3e}");
}

fn check_forward<T: Element>(x: &Data<T>) {
    let exact = x.exact(false);
    let mut works = Vec::new();
    for isa in Isa::available() {
        let plain = x.plain(isa, false);
        let (out, last, work) = x.forward(isa);
        let name = format!("{:?} {} {isa}", x.s, T::NAME);
        judge(&format!("out {name}"), &out, &exact.out, &plain.out, 2.0, x.narrow(isa));
        judge(&format!("last {name}"), &last, &exact.last, &plain.last, 2.0, x.narrow(isa));
        works.push(work);
    }
    assert!(works.iter().all(|w| *w == works[0]), "work depends on the instruction set: {works:?}");
}

fn check_backward<T: Element>(x: &Data<T>) {
    let exact = x.exact(true);
    for isa in Isa::available() {
        let plain = x.plain(isa, true);
        let (g, _) = x.backward(isa);
        let name = format!("{:?} {} {isa}", x.s, T::NAME);
        for (what, got, exact, plain) in [
            ("q", &g.q, &exact.q, &plain.q),
            ("k", &g.k, &exact.k, &plain.k),
            ("v", &g.v, &exact.v, &plain.v),
            ("g", &g.g, &exact.g, &plain.g),
            ("beta", &g.beta, &exact.beta, &plain.beta),
            ("a", &g.a, &exact.a, &plain.a),
            ("b", &g.b, &exact.b, &plain.b),
            ("dt", &g.dt, &exact.dt, &plain.dt),
            ("initial", &g.initial, &exact.initial, &plain.initial),
        ] {
            judge(&format!("d{what} {name}"), got, exact, plain, 3.0, x.narrow(isa));
        }
    }
}

#[test]
fn forward_f32() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (t, d, dv) in [(150, 64, 64), (1, 16, 16), (17, 40, 24), (64, 32, 80), (131, 19, 7)] {
            check_forward(&data::<f32>(Shape::new(kind, t, d, dv), None, 10 + i as u64));
        }
    }
}

#[test]
fn forward_bf16() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (t, d, dv) in [(150, 64, 64), (1, 16, 16), (37, 48, 80)] {
            check_forward(&data::<bf16>(Shape::new(kind, t, d, dv), None, 30 + i as u64));
        }
    }
}

#[test]
fn backward_f32() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (t, d, dv) in [(150, 64, 32), (1, 16, 16), (35, 19, 7)] {
            check_backward(&data::<f32>(Shape::new(kind, t, d, dv), None, 50 + i as u64));
        }
    }
}

#[test]
fn backward_bf16() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (t, d, dv) in [(150, 64, 64), (37, 48, 16)] {
            check_backward(&data::<bf16>(Shape::new(kind, t, d, dv), None, 70 + i as u64));
        }
    }
}

/// Heads shared in both directions, and a batch.
#[test]
fn shared_heads() {
    for kind in KINDS {
        let base = Shape { b: 2, h: 4, ..Shape::new(kind, 70, 32, 16) };
        for s in [Shape { hq: 1, hk: 1, hv: 4, hg: 4, ..base }, Shape { hq: 4, hk: 2, hv: 2, hg: 1, ..base }] {
            let x = data::<f32>(s, None, 90);
            check_forward(&x);
            check_backward(&x);
        }
    }
}

/// Sequences packed after each other, an empty one among them, do not see each other.
#[test]
fn ragged_batches() {
    for kind in KINDS {
        let cu = vec![0, 3, 3, 80, 150];
        let x = data::<f32>(Shape::new(kind, 150, 32, 32), Some(cu), 110);
        check_forward(&x);
        check_backward(&x);
        // An empty sequence hands its state through.
        let size = 2 * 32 * 32;
        assert_eq!(&x.forward(Isa::active()).1[size..2 * size], &x.initial[size..2 * size]);
    }
}

/// Stepping through the tokens gives what the chunks give, and so does cutting the sequence in two.
#[test]
fn steps_and_pieces() {
    for kind in KINDS {
        let s = Shape::new(kind, 90, 32, 24);
        let x = data::<f32>(s, None, 130);
        let (exact, plain) = (x.exact(false), x.plain(Isa::Portable, false));
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; s.h * s.t * s.dv];
            let mut state = x.initial.clone();
            x.call(isa, |r, [q, k, v]| {
                let mut o = ViewMut::contiguous("out", &mut out, [1, s.h, s.t, s.dv]).unwrap();
                r.step(&q, &k, &v, &mut state, &mut o).unwrap();
            });
            judge(&format!("steps {kind:?} {isa}"), &out, &exact.out, &plain.out, 2.0, false);
            judge(&format!("state {kind:?} {isa}"), &state, &exact.last, &plain.last, 2.0, false);
            // Strided views of the first 40 and the last 50 tokens of the same memory.
            let (mut out, mut state) = (vec![f32::NAN; s.h * s.t * s.dv], x.initial.clone());
            for part in [0..40, 40..s.t] {
                let n = part.len();
                fn cut<'a, E: Copy>(x: &'a [E], s: Shape, part: std::ops::Range<usize>, width: usize) -> View<'a, E> {
                    let from = &x[(part.start * width).min(x.len())..];
                    let h = if x.is_empty() { 0 } else { s.hg };
                    View::new("part", from, [1, h, part.len(), width], [0, s.t * width, width]).unwrap()
                }
                let w = s.gate_width();
                let g = cut(&x.g, s, part.clone(), w);
                let beta = cut(&x.beta, s, part.clone(), 1);
                let gate = match kind {
                    Kind::Identity => Gate::Identity,
                    Kind::Scalar => Gate::Scalar { g },
                    Kind::Channel => Gate::Channel { g },
                    Kind::Delta => Gate::Delta { beta },
                    Kind::GatedDelta => Gate::GatedDelta { g, beta },
                    Kind::ChannelDelta => Gate::ChannelDelta { g, beta },
                    Kind::LowRank => {
                        let (a, b) = (cut(&x.a, s, part.clone(), s.d), cut(&x.b, s, part.clone(), s.d));
                        Gate::LowRank { g, a, b }
                    }
                    Kind::Ssd => Gate::Ssd { dt: g, a: &x.fixed },
                    Kind::Selective => Gate::Selective { dt: g, a: &x.fixed },
                };
                let [q, k] = [&x.q, &x.k].map(|y| cut(y, s, part.clone(), s.d));
                let v = cut(&x.v, s, part.clone(), s.dv);
                let before = state.clone();
                let shape = [1, s.h, n, s.dv];
                let mut o = ViewMut::new("out", &mut out[part.start * s.dv..], shape, [0, s.t * s.dv, s.dv]).unwrap();
                Recur::new(gate, scale(s.d))
                    .isa(isa)
                    .forward(&q, &k, &v, Some(&before), &mut o, Some(&mut state))
                    .unwrap();
            }
            judge(&format!("pieces {kind:?} {isa}"), &out, &exact.out, &plain.out, 2.0, false);
            judge(&format!("state of pieces {kind:?} {isa}"), &state, &exact.last, &plain.last, 2.0, false);
        }
    }
}

/// The backward formulae of the definition itself, by central differences.
#[test]
fn definition_gradients_are_differences() {
    for kind in KINDS {
        let s = Shape { h: 1, hq: 1, hk: 1, hv: 1, hg: 1, ..Shape::new(kind, 6, 5, 3) };
        let x = data::<f32>(s, None, 150);
        let at = (0, 0, s.t);
        let head = x.head(at, 0, &f64::from);
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let (initial, dout, dlast) = (wide(&x.initial), wide(&x.dout), wide(&x.dlast));
        let g = head.backward(&initial, &dout, &dlast, &|x| x);
        let loss = |head: &Head<f64>, initial: &[f64]| -> f64 {
            let mut state = initial.to_vec();
            let out = head.forward(&mut state, &|x| x);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&out, &dout) + dot(&state, &dlast)
        };
        type Field = for<'a> fn(&'a mut Head<f64>) -> Option<&'a mut [f64]>;
        let fields: [(&str, Field, &Vec<f64>); 8] = [
            ("q", |h| Some(&mut h.q), &g.q),
            ("k", |h| Some(&mut h.k), &g.k),
            ("v", |h| Some(&mut h.v), &g.v),
            (
                "g",
                |h| match &mut h.gate {
                    twin::Gate::Scalar(g) | twin::Gate::Channel(g) | twin::Gate::GatedDelta(g, _) => Some(g),
                    twin::Gate::ChannelDelta(g, _) | twin::Gate::LowRank(g, _, _) => Some(g),
                    _ => None,
                },
                &g.g,
            ),
            (
                "beta",
                |h| match &mut h.gate {
                    twin::Gate::Delta(b) | twin::Gate::GatedDelta(_, b) | twin::Gate::ChannelDelta(_, b) => Some(b),
                    _ => None,
                },
                &g.beta,
            ),
            (
                "a",
                |h| match &mut h.gate {
                    twin::Gate::LowRank(_, a, _) | twin::Gate::Selective(_, a) => Some(a),
                    twin::Gate::Ssd(_, a) => Some(std::slice::from_mut(a)),
                    _ => None,
                },
                &g.a,
            ),
            (
                "b",
                |h| match &mut h.gate {
                    twin::Gate::LowRank(_, _, b) => Some(b),
                    _ => None,
                },
                &g.b,
            ),
            (
                "dt",
                |h| match &mut h.gate {
                    twin::Gate::Ssd(dt, _) | twin::Gate::Selective(dt, _) => Some(dt),
                    _ => None,
                },
                &g.dt,
            ),
        ];
        const STEP: f64 = 1e-5;
        for (name, field, analytic) in fields {
            let n = field(&mut head.clone()).map_or(0, |x| x.len());
            assert_eq!(n, analytic.len(), "{kind:?} {name}");
            for i in 0..n {
                let mut moved = head.clone();
                let mut side = |by: f64| {
                    if let Some(x) = field(&mut moved) {
                        x[i] += by;
                    }
                    loss(&moved, &initial)
                };
                // `side` moves on from where it left off.
                let slope = (side(STEP) - side(-2.0 * STEP)) / (2.0 * STEP);
                assert!(
                    (slope - analytic[i]).abs() < 1e-6 * (1.0 + slope.abs()),
                    "{kind:?} {name}[{i}]: {slope} {}",
                    analytic[i]
                );
            }
        }
        for i in 0..initial.len() {
            let side = |by: f64| {
                let mut s = initial.clone();
                s[i] += by;
                loss(&head, &s)
            };
            let slope = (side(STEP) - side(-STEP)) / (2.0 * STEP);
            assert!((slope - g.initial[i]).abs() < 1e-6 * (1.0 + slope.abs()), "{kind:?} initial[{i}]");
        }
    }
}

/// Twice the tokens, twice the work: exactly, in whole chunks.
#[test]
fn work_is_linear() {
    for kind in KINDS {
        let work = |t: usize| {
            let x = data::<bf16>(Shape { h: 1, hq: 1, hk: 1, hv: 1, hg: 1, ..Shape::new(kind, t, 32, 16) }, None, 1);
            (x.forward(Isa::active()).2, x.backward(Isa::active()).1)
        };
        let [one, two, four] = [64, 128, 256].map(work);
        for (a, b, c) in [(one.0, two.0, four.0), (one.1, two.1, four.1)] {
            assert_eq!(c.flops - b.flops, 2 * (b.flops - a.flops), "{kind:?}");
            assert_eq!(c.bytes - b.bytes, 2 * (b.bytes - a.bytes), "{kind:?}");
            assert_eq!(c.tiles - b.tiles, 2 * (b.tiles - a.tiles), "{kind:?}");
            assert_eq!(a.flops, b.flops - a.flops, "{kind:?}: no work but by token");
        }
        if kind == Kind::Scalar {
            // Scores and their products over the triangle, state read and written.
            assert_eq!(one.0.flops, 2 * (64 * 65 / 2) * (32 + 16) + 2 * 2 * 64 * 32 * 16);
        }
    }
}

/// Decays that would underflow as products, or overflow as quotients, and a decay to nothing.
#[test]
fn extreme_decays() {
    for kind in [Kind::Scalar, Kind::Channel, Kind::GatedDelta, Kind::ChannelDelta, Kind::LowRank] {
        for decay in [-100.0, -30.0, f32::NEG_INFINITY, -1e-6, 0.0] {
            extreme(data::<f32>(Shape::new(kind, 130, 32, 32), None, 170), decay);
            extreme(data::<bf16>(Shape::new(kind, 130, 32, 32), None, 170), decay);
        }
    }
}

/// Every third token decays by `decay`; the others stay mild.
fn extreme<T: Element>(mut x: Data<T>, decay: f32) {
    let w = x.s.gate_width();
    for (i, g) in x.g.iter_mut().enumerate() {
        *g = if (i / w).is_multiple_of(3) { decay } else { -1e-3 };
    }
    check_forward(&x);
    if decay.is_finite() {
        check_backward(&x);
    }
    for isa in Isa::available() {
        let (g, _) = x.backward(isa);
        let all = [&g.q, &g.k, &g.v, &g.g, &g.initial];
        assert!(all.iter().all(|x| x.iter().all(|x| x.is_finite())), "{:?} {decay} {isa}", x.s);
    }
}

/// The future changes nothing, to the bit.
#[test]
fn causal() {
    for kind in KINDS {
        let s = Shape::new(kind, 100, 16, 16);
        let (mut x, mut y) = (data::<bf16>(s, None, 190), data::<bf16>(s, None, 190));
        for (i, v) in y.v.iter_mut().enumerate() {
            if i / s.dv % s.t >= 70 {
                *v = bf16::from_f32(9.0);
            }
        }
        let (a, b) = (x.forward(Isa::active()).0, y.forward(Isa::active()).0);
        let head = s.t * s.dv;
        for h in 0..s.h {
            assert_eq!(a[h * head..h * head + 70 * s.dv], b[h * head..h * head + 70 * s.dv], "{kind:?}");
            assert_ne!(a[h * head + 70 * s.dv..(h + 1) * head], b[h * head + 70 * s.dv..(h + 1) * head]);
        }
        // And the same again, on one thread.
        x.cu = None;
        let pool = rayon_one();
        assert_eq!(a, pool.install(|| x.forward(Isa::active()).0), "{kind:?}: threads change the result");
    }
}

/// Fewer heads than threads: blocks of value columns give what the whole gives, to the bit, and count as it does.
#[test]
fn threads_change_nothing() {
    for kind in KINDS {
        for dv in [80, 32, 7] {
            let s = Shape { h: 1, hq: 1, hk: 1, hv: 1, hg: 1, ..Shape::new(kind, 130, 32, dv) };
            let threads = |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            let (wide, narrow) = (data::<f32>(s, None, 210), data::<bf16>(s, None, 210));
            for isa in Isa::available() {
                let one = rayon_one().install(|| (wide.forward(isa), narrow.forward(isa)));
                for n in [2, 5] {
                    let many = threads(n).install(|| (wide.forward(isa), narrow.forward(isa)));
                    assert!(one == many, "{kind:?} {dv} {isa}: {n} threads change the result");
                }
            }
        }
    }
}

/// A million tokens cost 128 times what 8,192 do, by the counters, and no memory but a chunk's.
#[test]
fn a_million_tokens() {
    let work = |t: usize| {
        let (x, g) = (vec![bf16::ONE; t * 16], vec![-0.1f32; t]);
        let view = |x| View::contiguous("operand", x, [1, 1, t, 16]).unwrap();
        let g = View::contiguous("g", &g, [1, 1, t, 1]).unwrap();
        let mut out = vec![0f32; t * 16];
        let mut o = ViewMut::contiguous("out", &mut out, [1, 1, t, 16]).unwrap();
        let work = Recur::new(Gate::Scalar { g }, 1.0).forward(&view(&x), &view(&x), &view(&x), None, &mut o, None);
        // What the decay keeps of a constant: 1 / (1 − e^−0.1) tokens.
        assert!((out[t * 16 - 1] / (16.0 / (1.0 - (-0.1f32).exp())) - 1.0).abs() < 0.01);
        work.unwrap()
    };
    let (short, long) = (work(8192), work(1 << 20));
    assert_eq!(long.flops, 128 * short.flops);
    assert_eq!(long.tiles, 128 * short.tiles);
}

fn rayon_one() -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap()
}

#[test]
fn refusals_name_what_is_wrong() {
    let x = data::<f32>(Shape::new(Kind::Scalar, 10, 8, 8), None, 1);
    let mut out = vec![7.0; 2 * 10 * 8];
    let refuse = |cu: Option<&[u32]>, heads: usize, initial: &[f32], out: &mut [f32]| -> KernelError {
        x.call(Isa::active(), |r, [q, k, v]| {
            let mut o = ViewMut::contiguous("out", out, [1, heads, 20 / heads, 8]).unwrap();
            let r = r.cu_seqlens(cu);
            r.forward(&q, &k, &v, Some(initial), &mut o, None).unwrap_err()
        })
    };
    let e = refuse(Some(&[0, 4, 9]), 2, &x.initial, &mut out);
    assert!(e.to_string().contains("cu_seqlens"), "{e}");
    let e = refuse(Some(&[0, 6, 4, 10]), 2, &x.initial, &mut out);
    assert!(e.to_string().contains("cu_seqlens"), "{e}");
    let e = refuse(None, 2, &x.initial[1..], &mut out);
    assert!(e.to_string().contains("initial"), "{e}");
    let e = refuse(None, 1, &x.initial, &mut out);
    assert!(e.to_string().contains("tokens"), "{e}");
    assert!(out.iter().all(|x| *x == 7.0), "a refused call writes nothing");
}
