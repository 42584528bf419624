//! Convolution with a filter as long as the sequence, by fast transform, forward and backward.
//!
//! `y[c, t] = Σ_s h[c, s] · u[c, t − s] + d[c] · u[c, t]`: the mixer of H3 and Hyena (Poli et al. 2023, arXiv
//! 2302.10866), SGConv (Li et al. 2022, arXiv 2210.09298) and any kernel form of a linear recurrence. The cost is
//! O(T log T) a channel. One channel stays in a core's cache from its samples to its result: nothing between
//! the two transforms goes to memory. A filter much shorter than the sequence is applied block by block
//! (overlap-save); the block is chosen by counted operations.

use super::cyclic::Cyclic;
use super::lines::Lines;
use super::over_tasks;
use super::ring::{Ring, sizes};
use super::signal::{Cells, Signal, SignalMut};
use crate::error::{KernelError, Result, same};
use crate::isa::Isa;
use crate::view::Element;
use crate::work::Work;
use rayon::prelude::*;
use std::ops::Range;

/// What lies before the first sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Zeros: an output sees its own and earlier inputs.
    Causal,
    /// The other end of the sequence; the filter may be at most as long as the sequence.
    Circular,
}

/// The transform of a window.
enum Transform {
    /// Modulo x²ⁿ + 1: linear as far as nothing wraps.
    Ring(Ring),
    /// The whole sequence in a circle.
    Cyclic(Cyclic),
}

impl Transform {
    /// f32 of a window or its spectrum.
    fn len(&self) -> usize {
        match self {
            Transform::Ring(r) => 2 * r.n,
            Transform::Cyclic(c) => c.len(),
        }
    }

    /// Complex points.
    fn points(&self) -> usize {
        match self {
            Transform::Ring(r) => r.n,
            Transform::Cyclic(c) => c.points(),
        }
    }

    fn flops(&self) -> u64 {
        match self {
            Transform::Ring(r) => r.flops(),
            Transform::Cyclic(c) => c.flops(),
        }
    }

    /// Factor that results want.
    fn scale(&self) -> f32 {
        match self {
            Transform::Ring(r) => 1.0 / r.n as f32,
            Transform::Cyclic(_) => 1.0,
        }
    }

    fn forward(&self, x: &mut [f32]) {
        match self {
            Transform::Ring(r) => {
                let (re, im) = x.split_at_mut(r.n);
                r.forward(re, im);
            }
            Transform::Cyclic(c) => c.forward(x),
        }
    }

    fn inverse(&self, x: &mut [f32]) {
        match self {
            Transform::Ring(r) => {
                let (re, im) = x.split_at_mut(r.n);
                r.inverse(re, im);
            }
            Transform::Cyclic(c) => c.inverse(x),
        }
    }

    fn convolve(&self, x: &mut [f32], h: &[f32]) {
        match self {
            Transform::Ring(r) => {
                let (re, im) = x.split_at_mut(r.n);
                r.convolve(re, im, h.split_at(r.n));
            }
            Transform::Cyclic(c) => c.convolve(x, h),
        }
    }

    fn correlate_back(&self, x: &mut [f32], h: &[f32]) {
        match self {
            Transform::Ring(r) => {
                let (re, im) = x.split_at_mut(r.n);
                r.correlate_back(re, im, h.split_at(r.n));
            }
            Transform::Cyclic(c) => c.correlate_back(x, h),
        }
    }

    fn correlate(&self, a: &[f32], b: &[f32], acc: &mut [f32]) {
        match self {
            Transform::Ring(r) => r.correlate(a.split_at(r.n), b.split_at(r.n), acc.split_at_mut(r.n)),
            Transform::Cyclic(c) => c.correlate(a, b, acc),
        }
    }
}

/// How one call cuts its sequence, and the transform for it.
struct Cut {
    boundary: Boundary,
    t: usize,
    l: usize,
    transform: Transform,
    /// Place of a window's first sample in its buffer, and samples of it before the first output.
    first: usize,
    lead: usize,
    /// Outputs of a window.
    block: usize,
    blocks: usize,
}

