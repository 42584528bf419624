//! Outputs of attention layers against goldens/make_mixers*.py: every file goldens/mixers*.safetensors.

use candle_core::Device;
use foveal::mixer::{self, MixInput, MixerDims, Weights};
use foveal::sparse::Grid;
use foveal::{Slot, Spec, registry};
use safetensors::SafeTensors;
use serde_json::Value;

#[test]
fn layers_equal_the_papers_definitions() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../goldens");
    for entry in std::fs::read_dir(folder).expect("goldens") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if name.starts_with("mixers") && name.ends_with(".safetensors") {
            let bytes = std::fs::read(&path).expect("a file");
            let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
            let cases = &header.metadata().as_ref().expect("metadata")["cases"];
            let cases: Vec<Value> = serde_json::from_str(cases).expect("cases as JSON");
            assert!(!cases.is_empty(), "{name}");
            let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect("tensors");
            for case in &cases {
                check(case, &tensors);
            }
        }
    }
}

fn check(case: &Value, tensors: &std::collections::HashMap<String, candle_core::Tensor>) {
    let number = |name: &str| case[name].as_u64().unwrap_or_else(|| panic!("{name} of {case}")) as usize;
    let name = case["name"].as_str().expect("a name");
    let mut spec = Spec::new(case["system"].as_str().expect("a system"));
    spec.params = case["params"].as_object().expect("parameters").clone();
    let label = format!("{name}: {spec}");
    let grid = case["grid"].as_array().map(|g| {
        let at = |i: usize| g[i].as_u64().expect("a side") as usize;
        Grid { first: at(0), t: at(1), h: at(2), w: at(3) }
    });
    let dims = MixerDims {
        hidden: number("hidden"),
        kv_heads: number("kv_heads"),
        grid,
        ..MixerDims::new(number("heads"), number("head_dim"), case["causal"].as_bool().unwrap_or(true))
    };
    let own = format!("{name}.w.");
    let weights = tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix(&own)?.to_owned(), t.clone())));
    let weights = Weights::from_tensors(weights).expect("weights");
    let system = registry::build(&spec, Slot::Mixer).unwrap_or_else(|e| panic!("{label}: {e}"));
    let layer = mixer::layer(&spec.id, system, &dims, weights.builder()).unwrap_or_else(|e| panic!("{label}: {e}"));
    let get = |n: &str| tensors.get(&format!("{name}.{n}"));
    let must = |n: &str| get(n).unwrap_or_else(|| panic!("{label}: tensor {n}"));
    let input = MixInput {
        x: get("x"),
        before_rotation: get("q0").zip(get("k0")),
        ..MixInput::new(must("q"), must("k"), must("v"))
    };
    let m = layer.mix(&input).unwrap_or_else(|e| panic!("{label}: {e}"));
    let tolerance = case["tolerance"].as_f64().unwrap_or(1e-4) as f32;
    let flat = |t: &candle_core::Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("elements");
    let near = |what: &str, got: &candle_core::Tensor, want: &candle_core::Tensor| {
        assert_eq!(got.dims(), want.dims(), "{label}: {what}");
        for (i, (a, b)) in flat(got).iter().zip(flat(want)).enumerate() {
            assert!((a - b).abs() <= tolerance, "{label}: {what} at {i}: {a} for {b}");
        }
    };
    near("out", &m.out, must("out"));
    if let Some(want) = get("loss") {
        near("loss", m.loss.as_ref().unwrap_or_else(|| panic!("{label}: no loss")), want);
    }
}
