//! `bench model`: how fast a whole model reads a prompt and writes tokens, one request at a time,
//! so that another program can be timed in turn with it.
//!
//! Prompts are made-up token ids: [`token`] of their position. Neither exact attention nor a linear
//! layer is faster on one id than on another; a sparse system may be, so hand it a real text.

use crate::compare::median;
use crate::error::{LabError, Result};
use foveal_llm::{Calibration, LogitsFor, Model, Plan, PrefillOptions, Session};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Most tokens of one request.
pub const MAX_TOKENS: usize = 1 << 20;
/// Steps before the clock starts: the first ones grow the copied store and fill the cache.
const WARM_STEPS: usize = 2;

/// What to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// A prompt from nothing to the logits of its last token, stores filled.
    Prefill {
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// Single tokens after a prompt, each to its logits; the prompt is not timed.
    Decode {
        /// Tokens before the first step; 0 stands for 1, since a session starts with a token.
        depth: usize,
        /// Steps timed together.
        steps: usize,
    },
}

/// One timing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Tokens processed.
    pub tokens: usize,
    /// Seconds they took.
    pub seconds: f64,
    /// Of these in attention.
    pub attention_seconds: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
}

/// Repeated timings of one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpeedRow {
    /// What was timed.
    pub request: Request,
    /// Timings.
    pub repeats: usize,
    /// Median tokens a second.
    pub median: f64,
    /// Slowest.
    pub min: f64,
    /// Fastest.
    pub max: f64,
    /// Share of the median timing's seconds spent in attention.
    pub attention_share: f64,
}

impl SpeedRow {
    /// Summary of some timings of one request.
    pub fn of(request: Request, timings: &[Timing]) -> Self {
        let mut rates: Vec<f64> = timings.iter().map(|t| t.tokens_per_second).collect();
        let mut shares: Vec<f64> = timings.iter().map(|t| t.attention_seconds / t.seconds).collect();
        let mid = median(&mut rates);
        Self {
            request,
            repeats: rates.len(),
            median: mid,
            min: rates.first().copied().unwrap_or(f64::NAN),
            max: rates.last().copied().unwrap_or(f64::NAN),
            attention_share: median(&mut shares),
        }
    }
}

/// The made-up token at a position: spread over the vocabulary, never the ids below 16, which
/// tokenizers tend to reserve.
pub fn token(position: usize, vocab: usize) -> u32 {
    let low = if vocab > 32 { 16 } else { 0 };
    (low + position.wrapping_mul(7919) % (vocab - low)) as u32
}

/// A model under the clock.
pub struct ModelBench<'m> {
    model: &'m Model,
    plan: &'m Plan,
    calibration: Option<&'m Calibration>,
    options: PrefillOptions,
    text: Option<&'m [u32]>,
    /// One session per depth asked for, standing at its prompt's end; steps run on copies.
    bases: HashMap<usize, Session<'m>>,
}

impl<'m> ModelBench<'m> {
    /// `text` replaces the made-up tokens; `options` carries cancellation and the attention type.
    pub fn new(
        model: &'m Model,
        plan: &'m Plan,
        calibration: Option<&'m Calibration>,
        options: &PrefillOptions,
        text: Option<&'m [u32]>,
    ) -> Self {
        let options = PrefillOptions { logits: LogitsFor::Last, ..options.clone() };
        Self { model, plan, calibration, options, text, bases: HashMap::new() }
    }

    fn tokens(&self, from: usize, n: usize) -> Result<Vec<u32>> {
        match self.text {
            Some(t) => t.get(from..from + n).map(<[u32]>::to_vec).ok_or_else(|| LabError::TextTooShort {
                what: "bench model".into(),
                have: t.len(),
                need: from + n,
            }),
            None => Ok((from..from + n).map(|i| token(i, self.model.config().vocab_size)).collect()),
        }
    }

    /// Time one request.
    ///
    /// # Errors
    /// No tokens or steps, more than [`MAX_TOKENS`], a text too short, cancellation, and what the
    /// engine refuses.
    pub fn time(&mut self, request: Request) -> Result<Timing> {
        let (from, n) = match request {
            Request::Prefill { tokens } => (0, tokens),
            Request::Decode { depth, steps } => (depth.max(1), steps),
        };
        if n == 0 || n > MAX_TOKENS || from > MAX_TOKENS {
            return Err(LabError::Length {
                length: if n == 0 { 0 } else { n.max(from) },
                problem: format!("use 1 to {MAX_TOKENS} tokens or steps"),
            });
        }
        match request {
            Request::Prefill { .. } => self.prefill(n),
            Request::Decode { .. } => self.decode(from, n),
        }
    }

