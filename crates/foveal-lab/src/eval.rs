//! One task for one plan: what `foveal eval` runs.

use crate::error::{LabError, Result};
use crate::needle::{self, NeedleOptions};
use crate::ppl;
use crate::results::Needle;
use foveal_llm::{Calibration, LogitsFor, Model, Plan, PrefillOptions, Tokenizer};
use serde::Serialize;

/// Perplexity of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PplScore {
    /// Perplexity of the last quarter given the rest.
    pub ppl: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Tokens in all.
    pub length: usize,
    /// Seconds of the prompt.
    pub prompt_seconds: f64,
    /// Bytes of the store after the prompt; `None` where the plan keeps a dense store and the
    /// text ran as one prompt.
    pub kv_bytes: Option<usize>,
}

/// Passkeys of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NeedleScore {
    /// Found.
    pub hits: usize,
    /// All trials.
    pub needle: Needle,
    /// Prompt and question together.
    pub length: usize,
    /// Seconds of the prompt.
    pub prompt_seconds: f64,
    /// Bytes of the store after the prompt.
    pub kv_bytes: usize,
}

/// Whether a plan needs [`Model::calibrate`] first, and with the inputs' moments.
///
/// # Errors
/// A plan that does not fit the model.
pub fn calibration_needs(model: &Model, plan: &Plan) -> Result<(bool, bool)> {
    let n = plan.resolve(model.config())?.needs();
    Ok((n.calibration, n.input_moment))
}

/// Perplexity of the last quarter of the first `length` tokens. A plan that only changes the
/// prompt runs all of it as one prompt; one that changes the store runs three quarters as the
/// prompt and the rest through the store. `options` carries cancellation and progress.
///
/// # Errors
/// A text shorter than `length`, and whatever the engine refuses.
pub fn ppl(
    model: &Model,
    text: &[u32],
    length: usize,
    plan: &Plan,
    calibration: Option<&Calibration>,
    options: &PrefillOptions,
) -> Result<PplScore> {
    if text.len() < length {
        return Err(LabError::TextTooShort { what: format!("a length of {length}"), have: text.len(), need: length });
    }
    let text = &text[..length];
    let from = ppl::split(length)?;
    let tokens = length - from;
    let role = crate::compare::role(plan, plan.kv_dtype);
    let mut o = options.clone();
    if matches!(role, crate::results::Role::Dense | crate::results::Role::Prefill) {
        o.logits = LogitsFor::LastN(tokens + 1);
        let p = model.prefill(text, plan, &o)?;
        let ppl = ppl::perplexity(&ppl::of_prompt(model, &p, text, from)?);
        return Ok(PplScore { ppl, tokens, length, prompt_seconds: p.stats.seconds, kv_bytes: None });
    }
    o.logits = LogitsFor::Last;
    let (mut s, p) = model.start(&text[..from], plan, calibration, &o)?;
    let kv_bytes = Some(s.resident().total());
    let h = model.config().hidden_size;
    let last = &p.hidden[p.hidden.len() - h..];
    let ppl = ppl::perplexity(&ppl::of_session(model, &mut s, last, &text[from..], ppl::PIECE)?);
    Ok(PplScore { ppl, tokens, length, prompt_seconds: p.stats.seconds, kv_bytes })
}

/// Passkey retrieval in a haystack of `length` tokens.
///
/// # Errors
/// As [`needle::haystack`] and whatever the engine refuses.
pub fn needle(
    model: &Model,
    tokenizer: &Tokenizer,
    text: &[u32],
    length: usize,
    plan: &Plan,
    calibration: Option<&Calibration>,
    needles: &NeedleOptions,
    options: &PrefillOptions,
) -> Result<NeedleScore> {
    let hay = needle::haystack(tokenizer, text, length, needles)?;
    let o = PrefillOptions { logits: LogitsFor::None, ..options.clone() };
    let (s, p) = model.start(&hay.prompt, plan, calibration, &o)?;
    let needle = needle::run(model, &s, &hay)?;
    Ok(NeedleScore {
        hits: needle.hits(),
        needle,
        length,
        prompt_seconds: p.stats.seconds,
        kv_bytes: s.resident().total(),
    })
}