impl Cut {
    fn new(op: &'static str, t: usize, l: usize, boundary: Boundary, isa: Isa) -> Result<Self> {
        let param = |name, value: usize, remedy: &str| {
            Err(KernelError::Param { op, name, value: value.to_string(), remedy: remedy.into() })
        };
        if l == 0 {
            return param("filter length", l, "give a filter of at least one tap");
        }
        if boundary == Boundary::Circular && l > t {
            return param("filter length", l, &format!("a circular filter has at most the {t} taps of the sequence"));
        }
        // Taps beyond the sequence meet no sample.
        let seen = l.min(t.max(1));
        let all = t + seen - 1;
        if all > 1 << 40 {
            return param("time", t, "cut the sequence; a transform of this length is out of reach");
        }
        let blocks_of = |n: usize| if 2 * n >= all { 1 } else { t.div_ceil(2 * n - seen + 1) };
        // Passes and the product, per point; copying in and out weighs about four passes.
        let cost = |n: usize| blocks_of(n) as f64 * n as f64 * ((n as f64).log2() + 4.0);
        let fitting = sizes().filter(|&n| 2 * n > seen).take_while(|&n| n < 2 * all.max(sizes().next().unwrap_or(1)));
        let n = fitting.min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(256);
        // A circle of its own length, if it can be had: half the points, and a pass more in and out.
        if boundary == Boundary::Circular
            && let Some(c) = Cyclic::new(t, isa)
            && c.points() as f64 * ((c.points() as f64).log2() + 6.0) < cost(n)
        {
            let first = c.first();
            return Ok(Self {
                boundary,
                t,
                l: seen,
                transform: Transform::Cyclic(c),
                first,
                lead: 0,
                block: t,
                blocks: 1,
            });
        }
        let blocks = blocks_of(n);
        let whole = blocks == 1;
        let lead = if whole && boundary == Boundary::Causal { 0 } else { seen - 1 };
        let block = if whole { t } else { 2 * n - seen + 1 };
        Ok(Self { boundary, t, l: seen, transform: Transform::Ring(Ring::new(n, isa)), first: 0, lead, block, blocks })
    }

    fn outputs(&self, block: usize) -> Range<usize> {
        block * self.block..((block + 1) * self.block).min(self.t)
    }

    /// The window of a block of outputs: sample p is time start + p; outside is zero or wraps.
    fn load<T: Element>(&self, x: Row<T>, block: usize, window: &mut [f32]) {
        let start = (block * self.block) as isize - self.lead as isize;
        self.fill(x, start, &mut window[self.first..]);
    }

    fn fill<T: Element>(&self, x: Row<T>, start: isize, out: &mut [f32]) {
        let t = self.t as isize;
        if self.boundary == Boundary::Causal {
            let (from, to) = (start.clamp(0, t), (start + out.len() as isize).clamp(0, t));
            let (head, body) = ((from - start).clamp(0, out.len() as isize) as usize, (to - from) as usize);
            out[..head].fill(0.0);
            x.copy(from as usize, &mut out[head..head + body]);
            out[head + body..].fill(0.0);
            return;
        }
        let (mut at, mut done) = (start.rem_euclid(t) as usize, 0);
        // Samples past the block's last input are computed but not read; they may wrap as often as they like.
        while done < out.len() {
            let n = (self.t - at).min(out.len() - done);
            x.copy(at, &mut out[done..done + n]);
            done += n;
            at = 0;
        }
    }

    /// Only the samples of the block's own outputs, where [`Cut::load`] has them.
    fn load_block<T: Element>(&self, x: Row<T>, block: usize, window: &mut [f32]) {
        window.fill(0.0);
        let outs = self.outputs(block);
        x.copy(outs.start, &mut window[self.first + self.lead..][..outs.len()]);
    }

    /// Spectrum of a filter's taps.
    fn load_filter(&self, h: Row<f32>, spectrum: &mut [f32]) {
        spectrum.fill(0.0);
        h.copy(0, &mut spectrum[self.first..][..self.l]);
        self.transform.forward(spectrum);
    }

    /// Add what a block's output gradients give to the inputs of its window.
    fn add_back(&self, out: &mut [f32], block: usize, window: &[f32]) {
        let start = (block * self.block) as isize - self.lead as isize;
        let (scale, t) = (self.transform.scale(), self.t as isize);
        let samples = &window[self.first..][..self.lead + self.outputs(block).len()];
        let mut p = 0;
        while p < samples.len() {
            let at = start + p as isize;
            let at = if self.boundary == Boundary::Circular { at.rem_euclid(t) } else { at };
            if at < 0 {
                // Before the sequence: what was read there were zeros.
                p += at.unsigned_abs();
                continue;
            }
            if at >= t {
                break;
            }
            let len = (samples.len() - p).min((t - at) as usize);
            out[at as usize..][..len].iter_mut().zip(&samples[p..p + len]).for_each(|(o, x)| *o += scale * x);
            p += len;
        }
    }

