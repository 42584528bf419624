//! One layer whose keys and values come from real projection weights, and how to run a policy on it.

use foveal::cache::dense::DenseCache;
use foveal::cache::{CacheCtx, CachePolicy, KvWeights, LayerCache, LayerCalibration, Prompt, Step};
use foveal::prim::kv::KvDtype;
use foveal::prim::rope::Rope;
use foveal::{Slot, Spec, System, registry};
use rand::{Rng, SeedableRng};
use std::sync::Arc;

/// Query heads.
pub const H: usize = 6;
/// Key/value heads.
pub const HKV: usize = 2;
/// Width of the layer's input.
const HIDDEN: usize = 40;

/// One layer's tokens: queries, keys before and after rotation, values, (heads, t, d).
pub struct Tokens {
    pub t: usize,
    pub d: usize,
    pub q: Vec<f32>,
    pub k_pre: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

fn normal(rng: &mut impl Rng) -> f32 {
    let u: f32 = (0..12).map(|_| rng.random::<f32>()).sum();
    u - 6.0
}

fn project(w: &[f32], b: &[f32], x: &[f32], t: usize, [heads, d]: [usize; 2]) -> Vec<f32> {
    let mut out = vec![0f32; heads * t * d];
    for h in 0..heads {
        for i in 0..t {
            for c in 0..d {
                let row = h * d + c;
                let dot: f32 = (0..HIDDEN).map(|e| w[row * HIDDEN + e] * x[i * HIDDEN + e]).sum();
                out[(h * t + i) * d + c] = dot + b.get(row).copied().unwrap_or(0.0);
            }
        }
    }
    out
}

/// A layer of `t` tokens with heads of `d`; f32 storage, no window.
pub fn layer(d: usize, t: usize, seed: u64, bias: bool, k_norm: bool) -> (CacheCtx, Tokens) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut fill = |n: usize, s: f32| -> Vec<f32> { (0..n).map(|_| normal(&mut rng) * s).collect() };
    let x = fill(t * HIDDEN, 1.0);
    let s = 1.0 / (HIDDEN as f32).sqrt();
    let (wq, wk, wv) = (fill(H * d * HIDDEN, 2.0 * s), fill(HKV * d * HIDDEN, 1.5 * s), fill(HKV * d * HIDDEN, s));
    let (bk, bv) = if bias { (fill(HKV * d, 0.5), fill(HKV * d, 0.5)) } else { (vec![], vec![]) };
    let gain: Vec<f32> = if k_norm { fill(d, 0.2).iter().map(|g| g + 1.5).collect() } else { vec![] };
    let rope = Arc::new(Rope::new(d, 10_000.0));
    let rotate = |mut x: Vec<f32>| {
        x.chunks_exact_mut(t * d).for_each(|h| rope.rotate(h, d, 0));
        x
    };
    let mut k_pre = project(&wk, &bk, &x, t, [HKV, d]);
    if k_norm {
        for row in k_pre.chunks_exact_mut(d) {
            let rms = (row.iter().map(|x| x * x).sum::<f32>() / d as f32).sqrt();
            row.iter_mut().zip(&gain).for_each(|(x, g)| *x *= g / rms);
        }
    }
    let k = rotate(k_pre.clone());
    let v = project(&wv, &bv, &x, t, [HKV, d]);
    let q = rotate(project(&wq, &[], &x, t, [H, d]));
    let moment = |rows: &[f32], n: usize| {
        let mut m = vec![0f64; n * n];
        for r in rows.chunks_exact(n) {
            for i in 0..n {
                for j in 0..n {
                    m[i * n + j] += f64::from(r[i]) * f64::from(r[j]);
                }
            }
        }
        m
    };
    let per_head = |x: &[f32]| x.chunks_exact(t * d).map(|h| moment(h, d)).collect();
    let calibration = LayerCalibration {
        tokens: t,
        key_moment: per_head(&k),
        key_pre_moment: per_head(&k_pre),
        input_moment: moment(&x, HIDDEN),
    };
    let ctx = CacheCtx {
        layer: 0,
        num_layers: 1,
        num_heads: H,
        num_kv_heads: HKV,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        window: None,
        rope: rope.clone(),
        dtype: KvDtype::F32,
        weights: Some(Arc::new(KvWeights { hidden: HIDDEN, wk, wv, bk, bv, k_norm: gain })),
        calibration: Some(Arc::new(calibration)),
    };
    (ctx, Tokens { t, d, q, k_pre, k, v })
}

