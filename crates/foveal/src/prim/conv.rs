//! Convolutions along time on candle tensors, with gradients: long filters by fast transform, short depthwise
//! filters, and Mega's damped moving average.
//!
//! Signals are (B, C, T) tensors on the CPU, f32 or bf16, of any strides: transpose a (B, T, C) tensor and pass it
//! on, nothing is copied. Parameters are taken as f32, outputs are f32, gradients have their argument's dtype.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Shape, Storage, Tensor, WithDType};
use foveal_kernels::conv::{
    Boundary, DampedEma, EmaGrads, EmaParameterGrads, LongGrads, ShortConv, ShortGrads, Signal, SignalMut,
    long_conv as long_kernel, long_conv_backward,
};
use foveal_kernels::{Isa, Work};
use half::bf16;
use std::sync::{Arc, Mutex};

/// A result and the work of the call that made it.
#[derive(Clone, Debug)]
pub struct Convolved {
    /// f32 (B, C, T).
    pub out: Tensor,
    /// What a next call continues from (none for long filters): the last W − 1 inputs (B, C, W − 1) of a short
    /// filter, the states (B, C, N) of an average. Tracks gradients like `out`.
    pub state: Option<Tensor>,
    /// Work of the forward call.
    pub work: Work,
}

/// Where an operation leaves its work for the caller.
#[derive(Clone, Default)]
pub(super) struct WorkCell(Arc<Mutex<Work>>);

impl WorkCell {
    pub(super) fn set(&self, work: Work) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = work;
    }
    pub(super) fn get(&self) -> Work {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Errors of a kernel inside a candle operation.
pub(super) fn wrap(e: foveal_kernels::KernelError) -> candle_core::Error {
    candle_core::Error::wrap(e)
}

/// The same for whatever error a primitive had on its way through candle.
pub(super) fn through(e: Error) -> candle_core::Error {
    match e {
        Error::Kernel(e) => wrap(e),
        other => candle_core::Error::wrap(other),
    }
}

/// A tensor the operation may read: on the CPU and of a dtype that it takes.
pub(super) fn readable(
    op: &'static str,
    name: &'static str,
    x: &Tensor,
    dims: usize,
    want: &'static str,
) -> Result<()> {
    if x.dims().len() != dims {
        return Err(Error::Shape { op, tensor: name, shape: x.dims().to_vec(), expected: want.into() });
    }
    if !matches!(x.dtype(), DType::F32 | DType::BF16) {
        return Err(Error::Dtype { op, tensor: name, dtype: format!("{:?}", x.dtype()), expected: "f32, bf16" });
    }
    if !matches!(x.device(), Device::Cpu) {
        return Err(Error::Missing {
            system: op.into(),
            what: "a CPU tensor",
            remedy: format!("move {name} to Device::Cpu; CUDA kernels are not built yet"),
        });
    }
    Ok(())
}

/// Elements of a contiguous tensor.
pub(super) fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [T]> {
    let at = layout.start_offset();
    Ok(&storage.as_slice::<T>()?[at..at + layout.shape().elem_count()])
}

/// f32 elements of a contiguous tensor.
pub(super) fn flat<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    elements(storage, layout)
}

/// A (B, C, T) view of either dtype.
enum AnySignal<'a> {
    F32(Signal<'a, f32>),
    Bf16(Signal<'a, bf16>),
}

fn signal<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<AnySignal<'a>> {
    let (d, s, at) = (layout.dims(), layout.stride(), layout.start_offset());
    let (shape, strides) = ([d[0], d[1], d[2]], [s[0], s[1], s[2]]);
    match storage {
        CpuStorage::F32(x) => Ok(AnySignal::F32(Signal::new("input", &x[at..], shape, strides).map_err(wrap)?)),
        CpuStorage::BF16(x) => Ok(AnySignal::Bf16(Signal::new("input", &x[at..], shape, strides).map_err(wrap)?)),
        other => candle_core::bail!(
            "convolution of {:?}; convert to f32 or bf16",
            candle_core::backend::BackendStorage::dtype(other)
        ),
    }
}