    /// out = the window's samples from `lead` on.
    fn store(&self, out: &mut [f32], window: &[f32], lead: usize) {
        let scale = self.transform.scale();
        out.iter_mut().zip(&window[self.first + lead..]).for_each(|(o, x)| *o = x * scale);
    }
}

/// Elements of one channel, side by side or apart.
#[derive(Clone, Copy)]
enum Row<'a, T> {
    Flat(&'a [T]),
    Wide(&'a [f32]),
}

impl<T: Element> Row<'_, T> {
    fn copy(&self, from: usize, out: &mut [f32]) {
        let part = from..from + out.len();
        match self {
            Row::Flat(x) => out.iter_mut().zip(&x[part]).for_each(|(o, x)| *o = x.to_f32()),
            Row::Wide(x) => out.copy_from_slice(&x[part]),
        }
    }
    fn get(&self, t: usize) -> f32 {
        match self {
            Row::Flat(x) => x[t].to_f32(),
            Row::Wide(x) => x[t],
        }
    }
}

/// Channels that share cache lines when time is not the innermost axis.
const GROUP: usize = 16;

/// Copies of a group of channels, time innermost, for signals that have it elsewhere.
#[derive(Default)]
struct Stage(Vec<f32>);

impl Stage {
    /// Bring in the channels of a strided signal.
    fn gather<T: Element>(&mut self, x: &Signal<T>, b: usize, cs: Range<usize>) {
        let t = x.shape[2];
        if x.strides[2] == 1 || t <= 1 {
            return;
        }
        self.0.resize(GROUP * t, 0.0);
        for i in 0..t {
            for (k, c) in cs.clone().enumerate() {
                self.0[k * t + i] = x.at(b, c, i).to_f32();
            }
        }
    }

    fn row<'a, T: Element>(&'a self, x: &Signal<'a, T>, b: usize, c: usize, first: usize) -> Row<'a, T> {
        let t = x.shape[2];
        x.row(b, c).map_or_else(|| Row::Wide(&self.0[(c - first) * t..][..t]), Row::Flat)
    }

    /// Room for the results of a group, or the channel itself.
    ///
    /// # Safety
    /// No other reference to channel (b, c) of `y` is alive.
    unsafe fn out<'a>(&'a mut self, y: &'a Cells<f32>, b: usize, c: usize, first: usize) -> &'a mut [f32] {
        let t = y.shape[2];
        if y.has_rows() {
            // SAFETY: as promised by the caller.
            return unsafe { y.row_mut(b, c) };
        }
        self.0.resize(GROUP * t, 0.0);
        &mut self.0[(c - first) * t..][..t]
    }

    /// Write a group's results to where they belong.
    ///
    /// # Safety
    /// No other thread touches these channels of `y`.
    unsafe fn scatter(&self, y: &Cells<f32>, b: usize, cs: Range<usize>) {
        let t = y.shape[2];
        if y.has_rows() {
            return;
        }
        for i in 0..t {
            for (k, c) in cs.clone().enumerate() {
                // SAFETY: the indices are below the shape; the caller owns the channels.
                unsafe { *y.ptr(b, c, i) = self.0[k * t + i] };
            }
        }
    }
}

/// Where a filter's spectrum comes from.
#[derive(Clone, Copy)]
enum Filter<'a> {
    Taps(&'a Signal<'a, f32>),
    Ready(&'a LongConv),
}

impl Filter<'_> {
    fn shape(&self) -> [usize; 2] {
        match self {
            Filter::Taps(h) => [h.shape[0], h.shape[1]],
            Filter::Ready(p) => p.filters,
        }
    }
}

/// Buffers of one worker: windows of one length.
struct Scratch {
    lines: Lines,
    ins: Stage,
    grads: Stage,
    outs: Stage,
}

impl Scratch {
    fn new(len: usize, windows: usize) -> Self {
        let [ins, grads, outs] = [Stage::default(), Stage::default(), Stage::default()];
        Self { lines: Lines::zeroed(len * windows), ins, grads, outs }
    }
}

