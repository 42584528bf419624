//! CPU attention kernels on plain slices.
//!
//! This crate knows nothing of tensors, models or published systems: it takes strided
//! views ([`View`], [`ViewMut`]), tables of what to visit ([`BlockTable`], [`KeyLists`]) and
//! returns the [`Work`] it did. The instruction set is chosen at run time ([`Isa`]).
//! Accumulators and statistics are f32 whatever the storage type; each kernel has a slow
//! `f64` twin in [`twin`] that documents it and judges it in tests.

#![warn(missing_docs)]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod attend;
pub mod conv;
pub mod decode;
mod dispatch;
pub mod elementwise;
pub mod error;
pub mod exp;
mod fallback;
pub mod feature;
pub mod indexed;
pub mod isa;
mod lanes;
pub mod linear;
pub mod merge;
pub mod peak;
pub mod rank;
pub mod recur;
pub mod scores;
mod simd;
pub mod table;
pub mod twin;
pub mod view;
pub mod work;

pub use attend::{Attend, AttendGrads, Band, Bias, BiasGrad, CuSeqlens, Normalizer, Upstream};
pub use error::{KernelError, Result};
pub use indexed::{attend_indexed, attend_indexed_backward};
pub use isa::Isa;
pub use linear::{PackedLinear, WeightFormat};
pub use merge::merge_row;
pub use table::{BlockTable, HeadKeys, HeadTable, KeyLists};
pub use view::{Element, View, ViewMut};
pub use work::Work;