/// Tokens a..b of each head.
fn cut(x: &[f32], t: &Tokens, a: usize, b: usize) -> Vec<f32> {
    x.chunks_exact(t.t * t.d).flat_map(|h| h[a * t.d..b * t.d].to_vec()).collect()
}

/// Hand over the first `len` tokens as the prompt.
pub fn fill(c: &mut dyn LayerCache, t: &Tokens, len: usize) {
    let q_len = len.min(64);
    c.fill(&Prompt {
        len,
        k_pre: &cut(&t.k_pre, t, 0, len),
        k: &cut(&t.k, t, 0, len),
        v: &cut(&t.v, t, 0, len),
        q_obs: &cut(&t.q, t, len - q_len, len),
        q_len,
    })
    .unwrap();
}

/// Append tokens a..b in one step; output (H, b − a, d).
pub fn step(c: &mut dyn LayerCache, t: &Tokens, a: usize, b: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; H * (b - a) * t.d];
    c.step(
        &Step {
            n: b - a,
            pos: a,
            q: &cut(&t.q, t, a, b),
            k_pre: &cut(&t.k_pre, t, a, b),
            k: &cut(&t.k, t, a, b),
            v: &cut(&t.v, t, a, b),
        },
        &mut out,
    )
    .unwrap();
    out
}

/// Outputs (t − prompt, H, d) with steps of the given sizes, repeated.
pub fn run(policy: &dyn CachePolicy, ctx: &CacheCtx, t: &Tokens, prompt: usize, sizes: &[usize]) -> Vec<f32> {
    let mut c = policy.layer(ctx).unwrap();
    fill(&mut *c, t, prompt);
    let mut out = Vec::new();
    let (mut a, mut turn) = (prompt, 0);
    while a < t.t {
        let b = (a + sizes[turn % sizes.len()]).min(t.t);
        let o = step(&mut *c, t, a, b);
        for i in 0..b - a {
            for h in 0..H {
                out.extend_from_slice(&o[(h * (b - a) + i) * t.d..][..t.d]);
            }
        }
        assert_eq!(c.len(), b);
        (a, turn) = (b, turn + 1);
    }
    out
}

/// Settings under which each policy really selects or compresses at these lengths.
pub const ACTIVE: &[&str] = &[
    "think:ratio=0.5,recent=8",
    "think:ratio=0.4,recent=40",
    "loki:rank=0.25,topk=0.25",
    "tokenselect:topk=20,sinks=4,local=12,threshold=0.6",
    "tokenselect:topk=20,sinks=4,local=12,threshold=2,scaled=true",
    "alisa:ratio=0.3,steps=5",
    "alisa:ratio=0.2,steps=0",
    "palu:rank_ratio=0.5,group=2",
    "palu:rank_ratio=0.5,group=1,whiten=false,value_weight=1",
    "palu:rank_ratio=0.4,group=2,value_weight=0.5,sinks=5",
];

/// The cache policy of a spec.
pub fn policy(spec: &str) -> Box<dyn CachePolicy> {
    match registry::build(&spec.parse::<Spec>().unwrap(), Slot::Cache).unwrap() {
        System::Cache(p) => p,
        System::Dense => Box::new(DenseCache),
        _ => panic!("{spec} is no cache policy"),
    }
}
