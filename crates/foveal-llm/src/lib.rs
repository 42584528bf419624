//! Checkpoints, tokenizers, model families, plans and generation.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod generate;
pub mod gguf;
pub mod hf;
pub mod model;
pub mod plan;
pub mod pull;
pub mod rope;
pub mod sample;
pub mod session;
#[cfg(test)]
mod testing;
pub mod tokenizer;
mod weight_file;

pub use checkpoint::{Checkpoint, HostTensor};
pub use config::{Family, ModelConfig, RopeScaling};
pub use error::{LlmError, Result};
pub use generate::{GenerateOptions, Generated, StopReason, generate};
pub use model::{
    AttentionDtype, Calibration, LoadOptions, LogitsFor, Model, PrefillOptions, Prompt, Stats, WeightFormat,
};
pub use plan::{Plan, Rule};
pub use sample::{SampleOptions, Sampler};
pub use session::{Extended, Session};
pub use tokenizer::Tokenizer;
