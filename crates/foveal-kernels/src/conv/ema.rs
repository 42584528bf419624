//! Multi-dimensional damped exponential moving average (Mega: Ma et al. 2022, arXiv 2209.10655, equations 3 to 5).
//!
//! Every channel has N states, each with its own α (weight of the new value), δ (damping), β (expansion of the
//! input) and η (projection of the output):
//!
//! h_i ← α_i β_i u + (1 − α_i δ_i) h_i,  y = Σ_i η_i h_i.
//!
//! Two forms of the same map: the recurrence ([`DampedEma::forward`]: O(T·N), states in and out, any number of
//! steps at a time), and a filter K_t = Σ_i η_i α_i β_i (1 − α_i δ_i)^t for [`super::long_conv`]
//! ([`DampedEma::kernel`]). The recurrence runs 16 channels side by side and keeps states in registers; on a CPU
//! it is the faster form for Mega's N = 16, and the one to prefer.

use super::over_tasks;
use super::panel::{Unit, WIDTH};
use super::signal::{Signal, SignalMut};
use crate::dispatch::with_isa;
use crate::error::{Result, same};
use crate::isa::Isa;
use crate::simd::Simd;
use crate::view::Element;
use crate::work::Work;

/// Steps of a piece: its inputs and the trace of its states stay in the first cache.
const STEPS: usize = 64;
/// States that the forward loop holds in registers.
const TOGETHER: usize = 4;

/// Parameters, each contiguous (C, N), already through their sigmoids where the model has them.
#[derive(Clone, Copy)]
pub struct DampedEma<'a> {
    alpha: &'a [f32],
    delta: &'a [f32],
    beta: &'a [f32],
    eta: &'a [f32],
    channels: usize,
    states: usize,
    isa: Isa,
}

/// Gradients of a damped EMA; what is not asked for is not written. Each is overwritten.
#[derive(Default)]
pub struct EmaGrads<'a, 'b> {
    /// Of the input, (B, C, T).
    pub du: Option<&'a mut SignalMut<'b, f32>>,
    /// Of α, δ, β and η, each (C, N).
    pub parameters: Option<EmaParameterGrads<'a>>,
    /// Of the initial states, (B, C, N).
    pub dinit: Option<&'a mut [f32]>,
}

/// Gradients of the four parameters, each (C, N).
pub struct EmaParameterGrads<'a> {
    /// Of α.
    pub alpha: &'a mut [f32],
    /// Of δ.
    pub delta: &'a mut [f32],
    /// Of β.
    pub beta: &'a mut [f32],
    /// Of η.
    pub eta: &'a mut [f32],
}

/// Coefficients of a panel, (states rounded up, 16): decay 1 − αδ, input αβ, output η.
struct Coefficients {
    q: Vec<[f32; WIDTH]>,
    p: Vec<[f32; WIDTH]>,
    e: Vec<[f32; WIDTH]>,
}

/// Buffers of one worker.
struct Scratch {
    u: Vec<[f32; WIDTH]>,
    y: Vec<[f32; WIDTH]>,
    du: Vec<[f32; WIDTH]>,
    h: Vec<[f32; WIDTH]>,
    r: Vec<[f32; WIDTH]>,
    /// States at the start of every piece.
    marks: Vec<[f32; WIDTH]>,
    sums: [Vec<[f32; WIDTH]>; 3],
}

impl Scratch {
    fn new(states: usize) -> Self {
        let zeros = |n: usize| vec![[0.0; WIDTH]; n];
        Self {
            u: zeros(STEPS),
            y: zeros(STEPS),
            du: zeros(STEPS),
            h: zeros(states),
            r: zeros(states),
            marks: Vec::new(),
            sums: [zeros(states), zeros(states), zeros(states)],
        }
    }
}

/// Memory that tasks write disjoint elements of.
struct Shared<T>(*mut T);
// SAFETY: a task writes the elements of its own channels only.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

