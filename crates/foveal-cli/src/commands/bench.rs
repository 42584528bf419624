//! `foveal bench`.

use crate::Context;
use crate::cli::{BenchModelArgs, BenchOpsArgs, BenchSelectorsArgs, Format, Source};
use crate::error::{CliError, Result};
use crate::files::{self, check_folder};
use crate::models;
use crate::progress::Progress;
use crate::run_facts::{command_line, today};
use foveal_kernels::Isa;
use foveal_lab::bench::{self, BenchOptions};
use foveal_lab::ceilings::{self, CeilingOptions, Ceilings};
use foveal_lab::facts::cpu_name;
use foveal_lab::model_bench::{self, MAX_TOKENS, ModelBench, Request};
use foveal_lab::report;
use foveal_lab::roofline::{self, Roofline};
use foveal_lab::selectors::{self, Operands, SelectorBench};
use foveal_llm::PrefillOptions;
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

/// Tokens of a text that requests over --serve may reach into.
const SERVED_TEXT: usize = 1 << 16;

pub fn ops(a: &BenchOpsArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if !(a.seconds >= 0.0 && a.seconds <= 60.0) {
        return Err(CliError::Arguments(format!("--seconds {}: give a number from 0 to 60", a.seconds)));
    }
    let placed = [&a.report, &a.json].into_iter().flatten();
    for path in placed.clone() {
        check_folder(path)?;
    }
    let brief = placed.count() > 0;
    let options = BenchOptions {
        filter: a.filter.clone(),
        tokens: a.tokens.clone(),
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        isas: if a.all_isas { Isa::available() } else { Vec::new() },
        brief,
        seconds: a.seconds,
        seed: a.seed,
    };
    let begin = Instant::now();
    let progress = Progress::new(ctx);
    // Each of the two measurements of the machine takes about this share of the time.
    let share = if brief { 0.1 } else { 0.0 };
    let cancel = Some(&*ctx.cancel);
    let limits = |begin: f64| -> Result<Option<Ceilings>> {
        if !brief {
            return Ok(None);
        }
        let o = CeilingOptions { seconds: a.seconds.min(1.0), ..CeilingOptions::default() };
        Ok(Some(ceilings::measure(&o, cancel, &mut |done, what| progress.at(begin + share * done, what))?))
    };
    let before = limits(0.0)?;
    let rows = bench::ops(&options, cancel, &mut |done, row| {
        progress.at(share + (1.0 - 2.0 * share) * done, &format!("{} {}", row.op, row.shape));
    })?;
    let ceilings = before.zip(limits(1.0 - share)?).map(|(a, b)| a.or_better(b));
    drop(progress);
    if rows.is_empty() {
        return Err(CliError::Arguments(format!(
            "--filter {:?} matches no operation; leave it out to see all names",
            a.filter.as_deref().unwrap_or("")
        )));
    }
    let Some(ceilings) = ceilings else {
        match a.format {
            Format::Json => super::print_json(out, &rows)?,
            Format::Csv => write!(out, "{}", bench::csv(&rows))?,
            Format::Markdown => write!(out, "{}", bench::markdown(&rows))?,
        }
        return Ok(());
    };
    let r = Roofline {
        version: env!("CARGO_PKG_VERSION").into(),
        date: today(),
        cpu: cpu_name(),
        isa: Isa::active().to_string(),
        threads: ctx.threads,
        command: command_line(),
        seconds: begin.elapsed().as_secs_f64(),
        points: roofline::place(&ceilings, rows.clone()),
        ceilings,
    };
    // What was measured is shown even if a file finds no room.
    match a.format {
        Format::Json => super::print_json(out, &r)?,
        Format::Csv => write!(out, "{}", bench::csv(&rows))?,
        Format::Markdown => write!(out, "{}", roofline::tables(&r))?,
    }
    if let Some(path) = &a.json {
        let text = serde_json::to_string_pretty(&r).map_err(std::io::Error::from)? + "\n";
        files::write_whole(path, text.as_bytes())?;
        ctx.remark(&format!("wrote {}", path.display()));
    }
    if let Some(path) = &a.report {
        files::write_whole(path, report::roofline(&r).as_bytes())?;
        ctx.remark(&format!("wrote {}", path.display()));
    }
    Ok(())
}

