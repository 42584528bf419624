//! A tiny GGUF writer and tiny models, so that every fixture is made by the test that needs it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The repository's golden files.
pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens")
}

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

fn string(out: &mut Vec<u8>, s: &[u8]) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s);
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Meta::U32(v) => {
                out.extend(4u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Meta::F32(v) => {
                out.extend(6u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Meta::Bool(v) => {
                out.extend(7u32.to_le_bytes());
                out.push(u8::from(*v));
            }
            Meta::Str(v) => {
                out.extend(8u32.to_le_bytes());
                string(out, v.as_bytes());
            }
            Meta::Strs(v) => {
                array(out, 8, v.len());
                v.iter().for_each(|s| string(out, s.as_bytes()));
            }
            Meta::F32s(v) => {
                array(out, 6, v.len());
                v.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
            Meta::I32s(v) => {
                array(out, 5, v.len());
                v.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
        }
    }
}

/// A GGUF file in the making. Raw entries allow any lie about sizes.
#[derive(Clone)]
pub struct GgufBuilder {
    pub version: u32,
    pub metadata: Vec<(String, Meta)>,
    /// Raw metadata entries: key, then type and value as bytes.
    pub raw_metadata: Vec<(String, Vec<u8>)>,
    /// Name, shape (rows first), type id, bytes.
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    /// Replaces the true count.
    pub claim_tensors: Option<u64>,
    /// Replaces the true count.
    pub claim_metadata: Option<u64>,
    /// Replaces a tensor's offset.
    pub claim_offset: Option<(usize, u64)>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        GgufBuilder {
            version: 3,
            metadata: Vec::new(),
            raw_metadata: Vec::new(),
            tensors: Vec::new(),
            claim_tensors: None,
            claim_metadata: None,
            claim_offset: None,
        }
    }
}

impl GgufBuilder {
    pub fn set(&mut self, key: &str, value: Meta) -> &mut Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(k, _)| k != key);
        self
    }

    pub fn f32_tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.push((name.into(), shape.iter().map(|&d| d as u64).collect(), 0, bytes));
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.claim_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        let count = (self.metadata.len() + self.raw_metadata.len()) as u64;
        out.extend(self.claim_metadata.unwrap_or(count).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key.as_bytes());
            value.write(&mut out);
        }
        for (key, value) in &self.raw_metadata {
            string(&mut out, key.as_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for (i, (name, shape, kind, bytes)) in self.tensors.iter().enumerate() {
            string(&mut out, name.as_bytes());
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            let offset = match self.claim_offset {
                Some((number, claim)) if number == i => claim,
                _ => data.len() as u64,
            };
            out.extend(offset.to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// Small numbers from a seed.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-0.5..0.5)).collect()
}

/// Sizes of the tiny models: hidden 8, MLP 12, 2 layers, 4 query and 2 key/value heads of 4, vocabulary 10.
pub const HIDDEN: usize = 8;
pub const MLP: usize = 12;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 4;
pub const VOCAB: usize = 10;

/// Every tensor of the tiny model by its Hugging Face name.
pub fn tiny_tensors(qkv_bias: bool, qk_norm: bool, tied: bool) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN])];
    for l in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{l}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[HIDDEN]);
        add("self_attn.q_proj.weight", &[q, HIDDEN]);
        add("self_attn.k_proj.weight", &[kv, HIDDEN]);
        add("self_attn.v_proj.weight", &[kv, HIDDEN]);
        if qkv_bias {
            add("self_attn.q_proj.bias", &[q]);
            add("self_attn.k_proj.bias", &[kv]);
            add("self_attn.v_proj.bias", &[kv]);
        }
        if qk_norm {
            add("self_attn.q_norm.weight", &[HEAD_DIM]);
            add("self_attn.k_norm.weight", &[HEAD_DIM]);
        }
        add("self_attn.o_proj.weight", &[HIDDEN, q]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
        add("mlp.gate_proj.weight", &[MLP, HIDDEN]);
        add("mlp.up_proj.weight", &[MLP, HIDDEN]);
        add("mlp.down_proj.weight", &[HIDDEN, MLP]);
    }
    shapes.push(("model.norm.weight".into(), vec![HIDDEN]));
    if !tied {
        shapes.push(("lm_head.weight".into(), vec![VOCAB, HIDDEN]));
    }
    shapes
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let data = noise(i as u64, shape.iter().product());
            (name, shape, data)
        })
        .collect()
}

