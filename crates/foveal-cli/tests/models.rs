//! Commands that load a model: bad files give one clear line, good tiny ones run end to end.

mod common;

use common::{fails, foveal, ok, run};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Stdio;

/// A Llama of two layers with small fixed weights, one token a byte-like symbol: it says nothing
/// sensible, but everything on the way to its words is real.
fn tiny_model(folder: &Path) {
    const VOCAB: usize = 259;
    let (hidden, ffn, heads, kv, d, layers) = (32usize, 64usize, 4usize, 2usize, 16usize, 2usize);
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": d,
        "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": true, "bos_token_id": 256, "eos_token_id": 257, "hidden_act": "silu",
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![VOCAB, hidden]), ("model.norm.weight".into(), vec![hidden])];
    for l in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![heads * d, hidden]),
            ("self_attn.k_proj", vec![kv * d, hidden]),
            ("self_attn.v_proj", vec![kv * d, hidden]),
            ("self_attn.o_proj", vec![hidden, heads * d]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            tensors.push((format!("model.layers.{l}.{name}.weight"), shape));
        }
    }
    // A linear congruential generator: weights that no platform rounds differently.
    let mut state = 12_345u32;
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, shape)| {
            (0..shape.iter().product::<usize>())
                .flat_map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let x = (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5;
                    if name.contains("norm") { 1.0f32 + 0.1 * x } else { 0.5 * x }.to_le_bytes()
                })
                .collect()
        })
        .collect();
    let views =
        tensors.iter().zip(&data).map(|((n, s), d)| (n.clone(), TensorView::new(Dtype::F32, s.clone(), d).unwrap()));
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer(VOCAB).to_string()).unwrap();
}

/// Byte-level BPE without a merge: one token a byte.
fn tokenizer(vocab: usize) -> Value {
    // The byte-to-character table of byte-level BPE: printable bytes are themselves, the others follow from 256 on.
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    let mut map = serde_json::Map::new();
    for b in 0..256u32 {
        let c = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        map.insert(char::from_u32(c).unwrap().to_string(), b.into());
    }
    let special = ["<s>", "</s>", "<pad>"];
    let added: Vec<Value> = special
        .iter()
        .zip(256..vocab)
        .map(|(t, id)| {
            json!({"id": id, "content": t, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    for (t, id) in special.iter().zip(256..vocab) {
        map.insert((*t).into(), id.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": map, "merges": []},
    })
}

fn text(n: usize) -> String {
    (0..n).map(|i| ["the ", "cat ", "sat ", "on ", "a ", "mat. "][i * i % 6]).collect()
}

#[test]
fn bad_models_give_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    let run = |model: &str| fails(dir.path(), &["run", model, "hello there", "--quiet"]);
    assert!(run("nowhere.gguf").contains("no model at `nowhere.gguf`"));
    assert!(run("smollm2-135m-instrct").contains("smollm2-135m-instruct"), "the nearest known name");
    std::fs::create_dir(at("empty")).unwrap();
    assert!(run("empty").contains("empty: not a checkpoint"));
    std::fs::write(at("short.gguf"), b"GGUF\x03\0\0\0").unwrap();
    assert!(run("short.gguf").contains("short.gguf: damaged GGUF file"));
    let mut hostile = b"GGUF\x03\0\0\0".to_vec();
    hostile.extend([0xff; 16]);
    std::fs::write(at("hostile.gguf"), hostile).unwrap();
    assert!(run("hostile.gguf").contains("damaged GGUF file"), "counts that overflow");
    std::fs::write(at("other.bin"), b"no model at all").unwrap();
    assert!(run("other.bin").contains("other.bin"));
    tiny_model(&at("cut"));
    let whole = std::fs::read(at("cut/model.safetensors")).unwrap();
    std::fs::write(at("cut/model.safetensors"), &whole[..whole.len() / 2]).unwrap();
    assert!(run("cut").contains("damaged safetensors file"));
    tiny_model(&at("mute"));
    std::fs::remove_file(at("mute/tokenizer.json")).unwrap();
    assert!(run("mute").contains("tokenizer"));
    tiny_model(&at("bare"));
    std::fs::remove_file(at("bare/config.json")).unwrap();
    assert!(run("bare").contains("bare"));
}

#[test]
fn offline_never_fetches() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["compare", "--offline"][..],
        &["run", "smollm2-135m-instruct", "hi", "--offline"],
        &["eval", "ppl", "--offline"],
    ] {
        let e = fails(dir.path(), args);
        assert!(e.contains("--offline forbids fetching"), "{e}");
    }
    assert!(!dir.path().join("cache").exists(), "not even a folder is made");
    let e = fails(dir.path(), &["pull", "smollm"]);
    assert!(e.contains("known: smollm2-135m-instruct, kjv"), "{e}");
}

#[test]
fn generates_the_same_from_every_source_of_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model(&dir.path().join("m"));
    let args = ["run", "m", "--no-chat", "--max-tokens", "12", "--temperature", "0.8", "--seed", "5"];
    let with = |more: &[&str]| ok(dir.path(), &args.iter().chain(more).copied().collect::<Vec<_>>());
    std::fs::write(dir.path().join("prompt"), "the cat sat").unwrap();
    let first = ok(dir.path(), &[&["run", "m", "the cat sat"][..], &args[2..]].concat());
    assert!(!first.is_empty());
    assert_eq!(first, with(&["--prompt-file", "prompt"]));
    let mut child = foveal(dir.path())
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"the cat sat").unwrap();
    assert_eq!(first.as_bytes(), child.wait_with_output().unwrap().stdout);
    // A stop string is cut off with what follows it.
    let stop: String = first.chars().skip(2).take(2).collect();
    let cut = with(&["--prompt-file", "prompt", "--stop", &stop]);
    assert!(!cut.contains(&stop) && cut.len() < first.len(), "{first:?} {cut:?}");
    // What was measured goes to standard error, and nowhere under --quiet.
    let o = run(dir.path(), &[&["run", "m", "the cat sat"][..], &args[2..]].concat());
    assert!(String::from_utf8_lossy(&o.stderr).contains("prompt 11 tokens"));
    let o = run(dir.path(), &[&["run", "m", "the cat sat", "--quiet"][..], &args[2..]].concat());
    assert!(o.stderr.is_empty());
}

