//! `foveal doctor`.

use super::print_json;
use crate::Context;
use crate::cli::DoctorArgs;
use crate::error::Result;
use crate::machine::{memory, physical_cores, size};
use foveal_kernels::Isa;
use foveal_llm::pull;
use serde::Serialize;
use std::io::Write;
use std::process::{Command, Stdio};

/// One thing looked at.
#[derive(Serialize)]
struct Finding {
    name: &'static str,
    /// Whether it is there.
    ok: bool,
    value: String,
    /// What its absence disables; empty when it is there.
    disables: &'static str,
}

pub fn run(a: &DoctorArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    let findings = findings(ctx);
    if a.json {
        let mut v = serde_json::Map::new();
        v.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        v.insert("os".into(), std::env::consts::OS.into());
        v.insert("arch".into(), std::env::consts::ARCH.into());
        v.insert("isa_detected".into(), Isa::detect().to_string().into());
        v.insert("isa_active".into(), Isa::active().to_string().into());
        v.insert("isa_available".into(), Isa::available().iter().map(Isa::to_string).collect());
        v.insert("amx".into(), (Isa::detect() == Isa::Amx).into());
        v.insert("physical_cores".into(), physical_cores().into());
        v.insert("threads".into(), ctx.threads.into());
        let (total, available) = memory().map_or((None, None), |(t, a)| (Some(t), Some(a)));
        v.insert("memory_total".into(), total.into());
        v.insert("memory_available".into(), available.into());
        v.insert("findings".into(), serde_json::to_value(&findings).map_err(std::io::Error::from)?);
        return print_json(out, &v);
    }
    writeln!(out, "foveal {} on {} {}\n", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH)?;
    let width = findings.iter().map(|f| f.name.len()).max().unwrap_or(0);
    for f in &findings {
        writeln!(out, "{} {:width$}  {}", if f.ok { "ok     " } else { "missing" }, f.name, f.value)?;
        if !f.disables.is_empty() {
            writeln!(out, "        {:width$}  -> {}", "", f.disables)?;
        }
    }
    Ok(())
}

fn findings(ctx: &Context) -> Vec<Finding> {
    let finding =
        |name, ok: bool, value: String, disables| Finding { name, ok, value, disables: if ok { "" } else { disables } };
    let (best, active) = (Isa::detect(), Isa::active());
    let mut all = Vec::new();
    all.push(finding(
        "instruction set",
        active == best,
        if active == best { active.to_string() } else { format!("{active} in force, {best} detected") },
        "the fastest kernels: unset FOVEAL_ISA and --isa to get them",
    ));
    all.push(finding(
        "AMX bf16 tiles",
        best >= Isa::Amx,
        if best >= Isa::Amx { "yes" } else { "no" }.into(),
        "bf16 matrix products on tiles; AVX-512, AVX2 or portable code serves them",
    ));
    let (cores, threads) = (physical_cores(), ctx.threads);
    all.push(finding("threads", true, format!("{threads} in use, {cores} physical cores available"), ""));
    match memory() {
        Some((total, free)) => all.push(finding(
            "memory",
            free >= 2 << 30,
            format!("{} available of {}", size(free), size(total)),
            "the default comparison, which needs up to 2 GiB: free some, or shorten --lengths",
        )),
        None => all.push(finding("memory", true, "not reported by this system".into(), "")),
    }
    let python = ["python3", "python"].into_iter().find_map(|p| Some((p, answer(p, &["--version"])?)));
    match python {
        None => all.push(finding(
            "python",
            false,
            "no python3 on PATH".into(),
            "fetching models and texts by name; local files and folders work",
        )),
        Some((name, version)) => {
            all.push(finding("python", true, version, ""));
            let pip = answer(name, &["-m", "pip", "--version"]);
            all.push(finding(
                "pip",
                pip.is_some(),
                pip.map_or("not installed".into(), |s| s.split(" from ").next().unwrap_or(&s).to_string()),
                "fetching models and texts by name; local files and folders work",
            ));
        }
    }
    all.extend(cache_findings());
    all
}

/// The cache folder and what is in it.
fn cache_findings() -> Vec<Finding> {
    let folder = match pull::cache_dir() {
        Ok(f) => f,
        Err(e) => {
            return vec![Finding {
                name: "cache folder",
                ok: false,
                value: e.to_string(),
                disables: "fetching models and texts by name; local files and folders work",
            }];
        }
    };
    let there = folder.is_dir();
    let mut all = vec![Finding {
        name: "cache folder",
        // Made by the first fetch: its absence disables nothing.
        ok: true,
        value: format!("{}{}", folder.display(), if there { "" } else { " (made by the first fetch)" }),
        disables: "",
    }];
    for known in pull::MODELS.iter().chain([&pull::TEXT]) {
        let bytes = std::fs::metadata(folder.join(known.file)).ok().filter(|m| m.is_file()).map(|m| m.len());
        all.push(Finding {
            name: known.name,
            ok: bytes.is_some(),
            value: bytes.map_or("not fetched".into(), |b| format!("{}, {}", known.about, size(b))),
            disables: if bytes.is_some() {
                ""
            } else {
                "nothing for long: it is fetched at first use, or now by `foveal pull`; with --offline it stays away"
            },
        });
    }
    all
}

/// First line that a program prints, if it runs and succeeds.
fn answer(program: &str, args: &[&str]) -> Option<String> {
    let done = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    if !done.status.success() {
        return None;
    }
    let text = if done.stdout.is_empty() { done.stderr } else { done.stdout };
    Some(String::from_utf8_lossy(&text).lines().next().unwrap_or("").trim().to_string())
}
