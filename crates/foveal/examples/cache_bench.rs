//! Time of each cache policy on one layer of SmolLM2-135M's shape: 2,048 tokens after a prompt
//! of 6,144 in steps of `n` rows (what a perplexity evaluation does), and single-token decode.
//!
//!     cargo run --release -p foveal --example cache_bench [rows a step] [policy …]

use foveal::cache::dense::DenseCache;
use foveal::cache::{CacheCtx, CachePolicy, KvWeights, LayerCalibration, Prompt, Step};
use foveal::prim::kv::KvDtype;
use foveal::prim::rope::Rope;
use foveal::{Slot, Spec, System, registry};
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::Instant;

const H: usize = 9;
const HKV: usize = 3;
const D: usize = 64;
const HIDDEN: usize = 576;
const PROMPT: usize = 6144;
const NEW: usize = 2048;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let n: usize = args.next().map_or(Ok(128), |s| s.parse())?;
    let mut specs: Vec<String> = args.collect();
    if specs.is_empty() {
        specs = ["dense", "think", "loki", "tokenselect", "alisa", "palu"].map(String::from).into();
    }
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut random = |n: usize, s: f32| -> Vec<f32> {
        (0..n).map(|_| s * (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>()).collect()
    };
    let rope = Arc::new(Rope::new(D, 10_000.0));
    let (k_pre, v) = (random(HKV * PROMPT * D, 2.0), random(HKV * PROMPT * D, 2.0));
    let mut k = k_pre.clone();
    k.chunks_exact_mut(PROMPT * D).for_each(|h| rope.rotate(h, D, 0));
    let q_obs = random(H * 64 * D, 3.0);
    let moment = |x: &[f32]| {
        let mut m = vec![0f64; D * D];
        for r in x.chunks_exact(D) {
            for i in 0..D {
                for j in 0..D {
                    m[i * D + j] += f64::from(r[i] * r[j]);
                }
            }
        }
        m
    };
    let ctx = CacheCtx {
        layer: 0,
        num_layers: 1,
        num_heads: H,
        num_kv_heads: HKV,
        head_dim: D,
        scale: 0.125,
        window: None,
        rope,
        dtype: KvDtype::Bf16,
        weights: Some(Arc::new(KvWeights {
            hidden: HIDDEN,
            wk: random(HKV * D * HIDDEN, 0.1),
            wv: random(HKV * D * HIDDEN, 0.1),
            bk: vec![],
            bv: vec![],
            k_norm: vec![],
        })),
        calibration: Some(Arc::new(LayerCalibration {
            tokens: PROMPT,
            key_moment: k.chunks_exact(PROMPT * D).map(moment).collect(),
            key_pre_moment: k_pre.chunks_exact(PROMPT * D).map(moment).collect(),
            input_moment: vec![],
        })),
    };
    // Queries that drift as a text's do, so that selections are sometimes used again.
    let mut q = random(H * NEW * D, 3.0);
    for h in q.chunks_exact_mut(NEW * D) {
        for i in D..h.len() {
            h[i] = 0.9 * h[i - D] + 0.44 * h[i];
        }
    }
    let (nk, nv) = (random(HKV * NEW * D, 2.0), random(HKV * NEW * D, 2.0));
    let cut = |x: &[f32], a: usize, b: usize| -> Vec<f32> {
        x.chunks_exact(NEW * D).flat_map(|h| &h[a * D..b * D]).copied().collect()
    };
    println!("one layer; seconds are for {NEW} tokens after {PROMPT}, {n} a step; x30 is a whole model");
    println!(
        "| policy | make s | fill s | {NEW} tokens s | x30 | decode ms a token | bytes after fill | at the end | density |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for spec in &specs {
        let policy: Box<dyn CachePolicy> = if spec == "dense" {
            Box::new(DenseCache)
        } else {
            match registry::build(&spec.parse::<Spec>()?, Slot::Cache)? {
                System::Cache(p) => p,
                _ => return Err(format!("{spec} is no cache policy").into()),
            }
        };
        let t0 = Instant::now();
        let mut c = policy.layer(&ctx)?;
        let made = t0.elapsed().as_secs_f64();
        let t0 = Instant::now();
        c.fill(&Prompt { len: PROMPT, k_pre: &k_pre, k: &k, v: &v, q_obs: &q_obs, q_len: 64 })?;
        let filled = t0.elapsed().as_secs_f64();
        let bytes = c.resident().total();
        let mut single = c.fork();
        let run = |c: &mut dyn foveal::cache::LayerCache, n: usize, upto: usize| -> Result<(f64, u64), foveal::Error> {
            let (mut seconds, mut pairs, mut a) = (0.0, 0, 0);
            while a < upto {
                let b = (a + n).min(upto);
                let mut out = vec![0f32; H * (b - a) * D];
                let (q, k, v) = (cut(&q, a, b), cut(&nk, a, b), cut(&nv, a, b));
                let t0 = Instant::now();
                pairs += c.step(&Step { n: b - a, pos: PROMPT + a, q: &q, k_pre: &k, k: &k, v: &v }, &mut out)?.pairs;
                seconds += t0.elapsed().as_secs_f64();
                a = b;
            }
            Ok((seconds, pairs))
        };
        let (seconds, pairs) = run(&mut *c, n, NEW)?;
        let (one, _) = run(&mut *single, 1, 32)?;
        let dense = (H * (NEW * PROMPT + NEW * (NEW + 1) / 2)) as f64;
        println!(
            "| {spec} | {made:.3} | {filled:.3} | {seconds:.3} | {:.1} | {:.2} | {bytes} | {} | {:.3} |",
            30.0 * seconds,
            1e3 * one / 32.0,
            c.resident().total(),
            pairs as f64 / dense
        );
    }
    Ok(())
}
