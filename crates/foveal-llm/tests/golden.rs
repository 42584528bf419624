//! Logits against the `transformers` package on tiny models of every family and rotary rule:
//! whole prompt, chunk by chunk, and token by token; from safetensors folders and from GGUF.
//! The references are made by `goldens/make_llm_goldens.py`.

use foveal::Spec;
use foveal::prim::kv::KvDtype;
use foveal_llm::model::AttentionDtype;
use foveal_llm::{Checkpoint, LoadOptions, LogitsFor, Model, Plan, PrefillOptions, WeightFormat};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const TOLERANCE: f32 = 1e-4;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/llm")
}

/// The weight that the golden script gives a tensor of this name: splitmix64 of FNV-1a + i.
fn weight(name: &str, len: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    (0..len as u64)
        .map(|i| {
            let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            let k = (z >> 40) as i64;
            if name.contains("norm") {
                1.0 + (k % 33 - 16) as f32 / 64.0
            } else if name.ends_with("bias") {
                (k % 65 - 32) as f32 / 64.0
            } else {
                (k % 255 - 127) as f32 / 512.0
            }
        })
        .collect()
}

/// A Hugging Face folder with the golden's config.json and generated weights.
fn folder(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(goldens().join(format!("{name}.json"))).unwrap();
    std::fs::write(dir.path().join("config.json"), &config).unwrap();
    let c: serde_json::Value = serde_json::from_str(&config).unwrap();
    let n = |k: &str| c[k].as_u64().unwrap_or(0) as usize;
    let on = |k: &str| c[k].as_bool().unwrap_or(false);
    let kind = c["model_type"].as_str().unwrap();
    let (h, inter, vocab) = (n("hidden_size"), n("intermediate_size"), n("vocab_size"));
    let d = if n("head_dim") > 0 { n("head_dim") } else { h / n("num_attention_heads") };
    let (q, kv) = (n("num_attention_heads") * d, n("num_key_value_heads") * d);
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    shapes.insert("model.embed_tokens.weight".into(), vec![vocab, h]);
    shapes.insert("model.norm.weight".into(), vec![h]);
    if !on("tie_word_embeddings") {
        shapes.insert("lm_head.weight".into(), vec![vocab, h]);
    }
    for l in 0..n("num_hidden_layers") {
        let mut add = |name: &str, shape: Vec<usize>| {
            shapes.insert(format!("model.layers.{l}.{name}"), shape);
        };
        add("input_layernorm.weight", vec![h]);
        add("post_attention_layernorm.weight", vec![h]);
        for (x, rows) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{x}_proj.weight"), vec![rows, h]);
            if on("attention_bias") || kind == "qwen2" {
                add(&format!("self_attn.{x}_proj.bias"), vec![rows]);
            }
        }
        add("self_attn.o_proj.weight", vec![h, q]);
        if on("attention_bias") {
            add("self_attn.o_proj.bias", vec![h]);
        }
        if kind == "qwen3" {
            add("self_attn.q_norm.weight", vec![d]);
            add("self_attn.k_norm.weight", vec![d]);
        }
        for (x, rows, cols) in [("gate", inter, h), ("up", inter, h), ("down", h, inter)] {
            add(&format!("mlp.{x}_proj.weight"), vec![rows, cols]);
            if on("mlp_bias") {
                add(&format!("mlp.{x}_proj.bias"), vec![rows]);
            }
        }
    }
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let data = weight(&name, shape.iter().product()).iter().flat_map(|x| x.to_le_bytes()).collect();
            (name, shape, data)
        })
        .collect();
    let views = bytes.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

struct Reference {
    ids: Vec<u32>,
    full: Vec<(usize, Vec<f32>)>,
    steps: Vec<(usize, Vec<f32>)>,
}

