//! `foveal list`.

use super::print_json;
use crate::cli::ListArgs;
use crate::error::Result;
use crate::table;
use foveal::registry::{self, Entry, State};
use serde_json::json;
use std::io::Write;

/// How a state is written for people.
pub fn state_text(s: State) -> &'static str {
    match s {
        State::Done => "done",
        State::NotYet => "not yet",
        State::NothingToBuild => "nothing to build",
    }
}

/// Slots of a catalogued system; empty until it is built.
pub fn slots_of(id: &str) -> &'static [foveal::Slot] {
    registry::cards().iter().find(|c| c.id == id).map_or(&[], |c| c.slots)
}

pub fn run(a: &ListArgs, out: &mut dyn Write) -> Result {
    let needle = a.search.as_deref().unwrap_or("").to_lowercase();
    let matches = |e: &Entry| {
        let text = format!("{} {} {}", e.id, e.title, e.reason.unwrap_or("")).to_lowercase();
        a.family.is_none_or(|f| e.family == f)
            && a.slot.is_none_or(|s| slots_of(e.id).contains(&s))
            && a.state.is_none_or(|s| e.state == s.state())
            && text.contains(&needle)
    };
    let found: Vec<&Entry> = registry::catalogue().iter().filter(|e| matches(e)).collect();
    if a.json {
        let rows: Vec<_> = found
            .iter()
            .map(|e| {
                json!({
                    "id": e.id, "family": e.family.letter().to_string(), "family_title": e.family.title(),
                    "scope": e.scope, "title": e.title, "state": e.state, "reason": e.reason, "slots": slots_of(e.id),
                })
            })
            .collect();
        return print_json(out, &rows);
    }
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|e| {
            let slots: Vec<String> = slots_of(e.id).iter().map(ToString::to_string).collect();
            let title = match e.reason {
                Some(why) => format!("{} ({why})", e.title),
                None => e.title.to_string(),
            };
            vec![e.id.into(), e.family.letter().into(), state_text(e.state).into(), slots.join(","), title]
        })
        .collect();
    table::write(out, &["ID", "F", "STATE", "SLOTS", "TITLE"], &rows)?;
    let count = |s: State| found.iter().filter(|e| e.state == s).count();
    writeln!(
        out,
        "\n{} systems: {} done, {} not yet, {} nothing to build",
        found.len(),
        count(State::Done),
        count(State::NotYet),
        count(State::NothingToBuild)
    )?;
    Ok(())
}
