//! A file of weights, read piece by piece.
//!
//! Not mapped: a mapped file that another process shortens ends this one with SIGBUS as soon as the
//! lost part is touched. A read that comes short is an error like any other, and a tensor's bytes
//! are held only while they are unpacked.

use crate::error::{LlmError, Result};
use memmap2::MmapMut;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A file, or bytes that stand for one.
pub(crate) struct WeightFile {
    path: PathBuf,
    format: &'static str,
    len: u64,
    source: Source,
}

enum Source {
    /// Seek and read go together, so they share a lock; tensors are read one after the other anyway.
    File(Mutex<File>),
    Memory(Vec<u8>),
}

/// Bytes read, at the alignment of a page: block decoders look at them as structures.
pub(crate) struct Bytes {
    memory: MmapMut,
    len: usize,
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl WeightFile {
    /// Open `path`; `format` names its kind in messages.
    ///
    /// # Errors
    /// A file that cannot be opened, a folder, an empty file.
    pub fn open(path: &Path, format: &'static str) -> Result<Self> {
        let file = File::open(path).map_err(|e| LlmError::io(path, "open the file", e))?;
        let meta = file.metadata().map_err(|e| LlmError::io(path, "read the file's size", e))?;
        if meta.is_dir() {
            return Err(LlmError::NotACheckpoint { path: path.into(), why: "it is a folder".into() });
        }
        if meta.len() == 0 {
            return Err(LlmError::NotACheckpoint { path: path.into(), why: "the file is empty".into() });
        }
        Ok(Self { path: path.into(), format, len: meta.len(), source: Source::File(Mutex::new(file)) })
    }

    /// Bytes in memory as a file.
    pub fn memory(data: Vec<u8>, format: &'static str) -> Self {
        Self { path: "<memory>".into(), format, len: data.len() as u64, source: Source::Memory(data) }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The first `n` bytes, or all there are.
    ///
    /// # Errors
    /// As [`WeightFile::read`].
    pub fn head(&self, n: u64) -> Result<Vec<u8>> {
        let mut out = vec![0; n.min(self.len) as usize];
        self.fill(0, &mut out, "the header")?;
        Ok(out)
    }

    /// The bytes of tensor `name`, at a `range` inside the file.
    ///
    /// # Errors
    /// A file that has become shorter, the system's refusal of the read or of the memory.
    pub fn read(&self, name: &str, range: Range<usize>) -> Result<Bytes> {
        let mut memory = MmapMut::map_anon(range.len().max(1))
            .map_err(|e| LlmError::io(&self.path, "get memory for a tensor of the file", e))?;
        self.fill(range.start as u64, &mut memory[..range.len()], &format!("tensor `{name}`"))?;
        Ok(Bytes { memory, len: range.len() })
    }

    fn fill(&self, from: u64, to: &mut [u8], what: &str) -> Result<()> {
        let read = match &self.source {
            Source::File(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(from)).and_then(|_| file.read_exact(to))
            }
            // A range past the end reads short, as from a file.
            Source::Memory(data) => data.get(from as usize..).unwrap_or_default().read_exact(to),
        };
        read.map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => LlmError::Damaged {
                path: self.path.clone(),
                format: self.format,
                problem: format!(
                    "{what} needs {} bytes but the file, of {} bytes when it was opened, now ends before that",
                    to.len(),
                    self.len
                ),
                offset: from,
            },
            _ => LlmError::io(&self.path, "read the file", e),
        })
    }
}