fn reference(name: &str) -> Reference {
    let bytes = std::fs::read(goldens().join("reference.safetensors")).unwrap();
    let st = SafeTensors::deserialize(&bytes).unwrap();
    let words = |n: &str| -> Vec<[u8; 4]> { st.tensor(n).unwrap().data().as_chunks().0.to_vec() };
    let ints = |n: &str| -> Vec<u32> { words(n).into_iter().map(u32::from_le_bytes).collect() };
    let rows = |n: &str, at: &str| -> Vec<(usize, Vec<f32>)> {
        let t = words(&format!("{name}.{n}")).into_iter().map(f32::from_le_bytes).collect::<Vec<_>>();
        let at = ints(at);
        let width = t.len() / at.len();
        at.into_iter().map(|p| p as usize).zip(t.chunks(width).map(<[f32]>::to_vec)).collect()
    };
    Reference {
        ids: ints(&format!("{name}.ids")),
        full: rows("full", "full_positions"),
        steps: rows("steps", "step_positions"),
    }
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn load(ck: &Checkpoint, weights: WeightFormat) -> Model {
    Model::load(ck, &LoadOptions { weights: Some(weights) }).unwrap()
}

fn f32_plan() -> Plan {
    let dense = Spec::new("flashattention-2");
    Plan::of(&dense, &dense, KvDtype::F32)
}

/// Logits of all positions of one prefill.
fn all_logits(m: &Model, ids: &[u32], o: PrefillOptions) -> Vec<f32> {
    let p = m.prefill(ids, &f32_plan(), &PrefillOptions { logits: LogitsFor::LastN(ids.len()), ..o }).unwrap();
    assert_eq!(p.hidden_rows, ids.len());
    m.logits(&p.hidden)
}

/// Whole, chunked, stepwise; `name` for messages.
fn check(name: &str, m: &Model, tolerance: f32) {
    let r = reference(name);
    let vocab = m.config().vocab_size;
    let t = r.ids.len();
    for chunk in [8192, 17, 1] {
        let logits = all_logits(m, &r.ids, PrefillOptions { chunk, ..Default::default() });
        for (pos, expected) in &r.full {
            let d = distance(&logits[pos * vocab..(pos + 1) * vocab], expected);
            assert!(d < tolerance, "{name}: chunk {chunk}, position {pos}: logits differ by {d}");
        }
    }
    // A prompt, then one token at a time; and the same from a captured prompt, all tokens at once.
    let first = r.steps[0].0;
    let o = PrefillOptions { chunk: 10, capture: true, ..Default::default() };
    let (mut session, prompt) = m.start(&r.ids[..first], &f32_plan(), None, &o).unwrap();
    for pos in first..t {
        assert_eq!(session.len(), pos);
        let logits = m.logits(&session.extend(&r.ids[pos..=pos]).unwrap().hidden);
        if let Some((_, expected)) = r.steps.iter().find(|s| s.0 == pos) {
            let d = distance(&logits, expected);
            assert!(d < tolerance, "{name}: step at {pos}: logits differ by {d}");
        }
    }
    if name != "llama_dynamic" {
        // (Under the dynamic rule several tokens at once take the rotation of the last one's length.)
        let mut at_once = m.session(&prompt, &f32_plan(), None).unwrap();
        let logits = m.logits(&at_once.extend(&r.ids[first..]).unwrap().hidden);
        for (pos, expected) in &r.steps {
            let d = distance(&logits[(pos - first) * vocab..(pos - first + 1) * vocab], expected);
            assert!(d < tolerance, "{name}: {} tokens at once, position {pos}: logits differ by {d}", t - first);
        }
    }
}

macro_rules! families {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            let dir = folder(stringify!($name));
            let ck = Checkpoint::open(dir.path()).unwrap();
            check(stringify!($name), &load(&ck, WeightFormat::F32), TOLERANCE);
        }
    )*};
}

families!(
    llama,
    llama_tied,
    llama_bias,
    llama_linear,
    llama_dynamic,
    llama_yarn,
    llama_yarn_mscale,
    llama3,
    mistral,
    qwen2,
    qwen3
);

macro_rules! gguf {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            let ck = Checkpoint::open(&goldens().join(concat!(stringify!($name), ".gguf"))).unwrap();
            check(stringify!($name), &load(&ck, WeightFormat::F32), TOLERANCE);
        }
    )*};
}

gguf!(gguf_llama, gguf_qwen2, gguf_qwen3);

#[test]
fn narrower_weights_and_attention_stay_close() {
    // The golden weights are exact in bf16, so what differs is the rounding of activations.
    let dir = folder("llama_tied");
    let ck = Checkpoint::open(dir.path()).unwrap();
    let r = reference("llama_tied");
    let exact = all_logits(&load(&ck, WeightFormat::F32), &r.ids, PrefillOptions::default());
    let spread = (exact.iter().map(|x| x * x).sum::<f32>() / exact.len() as f32).sqrt();
    let close = |m: &Model, attention, limit: f32| {
        let logits = all_logits(m, &r.ids, PrefillOptions { attention, ..Default::default() });
        let d = (exact.iter().zip(&logits).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / exact.len() as f32).sqrt();
        assert!(d / spread < limit, "relative distance {}", d / spread);
        assert!(d > 0.0, "the narrower path was not taken");
    };
    close(&load(&ck, WeightFormat::F32), AttentionDtype::Bf16, 0.02);
    close(&load(&ck, WeightFormat::Int8), AttentionDtype::F32, 0.05);
    // Nothing narrower than bf16 for a file of floats.
    let auto = Model::load(&ck, &LoadOptions::default()).unwrap();
    assert_eq!(auto.weight_formats(), "bf16");
    let bf16 = all_logits(&load(&ck, WeightFormat::Bf16), &r.ids, PrefillOptions::default());
    let d = exact.iter().zip(&bf16).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(d / spread < 0.1, "bf16 weights: {d} of {spread}");
}
