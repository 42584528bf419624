//! `foveal plan`.

use crate::Context;
use crate::cli::PlanArgs;
use crate::error::{CliError, Result};
use crate::files;
use crate::models;
use crate::progress::Progress;
use foveal::Spec;
use foveal::prim::kv::KvDtype;
use foveal::sparse::minference::{self, Candidate, Found, Pattern, SearchOptions};
use foveal::sparse::{HeadProblem, Mat, moa_sparse, search};
use foveal_llm::model::Recorded;
use foveal_llm::plan::DENSE;
use foveal_llm::{LogitsFor, Plan, PrefillOptions, Rule};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;

/// Memory for recorded queries and keys of one pass over the model.
const RECORD_BYTES: usize = 512 << 20;
/// Layers whose heads the warning names one by one.
const NAMED_LAYERS: usize = 8;

pub fn run(a: &PlanArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if !(a.budget > 0.0 && a.budget <= 1.0) {
        return Err(CliError::Arguments(format!("--budget {}: give a share above 0 and up to 1", a.budget)));
    }
    if a.max_error.is_nan() || a.max_error < 0.0 {
        return Err(CliError::Arguments(format!("--max-error {}: give a number of 0 or more", a.max_error)));
    }
    if a.length < 256 {
        return Err(CliError::Arguments(format!("--length {}: patterns need at least 256 tokens to show", a.length)));
    }
    let loaded = models::load(&a.model, &a.load, ctx)?;
    let config = loaded.model.config();
    let text = models::text(a.text.as_deref(), a.length, a.load.offline, &loaded.tokenizer, ctx)?;
    if text.tokens.len() < a.length {
        return Err(CliError::Arguments(format!(
            "the text has {} tokens but --length is {}; give a longer text or a shorter length",
            text.tokens.len(),
            a.length
        )));
    }
    ctx.remark(&format!("searching on {}", text.about));
    let (plan, told, warned) = if a.system == moa_sparse::CARD.id {
        mixture(a, ctx, &loaded, &text.tokens)?
    } else {
        patterns_of_heads(a, ctx, &loaded, &text.tokens)?
    };
    plan.check(config)?;
    let text = plan.to_toml();
    if let Some(warning) = warned {
        ctx.remark(&warning);
    }
    match &a.out {
        None => {
            write!(out, "{text}")?;
            ctx.remark(&told);
        }
        Some(path) => {
            files::write_whole(path, text.as_bytes())?;
            writeln!(out, "{}: {told}", path.display())?;
        }
    }
    Ok(())
}

/// Run the model densely and hand q, k and v of every head to `each`; its answers with layer and head.
fn for_heads<T: Send>(
    a: &PlanArgs,
    ctx: &Context,
    loaded: &models::Loaded,
    tokens: &[u32],
    each: impl Fn(&HeadProblem, &Mat) -> foveal::Result<T> + Sync,
) -> Result<Vec<(usize, usize, T)>> {
    let config = loaded.model.config();
    let (heads, group) = (config.num_heads, config.num_heads / config.num_kv_heads);
    let (t, d) = (a.length, config.head_dim);
    let layers_a_pass = (RECORD_BYTES / (heads * 2 * t * d * 4).max(1)).max(1);
    let progress = Progress::new(ctx);
    let mut all = Vec::new();
    for from in (0..config.num_layers).step_by(layers_a_pass) {
        let to = (from + layers_a_pass).min(config.num_layers);
        progress.at(from as f64 / config.num_layers as f64, &format!("recording layers {from} to {}", to - 1));
        let record = PrefillOptions {
            // One chunk, so that the record holds every query.
            chunk: t,
            attention: a.load.attention(),
            capture: true,
            logits: LogitsFor::None,
            record: (from..to).flat_map(|l| (0..heads).map(move |h| (l, h))).collect(),
            cancel: Some(ctx.cancel.clone()),
            ..PrefillOptions::default()
        };
        let prompt = loaded.model.prefill(tokens, &Plan::dense(), &record)?;
        for layer in from..to {
            progress.at(layer as f64 / config.num_layers as f64, &format!("searching layer {layer}"));
            let of_layer: Vec<&Recorded> = prompt.recorded.iter().filter(|r| r.layer == layer).collect();
            let found = of_layer
                .par_iter()
                .map(|r| {
                    if ctx.cancelled() {
                        return Ok(None);
                    }
                    let v = &prompt.kv[layer].v[r.head / group * t * d..];
                    let (q, k) = (Mat::new(&r.q, r.tq, r.d, r.d), Mat::new(&r.k, r.tk, r.d, r.d));
                    let scale = 1.0 / (d as f32).sqrt();
                    let problem = HeadProblem { layer, head: r.head, ..HeadProblem::new(q, k, scale) };
                    Ok(Some((layer, r.head, each(&problem, &Mat::new(v, t, d, d))?)))
                })
                .collect::<std::result::Result<Vec<_>, foveal::Error>>()?;
            all.extend(found.into_iter().flatten());
            if ctx.cancelled() {
                return Err(CliError::Arguments("the search was interrupted; no plan was written".into()));
            }
        }
    }
    Ok(all)
}

