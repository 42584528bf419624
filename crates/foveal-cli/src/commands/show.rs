//! `foveal show`.

use super::list::{slots_of, state_text};
use super::print_json;
use crate::cli::ShowArgs;
use crate::error::{CliError, Result};
use foveal::registry::{self, Entry};
use foveal::sparse::Grid;
use foveal::sparse::axes::{Simulation, best_tile, simulate};
use foveal::{Card, Slot, Spec, System};
use serde_json::json;
use std::io::Write;

pub fn run(a: &ShowArgs, out: &mut dyn Write) -> Result {
    // A system as it is written elsewhere, parameters and all, shows the system.
    let id = a.id.split_once(':').map_or(a.id.as_str(), |(id, _)| id);
    let entry = registry::catalogue().iter().find(|e| e.id == id);
    let card = match registry::find(id) {
        Ok(card) => Some(card),
        Err(foveal::Error::NotBuilt { .. }) => None,
        Err(e) => return Err(e.into()),
    };
    let simulated = a.simulate.map(|grid| simulations(a, grid)).transpose()?;
    if a.json {
        let mut v = as_json(id, entry, card);
        if let (Some(s), Some(map)) = (&simulated, v.as_object_mut()) {
            map.insert("simulations".into(), s.iter().map(simulation_json).collect());
        }
        return print_json(out, &v);
    }
    if let (Some(s), Some(grid)) = (&simulated, a.simulate) {
        return Ok(simulation_text(out, &a.id, grid, s)?);
    }
    match card {
        Some(c) => text(out, c)?,
        None => {
            if let Some(e) = entry {
                writeln!(out, "{}: {}\n", e.id, e.title)?;
                writeln!(out, "family      {} ({})", e.family.letter(), e.family.title())?;
                writeln!(out, "scope       {}", e.scope)?;
                writeln!(out, "state       {}", state_text(e.state))?;
                if let Some(why) = e.reason {
                    writeln!(out, "why         {why}")?;
                }
            }
        }
    }
    Ok(())
}

/// The pattern on `grid` with the tile of our kernels, and with that asked for.
fn simulations(a: &ShowArgs, grid: Grid) -> Result<Vec<Simulation>> {
    let spec: Spec = a.id.parse()?;
    let axes = match registry::build(&spec, Slot::Prefill)? {
        System::Selector(s) => s.axes(grid),
        _ => None,
    };
    let Some(axes) = axes else {
        return Err(CliError::Arguments(format!(
            "--simulate: {} is no product of one static pattern an axis; simulate generalized-neighborhood-attention or another that is",
            spec.id
        )));
    };
    let own = simulate(&axes, best_tile(&axes), [1; 3]);
    let sides = |g: Grid| [g.t, g.h, g.w];
    let asked = a.tile.map(|q| simulate(&axes, sides(q), a.kv_tile.map_or([1; 3], sides)));
    Ok([own].into_iter().chain(asked).collect())
}

fn simulation_json(s: &Simulation) -> serde_json::Value {
    let mut v = json!(s);
    if let Some(map) = v.as_object_mut() {
        map.insert("speedup".into(), s.speedup().into());
        map.insert("bound".into(), s.bound().into());
        map.insert("block_sparse".into(), s.is_block_sparse().into());
    }
    v
}

fn simulation_text(out: &mut dyn Write, id: &str, grid: Grid, all: &[Simulation]) -> std::io::Result<()> {
    writeln!(out, "{id} on {grid}: {} tokens", grid.tokens())?;
    if let Some(s) = all.first() {
        let keys = s.pairs as f64 / grid.tokens().max(1) as f64;
        writeln!(
            out,
            "{keys:.1} keys a query, {:.2}% of dense; counting operations bounds the speed-up by {:.2}\n",
            100.0 / s.bound(),
            s.bound()
        )?;
    }
    let shape = |t: [usize; 3]| format!("{}x{}x{}", t[0], t[1], t[2]);
    writeln!(
        out,
        "{:<12}{:<12}{:>14}{:>16}{:>10}  masks",
        "queries", "keys", "tiles visited", "tiles of dense", "speed-up"
    )?;
    for (i, s) in all.iter().enumerate() {
        let masks = if s.is_block_sparse() { "none: block-sparse" } else { "inside tiles" };
        let whose = if i == 0 { " (tiles of our kernels)" } else { "" };
        let (q, kv, fast) = (shape(s.q_tile), shape(s.kv_tile), s.speedup());
        writeln!(out, "{q:<12}{kv:<12}{:>14}{:>16}{fast:>10.2}  {masks}{whose}", s.visited, s.dense)?;
    }
    Ok(())
}