/// Run `$body` with `$x` bound to the view of either dtype.
macro_rules! either {
    ($signal:expr, $x:ident => $body:expr) => {
        match $signal {
            AnySignal::F32($x) => $body,
            AnySignal::Bf16($x) => $body,
        }
    };
}

/// CPU storage of a tensor that passed [`readable`].
pub(super) fn cpu(storage: &Storage) -> candle_core::Result<&CpuStorage> {
    match storage {
        Storage::Cpu(x) => Ok(x),
        _ => candle_core::bail!("convolutions and feature attention run on CPU tensors"),
    }
}

/// A gradient in its argument's shape and dtype.
pub(super) fn gradient(x: Vec<f32>, like: &Tensor) -> candle_core::Result<Option<Tensor>> {
    Ok(Some(Tensor::from_vec(x, like.shape(), &Device::Cpu)?.to_dtype(like.dtype())?))
}

/// `y[b, c, t] = Σ_s h[c, s] · u[b, c, t − s] + d[c] · u[b, c, t]`, in O(T log T).
///
/// `h` is (C, L), or (B, C, L) for a filter of each row's own; `u` (B, C, T); `d` (C), zero if absent.
pub fn long_conv(h: &Tensor, u: &Tensor, d: Option<&Tensor>, boundary: Boundary) -> Result<Convolved> {
    const OP: &str = "long_conv";
    readable(OP, "u", u, 3, "(batch, channels, time)")?;
    let h = if h.dims().len() == 2 { h.unsqueeze(0)? } else { h.clone() };
    readable(OP, "h", &h, 3, "(channels, taps) or (batch, channels, taps)")?;
    let h = h.to_dtype(DType::F32)?;
    let d = match d {
        Some(d) => {
            readable(OP, "d", d, 1, "(channels)")?;
            d.to_dtype(DType::F32)?.contiguous()?
        }
        None => Tensor::zeros(u.dims()[1], DType::F32, &Device::Cpu)?,
    };
    let work = WorkCell::default();
    let out = h.apply_op3(u, &d, LongOp { boundary, work: work.clone() })?;
    Ok(Convolved { out, state: None, work: work.get() })
}

struct LongOp {
    boundary: Boundary,
    work: WorkCell,
}

/// An f32 view of a 3-D tensor.
fn wide<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Signal<'a, f32>> {
    match signal(storage, layout)? {
        AnySignal::F32(x) => Ok(x),
        AnySignal::Bf16(_) => candle_core::bail!("a parameter of a convolution is bf16; convert it to f32"),
    }
}

impl CustomOp3 for LongOp {
    fn name(&self) -> &'static str {
        "long_conv"
    }

    fn cpu_fwd(
        &self,
        h: &CpuStorage,
        hl: &Layout,
        u: &CpuStorage,
        ul: &Layout,
        d: &CpuStorage,
        dl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (h, d) = (wide(h, hl)?, flat(d, dl)?);
        let mut y = vec![0f32; ul.shape().elem_count()];
        let work = either!(signal(u, ul)?, u => {
            let mut out = SignalMut::channel_major("y", &mut y, u.shape).map_err(wrap)?;
            long_kernel(&h, &u, Some(d), &mut out, self.boundary, Isa::active()).map_err(wrap)?
        });
        self.work.set(work);
        Ok((CpuStorage::F32(y), ul.shape().clone()))
    }

    fn bwd(
        &self,
        h: &Tensor,
        u: &Tensor,
        d: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (mut dh, mut du) = (vec![0f32; h.elem_count()], vec![0f32; u.elem_count()]);
        let mut dd = vec![0f32; d.elem_count()];
        {
            let ((hs, hl), (us, ul)) = (h.storage_and_layout(), u.storage_and_layout());
            let ((ds, dl), (gs, gl)) = (d.storage_and_layout(), dy.storage_and_layout());
            let (h, d, dy) = (wide(cpu(&hs)?, hl)?, flat(cpu(&ds)?, dl)?, wide(cpu(&gs)?, gl)?);
            either!(signal(cpu(&us)?, ul)?, u => {
                let mut out = SignalMut::channel_major("du", &mut du, u.shape).map_err(wrap)?;
                let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh), dd: Some(&mut dd) };
                long_conv_backward(&h, &u, Some(d), &dy, grads, self.boundary, Isa::active()).map_err(wrap)?
            });
        }
        Ok((gradient(dh, h)?, gradient(du, u)?, gradient(dd, d)?))
    }
}