/// A plan, one line about it, and what to warn of.
type Searched = (Plan, String, Option<String>);

/// Each head's best pattern of minference.
fn patterns_of_heads(a: &PlanArgs, ctx: &Context, loaded: &models::Loaded, tokens: &[u32]) -> Result<Searched> {
    let options = SearchOptions { budget: a.budget, max_error: a.max_error, ..SearchOptions::default() };
    let found = for_heads(a, ctx, loaded, tokens, |p, v| minference::search(p, v, &options))?;
    let choice = |(layer, head, f): (usize, usize, Found)| {
        let sparse = f.tried[0].error;
        Choice { layer, head, best: f.best, sparse }
    };
    let chosen: Vec<Choice> = found.into_iter().map(choice).collect();
    let spec = |c: &Choice| if c.fell_back() { Spec::new(DENSE) } else { c.best.config.spec() };
    let plan = plan_of(a, chosen.iter().map(|c| (c.layer, c.head, spec(c))));
    Ok((plan, summary(&chosen), warning(&chosen, a)))
}

/// The windows of moa-sparse that heads have together within the budget, at half the length and at all of it.
fn mixture(a: &PlanArgs, ctx: &Context, loaded: &models::Loaded, tokens: &[u32]) -> Result<Searched> {
    let lengths = [a.length / 2, a.length];
    let candidates = moa_sparse::candidates(lengths[0], lengths[1]);
    let found = for_heads(a, ctx, loaded, tokens, |p, v| {
        // Causal attention of the first tokens is that of a shorter prompt.
        let part = |m: &Mat, n: usize| -> Vec<f32> { (0..n).flat_map(|i| m.row(i).iter().copied()).collect() };
        let d = p.q.cols;
        let tables = lengths.map(|n| {
            let (q, k, v) = (part(&p.q, n), part(&p.k, n), part(v, n));
            let problem = HeadProblem { q: Mat::new(&q, n, d, d), k: Mat::new(&k, n, d, d), ..*p };
            search::table(&problem, &Mat::new(&v, n, d, d), &candidates)
        });
        let [short, long] = tables;
        Ok([short?, long?])
    })?;
    let judged: Vec<Vec<Vec<search::Judged>>> =
        (0..lengths.len()).map(|l| found.iter().map(|f| f.2[l].clone()).collect()).collect();
    let chosen = search::assign(&judged, a.budget);
    let rules = found.iter().zip(&chosen).map(|(f, &c)| (f.0, f.1, candidates[c].clone()));
    let plan = plan_of(a, rules);
    let of = |f: &dyn Fn(&search::Judged) -> f64| mean(found.iter().zip(&chosen).map(|(h, &c)| f(&h.2[1][c])));
    let (cost, error) = (of(&|j| j.cost), of(&|j| j.error));
    let kinds = chosen.iter().collect::<std::collections::BTreeSet<_>>().len();
    let told = format!(
        "{} heads at {cost:.2} of dense cost, mean error of the attention output {error:.3}; {kinds} of {} windows used",
        found.len(),
        candidates.len()
    );
    let warned = (cost > a.budget * 1.001).then(|| {
        format!("warning: even the narrowest windows cost {cost:.2} of dense; raise --budget {} or --length", a.budget)
    });
    Ok((plan, told, warned))
}

