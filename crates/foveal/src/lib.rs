//! Efficient attention for candle: every published method behind one interface.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use foveal::prim::{AttendOptions, attend};
//!
//! # fn main() -> Result<(), foveal::Error> {
//! let q = Tensor::randn(0f32, 1.0, (1, 9, 100, 64), &Device::Cpu)?;
//! let k = Tensor::randn(0f32, 1.0, (1, 3, 100, 64), &Device::Cpu)?; // grouped heads, not repeated
//! let v = k.clone();
//! let a = attend(&q, &k, &v, &AttendOptions::causal(), None)?;
//! assert_eq!(a.out.dims(), [1, 9, 100, 64]);
//! assert!(a.work.pairs > 0);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]

pub mod apply;
pub mod cache;
pub mod error;
pub mod kernel;
pub mod laws;
pub mod mixer;
pub mod prim;
pub mod registry;
pub mod sparse;
pub mod system;

pub use error::{Error, Result};
pub use foveal_kernels::Work;
pub use system::{Card, Family, Growth, Law, ParamDoc, Params, Slot, Spec, System};
