//! Labelled data, fetched once by package name, checked against a pinned SHA-256, kept in the user's cache folder.

use crate::error::{Result, TuneError};
use foveal_llm::LlmError;
use foveal_llm::pull::cache_dir;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files of a Debian package.
struct Deb {
    name: &'static str,
    package: &'static str,
    version: &'static str,
    sha256: &'static str,
    folder: &'static str,
    files: [&'static str; 4],
}

const FASHION: Deb = Deb {
    name: "fashion-mnist",
    package: "dataset-fashion-mnist",
    version: "0.0~git20200523.55506a9-1",
    sha256: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    folder: "usr/share/datasets/fashion-mnist",
    files: [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ],
};

/// The folder with Fashion-MNIST's four files (Xiao et al. 2017, arXiv 1708.07747; MIT licence), fetched if need be.
///
/// Errors: not there and `offline`; no `apt-get` or `dpkg-deb`; a package that is not the pinned one.
pub fn fashion_mnist(offline: bool) -> Result<PathBuf> {
    fetch(&FASHION, &cache_dir()?, offline)
}

fn fetch(deb: &Deb, cache: &Path, offline: bool) -> Result<PathBuf> {
    let target = cache.join(deb.name);
    if deb.files.iter().all(|f| target.join(f).is_file()) {
        return Ok(target);
    }
    if offline {
        return Err(LlmError::Offline { name: deb.name.into(), cache: cache.into() }.into());
    }
    let io =
        |path: &Path, action, e: std::io::Error| TuneError::File { path: path.into(), action, message: e.to_string() };
    std::fs::create_dir_all(cache).map_err(|e| io(cache, "create the cache folder", e))?;
    let temp = tempfile::Builder::new()
        .prefix(".fetch-")
        .tempdir_in(cache)
        .map_err(|e| io(cache, "create a temporary folder", e))?;
    let requirement = format!("{}={}", deb.package, deb.version);
    run(Command::new("apt-get").args(["download", "-q", &requirement]).current_dir(temp.path()), &requirement)?;
    let package = std::fs::read_dir(temp.path())
        .map_err(|e| io(temp.path(), "read", e))?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.extension().is_some_and(|x| x == "deb"))
        .ok_or_else(|| failed(&requirement, "apt-get ended well but left no package"))?;
    let bytes = std::fs::read(&package).map_err(|e| io(&package, "read", e))?;
    let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    if hash != deb.sha256 {
        return Err(failed(&requirement, format!("its SHA-256 is {hash}, not the pinned {}", deb.sha256)));
    }
    run(Command::new("dpkg-deb").arg("-x").arg(&package).arg("x").current_dir(temp.path()), &requirement)?;
    let unpacked = temp.path().join("x").join(deb.folder);
    for f in deb.files {
        if !unpacked.join(f).is_file() {
            return Err(failed(&requirement, format!("it holds no {f}")));
        }
    }
    match std::fs::rename(&unpacked, &target) {
        // Another process was faster, with the same files.
        Err(_) if deb.files.iter().all(|f| target.join(f).is_file()) => Ok(target),
        Err(e) => Err(io(&target, "move the finished folder into place", e)),
        Ok(()) => Ok(target),
    }
}

fn failed(package: &str, problem: impl Into<String>) -> TuneError {
    LlmError::Fetch { package: package.into(), problem: problem.into() }.into()
}

fn run(command: &mut Command, package: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|e| {
        failed(
            package,
            format!("`{name}` does not start ({e}); put the package's files into a folder and name it with --data"),
        )
    })?;
    if done.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&done.stderr);
    let line = words.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message").trim().to_owned();
    Err(failed(
        package,
        format!("`{name}` failed: {line}; put the package's files into a folder and name it with --data"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_used_and_offline_says_what_is_missing() {
        let cache = tempfile::tempdir().unwrap();
        let e = fetch(&FASHION, cache.path(), true).unwrap_err().to_string();
        assert!(e.contains("fashion-mnist"), "{e}");
        let folder = cache.path().join("fashion-mnist");
        std::fs::create_dir_all(&folder).unwrap();
        FASHION.files.iter().for_each(|f| std::fs::write(folder.join(f), b"").unwrap());
        assert_eq!(fetch(&FASHION, cache.path(), true).unwrap(), folder);
    }
}
