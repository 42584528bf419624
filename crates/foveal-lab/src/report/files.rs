//! The files of a report.

use crate::error::{LabError, Result};
use crate::files::Staged;
use crate::results::Results;
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

/// Write `<stem>.html`, `.json` and `.csv` (default stem `foveal-report` in the working folder):
/// all of them, or none if there is no room for all.
///
/// # Errors
/// A folder that is missing, cannot be written to or is full; nothing is left behind then.
pub fn write_all(r: &Results, stem: &Path) -> Result<Written> {
    let with = |ext: &str| {
        let mut s = stem.as_os_str().to_owned();
        s.push(ext);
        PathBuf::from(s)
    };
    let w = Written { html: with(".html"), json: with(".json"), csv: with(".csv") };
    let failed = |path: &Path, source| LabError::Io { path: path.into(), action: "write", source };
    let stage = |path: &Path, text: &str| Staged::write(path, text.as_bytes()).map_err(|e| failed(path, e));
    let staged = [stage(&w.json, &super::json(r)?)?, stage(&w.csv, &super::csv(r))?, stage(&w.html, &super::html(r))?];
    for file in staged {
        let path = file.path().to_path_buf();
        file.place().map_err(|e| failed(&path, e))?;
    }
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
        let e = write_all(&results(), &dir.path().join("none").join("x")).unwrap_err().to_string();
        assert!(e.contains("cannot write") && e.contains("create it first") && !e.contains('\n'), "{e}");
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
