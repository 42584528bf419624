//! Short causal depthwise convolution, forward, backward and by single steps.
//!
//! `y[c, t] = act(bias[c] + Σ_k w[c, k] · x[c, t − W + 1 + k])` with act the identity or SiLU: the local mixing
//! before the recurrences of Mamba (Gu and Dao 2023, arXiv 2312.00752), Hyena and Gated DeltaNet; a token shift
//! is the case W = 2. Weights are in the order of a depthwise `conv1d`: the last tap meets the newest sample.
//! The state of a sequence is its last W − 1 inputs, (S, C, W − 1), oldest first.

use super::over_tasks;
use super::panel::{Unit, WIDTH};
use super::signal::{Signal, SignalMut};
use crate::dispatch::with_isa;
use crate::error::{KernelError, Result, same};
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::Simd;
use crate::view::Element;
use crate::work::Work;
use std::ops::Range;

/// Largest filter width.
pub const MAX_WIDTH: usize = 16;
/// f32 of a piece: input, gradient and output stay in the first cache.
const PIECE: usize = 2048;
/// Steps of the longest span that one task of a forward call takes.
const SPAN: usize = 1 << 15;

/// A depthwise filter: weights (C, W), optional bias (C), optional SiLU.
///
/// ```
/// use foveal_kernels::Isa;
/// use foveal_kernels::conv::{ShortConv, Signal, SignalMut};
/// let conv = ShortConv::new(&[0.5, 1.0], 1, None, false, Isa::active()).unwrap();
/// let x = Signal::channel_major("x", &[2.0f32, 4.0, 6.0], [1, 1, 3]).unwrap();
/// let mut y = [0.0; 3];
/// conv.forward(&x, None, None, &mut SignalMut::channel_major("y", &mut y, [1, 1, 3]).unwrap(), None).unwrap();
/// assert_eq!(y, [2.0, 5.0, 8.0]);
/// ```
#[derive(Clone, Copy)]
pub struct ShortConv<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    channels: usize,
    width: usize,
    silu: bool,
    isa: Isa,
}

/// Gradients of a short convolution; what is not asked for is not written. Each is overwritten.
#[derive(Default)]
pub struct ShortGrads<'a, 'b> {
    /// Of the input, (B, C, T).
    pub dx: Option<&'a mut SignalMut<'b, f32>>,
    /// Of the weights, (C, W).
    pub dweight: Option<&'a mut [f32]>,
    /// Of the bias, (C).
    pub dbias: Option<&'a mut [f32]>,
    /// Of the initial state, (S, C, W − 1).
    pub dpast: Option<&'a mut SignalMut<'b, f32>>,
}

/// One sequence: its batch row and its first sample there.
#[derive(Clone, Copy)]
struct Sequence {
    index: usize,
    b: usize,
    start: usize,
    len: usize,
}

impl<'a> ShortConv<'a> {
    /// `weight` is (C, W), W = `weight.len() / channels`, 1 to 16.
    pub fn new(weight: &'a [f32], channels: usize, bias: Option<&'a [f32]>, silu: bool, isa: Isa) -> Result<Self> {
        const OP: &str = "short_conv";
        let width = weight.len().checked_div(channels).unwrap_or(0);
        if width == 0 || width > MAX_WIDTH || width * channels != weight.len() {
            return Err(KernelError::Param {
                op: OP,
                name: "weight",
                value: format!("{} elements for {channels} channels", weight.len()),
                remedy: format!("give (channels, width) with a width of 1 to {MAX_WIDTH}; longer filters: long_conv"),
            });
        }
        if let Some(bias) = bias {
            same(OP, "channels", "bias", bias.len(), "weight", channels)?;
        }
        Ok(Self { weight, bias, channels, width, silu, isa: isa.min(Isa::detect()) })
    }

    /// Filter width W.
    pub fn width(&self) -> usize {
        self.width
    }

