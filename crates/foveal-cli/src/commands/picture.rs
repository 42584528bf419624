//! `foveal picture`.

use super::print_json;
use crate::Context;
use crate::cli::PictureArgs;
use crate::error::{CliError, Result};
use crate::{files, models};
use foveal::{Slot, System, registry};
use foveal_lab::maps::Head;
use foveal_lab::picture::{Picture, Place, made, of_system};
use foveal_llm::{LogitsFor, Plan, PrefillOptions};
use serde_json::json;
use std::io::Write;

/// Channels of a made head.
const MADE_DIM: usize = 64;

pub fn run(a: &PictureArgs, ctx: &Context, out: &mut dyn Write) -> Result {
    files::check_folder(&a.out)?;
    // Before a model is loaded: a wrong parameter is the quicker answer.
    if let System::Dense = registry::build(&a.id, Slot::Prefill)? {
        return Err(CliError::Arguments(format!("{}: it visits every key; name a system that chooses", a.id)));
    }
    let (picture, of) = if a.grid.is_some() { of_made(a)? } else { of_model(a, ctx)? };
    files::write_whole(&a.out, picture.svg(&format!("{}, {of}", a.id)).as_bytes())?;
    let (density, recall) = (picture.density, picture.recall);
    if a.json {
        return print_json(
            out,
            &json!({"system": a.id.to_string(), "of": of, "density": density, "recall": recall, "out": a.out.display().to_string()}),
        );
    }
    writeln!(
        out,
        "{}: {of}: {:.1}% of the pairs visited, {:.1}% of the attention kept",
        a.out.display(),
        100.0 * density,
        100.0 * recall
    )?;
    Ok(())
}

fn of_made(a: &PictureArgs) -> Result<(Picture, String)> {
    let Some(grid) = a.grid else { return Err(CliError::Arguments("--grid is missing".into())) };
    let (q, k) = made(grid, MADE_DIM, a.seed);
    let n = grid.tokens();
    // Text before the grid would have nothing to say here.
    let grid = foveal::sparse::Grid { first: 0, ..grid };
    let scale = 1.0 / (MADE_DIM as f32).sqrt();
    let system = registry::build(&a.id, Slot::Prefill)?;
    let causal = !system.domain().full;
    let head = Head { q: &q, k: &k, tq: n, tk: n, d: MADE_DIM, scale, causal };
    let picture = of_system(&a.id.id, system, &head, Place { layer: a.layer, head: a.head, grid: Some(grid) })?;
    Ok((picture, format!("a made head on a grid of {grid}")))
}

fn of_model(a: &PictureArgs, ctx: &Context) -> Result<(Picture, String)> {
    let system = registry::build(&a.id, Slot::Prefill)?;
    system.domain().check(&a.id.id, true, None, a.length)?;
    let loaded = models::load(&a.model, &a.load, ctx)?;
    let config = loaded.model.config();
    if a.layer >= config.num_layers || a.head >= config.num_heads {
        return Err(CliError::Arguments(format!(
            "--layer {}, --head {}: the model has {} layers of {} heads, counted from 0",
            a.layer, a.head, config.num_layers, config.num_heads
        )));
    }
    let text = models::text(a.text.as_deref(), a.length, a.load.offline, &loaded.tokenizer, ctx)?;
    let options = PrefillOptions {
        // One chunk, so that the record holds every query.
        chunk: a.length.max(1),
        logits: LogitsFor::None,
        record: vec![(a.layer, a.head)],
        ..models::prompt_options(&a.load, ctx, "reading the text")
    };
    let tokens = text.tokens.get(..a.length).unwrap_or(&text.tokens);
    let prompt = loaded.model.prefill(tokens, &Plan::dense(), &options)?;
    let Some(r) = prompt.recorded.first() else {
        return Err(CliError::Arguments(format!("layer {}, head {} left no record", a.layer, a.head)));
    };
    let scale = 1.0 / (r.d as f32).sqrt();
    let head = Head { q: &r.q, k: &r.k, tq: r.tq, tk: r.tk, d: r.d, scale, causal: true };
    let picture = of_system(&a.id.id, system, &head, Place { layer: a.layer, head: a.head, grid: None })?;
    Ok((picture, format!("layer {}, head {}, {} tokens", a.layer, a.head, tokens.len())))
}
