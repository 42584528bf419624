//! `list`, `show`, `doctor`, exit codes.

mod common;

use common::{fails, foveal, ok, run};
use serde_json::Value;
use std::io::Read;
use std::process::Stdio;

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn list_shows_all_301() {
    let dir = tempfile::tempdir().unwrap();
    let text = ok(dir.path(), &["list"]);
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("301 systems: ") && last.ends_with("18 nothing to build"), "{last}");
    assert_eq!(text.lines().count(), 301 + 3);
    let all = json(&ok(dir.path(), &["list", "--json"]));
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 301);
    for e in all {
        // A reason exactly where there is nothing to build; slots exactly where something is built.
        assert_eq!(e["state"] == "nothing-to-build", e["reason"].is_string(), "{e}");
        assert_eq!(e["state"] == "done", !e["slots"].as_array().unwrap().is_empty(), "{e}");
    }
}

#[test]
fn list_filters() {
    let dir = tempfile::tempdir().unwrap();
    let all = |args: &[&str]| {
        let args: Vec<&str> = ["list", "--json"].iter().chain(args).copied().collect();
        json(&ok(dir.path(), &args)).as_array().unwrap().clone()
    };
    let (done, open, nothing) = (all(&["--state", "done"]), all(&["--state", "not-yet"]), all(&["--state", "nothing"]));
    assert_eq!(done.len() + open.len() + nothing.len(), 301);
    assert_eq!(nothing.len(), 18);
    assert!(done.iter().any(|e| e["id"] == "flashattention-2"));
    let cache = all(&["--family", "G"]);
    assert!(!cache.is_empty() && cache.iter().all(|e| e["family"] == "G"));
    assert_eq!(cache, all(&["--family", "cache"]));
    assert!(all(&["--slot", "prefill"]).iter().any(|e| e["id"] == "flashattention-2"));
    assert!(all(&["--slot", "prefill"]).iter().all(|e| e["state"] == "done"));
    let found = all(&["--search", "THINNER"]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["id"], "think");
    assert!(all(&["--search", "no such words anywhere"]).is_empty());
}

#[test]
fn show_every_built_system() {
    let dir = tempfile::tempdir().unwrap();
    let done = json(&ok(dir.path(), &["list", "--json", "--state", "done"]));
    for e in done.as_array().unwrap() {
        let id = e["id"].as_str().unwrap();
        let text = ok(dir.path(), &["show", id]);
        for heading in ["paper", "slots", "cost", "equation", "parameters", "laws"] {
            assert!(text.lines().any(|l| l.starts_with(heading)), "show {id} lacks {heading}");
        }
        let v = json(&ok(dir.path(), &["show", id, "--json"]));
        assert_eq!(v["id"], id);
        assert!(!v["laws"].as_array().unwrap().is_empty(), "{id} promises nothing");
        for p in v["params"].as_array().unwrap() {
            let name = p["name"].as_str().unwrap();
            assert!(!p["doc"].as_str().unwrap().is_empty(), "{id}: {name} is undocumented");
            assert!(!p["default"].is_null(), "{id}: {name} has no default");
            assert!(text.contains(name));
        }
    }
}

#[test]
fn show_what_is_not_built() {
    let dir = tempfile::tempdir().unwrap();
    let text = ok(dir.path(), &["show", "attention-survey"]);
    assert!(text.contains("nothing to build") && text.contains("survey"), "{text}");
    let open = json(&ok(dir.path(), &["list", "--json", "--state", "not-yet"]));
    let id = open[0]["id"].as_str().unwrap();
    assert!(ok(dir.path(), &["show", id]).contains("not yet"));
}

#[test]
fn unknown_names_suggest_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let e = fails(dir.path(), &["show", "flashatention-2"]);
    assert!(e.contains("did you mean \"flashattention-2\""), "{e}");
    let e = fails(dir.path(), &["show", "zzzzzzzzzzzz"]);
    assert!(e.contains("foveal list") && !e.contains("did you mean"), "{e}");
}

#[test]
fn doctor_reports_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let v = json(&ok(dir.path(), &["doctor", "--json"]));
    assert!(v["threads"].as_u64().unwrap() >= 1);
    assert!(v["isa_available"].as_array().unwrap().contains(&v["isa_active"]));
    for f in v["findings"].as_array().unwrap() {
        assert_eq!(f["ok"] == false, !f["disables"].as_str().unwrap().is_empty(), "{f}");
    }
    let v = json(&ok(dir.path(), &["doctor", "--json", "--isa", "portable", "--threads", "3"]));
    assert_eq!(v["isa_active"], "portable");
    assert_eq!(v["threads"], 3);
    // Nothing to run: no PATH, no python; the report says what that disables.
    let o = foveal(dir.path()).args(["doctor"]).env("PATH", "").output().unwrap();
    let text = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(o.status.success() && text.contains("missing python") && text.contains("-> fetching models"), "{text}");
}

#[test]
fn usage_errors_exit_with_2() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["no-such-command"][..], &["list", "--jsn"], &["--threads", "0", "list"], &["--isa", "sse9", "list"]]
    {
        let o = run(dir.path(), args);
        assert_eq!(o.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&o.stderr).starts_with("error: "), "{args:?}");
    }
}

#[test]
fn a_closed_pipe_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = foveal(dir.path())
        .arg("list")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(err, "");
}

#[test]
fn generated_documentation_is_fresh() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), &["docs", "--check", "--dir", docs]);
    // The check can fail: a changed copy is refused and named.
    ok(dir.path(), &["docs", "--dir", "."]);
    std::fs::write(dir.path().join("cli.md"), "old\n").unwrap();
    let e = fails(dir.path(), &["docs", "--check", "--dir", "."]);
    assert!(e.contains("cli.md: out of date at line 1"), "{e}");
}

#[test]
fn show_simulates_tiles_of_static_patterns() {
    let dir = tempfile::tempdir().unwrap();
    // Blocks of 4 x 8 x 8 in tiles of 4 x 4 x 4: 8192 tokens see 256 keys each, in whole tiles.
    let blocked = "generalized-neighborhood-attention:window=4;8;8,stride=4;8;8";
    let text = ok(dir.path(), &["show", blocked, "--simulate", "16x16x32", "--tile", "4x4x4", "--kv-tile", "4x4x4"]);
    for part in ["8192 tokens", "256.0 keys a query", "32.00", "none: block-sparse"] {
        assert!(text.contains(part), "{part} is missing from {text}");
    }
    let v = json(&ok(dir.path(), &["show", "halonet", "--simulate", "64x64", "--json"]));
    let s = &v["simulations"][0];
    assert_eq!(s["kv_tile"], serde_json::json!([1, 1, 1]));
    assert!(s["speedup"].as_f64().unwrap() > 15.0 && s["bound"].as_f64() >= s["speedup"].as_f64(), "{s}");
    assert!(fails(dir.path(), &["show", "xattention", "--simulate", "8x8"]).contains("--simulate"));
}