    fn sequences(&self, op: &'static str, shape: [usize; 3], cu: Option<&[usize]>) -> Result<Vec<Sequence>> {
        let [batch, channels, t] = shape;
        same(op, "channels", "x", channels, "weight", self.channels)?;
        let Some(cu) = cu else {
            return Ok((0..batch).map(|b| Sequence { index: b, b, start: 0, len: t }).collect());
        };
        let bad = |value: String, remedy: &str| {
            Err(KernelError::Param { op, name: "cu_seqlens", value, remedy: remedy.into() })
        };
        if batch != 1 {
            return bad(format!("a batch of {batch}"), "packed sequences come as one batch row");
        }
        if cu.first() != Some(&0) || cu.last() != Some(&t) || cu.windows(2).any(|w| w[0] > w[1]) {
            let ends = (cu.first(), cu.last());
            return bad(format!("{ends:?} of {t} samples"), "start at 0, never fall, end at the number of samples");
        }
        let sequence = |(index, w): (usize, &[usize])| Sequence { index, b: 0, start: w[0], len: w[1] - w[0] };
        Ok(cu.windows(2).enumerate().map(sequence).collect())
    }

    fn check_state(&self, op: &'static str, name: &'static str, shape: Option<[usize; 3]>, seqs: usize) -> Result<()> {
        let Some([s, c, w]) = shape else { return Ok(()) };
        same(op, "sequences", name, s, "x", seqs)?;
        same(op, "channels", name, c, "weight", self.channels)?;
        same(op, "time (width - 1)", name, w, "weight", self.width - 1)
    }

    /// Weights, 16-wide tap by tap, and the bias.
    fn taps(&self, unit: Unit) -> ([[f32; WIDTH]; MAX_WIDTH], [f32; WIDTH]) {
        let mut w = [[0.0; WIDTH]; MAX_WIDTH];
        for (k, w) in w.iter_mut().enumerate().take(self.width) {
            *w = unit.spread(self.channels, |c| self.weight[c * self.width + k]);
        }
        (w, unit.spread(self.channels, |c| self.bias.map_or(0.0, |b| b[c])))
    }

    /// x (B, C, T) into y (B, C, T).
    ///
    /// With `cu_seqlens` (S + 1, from 0 to T) the single batch row holds S sequences end to end; else S = B.
    /// `past` is each sequence's initial state (`None`: zeros), `last` receives its final state.
    pub fn forward<T: Element>(
        &self,
        x: &Signal<T>,
        cu_seqlens: Option<&[usize]>,
        past: Option<&Signal<f32>>,
        y: &mut SignalMut<f32>,
        last: Option<&mut SignalMut<f32>>,
    ) -> Result<Work> {
        const OP: &str = "short_conv";
        let seqs = self.sequences(OP, x.shape, cu_seqlens)?;
        for (i, dim) in ["batch", "channels", "time"].into_iter().enumerate() {
            same(OP, dim, "y", y.shape[i], "x", x.shape[i])?;
        }
        self.check_state(OP, "past", past.map(|p| p.shape), seqs.len())?;
        self.check_state(OP, "last", last.as_ref().map(|p| p.shape), seqs.len())?;
        let rows = Unit::prefers_rows(x.strides, x.shape);
        let units = Unit::count(rows, self.channels);
        let cut = |s: &Sequence| {
            let s = *s;
            (0..s.len).step_by(SPAN).map(move |t| (s, t..(t + SPAN).min(s.len)))
        };
        let spans: Vec<(Sequence, Range<usize>)> = seqs.iter().flat_map(cut).collect();
        let cells = y.cells();
        let elements = x.shape.iter().product();
        over_tasks(spans.len() * units, elements, Scratch::new, |s, task| {
            let (seq, span) = &spans[task / units];
            let unit = Unit::nth(rows, task % units);
            let (w, bias) = self.taps(unit);
            let (tap, step) = (unit.tap(), PIECE / unit.tap());
            for from in span.clone().step_by(step) {
                let len = (span.end - from).min(step);
                self.stage(x, past, seq, unit, from, len, &mut s.x);
                let n = (len * tap).next_multiple_of(WIDTH);
                let (x, y) = (s.x.as_ptr(), s.y.as_mut_ptr());
                // SAFETY: `stage` filled n elements and the W − 1 steps before them; y has room for a piece;
                // the machine has `isa`.
                unsafe { fir(self.isa, x, tap, &w[..self.width], &bias, self.silu, n, y) };
                let at = seq.start + from;
                // SAFETY: tasks have spans and channels of their own.
                unsafe { unit.scatter(&s.y, &cells, seq.b, at..at + len) };
            }
        });
        if let Some(last) = last {
            let cells = last.cells();
            for seq in &seqs {
                for c in 0..self.channels {
                    for j in 0..self.width - 1 {
                        let v = self.sample(x, past, seq, c, (seq.len + j) as isize - (self.width as isize - 1));
                        // SAFETY: indices below the checked shape; one thread.
                        unsafe { *cells.ptr(seq.index, c, j) = v };
                    }
                }
            }
        }
        Ok(self.work::<T>(elements, 1, 4))
    }

