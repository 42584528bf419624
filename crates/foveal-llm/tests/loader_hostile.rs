//! Missing, truncated, corrupted and hostile files: always an error that names the thing, never a panic, never memory out of proportion.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use common::*;
use foveal_llm::gguf::{Gguf, Header};
use foveal_llm::hf::parse_safetensors;
use foveal_llm::{Checkpoint, LlmError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

thread_local! {
    /// The largest single request this thread made of the allocator since it was last reset: a hostile count shows up here even if
    /// the system grants it.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// Notes the size of a request. A thread that is ending has no cell any more, and nothing to measure.
fn note(size: usize) {
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

struct Measuring;

// SAFETY: every call is passed on to the system's allocator unchanged; taking note of it allocates nothing.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Measuring = Measuring;

/// Everything a caller would do with a GGUF file. The result does not matter, only that there is one.
fn exercise(data: &[u8]) -> Result<(), LlmError> {
    let g = Gguf::from_bytes(data)?;
    for info in g.header().tensors() {
        let _ = g.dequantize(info, None);
    }
    let c = Checkpoint::from_gguf(g)?;
    for name in c.tensor_names() {
        let _ = c.tensor(&name);
    }
    let t = c.tokenizer()?;
    let ids = t.encode("abc <s> ü", true, true)?;
    t.decode(&ids, false)?;
    let _ = c.describe();
    Ok(())
}

fn refusal(b: &GgufBuilder) -> String {
    exercise(&b.build()).expect_err("must be refused").to_string()
}

fn names(message: &str, words: &[&str]) {
    assert!(words.iter().all(|w| message.contains(w)), "{words:?} not all in: {message}");
    assert!(!message.contains('\n'), "{message}");
}

#[test]
fn the_untouched_model_is_accepted() {
    for arch in ["llama", "qwen2", "qwen3"] {
        exercise(&tiny_gguf(arch).build()).unwrap();
    }
}

#[test]
fn every_truncation_is_refused() {
    let whole = tiny_gguf("llama").build();
    for len in 0..whole.len() {
        // The last tensor's padding may go without harm.
        if whole.len() - len < 32 {
            continue;
        }
        let e = exercise(&whole[..len]).expect_err("cut file").to_string();
        assert!(e.contains("damaged GGUF") || e.contains("empty"), "{len}: {e}");
    }
}

#[test]
fn counts_that_exceed_the_file() {
    for claim in [u64::MAX, u64::MAX / 2, 1 << 40, 1 << 24] {
        let mut b = tiny_gguf("llama");
        b.claim_tensors = Some(claim);
        names(&refusal(&b), &["tensors claimed", &claim.to_string()]);
        let mut b = tiny_gguf("llama");
        b.claim_metadata = Some(claim);
        names(&refusal(&b), &["metadata entries claimed", &claim.to_string()]);
    }
}

#[test]
fn strings_and_arrays_that_exceed_the_file() {
    for claim in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 33] {
        let mut value = 8u32.to_le_bytes().to_vec();
        value.extend(claim.to_le_bytes());
        let mut b = tiny_gguf("llama");
        b.raw_metadata.push(("evil.string".into(), value));
        names(&refusal(&b), &["evil.string", &claim.to_string()]);
        for element in [0u32, 4, 8, 9, 12] {
            let mut value = 9u32.to_le_bytes().to_vec();
            value.extend(element.to_le_bytes());
            value.extend(claim.to_le_bytes());
            let mut b = tiny_gguf("llama");
            b.raw_metadata.push(("evil.array".into(), value));
            names(&refusal(&b), &["evil.array", &claim.to_string()]);
        }
    }
}

#[test]
fn arrays_of_arrays_of_arrays() {
    let mut value = 9u32.to_le_bytes().to_vec();
    for _ in 0..100_000 {
        value.extend(9u32.to_le_bytes());
        value.extend(1u64.to_le_bytes());
    }
    let mut b = tiny_gguf("llama");
    b.raw_metadata.push(("evil.nest".into(), value));
    names(&refusal(&b), &["evil.nest", "deep"]);
}

#[test]
fn unknown_types_are_named_with_what_is_supported() {
    let mut b = tiny_gguf("llama");
    b.raw_metadata.push(("evil.kind".into(), 77u32.to_le_bytes().to_vec()));
    names(&refusal(&b), &["evil.kind", "77"]);
    for (id, name) in [(16, "IQ2_XXS"), (39, "MXFP4"), (4000, "unknown")] {
        let mut b = tiny_gguf("llama");
        b.tensors[3].2 = id;
        names(&refusal(&b), &[&b.tensors[3].0, &id.to_string(), name, "Q4_K"]);
    }
    for version in [0, 1, 4, 3u32.swap_bytes()] {
        let mut b = tiny_gguf("llama");
        b.version = version;
        names(&refusal(&b), &["GGUF version", "supported: 2, 3"]);
    }
    names(&exercise(b"PK\x03\x04 this is a zip file and no model").unwrap_err().to_string(), &["magic", "GGUF"]);
}

#[test]
fn shapes_and_offsets_that_lie() {
    let mut b = tiny_gguf("llama");
    b.tensors[1].1 = vec![u64::MAX, u64::MAX];
    names(&refusal(&b), &[&b.tensors[1].0, "too many elements"]);
    b.tensors[1].1 = vec![1 << 40, 1 << 20];
    names(&refusal(&b), &[&b.tensors[1].0]);
    b.tensors[1].1 = vec![0, 8];
    names(&refusal(&b), &[&b.tensors[1].0, "dimension of 0"]);
    b.tensors[1].1 = vec![1; 5];
    names(&refusal(&b), &[&b.tensors[1].0, "5 dimensions"]);
    b.tensors[1].1 = vec![];
    names(&refusal(&b), &[&b.tensors[1].0, "0 dimensions"]);
    for claim in [1 << 40, u64::MAX - 31, 1 << 62] {
        let mut b = tiny_gguf("llama");
        b.claim_offset = Some((4, claim));
        names(&refusal(&b), &[&b.tensors[4].0, "past the end", &claim.to_string()]);
    }
    let mut b = tiny_gguf("llama");
    b.claim_offset = Some((4, 7));
    names(&refusal(&b), &[&b.tensors[4].0, "multiple of 32"]);
    b.claim_offset = Some((4, 0));
    names(&refusal(&b), &["overlap"]);
    let mut b = tiny_gguf("llama");
    b.tensors[1].2 = 2;
    names(&refusal(&b), &[&b.tensors[1].0, "blocks of 32"]);
}

#[test]
fn alignments_and_duplicates() {
    for alignment in [0u32, 1, 4, 24, 33] {
        let mut b = tiny_gguf("llama");
        b.set("general.alignment", Meta::U32(alignment));
        names(&refusal(&b), &["general.alignment", &alignment.to_string()]);
    }
    let mut b = tiny_gguf("llama");
    b.set("general.alignment", Meta::Str("wide".into()));
    names(&refusal(&b), &["general.alignment"]);
    let mut b = tiny_gguf("llama");
    b.metadata.push(("general.name".into(), Meta::U32(3)));
    names(&refusal(&b), &["general.name", "twice"]);
    let mut b = tiny_gguf("llama");
    b.tensors[2].0 = b.tensors[1].0.clone();
    names(&refusal(&b), &[&b.tensors[1].0, "twice"]);
}

#[test]
fn configurations_that_make_no_sense() {
    let refused = |edit: &dyn Fn(&mut GgufBuilder), words: &[&str]| {
        let mut b = tiny_gguf("llama");
        edit(&mut b);
        names(&refusal(&b), words);
    };
    refused(
        &|b| {
            b.set("general.architecture", Meta::Str("mamba".into()));
        },
        &["mamba", "qwen3"],
    );
    refused(
        &|b| {
            b.remove("general.architecture");
        },
        &["general.architecture"],
    );
    refused(
        &|b| {
            b.remove("llama.block_count");
        },
        &["llama.block_count"],
    );
    refused(
        &|b| {
            b.set("llama.block_count", Meta::Str("two".into()));
        },
        &["llama.block_count", "whole number"],
    );
    refused(
        &|b| {
            b.set("llama.block_count", Meta::U32(u32::MAX));
        },
        &["num_hidden_layers", "4294967295"],
    );
    refused(
        &|b| {
            b.set("llama.block_count", Meta::U32(3));
        },
        &["model.layers.2.input_layernorm.weight", "missing"],
    );
    refused(
        &|b| {
            b.set("llama.attention.head_count", Meta::U32(0));
        },
        &["head_count"],
    );
    refused(
        &|b| {
            b.set("llama.attention.head_count_kv", Meta::U32(3));
        },
        &["num_key_value_heads", "divisor"],
    );
    refused(
        &|b| {
            b.set("llama.attention.key_length", Meta::U32(6));
        },
        &["q_proj", "[16, 8]", "[24, 8]"],
    );
    refused(
        &|b| {
            b.set("llama.attention.value_length", Meta::U32(2));
        },
        &["value_length"],
    );
    refused(
        &|b| {
            b.set("llama.rope.dimension_count", Meta::U32(3));
        },
        &["rotary"],
    );
    refused(
        &|b| {
            b.set("llama.rope.freq_base", Meta::F32(f32::NAN));
        },
        &["rope_theta", "NaN"],
    );
    refused(
        &|b| {
            b.set("llama.feed_forward_length", Meta::U32(13));
        },
        &["gate_proj", "[12, 8]", "[13, 8]"],
    );
    refused(
        &|b| {
            b.set("llama.expert_count", Meta::U32(8));
        },
        &["expert_count", "8"],
    );
    refused(
        &|b| {
            b.set("llama.rope.scaling.type", Meta::Str("longrope".into()));
        },
        &["longrope", "yarn"],
    );
    refused(
        &|b| {
            b.set("split.count", Meta::U32(4));
        },
        &["split.count", "4"],
    );
    refused(
        &|b| {
            b.set("tokenizer.ggml.eos_token_id", Meta::U32(99));
        },
        &["eos_token_id", "99"],
    );
    refused(
        &|b| {
            b.tensors.remove(5);
        },
        &["missing"],
    );
    refused(
        &|b| {
            b.f32_tensor("rope_freqs.weight", &[3], &[1.0; 3]);
        },
        &["rope_freqs.weight", "[3]", "[2]"],
    );
}

#[test]
fn tensors_beyond_the_configuration_come_as_they_are_stored() {
    let mut b = tiny_gguf("llama");
    let values: Vec<f32> = (0..12).map(|x| x as f32).collect();
    b.f32_tensor("blk.90.attn_q.weight", &[3, 4], &values);
    b.f32_tensor("blk.90.attn_k.weight", &[2, 3, 2], &values);
    b.f32_tensor("blk.90.attn_k.bias", &[12], &values);
    let checkpoint = Checkpoint::from_gguf(Gguf::from_bytes(&b.build()).unwrap()).unwrap();
    for name in ["q_proj.weight", "k_proj.weight", "k_proj.bias"] {
        let name = format!("model.layers.90.self_attn.{name}");
        assert_eq!(checkpoint.tensor(&name).unwrap().data, values, "{name}");
        assert!(checkpoint.qtensor(&name).unwrap().is_some(), "{name}");
    }
}

#[test]
fn weights_that_are_not_numbers() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut b = tiny_gguf("llama");
        let (name, _, _, bytes) = &mut b.tensors[2];
        let name = name.clone();
        bytes[4 * 11..4 * 12].copy_from_slice(&bad.to_le_bytes());
        let g = Gguf::from_bytes(&b.build()).unwrap();
        let e = g.dequantize(g.header().tensor(&name).unwrap(), None).unwrap_err().to_string();
        names(&e, &[&name, "index 11", &bad.to_string()]);
        // Huge but finite weights are none of the loader's business.
        let (_, _, _, bytes) = &mut b.tensors[2];
        bytes[4 * 11..4 * 12].copy_from_slice(&f32::MAX.to_le_bytes());
        let g = Gguf::from_bytes(&b.build()).unwrap();
        assert_eq!(g.dequantize(g.header().tensor(&name).unwrap(), None).unwrap()[11], f32::MAX);
    }
    let dir = tiny_folder("LlamaForCausalLM");
    let mut tensors = tiny_tensors(false, false, true);
    tensors[3].2[5] = f32::NAN;
    write_safetensors(&dir.path().join("model.safetensors"), &tensors);
    let c = Checkpoint::open(dir.path()).unwrap();
    names(&c.tensor(&tensors[3].0).unwrap_err().to_string(), &[&tensors[3].0, "NaN", "index 5"]);
}

