//! The narrow waist: one function per primitive, on candle tensors or plain rows.

pub mod attend;
pub mod factor;
pub mod gemm;
pub mod kv;
pub mod pool;
pub mod rope;
pub mod select;
pub(crate) mod tensor;

pub use attend::{AttendOptions, Attended, attend, attend_indexed, attend_selected, merge};