    /// Operations of `passes` such passes, `written` bytes an element.
    fn work<T>(&self, elements: usize, passes: u64, written: u64) -> Work {
        let silu = if self.silu { 4 } else { 0 };
        Work {
            flops: elements as u64 * passes * (2 * self.width as u64 + u64::from(self.bias.is_some()) + silu),
            bytes: elements as u64 * (size_of::<T>() as u64 + written),
            ..Work::default()
        }
    }

    /// Input of channel c at time t ≥ −(W − 1) of a sequence.
    fn sample<T: Element>(&self, x: &Signal<T>, past: Option<&Signal<f32>>, s: &Sequence, c: usize, t: isize) -> f32 {
        match usize::try_from(t) {
            Ok(t) => x.at(s.b, c, s.start + t).to_f32(),
            Err(_) => past.map_or(0.0, |p| p.at(s.index, c, (t + self.width as isize - 1) as usize)),
        }
    }

    /// Times `from − (W − 1) .. from + len` of a sequence to the front of `out`, then zeros to a whole vector.
    fn stage<T: Element>(
        &self,
        x: &Signal<T>,
        past: Option<&Signal<f32>>,
        seq: &Sequence,
        unit: Unit,
        from: usize,
        len: usize,
        out: &mut [f32],
    ) {
        let (lead, tap) = (self.width - 1, unit.tap());
        let before = lead.saturating_sub(from);
        for j in 0..before {
            let t = from as isize + j as isize - lead as isize;
            for (k, c) in unit.channels(self.channels).enumerate() {
                out[j * tap + k] = self.sample(x, past, seq, c, t);
            }
        }
        let at = seq.start + from + before - lead;
        let count = lead + len - before;
        unit.gather(x, seq.b, at..at + count, &mut out[before * tap..]);
        let end = (lead + len) * tap;
        out[end..end + WIDTH].fill(0.0);
    }

    /// One step: x and y are (B, C, 1), `state` (B, C, W − 1) is read and moved on by one.
    pub fn step<T: Element>(&self, x: &Signal<T>, state: &mut SignalMut<f32>, y: &mut SignalMut<f32>) -> Result<Work> {
        const OP: &str = "short_conv step";
        let [batch, channels, t] = x.shape;
        same(OP, "channels", "x", channels, "weight", self.channels)?;
        same(OP, "time", "x", t, "one step", 1)?;
        for (i, dim) in ["batch", "channels", "time"].into_iter().enumerate() {
            same(OP, dim, "y", y.shape[i], "x", x.shape[i])?;
        }
        self.check_state(OP, "state", Some(state.shape), batch)?;
        let (state, cells) = (state.cells(), y.cells());
        let units = Unit::count(false, channels);
        over_tasks(batch * units, batch * channels * self.width, Scratch::new, |s, task| {
            let (b, unit) = (task / units, Unit::nth(false, task % units));
            let (w, bias) = self.taps(unit);
            let lead = self.width - 1;
            s.x[..lead * WIDTH].fill(0.0);
            for (k, c) in unit.channels(channels).enumerate() {
                for j in 0..lead {
                    // SAFETY: indices below the checked shape; this task owns the channels.
                    s.x[j * WIDTH + k] = unsafe { *state.ptr(b, c, j) };
                }
            }
            unit.gather(x, b, 0..1, &mut s.x[lead * WIDTH..]);
            let (xs, out) = (s.x.as_ptr(), s.y.as_mut_ptr());
            // SAFETY: W steps of 16 were filled; the machine has `isa`.
            unsafe { fir(self.isa, xs, WIDTH, &w[..self.width], &bias, self.silu, WIDTH, out) };
            // SAFETY: this task owns the channels of y and of the state.
            unsafe {
                unit.scatter(&s.y, &cells, b, 0..1);
                unit.scatter(&s.x[WIDTH..], &state, b, 0..lead);
            }
        });
        Ok(self.work::<T>(batch * channels, 1, 4 + 8 * (self.width as u64 - 1)))
    }

