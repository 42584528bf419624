//! The loaders give the right numbers: every GGUF type against the `gguf` package, Llama's permuted rows, every family both ways.

mod common;

use common::*;
use foveal_llm::gguf::Gguf;
use foveal_llm::{Checkpoint, Family, RopeScaling};

#[test]
fn every_tensor_type_decodes_as_the_gguf_package_does() {
    let g = Gguf::open(&goldens().join("gguf_quants.gguf")).unwrap();
    let mut seen = Vec::new();
    for info in g.header().tensors().iter().filter(|t| !t.name.ends_with(".expected")) {
        let expected = g.header().tensor(&format!("{}.expected", info.name)).unwrap();
        assert_eq!(info.shape, expected.shape, "{}", info.name);
        let (got, want) = (g.dequantize(info, None).unwrap(), g.dequantize(expected, None).unwrap());
        for (i, (a, b)) in got.iter().zip(&want).enumerate() {
            // One rounding may differ: d·q + m can be fused or not.
            assert!((a - b).abs() <= 1e-6 * (b.abs() + 0.1), "{} at {i}: {a} against {b}", info.name);
        }
        assert!(want.iter().any(|v| *v != 0.0), "{}", info.name);
        seen.push(info.dtype.name);
    }
    seen.sort_unstable();
    let all = ["BF16", "F16", "F32", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"];
    assert_eq!(seen, all);
}

#[test]
fn candle_qtensor_holds_the_same_weights_in_the_same_row_order() {
    let g = Gguf::open(&goldens().join("gguf_quants.gguf")).unwrap();
    let info = g.header().tensor("q4_k").unwrap();
    let order = [2, 0, 1];
    let direct = g.dequantize(info, Some(&order)).unwrap();
    let through = g.qtensor(info, Some(&order)).unwrap().dequantize(&candle_core::Device::Cpu).unwrap();
    assert_eq!(through.flatten_all().unwrap().to_vec1::<f32>().unwrap(), direct);
    let plain = g.dequantize(info, None).unwrap();
    assert_eq!(&direct[..256], &plain[512..]);
}

#[test]
fn a_llama_gguf_comes_back_in_hugging_face_row_order() {
    for (arch, bias, norm, tied) in
        [("llama", false, false, true), ("qwen2", true, false, false), ("qwen3", false, true, false)]
    {
        let g = Gguf::from_bytes(&tiny_gguf(arch).build()).unwrap();
        let c = Checkpoint::from_gguf(g).unwrap();
        for (name, shape, data) in tiny_tensors(bias, norm, tied) {
            let t = c.tensor(&name).unwrap();
            assert_eq!((t.shape, t.data), (shape, data), "{arch} {name}");
            assert_eq!(c.source_dtype(&name), "F32");
        }
        let config = c.config();
        assert_eq!((config.num_heads, config.num_kv_heads, config.head_dim), (HEADS, KV_HEADS, HEAD_DIM));
        assert_eq!((config.tie_embeddings, config.qkv_bias, config.qk_norm), (tied, bias, norm));
        assert_eq!((config.rope_theta, config.max_position), (5000.0, 64));
        assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    }
}

#[test]
fn permuted_query_biases_come_back_too() {
    let mut b = tiny_gguf("llama");
    for l in 0..LAYERS {
        let (q, kv) = (noise(50, HEADS * HEAD_DIM), noise(51, KV_HEADS * HEAD_DIM));
        b.f32_tensor(&format!("blk.{l}.attn_q.bias"), &[q.len()], &permute_rows(&q, HEADS, 1));
        b.f32_tensor(&format!("blk.{l}.attn_k.bias"), &[kv.len()], &permute_rows(&kv, KV_HEADS, 1));
        b.f32_tensor(&format!("blk.{l}.attn_v.bias"), &[kv.len()], &kv);
    }
    let c = Checkpoint::from_gguf(Gguf::from_bytes(&b.build()).unwrap()).unwrap();
    assert!(c.config().qkv_bias);
    assert_eq!(c.tensor("model.layers.1.self_attn.q_proj.bias").unwrap().data, noise(50, HEADS * HEAD_DIM));
    assert_eq!(c.tensor("model.layers.1.self_attn.k_proj.bias").unwrap().data, noise(51, KV_HEADS * HEAD_DIM));
}

#[test]
fn a_tied_head_is_the_embedding() {
    let c = Checkpoint::from_gguf(Gguf::from_bytes(&tiny_gguf("llama").build()).unwrap()).unwrap();
    assert!(!c.has("lm_head.weight"));
    assert_eq!(c.tensor("lm_head.weight").unwrap(), c.tensor("model.embed_tokens.weight").unwrap());
}

#[test]
fn gguf_rope_scalings() {
    let scaling = |edit: &dyn Fn(&mut GgufBuilder)| {
        let mut b = tiny_gguf("llama");
        edit(&mut b);
        Checkpoint::from_gguf(Gguf::from_bytes(&b.build()).unwrap()).unwrap().config().rope_scaling.clone()
    };
    assert_eq!(scaling(&|_| {}), RopeScaling::Default);
    let linear = scaling(&|b| {
        b.set("llama.rope.scaling.type", Meta::Str("linear".into())).set("llama.rope.scaling.factor", Meta::F32(4.0));
    });
    assert_eq!(linear, RopeScaling::Linear { factor: 4.0 });
    let yarn = scaling(&|b| {
        b.set("llama.rope.scaling.type", Meta::Str("yarn".into()))
            .set("llama.rope.scaling.factor", Meta::F32(8.0))
            .set("llama.rope.scaling.original_context_length", Meta::U32(16));
    });
    assert!(matches!(
        yarn,
        RopeScaling::Yarn { factor: 8.0, original_max: 16, attention_factor: None, truncate: true, .. }
    ));
    let divisors = scaling(&|b| {
        b.f32_tensor("rope_freqs.weight", &[2], &[1.0, 8.0]);
    });
    assert_eq!(divisors, RopeScaling::Divisors { factors: vec![1.0, 8.0] });
}

#[test]
fn hugging_face_folders_of_every_architecture() {
    for (architecture, family) in [
        ("LlamaForCausalLM", Family::Llama),
        ("MistralForCausalLM", Family::Llama),
        ("Qwen2ForCausalLM", Family::Qwen2),
        ("Qwen3ForCausalLM", Family::Qwen3),
    ] {
        let dir = tiny_folder(architecture);
        let c = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(c.config().family, family);
        assert_eq!(c.config().eos_token_ids, [2, 3]);
        let (bias, norm) = (family == Family::Qwen2, family == Family::Qwen3);
        for (name, shape, data) in tiny_tensors(bias, norm, architecture.starts_with("Llama")) {
            let t = c.tensor(&name).unwrap();
            assert_eq!((t.shape, t.data), (shape, data), "{architecture} {name}");
        }
        // The file itself and its configuration name the same checkpoint.
        for file in ["model.safetensors", "config.json"] {
            assert_eq!(Checkpoint::open(&dir.path().join(file)).unwrap().config(), c.config());
        }
    }
}

#[test]
fn half_precision_safetensors_widen_exactly() {
    let dir = tiny_folder("LlamaForCausalLM");
    let tensors = tiny_tensors(false, false, true);
    for (dtype, name) in [(safetensors::Dtype::BF16, "BF16"), (safetensors::Dtype::F16, "F16")] {
        let narrow = |v: f32| match dtype {
            safetensors::Dtype::BF16 => (half::bf16::from_f32(v).to_bits(), half::bf16::from_f32(v).to_f32()),
            _ => (half::f16::from_f32(v).to_bits(), half::f16::from_f32(v).to_f32()),
        };
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(_, _, data)| data.iter().flat_map(|&v| narrow(v).0.to_le_bytes()).collect()).collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (name.clone(), safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let c = Checkpoint::open(dir.path()).unwrap();
        let t = c.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
        let (_, _, data) = tensors.iter().find(|(n, _, _)| n == "model.layers.0.mlp.up_proj.weight").unwrap();
        assert_eq!(t.data, data.iter().map(|&v| narrow(v).1).collect::<Vec<_>>());
        assert_eq!(c.source_dtype("model.norm.weight"), name);
    }
}

#[test]
fn sharded_folders_and_lost_shards() {
    let dir = tiny_folder("LlamaForCausalLM");
    let tensors = tiny_tensors(false, false, true);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let (a, b) = tensors.split_at(5);
    write_safetensors(&dir.path().join("part-1.safetensors"), a);
    write_safetensors(&dir.path().join("part-2.safetensors"), b);
    let map: serde_json::Map<String, serde_json::Value> = tensors
        .iter()
        .enumerate()
        .map(|(i, (name, _, _))| (name.clone(), format!("part-{}.safetensors", 1 + usize::from(i >= 5)).into()))
        .collect();
    let index = dir.path().join("model.safetensors.index.json");
    write_json(&index, &serde_json::json!({ "metadata": {}, "weight_map": map }));
    let c = Checkpoint::open(dir.path()).unwrap();
    for (name, shape, data) in &tensors {
        let t = c.tensor(name).unwrap();
        assert_eq!((&t.shape, &t.data), (shape, data));
    }
    std::fs::remove_file(dir.path().join("part-2.safetensors")).unwrap();
    let e = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("part-2.safetensors") && e.contains("not there"), "{e}");
    for evil in ["../part-1.safetensors", "/etc/passwd", "sub/part-1.safetensors", "..", "", ".\\part-1.safetensors"] {
        write_json(&index, &serde_json::json!({ "weight_map": { "model.norm.weight": evil } }));
        let e = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("plain name"), "{evil}: {e}");
    }
}

