//! Streaming generation: sample, decode, watch for stop strings, step the session.

use crate::error::{LlmError, Result};
use crate::model::{Model, Stats};
use crate::sample::{SampleOptions, Sampler};
use crate::session::Session;
use crate::tokenizer::Tokenizer;
use std::ops::ControlFlow;

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// How tokens are drawn.
    pub sample: SampleOptions,
    /// Most tokens to draw.
    pub max_tokens: usize,
    /// Text that ends the answer; it is never emitted, not even in part.
    pub stop: Vec<String>,
    /// Tokens that count as already said for the repetition penalty, usually the prompt.
    pub history: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { sample: SampleOptions::default(), max_tokens: 256, stop: Vec::new(), history: Vec::new() }
    }
}

/// Why generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended its turn with this token.
    EndOfSequence(u32),
    /// This stop string appeared.
    StopString(String),
    /// `max_tokens` were drawn.
    Length,
    /// The callback asked to stop, or the session was interrupted.
    Cancelled,
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The text that was emitted.
    pub text: String,
    /// All tokens drawn, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Time and work of the decode steps; `seconds` holds sampling too.
    pub stats: Stats,
}

/// Generate from the final hidden row `first_hidden` (hidden) of what the session holds.
/// `on_text` gets text as soon as it is certain, and ends the run with `Break`.
///
/// # Errors
/// A hidden row of the wrong length, or a step that fails.
pub fn generate(
    session: &mut Session,
    model: &Model,
    tokenizer: &Tokenizer,
    first_hidden: &[f32],
    options: &GenerateOptions,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated> {
    let width = model.config().hidden_size;
    if first_hidden.len() != width {
        return Err(LlmError::Input {
            problem: format!(
                "generation needs one final hidden row of {width}, got {}; run the prompt with LogitsFor::Last",
                first_hidden.len()
            ),
        });
    }
    let mut sampler = Sampler::new(&options.sample);
    let mut history = options.history.clone();
    let mut decoder = tokenizer.stream(&options.history);
    let mut gate = StopGate::new(&options.stop);
    let mut out =
        Generated { text: String::new(), tokens: Vec::new(), stop_reason: StopReason::Length, stats: Stats::default() };
    let mut hidden = first_hidden.to_vec();
    let begin = std::time::Instant::now();
    let ends = |t: u32| tokenizer.is_end(t) || model.config().eos_token_ids.contains(&t);
    while out.tokens.len() < options.max_tokens {
        let mut logits = model.logits(&hidden);
        let token = sampler.next(&mut logits, &history);
        out.tokens.push(token);
        history.push(token);
        if ends(token) {
            out.stop_reason = StopReason::EndOfSequence(token);
            break;
        }
        let (text, stopped) = gate.push(&decoder.push(token)?);
        out.text.push_str(&text);
        if !text.is_empty() && on_text(&text).is_break() {
            out.stop_reason = StopReason::Cancelled;
            break;
        }
        if let Some(s) = stopped {
            out.stop_reason = StopReason::StopString(s);
            break;
        }
        // The last token needs no step: nothing is drawn after it.
        if out.tokens.len() < options.max_tokens {
            let step = match session.extend(&[token]) {
                Err(LlmError::Interrupted) => {
                    out.stop_reason = StopReason::Cancelled;
                    break;
                }
                step => step?,
            };
            out.stats.add(&step.stats);
            hidden = step.hidden;
        }
    }
    if matches!(out.stop_reason, StopReason::Length | StopReason::EndOfSequence(_)) {
        let (mut text, stopped) = gate.push(&decoder.finish()?);
        match stopped {
            Some(s) => out.stop_reason = StopReason::StopString(s),
            None => text.push_str(&gate.finish()),
        }
        out.text.push_str(&text);
        if !text.is_empty() && on_text(&text).is_break() {
            out.stop_reason = StopReason::Cancelled;
        }
    }
    out.stats.seconds = begin.elapsed().as_secs_f64();
    Ok(out)
}

/// Holds text back while it may be the beginning of a stop string.
#[derive(Debug, Clone)]
pub struct StopGate {
    stops: Vec<String>,
    held: String,
}

impl StopGate {
    /// Empty stop strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Text that is certain now, and the stop string that ended it. Of several stop strings the
    /// one that begins first wins.
    pub fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s))).min_by_key(|x| x.0);
        if let Some((at, s)) = found {
            let s = s.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(s));
        }
        // The longest end of the text that begins some stop string stays.
        let keep = self
            .held
            .char_indices()
            .map(|(i, _)| i)
            .find(|&i| self.stops.iter().any(|s| s.starts_with(&self.held[i..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What was held back and turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], parts: &[&str]) -> (String, Option<String>) {
        let mut g = StopGate::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let mut out = String::new();
        for p in parts {
            let (text, stop) = g.push(p);
            out.push_str(&text);
            if stop.is_some() {
                return (out, stop);
            }
        }
        out.push_str(&g.finish());
        (out, None)
    }

    #[test]
    fn never_emits_a_part_of_a_stop_string() {
        let mut g = StopGate::new(&["END!".into(), "é\n".into()]);
        assert_eq!(g.push("abE").0, "ab");
        assert_eq!(g.push("ND").0, "");
        assert_eq!(g.push("?E").0, "END?");
        assert_eq!(g.push("é").0, "E");
        assert_eq!(g.push("\nx"), (String::new(), Some("é\n".into())));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b", "c"]), ("a".into(), Some("aab".into())));
        assert_eq!(run(&["xyz", "yz"], &["wxyz"]), ("w".into(), Some("xyz".into())));
        assert_eq!(run(&[""], &["a", "b"]), ("ab".into(), None));
        assert_eq!(run(&["abc"], &["xab"]), ("xab".into(), None));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[ab]{0,30}", cuts in proptest::collection::vec(1usize..4, 30), stop in "[ab]{2,4}") {
            let mut parts = Vec::new();
            let mut at = 0;
            for c in cuts {
                let to = (at + c).min(text.len());
                parts.push(&text[at..to]);
                at = to;
            }
            parts.push(&text[at..]);
            let expected = match text.find(&stop) {
                Some(i) => (text[..i].to_string(), Some(stop.clone())),
                None => (text.clone(), None),
            };
            prop_assert_eq!(run(&[&stop], &parts), expected);
        }
    }
}
