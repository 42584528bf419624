//! Masks and outputs of the sparse prefill systems against goldens/make_sparse*.py: every file goldens/sparse*.safetensors.

use candle_core::{Device, Tensor};
use foveal::prim::{AttendOptions, attend_selected};
use foveal::sparse::mask::{dense_mask, density, is_disjoint};
use foveal::sparse::run::NO_LAYER;
use foveal::sparse::{Grid, HeadProblem, Mat};
use foveal::{Slot, Spec, System, registry};
use safetensors::SafeTensors;
use serde_json::Value;

fn floats(t: &safetensors::tensor::TensorView) -> Vec<f32> {
    t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn masks_equal_the_papers_definitions() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../goldens");
    let mut cases = 0;
    for entry in std::fs::read_dir(folder).expect("goldens") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with("sparse") && name.ends_with(".safetensors") {
            cases += check(&std::fs::read(&path).expect("a file"));
        }
    }
    assert!(cases >= 45, "{cases} cases: a file is missing");
}

/// Check every case of a file; how many there are.
fn check(bytes: &[u8]) -> usize {
    let file = SafeTensors::deserialize(bytes).expect("a safetensors file");
    let (_, header) = SafeTensors::read_metadata(bytes).expect("a header");
    let cases = &header.metadata().as_ref().expect("metadata")["cases"];
    let cases: Vec<Value> = serde_json::from_str(cases).expect("cases as JSON");
    assert!(!cases.is_empty());
    for case in &cases {
        let number = |name: &str| case[name].as_u64().expect("a size") as usize;
        let text = |name: &str| case[name].as_str().expect("a name").to_owned();
        let (tq, tk, d) = (number("tq"), number("tk"), number("d"));
        let tensor = |name: &str| file.tensor(&format!("{}.{name}", number("problem"))).expect("tensor");
        let (q, k, v) = (floats(&tensor("q")), floats(&tensor("k")), floats(&tensor("v")));
        let mut spec = Spec::new(text("system"));
        spec.params = case["params"].as_object().expect("parameters").clone();
        let label = format!("{} ({tq}, {tk}, {d}) {spec}", text("name"));
        let Ok(System::Selector(selector)) = registry::build(&spec, Slot::Prefill) else {
            panic!("{label}: not a selector")
        };
        let scale = 1.0 / (d as f32).sqrt();
        let (qm, km) = (Mat::new(&q, tq, d, d), Mat::new(&k, tk, d, d));
        let or = |name: &str, or: usize| case[name].as_u64().map_or(or, |x| x as usize);
        let causal = case["causal"].as_bool().unwrap_or(true);
        let grid = case["grid"].as_array().map(|g| {
            let at = |i: usize| g[i].as_u64().expect("a side") as usize;
            Grid { first: at(0), t: at(1), h: at(2), w: at(3) }
        });
        let problem = HeadProblem {
            layer: or("layer", NO_LAYER),
            head: or("head", 0),
            causal,
            grid,
            ..HeadProblem::new(qm, km, scale)
        };
        selector.domain().check(&label, causal, grid, tk).expect("a problem of the domain");
        let (selection, work) = selector.select(&problem).expect("a selection");
        assert_eq!(work.pairs, 0, "{label}");
        assert!(is_disjoint(&selection, tq, tk, causal), "{label}");

        let packed = tensor(&format!("{}.mask", text("name")));
        let width = packed.shape()[1];
        let got = dense_mask(&selection, tq, tk, causal);
        let mut ones = 0;
        for i in 0..tq {
            for j in 0..tk {
                let want = packed.data()[i * width + j / 8] >> (7 - j % 8) & 1;
                assert_eq!(got[i * tk + j], want, "{label}: query {i}, key {j}");
                ones += u64::from(want);
            }
        }
        let all = if causal { tq * (tk - tq) + tq * (tq + 1) / 2 } else { tq * tk } as f64;
        assert!((density(&selection, tq, tk, causal) - ones as f64 / all).abs() < 1e-12, "{label}");

        let t = |x: &[f32], n: usize| Tensor::from_slice(x, (1, 1, n, d), &Device::Cpu).expect("a tensor");
        let options = AttendOptions { causal, ..AttendOptions::default() };
        let o = attend_selected(&t(&q, tq), &t(&k, tk), &t(&v, tk), &options, vec![selection]).expect("attention");
        let o: Vec<f32> = o.out.flatten_all().and_then(|x| x.to_vec1()).expect("rows");
        let want = floats(&tensor(&format!("{}.out", text("name"))));
        for (a, b) in o[o.len() - want.len()..].iter().zip(&want) {
            assert!((a - b).abs() < 2e-5, "{label}: {a} for {b}");
        }
    }
    cases.len()
}