/// A filter's spectra, made once and used by many calls of one length.
///
/// ```
/// use foveal_kernels::Isa;
/// use foveal_kernels::conv::{Boundary, LongConv, Signal, SignalMut};
/// let h = Signal::channel_major("h", &[1.0, 0.5, 0.25], [1, 1, 3]).unwrap();
/// let conv = LongConv::new(&h, 4, Boundary::Causal, Isa::active()).unwrap();
/// let u = Signal::channel_major("u", &[1.0f32, 0.0, 0.0, 2.0], [1, 1, 4]).unwrap();
/// let mut y = [0.0; 4];
/// conv.forward(&u, None, &mut SignalMut::channel_major("y", &mut y, [1, 1, 4]).unwrap()).unwrap();
/// assert!(y.iter().zip([1.0, 0.5, 0.25, 2.0]).all(|(y, want)| (y - want).abs() < 1e-6));
/// ```
pub struct LongConv {
    cut: Cut,
    /// Batch (1 = shared) and channels of the filter.
    filters: [usize; 2],
    /// Taps of the caller's filter, of which the sequence may see less.
    taps: usize,
    /// Real and imaginary parts, one filter after the other.
    spectra: Lines,
}

impl LongConv {
    /// Transform `h`, (1 or B, C, L), for sequences of `t` samples.
    pub fn new(h: &Signal<f32>, t: usize, boundary: Boundary, isa: Isa) -> Result<Self> {
        let cut = Cut::new("long_conv", t, h.shape[2], boundary, isa)?;
        let len = cut.transform.len();
        let filters = [h.shape[0], h.shape[1]];
        let mut spectra = Lines::zeroed(len * filters[0] * filters[1]);
        spectra.as_mut_slice().par_chunks_exact_mut(len).enumerate().for_each(|(i, x)| {
            cut.load_filter(taps(h, i / filters[1], i % filters[1], &mut Vec::new()), x);
        });
        Ok(Self { cut, filters, taps: h.shape[2], spectra })
    }

    /// Bytes of the spectra.
    pub fn bytes(&self) -> usize {
        4 * self.spectra.as_slice().len()
    }

    /// y = h ∗ u + d·u for u and y of shape (B, C, T). `d` (C) is the skip; `None` is zero.
    pub fn forward<T: Element>(&self, u: &Signal<T>, d: Option<&[f32]>, y: &mut SignalMut<f32>) -> Result<Work> {
        check("long_conv", &self.cut, self.filters, u, d, y.shape, "y")?;
        Ok(forward(&self.cut, Filter::Ready(self), u, d, y))
    }

    /// Gradients for the output gradient `dy` (B, C, T).
    pub fn backward<T: Element>(
        &self,
        u: &Signal<T>,
        d: Option<&[f32]>,
        dy: &Signal<f32>,
        grads: LongGrads,
    ) -> Result<Work> {
        check("long_conv backward", &self.cut, self.filters, u, d, dy.shape, "dy")?;
        backward(&self.cut, self.taps, Filter::Ready(self), u, d, dy, grads)
    }
}

/// Gradients of a long convolution; what is not asked for is not computed. Each is overwritten.
#[derive(Default)]
pub struct LongGrads<'a, 'b> {
    /// Of the input, (B, C, T).
    pub du: Option<&'a mut SignalMut<'b, f32>>,
    /// Of the filter, contiguous (1 or B, C, L); summed over the batch where the filter is shared.
    pub dh: Option<&'a mut [f32]>,
    /// Of the skip, (C).
    pub dd: Option<&'a mut [f32]>,
}

/// y = h ∗ u + d·u, for h (1 or B, C, L), u and y (B, C, T), d (C) or none.
///
/// Each filter is transformed where it is used and its spectrum forgotten: this is the form for training,
/// where a filter changes with every call; [`LongConv`] keeps spectra.
pub fn long_conv<T: Element>(
    h: &Signal<f32>,
    u: &Signal<T>,
    d: Option<&[f32]>,
    y: &mut SignalMut<f32>,
    boundary: Boundary,
    isa: Isa,
) -> Result<Work> {
    let cut = Cut::new("long_conv", u.shape[2], h.shape[2], boundary, isa)?;
    check("long_conv", &cut, [h.shape[0], h.shape[1]], u, d, y.shape, "y")?;
    Ok(forward(&cut, Filter::Taps(h), u, d, y))
}

