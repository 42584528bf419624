//! Errors of comparisons and reports.

use std::path::PathBuf;

/// Why a comparison or report was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The engine or a checkpoint refused.
    #[error(transparent)]
    Llm(#[from] foveal_llm::LlmError),
    /// A system refused.
    #[error(transparent)]
    System(#[from] foveal::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] foveal_kernels::KernelError),
    /// The text has too few tokens.
    #[error("the text has {have} tokens but {what} needs {need}; give a longer text or shorter lengths")]
    TextTooShort {
        /// What wanted more.
        what: String,
        /// Tokens there are.
        have: usize,
        /// Tokens needed.
        need: usize,
    },
    /// A length that cannot be measured.
    #[error("length {length}: {problem}")]
    Length {
        /// The length in tokens.
        length: usize,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A setting that makes no sense.
    #[error("{name} = {value}: {remedy}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do.
        remedy: String,
    },
    /// The needle prompt cannot be made with this model's chat template.
    #[error(
        "the chat template does not keep the message text as it is, so needles cannot be placed; \
         compare without them (--trials 0), or evaluate ppl"
    )]
    Template,
    /// Interrupted by the caller.
    #[error("interrupted")]
    Cancelled,
    /// A file could not be written or read.
    #[error("cannot {action} {}: {source}; check the folder, its permissions and the free space", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `write`, `read`.
        action: &'static str,
        /// Cause.
        source: std::io::Error,
    },
    /// A report file does not hold a report of this version.
    #[error("{what} is not a report that this build reads: {problem}")]
    Report {
        /// Which file or text.
        what: String,
        /// Why.
        problem: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, LabError>;
