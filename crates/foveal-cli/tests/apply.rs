//! `apply`: files in, files out, and every way to hand it bad ones.

mod common;

use common::{fails, ok};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::path::Path;

/// A safetensors file of f32 tensors with made-up but fixed contents.
fn write(path: &Path, tensors: &[(&str, &[usize])]) {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(n, (_, shape))| {
            let len: usize = shape.iter().product();
            (0..len).flat_map(|i| (((i * 37 + n * 11) % 101) as f32 / 50.0 - 1.0).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, shape), d)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), d).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn f32s(t: &TensorView) -> Vec<f32> {
    t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    write(&at("in.safetensors"), &[("q", &[1, 4, 70, 32]), ("k", &[1, 2, 90, 32]), ("v", &[1, 2, 90, 32])]);
    let args = ["apply", "flashattention-2", "--in", "in.safetensors", "--out", "o.safetensors", "--mask"];
    let v: Value = serde_json::from_str(&ok(dir.path(), &args)).unwrap();
    assert_eq!(v["density"], 1.0);
    // 4 heads; query i of 70 sees 21 + i of 90 keys.
    assert_eq!(v["visited_pairs"], 4 * (0..70).map(|i| 21 + i).sum::<u64>());
    assert!(v["work"]["attend"]["pairs"].as_u64().unwrap() >= v["visited_pairs"].as_u64().unwrap());
    let bytes = std::fs::read(at("o.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("o").unwrap().shape(), [1, 4, 70, 32]);
    assert_eq!(file.tensor("lse").unwrap().shape(), [1, 4, 70]);
    let mask = file.tensor("mask").unwrap();
    assert_eq!((mask.shape(), mask.dtype()), (&[1usize, 4, 70, 90][..], Dtype::U8));
    let row: Vec<u8> = mask.data()[..90].to_vec();
    assert!(row.iter().enumerate().all(|(j, &m)| m == u8::from(j <= 20)), "first query sees 21 keys");
    // One query of one key: the output is that key's value and lse its score.
    write(&at("one.safetensors"), &[("q", &[1, 1, 1, 2]), ("k", &[1, 1, 1, 2]), ("v", &[1, 1, 1, 2])]);
    ok(dir.path(), &["apply", "flashattention-2", "--in", "one.safetensors", "--out", "two.safetensors"]);
    let (a, b) = (std::fs::read(at("one.safetensors")).unwrap(), std::fs::read(at("two.safetensors")).unwrap());
    let (a, b) = (SafeTensors::deserialize(&a).unwrap(), SafeTensors::deserialize(&b).unwrap());
    let (q, k) = (f32s(&a.tensor("q").unwrap()), f32s(&a.tensor("k").unwrap()));
    assert_eq!(f32s(&b.tensor("o").unwrap()), f32s(&a.tensor("v").unwrap()));
    let score = (q[0] * k[0] + q[1] * k[1]) / 2f32.sqrt();
    assert!((f32s(&b.tensor("lse").unwrap())[0] - score).abs() < 1e-6);
    assert!(b.tensor("mask").is_err(), "no mask unless asked for");
}

#[test]
fn same_input_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    write(&at("in.safetensors"), &[("q", &[1, 2, 300, 32]), ("k", &[1, 1, 300, 32]), ("v", &[1, 1, 300, 32])]);
    for card in foveal::registry::cards().iter().filter(|c| c.has_slot(foveal::Slot::Prefill)) {
        let id = card.id;
        let system = foveal::registry::build(&foveal::Spec::new(id), foveal::Slot::Prefill).unwrap();
        let mut base = vec!["apply", id, "--in", "in.safetensors", "--seed", "7"];
        base.extend(domain_of(&system, "2x12x12"));
        if !matches!(system, foveal::System::Mixer(_)) {
            base.push("--mask");
        }
        for out in ["a", "b"] {
            ok(dir.path(), &[&base[..], &["--out", out]].concat());
        }
        assert!(std::fs::read(at("a")).unwrap() == std::fs::read(at("b")).unwrap(), "{id} differs from run to run");
    }
}

/// The arguments that bring a problem into a system's domain.
fn domain_of(system: &foveal::System, grid: &'static str) -> Vec<&'static str> {
    let mut all = Vec::new();
    if !system.domain().causal {
        all.extend(["--causal", "false"]);
    }
    if system.domain().grid {
        all.extend(["--grid", grid]);
    }
    all
}

#[test]
fn bad_input_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    let good: [(&str, &[usize]); 3] = [("q", &[1, 2, 8, 16]), ("k", &[1, 1, 8, 16]), ("v", &[1, 1, 8, 16])];
    write(&at("good"), &good);
    let apply = |file: &str| {
        let e = fails(dir.path(), &["apply", "flashattention-2", "--in", file, "--out", "o"]);
        assert!(!at("o").exists(), "{file}: an output file was left");
        e
    };
    assert!(apply("nowhere").contains("nowhere: cannot read"), "missing file");
    assert!(apply(".").contains("give a file, not a folder"), "folder");
    let bytes = std::fs::read(at("good")).unwrap();
    std::fs::write(at("short"), &bytes[..bytes.len() - 5]).unwrap();
    assert!(apply("short").contains("short: damaged"), "truncated data");
    std::fs::write(at("shorter"), &bytes[..20]).unwrap();
    assert!(apply("shorter").contains("damaged"), "truncated header");
    std::fs::write(at("empty"), b"").unwrap();
    assert!(apply("empty").contains("damaged"), "empty");
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(at("huge"), huge).unwrap();
    assert!(apply("huge").contains("damaged"), "header size that overflows");
    write(&at("named"), &[("q", &[1, 2, 8, 16]), ("key", &[1, 1, 8, 16]), ("v", &[1, 1, 8, 16])]);
    let e = apply("named");
    assert!(e.contains("tensor `k` is missing") && e.contains("key, q, v"), "{e}");
    write(&at("flat"), &[("q", &[8, 16]), ("k", &[1, 1, 8, 16]), ("v", &[1, 1, 8, 16])]);
    assert!(apply("flat").contains("q has shape [8, 16]; expected (batch, heads, tokens, head_dim)"));
    write(&at("wide"), &[("q", &[1, 2, 8, 16]), ("k", &[1, 1, 8, 32]), ("v", &[1, 1, 8, 16])]);
    let e = apply("wide");
    assert!(e.contains("[1, 1, 8, 32]") && e.contains("[1, 2, 8, 16]"), "{e}");
    let raw = vec![0u8; 16];
    let view = TensorView::new(Dtype::I64, vec![1, 1, 1, 2], &raw).unwrap();
    std::fs::write(at("ints"), safetensors::serialize([("q", &view), ("k", &view), ("v", &view)], None).unwrap())
        .unwrap();
    assert!(apply("ints").contains("tensor `q` has dtype I64; convert it to F32, F16 or BF16"));
}

#[test]
fn bad_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    write(&at("in"), &[("q", &[1, 2, 8, 16]), ("k", &[1, 1, 8, 16]), ("v", &[1, 1, 8, 16])]);
    let apply = |more: &[&str]| {
        let args: Vec<&str> = ["apply", "--in", "in"].iter().chain(more).copied().collect();
        fails(dir.path(), &args)
    };
    assert!(apply(&["flashattention2", "--out", "o"]).contains("did you mean \"flashattention-2\""));
    assert!(apply(&["scatterbrain", "--out", "o"]).contains("not built yet"));
    let e = apply(&["flashattention-2", "--out", "o", "--set", "thresh=1"]);
    assert!(e.contains("flashattention-2 has no parameter \"thresh\""), "{e}");
    assert!(apply(&["flashattention-2", "--out", "in"]).contains("is the input file"));
    assert!(apply(&["flashattention-2", "--out", "no/such/o"]).contains("does not exist; create it first"));
    assert!(apply(&["flashattention-2", "--out", "."]).contains("is a folder"));
    assert!(apply(&["flashattention-2", "--out", "o", "--scale", "NaN"]).contains("finite"));
    assert!(!at("o").exists());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["in"], "nothing is left behind");
}