/// The GGUF name of a Hugging Face name, spelled out apart from the loader's own table.
pub fn gguf_name(name: &str) -> String {
    name.replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
        .replace("lm_head", "output")
        .replace("model.layers", "blk")
        .replace("input_layernorm", "attn_norm")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace("self_attn.q_proj", "attn_q")
        .replace("self_attn.k_proj", "attn_k")
        .replace("self_attn.v_proj", "attn_v")
        .replace("self_attn.o_proj", "attn_output")
        .replace("self_attn.q_norm", "attn_q_norm")
        .replace("self_attn.k_norm", "attn_k_norm")
        .replace("mlp.", "ffn_")
        .replace("_proj", "")
}

/// The row order of Llama converters: within a head, (2, half) becomes (half, 2).
pub fn permute_rows(data: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let half = HEAD_DIM / 2;
    let mut out = Vec::with_capacity(data.len());
    for head in 0..heads {
        for j in 0..half {
            for part in 0..2 {
                let row = head * HEAD_DIM + part * half + j;
                out.extend_from_slice(&data[row * cols..(row + 1) * cols]);
            }
        }
    }
    out
}

/// The tiny model as GGUF of an architecture (`llama`, `qwen2`, `qwen3`).
pub fn tiny_gguf(arch: &str) -> GgufBuilder {
    let mut g = GgufBuilder::default();
    let key = |suffix: &str| format!("{arch}.{suffix}");
    g.set("general.architecture", Meta::Str(arch.into()))
        .set("general.name", Meta::Str("tiny".into()))
        .set(&key("embedding_length"), Meta::U32(HIDDEN as u32))
        .set(&key("feed_forward_length"), Meta::U32(MLP as u32))
        .set(&key("block_count"), Meta::U32(LAYERS as u32))
        .set(&key("attention.head_count"), Meta::U32(HEADS as u32))
        .set(&key("attention.head_count_kv"), Meta::U32(KV_HEADS as u32))
        .set(&key("attention.key_length"), Meta::U32(HEAD_DIM as u32))
        .set(&key("context_length"), Meta::U32(64))
        .set(&key("rope.freq_base"), Meta::F32(5000.0))
        .set(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5));
    let pieces: Vec<String> = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "b", "c", "ab", "\u{2581}a", "<0x41>"]
        .iter()
        .map(|s| s.to_string())
        .collect();
    g.set("tokenizer.ggml.model", Meta::Str("llama".into()))
        .set("tokenizer.ggml.tokens", Meta::Strs(pieces))
        .set("tokenizer.ggml.scores", Meta::F32s((0..10).map(|i| -(i as f32)).collect()))
        .set("tokenizer.ggml.token_type", Meta::I32s(vec![2, 3, 3, 1, 1, 1, 1, 1, 1, 6]))
        .set("tokenizer.ggml.bos_token_id", Meta::U32(1))
        .set("tokenizer.ggml.eos_token_id", Meta::U32(2))
        .set("tokenizer.ggml.unknown_token_id", Meta::U32(0));
    for (name, shape, data) in tiny_tensors(arch == "qwen2", arch == "qwen3", arch == "llama") {
        let data = match () {
            () if arch != "llama" => data,
            () if name.contains("q_proj") => permute_rows(&data, HEADS, HIDDEN),
            () if name.contains("k_proj") => permute_rows(&data, KV_HEADS, HIDDEN),
            () => data,
        };
        g.f32_tensor(&gguf_name(&name), &shape, &data);
    }
    g
}

/// Writes tensors as a safetensors file, F32.
pub fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, data)| data.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(path, file).unwrap();
}

/// `config.json` of the tiny model.
pub fn tiny_config(architecture: &str, tied: bool) -> serde_json::Value {
    serde_json::json!({
        "architectures": [architecture],
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    })
}

/// A folder with the tiny model.
pub fn tiny_folder(architecture: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (bias, norm) = (architecture.starts_with("Qwen2"), architecture.starts_with("Qwen3"));
    let tied = architecture.starts_with("Llama");
    write_safetensors(&dir.path().join("model.safetensors"), &tiny_tensors(bias, norm, tied));
    write_json(&dir.path().join("config.json"), &tiny_config(architecture, tied));
    dir
}

/// Writes JSON.
pub fn write_json(path: &Path, value: &serde_json::Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// Compares ids with golden cases `[text number, add special, parse special, ids]`; one line for every difference.
pub fn compare_ids(
    texts: &serde_json::Value,
    cases: &serde_json::Value,
    encode: impl Fn(&str, bool, bool) -> Vec<u32>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 50);
    for case in cases {
        let text = texts[case[0].as_u64().unwrap() as usize].as_str().unwrap();
        let (add, parse) = (case[1].as_bool().unwrap(), case[2].as_bool().unwrap());
        let expected: Vec<u32> = case[3].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
        let got = encode(text, add, parse);
        if got != expected {
            wrong.push(format!("{text:?} add={add} parse={parse}\n  got      {got:?}\n  expected {expected:?}"));
        }
    }
    wrong
}
