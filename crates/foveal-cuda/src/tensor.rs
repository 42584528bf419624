//! Strided (batch, heads, tokens, head_dim) views of device memory, as [`foveal_kernels::View`] of the host's.

use crate::device::Device;
use crate::error::{CudaError, Result, bad};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, sys};
use foveal_kernels::KernelError;
use half::{bf16, f16};
use std::marker::PhantomData;

/// A 16-bit storage type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 8 bits of mantissa.
    Bf16,
    /// 11 bits of mantissa.
    F16,
}

impl Dtype {
    fn tensor_map(self) -> sys::CUtensorMapDataType {
        match self {
            Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        }
    }
}

/// Elements that views may have.
pub trait Half: DeviceRepr + Copy + 'static {
    /// Which.
    const DTYPE: Dtype;
}

impl Half for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

impl Half for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// Where a tensor lies. The head dimension is contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) at: u64,
    pub(crate) dtype: Dtype,
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [usize; 3],
}

/// Read-only view.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub(crate) layout: Layout,
    life: PhantomData<&'a ()>,
}

/// Writable view. Rows must not overlap.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) layout: Layout,
    life: PhantomData<&'a mut ()>,
}

/// Strides of contiguous (B, H, T, D) memory.
fn packed([_, h, t, d]: [usize; 4]) -> [usize; 3] {
    [h * t * d, t * d, d]
}

fn check(what: &'static str, shape: [usize; 4], strides: [usize; 3], have: usize) -> Result<()> {
    let span = || {
        if shape.contains(&0) {
            return Some(0);
        }
        let mut last = shape[3];
        for i in 0..3 {
            last = last.checked_add((shape[i] - 1).checked_mul(strides[i])?)?;
        }
        Some(last)
    };
    let need = span().unwrap_or(usize::MAX);
    if need > have {
        return Err(KernelError::View { op: "view", what, shape, strides, need, have }.into());
    }
    // The kernels count heads, tokens and channels in 32 bits, addresses in 64.
    match shape.iter().find(|&&n| n >= 1 << 30) {
        Some(n) => bad("view", "length", n, "at most 2^30 - 1 a dimension: split it"),
        None => Ok(()),
    }
}

impl<'a> Tensor<'a> {
    /// View with explicit strides (batch, heads, tokens, in elements) from element `offset` on; `what` names the
    /// operand in errors.
    pub fn new<T: Half>(
        device: &Device,
        what: &'static str,
        data: &'a CudaSlice<T>,
        offset: usize,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self> {
        check(what, shape, strides, data.len().saturating_sub(offset))?;
        // One stream orders all calls, so that nothing has to be recorded about this use.
        let at = data.device_ptr(device.stream()).0 + 2 * offset as u64;
        Ok(Self { layout: Layout { at, dtype: T::DTYPE, shape, strides }, life: PhantomData })
    }

    /// View of contiguous (B, H, T, D) memory.
    pub fn contiguous<T: Half>(
        device: &Device,
        what: &'static str,
        data: &'a CudaSlice<T>,
        shape: [usize; 4],
    ) -> Result<Self> {
        Self::new(device, what, data, 0, shape, packed(shape))
    }

    /// (batch, heads, tokens, head_dim).
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }
}

impl<'a> TensorMut<'a> {
    /// As [`Tensor::new`]. Refuses strides under which two rows overlap.
    pub fn new<T: Half>(
        device: &Device,
        what: &'static str,
        data: &'a mut CudaSlice<T>,
        offset: usize,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self> {
        check(what, shape, strides, data.len().saturating_sub(offset))?;
        let mut axes: Vec<_> = (0..3).filter(|&i| shape[i] > 1).map(|i| (strides[i], shape[i])).collect();
        axes.sort_unstable();
        let mut reach = shape[3];
        for (stride, len) in axes {
            if stride < reach && !shape.contains(&0) {
                let value = format!("{strides:?} for {what} of shape {shape:?}");
                return bad(
                    "view",
                    "strides",
                    value,
                    "rows overlap; use a layout in which every row has its own memory",
                );
            }
            reach = reach.saturating_add((len - 1).saturating_mul(stride));
        }
        let at = data.device_ptr_mut(device.stream()).0 + 2 * offset as u64;
        Ok(Self { layout: Layout { at, dtype: T::DTYPE, shape, strides }, life: PhantomData })
    }

    /// View of contiguous (B, H, T, D) memory.
    pub fn contiguous<T: Half>(
        device: &Device,
        what: &'static str,
        data: &'a mut CudaSlice<T>,
        shape: [usize; 4],
    ) -> Result<Self> {
        Self::new(device, what, data, 0, shape, packed(shape))
    }

    /// (batch, heads, tokens, head_dim).
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }
}

impl Layout {
    /// Whether every row starts at a multiple of 16 bytes and is as wide as a multiple of them.
    pub(crate) fn aligned(&self) -> bool {
        let odd = |i: usize| self.shape[i] > 1 && !self.strides[i].is_multiple_of(8);
        self.at.is_multiple_of(16) && self.shape[3].is_multiple_of(8) && !(0..3).any(odd)
    }

    /// Strides in elements, as kernels take them.
    pub(crate) fn steps(&self) -> [i64; 3] {
        self.strides.map(|s| s as i64)
    }

    /// A map by which boxes of `columns` channels (64 or 32) by `rows` tokens are loaded in the swizzle as wide as
    /// they are; what lies beyond the tensor reads as zero. The layout must be [`Layout::aligned`].
    pub(crate) fn map(&self, what: &str, columns: usize, rows: usize) -> Result<sys::CUtensorMap> {
        let [b, h, t, d] = self.shape.map(|n| n as u64);
        // The stride of a dimension of one is never used, but must be a valid one.
        let bytes = |i: usize| if self.shape[i] > 1 { 2 * self.strides[i] as u64 } else { 2 * d.next_multiple_of(8) };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all arrays have as many entries as the rank says (strides one less); the address is only noted.
        let said = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                self.dtype.tensor_map(),
                4,
                self.at as *mut _,
                [d, t, h, b].as_ptr(),
                [bytes(2), bytes(1), bytes(0)].as_ptr(),
                [columns as u32, rows as u32, 1, 1].as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                match columns {
                    64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
                },
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        said.result().map_err(|e| CudaError::Driver {
            what: format!("describing {what} of shape {:?} and strides {:?}", self.shape, self.strides),
            code: format!("{:?}", e.0),
        })?;
        Ok(map)
    }
}