pub fn model(a: &BenchModelArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if !a.serve && a.repeats == 0 {
        return Err(CliError::Arguments("--repeats 0: give at least 1".into()));
    }
    let prompts = a.prompt.iter().map(|&tokens| Request::Prefill { tokens });
    let depths = a.depth.iter().map(|&depth| Request::Decode { depth, steps: a.steps });
    let requests: Vec<Request> = prompts.chain(depths).collect();
    let longest = a.prompt.iter().chain(&a.depth).copied().max().unwrap_or(0);
    if let Some(n) = (!a.serve).then_some(longest.max(a.steps)).filter(|&n| n > MAX_TOKENS) {
        return Err(CliError::Arguments(format!("{n} tokens: give at most {MAX_TOKENS}")));
    }
    let loaded = models::load(&a.model, &a.load, ctx)?;
    let plan = models::plan(&a.choice, &loaded.model)?;
    let calibration = models::calibration(&loaded, &plan, a.text.as_deref(), a.load.offline, ctx)?;
    // A prompt, the steps after it, and the few before the clock starts.
    let need = if a.serve { SERVED_TEXT } else { longest + a.steps + 8 };
    let text = match &a.text {
        Some(_) => Some(models::text(a.text.as_deref(), need, a.load.offline, &loaded.tokenizer, ctx)?),
        None => None,
    };
    // No progress from inside a prompt: the clock is running there.
    let cancel = Some(ctx.cancel.clone());
    let options = PrefillOptions { attention: a.load.attention(), cancel, ..PrefillOptions::default() };
    let tokens = text.as_ref().map(|t| t.tokens.as_slice());
    let mut bench = ModelBench::new(&loaded.model, &plan, calibration.as_ref(), &options, tokens);
    let about = json!({
        "model": loaded.about,
        "version": env!("CARGO_PKG_VERSION"),
        "isa": Isa::active().to_string(),
        "threads": ctx.threads,
        "weights": loaded.model.weight_formats(),
        "weight_bytes": loaded.model.weight_bytes(),
        "attention": options.attention.to_string(),
        "plan": plan.to_toml(),
        "text": text.as_ref().map_or("made-up tokens", |t| t.about.as_str()),
    });
    if a.serve {
        return serve(&mut bench, &about, out);
    }
    let progress = Progress::new(ctx);
    let (mut done, all) = (0, requests.len() * (a.repeats + 1));
    let rows = bench.rounds(&requests, a.repeats, &mut |_, t| {
        done += 1;
        progress.at(done as f64 / all as f64, &format!("{:.1} tokens/s", t.tokens_per_second));
    })?;
    drop(progress);
    if let Some(path) = &a.json {
        let report = json!({"about": about, "rows": rows});
        let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::from)? + "\n";
        files::write_whole(path, text.as_bytes())?;
    }
    Ok(write!(out, "{}", model_bench::markdown(&rows))?)
}

/// One line out at once, then one for each line in, until the input ends.
fn serve(bench: &mut ModelBench, about: &Value, out: &mut dyn Write) -> Result {
    let mut say = |value: &Value| -> Result {
        writeln!(out, "{value}")?;
        Ok(out.flush()?)
    };
    say(about)?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = match serde_json::from_str::<Request>(&line) {
            Err(e) => json!({"error": format!("cannot read the request {line:?}: {e}")}),
            Ok(request) => match bench.time(request) {
                Err(e) => json!({"error": e.to_string()}),
                Ok(timing) => json!(timing),
            },
        };
        say(&answer)?;
    }
    Ok(())
}

pub fn selectors(a: &BenchSelectorsArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if a.lengths.is_empty() || a.lengths.iter().any(|&n| n == 0 || n > MAX_TOKENS) {
        return Err(CliError::Arguments(format!("--lengths: give token counts from 1 to {MAX_TOKENS}")));
    }
    if a.recording.is_some() && a.lengths.len() > 1 {
        return Err(CliError::Arguments("--recording holds one length; give one in --lengths".into()));
    }
    for path in [&a.json, &a.svg, &a.recording].into_iter().flatten() {
        check_folder(path)?;
    }
    let systems = a.systems.iter().flat_map(|l| l.0.clone()).collect();
    let options = SelectorBench { systems, rounds: a.rounds, rows: a.rows };
    let mut all = Vec::new();
    for &source in &a.source {
        for &length in &a.lengths {
            let operands = operands(a, source, length, ctx)?;
            ctx.remark(&format!("{} tokens, {}", operands.tokens, operands.source));
            let progress = Progress::new(ctx);
            let rows = selectors::measure(&operands, &options, Some(&*ctx.cancel), &mut |done, what| {
                progress.at(done, what);
            })?;
            drop(progress);
            writeln!(out, "{} tokens, {}\n\n{}", operands.tokens, operands.source, selectors::markdown(&rows))?;
            if let Some(best) = selectors::best(&rows, 0.95) {
                writeln!(out, "Fastest that keeps 95%: {}, {:.2} times dense\n", best.system, best.speedup)?;
            }
            all.extend(rows);
        }
    }
    if let Some(path) = &a.json {
        let text = serde_json::to_string_pretty(&all).map_err(std::io::Error::from)? + "\n";
        files::write_whole(path, text.as_bytes())?;
    }
    if let Some(path) = &a.svg {
        files::write_whole(path, report::mass(&all).as_bytes())?;
        ctx.remark(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// q and k of one source and length.
fn operands(a: &BenchSelectorsArgs, source: Source, length: usize, ctx: &Context) -> Result<Operands> {
    if source == Source::Random {
        return Ok(Operands::random(a.heads, length, a.head_dim, 0));
    }
    if let Some(path) = a.recording.as_ref().filter(|p| p.exists()) {
        return Ok(Operands::load(path)?);
    }
    let loaded = models::load(&a.model, &a.load, ctx)?;
    let text = models::text(a.text.as_deref(), length, a.load.offline, &loaded.tokenizer, ctx)?;
    let Some(tokens) = text.tokens.get(..length) else {
        return Err(CliError::Arguments(format!("the text has {} tokens, {length} are needed", text.tokens.len())));
    };
    let progress = Arc::new(Progress::new(ctx));
    let told = progress.clone();
    let tell = move |done: usize, all: usize| told.at(done as f64 / all.max(1) as f64, "recording");
    let o = Operands::record(&loaded.model, tokens, a.heads, Some(ctx.cancel.clone()), Some(Arc::new(tell)))?;
    if let Some(path) = &a.recording {
        o.save(path)?;
    }
    Ok(o)
}
