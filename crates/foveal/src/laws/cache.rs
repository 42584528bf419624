//! Laws of cache policies.

use super::problem::{CacheProblem, PrefillProblem};
use super::{Finding, allowed, build, check_card, close, exponent, law_name};
use crate::cache::dense::{DenseCache, dense_bytes};
use crate::cache::{CachePolicy, LayerCache, Prompt, Step};
use crate::prim::kv::KvDtype;
use crate::system::{Card, Growth, Law, Slot, System};
use foveal_kernels::Work;

/// Agreement within f32 rounding of differently ordered sums.
const ROUNDING: f32 = 2e-4;

pub(super) fn check(card: &'static Card) -> Vec<(String, Finding)> {
    let mut out = vec![
        ("finite, same answer twice".to_owned(), basic(card)),
        ("a fork is independent".to_owned(), fork(card)),
        ("rows do not see later rows".to_owned(), causal(card)),
    ];
    if !card.has_slot(Slot::Prefill) {
        out.push(("card".into(), check_card(card)));
    }
    for law in card.laws {
        let finding = match law {
            Law::ExactAt(params) => exact(card, params),
            Law::StepsAgree => steps_agree(card),
            Law::BytesAsDeclared => bytes(card),
            Law::SmallerThanDense => smaller(card),
            Law::Work { pairs, .. } => work(card, *pairs),
            Law::Monotone { param, values } => monotone(card, param, values),
            // Causality is tested for every cache above; a cache has no gradients.
            Law::Causal | Law::CausalInBlocks(_) | Law::CausalMask | Law::Gradients => continue,
        };
        out.push((law_name(law), finding));
    }
    out
}

fn policy(card: &Card, params: &[(&str, &str)]) -> Result<Box<dyn CachePolicy>, String> {
    match build(card, Slot::Cache, params).map_err(|e| e.to_string())? {
        System::Cache(p) => Ok(p),
        System::Dense => Ok(Box::new(DenseCache)),
        System::Selector(_) | System::Mixer(_) => Err("built as a selector".into()),
    }
}

/// A cache filled with the first `prompt` tokens.
fn filled(policy: &dyn CachePolicy, p: &CacheProblem, prompt: usize) -> Result<Box<dyn LayerCache>, String> {
    let mut cache = policy.layer(&p.ctx).map_err(|e| e.to_string())?;
    let q_len = prompt.min(64);
    let (k_pre, k, v) = (p.span(&p.k_pre, 0, prompt), p.span(&p.k, 0, prompt), p.span(&p.v, 0, prompt));
    let q_obs = p.span(&p.q, prompt - q_len, prompt);
    let prompt = Prompt { len: prompt, k_pre: &k_pre, k: &k, v: &v, q_obs: &q_obs, q_len };
    cache.fill(&prompt).map_err(|e| e.to_string())?;
    Ok(cache)
}

/// Append tokens `from..to` at once; output (H, n, D).
fn step(cache: &mut dyn LayerCache, p: &CacheProblem, from: usize, to: usize) -> Result<(Vec<f32>, Work), String> {
    let n = to - from;
    let (q, k_pre) = (p.span(&p.q, from, to), p.span(&p.k_pre, from, to));
    let (k, v) = (p.span(&p.k, from, to), p.span(&p.v, from, to));
    // NaN shows rows that the policy forgets to write.
    let mut out = vec![f32::NAN; p.ctx.num_heads * n * p.ctx.head_dim];
    let s = Step { n, pos: from, q: &q, k_pre: &k_pre, k: &k, v: &v };
    let work = cache.step(&s, &mut out).map_err(|e| e.to_string())?;
    if let Some(x) = out.iter().find(|x| !x.is_finite()) {
        return Err(format!("tokens {from}..{to}: output holds {x}"));
    }
    Ok((out, work))
}

fn basic(card: &Card) -> Finding {
    for (len, prompt) in [(1, 0), (2, 1), (40, 33), (300, 257)] {
        for loud in [1.0, 1e3] {
            let p = CacheProblem::new(len, KvDtype::F32, loud, 3);
            let policy = policy(card, &[])?;
            let go = || -> Result<Vec<f32>, String> {
                let mut c = filled(policy.as_ref(), &p, prompt)?;
                if c.len() != prompt {
                    return Err(format!("after the prompt len() is {}", c.len()));
                }
                let mut all = Vec::new();
                for t in prompt..len {
                    all.extend(step(c.as_mut(), &p, t, t + 1)?.0);
                }
                if c.len() != len {
                    return Err(format!("after {len} tokens len() is {}", c.len()));
                }
                Ok(all)
            };
            let a = go().map_err(|e| format!("prompt {prompt}, queries x{loud}: {e}"))?;
            if a != go()? {
                return Err(format!("prompt {prompt}: two runs on the same input differ"));
            }
        }
    }
    Ok(())
}

fn fork(card: &Card) -> Finding {
    let p = CacheProblem::new(140, KvDtype::F32, 1.0, 7);
    let policy = policy(card, &[])?;
    let mut a = filled(policy.as_ref(), &p, 120)?;
    let mut b = a.fork();
    // The fork runs ahead; the original must not notice.
    for t in 120..130 {
        step(b.as_mut(), &p, t, t + 1)?;
    }
    let mut fresh = filled(policy.as_ref(), &p, 120)?;
    for t in 120..125 {
        let (x, y) = (step(a.as_mut(), &p, t, t + 1)?.0, step(fresh.as_mut(), &p, t, t + 1)?.0);
        if x != y {
            return Err(format!("token {t}: the original differs from a fresh cache after its fork moved on"));
        }
    }
    Ok(())
}

