//! Behaviour that every cache policy of this file's list must show, on a layer whose keys and
//! values come from real projection weights.

use foveal::cache::{CacheCtx, CachePolicy, KvWeights, LayerCache, LayerCalibration, Prompt, Step};
use foveal::prim::kv::KvDtype;
use foveal::prim::rope::Rope;
use foveal::{Slot, Spec, System, registry};
use rand::{Rng, SeedableRng};
use std::sync::Arc;

const H: usize = 6;
const HKV: usize = 2;
const D: usize = 16;
const HIDDEN: usize = 40;

/// One layer's tokens: queries, keys before and after rotation, values, (heads, t, D).
struct Tokens {
    t: usize,
    q: Vec<f32>,
    k_pre: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn normal(rng: &mut impl Rng) -> f32 {
    let u: f32 = (0..12).map(|_| rng.random::<f32>()).sum();
    u - 6.0
}

fn project(w: &[f32], b: &[f32], x: &[f32], t: usize, heads: usize) -> Vec<f32> {
    let mut out = vec![0f32; heads * t * D];
    for h in 0..heads {
        for i in 0..t {
            for c in 0..D {
                let row = h * D + c;
                let dot: f32 = (0..HIDDEN).map(|e| w[row * HIDDEN + e] * x[i * HIDDEN + e]).sum();
                out[(h * t + i) * D + c] = dot + b.get(row).copied().unwrap_or(0.0);
            }
        }
    }
    out
}

fn layer(t: usize, seed: u64, bias: bool, k_norm: bool) -> (CacheCtx, Tokens) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut fill = |n: usize, s: f32| -> Vec<f32> { (0..n).map(|_| normal(&mut rng) * s).collect() };
    let x = fill(t * HIDDEN, 1.0);
    let s = 1.0 / (HIDDEN as f32).sqrt();
    let (wq, wk, wv) = (fill(H * D * HIDDEN, 2.0 * s), fill(HKV * D * HIDDEN, 1.5 * s), fill(HKV * D * HIDDEN, s));
    let (bk, bv) = if bias { (fill(HKV * D, 0.5), fill(HKV * D, 0.5)) } else { (vec![], vec![]) };
    let gain: Vec<f32> = if k_norm { fill(D, 0.2).iter().map(|g| g + 1.5).collect() } else { vec![] };
    let rope = Arc::new(Rope::new(D, 10_000.0));
    let rotate = |mut x: Vec<f32>| {
        x.chunks_exact_mut(t * D).for_each(|h| rope.rotate(h, D, 0));
        x
    };
    let mut k_pre = project(&wk, &bk, &x, t, HKV);
    if k_norm {
        for row in k_pre.chunks_exact_mut(D) {
            let rms = (row.iter().map(|x| x * x).sum::<f32>() / D as f32).sqrt();
            row.iter_mut().zip(&gain).for_each(|(x, g)| *x *= g / rms);
        }
    }
    let k = rotate(k_pre.clone());
    let v = project(&wv, &bv, &x, t, HKV);
    let q = rotate(project(&wq, &[], &x, t, H));
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
    let per_head = |x: &[f32]| x.chunks_exact(t * D).map(|h| moment(h, D)).collect();
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
        head_dim: D,
        scale: 1.0 / (D as f32).sqrt(),
        window: None,
        rope: rope.clone(),
        dtype: KvDtype::F32,
        weights: Some(Arc::new(KvWeights { hidden: HIDDEN, wk, wv, bk, bv, k_norm: gain })),
        calibration: Some(Arc::new(calibration)),
    };
    (ctx, Tokens { t, q, k_pre, k, v })
}

fn cut(x: &[f32], t: usize, a: usize, b: usize) -> Vec<f32> {
    x.chunks_exact(t * D).flat_map(|h| h[a * D..b * D].to_vec()).collect()
}

