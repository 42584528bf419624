//! `foveal compare`.

use crate::Context;
use crate::cli::{CompareArgs, Specs};
use crate::error::{CliError, Result};
use crate::files::check_folder;
use crate::machine::size;
use crate::models;
use crate::progress::Progress;
use crate::run_facts::{command_line, today};
use foveal::Spec;
use foveal_lab::compare::{CompareOptions, Comparison, plans};
use foveal_lab::needle::NeedleOptions;
use foveal_lab::report;
use foveal_lab::results::Facts;
use foveal_llm::Plan;
use std::io::Write;

/// Tokens read beyond the longest length: the calibration text of policies that need one.
const BEYOND: usize = 2048;

pub fn run(a: &CompareArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    let longest = a.lengths.iter().copied().max().unwrap_or(0);
    let flat = |lists: &[Specs]| -> Vec<Spec> { lists.iter().flat_map(|l| l.0.clone()).collect() };
    let mut wanted = if a.prefill.is_empty() && a.cache.is_empty() && !a.plan.is_empty() {
        // Only plan files: dense and those.
        plans(&[Spec::new(foveal_llm::plan::DENSE)], &[], a.kv_dtype)
    } else {
        plans(&flat(&a.prefill), &flat(&a.cache), a.kv_dtype)
    };
    for file in &a.plan {
        let mut plan = Plan::load(file)?;
        if plan.name.is_empty() {
            plan.name = file.file_stem().map_or_else(|| "plan".into(), |s| s.to_string_lossy().into_owned());
        }
        wanted.push(plan);
    }
    check_out(a)?;
    let loaded = models::load(&a.model, &a.load, ctx)?;
    for plan in &wanted {
        // Before minutes are spent: a misspelt parameter is an answer at once.
        plan.check(loaded.model.config())?;
    }
    let text = models::text(a.text.as_deref(), longest + BEYOND, a.load.offline, &loaded.tokenizer, ctx)?;
    ctx.remark(&text.about);
    let options = CompareOptions {
        ppl: !a.no_ppl,
        needles: (a.trials > 0).then_some(NeedleOptions { trials: a.trials, seed: a.seed }),
        maps: !a.no_maps,
        attention: a.load.attention(),
        decode_steps: a.decode_steps,
        ..CompareOptions::default()
    };
    let facts = Facts {
        version: env!("CARGO_PKG_VERSION").into(),
        date: today(),
        threads: ctx.threads,
        model: loaded.about.clone(),
        text: text.about.clone(),
        command: command_line(),
        ..Facts::default()
    };
    let comparison = Comparison {
        model: &loaded.model,
        tokenizer: &loaded.tokenizer,
        text: &text.tokens,
        calibration: &[],
        lengths: a.lengths.clone(),
        plans: wanted,
        options,
        facts,
    };
    let progress = Progress::new(ctx);
    let results = comparison.run(&mut |p| progress.at(p.fraction, &p.what), Some(ctx.cancel.clone()))?;
    drop(progress);
    // A folder gets the usual names inside it.
    let prefix = if a.out.is_dir() { a.out.join("foveal-report") } else { a.out.clone() };
    // Minutes of measuring are shown even if the report finds no room.
    let written = report::write_all(&results, &prefix);
    if a.json {
        write!(out, "{}", report::json(&results)?)?;
    } else {
        writeln!(out, "{}\n\n{}", report::tables(&results).trim_end(), report::verdicts(&results).trim_end())?;
        for note in &results.notes {
            writeln!(out, "note: {note}")?;
        }
        let peak = results.peak_bytes.map(|b| format!(", peak memory {}", size(b))).unwrap_or_default();
        writeln!(out, "\nmeasured in {:.0} s{peak}", results.seconds)?;
    }
    let written = written?;
    ctx.remark(&format!("wrote {}, {} and {}", written.html.display(), written.json.display(), written.csv.display()));
    Ok(())
}

/// The report's folder must exist before minutes of measuring.
fn check_out(a: &CompareArgs) -> Result {
    check_folder(&a.out)?;
    match a.out.file_name() {
        None => Err(CliError::BadFile {
            path: a.out.clone(),
            problem: "is no file prefix; give one such as out/report".into(),
        }),
        Some(_) => Ok(()),
    }
}
