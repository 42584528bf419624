//! `foveal tune`.

use super::print_json;
use crate::Context;
use crate::cli::TuneGatesArgs;
use crate::error::Result;
use crate::files::{check_folder, write_whole};
use crate::models;
use crate::progress::Progress;
use crate::table;
use foveal_tune::gates::{GateConfig, GateHooks, GateReport, distil};
use serde_json::json;
use std::io::Write;
use std::sync::Arc;

/// `foveal tune gates`.
pub fn gates(a: &TuneGatesArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    for file in std::iter::once(&a.out).chain(&a.report) {
        check_folder(file)?;
    }
    let config = GateConfig {
        block_size: a.block_size,
        gate_dim: a.gate_dim,
        length: a.length,
        sequences: a.sequences,
        held_out: a.held_out,
        steps: a.steps,
        batch: a.batch,
        lr: a.lr,
        seed: a.seed,
        budgets: a.budgets.clone(),
        ..GateConfig::default()
    };
    let loaded = models::load(&a.model, &a.load, ctx)?;
    let text = models::text(a.text.as_deref(), config.tokens(), a.load.offline, &loaded.tokenizer, ctx)?;
    ctx.remark(&text.about);
    let progress = Progress::new(ctx);
    let hooks = GateHooks {
        progress: Some(Arc::new(move |done, what: &str| progress.at(done, what))),
        cancel: Some(ctx.cancel.clone()),
    };
    let (gates, report) = distil(&loaded.model, &text.tokens, &config, &hooks)?;
    drop(hooks);
    let all = json!({"model": loaded.about, "text": text.about, "report": report});
    write_whole(&a.out, &gates.bytes()?)?;
    if let Some(file) = &a.report {
        write_whole(file, format!("{all:#}\n").as_bytes())?;
    }
    if a.json {
        return print_json(out, &all);
    }
    summary(&report, out)?;
    let spec = format!("seerattention:gates={},block_size={}", a.out.display(), a.block_size);
    writeln!(out, "wrote {}; use it as --prefill {spec},topk={}", a.out.display(), a.budgets.last().unwrap_or(&8))?;
    Ok(())
}

fn summary(r: &GateReport, out: &mut dyn Write) -> Result {
    let c = &r.config;
    writeln!(
        out,
        "{} parameters; loss {:.4} before, {:.4} after; on held-out text {:.4} and {:.4}; {:.0} s reading, {:.0} s fitting",
        r.parameters, r.loss[0], r.loss[1], r.held_out_loss[0], r.held_out_loss[1], r.seconds[0], r.seconds[1]
    )?;
    let blocks = c.length.div_ceil(c.block_size);
    writeln!(
        out,
        "share of held-out text's true attention in the chosen of up to {blocks} blocks of {}:",
        c.block_size
    )?;
    let budgets: Vec<String> = r.recall.iter().map(|b| format!("{} blocks", b.topk)).collect();
    let header: Vec<&str> = std::iter::once("choice").chain(budgets.iter().map(String::as_str)).collect();
    let rows: Vec<Vec<String>> = (0..r.recall.first().map_or(0, |b| b.choices.len()))
        .map(|i| {
            let name = r.recall[0].choices[i].choice.to_owned();
            std::iter::once(name).chain(r.recall.iter().map(|b| format!("{:.4}", b.choices[i].recall))).collect()
        })
        .collect();
    table::write(out, &header, &rows)?;
    Ok(())
}
