//! Row operations on candle tensors, with gradients: softmax and root-mean-square normalisation.
//!
//! Both work along the last dimension of a tensor of any rank, on the CPU, f32 or bf16 (computed in f32, returned in the
//! dtype that came in). Use these in anything that is trained: `candle_nn::ops::softmax_last_dim` and
//! `candle_nn::ops::rms_norm` have no backward pass, and candle drops the gradients of what lies before them
//! without an error.

use crate::error::{Error, Result};
use crate::prim::conv::{WorkCell, cpu, flat, readable, wrap};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Shape, Tensor};
use foveal_kernels::elementwise::{rms_norm as norm_kernel, rms_norm_backward, softmax_rows, softmax_rows_backward};
use foveal_kernels::{Isa, Work};

/// `x` as the kernels read it, contiguous f32, and its last dimension; tracks gradients as `x` does.
fn rows(op: &'static str, x: &Tensor) -> Result<(Tensor, usize)> {
    readable(op, "x", x, x.rank().max(1), "(…, width)")?;
    let width = x.dims()[x.rank() - 1];
    if width == 0 {
        return Err(Error::Shape {
            op,
            tensor: "x",
            shape: x.dims().to_vec(),
            expected: "(…, width) with at least one element a row".into(),
        });
    }
    Ok((x.to_dtype(DType::F32)?.contiguous()?, width))
}

/// Softmax along the last dimension, e^(x − max) / Σ; a row that is −∞ throughout becomes zero (and has zero
/// gradient). Returns the result, shaped and typed as `x`, and the work done.
pub fn softmax(x: &Tensor) -> Result<(Tensor, Work)> {
    let (wide, width) = rows("softmax", x)?;
    let work = WorkCell::default();
    let y = wide.apply_op1(Softmax { width, work: work.clone() })?.to_dtype(x.dtype())?;
    Ok((y, work.get()))
}

struct Softmax {
    width: usize,
    work: WorkCell,
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut y = flat(x, layout)?.to_vec();
        self.work.set(softmax_rows(&mut y, self.width, Isa::active()).map_err(wrap)?);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let mut dx = vec![0f32; x.elem_count()];
        {
            let ((ys, yl), (gs, gl)) = (y.storage_and_layout(), dy.storage_and_layout());
            let (y, dy) = (flat(cpu(&ys)?, yl)?, flat(cpu(&gs)?, gl)?);
            softmax_rows_backward(y, dy, self.width, &mut dx, Isa::active()).map_err(wrap)?;
        }
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

/// x / √(mean(x²) + eps) · weight along the last dimension, with `weight` (width) f32 or bf16 (Zhang and Sennrich 2019,
/// arXiv 1910.07467). Gradients reach `x` and `weight`. Returns the result, shaped and typed as `x`, and the work
/// done.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Work)> {
    const OP: &str = "rms_norm";
    let (wide, width) = rows(OP, x)?;
    readable(OP, "weight", weight, 1, "(width)")?;
    if weight.dims()[0] != width {
        return Err(Error::Shape {
            op: OP,
            tensor: "weight",
            shape: weight.dims().to_vec(),
            expected: format!("({width}), the last dimension of x"),
        });
    }
    let weight = weight.to_dtype(DType::F32)?.contiguous()?;
    let work = WorkCell::default();
    let y = wide.apply_op2(&weight, RmsNorm { eps, work: work.clone() })?.to_dtype(x.dtype())?;
    Ok((y, work.get()))
}

struct RmsNorm {
    eps: f32,
    work: WorkCell,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        weight: &CpuStorage,
        wl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, weight) = (flat(x, xl)?, flat(weight, wl)?);
        let mut y = vec![0f32; x.len()];
        self.work.set(norm_kernel(x, weight, self.eps, &mut y, Isa::active()).map_err(wrap)?);
        Ok((CpuStorage::F32(y), xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (mut dx, mut dw) = (vec![0f32; x.elem_count()], vec![0f32; weight.elem_count()]);
        {
            let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
            let (gs, gl) = dy.storage_and_layout();
            let (x, w, dy) = (flat(cpu(&xs)?, xl)?, flat(cpu(&ws)?, wl)?, flat(cpu(&gs)?, gl)?);
            let dweight = weight.track_op().then_some(&mut dw[..]);
            rms_norm_backward(x, w, self.eps, dy, &mut dx, dweight, Isa::active()).map_err(wrap)?;
        }
        let dw = if weight.track_op() { Some(Tensor::from_vec(dw, weight.shape(), &Device::Cpu)?) } else { None };
        Ok((Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?), dw))
    }
}