    /// Gradients for the output gradient `dy` (B, C, T); `dlast` is the gradient of the final state.
    pub fn backward<T: Element>(
        &self,
        x: &Signal<T>,
        cu_seqlens: Option<&[usize]>,
        past: Option<&Signal<f32>>,
        dy: &Signal<f32>,
        dlast: Option<&Signal<f32>>,
        grads: ShortGrads,
    ) -> Result<Work> {
        const OP: &str = "short_conv backward";
        let seqs = self.sequences(OP, x.shape, cu_seqlens)?;
        let like_x = |name, shape: [usize; 3]| {
            for (i, dim) in ["batch", "channels", "time"].into_iter().enumerate() {
                same(OP, dim, name, shape[i], "x", x.shape[i])?;
            }
            Ok(())
        };
        like_x("dy", dy.shape)?;
        grads.dx.as_ref().map_or(Ok(()), |dx| like_x("dx", dx.shape))?;
        for (name, shape) in [
            ("past", past.map(|p| p.shape)),
            ("dlast", dlast.map(|p| p.shape)),
            ("dpast", grads.dpast.as_ref().map(|p| p.shape)),
        ] {
            self.check_state(OP, name, shape, seqs.len())?;
        }
        let width = self.width;
        if let Some(dw) = &grads.dweight {
            same(OP, "elements", "dweight", dw.len(), "weight", self.weight.len())?;
        }
        if let Some(db) = &grads.dbias {
            same(OP, "channels", "dbias", db.len(), "weight", self.channels)?;
        }
        let rows = Unit::prefers_rows(x.strides, x.shape);
        let units = Unit::count(rows, self.channels);
        let (dx, dpast) = (grads.dx.map(|x| x.cells()), grads.dpast.map(|x| x.cells()));
        let elements = x.shape.iter().product();
        // A task owns its channels over all sequences, so the sums need no second pass.
        let mut sums = vec![0f64; self.channels * (width + 1)];
        let sums_at = Sums(sums.as_mut_ptr());
        over_tasks(units, elements, Scratch::new, |s, task| {
            let unit = Unit::nth(rows, task);
            let (w, bias) = self.taps(unit);
            let mut flipped = w;
            flipped[..width].reverse();
            let (tap, step, lead) = (unit.tap(), PIECE / unit.tap(), width - 1);
            for seq in &seqs {
                // dz of the W − 1 steps after the piece at hand.
                s.carry[..lead * tap].fill(0.0);
                for piece in (0..seq.len.div_ceil(step)).rev() {
                    let from = piece * step;
                    let len = (seq.len - from).min(step);
                    let n = (len * tap).next_multiple_of(WIDTH);
                    self.stage(x, past, seq, unit, from, len, &mut s.x);
                    let at = seq.start + from;
                    unit.gather(dy, seq.b, at..at + len, &mut s.y);
                    s.y[len * tap..n].fill(0.0);
                    let mut acc = [[0f32; WIDTH]; MAX_WIDTH + 1];
                    // SAFETY: n elements of x (with the W − 1 steps before them) and of dy are filled; dz has
                    // room for a piece; the machine has `isa`.
                    unsafe {
                        let (x, dy, dz) = (s.x.as_ptr(), s.y.as_ptr(), s.dz.as_mut_ptr());
                        back(self.isa, x, dy, tap, &w[..width], &bias, self.silu, n, dz, &mut acc[..=width]);
                    }
                    for (k, acc) in acc[..=width].iter().enumerate() {
                        // SAFETY: the channels belong to this task.
                        unit.collect(self.channels, acc, |c, g| unsafe {
                            *sums_at.at(c * (width + 1) + k) += f64::from(g)
                        });
                    }
                    s.dz[len * tap..(len + lead) * tap].copy_from_slice(&s.carry[..lead * tap]);
                    s.dz[(len + lead) * tap..][..WIDTH].fill(0.0);
                    s.carry[..lead * tap].copy_from_slice(&s.dz[..lead * tap]);
                    if let Some(cells) = &dx {
                        let (dz, out) = (s.dz.as_ptr(), s.y.as_mut_ptr());
                        // SAFETY: dz holds n elements and W − 1 steps more (or zeros to a whole vector).
                        unsafe { fir(self.isa, dz, tap, &flipped[..width], &[0.0; WIDTH], false, n, out) };
                        // SAFETY: this task owns the channels.
                        unsafe { unit.scatter(&s.y, cells, seq.b, at..at + len) };
                    }
                }
                // What the first outputs give to the state before them, and the final state to its inputs.
                for (lane, c) in unit.channels(self.channels).enumerate() {
                    let past_grad = |j: usize| {
                        (0..=j).map(|k| self.weight[c * width + k] * s.carry[(j - k) * tap + lane]).sum::<f32>()
                    };
                    let tail = |j: usize| dlast.map_or(0.0, |d| d.at(seq.index, c, j));
                    for j in 0..lead {
                        if let Some(cells) = &dpast {
                            // The state may reach the final state unread, when the sequence is shorter than it.
                            let kept = if j >= seq.len { tail(j - seq.len) } else { 0.0 };
                            // SAFETY: indices below the checked shape; this task owns the channel.
                            unsafe { *cells.ptr(seq.index, c, j) = past_grad(j) + kept };
                        }
                        if let (Some(cells), Some(t)) = (&dx, (seq.len + j).checked_sub(lead)) {
                            // SAFETY: t is below the sequence's length; this task owns the channel.
                            unsafe { *cells.ptr(seq.b, c, seq.start + t) += tail(j) };
                        }
                    }
                }
            }
        });
        if let Some(dw) = grads.dweight {
            for (i, dw) in dw.iter_mut().enumerate() {
                *dw = sums[i / width * (width + 1) + i % width] as f32;
            }
        }
        if let Some(db) = grads.dbias {
            for (c, db) in db.iter_mut().enumerate() {
                *db = sums[c * (width + 1) + width] as f32;
            }
        }
        Ok(self.work::<T>(elements, if self.silu { 3 } else { 2 }, 8))
    }
}

