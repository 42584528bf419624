//! The recurrence of one head, token by token: the definition of every gate, and its judge in tests.
//!
//! Generic over [`Real`], so that the same lines in f64 are the reference and in f32 are the plain
//! same-precision code of the error rule. `round` is applied to the operands of products: the
//! identity, or rounding to bf16 where the kernel multiplies in bf16.

/// f32 or f64, with what the recurrence needs.
pub trait Real:
    Copy
    + Default
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::AddAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// e^x.
    fn exp(self) -> Self;
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    fn exp(self) -> f32 {
        f32::exp(self)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn exp(self) -> f64 {
        f64::exp(self)
    }
}

/// [`super::Gate`] of one head; all slices are contiguous over T tokens.
#[derive(Clone)]
pub enum Gate<F> {
    /// w = 1.
    Identity,
    /// g (T).
    Scalar(Vec<F>),
    /// g (T, D).
    Channel(Vec<F>),
    /// beta (T).
    Delta(Vec<F>),
    /// g (T), beta (T).
    GatedDelta(Vec<F>, Vec<F>),
    /// g (T, D), beta (T).
    ChannelDelta(Vec<F>, Vec<F>),
    /// g (T, D), a (T, D), b (T, D).
    LowRank(Vec<F>, Vec<F>, Vec<F>),
    /// dt (T), one a.
    Ssd(Vec<F>, F),
    /// dt (T, Dv), a (Dv, D).
    Selective(Vec<F>, Vec<F>),
}

/// Inputs of one head over T tokens: q, k (T, D), v (T, Dv).
#[derive(Clone)]
pub struct Head<F> {
    /// Key width.
    pub d: usize,
    /// Value width.
    pub dv: usize,
    /// Factor on q.
    pub scale: F,
    /// (T, D).
    pub q: Vec<F>,
    /// (T, D).
    pub k: Vec<F>,
    /// (T, Dv).
    pub v: Vec<F>,
    /// The gate.
    pub gate: Gate<F>,
}

/// Gradients of [`Head`]'s slices; those that the gate lacks are empty.
#[derive(Default, Clone, Debug)]
pub struct Grads<F> {
    /// (T, D).
    pub q: Vec<F>,
    /// (T, D).
    pub k: Vec<F>,
    /// (T, Dv).
    pub v: Vec<F>,
    /// As the gate's g.
    pub g: Vec<F>,
    /// As the gate's beta.
    pub beta: Vec<F>,
    /// As the gate's a.
    pub a: Vec<F>,
    /// As the gate's b.
    pub b: Vec<F>,
    /// As the gate's dt.
    pub dt: Vec<F>,
    /// (D, Dv).
    pub initial: Vec<F>,
}

impl<F: Real> Head<F> {
    fn tokens(&self) -> usize {
        self.q.len() / self.d
    }

    /// Decay of state element (i, c) at token t.
    fn decay(&self, t: usize, i: usize, c: usize) -> F {
        match &self.gate {
            Gate::Identity | Gate::Delta(_) => F::ONE,
            Gate::Scalar(g) | Gate::GatedDelta(g, _) => g[t].exp(),
            Gate::Channel(g) | Gate::ChannelDelta(g, _) | Gate::LowRank(g, _, _) => g[t * self.d + i].exp(),
            Gate::Ssd(dt, a) => (dt[t] * *a).exp(),
            Gate::Selective(dt, a) => (dt[t * self.dv + c] * a[c * self.d + i]).exp(),
        }
    }

    /// Factor on what token t writes to column c.
    fn strength(&self, t: usize, c: usize) -> F {
        match &self.gate {
            Gate::Delta(b) | Gate::GatedDelta(_, b) | Gate::ChannelDelta(_, b) => b[t],
            Gate::Ssd(dt, _) => dt[t],
            Gate::Selective(dt, _) => dt[t * self.dv + c],
            _ => F::ONE,
        }
    }

    fn delta(&self) -> bool {
        matches!(self.gate, Gate::Delta(_) | Gate::GatedDelta(..) | Gate::ChannelDelta(..))
    }

    /// One token: S ← A S + k vᵀ. Returns what is written beside k: u, or for the low-rank gate v, and p.
    fn step(&self, t: usize, s: &mut [F], round: &dyn Fn(F) -> F) -> (Vec<F>, Vec<F>) {
        let (d, dv) = (self.d, self.dv);
        let (k, v) = (&self.k[t * d..], &self.v[t * dv..]);
        let read = |s: &[F], x: &[F], c: usize| (0..d).fold(F::ZERO, |sum, i| sum + round(x[i]) * round(s[i * dv + c]));
        let mut p = vec![F::ZERO; dv];
        if let Gate::LowRank(_, _, b) = &self.gate {
            p = (0..dv).map(|c| read(s, &b[t * d..], c)).collect();
        }
        for i in 0..d {
            for c in 0..dv {
                s[i * dv + c] = self.decay(t, i, c) * s[i * dv + c];
            }
        }
        if self.delta() {
            p = (0..dv).map(|c| read(s, k, c)).collect();
        }
        let u: Vec<F> = (0..dv).map(|c| self.strength(t, c) * if self.delta() { v[c] - p[c] } else { v[c] }).collect();
        for i in 0..d {
            for c in 0..dv {
                s[i * dv + c] += round(k[i]) * round(u[c]);
                if let Gate::LowRank(_, a, _) = &self.gate {
                    s[i * dv + c] += round(a[t * d + i]) * round(p[c]);
                }
            }
        }
        (u, p)
    }