fn fill(c: &mut dyn LayerCache, t: &Tokens, len: usize) {
    let q_len = len.min(64);
    c.fill(&Prompt {
        len,
        k_pre: &cut(&t.k_pre, t.t, 0, len),
        k: &cut(&t.k, t.t, 0, len),
        v: &cut(&t.v, t.t, 0, len),
        q_obs: &cut(&t.q, t.t, len - q_len, len),
        q_len,
    })
    .unwrap();
}

/// Append tokens a..b in one step; output (H, b − a, D).
fn step(c: &mut dyn LayerCache, t: &Tokens, a: usize, b: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; H * (b - a) * D];
    c.step(
        &Step {
            n: b - a,
            pos: a,
            q: &cut(&t.q, t.t, a, b),
            k_pre: &cut(&t.k_pre, t.t, a, b),
            k: &cut(&t.k, t.t, a, b),
            v: &cut(&t.v, t.t, a, b),
        },
        &mut out,
    )
    .unwrap();
    out
}

/// Outputs (t − prompt, H, D) with steps of the given sizes, repeated.
fn run(policy: &dyn CachePolicy, ctx: &CacheCtx, t: &Tokens, prompt: usize, sizes: &[usize]) -> Vec<f32> {
    let mut c = policy.layer(ctx).unwrap();
    fill(&mut *c, t, prompt);
    let mut out = Vec::new();
    let (mut a, mut turn) = (prompt, 0);
    while a < t.t {
        let b = (a + sizes[turn % sizes.len()]).min(t.t);
        let o = step(&mut *c, t, a, b);
        for i in 0..b - a {
            for h in 0..H {
                out.extend_from_slice(&o[(h * (b - a) + i) * D..][..D]);
            }
        }
        assert_eq!(c.len(), b);
        (a, turn) = (b, turn + 1);
    }
    out
}

/// Exact attention in f64, laid out as [`run`].
fn exact(ctx: &CacheCtx, t: &Tokens, prompt: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for i in prompt..t.t {
        for h in 0..H {
            let g = h / (H / HKV);
            let lo = ctx.window.map_or(0, |w| (i + 1).saturating_sub(w));
            let row = |x: &[f32], h: usize, j: usize| -> Vec<f64> {
                x[(h * t.t + j) * D..][..D].iter().map(|&v| f64::from(v)).collect()
            };
            let q = row(&t.q, h, i);
            let s: Vec<f64> = (lo..=i)
                .map(|j| q.iter().zip(row(&t.k, g, j)).map(|(a, b)| a * b).sum::<f64>() * f64::from(ctx.scale))
                .collect();
            let m = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let l: f64 = s.iter().map(|x| (x - m).exp()).sum();
            let mut o = [0f64; D];
            for (j, x) in (lo..=i).zip(&s) {
                let p = (x - m).exp() / l;
                o.iter_mut().zip(row(&t.v, g, j)).for_each(|(a, b)| *a += p * b);
            }
            out.extend(o.iter().map(|&x| x as f32));
        }
    }
    out
}