/// Short causal depthwise convolution with optional SiLU: `y[c, t] = act(bias[c] + Σ_k w[c, k] · x[c, t − W + 1 + k])`.
///
/// `x` is (B, C, T), `weight` (C, W), `bias` (C), `past` the W − 1 inputs before the first, (B, C, W − 1), zeros if
/// absent. The returned state is the next call's `past`.
pub fn short_conv(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    silu: bool,
    past: Option<&Tensor>,
) -> Result<Convolved> {
    const OP: &str = "short_conv";
    readable(OP, "x", x, 3, "(batch, channels, time)")?;
    readable(OP, "weight", weight, 2, "(channels, width)")?;
    let ((b, c, t), (rows, width)) = (x.dims3()?, weight.dims2()?);
    let bias = match bias {
        Some(bias) => {
            readable(OP, "bias", bias, 1, "(channels)")?;
            bias.to_dtype(DType::F32)?
        }
        None => Tensor::zeros(rows, DType::F32, &Device::Cpu)?,
    };
    if bias.dims() != [rows] {
        return Err(Error::Shape {
            op: OP,
            tensor: "bias",
            shape: bias.dims().to_vec(),
            expected: format!("({rows})"),
        });
    }
    let past = match past {
        Some(past) => {
            readable(OP, "past", past, 3, "(batch, channels, width - 1)")?;
            past.to_dtype(DType::F32)?
        }
        None => Tensor::zeros((b, c, width.saturating_sub(1)), DType::F32, &Device::Cpu)?,
    };
    // An operation has at most three arguments: weights and bias travel as one.
    let taps = Tensor::cat(&[&weight.to_dtype(DType::F32)?.t()?, &bias.unsqueeze(0)?], 0)?.contiguous()?;
    let work = WorkCell::default();
    let both = x.apply_op3(&taps, &past, ShortOp { silu, work: work.clone() })?;
    let out = both.narrow(2, 0, t)?;
    let state = if width > 1 { Some(both.narrow(2, t, width - 1)?) } else { None };
    Ok(Convolved { out, state, work: work.get() })
}

struct ShortOp {
    silu: bool,
    work: WorkCell,
}

/// Weights (C, W) and bias (C) out of (W + 1, C).
fn untap(taps: &[f32], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let width = taps.len() / channels.max(1) - 1;
    let weight = (0..channels * width).map(|i| taps[i % width * channels + i / width]).collect();
    (weight, taps[width * channels..].to_vec())
}

/// Two parts of a (B, C, T + N) tensor: strides, and where the second begins.
fn parts(shape: [usize; 3], extra: usize) -> [usize; 3] {
    let row = shape[2] + extra;
    [shape[1] * row, row, 1]
}

