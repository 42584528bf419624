//! Why a command failed: one line, naming the thing, the value and the remedy.

use std::io;
use std::path::{Path, PathBuf};

/// Result of a command.
pub type Result<T = ()> = std::result::Result<T, CliError>;

/// Every way a command can end early.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The library refused.
    #[error(transparent)]
    Foveal(#[from] foveal::Error),
    /// The engine or a checkpoint refused.
    #[error(transparent)]
    Llm(#[from] foveal_llm::LlmError),
    /// A comparison or a task refused.
    #[error(transparent)]
    Lab(#[from] foveal_lab::LabError),
    /// Training refused or stopped.
    #[error(transparent)]
    Tune(#[from] foveal_tune::TuneError),
    /// A file operation failed.
    #[error("{}: cannot {action}: {source}{}", path.display(), remedy(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Standard output went away or is full.
    #[error("cannot write to standard output: {0}")]
    Stdout(#[from] io::Error),
    /// A file is not what it should be.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Arguments that do not go together.
    #[error("{0}")]
    Arguments(String),
}

impl CliError {
    /// A failed file operation.
    pub fn file(path: &Path, action: &'static str, source: io::Error) -> Self {
        CliError::File { path: path.into(), action, source }
    }

    /// The message on one line, however many lines a library's message had.
    pub fn one_line(&self) -> String {
        self.to_string().lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ")
    }

    /// The reader of our output closed it (`foveal list | head`): nobody is left to tell.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, CliError::Stdout(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn remedy(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::NotFound => "; check the spelling",
        io::ErrorKind::PermissionDenied => "; check the permissions",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space or choose another disk",
        io::ErrorKind::FileTooLarge => "; raise the limit on file sizes (ulimit -f) or choose another disk",
        io::ErrorKind::IsADirectory => "; give a file, not a folder",
        _ => "",
    }
}
