//! Errors of training: closed, each naming the thing, the value and the remedy.

use std::path::PathBuf;

/// Why a run was refused or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TuneError {
    /// A layer or primitive refused.
    #[error(transparent)]
    Foveal(#[from] foveal::Error),
    /// candle refused an operation.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
    /// The model or its files refused.
    #[error(transparent)]
    Llm(#[from] foveal_llm::LlmError),
    /// A setting is out of range.
    #[error("{name} = {value}: {remedy}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do.
        remedy: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What was wrong.
        message: String,
    },
    /// The loss is no longer a number.
    #[error("the loss became {loss} at step {step}; lower the learning rate (now {lr}) or the clipping norm")]
    Diverged {
        /// At this step.
        step: usize,
        /// The loss.
        loss: f32,
        /// The learning rate then.
        lr: f64,
    },
    /// Stopped by the caller.
    #[error("stopped at step {step}")]
    Cancelled {
        /// The step that would have come next.
        step: usize,
    },
}

/// Result of this crate.
pub type Result<T, E = TuneError> = std::result::Result<T, E>;

/// A setting's complaint.
pub(crate) fn setting(name: &'static str, value: impl ToString, remedy: impl Into<String>) -> TuneError {
    TuneError::Setting { name, value: value.to_string(), remedy: remedy.into() }
}
