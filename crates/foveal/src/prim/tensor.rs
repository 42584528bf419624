//! Reading candle tensors in place as strided kernel views.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Layout, Storage, Tensor};
use foveal_kernels::View;
use half::bf16;

/// A (B, H, T, D) view of a tensor's memory, of either storage type.
pub(crate) enum AnyView<'a> {
    F32(View<'a, f32>),
    Bf16(View<'a, bf16>),
}

/// The tensor itself if its last dimension is contiguous, else a contiguous copy; refused if it tracks
/// gradients.
pub(crate) fn rows_contiguous(op: &'static str, name: &'static str, t: &Tensor) -> Result<Tensor> {
    if t.track_op() {
        return Err(Error::NoBackward { op, tensor: name });
    }
    rows(op, name, t)
}

/// The tensor itself if its last dimension is contiguous, else a contiguous copy, which tracks gradients as
/// it does.
pub(crate) fn rows(op: &'static str, name: &'static str, t: &Tensor) -> Result<Tensor> {
    if t.dims().len() != 4 {
        return Err(Error::Shape {
            op,
            tensor: name,
            shape: t.dims().to_vec(),
            expected: "(batch, heads, tokens, head_dim)".into(),
        });
    }
    if !matches!(t.dtype(), DType::F32 | DType::BF16) {
        return Err(Error::Dtype { op, tensor: name, dtype: format!("{:?}", t.dtype()), expected: "f32, bf16" });
    }
    if !matches!(t.device(), Device::Cpu) {
        return Err(Error::Missing {
            system: op.into(),
            what: "a CPU tensor",
            remedy: format!("move {name} to Device::Cpu; CUDA kernels are not built yet"),
        });
    }
    let s = t.stride();
    if s[3] == 1 || t.dims()[3] <= 1 { Ok(t.clone()) } else { Ok(t.contiguous()?) }
}

/// View of a tensor made by [`rows`]; `storage` and `layout` come from `storage_and_layout`.
pub(crate) fn view<'a>(name: &'static str, storage: &'a Storage, layout: &Layout) -> Result<AnyView<'a>> {
    match storage {
        Storage::Cpu(x) => cpu_view(name, x, layout),
        _ => Err(Error::Dtype { op: "view", tensor: name, dtype: "other".into(), expected: "f32, bf16 on the CPU" }),
    }
}

/// As [`view`].
pub(crate) fn cpu_view<'a>(name: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<AnyView<'a>> {
    let d = layout.dims();
    let s = layout.stride();
    let shape = [d[0], d[1], d[2], d[3]];
    let strides = [s[0], s[1], s[2]];
    let at = layout.start_offset();
    match storage {
        CpuStorage::F32(x) => Ok(AnyView::F32(View::new(name, &x[at..], shape, strides)?)),
        CpuStorage::BF16(x) => Ok(AnyView::Bf16(View::new(name, &x[at..], shape, strides)?)),
        _ => Err(Error::Dtype { op: "view", tensor: name, dtype: "other".into(), expected: "f32, bf16 on the CPU" }),
    }
}