/// Gradients of [`long_conv`] for the output gradient `dy` (B, C, T).
pub fn long_conv_backward<T: Element>(
    h: &Signal<f32>,
    u: &Signal<T>,
    d: Option<&[f32]>,
    dy: &Signal<f32>,
    grads: LongGrads,
    boundary: Boundary,
    isa: Isa,
) -> Result<Work> {
    let cut = Cut::new("long_conv backward", u.shape[2], h.shape[2], boundary, isa)?;
    check("long_conv backward", &cut, [h.shape[0], h.shape[1]], u, d, dy.shape, "dy")?;
    backward(&cut, h.shape[2], Filter::Taps(h), u, d, dy, grads)
}

fn check<T: Element>(
    op: &'static str,
    cut: &Cut,
    [hb, hc]: [usize; 2],
    u: &Signal<T>,
    d: Option<&[f32]>,
    y: [usize; 3],
    y_name: &'static str,
) -> Result<()> {
    for (i, dim) in ["batch", "channels", "time"].into_iter().enumerate() {
        same(op, dim, y_name, y[i], "u", u.shape[i])?;
    }
    same(op, "time", "u", u.shape[2], "the plan", cut.t)?;
    same(op, "channels", "h", hc, "u", u.shape[1])?;
    if hb != 1 {
        same(op, "batch", "h (1 is shared)", hb, "u", u.shape[0])?;
    }
    d.map_or(Ok(()), |d| same(op, "channels", "d", d.len(), "u", u.shape[1]))
}

/// The taps of a filter, brought together in `stage` if they lie apart.
fn taps<'a>(h: &Signal<'a, f32>, b: usize, c: usize, stage: &'a mut Vec<f32>) -> Row<'a, f32> {
    if let Some(row) = h.row(b, c) {
        return Row::Flat(row);
    }
    stage.clear();
    stage.extend((0..h.shape[2]).map(|s| h.at(b, c, s)));
    Row::Wide(stage)
}

/// How a call is divided: a task is a group of channels, over all batch rows that share their filters.
struct Tasks {
    batch: usize,
    channels: usize,
    shared: bool,
    group: usize,
    per_row: usize,
}

impl Tasks {
    fn new([batch, channels, _]: [usize; 3], filter: &Filter, rows: bool) -> Self {
        let group = if rows { 1 } else { GROUP };
        Self { batch, channels, shared: filter.shape()[0] == 1, group, per_row: channels.div_ceil(group) }
    }

    fn count(&self) -> usize {
        self.per_row * if self.shared { 1 } else { self.batch }
    }

    /// Rooms for what a task keeps for each of its channels.
    fn rooms(&self) -> usize {
        if self.shared && self.batch > 1 { self.group } else { 1 }
    }

    /// Batch index of the filter, batch rows, channels.
    fn get(&self, task: usize) -> (usize, Range<usize>, Range<usize>) {
        let (b, g) = (task / self.per_row, task % self.per_row);
        let channels = g * self.group..((g + 1) * self.group).min(self.channels);
        (b, if self.shared { 0..self.batch } else { b..b + 1 }, channels)
    }
}

impl Filter<'_> {
    /// The spectrum of filter (b, c): kept, or made in `room` if this is its first use.
    fn spectrum<'a>(&'a self, cut: &Cut, b: usize, c: usize, first: bool, room: &'a mut [f32]) -> &'a [f32] {
        let len = cut.transform.len();
        match self {
            Filter::Ready(p) => &p.spectra.as_slice()[len * (b * p.filters[1] + c)..][..len],
            Filter::Taps(h) => {
                if first {
                    cut.load_filter(taps(h, b, c, &mut Vec::new()), room);
                }
                room
            }
        }
    }
}