#[test]
fn bad_run_arguments() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model(&dir.path().join("m"));
    let run = |more: &[&str]| {
        let args: Vec<&str> = ["run", "m", "hi", "--quiet", "--no-chat"].iter().chain(more).copied().collect();
        fails(dir.path(), &args)
    };
    assert!(fails(dir.path(), &["run", "m"]).contains("the prompt is empty"));
    assert!(run(&["--temperature", "nan"]).contains("--temperature"));
    assert!(run(&["--top-p", "1.5"]).contains("--top-p 1.5"));
    assert!(run(&["--max-tokens", "0"]).contains("--max-tokens 0"));
    assert!(run(&["--prefill", "xatention"]).contains("did you mean \"xattention\""));
    assert!(run(&["--prefill", "think"]).contains("cannot be used as a prefill system"));
    assert!(run(&["--cache", "think:ratoi=0.5"]).contains("did you mean \"ratio\""));
    std::fs::write(dir.path().join("p.toml"), "version = 9\n").unwrap();
    assert!(run(&["--plan", "p.toml"]).contains("version = 9"));
    std::fs::write(dir.path().join("p.toml"), "version = 1\n[[rule]]\nlayers = [7]\nprefill = \"moba\"\n").unwrap();
    assert!(run(&["--plan", "p.toml"]).contains("layer 7 is out of range"));
    std::fs::write(dir.path().join("latin"), [b'a', 0xe9, b'b']).unwrap();
    let e = fails(dir.path(), &["run", "m", "--prompt-file", "latin", "--quiet"]);
    assert!(e.contains("not UTF-8 text (at byte 1)"), "{e}");
}

#[test]
fn compares_and_writes_three_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    tiny_model(&at("m"));
    std::fs::write(at("text"), text(400)).unwrap();
    let args = [
        "compare",
        "m",
        "--text",
        "text",
        "--lengths",
        "128,256",
        "--prefill",
        "xattention,moba:topk=2",
        "--trials",
        "0",
        "--decode-steps",
        "2",
        "--out",
        "r",
    ];
    let shown = ok(dir.path(), &args);
    for word in ["xattention", "moba:topk=2", "dense", "Verdicts"] {
        assert!(shown.contains(word), "{word} is missing from {shown}");
    }
    let report: Value = serde_json::from_str(&std::fs::read_to_string(at("r.json")).unwrap()).unwrap();
    assert_eq!(report["rows"].as_array().unwrap().len(), 6, "three systems at two lengths");
    assert!(std::fs::read_to_string(at("r.csv")).unwrap().lines().count() >= 7);
    let page = std::fs::read_to_string(at("r.html")).unwrap();
    assert!(page.contains("<svg") && !page.contains("src=\"http"), "one self-contained page");
    let e = fails(dir.path(), &["compare", "m", "--text", "text", "--lengths", "8192", "--prefill", "moba", "--quiet"]);
    assert!(e.contains("tokens") && e.contains("give a longer text"), "{e}");
    let e = fails(dir.path(), &["compare", "m", "--out", "no/r"]);
    assert!(e.contains("create it first"), "{e}");
}

