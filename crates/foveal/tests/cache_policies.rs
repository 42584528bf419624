//! Behaviour that every cache policy of this file's list must show, on a layer whose keys and
//! values come from real projection weights.

mod cache_layer;

use cache_layer::{ACTIVE, H, HKV, Tokens, fill, layer, policy, run, step};
use foveal::cache::{CacheCtx, Step};
use foveal::prim::kv::KvDtype;
use foveal::{Slot, Spec, registry};

const D: usize = 16;

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

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn steps_of_any_size_agree() {
    for (bias, window, prompt) in [(false, None, 90), (true, None, 0), (false, Some(50), 90), (false, None, 1)] {
        let (mut ctx, t) = layer(D, 230, 3, bias, false);
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
        let (mut ctx, t) = layer(D, 150, 5, bias, k_norm);
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
    let (ctx, t) = layer(D, 160, 7, false, false);
    let mut changed = Tokens { t: t.t, d: D, q: t.q.clone(), k_pre: t.k_pre.clone(), k: t.k.clone(), v: t.v.clone() };
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
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8, KvDtype::Int4] {
        for len in [0usize, 1, 30, 230] {
            let (mut ctx, t) = layer(D, 230, 9, true, false);
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
    let (ctx, t) = layer(D, 140, 11, false, false);
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
    let (ctx, t) = layer(D, 150, 13, true, false);
    for spec in ["think:ratio=0", "loki:topk=1", "tokenselect", "alisa:ratio=1", "palu:rank_ratio=1"] {
        let want = exact(&ctx, &t, 60);
        let norm = want.iter().map(|x| x * x).sum::<f32>().sqrt();
        for (dtype, limit) in [(KvDtype::Bf16, 0.02), (KvDtype::Int8, 0.05), (KvDtype::Int4, 0.25)] {
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
    let (ctx, t) = layer(D, 230, 15, false, false);
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
    let (ctx, t) = layer(D, 160, 17, false, false);
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
    let (ctx, t) = layer(D, 40, 19, false, false);
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