fn as_json(id: &str, entry: Option<&Entry>, card: Option<&Card>) -> serde_json::Value {
    let mut v = json!({
        "id": id,
        "title": card.map(|c| c.title).or(entry.map(|e| e.title)),
        "family": card.map(|c| c.family).or(entry.map(|e| e.family)).map(|f| f.letter().to_string()),
        "scope": entry.map(|e| e.scope),
        "state": entry.map(|e| e.state),
        "reason": entry.and_then(|e| e.reason),
        "slots": slots_of(id),
    });
    if let (Some(c), Some(map)) = (card, v.as_object_mut()) {
        map.insert("authors".into(), c.authors.into());
        map.insert("arxiv".into(), c.arxiv.into());
        map.insert("equation".into(), c.equation.into());
        map.insert("cost".into(), c.cost.into());
        map.insert("laws".into(), c.laws.iter().map(ToString::to_string).collect());
        map.insert("params".into(), json!((c.params)()));
        map.insert("choices".into(), json!(c.choices));
    }
    v
}

/// Paper as `authors; arXiv number`.
pub fn paper(c: &Card) -> String {
    if c.arxiv.is_empty() { c.authors.into() } else { format!("{}; arXiv {}", c.authors, c.arxiv) }
}

/// A default value as one writes it on the command line.
pub fn value_text(v: &serde_json::Value) -> String {
    match v {
        serde_json::Value::String(s) if s.is_empty() => "\"\"".into(),
        serde_json::Value::String(s) => s.clone(),
        serde_json::Value::Array(a) => a.iter().map(value_text).collect::<Vec<_>>().join(";"),
        v => v.to_string(),
    }
}

fn text(out: &mut dyn Write, c: &Card) -> std::io::Result<()> {
    writeln!(out, "{}: {}\n", c.id, c.title)?;
    writeln!(out, "paper       {}", paper(c))?;
    writeln!(out, "family      {} ({})", c.family.letter(), c.family.title())?;
    writeln!(out, "slots       {}", c.slot_names())?;
    writeln!(out, "state       done")?;
    writeln!(out, "cost        {}", c.cost)?;
    writeln!(out, "\nequation")?;
    for line in c.equation.lines() {
        writeln!(out, "  {}", line.trim())?;
    }
    writeln!(out, "\nparameters")?;
    let params = (c.params)();
    if params.is_empty() {
        writeln!(out, "  none")?;
    }
    let shown: Vec<String> = params.iter().map(|p| format!("{} = {}", p.name, value_text(&p.default))).collect();
    let width = shown.iter().map(|s| s.chars().count()).max().unwrap_or(0);
    for (p, s) in params.iter().zip(&shown) {
        writeln!(out, "  {s}{}  {}", " ".repeat(width - s.chars().count()), p.doc)?;
    }
    writeln!(out, "\nlaws")?;
    for l in c.laws {
        writeln!(out, "  {l}")?;
    }
    if !c.choices.is_empty() {
        writeln!(out, "\nsettled choices")?;
        for choice in c.choices {
            writeln!(out, "  - {choice}")?;
        }
    }
    writeln!(out, "\nuse")?;
    for (slot, flag) in [(Slot::Prefill, "--prefill"), (Slot::Cache, "--cache")] {
        if c.has_slot(slot) {
            writeln!(out, "  foveal compare {flag} {}", c.id)?;
        }
    }
    if c.has_slot(Slot::Prefill) {
        writeln!(out, "  foveal apply {} --in qkv.safetensors --out o.safetensors", c.id)?;
    }
    Ok(())
}
