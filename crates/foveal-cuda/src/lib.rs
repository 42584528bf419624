//! CUDA attention kernels: the operations of [`foveal_kernels`] on NVIDIA GPUs from sm_80 on.
//!
//! Kernels are CUDA C++ (`kernels/*.cu`) compiled for the device found by NVRTC at run time ([`compile`]), and kept on
//! disk. Driver and compiler are loaded when a [`Device`] is opened: the crate builds, and its CPU tests pass, where
//! neither is installed. Operands are strided views of device memory ([`Tensor`]) in bf16 or f16; sums and statistics
//! are f32. Each call is judged against the `f64` twin of the CPU side and returns the same [`Work`].
//!
//! [`Work`]: foveal_kernels::Work

#![warn(missing_docs)]

pub mod attend;
pub mod backward;
pub mod ceiling;
pub mod compile;
pub mod decode;
pub mod device;
pub mod error;
pub mod recur;
pub mod shipped;
pub mod tensor;

pub use attend::Attend;
pub use compile::Spec;
pub use decode::Decode;
pub use device::{Device, Facts};
pub use error::{CudaError, Result};
pub use recur::Recur;
pub use tensor::{Dtype, Half, Tensor, TensorMut};