impl CustomOp3 for ShortOp {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        taps: &CpuStorage,
        tl: &Layout,
        past: &CpuStorage,
        pl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let channels = tl.dims()[1];
        let (weight, bias) = untap(flat(taps, tl)?, channels);
        let conv = ShortConv::new(&weight, channels, Some(&bias), self.silu, Isa::active()).map_err(wrap)?;
        let past = wide(past, pl)?;
        let d = xl.dims();
        let (shape, lead) = ([d[0], d[1], d[2]], conv.width() - 1);
        let strides = parts(shape, lead);
        let mut y = vec![0f32; shape[0] * strides[0]];
        let mut last = vec![0f32; shape[0] * shape[1] * lead];
        let state = [shape[0], shape[1], lead];
        let work = either!(signal(x, xl)?, x => {
            let mut out = SignalMut::new("y", &mut y, shape, strides).map_err(wrap)?;
            let mut end = SignalMut::channel_major("state", &mut last, state).map_err(wrap)?;
            conv.forward(&x, None, Some(&past), &mut out, Some(&mut end)).map_err(wrap)?
        });
        for (row, last) in y.chunks_exact_mut(strides[1].max(1)).zip(last.chunks_exact(lead.max(1))) {
            row[shape[2]..].copy_from_slice(&last[..lead]);
        }
        self.work.set(work);
        Ok((CpuStorage::F32(y), Shape::from((shape[0], shape[1], strides[1]))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        taps: &Tensor,
        past: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (mut dx, mut dpast) = (vec![0f32; x.elem_count()], vec![0f32; past.elem_count()]);
        let mut dtaps = vec![0f32; taps.elem_count()];
        {
            let ((xs, xl), (ts, tl)) = (x.storage_and_layout(), taps.storage_and_layout());
            let (t, lead) = (x.dims()[2], past.dims()[2]);
            let (dout, dstate) = (dy.narrow(2, 0, t)?, dy.narrow(2, t, lead)?);
            let ((ps, pl), (gs, gl)) = (past.storage_and_layout(), dout.storage_and_layout());
            let (ls, ll) = dstate.storage_and_layout();
            let channels = tl.dims()[1];
            let (weight, bias) = untap(flat(cpu(&ts)?, tl)?, channels);
            let conv = ShortConv::new(&weight, channels, Some(&bias), self.silu, Isa::active()).map_err(wrap)?;
            let (past, dout, dstate) = (wide(cpu(&ps)?, pl)?, wide(cpu(&gs)?, gl)?, wide(cpu(&ls)?, ll)?);
            let mut dweight = vec![0f32; weight.len()];
            let (dw, dbias) = dtaps.split_at_mut(weight.len());
            either!(signal(cpu(&xs)?, xl)?, x => {
                let mut dx = SignalMut::channel_major("dx", &mut dx, x.shape).map_err(wrap)?;
                let mut dpast = SignalMut::channel_major("dpast", &mut dpast, past.shape).map_err(wrap)?;
                let grads = ShortGrads {
                    dx: Some(&mut dx),
                    dweight: Some(&mut dweight),
                    dbias: Some(dbias),
                    dpast: Some(&mut dpast),
                };
                conv.backward(&x, None, Some(&past), &dout, Some(&dstate), grads).map_err(wrap)?
            });
            let width = conv.width();
            dweight.iter().enumerate().for_each(|(i, g)| dw[i % width * channels + i / width] = *g);
        }
        Ok((gradient(dx, x)?, gradient(dtaps, taps)?, gradient(dpast, past)?))
    }
}

/// Mega's damped moving average by recurrence: h_i ← α_i β_i u + (1 − α_i δ_i) h_i, y = Σ_i η_i h_i.
///
/// `u` is (B, C, T); the four parameters are (C, N); `init` the states before the first step, (B, C, N), zeros if
/// absent. The returned state is the next call's `init`.
pub fn damped_ema(
    u: &Tensor,
    alpha: &Tensor,
    delta: &Tensor,
    beta: &Tensor,
    eta: &Tensor,
    init: Option<&Tensor>,
) -> Result<Convolved> {
    const OP: &str = "damped_ema";
    readable(OP, "u", u, 3, "(batch, channels, time)")?;
    let mut all = Vec::with_capacity(4);
    for (name, x) in [("alpha", alpha), ("delta", delta), ("beta", beta), ("eta", eta)] {
        readable(OP, name, x, 2, "(channels, states)")?;
        if x.dims() != alpha.dims() {
            let expected = format!("alpha's {:?}", alpha.dims());
            return Err(Error::Shape { op: OP, tensor: name, shape: x.dims().to_vec(), expected });
        }
        all.push(x.to_dtype(DType::F32)?);
    }
    let ((b, c, t), (_, n)) = (u.dims3()?, alpha.dims2()?);
    let init = match init {
        Some(init) => {
            readable(OP, "init", init, 3, "(batch, channels, states)")?;
            init.to_dtype(DType::F32)?.contiguous()?
        }
        None => Tensor::zeros((b, c, n), DType::F32, &Device::Cpu)?,
    };
    let work = WorkCell::default();
    let both = u.apply_op3(&Tensor::stack(&all, 0)?.contiguous()?, &init, EmaOp { work: work.clone() })?;
    let (out, state) = (both.narrow(2, 0, t)?, both.narrow(2, t, n)?);
    Ok(Convolved { out, state: Some(state), work: work.get() })
}

struct EmaOp {
    work: WorkCell,
}

/// The average with parameters stacked (4, C, N).
fn ema<'a>(k: &'a [f32], layout: &Layout) -> candle_core::Result<DampedEma<'a>> {
    let (channels, part) = (layout.dims()[1], k.len() / 4);
    let [a, d, b, e] = [0, 1, 2, 3].map(|i| &k[i * part..(i + 1) * part]);
    DampedEma::new(a, d, b, e, channels, Isa::active()).map_err(wrap)
}

