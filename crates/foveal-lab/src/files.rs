//! Output files: whole or not at all.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A file written under a temporary name beside its place; gone again unless [placed](Staged::place).
#[derive(Debug)]
pub struct Staged {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Staged {
    /// Write `bytes` for `path`, all of them, to the disk.
    ///
    /// # Errors
    /// `path` is a folder or lies in none, or the system refuses; nothing is left behind then.
    pub fn write(path: &Path, bytes: &[u8]) -> io::Result<Self> {
        if path.is_dir() {
            return Err(io::Error::new(ErrorKind::IsADirectory, "it is a folder"));
        }
        let folder = match path.parent() {
            Some(d) if !d.as_os_str().is_empty() => d,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            let problem = format!("the folder {} does not exist; create it first", folder.display());
            return Err(io::Error::new(ErrorKind::NotFound, problem));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".foveal-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any file that a program creates; the umask still applies.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        // Some systems find out only here that the disk is full.
        file.as_file().sync_all()?;
        Ok(Self { file, path: path.into() })
    }

    /// Put the file in its place, over one that is there.
    ///
    /// # Errors
    /// The system refuses; what was there stays.
    pub fn place(self) -> io::Result<()> {
        self.file.persist(&self.path).map(drop).map_err(|e| e.error)
    }

    /// Where [`Staged::place`] puts it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Write `bytes` to `path`: a reader sees the old file or the whole new one, never a part.
///
/// # Errors
/// As [`Staged::write`].
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    Staged::write(path, bytes)?.place()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        write(&path, b"old").unwrap();
        let staged = Staged::write(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        drop(staged);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn says_what_is_wrong_with_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let says = |path: &Path, words: &str| {
            let e = write(path, b"x").unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        };
        says(&dir.path().join("none/x"), "does not exist; create it first");
        says(dir.path(), "is a folder");
    }

    #[cfg(unix)]
    #[test]
    fn is_readable_as_other_files_are() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("a"), dir.path().join("b"));
        write(&ours, b"x").unwrap();
        std::fs::write(&plain, b"x").unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
