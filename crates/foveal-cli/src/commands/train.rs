//! `foveal train`.

use super::print_json;
use crate::Context;
use crate::cli::{TrainArgs, TrainTask};
use crate::error::{CliError, Result};
use crate::progress::Progress;
use crate::table;
use foveal_tune::tasks::Task;
use foveal_tune::tasks::fashion::Fashion;
use foveal_tune::tasks::mqar::Mqar;
use foveal_tune::tasks::needle::Needle;
use foveal_tune::trainer::{Hooks, Step};
use foveal_tune::{TrainConfig, data, train};
use serde_json::json;
use std::io::Write;

/// Gaps of queries in the recall task: the paper's power.
const POWER: f64 = 0.01;

pub fn run(a: &TrainArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    let models = a.layers.iter().map(|l| layers(l)).collect::<Result<Vec<_>>>()?;
    let runs = models.len() * if a.random { 2 } else { 1 };
    if a.checkpoint.is_some() && runs > 1 {
        return Err(CliError::Arguments(
            "--checkpoint holds one run; leave out --random and give --layers once".into(),
        ));
    }
    let task: Box<dyn Task> = match a.task {
        TrainTask::Needle => Box::new(Needle::new(a.tokens, a.vocab)?),
        TrainTask::Mqar => Box::new(Mqar::new(a.tokens, a.pairs, a.vocab, POWER)?),
        TrainTask::Fashion => {
            let folder = match &a.data {
                Some(folder) => folder.clone(),
                None => data::fashion_mnist(a.offline)?,
            };
            Box::new(Fashion::new(&folder, a.patch)?)
        }
    };
    let mut rows = Vec::new();
    for (spelled, layers) in a.layers.iter().zip(models) {
        for random in [false, true].into_iter().take(if a.random { 2 } else { 1 }) {
            let mut config = TrainConfig {
                steps: a.steps,
                batch: a.batch,
                lr: a.lr,
                seed: a.seed,
                warmup: (a.steps / 20).max(1),
                eval_every: (a.steps / 4).max(1),
                ..TrainConfig::for_task(task.as_ref(), layers.clone(), a.hidden, a.heads)
            };
            config.net.random = random;
            let name = if random { format!("{spelled}, random choice") } else { spelled.clone() };
            let progress = Progress::new(ctx);
            let mut on_step = |s: &Step| {
                let what = format!("{name}: step {} of {}, loss {:.3}", s.step, a.steps, s.loss);
                progress.at(s.step as f64 / a.steps as f64, &what);
            };
            let hooks =
                Hooks { on_step: Some(&mut on_step), cancel: Some(&ctx.cancel), checkpoint: a.checkpoint.clone() };
            let (_, _, report) = train(task.as_ref(), &config, hooks)?;
            rows.push((name, config, report));
        }
    }
    if a.json {
        let runs: Vec<_> = rows.iter().map(|(n, c, r)| json!({"name": n, "config": c, "report": r})).collect();
        return print_json(out, &json!({"task": task.name(), "runs": runs}));
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, _, r)| {
            vec![
                name.clone(),
                format!("{:.1}%", 100.0 * r.last.accuracy.unwrap_or(0.0)),
                format!("{:.1}%", 100.0 * r.best_accuracy),
                format!("{:.3}", r.last.loss),
                format!("{:.1}%", 100.0 * r.density),
                r.parameters.to_string(),
            ]
        })
        .collect();
    table::write(out, &["layers", "accuracy", "best", "loss", "pairs visited", "parameters"], &cells)?;
    Ok(())
}

/// `a*2+b` as [a, a, b]. A plus, since parameters hold commas.
fn layers(s: &str) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for part in s.split('+') {
        let (spec, n) = match part.rsplit_once('*') {
            Some((spec, n)) => (
                spec,
                n.trim().parse::<usize>().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| {
                    CliError::Arguments(format!(
                        "--layers {s}: {n:?} is no number of layers; write 1 to 64 after the *"
                    ))
                })?,
            ),
            None => (part, 1),
        };
        let spec: foveal::Spec = spec.trim().parse()?;
        foveal::registry::find(&spec.id)?;
        all.extend(std::iter::repeat_n(spec.to_string(), n));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_spelled_out_and_wrong_ones_named() {
        assert_eq!(
            layers("moba:topk=3,block_size=16*2+flashattention-2").unwrap(),
            ["moba:topk=3,block_size=16", "moba:topk=3,block_size=16", "flashattention-2"]
        );
        for (bad, word) in [("moba*0", "moba*0"), ("moba*x", "x"), ("no-such+moba", "no-such"), ("moba:topk", "topk")] {
            let e = layers(bad).unwrap_err().to_string();
            assert!(e.contains(word), "{bad}: {e}");
        }
    }
}