    fn prefill(&self, n: usize) -> Result<Timing> {
        let tokens = self.tokens(0, n)?;
        let begin = Instant::now();
        let (session, prompt) = self.model.start(&tokens, self.plan, self.calibration, &self.options)?;
        std::hint::black_box(self.model.logits(&prompt.hidden));
        let seconds = begin.elapsed().as_secs_f64();
        drop(session);
        Ok(timing(n, seconds, prompt.stats.attention_seconds))
    }

    fn decode(&mut self, depth: usize, steps: usize) -> Result<Timing> {
        let tokens = self.tokens(depth, WARM_STEPS + steps)?;
        if !self.bases.contains_key(&depth) {
            let prompt = self.tokens(0, depth)?;
            let (session, _) = self.model.start(&prompt, self.plan, self.calibration, &self.options)?;
            self.bases.insert(depth, session);
        }
        let mut session = self.bases[&depth].fork();
        let mut attention = 0.0;
        let mut begin = Instant::now();
        for (i, t) in tokens.iter().enumerate() {
            if i == WARM_STEPS {
                begin = Instant::now();
                attention = 0.0;
            }
            if self.options.cancel.as_ref().is_some_and(|c| c.load(Ordering::Relaxed)) {
                return Err(LabError::Cancelled);
            }
            let step = session.extend(std::slice::from_ref(t))?;
            attention += step.stats.attention_seconds;
            std::hint::black_box(self.model.logits(&step.hidden));
        }
        Ok(timing(steps, begin.elapsed().as_secs_f64(), attention))
    }

    /// Every request `repeats` times, in rounds over all requests so that a slow spell of the
    /// machine meets all of them, after one warm-up round; `on_timing` is told of each timing.
    ///
    /// # Errors
    /// As [`ModelBench::time`].
    pub fn rounds(
        &mut self,
        requests: &[Request],
        repeats: usize,
        on_timing: &mut dyn FnMut(&Request, &Timing),
    ) -> Result<Vec<SpeedRow>> {
        let mut all = vec![Vec::new(); requests.len()];
        for round in 0..=repeats {
            for (r, all) in requests.iter().zip(&mut all) {
                let t = self.time(*r)?;
                on_timing(r, &t);
                if round > 0 {
                    all.push(t);
                }
            }
        }
        Ok(requests.iter().zip(&all).map(|(r, t)| SpeedRow::of(*r, t)).collect())
    }
}

fn timing(tokens: usize, seconds: f64, attention_seconds: f64) -> Timing {
    Timing { tokens, seconds, attention_seconds, tokens_per_second: tokens as f64 / seconds }
}

/// Rows as a Markdown table.
pub fn markdown(rows: &[SpeedRow]) -> String {
    let mut s = String::from("| what | tokens/s | slowest | fastest | in attention |\n|:--|--:|--:|--:|--:|\n");
    for r in rows {
        let what = match r.request {
            Request::Prefill { tokens } => format!("prefill {tokens}"),
            Request::Decode { depth, .. } => format!("decode at {depth}"),
        };
        s += &format!(
            "| {what} | {:.1} | {:.1} | {:.1} | {:.0}% |\n",
            r.median,
            r.min,
            r.max,
            100.0 * r.attention_share
        );
    }
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_written_as_documented() {
        let read = |s: &str| serde_json::from_str::<Request>(s);
        assert_eq!(read(r#"{"prefill":{"tokens":512}}"#).unwrap(), Request::Prefill { tokens: 512 });
        assert_eq!(read(r#"{"decode":{"depth":9,"steps":4}}"#).unwrap(), Request::Decode { depth: 9, steps: 4 });
        assert!(read(r#"{"decode":{"depth":9}}"#).is_err());
        assert!(read(r#"{"prefill":{"tokens":1,"x":2}}"#).is_err());
    }

    #[test]
    fn a_row_is_the_median_and_the_extremes() {
        let t: Vec<Timing> = [0.5, 0.1, 0.2].iter().map(|&s| timing(10, s, s / 4.0)).collect();
        let row = SpeedRow::of(Request::Prefill { tokens: 10 }, &t);
        assert_eq!((row.repeats, row.min, row.median, row.max), (3, 20.0, 50.0, 100.0));
        assert!((row.attention_share - 0.25).abs() < 1e-12);
        assert!(markdown(&[row]).contains("| prefill 10 | 50.0 | 20.0 | 100.0 | 25% |"));
    }

    #[test]
    fn made_up_tokens_stay_in_the_vocabulary_and_differ() {
        for vocab in [1, 33, 49152] {
            assert!((0..10_000).all(|i| (token(i, vocab) as usize) < vocab));
        }
        let distinct: std::collections::HashSet<u32> = (0..8192).map(|i| token(i, 49152)).collect();
        assert_eq!(distinct.len(), 8192);
    }
}
