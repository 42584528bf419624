//! `foveal run`.

use crate::Context;
use crate::cli::{DEFAULT_MODEL, RunArgs};
use crate::error::{CliError, Result};
use crate::machine::size;
use crate::models::{self, Loaded};
use foveal_llm::chat::Message;
use foveal_llm::{GenerateOptions, LogitsFor, PrefillOptions, SampleOptions, StopReason, generate};
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

pub fn run(a: &RunArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    check_sampling(a)?;
    let (name, given) = names(a);
    let prompt = prompt(a, given)?;
    let loaded = models::load(name, &a.load, ctx)?;
    let plan = models::plan(&a.choice, &loaded.model)?;
    let calibration = models::calibration(&loaded, &plan, a.calibration_text.as_deref(), a.load.offline, ctx)?;
    let tokens = tokens(a, &prompt, &loaded, ctx)?;
    let context = loaded.model.config().max_position;
    if tokens.len() + a.max_tokens > context {
        ctx.remark(&format!(
            "warning: {} prompt tokens and {} new ones pass the {context} that the model was trained for",
            tokens.len(),
            a.max_tokens
        ));
    }
    let options =
        PrefillOptions { logits: LogitsFor::Last, ..models::prompt_options(&a.load, ctx, "reading the prompt") };
    let (mut session, prompt) = loaded.model.start(&tokens, &plan, calibration.as_ref(), &options)?;
    drop(options);
    let resident = session.resident();
    let options = GenerateOptions {
        sample: SampleOptions {
            temperature: a.temperature,
            top_p: a.top_p,
            top_k: a.top_k,
            min_p: a.min_p,
            repetition_penalty: a.repetition_penalty,
            seed: a.seed,
        },
        max_tokens: a.max_tokens,
        stop: a.stop.clone(),
        history: tokens,
    };
    let mut broken = None;
    let done = generate(&mut session, &loaded.model, &loaded.tokenizer, &prompt.hidden, &options, |text| {
        if let Err(e) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            broken = Some(e);
        }
        if broken.is_some() || ctx.cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if let Some(e) = broken {
        return Err(e.into());
    }
    if !done.text.ends_with('\n') {
        writeln!(out)?;
        out.flush()?;
    }
    if prompt.stats.fallback() > 0.0 {
        ctx.remark(&format!(
            "note: {:.1}% of the prompt's attention ran on a slower kernel path than asked for; FOVEAL_LOG=info says why",
            prompt.stats.fallback() * 100.0
        ));
    }
    let why = match &done.stop_reason {
        StopReason::EndOfSequence(_) => "the model ended its turn".to_string(),
        StopReason::StopString(s) => format!("stop string {s:?}"),
        StopReason::Length => format!("--max-tokens {}", a.max_tokens),
        StopReason::Cancelled => "interrupted".into(),
    };
    ctx.remark(&format!(
        "prompt {} tokens in {:.2} s ({:.0}/s, attention {:.2} s) · {} new tokens at {:.1}/s · keys and values {} \
         after the prompt · {} · ended by: {why}",
        prompt.len,
        prompt.stats.seconds,
        prompt.stats.tokens_per_second(),
        prompt.stats.attention_seconds,
        done.tokens.len(),
        done.tokens.len() as f64 / done.stats.seconds.max(1e-9),
        size(resident.total() as u64),
        if plan.name.is_empty() { "plan file" } else { &plan.name },
    ));
    Ok(())
}

/// The model's name and the prompt among the positional arguments.
fn names(a: &RunArgs) -> (&str, Option<&str>) {
    match (&a.model, &a.prompt) {
        (Some(only), None) if only.contains(char::is_whitespace) && !Path::new(only).exists() => {
            (DEFAULT_MODEL, Some(only))
        }
        (model, prompt) => (model.as_deref().unwrap_or(DEFAULT_MODEL), prompt.as_deref()),
    }
}

fn prompt(a: &RunArgs, given: Option<&str>) -> Result<String> {
    let text = match (given, &a.prompt_file) {
        (Some(p), _) => p.to_string(),
        (None, Some(f)) if f.as_os_str() != "-" => models::read_utf8(f)?,
        (None, None) if std::io::stdin().is_terminal() => String::new(),
        _ => {
            let mut bytes = Vec::new();
            let from = Path::new("standard input");
            std::io::stdin().read_to_end(&mut bytes).map_err(|e| CliError::file(from, "read", e))?;
            String::from_utf8(bytes).map_err(|_| CliError::BadFile {
                path: from.into(),
                problem: "is not UTF-8 text; convert it first".into(),
            })?
        }
    };
    if text.trim().is_empty() {
        return Err(CliError::Arguments(
            "the prompt is empty; give it as the second argument, with --prompt-file, or on standard input".into(),
        ));
    }
    Ok(text)
}

fn tokens(a: &RunArgs, prompt: &str, l: &Loaded, ctx: &Context) -> Result<Vec<u32>> {
    let chat = !a.no_chat && l.tokenizer.chat_template().is_some();
    if !chat {
        if a.system.is_some() {
            return Err(CliError::Arguments(
                "--system needs a chat template and this model has none; put the text into the prompt".into(),
            ));
        }
        if !a.no_chat {
            ctx.remark("this model has no chat template; continuing the prompt as raw text");
        }
        return Ok(l.tokenizer.encode(prompt, true, false)?);
    }
    let mut messages: Vec<Message> = a.system.iter().map(Message::system).collect();
    messages.push(Message::user(prompt));
    Ok(l.tokenizer.encode(&l.tokenizer.apply_chat(&messages, true)?, false, true)?)
}

fn check_sampling(a: &RunArgs) -> Result {
    let share = |x: f32| (0.0..=1.0).contains(&x);
    let bad =
        |name: &str, x: f32, range: &str| Err(CliError::Arguments(format!("--{name} {x}: give a number {range}")));
    if !(a.temperature.is_finite() && a.temperature >= 0.0) {
        return bad("temperature", a.temperature, "of 0 or more");
    }
    if !(share(a.top_p) && a.top_p > 0.0) {
        return bad("top-p", a.top_p, "above 0 and up to 1");
    }
    if !share(a.min_p) {
        return bad("min-p", a.min_p, "from 0 to 1");
    }
    if !(a.repetition_penalty.is_finite() && a.repetition_penalty > 0.0) {
        return bad("repetition-penalty", a.repetition_penalty, "above 0");
    }
    if a.max_tokens == 0 {
        return Err(CliError::Arguments("--max-tokens 0: give at least 1".into()));
    }
    Ok(())
}