/// Sums that tasks write disjoint elements of.
struct Sums(*mut f64);
// SAFETY: a task writes the elements of its own channels only.
unsafe impl Sync for Sums {}
impl Sums {
    fn at(&self, i: usize) -> *mut f64 {
        self.0.wrapping_add(i)
    }
}

/// Buffers of one worker: a piece, with room for the filter's reach and a vector of padding.
struct Scratch {
    x: Vec<f32>,
    y: Vec<f32>,
    dz: Vec<f32>,
    carry: Vec<f32>,
}

impl Scratch {
    fn new() -> Self {
        let room = || vec![0.0; PIECE + (MAX_WIDTH + 2) * WIDTH];
        Self { x: room(), y: room(), dz: room(), carry: vec![0.0; MAX_WIDTH * WIDTH] }
    }
}

with_isa!(simd, unsafe fn fir => fir_on(
    x: *const f32, tap: usize, w: &[[f32; WIDTH]], bias: &[f32; WIDTH], silu: bool, n: usize, y: *mut f32
));
with_isa!(simd, unsafe fn back => back_on(
    x: *const f32, dy: *const f32, tap: usize, w: &[[f32; WIDTH]], bias: &[f32; WIDTH], silu: bool, n: usize,
    dz: *mut f32, acc: &mut [[f32; WIDTH]]
));

