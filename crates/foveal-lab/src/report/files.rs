//! Writing reports: to a temporary name beside the target, then renamed.

use crate::error::{LabError, Result};
use crate::results::Results;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Files of one report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The page.
    pub html: PathBuf,
    /// The data.
    pub json: PathBuf,
    /// The rows.
    pub csv: PathBuf,
}

/// A file written under a temporary name beside its place.
struct Staged {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Staged {
    fn write(path: &Path, text: &[u8]) -> Result<Self> {
        let io = |source| LabError::Io { path: path.into(), action: "write", source };
        let dir = match path.parent() {
            Some(d) if !d.as_os_str().is_empty() => d,
            _ => Path::new("."),
        };
        let mut file = tempfile::Builder::new().prefix(".foveal-").tempfile_in(dir).map_err(io)?;
        file.write_all(text).map_err(io)?;
        #[cfg(unix)]
        {
            // A temporary file is private; a report is for everybody who may read the folder.
            use std::os::unix::fs::PermissionsExt;
            file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(io)?;
        }
        file.as_file().sync_all().map_err(io)?;
        Ok(Self { file, path: path.into() })
    }

    fn place(self) -> Result<()> {
        let path = self.path;
        self.file.persist(&path).map_err(|e| LabError::Io { path, action: "write", source: e.error })?;
        Ok(())
    }
}

/// Write `text` to `path`: a reader sees the old file or the whole new one, never a part.
///
/// # Errors
/// The folder cannot be written to or is full; nothing is left behind then.
pub fn write_file(path: &Path, text: &[u8]) -> Result<()> {
    Staged::write(path, text)?.place()
}

/// Write `<stem>.html`, `.json` and `.csv` (default stem `foveal-report` in the working folder):
/// all of them, or none if there is no room for all.
///
/// # Errors
/// As [`write_file`].
pub fn write_all(r: &Results, stem: &Path) -> Result<Written> {
    let with = |ext: &str| {
        let mut s = stem.as_os_str().to_owned();
        s.push(ext);
        PathBuf::from(s)
    };
    let w = Written { html: with(".html"), json: with(".json"), csv: with(".csv") };
    let staged = [
        Staged::write(&w.json, super::json(r)?.as_bytes())?,
        Staged::write(&w.csv, super::csv(r).as_bytes())?,
        Staged::write(&w.html, super::html(r).as_bytes())?,
    ];
    staged.into_iter().try_for_each(Staged::place)?;
    Ok(w)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::parse_json;
    use crate::testing::{close, results};

    #[test]
    fn writes_all_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let r = results();
        let w = write_all(&r, &dir.path().join("report.v1")).unwrap();
        assert_eq!(w.html.file_name().unwrap(), "report.v1.html");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        let back = parse_json(&std::fs::read_to_string(&w.json).unwrap()).unwrap();
        assert!(close(&serde_json::to_value(&back).unwrap(), &serde_json::to_value(&r).unwrap()));
        // Again over existing files.
        write_all(&r, &dir.path().join("report.v1")).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_missing_folder_is_one_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let e = write_file(&dir.path().join("none").join("x"), b"x").unwrap_err().to_string();
        assert!(e.contains("cannot write") && !e.contains('\n'), "{e}");
    }

    #[test]
    fn another_schema_is_refused() {
        let text = super::super::json(&results()).unwrap().replacen("\"schema\": 1", "\"schema\": 999", 1);
        let e = parse_json(&text).unwrap_err().to_string();
        assert!(e.contains("999"), "{e}");
        assert!(parse_json("{}").is_err());
        assert!(parse_json("nonsense").is_err());
    }
}