fn forward<T: Element>(cut: &Cut, filter: Filter, u: &Signal<T>, d: Option<&[f32]>, y: &mut SignalMut<f32>) -> Work {
    let [batch, channels, t] = u.shape;
    if batch * channels * t == 0 {
        return Work::default();
    }
    let (n, len) = (cut.transform.points(), cut.transform.len());
    let cells = y.cells();
    let tasks = Tasks::new(u.shape, &filter, u.row(0, 0).is_some() && cells.has_rows());
    over_tasks(
        tasks.count(),
        u.shape.iter().product(),
        || Scratch::new(len, 1 + tasks.rooms()),
        |s, task| {
            let (hb, rows, cs) = tasks.get(task);
            let Scratch { lines, ins, outs, .. } = s;
            let (window, rooms) = lines.as_mut_slice().split_at_mut(len);
            for b in rows.clone() {
                ins.gather(u, b, cs.clone());
                for c in cs.clone() {
                    let room = &mut rooms[len * ((c - cs.start) % tasks.rooms())..][..len];
                    let h = filter.spectrum(cut, hb, c, b == rows.start, room);
                    let x = ins.row(u, b, c, cs.start);
                    // SAFETY: each (b, c) belongs to one task.
                    let out = unsafe { outs.out(&cells, b, c, cs.start) };
                    for block in 0..cut.blocks {
                        cut.load(x, block, window);
                        cut.transform.convolve(window, h);
                        let range = cut.outputs(block);
                        let out = &mut out[range.clone()];
                        cut.store(out, window, cut.lead);
                        if let Some(d) = d {
                            out.iter_mut().zip(range).for_each(|(o, t)| *o += d[c] * x.get(t));
                        }
                    }
                }
                // SAFETY: as above.
                unsafe { outs.scatter(&cells, b, cs.clone()) };
            }
        },
    );
    let filters = (filter.shape()[0] * channels) as u64;
    let runs = (batch * channels * cut.blocks) as u64;
    let outputs = (batch * channels * t) as u64;
    let (made, filter_bytes) = filter.work(cut, filters);
    Work {
        flops: (made + 2 * runs) * cut.transform.flops()
            + 6 * runs * n as u64
            + outputs * (1 + 2 * u64::from(d.is_some())),
        bytes: outputs * (size_of::<T>() as u64 + 4) + filter_bytes,
        tiles: runs,
        ..Work::default()
    }
}

impl Filter<'_> {
    /// Transforms of filters, and bytes read for them.
    fn work(&self, cut: &Cut, filters: u64) -> (u64, u64) {
        match self {
            Filter::Taps(_) => (filters, 4 * filters * cut.l as u64),
            Filter::Ready(_) => (0, 4 * filters * cut.transform.len() as u64),
        }
    }
}