#[test]
fn evaluates_and_plans() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    tiny_model(&at("m"));
    std::fs::write(at("text"), text(400)).unwrap();
    let told = ok(dir.path(), &["plan", "m", "--text", "text", "--length", "512", "--out", "p.toml"]);
    assert!(told.contains("8 heads"), "{told}");
    // What no head can meet leaves all of them dense, and says so.
    let strict =
        run(dir.path(), &["plan", "m", "--text", "text", "--length", "512", "--max-error", "0", "--out", "d.toml"]);
    let (told, warned) = (String::from_utf8_lossy(&strict.stdout), String::from_utf8_lossy(&strict.stderr));
    assert!(told.contains("8 heads at 1.00 of dense cost") && told.contains("8 dense"), "{told}");
    for part in ["8 of 8 heads stay dense", "Raise --budget", "--length", "0: 0 1 2 3; 1: 0 1 2 3"] {
        assert!(warned.contains(part), "{part} is missing from {warned}");
    }
    assert!(fails(dir.path(), &["plan", "m", "--max-error", "-1"]).contains("--max-error"));
    // Windows of all heads share one budget; the plan holds what was chosen.
    let args = [
        "plan",
        "m",
        "--system",
        "moa-sparse",
        "--text",
        "text",
        "--length",
        "512",
        "--budget",
        "0.6",
        "--out",
        "w.toml",
    ];
    let told = ok(dir.path(), &args);
    assert!(told.contains("8 heads at 0.") && told.contains("windows used"), "{told}");
    let plan = std::fs::read_to_string(at("w.toml")).unwrap();
    assert!(plan.contains("prefill = \"moa-sparse:alpha="), "{plan}");
    let ppl = |more: &[&str]| -> f64 {
        let args: Vec<&str> =
            ["eval", "ppl", "m", "--text", "text", "--length", "512", "--json"].iter().chain(more).copied().collect();
        serde_json::from_str::<Value>(&ok(dir.path(), &args)).unwrap()["score"]["ppl"].as_f64().unwrap()
    };
    let (dense, planned) = (ppl(&[]), ppl(&["--plan", "p.toml"]));
    assert_eq!(dense, ppl(&["--plan", "d.toml"]), "a plan of dense heads is dense");
    assert!(dense.is_finite() && dense > 1.0 && (planned / dense - 1.0).abs() < 0.5, "{dense} {planned}");
    assert_eq!(dense, ppl(&["--prefill", "flashattention-2"]), "the dense id is dense");
}

#[test]
fn teaches_gates_and_runs_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    tiny_model(&at("m"));
    std::fs::write(at("text"), text(400)).unwrap();
    let small = ["--length", "128", "--block-size", "16", "--sequences", "3", "--held-out", "1", "--budgets", "2,4"];
    let tune = |more: &[&'static str]| -> Vec<&'static str> {
        ["tune", "gates", "m", "--text", "text"].iter().chain(&small).chain(more).copied().collect()
    };
    let args = tune(&["--steps", "60", "--lr", "0.01", "--out", "g.safetensors", "--report", "g.json"]);
    let told = ok(dir.path(), &args);
    assert!(told.contains("gate after training") && told.contains("seerattention:gates=g.safetensors"), "{told}");
    let report: Value = serde_json::from_slice(&std::fs::read(at("g.json")).unwrap()).unwrap();
    let (loss, recall) = (&report["report"]["loss"], &report["report"]["recall"]);
    assert!(loss[1].as_f64().unwrap() < loss[0].as_f64().unwrap(), "{loss}");
    for budget in recall.as_array().unwrap() {
        let of = |name: &str| -> f64 {
            let all = budget["choices"].as_array().unwrap();
            all.iter().find(|c| c["choice"] == name).unwrap()["recall"].as_f64().unwrap()
        };
        let best = of("best possible");
        assert!(
            of("gate after training") > of("random") && of("gate after training") <= best && best <= 1.0,
            "{budget}"
        );
    }
    // The same settings give the same gates.
    let first = std::fs::read(at("g.safetensors")).unwrap();
    ok(dir.path(), &args);
    assert!(first == std::fs::read(at("g.safetensors")).unwrap(), "the same settings gave other gates");
    let ppl = |prefill: &str| -> f64 {
        let args = ["eval", "ppl", "m", "--text", "text", "--length", "512", "--json", "--prefill", prefill];
        serde_json::from_str::<Value>(&ok(dir.path(), &args)).unwrap()["score"]["ppl"].as_f64().unwrap()
    };
    let gates = "seerattention:gates=g.safetensors,block_size=16";
    assert_eq!(ppl(&format!("{gates},threshold=0")), ppl("seerattention:threshold=0,block_size=16"));
    assert!(ppl(&format!("{gates},topk=4")).is_finite());
    let e = fails(dir.path(), &tune(&["--quiet", "--out", "no/g.safetensors"]));
    assert!(e.contains("no does not exist"), "{e}");
    let e = fails(dir.path(), &["tune", "gates", "m", "--text", "text", "--quiet"]);
    assert!(e.contains("tokens of text") && e.contains("give a longer text"), "{e}");
}