    /// Outputs (T, Dv); `state` (D, Dv) is replaced by the final one.
    pub fn forward(&self, state: &mut [F], round: &dyn Fn(F) -> F) -> Vec<F> {
        let (d, dv) = (self.d, self.dv);
        let mut out = Vec::with_capacity(self.v.len());
        for t in 0..self.tokens() {
            self.step(t, state, round);
            for c in 0..dv {
                let o = (0..d).fold(F::ZERO, |o, i| o + round(self.q[t * d + i]) * round(state[i * dv + c]));
                out.push(self.scale * o);
            }
        }
        out
    }

    /// Gradients for dout (T, Dv) and dlast, the gradient of the final state (D, Dv).
    pub fn backward(&self, initial: &[F], dout: &[F], dlast: &[F], round: &dyn Fn(F) -> F) -> Grads<F> {
        let (d, dv, n) = (self.d, self.dv, self.tokens());
        let zeros = |n: usize| vec![F::ZERO; n];
        let mut states = vec![initial.to_vec()];
        let mut written = Vec::new();
        for t in 0..n {
            let mut s = states[t].clone();
            written.push(self.step(t, &mut s, round));
            states.push(s);
        }
        let mut r = Grads { q: zeros(n * d), k: zeros(n * d), v: zeros(n * dv), ..Grads::default() };
        match &self.gate {
            Gate::Identity => {}
            Gate::Scalar(g) | Gate::Channel(g) => r.g = zeros(g.len()),
            Gate::Delta(_) => r.beta = zeros(n),
            Gate::GatedDelta(g, _) | Gate::ChannelDelta(g, _) => (r.g, r.beta) = (zeros(g.len()), zeros(n)),
            Gate::LowRank(..) => (r.g, r.a, r.b) = (zeros(n * d), zeros(n * d), zeros(n * d)),
            Gate::Ssd(..) => (r.dt, r.a) = (zeros(n), zeros(1)),
            Gate::Selective(dt, a) => (r.dt, r.a) = (zeros(dt.len()), zeros(a.len())),
        }
        let mut ds = dlast.to_vec();
        for t in (0..n).rev() {
            let (k, v, s0, s1) = (&self.k[t * d..], &self.v[t * dv..], &states[t], &states[t + 1]);
            let (u, p) = &written[t];
            for i in 0..d {
                for c in 0..dv {
                    let o = self.scale * dout[t * dv + c];
                    r.q[t * d + i] += round(s1[i * dv + c]) * round(o);
                    ds[i * dv + c] += round(self.q[t * d + i]) * round(o);
                }
            }
            let read =
                |ds: &[F], x: &[F], c: usize| (0..d).fold(F::ZERO, |sum, i| sum + round(x[i]) * round(ds[i * dv + c]));
            // dk from the write, and the gradient of what was written.
            let du: Vec<F> = (0..dv).map(|c| read(&ds, k, c)).collect();
            for i in 0..d {
                for c in 0..dv {
                    r.k[t * d + i] += round(ds[i * dv + c]) * round(u[c]);
                }
            }
            for c in 0..dv {
                r.v[t * dv + c] = self.strength(t, c) * du[c];
                let z = if self.delta() { v[c] - p[c] } else { v[c] };
                match &self.gate {
                    Gate::Delta(_) | Gate::GatedDelta(..) | Gate::ChannelDelta(..) => r.beta[t] += du[c] * z,
                    Gate::Ssd(..) => r.dt[t] += du[c] * z,
                    Gate::Selective(..) => r.dt[t * dv + c] += du[c] * z,
                    _ => {}
                }
            }
            if self.delta() {
                // p = kᵀ (w S), u = β (v − p).
                for i in 0..d {
                    for c in 0..dv {
                        let dp = F::ZERO - r.v[t * dv + c];
                        r.k[t * d + i] += round(self.decay(t, i, c) * s0[i * dv + c]) * round(dp);
                        ds[i * dv + c] += round(k[i]) * round(dp);
                    }
                }
            }
            let mut before = vec![F::ZERO; d * dv];
            for i in 0..d {
                for c in 0..dv {
                    let w = self.decay(t, i, c);
                    before[i * dv + c] = w * ds[i * dv + c];
                    let dg = before[i * dv + c] * s0[i * dv + c];
                    match &self.gate {
                        Gate::Scalar(_) | Gate::GatedDelta(..) => r.g[t] += dg,
                        Gate::Channel(_) | Gate::ChannelDelta(..) | Gate::LowRank(..) => r.g[t * d + i] += dg,
                        Gate::Ssd(dt, a) => {
                            r.dt[t] += *a * dg;
                            r.a[0] += dt[t] * dg;
                        }
                        Gate::Selective(dt, a) => {
                            r.dt[t * dv + c] += a[c * d + i] * dg;
                            r.a[c * d + i] += dt[t * dv + c] * dg;
                        }
                        Gate::Identity | Gate::Delta(_) => {}
                    }
                }
            }
            if let Gate::LowRank(_, a, b) = &self.gate {
                for c in 0..dv {
                    let dp = read(&ds, &a[t * d..], c);
                    for i in 0..d {
                        r.a[t * d + i] += round(ds[i * dv + c]) * round(p[c]);
                        r.b[t * d + i] += round(s0[i * dv + c]) * round(dp);
                        before[i * dv + c] += round(b[t * d + i]) * round(dp);
                    }
                }
            }
            ds = before;
        }
        r.initial = ds;
        r
    }
}
