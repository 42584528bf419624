//! The cache policies against NumPy renditions of their papers (`goldens/make_cache_goldens.py`).

use foveal::cache::{CacheCtx, KvWeights, LayerCalibration, Prompt, Step};
use foveal::prim::kv::KvDtype;
use foveal::prim::rope::Rope;
use foveal::{Slot, Spec, System, registry};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use std::sync::Arc;

const PROMPT: usize = 24;

fn f32s(s: &SafeTensors, name: &str) -> Vec<f32> {
    let t = s.tensor(name).unwrap();
    assert_eq!(t.dtype(), Dtype::F32, "{name}");
    t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn f64s(s: &SafeTensors, name: &str) -> Vec<f64> {
    let t = s.tensor(name).unwrap();
    assert_eq!(t.dtype(), Dtype::F64, "{name}");
    t.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn outputs_match_the_papers_definitions() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/cache.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let s = SafeTensors::deserialize(&bytes).unwrap();
    let (qs, ks) = (s.tensor("q").unwrap().shape().to_vec(), s.tensor("k").unwrap().shape().to_vec());
    let (h, t, d, hkv) = (qs[0], qs[1], qs[2], ks[0]);
    let hidden = s.tensor("wk").unwrap().shape()[1];
    let [q, k_pre, k, v] = ["q", "k_pre", "k", "v"].map(|n| f32s(&s, n));
    let per_head = |n| f64s(&s, n).chunks_exact(d * d).map(<[f64]>::to_vec).collect();
    let ctx = CacheCtx {
        layer: 0,
        num_layers: 1,
        num_heads: h,
        num_kv_heads: hkv,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        window: None,
        rope: Arc::new(Rope::new(d, 10_000.0)),
        dtype: KvDtype::F32,
        weights: Some(Arc::new(KvWeights {
            hidden,
            wk: f32s(&s, "wk"),
            wv: f32s(&s, "wv"),
            bk: f32s(&s, "bk"),
            bv: f32s(&s, "bv"),
            k_norm: vec![],
        })),
        calibration: Some(Arc::new(LayerCalibration {
            tokens: t,
            key_moment: per_head("key_moment"),
            key_pre_moment: per_head("key_pre_moment"),
            input_moment: f64s(&s, "input_moment"),
        })),
    };
    let cut = |x: &[f32], a: usize, b: usize| -> Vec<f32> {
        x.chunks_exact(t * d).flat_map(|head| head[a * d..b * d].to_vec()).collect()
    };
    let systems: Vec<&str> = s.names().into_iter().filter(|n| n.contains(':')).collect();
    assert!(systems.len() >= 8);
    for spec in systems {
        let want = f32s(&s, spec);
        let System::Cache(policy) = registry::build(&spec.parse::<Spec>().unwrap(), Slot::Cache).unwrap() else {
            panic!("{spec} is no cache policy");
        };
        for n in [1, 5, t - PROMPT] {
            let mut c = policy.layer(&ctx).unwrap();
            c.fill(&Prompt {
                len: PROMPT,
                k_pre: &cut(&k_pre, 0, PROMPT),
                k: &cut(&k, 0, PROMPT),
                v: &cut(&v, 0, PROMPT),
                q_obs: &cut(&q, 0, PROMPT),
                q_len: PROMPT,
            })
            .unwrap();
            let mut a = PROMPT;
            while a < t {
                let b = (a + n).min(t);
                let mut out = vec![0f32; h * (b - a) * d];
                let (q, k_pre, k, v) = (cut(&q, a, b), cut(&k_pre, a, b), cut(&k, a, b), cut(&v, a, b));
                c.step(&Step { n: b - a, pos: a, q: &q, k_pre: &k_pre, k: &k, v: &v }, &mut out).unwrap();
                for i in a..b {
                    for head in 0..h {
                        let got = &out[(head * (b - a) + i - a) * d..][..d];
                        let want = &want[((i - PROMPT) * h + head) * d..][..d];
                        for (x, y) in got.iter().zip(want) {
                            assert!((x - y).abs() < 1e-5, "{spec}, {n} a step, token {i}, head {head}: {x} for {y}");
                        }
                    }
                }
                a = b;
            }
        }
    }
}