fn policy(spec: &str) -> Box<dyn CachePolicy> {
    match registry::build(&spec.parse::<Spec>().unwrap(), Slot::Cache).unwrap() {
        System::Cache(p) => p,
        _ => panic!("{spec} is no cache policy"),
    }
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Settings under which each policy really selects or compresses at these lengths.
const ACTIVE: &[&str] = &[
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

#[test]
fn steps_of_any_size_agree() {
    for (bias, window, prompt) in [(false, None, 90), (true, None, 0), (false, Some(50), 90), (false, None, 1)] {
        let (mut ctx, t) = layer(230, 3, bias, false);
        ctx.window = window;
        for spec in ACTIVE {
            let p = policy(spec);
            let one = run(&*p, &ctx, &t, prompt, &[1]);
            assert!(one.iter().all(|x| x.is_finite()));
            for sizes in [&[1usize, 2, 7, 64][..], &[33, 3], &[1000]] {
                let many = run(&*p, &ctx, &t, prompt, sizes);
                let e = worst(&one, &many);
                assert!(e < 2e-5, "{spec}, window {window:?}, prompt {prompt}, steps {sizes:?}: {e}");
            }
        }
    }
}

#[test]
fn full_budget_is_exact() {
    for (bias, window, k_norm) in
        [(false, None, false), (true, None, false), (false, Some(40), false), (true, None, true)]
    {
        let (mut ctx, t) = layer(150, 5, bias, k_norm);
        ctx.window = window;
        let want = exact(&ctx, &t, 60);
        for spec in [
            "think:ratio=0",
            "loki:topk=1",
            "tokenselect:topk=1000000000",
            "alisa:ratio=1",
            "palu:rank_ratio=1",
            "palu:rank_ratio=1,group=1,whiten=false",
        ] {
            for sizes in [&[1usize][..], &[50]] {
                let e = worst(&want, &run(&*policy(spec), &ctx, &t, 60, sizes));
                assert!(e < 1e-4, "{spec}, bias {bias}, window {window:?}, steps {sizes:?}: {e}");
            }
        }
        // Under a narrow window ThinK's pruned keys are all out of sight.
        for spec in ACTIVE.iter().filter(|_| window.is_none()) {
            let e = worst(&want, &run(&*policy(spec), &ctx, &t, 60, &[50]));
            assert!(e > 1e-3, "{spec} should differ from dense attention here, but by {e}");
        }
    }
}

#[test]
fn later_tokens_change_nothing_before() {
    let (ctx, t) = layer(160, 7, false, false);
    let mut changed = Tokens { t: t.t, q: t.q.clone(), k_pre: t.k_pre.clone(), k: t.k.clone(), v: t.v.clone() };
    let from = 131;
    for x in [&mut changed.q, &mut changed.k_pre, &mut changed.k, &mut changed.v] {
        for h in x.chunks_exact_mut(t.t * D) {
            h[from * D..].iter_mut().for_each(|v| *v = -3.0 * *v + 1.0);
        }
    }
    for spec in ACTIVE {
        let p = policy(spec);
        let (a, b) = (run(&*p, &ctx, &t, 70, &[90]), run(&*p, &ctx, &changed, 70, &[90]));
        let kept = (from - 70) * H * D;
        assert!(worst(&a[..kept], &b[..kept]) < 1e-6, "{spec}");
        assert!(worst(&a[kept..], &b[kept..]) > 1e-3, "{spec}");
    }
}

#[test]
fn bytes_are_as_declared() {
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
        for len in [0usize, 1, 30, 230] {
            let (mut ctx, t) = layer(230, 9, true, false);
            ctx.dtype = dtype;
            let dense = 2 * HKV * dtype.bytes(len, D);
            for spec in ACTIVE {
                let p = policy(spec);
                let mut c = p.layer(&ctx).unwrap();
                fill(&mut *c, &t, len);
                assert_eq!(p.declared_bytes(&ctx, len), c.resident().total(), "{spec}, {dtype}, {len} tokens");
                if len == 230 && dtype == KvDtype::F32 && (spec.starts_with("think") || spec.starts_with("palu")) {
                    assert!(c.resident().total() < dense, "{spec}: {} of {dense}", c.resident().total());
                }
            }
        }
    }
}

#[test]
fn forks_are_independent() {
    let (ctx, t) = layer(140, 11, false, false);
    for spec in ACTIVE {
        let p = policy(spec);
        let mut a = p.layer(&ctx).unwrap();
        fill(&mut *a, &t, 80);
        step(&mut *a, &t, 80, 100);
        let mut b = a.fork();
        let first = step(&mut *a, &t, 100, 140);
        let (second, len) = (step(&mut *b, &t, 100, 140), b.len());
        assert_eq!(first, second, "{spec}");
        assert_eq!((a.len(), len), (140, 140));
    }
}

#[test]
fn lower_precision_stays_near() {
    let (ctx, t) = layer(150, 13, true, false);
    for spec in ["think:ratio=0", "loki:topk=1", "tokenselect", "alisa:ratio=1", "palu:rank_ratio=1"] {
        let want = exact(&ctx, &t, 60);
        let norm = want.iter().map(|x| x * x).sum::<f32>().sqrt();
        for (dtype, limit) in [(KvDtype::Bf16, 0.02), (KvDtype::Int8, 0.05)] {
            let ctx = CacheCtx { dtype, ..ctx.clone() };
            for sizes in [&[1usize][..], &[45]] {
                let got = run(&*policy(spec), &ctx, &t, 60, sizes);
                let e = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt() / norm;
                assert!(e < limit, "{spec}, {dtype}: {e}");
            }
        }
    }
}

#[test]
fn alisa_drops_tokens_only_after_the_prompt_has_aged() {
    let (ctx, t) = layer(230, 15, false, false);
    let p = policy("alisa:ratio=0.2,steps=4");
    let mut c = p.layer(&ctx).unwrap();
    fill(&mut *c, &t, 200);
    let full = c.resident();
    step(&mut *c, &t, 200, 230);
    let after = c.resident();
    assert!(after.keys + after.values < (full.keys + full.values) / 2, "{full:?} then {after:?}");
    let visited = c.last_visited().unwrap();
    assert_eq!(visited.len(), H);
    assert_eq!(visited[0].len(), 2 * 23); // ⌊230·0.2/2⌉ twice
    assert!(visited[0].ends_with(&(207..230).collect::<Vec<u32>>()));
}

#[test]
fn visited_lists_name_what_was_read() {
    let (ctx, t) = layer(160, 17, false, false);
    for (spec, count) in [("loki:rank=0.25,topk=0.25", 40), ("tokenselect:topk=20,sinks=4,local=12", 36)] {
        for sizes in [&[1usize][..], &[25]] {
            let p = policy(spec);
            let mut c = p.layer(&ctx).unwrap();
            fill(&mut *c, &t, 135);
            let mut a = 135;
            while a < 160 {
                let b = (a + sizes[0]).min(160);
                step(&mut *c, &t, a, b);
                a = b;
            }
            let v = c.last_visited().unwrap();
            assert_eq!(v.len(), H);
            for l in &v {
                assert_eq!(l.len(), count, "{spec}");
                assert!(l.windows(2).all(|w| w[0] < w[1]) && *l.last().unwrap() < 160);
            }
        }
    }
}

#[test]
fn bad_calls_are_refused_with_a_reason() {
    let (ctx, t) = layer(40, 19, false, false);
    let bare = CacheCtx { weights: None, calibration: None, ..ctx.clone() };
    for (spec, word) in [("loki", "calibration"), ("palu:whiten=false", "weights")] {
        let e = policy(spec).layer(&bare).err().expect(spec).to_string();
        assert!(e.contains(word), "{e}");
    }
    for spec in
        ["think:ratio=1", "loki:topk=0", "tokenselect:local=0", "alisa:ratio=0", "palu:group=0", "palu:rank_ratio=2"]
    {
        assert!(registry::build(&spec.parse::<Spec>().unwrap(), Slot::Cache).is_err(), "{spec}");
    }
    for spec in ACTIVE {
        let mut c = policy(spec).layer(&ctx).unwrap();
        fill(&mut *c, &t, 20);
        let x = vec![0f32; H * D];
        let kv = &x[..HKV * D];
        let mut out = vec![0f32; H * D];
        let late = Step { n: 1, pos: 25, q: &x, k_pre: kv, k: kv, v: kv };
        assert!(c.step(&late, &mut out).unwrap_err().to_string().contains("25"), "{spec}");
        let short = Step { n: 1, pos: 20, q: &x, k_pre: kv, k: &kv[1..], v: kv };
        assert!(c.step(&short, &mut out).unwrap_err().to_string().contains('k'), "{spec}");
    }
}
