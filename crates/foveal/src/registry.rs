//! Every built system, and every catalogued one.

use crate::error::{Error, Result, nearest_hint};
use crate::system::{Card, Family, Slot, Spec, System};
use crate::{cache, kernel, sparse};
use serde::Serialize;
use std::sync::OnceLock;

/// Cards of all built systems.
pub fn cards() -> &'static [&'static Card] {
    static ALL: OnceLock<Vec<&'static Card>> = OnceLock::new();
    ALL.get_or_init(|| kernel::CARDS.iter().chain(sparse::CARDS).chain(cache::CARDS).copied().collect())
}

/// How far a catalogued system has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Built and held to its laws.
    Done,
    /// In the catalogue, not built yet.
    NotYet,
    /// A paper without an attention, mixing, low-rank or adapter piece.
    NothingToBuild,
}

/// One line of the catalogue.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Id.
    pub id: &'static str,
    /// Family.
    pub family: Family,
    /// `core`, `piece`, `check`, `eval` or `none`.
    pub scope: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// Built or not.
    pub state: State,
    /// Why there is nothing to build, if so.
    pub reason: Option<&'static str>,
}

const CATALOGUE: &str = include_str!("../data/systems.tsv");
const REASONS: &str = include_str!("../data/nothing-to-build.tsv");

/// All catalogued systems in catalogue order.
pub fn catalogue() -> &'static [Entry] {
    static ALL: OnceLock<Vec<Entry>> = OnceLock::new();
    ALL.get_or_init(|| {
        let reasons: Vec<(&str, &str)> = REASONS.lines().filter_map(|l| l.split_once('\t')).collect();
        CATALOGUE
            .lines()
            .skip(1)
            .filter_map(|line| {
                let mut f = line.split('\t');
                let (id, family, scope, title) = (f.next()?, f.next()?, f.next()?, f.next()?);
                let state = if scope == "none" {
                    State::NothingToBuild
                } else if cards().iter().any(|c| c.id == id) {
                    State::Done
                } else {
                    State::NotYet
                };
                Some(Entry {
                    id,
                    family: Family::from_letter(family.chars().next()?)?,
                    scope,
                    title,
                    state,
                    reason: reasons.iter().find(|r| r.0 == id).map(|r| r.1),
                })
            })
            .collect()
    })
}

/// Card of a built system; a catalogued but unbuilt id and an unknown id give different errors.
pub fn find(id: &str) -> Result<&'static Card> {
    if let Some(c) = cards().iter().find(|c| c.id == id) {
        return Ok(c);
    }
    if catalogue().iter().any(|e| e.id == id) {
        return Err(Error::NotBuilt { id: id.into() });
    }
    let known = cards().iter().map(|c| c.id).chain(catalogue().iter().map(|e| e.id));
    Err(Error::UnknownSystem { id: id.into(), hint: nearest_hint(id, known) })
}

/// Build a system for a slot.
pub fn build(spec: &Spec, slot: Slot) -> Result<System> {
    let card = find(&spec.id)?;
    if !card.has_slot(slot) {
        return Err(Error::WrongSlot {
            system: card.id.into(),
            wanted: match slot {
                Slot::Prefill => "a prefill system",
                Slot::Cache => "a cache policy",
                Slot::Mixer => "an attention layer",
                _ => "this kind of system",
            },
            slots: card.slot_names(),
        });
    }
    (card.build)(&spec.params)
}