#[test]
fn times_the_primitives() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["bench", "ops", "--filter", "attend", "--tokens", "64", "--seconds", "0", "--format", "json"];
    let rows: Value = serde_json::from_str(&ok(dir.path(), &args)).unwrap();
    assert!(rows.as_array().unwrap().iter().all(|r| r["median_ms"].as_f64().unwrap() > 0.0));
    let e = fails(dir.path(), &["bench", "ops", "--tokens", "1048576", "--head-dim", "1000000", "--quiet"]);
    assert!(e.contains("more than 8 GiB"), "{e}");
    assert!(fails(dir.path(), &["bench", "ops", "--filter", "no such op", "--quiet"]).contains("matches no operation"));
}

#[test]
fn places_the_primitives_under_the_roofs_of_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let ops = ["bench", "ops", "--tokens", "64", "--heads", "2", "--kv-heads", "1", "--seconds", "0"];
    let run = |more: &[&str]| ok(dir.path(), &[&ops[..], more].concat());
    let table = run(&["--report", "page.html", "--json", "data.json"]);
    for word in
        ["f32 product", "bf16 product", "memory read", "% of roof", "attend backward", "recur delta", "long_conv"]
    {
        assert!(table.contains(word), "{word}: {table}");
    }
    let page = std::fs::read_to_string(dir.path().join("page.html")).unwrap();
    assert!(page.contains("<svg") && page.ends_with("</html>\n") && !page.contains("http:"), "{page}");
    let data: Value = serde_json::from_str(&std::fs::read_to_string(dir.path().join("data.json")).unwrap()).unwrap();
    assert!(data["ceilings"]["read_all"]["rate"].as_f64().unwrap() > 0.0);
    let points = data["points"].as_array().unwrap();
    assert!(points.iter().all(|p| p["share"].as_f64().unwrap() > 0.0), "{points:?}");
    assert_eq!(left_in(dir.path()), ["data.json", "page.html"]);
    let e = fails(dir.path(), &[&ops[..], &["--report", "none/page.html", "--quiet"]].concat());
    assert!(e.contains("create it first"), "{e}");
}