/// 1 / (1 + e^−z)
///
/// # Safety
/// As in [`crate::simd`].
#[inline(always)]
unsafe fn sigmoid<S: Simd>(z: S::V) -> S::V {
    // SAFETY: by the contract. −88 keeps e^−z finite.
    unsafe {
        let one = S::splat(1.0);
        let e = exp::<S>(S::sub(S::splat(0.0), S::max(S::splat(-88.0), z)));
        S::div(one, S::add(one, e))
    }
}

/// bias + Σ_k w_k · x at element i and lane group `at`.
///
/// # Safety
/// As in [`crate::simd`]; `x` reaches i + at + (W − 1)·tap + LANES elements.
#[inline(always)]
unsafe fn taps_at<S: Simd>(
    x: *const f32,
    tap: usize,
    w: &[[f32; WIDTH]],
    bias: &[f32; WIDTH],
    i: usize,
    at: usize,
) -> S::V {
    // SAFETY: by the contract; a tap's weights have 16 lanes.
    unsafe {
        let mut z = S::load(bias.as_ptr().add(at));
        for (k, w) in w.iter().enumerate() {
            z = S::fma(S::load(x.add(i + at + k * tap)), S::load(w.as_ptr().add(at)), z);
        }
        z
    }
}

/// # Safety
/// As in [`crate::simd`]; n is a multiple of 16, `y` has n elements, `x` n + (W − 1)·tap.
#[inline(always)]
unsafe fn fir_on<S: Simd>(
    x: *const f32,
    tap: usize,
    w: &[[f32; WIDTH]],
    bias: &[f32; WIDTH],
    silu: bool,
    n: usize,
    y: *mut f32,
) {
    for i in (0..n).step_by(WIDTH) {
        for at in (0..WIDTH).step_by(S::LANES) {
            // SAFETY: by the contract.
            unsafe {
                let mut z = taps_at::<S>(x, tap, w, bias, i, at);
                if silu {
                    z = S::mul(z, sigmoid::<S>(z));
                }
                S::store(y.add(i + at), z);
            }
        }
    }
}

/// dz = dy · act'(z), and acc_k += dz · x_k for every tap, acc_W += dz.
///
/// # Safety
/// As for [`fir_on`]; `dy` and `dz` have n elements, `acc` W + 1 rows.
#[inline(always)]
unsafe fn back_on<S: Simd>(
    x: *const f32,
    dy: *const f32,
    tap: usize,
    w: &[[f32; WIDTH]],
    bias: &[f32; WIDTH],
    silu: bool,
    n: usize,
    dz: *mut f32,
    acc: &mut [[f32; WIDTH]],
) {
    for i in (0..n).step_by(WIDTH) {
        for at in (0..WIDTH).step_by(S::LANES) {
            // SAFETY: by the contract.
            unsafe {
                let mut g = S::load(dy.add(i + at));
                if silu {
                    let z = taps_at::<S>(x, tap, w, bias, i, at);
                    let (s, one) = (sigmoid::<S>(z), S::splat(1.0));
                    // silu' = s · (1 + z · (1 − s))
                    g = S::mul(g, S::mul(s, S::fma(z, S::sub(one, s), one)));
                }
                S::store(dz.add(i + at), g);
                for k in 0..w.len() {
                    let a = acc.get_unchecked_mut(k).as_mut_ptr().add(at);
                    S::store(a, S::fma(g, S::load(x.add(i + at + k * tap)), S::load(a)));
                }
                let a = acc.get_unchecked_mut(w.len()).as_mut_ptr().add(at);
                S::store(a, S::add(g, S::load(a)));
            }
        }
    }
}
