//! Errors of the library: closed, each naming the thing, the value and the remedy.

use foveal_kernels::KernelError;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes or tables do not fit.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// candle refused an operation.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
    /// A tensor has a data type that the primitive does not take.
    #[error("{op}: {tensor} has dtype {dtype}; convert it to one of {expected}")]
    Dtype {
        /// The primitive.
        op: &'static str,
        /// The tensor's name.
        tensor: &'static str,
        /// Its dtype.
        dtype: String,
        /// What is taken.
        expected: &'static str,
    },
    /// A tensor has the wrong shape.
    #[error("{op}: {tensor} has shape {shape:?}; expected {expected}")]
    Shape {
        /// The primitive.
        op: &'static str,
        /// The tensor's name.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// What is taken.
        expected: String,
    },
    /// The primitive has no backward pass yet and a tensor asks for gradients.
    #[error("{op}: {tensor} tracks gradients but {op} has no backward pass yet; detach it or use candle operations")]
    NoBackward {
        /// The primitive.
        op: &'static str,
        /// The tensor's name.
        tensor: &'static str,
    },
    /// A file could not be written.
    #[error("cannot {action} {}: {message}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's words.
        message: String,
    },
    /// A token grid that cannot be.
    #[error("grid {grid}: {message}")]
    Grid {
        /// As written.
        grid: String,
        /// What is wrong and the remedy.
        message: String,
    },
    /// No system has this id.
    #[error("unknown system {id:?}{hint}; `foveal list` shows all ids")]
    UnknownSystem {
        /// What was asked for.
        id: String,
        /// "; did you mean …" or empty.
        hint: String,
    },
    /// The catalogue has the system but it is not built yet.
    #[error("system {id:?} is in the catalogue but not built yet; `foveal list --state done` shows what is")]
    NotBuilt {
        /// The system.
        id: String,
    },
    /// The system does not take this parameter.
    #[error("{system} has no parameter {name:?}{hint}; it takes: {known}")]
    UnknownParam {
        /// The system.
        system: String,
        /// The parameter.
        name: String,
        /// "; did you mean …" or empty.
        hint: String,
        /// All of its parameters.
        known: String,
    },
    /// A parameter's value is out of range or of the wrong type.
    #[error("{system}: {message}")]
    Param {
        /// The system.
        system: String,
        /// Name, value and remedy.
        message: String,
    },
    /// A system was asked to work in a place it was not made for.
    #[error("{system} cannot be used as {wanted}: it plugs in at {slots}")]
    WrongSlot {
        /// The system.
        system: String,
        /// The place asked for.
        wanted: &'static str,
        /// Its slots.
        slots: String,
    },
    /// A system lacks something it must be given first (calibration, weights).
    #[error("{system} needs {what}: {remedy}")]
    Missing {
        /// The system.
        system: String,
        /// What is missing.
        what: &'static str,
        /// How to provide it.
        remedy: String,
    },
    /// A decomposition did not converge.
    #[error("{op} of a {rows}x{cols} matrix did not converge; check the input for NaN or infinity")]
    Decomposition {
        /// The decomposition.
        op: &'static str,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
}

/// Result of a library call.
pub type Result<T> = std::result::Result<T, Error>;

/// "; did you mean X?" for the nearest known name, or nothing when none is near.
pub fn nearest_hint<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    // The distance takes time and memory by the product of both lengths, and no name is this long.
    if given.len() > 100 {
        return String::new();
    }
    known
        .into_iter()
        .map(|k| (strsim::damerau_levenshtein(given, k), k))
        .min()
        .filter(|(d, k)| *d <= 1 + k.len().max(given.len()) / 3)
        .map(|(_, k)| format!("; did you mean {k:?}?"))
        .unwrap_or_default()
}
