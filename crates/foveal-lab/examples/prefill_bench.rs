//! Quality and cost of prefill systems on a model: `prefill_bench MODEL TEXT LENGTH WINDOWS SPEC…`.
//!
//! Runs WINDOWS consecutive pieces of LENGTH tokens of the text under every SPEC (`dense` is exact
//! attention), one after the other on each piece, and prints per spec the least seconds of the
//! whole prompt, of attention (the choice of what to visit included) and of the choice alone, the
//! pairs visited in percent of dense, the relative error of the attention output over layers
//! (mean, worst) and the perplexity of the last quarters.

use foveal::prim::kv::KvDtype;
use foveal_lab::compare::plans;
use foveal_llm::model::AttentionDtype;
use foveal_llm::{Checkpoint, LoadOptions, LogitsFor, Model, Plan, PrefillOptions};
use std::path::Path;

#[derive(Default)]
struct Row {
    best: Option<[f64; 3]>,
    pairs: u64,
    layers: Vec<f64>,
    nll: Vec<f64>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, length, windows, specs @ ..] = args.as_slice() else {
        return Err("usage: prefill_bench MODEL TEXT LENGTH WINDOWS SPEC…".into());
    };
    let (length, windows): (usize, usize) = (length.parse()?, windows.parse()?);
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let engine = Model::load(&checkpoint, &LoadOptions::default())?;
    let text = std::fs::read_to_string(text)?;
    let head: String = text.chars().take(8 * length * windows).collect();
    let tokens = checkpoint.tokenizer()?.encode(&head, true, false)?;
    if tokens.len() < length * windows {
        return Err(format!("the text has {} tokens, {} are needed", tokens.len(), length * windows).into());
    }
    let chosen: Vec<Plan> = specs
        .iter()
        .map(|s| match s.as_str() {
            "dense" => Ok(Plan::dense()),
            s => Ok(plans(&[s.parse()?], &[], KvDtype::default()).pop().unwrap_or_else(Plan::dense)),
        })
        .collect::<Result<_, foveal::Error>>()?;
    let last = length / 4;
    let o = PrefillOptions {
        logits: LogitsFor::LastN(last + 1),
        probe_rows: 16,
        attention: AttentionDtype::fastest(),
        ..PrefillOptions::default()
    };
    let mut rows: Vec<Row> = specs.iter().map(|_| Row::default()).collect();
    let width = engine.config().hidden_size;
    for piece in tokens.chunks_exact(length).take(windows) {
        for (row, plan) in rows.iter_mut().zip(&chosen) {
            let p = engine.prefill(piece, plan, &o)?;
            let s = &p.stats;
            if row.best.is_none_or(|b| s.attention_seconds < b[1]) {
                row.best = Some([s.seconds, s.attention_seconds, s.select_seconds]);
            }
            row.pairs += s.attend.pairs;
            row.layers.resize(p.probe.len(), 0.0);
            row.layers.iter_mut().zip(&p.probe).for_each(|(a, b)| *a += f64::from(*b) / windows as f64);
            row.nll.extend(engine.nll(&p.hidden[..last * width], &piece[length - last..]));
        }
    }
    let causal = (length as u64 * (length as u64 + 1) / 2 * windows as u64) as f64;
    let dense = causal * (engine.config().num_layers * engine.config().num_heads) as f64;
    println!("prompt s  attention s  choice s  seen %  error mean  worst (layer)    ppl  system");
    for (row, spec) in rows.iter().zip(specs) {
        let [all, attention, choice] = row.best.unwrap_or_default();
        let mean = row.layers.iter().sum::<f64>() / row.layers.len().max(1) as f64;
        let worst = row.layers.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap_or((0, &0.0));
        println!(
            "{all:8.3}  {attention:11.3}  {choice:8.3}  {:6.1}  {mean:10.4}  {:6.4} ({:3})  {:8.4}  {spec}",
            100.0 * row.pairs as f64 / dense,
            worst.1,
            worst.0,
            foveal_lab::ppl::perplexity(&row.nll),
        );
    }
    Ok(())
}