/// `all_taps` is the length of the caller's filter, of which the sequence may see less.
fn backward<T: Element>(
    cut: &Cut,
    all_taps: usize,
    filter: Filter,
    u: &Signal<T>,
    d: Option<&[f32]>,
    dy: &Signal<f32>,
    mut grads: LongGrads,
) -> Result<Work> {
    const OP: &str = "long_conv backward";
    let [batch, channels, t] = u.shape;
    let [hb, _] = filter.shape();
    let (n, len) = (cut.transform.points(), cut.transform.len());
    if let Some(du) = &grads.du {
        for (i, dim) in ["batch", "channels", "time"].into_iter().enumerate() {
            same(OP, dim, "du", du.shape[i], "u", u.shape[i])?;
        }
    }
    if let Some(dh) = &mut grads.dh {
        same(OP, "elements", "dh", dh.len(), "h", hb * channels * all_taps)?;
        dh.fill(0.0);
    }
    if let Some(dd) = &mut grads.dd {
        same(OP, "channels", "dd", dd.len(), "u", channels)?;
        dd.fill(0.0);
    }
    if batch * channels * t == 0 {
        return Ok(Work::default());
    }
    let (want_h, want_d) = (grads.dh.is_some(), grads.dd.is_some());
    let du = grads.du.map(|x| x.cells());
    let rows = u.row(0, 0).is_some() && dy.row(0, 0).is_some() && du.is_none_or(|x| x.has_rows());
    let tasks = Tasks::new(u.shape, &filter, rows);
    // Each task owns its channels' taps, and its filters' share of dd.
    let dh = Mutable(grads.dh.as_deref_mut().map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr));
    let mut skips = vec![0f64; if want_d { hb * channels } else { 0 }];
    let dd = Mutable(skips.as_mut_ptr());
    let keep = tasks.rooms();
    over_tasks(
        tasks.count(),
        u.shape.iter().product(),
        || Scratch::new(len, 2 + 2 * keep),
        |s, task| {
            let (hb, rows, cs) = tasks.get(task);
            let Scratch { lines, ins, grads, outs, .. } = s;
            let (windows, rest) = lines.as_mut_slice().split_at_mut(2 * len);
            let (rooms, sums) = rest.split_at_mut(len * keep);
            let (xs, gs) = windows.split_at_mut(len);
            for b in rows.clone() {
                ins.gather(u, b, cs.clone());
                grads.gather(dy, b, cs.clone());
                for c in cs.clone() {
                    let slot = len * ((c - cs.start) % keep);
                    let (x, g) = (ins.row(u, b, c, cs.start), grads.row(dy, b, c, cs.start));
                    let sum = &mut sums[slot..][..len];
                    if b == rows.start {
                        sum.fill(0.0);
                    }
                    if want_d {
                        // SAFETY: (hb, c) belongs to this task.
                        unsafe { *dd.at(hb * channels + c) += dot(x, g, t) };
                    }
                    // SAFETY: each (b, c) belongs to one task.
                    let row = du.as_ref().map(|cells| unsafe { outs.out(cells, b, c, cs.start) });
                    let mut out = row.map(|out| {
                        let room = &mut rooms[slot..][..len];
                        (out, filter.spectrum(cut, hb, c, b == rows.start, room))
                    });
                    if let Some((out, _)) = &mut out {
                        out.fill(0.0);
                    }
                    for block in 0..cut.blocks {
                        if !want_h && out.is_none() {
                            break;
                        }
                        cut.load_block(g, block, gs);
                        cut.transform.forward(gs);
                        if want_h {
                            cut.load(x, block, xs);
                            cut.transform.forward(xs);
                            cut.transform.correlate(gs, xs, sum);
                        }
                        if let Some((out, h)) = &mut out {
                            cut.transform.correlate_back(gs, h);
                            cut.add_back(out, block, gs);
                        }
                    }
                    if let (Some((out, _)), Some(d)) = (&mut out, d) {
                        out.iter_mut().enumerate().for_each(|(t, o)| *o += d[c] * g.get(t));
                    }
                    if want_h && b + 1 == rows.end {
                        cut.transform.inverse(sum);
                        // SAFETY: the taps of (hb, c) belong to this task and lie inside dh, whose length was checked.
                        let taps =
                            unsafe { std::slice::from_raw_parts_mut(dh.at((hb * channels + c) * all_taps), cut.l) };
                        cut.store(taps, sum, 0);
                    }
                }
                if let Some(cells) = &du {
                    // SAFETY: as above.
                    unsafe { outs.scatter(cells, b, cs.clone()) };
                }
            }
        },
    );
    if let Some(out) = grads.dd {
        for (c, out) in out.iter_mut().enumerate() {
            *out = (0..hb).map(|b| skips[b * channels + c]).sum::<f64>() as f32;
        }
    }
    let filters = (hb * channels) as u64;
    let runs = (batch * channels * cut.blocks) as u64;
    let outputs = (batch * channels * t) as u64;
    let [want_u, want_h, want_d] = [du.is_some(), want_h, want_d].map(u64::from);
    let (made, filter_bytes) = filter.work(cut, filters);
    let transforms = (want_u | want_h) * runs + want_u * (runs + made) + want_h * (runs + filters);
    Ok(Work {
        flops: transforms * cut.transform.flops()
            + 6 * want_u * runs * n as u64
            + 8 * want_h * runs * n as u64
            + outputs * (want_u * (1 + 2 * u64::from(d.is_some())) + 2 * want_d),
        bytes: outputs * (size_of::<T>() as u64 * (want_h | want_d) + 4 + 4 * want_u)
            + want_u * filter_bytes
            + want_h * 4 * filters * cut.l as u64,
        tiles: runs,
        ..Work::default()
    })
}

/// Memory that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Mutable<T>(*mut T);
// SAFETY: tasks write disjoint elements (said where they do).
unsafe impl<T> Send for Mutable<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Mutable<T> {}
impl<T> Mutable<T> {
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

/// Σ x·g: f32 over short runs, f64 over the runs.
fn dot<T: Element>(x: Row<T>, g: Row<f32>, t: usize) -> f64 {
    let run = |i: usize| (i..(i + 64).min(t)).map(|i| x.get(i) * g.get(i)).sum::<f32>();
    (0..t).step_by(64).map(|i| f64::from(run(i))).sum()
}
