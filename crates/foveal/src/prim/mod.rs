//! The narrow waist: one function per primitive, on candle tensors or plain rows.

pub mod attend;
pub mod cluster;
pub mod conv;
pub mod decode;
pub mod factor;
pub mod feature;
pub mod gemm;
pub mod kv;
pub(crate) mod permute;
pub mod pool;
pub mod recur;
pub mod rope;
pub mod rows;
pub mod select;
pub(crate) mod tensor;

pub use attend::{AttendBias, AttendOptions, Attended, Sequences, attend, attend_indexed, attend_selected, merge};
pub use conv::{Convolved, damped_ema, long_conv, short_conv};
pub use decode::{DecodeOptions, Decoded, decode};
pub use feature::{FeatureOptions, feature_attend};
pub use foveal_kernels::conv::Boundary;
pub use foveal_kernels::{Band, Normalizer};
pub use recur::{RecurGate, RecurOptions, Recurred, recur, recur_step};
pub use rows::{rms_norm, softmax};