#[test]
fn both_spellings_of_rope_scaling() {
    let dir = tiny_folder("LlamaForCausalLM");
    let scaling = |patch: serde_json::Value| {
        let mut config = tiny_config("LlamaForCausalLM", true);
        config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        write_json(&dir.path().join("config.json"), &config);
        let c = Checkpoint::open(dir.path()).unwrap();
        (c.config().rope_theta, c.config().rope_scaling.clone())
    };
    use serde_json::json;
    assert_eq!(scaling(json!({ "rope_scaling": null })), (5000.0, RopeScaling::Default));
    assert_eq!(
        scaling(json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } })),
        (5000.0, RopeScaling::Linear { factor: 2.0 })
    );
    assert_eq!(
        scaling(json!({ "rope_parameters": { "rope_type": "dynamic", "factor": 3.0, "rope_theta": 7000.0 } })),
        (7000.0, RopeScaling::Dynamic { factor: 3.0, original_max: 64 })
    );
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32 });
    let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 32 };
    assert_eq!(scaling(json!({ "rope_scaling": llama3 })), (5000.0, expected.clone()));
    assert_eq!(scaling(json!({ "rope_parameters": llama3 })), (5000.0, expected));
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24,
        "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": false });
    assert_eq!(
        scaling(json!({ "rope_scaling": yarn })).1,
        RopeScaling::Yarn {
            factor: 4.0,
            original_max: 16,
            beta_fast: 24.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: Some(0.7),
            mscale_all_dim: Some(0.9),
            truncate: false
        }
    );
}

#[test]
fn sliding_windows_by_layer() {
    let dir = tiny_folder("MistralForCausalLM");
    let mut config = tiny_config("MistralForCausalLM", false);
    config["sliding_window"] = 16.into();
    write_json(&dir.path().join("config.json"), &config);
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_eq!([c.config().window(0), c.config().window(1)], [Some(16), Some(16)]);
    let dir = tiny_folder("Qwen2ForCausalLM");
    let mut config = tiny_config("Qwen2ForCausalLM", false);
    config["sliding_window"] = 16.into();
    write_json(&dir.path().join("config.json"), &config);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().config().window(1), None, "use_sliding_window is off");
    config["use_sliding_window"] = true.into();
    config["max_window_layers"] = 1.into();
    write_json(&dir.path().join("config.json"), &config);
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_eq!([c.config().window(0), c.config().window(1)], [None, Some(16)]);
}