impl<'a> DampedEma<'a> {
    /// α, δ, β and η of `channels` channels.
    pub fn new(
        alpha: &'a [f32],
        delta: &'a [f32],
        beta: &'a [f32],
        eta: &'a [f32],
        channels: usize,
        isa: Isa,
    ) -> Result<Self> {
        const OP: &str = "damped_ema";
        let states = alpha.len().checked_div(channels).unwrap_or(0);
        same(OP, "elements", "alpha", alpha.len(), "channels x states", channels * states)?;
        for (name, x) in [("delta", delta), ("beta", beta), ("eta", eta)] {
            same(OP, "elements", name, x.len(), "alpha", alpha.len())?;
        }
        Ok(Self { alpha, delta, beta, eta, channels, states, isa: isa.min(Isa::detect()) })
    }

    /// States a channel, N.
    pub fn states(&self) -> usize {
        self.states
    }

    fn rounded(&self) -> usize {
        self.states.next_multiple_of(TOGETHER)
    }

    fn coefficients(&self, unit: Unit) -> Coefficients {
        let n = self.rounded();
        let make = |value: &dyn Fn(usize) -> f32| -> Vec<[f32; WIDTH]> {
            let one = |i: usize| unit.spread(self.channels, |c| value(c * self.states + i));
            (0..n).map(|i| if i < self.states { one(i) } else { [0.0; WIDTH] }).collect()
        };
        Coefficients {
            q: make(&|j| 1.0 - self.alpha[j] * self.delta[j]),
            p: make(&|j| self.alpha[j] * self.beta[j]),
            e: make(&|j| self.eta[j]),
        }
    }

