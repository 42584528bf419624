//! The conformance suite: every law of every registered system, on random problems.
//!
//! [`check`] runs the unwritten laws (finite, every row sees a key, shape, same answer twice,
//! extreme logits) and those a card declares, and returns one [`Outcome`] each. Failures are data,
//! not panics, so that the waiver ledger can name them and notice when a waiver is no longer
//! needed.

mod cache;
mod mixer;
mod prefill;
mod problem;

pub use problem::{CacheProblem, PrefillProblem};

use crate::error::Result;
use crate::registry;
use crate::system::{Card, Growth, Law, Params, Slot, Spec, System, parse_value};

/// Verdict on one law of one system.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// System id.
    pub system: &'static str,
    /// Slot under test.
    pub slot: Slot,
    /// Name of the law.
    pub law: String,
    /// `None` = held; else what was seen.
    pub failure: Option<String>,
}

/// What a law's check found: `Ok(())`, or what it saw.
pub(crate) type Finding = std::result::Result<(), String>;

/// All laws of one card.
pub fn check(card: &'static Card) -> Vec<Outcome> {
    let mut all = Vec::new();
    for &slot in card.slots {
        let findings = match slot {
            Slot::Prefill => prefill::check(card),
            Slot::Cache => cache::check(card),
            Slot::Mixer => mixer::check(card),
            // An exact kernel is tested where it is used: in the prefill and cache slots.
            _ => continue,
        };
        for (law, finding) in findings {
            all.push(Outcome { system: card.id, slot, law, failure: finding.err() });
        }
    }
    all
}

/// Build a card's system for a slot with parameters written as on the command line.
fn build(card: &Card, slot: Slot, params: &[(&str, &str)]) -> Result<System> {
    let mut spec = Spec::new(card.id);
    for (name, value) in params {
        spec.params.insert((*name).into(), parse_value(value));
    }
    registry::build(&spec, slot)
}

/// Default value of an integer parameter.
fn default_int(card: &Card, name: &str) -> std::result::Result<usize, String> {
    (card.params)()
        .iter()
        .find(|p| p.name == name)
        .and_then(|p| p.default.as_u64())
        .map(|x| x as usize)
        .ok_or_else(|| format!("the law names parameter {name:?}, which is no integer parameter of the card"))
}

/// Name of a law for reports and waivers.
pub fn law_name(law: &Law) -> String {
    match law {
        Law::Causal => "causal".into(),
        Law::CausalInBlocks(p) => format!("causal-in-blocks({p})"),
        Law::CausalMask => "causal-mask".into(),
        Law::ExactAt(p) => {
            format!("exact-at({})", p.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","))
        }
        Law::Work { .. } => "work".into(),
        Law::Gradients => "gradients".into(),
        Law::StepsAgree => "steps-agree".into(),
        Law::BytesAsDeclared => "bytes-as-declared".into(),
        Law::SmallerThanDense => "smaller-than-dense".into(),
        Law::Monotone { param, .. } => format!("monotone({param})"),
    }
}

/// All elements of a tensor.
pub(crate) fn flat(t: &candle_core::Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

/// The card itself: parameters documented, defaults valid, text there.
pub(crate) fn check_card(card: &Card) -> Finding {
    for (what, text) in
        [("title", card.title), ("authors", card.authors), ("equation", card.equation), ("cost", card.cost)]
    {
        if text.trim().is_empty() {
            return Err(format!("the card has no {what}"));
        }
    }
    (card.build)(&Params::new()).map_err(|e| format!("defaults are refused: {e}"))?;
    for p in (card.params)() {
        if p.default.is_null() {
            return Err(format!("parameter {} is documented but is no field of the config", p.name));
        }
        if p.doc.trim().is_empty() {
            return Err(format!("parameter {} has no documentation", p.name));
        }
        let one = Params::from_iter([(p.name.to_owned(), p.default.clone())]);
        (card.build)(&one).map_err(|e| format!("the default of {} does not round-trip: {e}", p.name))?;
    }
    let unknown = Params::from_iter([("no-such-parameter".to_owned(), 1.into())]);
    match (card.build)(&unknown) {
        Err(crate::Error::UnknownParam { .. }) => Ok(()),
        _ => Err("an unknown parameter is not refused by name".into()),
    }
}

/// Complaint unless `a` and `b` agree: largest difference at most `tolerance` times the largest |b|.
pub(crate) fn close(what: &str, a: &[f32], b: &[f32], tolerance: f32) -> Finding {
    if a.len() != b.len() {
        return Err(format!("{what}: {} elements against {}", a.len(), b.len()));
    }
    let top = b.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    let mut worst = 0f32;
    for (x, y) in a.iter().zip(b) {
        if !x.is_finite() || !y.is_finite() {
            return Err(format!("{what}: not finite: {x} against {y}"));
        }
        worst = worst.max((x - y).abs());
    }
    if worst / top > tolerance {
        return Err(format!("{what}: relative distance {:.2e}, allowed {tolerance:.0e}", worst / top));
    }
    Ok(())
}

/// log2 of the growth of a counter when T doubles.
pub(crate) fn exponent(half: u64, full: u64) -> f64 {
    (full.max(1) as f64 / half.max(1) as f64).log2()
}

/// Highest exponent that a growth class allows between two lengths (log factors and partial
/// blocks leave a little above the pure power).
pub(crate) fn allowed(g: Growth) -> f64 {
    match g {
        Growth::Linear => 1.12,
        Growth::LogLinear => 1.3,
        Growth::Quadratic => 2.05,
    }
}
