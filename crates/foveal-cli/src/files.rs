//! Output files, with this program's errors.

use crate::error::{CliError, Result};
use std::path::Path;

/// Write `path` whole or not at all.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result {
    foveal_lab::files::write(path, bytes).map_err(|e| CliError::file(path, "write", e))
}