fn causal(card: &Card) -> Finding {
    let mut p = CacheProblem::new(120, KvDtype::F32, 1.0, 9);
    let policy = policy(card, &[])?;
    let (n, keep, d) = (20, 7, p.ctx.head_dim);
    let first_rows = |x: &[f32]| -> Vec<f32> { x.chunks_exact(n * d).flat_map(|h| h[..keep * d].to_vec()).collect() };
    let a = step(filled(policy.as_ref(), &p, 100)?.as_mut(), &p, 100, 100 + n)?.0;
    for x in [&mut p.q, &mut p.k, &mut p.k_pre, &mut p.v] {
        PrefillProblem::scramble(x, 120, d, 100 + keep, 77);
    }
    let b = step(filled(policy.as_ref(), &p, 100)?.as_mut(), &p, 100, 100 + n)?.0;
    close(&format!("rows before {keep} after later rows changed"), &first_rows(&b), &first_rows(&a), ROUNDING)
}

fn exact(card: &Card, params: &[(&str, &str)]) -> Finding {
    let policy = policy(card, params)?;
    for (len, prompt) in [(3, 1), (150, 100), (333, 300)] {
        let p = CacheProblem::new(len, KvDtype::F32, 1.0, 13);
        let (mut a, mut b) = (filled(policy.as_ref(), &p, prompt)?, filled(&DenseCache, &p, prompt)?);
        let rest = len.min(prompt + 20);
        for t in prompt..rest {
            let (x, y) = (step(a.as_mut(), &p, t, t + 1)?.0, step(b.as_mut(), &p, t, t + 1)?.0);
            close(&format!("prompt {prompt}, token {t} against dense"), &x, &y, ROUNDING)?;
        }
        if rest < len {
            let (x, y) = (step(a.as_mut(), &p, rest, len)?.0, step(b.as_mut(), &p, rest, len)?.0);
            close(&format!("prompt {prompt}, tokens {rest}..{len} at once against dense"), &x, &y, ROUNDING)?;
        }
    }
    Ok(())
}

fn steps_agree(card: &Card) -> Finding {
    let p = CacheProblem::new(330, KvDtype::F32, 1.0, 17);
    let policy = policy(card, &[])?;
    let (prompt, n, d) = (290, 37, p.ctx.head_dim);
    let mut one = filled(policy.as_ref(), &p, prompt)?;
    let mut single = vec![0f32; p.ctx.num_heads * n * d];
    for i in 0..n {
        let (x, _) = step(one.as_mut(), &p, prompt + i, prompt + i + 1)?;
        for h in 0..p.ctx.num_heads {
            single[(h * n + i) * d..(h * n + i + 1) * d].copy_from_slice(&x[h * d..(h + 1) * d]);
        }
    }
    let mut many = filled(policy.as_ref(), &p, prompt)?;
    let (at_once, _) = step(many.as_mut(), &p, prompt, prompt + n)?;
    close(&format!("{n} tokens at once against one by one"), &at_once, &single, ROUNDING)?;
    // Their states too: the next token must agree.
    let (x, y) = (step(many.as_mut(), &p, 327, 328)?.0, step(one.as_mut(), &p, 327, 328)?.0);
    close("the token after them", &x, &y, ROUNDING)
}

fn bytes(card: &Card) -> Finding {
    let policy = policy(card, &[])?;
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8, KvDtype::Int4] {
        for len in [1, 7, 100, 515] {
            let p = CacheProblem::new(len, dtype, 1.0, 19);
            let held = filled(policy.as_ref(), &p, len)?.resident().total();
            let declared = policy.declared_bytes(&p.ctx, len);
            if held != declared {
                return Err(format!("{len} tokens in {dtype}: {held} bytes held, {declared} declared"));
            }
        }
    }
    Ok(())
}

fn smaller(card: &Card) -> Finding {
    let p = CacheProblem::new(1024, KvDtype::Bf16, 1.0, 21);
    let held = filled(policy(card, &[])?.as_ref(), &p, 1024)?.resident().total();
    let dense = dense_bytes(&p.ctx, 1024);
    if held >= dense {
        return Err(format!("1024 tokens hold {held} bytes, dense holds {dense}"));
    }
    Ok(())
}

/// For a cache the counters are those of one decode step, against tokens stored.
fn work(card: &Card, pairs: Growth) -> Finding {
    let policy = policy(card, &[])?;
    let at = |t: usize| -> Result<u64, String> {
        let p = CacheProblem::new(t + 1, KvDtype::F32, 1.0, 25);
        Ok(step(filled(policy.as_ref(), &p, t)?.as_mut(), &p, t, t + 1)?.1.pairs)
    };
    // Quadratic work over a sequence is linear in one step.
    let e = exponent(at(4096)?, at(8192)?) + 1.0;
    if e > allowed(pairs) {
        return Err(format!("pairs of a whole sequence grow as T^{e:.2}, declared {pairs:?}"));
    }
    Ok(())
}

fn monotone(card: &Card, param: &str, values: &[&str]) -> Finding {
    let p = CacheProblem::new(600, KvDtype::Bf16, 1.0, 27);
    let mut last = (0, "");
    for v in values {
        let mut c = filled(policy(card, &[(param, v)])?.as_ref(), &p, 599)?;
        let (_, w) = step(c.as_mut(), &p, 599, 600)?;
        // A policy spends either bytes held or bytes read.
        let spent = c.resident().total() as u64 + w.bytes;
        if spent < last.0 {
            return Err(format!("{param}={v} spends {spent} bytes, fewer than {} at {}", last.0, last.1));
        }
        last = (spent, v);
    }
    Ok(())
}