/// The names in a folder, in order.
fn left_in(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// A limit on the size of files fails the same writes that a full disk does.
#[cfg(unix)]
#[test]
fn without_room_nothing_is_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    tiny_model(&at("m"));
    std::fs::write(at("text"), text(400)).unwrap();
    let limited = |args: &[&str]| {
        // The signal that comes with the limit is ignored, so that the write itself returns the error.
        let script = r#"trap '' XFSZ; ulimit -f 8; exec "$0" "$@""#;
        let o = std::process::Command::new("sh")
            .args(["-c", script, env!("CARGO_BIN_EXE_foveal")])
            .args(args)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let err = String::from_utf8(o.stderr).unwrap();
        assert_eq!(o.status.code(), Some(1), "{args:?}: {err}");
        assert!(err.starts_with("error: ") && err.lines().count() == 1, "{args:?}: {err}");
        assert!(err.contains("cannot write"), "{args:?}: {err}");
        assert_eq!(left_in(dir.path()), ["in", "m", "text"], "{args:?}");
        (String::from_utf8(o.stdout).unwrap(), err)
    };
    let data = vec![0u8; 4 * 4096];
    let one = || TensorView::new(Dtype::F32, vec![1, 1, 64, 64], &data).unwrap();
    std::fs::write(at("in"), safetensors::serialize([("q", one()), ("k", one()), ("v", one())], None).unwrap())
        .unwrap();
    let (told, e) = limited(&["apply", "moba", "--in", "in", "--out", "out", "--quiet"]);
    assert!(told.is_empty() && e.contains("out: "), "{told} {e}");
    let compare = "compare m --text text --lengths 256 --prefill moba --trials 0 --out r --quiet";
    let (told, e) = limited(&compare.split(' ').collect::<Vec<_>>());
    assert!(told.contains("moba"), "what was measured is shown all the same: {told}");
    assert!(e.contains("r."), "{e}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let o = foveal(dir.path()).arg("list").stdout(full).output().unwrap();
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{err}");
    assert!(err.contains("cannot write to standard output") && err.lines().count() == 1, "{err}");
}

#[test]
fn without_a_network_pull_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    // Port 9 of this machine: nobody listens, so the connection is refused at once.
    let o = foveal(dir.path())
        .args(["pull", "kjv", "--quiet"])
        .env("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        .env("PIP_CONFIG_FILE", if cfg!(windows) { "nul" } else { "/dev/null" })
        .env("NO_PROXY", "*")
        .env_remove("PIP_EXTRA_INDEX_URL")
        .env_remove("PIP_FIND_LINKS")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{err}");
    assert!(o.stdout.is_empty() && err.lines().count() == 1, "{err}");
    assert!(err.contains("cannot fetch `bible-cli") && err.contains("or give a local path"), "{err}");
    if dir.path().join("cache").exists() {
        assert!(left_in(&dir.path().join("cache")).is_empty(), "nothing half-fetched");
    }
}

/// Speed of a whole model: a table, a JSON file, and answers on request.
#[test]
fn bench_model_times_prompts_and_steps() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    tiny_model(&at("m"));
    let model = at("m").display().to_string();
    let file = at("speed.json").display().to_string();
    let args = ["bench", "model", &model, "--prompt", "40", "--depth", "0,24", "--steps", "3", "--repeats", "2"];
    let table = ok(dir.path(), &[&args[..], &["--json", &file]].concat());
    assert_eq!(table.lines().count(), 5, "{table}");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows[0]["request"], json!({"prefill": {"tokens": 40}}));
    assert_eq!(rows[2]["request"], json!({"decode": {"depth": 24, "steps": 3}}));
    for r in rows {
        let rate = |key: &str| r[key].as_f64().unwrap();
        assert!(
            r["repeats"] == 2 && 0.0 < rate("min") && rate("min") <= rate("median") && rate("median") <= rate("max")
        );
    }
    assert!(fails(dir.path(), &[&args[..9], &["--repeats", "0"]].concat()).contains("--repeats 0"));
    std::fs::write(at("short"), "few words").unwrap();
    let short = at("short").display().to_string();
    assert!(fails(dir.path(), &[&args[..], &["--text", &short, "--quiet"]].concat()).contains("longer text"));

    let mut child = foveal(dir.path())
        .args(["bench", "model", &model, "--serve", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["weights"], "bf16");
    writeln!(input, r#"{{"prefill":{{"tokens":8}}}}"#).unwrap();
    assert_eq!(next()["tokens"], 8);
    writeln!(input, r#"{{"decode":{{"depth":8,"steps":0}}}}"#).unwrap();
    assert!(next()["error"].as_str().unwrap().contains("length 0"));
    writeln!(input, "prefill 8").unwrap();
    assert!(next()["error"].as_str().unwrap().contains("prefill 8"));
    writeln!(input, r#"{{"decode":{{"depth":8,"steps":2}}}}"#).unwrap();
    assert_eq!(next()["tokens"], 2);
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// Ctrl-C in the middle of a comparison: exit code 130, no report, nothing temporary left.
#[cfg(unix)]
#[test]
fn interruption_leaves_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    tiny_model(&at("m"));
    std::fs::write(at("text"), text(60_000)).unwrap();
    let mut child = foveal(dir.path())
        .args([
            "compare",
            "m",
            "--text",
            "text",
            "--lengths",
            "2048,16384",
            "--prefill",
            "moba",
            "--trials",
            "0",
            "--out",
            "r",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first remark comes when Ctrl-C is already listened to and nothing is measured yet.
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut first = String::new();
    errors.read_line(&mut first).unwrap();
    assert!(first.contains("llama"), "{first}");
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{rest}");
    assert!(rest.contains("error: interrupted"), "{rest}");
    assert_eq!(left_in(dir.path()), ["m", "text"]);
}