/// What the search found for one head.
struct Choice {
    layer: usize,
    head: usize,
    /// What the plan gives it.
    best: Candidate,
    /// Relative output error of its best sparse pattern.
    sparse: f64,
}

impl Choice {
    /// Every pattern within the budget was too far from exact attention.
    fn fell_back(&self) -> bool {
        self.best.config.pattern == Pattern::Dense
    }
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len().max(1);
    x.sum::<f64>() / n as f64
}

/// One line: heads, cost, error, patterns.
fn summary(chosen: &[Choice]) -> String {
    format!(
        "{} heads at {:.2} of dense cost, mean error of the attention output {:.3}; {}",
        chosen.len(),
        mean(chosen.iter().map(|c| c.best.cost)),
        mean(chosen.iter().map(|c| c.best.error)),
        patterns(chosen)
    )
}

/// Which heads stay dense and what to do about it.
fn warning(chosen: &[Choice], a: &PlanArgs) -> Option<String> {
    let fallen: Vec<&Choice> = chosen.iter().filter(|c| c.fell_back()).collect();
    let worst = fallen.iter().max_by(|a, b| a.sparse.total_cmp(&b.sparse))?;
    let mut layers: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    fallen.iter().for_each(|c| layers.entry(c.layer).or_default().push(c.head));
    let mut named: Vec<String> = layers
        .iter()
        .map(|(l, heads)| {
            let heads: Vec<String> = heads.iter().map(usize::to_string).collect();
            format!("{l}: {}", heads.join(" "))
        })
        .collect();
    if named.len() > NAMED_LAYERS {
        let left = named.len() - NAMED_LAYERS;
        named.truncate(NAMED_LAYERS);
        named.push(format!("and {left} more layers"));
    }
    Some(format!(
        "warning: {} of {} heads stay dense: at {} tokens their best pattern within --budget {} has a mean relative \
         output error of {:.2} (worst {:.2}, layer {} head {}), above --max-error {}. Raise --budget, or search on a \
         longer text with a larger --length. Layers and heads: {}",
        fallen.len(),
        chosen.len(),
        a.length,
        a.budget,
        mean(fallen.iter().map(|c| c.sparse)),
        worst.sparse,
        worst.layer,
        worst.head,
        a.max_error,
        named.join("; ")
    ))
}

/// Rules that give each (layer, head) its system, heads of one layer with the same one together.
fn plan_of(a: &PlanArgs, chosen: impl Iterator<Item = (usize, usize, Spec)>) -> Plan {
    let mut plan = Plan::of(&Spec::new(a.system.as_str()), &Spec::new(DENSE), KvDtype::default());
    plan.name = format!("{}, searched at {} tokens, budget {}", a.system, a.length, a.budget);
    let mut groups: BTreeMap<(usize, String), (Spec, Vec<usize>)> = BTreeMap::new();
    for (layer, head, spec) in chosen {
        groups.entry((layer, spec.to_string())).or_insert_with(|| (spec, Vec::new())).1.push(head);
    }
    for ((layer, _), (spec, heads)) in groups {
        plan.rules.push(Rule { layers: vec![layer], heads: Some(heads), prefill: Some(spec), cache: None });
    }
    plan
}

/// How many heads got which pattern.
fn patterns(chosen: &[Choice]) -> String {
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for c in chosen {
        let name = serde_json::to_value(c.best.config.pattern).ok();
        *count.entry(name.as_ref().and_then(|v| v.as_str()).unwrap_or("other").to_string()).or_default() += 1;
    }
    count.iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ")
}
