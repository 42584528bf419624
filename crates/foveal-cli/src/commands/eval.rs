//! `foveal eval`.

use super::print_json;
use crate::Context;
use crate::cli::{EvalArgs, Task};
use crate::error::{CliError, Result};
use crate::machine::size;
use crate::models;
use foveal_lab::eval;
use foveal_lab::needle::NeedleOptions;
use serde_json::json;
use std::io::Write;

pub fn run(a: &EvalArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if a.task == Task::Needle && a.trials == 0 {
        return Err(CliError::Arguments("--trials 0: give at least 1 passkey".into()));
    }
    let loaded = models::load(&a.model, &a.load, ctx)?;
    let plan = models::plan(&a.choice, &loaded.model)?;
    let text = models::text(a.text.as_deref(), a.length, a.load.offline, &loaded.tokenizer, ctx)?;
    ctx.remark(&text.about);
    let calibration = models::calibration(&loaded, &plan, a.text.as_deref(), a.load.offline, ctx)?;
    let options = models::prompt_options(&a.load, ctx, "reading the text");
    let (model, tokens) = (&loaded.model, &text.tokens);
    let (score, line) = match a.task {
        Task::Ppl => {
            let s = eval::ppl(model, tokens, a.length, &plan, calibration.as_ref(), &options)?;
            let line = format!("perplexity {:.4} over the last {} of {} tokens", s.ppl, s.tokens, s.length);
            (json!(s), line)
        }
        Task::Needle => {
            let needles = NeedleOptions { trials: a.trials, seed: a.seed };
            let s = eval::needle(
                model,
                &loaded.tokenizer,
                tokens,
                a.length,
                &plan,
                calibration.as_ref(),
                &needles,
                &options,
            )?;
            let line = format!(
                "{} of {} passkeys found in {} tokens; keys and values take {}",
                s.hits,
                s.needle.trials.len(),
                s.length,
                size(s.kv_bytes as u64)
            );
            (json!(s), line)
        }
    };
    drop(options);
    if a.json {
        let task = if a.task == Task::Ppl { "ppl" } else { "needle" };
        return print_json(
            out,
            &json!({"task": task, "model": loaded.about, "text": text.about, "plan": plan.to_toml(), "score": score}),
        );
    }
    writeln!(out, "{}: {line}", if plan.name.is_empty() { "plan" } else { &plan.name })?;
    Ok(())
}
