//! `foveal show`.

use super::list::{slots_of, state_text};
use super::print_json;
use crate::cli::ShowArgs;
use crate::error::Result;
use foveal::registry::{self, Entry};
use foveal::{Card, Slot};
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
    if a.json {
        return print_json(out, &as_json(id, entry, card));
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
