//! `foveal plan`.

use crate::Context;
use crate::cli::PlanArgs;
use crate::error::{CliError, Result};
use crate::files;
use crate::models;
use crate::progress::Progress;
use foveal::Spec;
use foveal::prim::kv::KvDtype;
use foveal::sparse::minference::{MInference, SearchOptions, search};
use foveal::sparse::{HeadProblem, Mat};
use foveal_llm::model::Recorded;
use foveal_llm::plan::DENSE;
use foveal_llm::{LogitsFor, Plan, PrefillOptions, Rule};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;

/// Memory for recorded queries and keys of one pass over the model.
const RECORD_BYTES: usize = 512 << 20;

pub fn run(a: &PlanArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if !(a.budget > 0.0 && a.budget <= 1.0) {
        return Err(CliError::Arguments(format!("--budget {}: give a share above 0 and up to 1", a.budget)));
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

    let (heads, group) = (config.num_heads, config.num_heads / config.num_kv_heads);
    let (t, d) = (a.length, config.head_dim);
    let layers_a_pass = (RECORD_BYTES / (heads * 2 * t * d * 4).max(1)).max(1);
    let options = SearchOptions { budget: a.budget, ..SearchOptions::default() };
    let progress = Progress::new(ctx);
    let mut chosen: Vec<(usize, usize, MInference, f64)> = Vec::new();
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
        let prompt = loaded.model.prefill(&text.tokens, &Plan::dense(), &record)?;
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
                    let problem = HeadProblem {
                        q: Mat::new(&r.q, r.tq, r.d, r.d),
                        k: Mat::new(&r.k, r.tk, r.d, r.d),
                        scale: 1.0 / (d as f32).sqrt(),
                        layer,
                        head: r.head,
                    };
                    let best = search(&problem, &Mat::new(v, t, d, d), &options)?.best;
                    Ok(Some((layer, r.head, best.config, best.error)))
                })
                .collect::<std::result::Result<Vec<_>, foveal::Error>>()?;
            chosen.extend(found.into_iter().flatten());
            if ctx.cancelled() {
                return Err(CliError::Arguments("the search was interrupted; no plan was written".into()));
            }
        }
    }
    drop(progress);
    let plan = plan_of(&chosen, a)?;
    plan.check(config)?;
    let text = plan.to_toml();
    match &a.out {
        None => write!(out, "{text}")?,
        Some(path) => {
            files::write_whole(path, text.as_bytes())?;
            let mean = chosen.iter().map(|c| c.3).sum::<f64>() / chosen.len().max(1) as f64;
            writeln!(
                out,
                "{}: {} heads at {} of dense cost, mean error of the attention output {mean:.3}; {}",
                path.display(),
                chosen.len(),
                a.budget,
                patterns(&chosen)
            )?;
        }
    }
    Ok(())
}

/// Rules that give each head its configuration, heads of one layer with the same one together.
fn plan_of(chosen: &[(usize, usize, MInference, f64)], a: &PlanArgs) -> Result<Plan> {
    let mut plan = Plan::of(&Spec::new("minference"), &Spec::new(DENSE), KvDtype::default());
    plan.name = format!("minference, searched at {} tokens, budget {}", a.length, a.budget);
    let mut groups: BTreeMap<(usize, String), (Spec, Vec<usize>)> = BTreeMap::new();
    for (layer, head, config, _) in chosen {
        let spec = spec_of(config)?;
        groups.entry((*layer, spec.to_string())).or_insert_with(|| (spec, Vec::new())).1.push(*head);
    }
    for ((layer, _), (spec, heads)) in groups {
        plan.rules.push(Rule { layers: vec![layer], heads: Some(heads), prefill: Some(spec), cache: None });
    }
    Ok(plan)
}

/// The parameters in which a configuration differs from the defaults.
fn spec_of(config: &MInference) -> Result<Spec> {
    let fields = |c: &MInference| match serde_json::to_value(c) {
        Ok(serde_json::Value::Object(m)) => Ok(m),
        Ok(_) => Ok(serde_json::Map::new()),
        Err(e) => Err(CliError::from(std::io::Error::from(e))),
    };
    let default = fields(&MInference::default())?;
    let mut spec = Spec::new("minference");
    spec.params = fields(config)?.into_iter().filter(|(k, v)| default.get(k) != Some(v)).collect();
    Ok(spec)
}

/// How many heads got which pattern.
fn patterns(chosen: &[(usize, usize, MInference, f64)]) -> String {
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for c in chosen {
        let name = serde_json::to_value(c.2.pattern).ok();
        *count.entry(name.as_ref().and_then(|v| v.as_str()).unwrap_or("other").to_string()).or_default() += 1;
    }
    count.iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ")
}
