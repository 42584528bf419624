//! Running the binary and reading what it says.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The binary, without a network, with an empty cache folder in `dir`.
pub fn foveal(dir: &Path) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_foveal"));
    c.current_dir(dir).env("FOVEAL_CACHE", dir.join("cache")).env_remove("FOVEAL_LOG").stdin(Stdio::null());
    c
}

pub fn run(dir: &Path, args: &[&str]) -> Output {
    foveal(dir).args(args).output().expect("the binary starts")
}

/// Standard output of a command that must succeed.
pub fn ok(dir: &Path, args: &[&str]) -> String {
    let o = run(dir, args);
    let err = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.success(), "foveal {args:?} failed: {err}");
    String::from_utf8(o.stdout).expect("UTF-8 on standard output")
}

/// The one error line of a command that must fail with exit code 1 and say nothing else.
pub fn fails(dir: &Path, args: &[&str]) -> String {
    let o = run(dir, args);
    let err = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(1), "foveal {args:?}: {err}");
    assert!(o.stdout.is_empty(), "foveal {args:?} wrote to standard output before failing");
    let lines: Vec<&str> = err.lines().collect();
    assert_eq!(lines.len(), 1, "foveal {args:?} must give one line, gave: {err}");
    assert!(lines[0].starts_with("error: ") && lines[0].len() > 20, "{err}");
    lines[0].to_string()
}
