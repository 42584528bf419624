//! Checkpoints, tokenizers, model families, plans and generation.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod gguf;
pub mod hf;
pub mod pull;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, HostTensor};
pub use config::{Family, ModelConfig, RopeScaling};
pub use error::{LlmError, Result};
pub use tokenizer::Tokenizer;
