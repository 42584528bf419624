//! Output files, with this program's errors.

use crate::error::{CliError, Result};
use std::path::Path;

/// Write `path` whole or not at all.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result {
    foveal_lab::files::write(path, bytes).map_err(|e| CliError::file(path, "write", e))
}

/// The folder of an output file must exist before minutes of measuring.
pub fn check_folder(path: &Path) -> Result {
    match path.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(f) if !f.is_dir() => Err(CliError::BadFile {
            path: path.into(),
            problem: format!("the folder {} does not exist; create it first", f.display()),
        }),
        _ => Ok(()),
    }
}