#[test]
fn paths_that_hold_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let open = |p: &Path| Checkpoint::open(p).unwrap_err().to_string();
    names(&open(&dir.path().join("none.gguf")), &["none.gguf", "check the spelling"]);
    names(&open(dir.path()), &["config.json"]);
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    names(&open(&empty), &["empty"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    names(&open(dir.path()), &["config.json", "no JSON"]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    names(&open(dir.path()), &["no object"]);
    write_json(&dir.path().join("config.json"), &tiny_config("LlamaForCausalLM", true));
    names(&open(dir.path()), &["model.safetensors"]);
}

#[test]
fn safetensors_folders_that_do_not_fit_their_configuration() {
    let dir = tiny_folder("LlamaForCausalLM");
    let refused = |patch: serde_json::Value, words: &[&str]| {
        let mut config = tiny_config("LlamaForCausalLM", true);
        config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        write_json(&dir.path().join("config.json"), &config);
        names(&Checkpoint::open(dir.path()).unwrap_err().to_string(), words);
    };
    use serde_json::json;
    refused(json!({ "hidden_size": 9 }), &["model.embed_tokens.weight", "[10, 8]", "[10, 9]", "hidden_size"]);
    refused(json!({ "num_hidden_layers": 3 }), &["model.layers.2.", "missing"]);
    refused(json!({ "num_hidden_layers": 4000000000u64 }), &["num_hidden_layers"]);
    refused(json!({ "num_hidden_layers": -1 }), &["num_hidden_layers", "-1"]);
    refused(json!({ "hidden_size": "8" }), &["hidden_size"]);
    refused(json!({ "hidden_size": null }), &["hidden_size", "missing"]);
    refused(json!({ "tie_word_embeddings": false }), &["lm_head.weight", "missing"]);
    refused(json!({ "attention_bias": true }), &["q_proj.bias", "missing"]);
    refused(json!({ "architectures": ["BertModel"] }), &["BertModel", "Qwen3ForCausalLM"]);
    refused(json!({ "hidden_act": "gelu" }), &["gelu", "silu"]);
    refused(json!({ "quantization_config": {} }), &["quantization_config"]);
    refused(json!({ "eos_token_id": 10 }), &["eos_token_id", "10"]);
    refused(json!({ "rope_scaling": { "type": "longrope" } }), &["longrope", "llama3"]);
    refused(json!({ "rope_scaling": { "type": "linear" } }), &["rope_scaling.factor"]);
    refused(json!({ "rope_scaling": { "type": "linear", "factor": 0 } }), &["rope factor", "0"]);
    refused(json!({ "partial_rotary_factor": 2.0 }), &["partial_rotary_factor"]);
    refused(json!({ "num_key_value_heads": 3 }), &["num_key_value_heads", "3"]);
}

#[test]
fn hostile_safetensors_headers() {
    let path = Path::new("x.safetensors");
    let file = |header: &str, data: usize| {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.resize(out.len() + data, 0);
        out
    };
    let refused = |bytes: &[u8]| {
        let e = parse_safetensors(bytes, path).expect_err("must be refused").to_string();
        assert!(e.contains("x.safetensors") && e.contains("damaged safetensors"), "{e}");
    };
    parse_safetensors(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8), path).unwrap();
    refused(b"");
    refused(&[1, 2, 3]);
    refused(&u64::MAX.to_le_bytes());
    refused(&file("{", 0));
    refused(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 7));
    refused(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 9));
    refused(&file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8));
    refused(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8));
    refused(&file(r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#, 8));
    refused(&file(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]}}"#, 8));
    refused(&file(
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
        12,
    ));
    let deep = "[".repeat(100_000);
    refused(&file(&deep, 0));
}