    fn check(
        &self,
        op: &'static str,
        u: [usize; 3],
        y: (&'static str, [usize; 3]),
        states: [Option<usize>; 2],
    ) -> Result<()> {
        for (i, dim) in ["batch", "channels", "time"].into_iter().enumerate() {
            same(op, dim, y.0, y.1[i], "u", u[i])?;
        }
        same(op, "channels", "u", u[1], "alpha", self.channels)?;
        for (len, name) in states.into_iter().zip(["initial states", "final states"]) {
            len.map_or(Ok(()), |len| {
                same(op, "elements", name, len, "batch x channels x states", u[0] * self.channels * self.states)
            })?;
        }
        Ok(())
    }

    /// States of (b, unit) out of (B, C, N) memory; zeros without one.
    fn load_states(&self, from: Option<&[f32]>, b: usize, unit: Unit, h: &mut [[f32; WIDTH]]) {
        h.fill([0.0; WIDTH]);
        let Some(from) = from else { return };
        for (i, h) in h.iter_mut().enumerate().take(self.states) {
            *h = unit.spread(self.channels, |c| from[(b * self.channels + c) * self.states + i]);
        }
    }

    /// # Safety
    /// `to` has (B, C, N) elements, and the channels of (b, unit) are this thread's own.
    unsafe fn store_states(&self, to: &Shared<f32>, b: usize, unit: Unit, h: &[[f32; WIDTH]]) {
        for (lane, c) in unit.channels(self.channels).enumerate() {
            for i in 0..self.states {
                // SAFETY: by the contract.
                unsafe { *to.at((b * self.channels + c) * self.states + i) = h[i][lane] };
            }
        }
    }

    /// The recurrence: u (B, C, T) into y (B, C, T), from states `init` (B, C, N; `None`: zeros) to states `last`.
    ///
    /// A single step is a call with T = 1 whose `last` is the next call's `init`.
    pub fn forward<T: Element>(
        &self,
        u: &Signal<T>,
        init: Option<&[f32]>,
        y: &mut SignalMut<f32>,
        last: Option<&mut [f32]>,
    ) -> Result<Work> {
        self.check("damped_ema", u.shape, ("y", y.shape), [init.map(<[f32]>::len), last.as_ref().map(|x| x.len())])?;
        let [batch, channels, t] = u.shape;
        let units = Unit::count(false, channels);
        let cells = y.cells();
        let last = last.map(|x| Shared(x.as_mut_ptr()));
        let elements = batch * channels * t;
        over_tasks(
            batch * units,
            elements.saturating_mul(self.states),
            || Scratch::new(self.rounded()),
            |s, task| {
                let (b, unit) = (task / units, Unit::nth(false, task % units));
                let k = self.coefficients(unit);
                self.load_states(init, b, unit, &mut s.h);
                for from in (0..t).step_by(STEPS) {
                    let len = (t - from).min(STEPS);
                    unit.gather(u, b, from..from + len, s.u.as_flattened_mut());
                    // SAFETY: the machine has `isa`; the buffers hold `len` steps.
                    unsafe { scan(self.isa, &k, &s.u[..len], &mut s.h, &mut s.y[..len]) };
                    // SAFETY: this task owns the channels of this batch row.
                    unsafe { unit.scatter(s.y.as_flattened(), &cells, b, from..from + len) };
                }
                if let Some(last) = &last {
                    // SAFETY: the length was checked; this task owns the channels.
                    unsafe { self.store_states(last, b, unit, &s.h) };
                }
            },
        );
        Ok(self.work::<T>(elements, 5, 4))
    }

    fn work<T>(&self, elements: usize, flops: u64, written: u64) -> Work {
        Work {
            flops: elements as u64 * self.states as u64 * flops,
            bytes: elements as u64 * (size_of::<T>() as u64 + written),
            ..Work::default()
        }
    }

    /// Gradients for the output gradient `dy` (B, C, T) and `dlast` of the final states (B, C, N).
    ///
    /// States are computed again from marks 64 steps apart, so memory is O(T·N/64) a worker.
    pub fn backward<T: Element>(
        &self,
        u: &Signal<T>,
        init: Option<&[f32]>,
        dy: &Signal<f32>,
        dlast: Option<&[f32]>,
        grads: EmaGrads,
    ) -> Result<Work> {
        const OP: &str = "damped_ema backward";
        self.check(OP, u.shape, ("dy", dy.shape), [init.map(<[f32]>::len), dlast.map(<[f32]>::len)])?;
        if let Some(du) = &grads.du {
            self.check(OP, u.shape, ("du", du.shape), [grads.dinit.as_ref().map(|x| x.len()), None])?;
        }
        let [batch, channels, t] = u.shape;
        let n = self.rounded();
        let units = Unit::count(false, channels);
        let du = grads.du.map(|x| x.cells());
        let dinit = match grads.dinit {
            Some(x) => {
                same(OP, "elements", "dinit", x.len(), "batch x channels x states", batch * channels * self.states)?;
                Some(Shared(x.as_mut_ptr()))
            }
            None => None,
        };
        // dp, dq, de of each (channel, state), summed over batch and time.
        let mut sums = vec![[0f64; 3]; channels * self.states];
        let total = Shared(sums.as_mut_ptr());
        let elements = batch * channels * t;
        over_tasks(
            units,
            elements.saturating_mul(self.states),
            || Scratch::new(n),
            |s, task| {
                let unit = Unit::nth(false, task);
                let k = self.coefficients(unit);
                for b in 0..batch {
                    self.load_states(init, b, unit, &mut s.h);
                    s.marks.clear();
                    for from in (0..t).step_by(STEPS) {
                        let len = (t - from).min(STEPS);
                        s.marks.extend_from_slice(&s.h);
                        unit.gather(u, b, from..from + len, s.u.as_flattened_mut());
                        // SAFETY: the machine has `isa`; the buffers hold `len` steps.
                        unsafe { scan(self.isa, &k, &s.u[..len], &mut s.h, &mut s.y[..len]) };
                    }
                    self.load_states(dlast, b, unit, &mut s.r);
                    for piece in (0..t.div_ceil(STEPS)).rev() {
                        let from = piece * STEPS;
                        let len = (t - from).min(STEPS);
                        unit.gather(u, b, from..from + len, s.u.as_flattened_mut());
                        unit.gather(dy, b, from..from + len, s.y.as_flattened_mut());
                        let Scratch { u, y, du: out, r, marks, sums, .. } = &mut *s;
                        let marks = &marks[piece * n..(piece + 1) * n];
                        // SAFETY: the machine has `isa`; the buffers hold `len` steps.
                        unsafe { scan_back(self.isa, &k, &u[..len], &y[..len], marks, r, &mut out[..len], sums) };
                        for (lane, c) in unit.channels(channels).enumerate() {
                            for i in 0..self.states {
                                // SAFETY: this task owns the channel.
                                let at = unsafe { &mut *total.at(c * self.states + i) };
                                for j in 0..3 {
                                    at[j] += f64::from(sums[j][i][lane]);
                                }
                            }
                        }
                        if let Some(cells) = &du {
                            // SAFETY: this task owns the channels.
                            unsafe { unit.scatter(out.as_flattened(), cells, b, from..from + len) };
                        }
                    }
                    if let Some(dinit) = &dinit {
                        // SAFETY: the length was checked; this task owns the channels.
                        unsafe { self.store_states(dinit, b, unit, &s.r) };
                    }
                }
            },
        );
        if let Some(g) = grads.parameters {
            for (name, x) in [("dalpha", &g.alpha), ("ddelta", &g.delta), ("dbeta", &g.beta), ("deta", &g.eta)] {
                same(OP, "elements", name, x.len(), "alpha", self.alpha.len())?;
            }
            for (j, [dp, dq, de]) in sums.into_iter().enumerate() {
                let [a, d, b] = [self.alpha[j], self.delta[j], self.beta[j]].map(f64::from);
                g.alpha[j] = (b * dp - d * dq) as f32;
                g.delta[j] = (-a * dq) as f32;
                g.beta[j] = (a * dp) as f32;
                g.eta[j] = de as f32;
            }
        }
        Ok(self.work::<T>(elements, 18, 8))
    }

    /// The filter (C, len) for [`super::long_conv`]: the answer to an impulse.
    pub fn kernel(&self, len: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.channels * len];
        let impulse = impulse(len);
        let u = Signal::new("impulse", &impulse, [1, self.channels, len], [0, 0, 1])?;
        self.forward(&u, None, &mut SignalMut::channel_major("kernel", &mut out, [1, self.channels, len])?, None)?;
        Ok(out)
    }