#[test]
fn parameters_of_other_systems_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("in"), &[("q", &[1, 2, 8, 16]), ("k", &[1, 1, 8, 16]), ("v", &[1, 1, 8, 16])]);
    for card in foveal::registry::cards() {
        if !card.has_slot(foveal::Slot::Prefill) {
            let e = fails(dir.path(), &["apply", card.id, "--in", "in", "--out", "o"]);
            assert!(e.contains("cannot be used as a prefill system"), "{e}");
            continue;
        }
        let system = foveal::registry::build(&foveal::Spec::new(card.id), foveal::Slot::Prefill).unwrap();
        let mut base = vec!["apply", card.id, "--in", "in", "--out", "o"];
        base.extend(domain_of(&system, "2x2x2"));
        // Every parameter is known by its name, takes its own default, and a misspelt one is refused with a hint.
        for p in (card.params)() {
            let value = match &p.default {
                Value::String(s) => s.clone(),
                Value::Array(_) => continue,
                v => v.to_string(),
            };
            let set = format!("{}={value}", p.name);
            ok(dir.path(), &[&base[..], &["--set", &set]].concat());
            let set = format!("{}x={value}", p.name);
            let e = fails(dir.path(), &[&base[..], &["--set", &set]].concat());
            assert!(e.contains("did you mean"), "{e}");
        }
    }
}
