//! Output files: whole or not at all.

use crate::error::{CliError, Result};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Write `path` through a temporary file beside it, so that a reader never sees half of it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result {
    if path.is_dir() {
        return Err(CliError::BadFile { path: path.into(), problem: "is a folder; give a file name".into() });
    }
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if !folder.is_dir() {
        return Err(CliError::BadFile {
            path: path.into(),
            problem: format!("the folder {} does not exist; create it first", folder.display()),
        });
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".foveal-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As any file that a program creates; the umask still applies.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let fail = |e| CliError::file(path, "write", e);
    let mut tmp = builder.tempfile_in(&folder).map_err(fail)?;
    tmp.write_all(bytes).map_err(fail)?;
    tmp.flush().map_err(fail)?;
    tmp.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}