    /// Parameter gradients for the gradient `dkernel` (C, len) of [`DampedEma::kernel`].
    pub fn kernel_backward(&self, dkernel: &[f32], len: usize, grads: EmaParameterGrads) -> Result<Work> {
        let impulse = impulse(len);
        let u = Signal::new("impulse", &impulse, [1, self.channels, len], [0, 0, 1])?;
        let dy = Signal::channel_major("dkernel", dkernel, [1, self.channels, len])?;
        self.backward(&u, None, &dy, None, EmaGrads { parameters: Some(grads), ..EmaGrads::default() })
    }
}

/// 1, 0, 0, …
fn impulse(len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    x.iter_mut().take(1).for_each(|x| *x = 1.0);
    x
}

with_isa!(simd, unsafe fn scan => scan_on(
    k: &Coefficients, u: &[[f32; WIDTH]], h: &mut [[f32; WIDTH]], y: &mut [[f32; WIDTH]]
));
with_isa!(simd, unsafe fn scan_back => scan_back_on(
    k: &Coefficients, u: &[[f32; WIDTH]], dy: &[[f32; WIDTH]], marks: &[[f32; WIDTH]], r: &mut [[f32; WIDTH]],
    du: &mut [[f32; WIDTH]], sums: &mut [Vec<[f32; WIDTH]>; 3]
));

/// `N` vectors of consecutive states at lane `at`.
///
/// # Safety
/// As in [`crate::simd`]; `x` has states `i..i + N`.
#[inline(always)]
unsafe fn some<S: Simd, const N: usize>(x: &[[f32; WIDTH]], i: usize, at: usize) -> [S::V; N] {
    // SAFETY: by the contract; a state has 16 lanes.
    unsafe {
        let mut v = [S::splat(0.0); N];
        for (j, v) in v.iter_mut().enumerate() {
            *v = S::load(x.get_unchecked(i + j).as_ptr().add(at));
        }
        v
    }
}