impl CustomOp3 for EmaOp {
    fn name(&self) -> &'static str {
        "damped_ema"
    }

    fn cpu_fwd(
        &self,
        u: &CpuStorage,
        ul: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        init: &CpuStorage,
        il: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (k, init, d) = (flat(k, kl)?, flat(init, il)?, ul.dims());
        let (ema, shape) = (ema(k, kl)?, [d[0], d[1], d[2]]);
        let n = ema.states();
        let strides = parts(shape, n);
        let (mut y, mut last) = (vec![0f32; shape[0] * strides[0]], vec![0f32; shape[0] * shape[1] * n]);
        let work = either!(signal(u, ul)?, u => {
            let mut out = SignalMut::new("y", &mut y, shape, strides).map_err(wrap)?;
            ema.forward(&u, Some(init), &mut out, Some(&mut last)).map_err(wrap)?
        });
        for (row, last) in y.chunks_exact_mut(strides[1].max(1)).zip(last.chunks_exact(n.max(1))) {
            row[shape[2]..].copy_from_slice(&last[..n]);
        }
        self.work.set(work);
        Ok((CpuStorage::F32(y), Shape::from((shape[0], shape[1], strides[1]))))
    }

    fn bwd(
        &self,
        u: &Tensor,
        k: &Tensor,
        init: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (mut du, mut dk) = (vec![0f32; u.elem_count()], vec![0f32; k.elem_count()]);
        let mut dinit = vec![0f32; init.elem_count()];
        {
            let t = u.dims()[2];
            let (dout, dlast) = (dy.narrow(2, 0, t)?, dy.narrow(2, t, init.dims()[2])?.contiguous()?);
            let ((us, ul), (ks, kl)) = (u.storage_and_layout(), k.storage_and_layout());
            let ((is, il), (gs, gl)) = (init.storage_and_layout(), dout.storage_and_layout());
            let (ls, ll) = dlast.storage_and_layout();
            let (ema, init) = (ema(flat(cpu(&ks)?, kl)?, kl)?, flat(cpu(&is)?, il)?);
            let (dout, dlast) = (wide(cpu(&gs)?, gl)?, flat(cpu(&ls)?, ll)?);
            let part = dk.len() / 4;
            let (alpha, rest) = dk.split_at_mut(part);
            let (delta, rest) = rest.split_at_mut(part);
            let (beta, eta) = rest.split_at_mut(part);
            either!(signal(cpu(&us)?, ul)?, u => {
                let mut du = SignalMut::channel_major("du", &mut du, u.shape).map_err(wrap)?;
                let grads = EmaGrads {
                    du: Some(&mut du),
                    parameters: Some(EmaParameterGrads { alpha, delta, beta, eta }),
                    dinit: Some(&mut dinit),
                };
                ema.backward(&u, Some(init), &dout, Some(dlast), grads).map_err(wrap)?
            });
        }
        Ok((gradient(du, u)?, gradient(dk, k)?, gradient(dinit, init)?))
    }
}