#[test]
fn broken_tokenizer_files() {
    let dir = tiny_folder("LlamaForCausalLM");
    let open = || Checkpoint::open(dir.path()).unwrap().tokenizer().unwrap_err().to_string();
    names(&open(), &["no tokenizer", "tokenizer.json"]);
    for text in ["", "{", "{}", "[1]", r#"{"model":{"type":"BPE","vocab":{},"merges":["a b"]}}"#] {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        names(&open(), &["bad tokenizer", "tokenizer.json"]);
    }
    let vocab: serde_json::Map<String, serde_json::Value> = (0..12).map(|i| (format!("w{i}"), i.into())).collect();
    let big = serde_json::json!({ "version": "1.0", "added_tokens": [],
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" } });
    write_json(&dir.path().join("tokenizer.json"), &big);
    names(&open(), &["12 tokens", "embeds 10"]);
}

#[test]
fn no_request_for_memory_exceeds_a_small_multiple_of_the_file() {
    let whole = tiny_gguf("llama").build();
    let mut state = 12345u64;
    for _ in 0..3000 {
        let mut data = whole.clone();
        for _ in 0..4 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 33) as usize % 1600;
            data[at] = if state & 1 == 0 { 0xff } else { (state >> 20) as u8 };
        }
        LARGEST.set(0);
        let _ = Header::parse(&data, Path::new("x"));
        let largest = LARGEST.get();
        assert!(largest < 4 * whole.len(), "{largest} bytes asked for at once; the file has {}", whole.len());
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(20);
    for case in 0..1200 {
        let mut data = tiny_gguf(["llama", "qwen2", "qwen3"][case % 3]).build();
        for _ in 0..rng.random_range(1..6) {
            // Most of the header is in the first part; aim there.
            let reach = if rng.random_bool(0.25) { data.len() } else { 1700 };
            data[rng.random_range(0..reach)] = if rng.random_bool(0.3) { 0xff } else { rng.random() };
        }
        let _ = exercise(&data);
    }
}

#[test]
fn noise_never_panics() {
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    for _ in 0..4000 {
        let noise: Vec<u8> = (0..rng.random_range(0..400)).map(|_| rng.random()).collect();
        let _ = exercise(&noise);
        let mut headed = b"GGUF\x03\0\0\0".to_vec();
        headed.extend(&noise);
        let _ = exercise(&headed);
        let _ = parse_safetensors(&noise, Path::new("x"));
        let mut headed = (noise.len() as u64).to_le_bytes().to_vec();
        headed.extend(&noise);
        let _ = parse_safetensors(&headed, Path::new("x"));
    }
}

/// A mapped file would end this process with SIGBUS here.
#[test]
fn a_file_shortened_after_it_was_opened_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let shorten = |path: &Path, keep: u64| {
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(keep).unwrap();
    };
    let path = dir.path().join("m.gguf");
    let whole = tiny_gguf("llama").build();
    std::fs::write(&path, &whole).unwrap();
    let c = Checkpoint::open(&path).unwrap();
    let names_of_tensors = c.tensor_names();
    shorten(&path, whole.len() as u64 / 2);
    let failed: Vec<String> =
        names_of_tensors.iter().filter_map(|n| c.tensor(n).err()).map(|e| e.to_string()).collect();
    assert!(!failed.is_empty() && failed.len() < names_of_tensors.len(), "half of the file is still there");
    failed.iter().for_each(|e| names(e, &["m.gguf", "damaged GGUF", "now ends before that", "tensor `"]));
    shorten(&path, 0);
    assert!(names_of_tensors.iter().all(|n| c.tensor(n).is_err()));

    let folder = tiny_folder("LlamaForCausalLM");
    let path = folder.path().join("model.safetensors");
    let c = Checkpoint::open(folder.path()).unwrap();
    shorten(&path, 3000);
    let failed: Vec<String> =
        c.tensor_names().iter().filter_map(|n| c.tensor(n).err()).map(|e| e.to_string()).collect();
    assert!(!failed.is_empty());
    failed.iter().for_each(|e| names(e, &["model.safetensors", "damaged safetensors", "now ends before that"]));
}