/// Advance all states over the steps of `u`, and project.
///
/// # Safety
/// As in [`crate::simd`]; as many states in `h` as in `k`, as many steps in `y` as in `u`.
#[inline(always)]
unsafe fn scan_on<S: Simd>(k: &Coefficients, u: &[[f32; WIDTH]], h: &mut [[f32; WIDTH]], y: &mut [[f32; WIDTH]]) {
    if h.is_empty() {
        y.fill([0.0; WIDTH]);
    }
    for i in (0..h.len()).step_by(TOGETHER) {
        for at in (0..WIDTH).step_by(S::LANES) {
            // SAFETY: by the contract.
            unsafe {
                let q = some::<S, TOGETHER>(&k.q, i, at);
                let p = some::<S, TOGETHER>(&k.p, i, at);
                let e = some::<S, TOGETHER>(&k.e, i, at);
                let mut x = some::<S, TOGETHER>(h, i, at);
                for t in 0..u.len() {
                    let ut = S::load(u.get_unchecked(t).as_ptr().add(at));
                    let yt = y.get_unchecked_mut(t).as_mut_ptr().add(at);
                    let mut acc = if i == 0 { S::splat(0.0) } else { S::load(yt) };
                    for j in 0..TOGETHER {
                        x[j] = S::fma(q[j], x[j], S::mul(p[j], ut));
                        acc = S::fma(e[j], x[j], acc);
                    }
                    S::store(yt, acc);
                }
                for (j, x) in x.into_iter().enumerate() {
                    S::store(h.get_unchecked_mut(i + j).as_mut_ptr().add(at), x);
                }
            }
        }
    }
}

/// The adjoint of [`scan_on`] over one piece. `r` carries what later steps give to the state; `sums` becomes dp, dq
/// and de of this piece.
///
/// # Safety
/// As for [`scan_on`]; at most [`STEPS`] steps.
#[inline(always)]
unsafe fn scan_back_on<S: Simd>(
    k: &Coefficients,
    u: &[[f32; WIDTH]],
    dy: &[[f32; WIDTH]],
    marks: &[[f32; WIDTH]],
    r: &mut [[f32; WIDTH]],
    du: &mut [[f32; WIDTH]],
    sums: &mut [Vec<[f32; WIDTH]>; 3],
) {
    const PAIR: usize = 2;
    if r.is_empty() {
        du.fill([0.0; WIDTH]);
    }
    for i in (0..r.len()).step_by(PAIR) {
        for at in (0..WIDTH).step_by(S::LANES) {
            // SAFETY: by the contract; the trace has room for STEPS + 1 steps.
            unsafe {
                let q = some::<S, PAIR>(&k.q, i, at);
                let p = some::<S, PAIR>(&k.p, i, at);
                let e = some::<S, PAIR>(&k.e, i, at);
                let mut x = some::<S, PAIR>(marks, i, at);
                let mut trace = [[S::splat(0.0); PAIR]; STEPS + 1];
                trace[0] = x;
                for t in 0..u.len() {
                    let ut = S::load(u.get_unchecked(t).as_ptr().add(at));
                    for j in 0..PAIR {
                        x[j] = S::fma(q[j], x[j], S::mul(p[j], ut));
                    }
                    *trace.get_unchecked_mut(t + 1) = x;
                }
                let mut back = some::<S, PAIR>(r, i, at);
                let zero = [S::splat(0.0); PAIR];
                let (mut dp, mut dq, mut de) = (zero, zero, zero);
                for t in (0..u.len()).rev() {
                    let ut = S::load(u.get_unchecked(t).as_ptr().add(at));
                    let dyt = S::load(dy.get_unchecked(t).as_ptr().add(at));
                    let dut = du.get_unchecked_mut(t).as_mut_ptr().add(at);
                    let (before, after) = (*trace.get_unchecked(t), *trace.get_unchecked(t + 1));
                    let mut acc = if i == 0 { S::splat(0.0) } else { S::load(dut) };
                    for j in 0..PAIR {
                        let g = S::fma(e[j], dyt, back[j]);
                        acc = S::fma(p[j], g, acc);
                        dp[j] = S::fma(g, ut, dp[j]);
                        dq[j] = S::fma(g, before[j], dq[j]);
                        de[j] = S::fma(dyt, after[j], de[j]);
                        back[j] = S::mul(q[j], g);
                    }
                    S::store(dut, acc);
                }
                for j in 0..PAIR {
                    S::store(r.get_unchecked_mut(i + j).as_mut_ptr().add(at), back[j]);
                    S::store(sums[0].get_unchecked_mut(i + j).as_mut_ptr().add(at), dp[j]);
                    S::store(sums[1].get_unchecked_mut(i + j).as_mut_ptr().add(at), dq[j]);
                    S::store(sums[2].get_unchecked_mut(i + j).as_mut_ptr().add(at), de[j]);
                }
            }
        }
    }
}
