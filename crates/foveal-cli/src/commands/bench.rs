//! `foveal bench`.

use crate::Context;
use crate::cli::{BenchOpsArgs, Format};
use crate::error::{CliError, Result};
use crate::progress::Progress;
use foveal_kernels::Isa;
use foveal_lab::bench::{self, BenchOptions};
use std::io::Write;

pub fn run(a: &BenchOpsArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    if !(a.seconds >= 0.0 && a.seconds <= 60.0) {
        return Err(CliError::Arguments(format!("--seconds {}: give a number from 0 to 60", a.seconds)));
    }
    let options = BenchOptions {
        filter: a.filter.clone(),
        tokens: a.tokens.clone(),
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        isas: if a.all_isas { Isa::available() } else { Vec::new() },
        seconds: a.seconds,
        seed: a.seed,
    };
    let progress = Progress::new(ctx);
    let rows =
        bench::ops(&options, Some(&ctx.cancel), &mut |row| progress.at(0.0, &format!("{} {}", row.op, row.shape)))?;
    drop(progress);
    if rows.is_empty() {
        return Err(CliError::Arguments(format!(
            "--filter {:?} matches no operation; leave it out to see all names",
            a.filter.as_deref().unwrap_or("")
        )));
    }
    match a.format {
        Format::Json => super::print_json(out, &rows)?,
        Format::Csv => write!(out, "{}", bench::csv(&rows))?,
        Format::Markdown => write!(out, "{}", bench::markdown(&rows))?,
    }
    Ok(())
}
