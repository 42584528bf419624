//! Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs k₁v₁k₂v₂… then, at random later places,
//! the keys again; at each of them the model must answer with the key's value.
//!
//! Distances follow a power law as in the authors' generator: the gap of each query is drawn with weight a·(gap + 1)^(a−1),
//! so that most queries come soon and some late. Places without a query hold random tokens.

use super::{Batch, Split, Task, generator};
use crate::error::{Result, setting};
use crate::model::{Input, Output};
use candle_core::{Device, Tensor};
use rand::Rng;
use rand::seq::index::sample;

/// The task.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mqar {
    tokens: usize,
    pairs: usize,
    vocab: usize,
    power: f64,
}

impl Mqar {
    /// Sequences of `tokens` tokens with `pairs` pairs; keys are the lower half of `vocab` tokens, values the upper. `power`
    /// is the a of the gaps, 0.01 in the paper.
    ///
    /// Errors: pairs and queries that do not fit, a vocabulary with too few keys.
    pub fn new(tokens: usize, pairs: usize, vocab: usize, power: f64) -> Result<Self> {
        if pairs == 0 || tokens < 4 * pairs {
            return Err(setting(
                "pairs",
                pairs,
                format!("use 1 to {}: a pair and its query take 4 tokens", tokens / 4),
            ));
        }
        if vocab < 2 * pairs + 2 {
            return Err(setting("vocab", vocab, format!("use at least {} for {pairs} different keys", 2 * pairs + 2)));
        }
        if !(power > 0.0 && power <= 1.0) {
            return Err(setting("power", power, "use a number above 0 and up to 1"));
        }
        Ok(Self { tokens, pairs, vocab, power })
    }
}

impl Task for Mqar {
    fn name(&self) -> &'static str {
        "mqar"
    }
    fn input(&self) -> Input {
        Input::Tokens(self.vocab)
    }
    fn output(&self) -> Output {
        Output::Tokens(self.vocab)
    }
    fn tokens(&self) -> usize {
        self.tokens
    }
    fn causal(&self) -> bool {
        true
    }

    fn batch(&self, split: Split, seed: u64, n: u64, size: usize) -> Result<Batch> {
        let mut rng = generator(split, seed, n);
        let (t, pairs, half) = (self.tokens, self.pairs, self.vocab / 2);
        let context = 2 * pairs;
        // Places for queries come in twos, so that none stands right behind another.
        let places = (t - context) / 2;
        let weights: Vec<f64> = (0..places).map(|g| self.power * ((g + 1) as f64).powf(self.power - 1.0)).collect();
        let (mut ids, mut rows, mut answers) = (Vec::with_capacity(size * t), Vec::new(), Vec::new());
        for b in 0..size {
            let keys = sample(&mut rng, half - 1, pairs).into_vec();
            let values: Vec<u32> = (0..pairs).map(|_| rng.random_range(half..self.vocab) as u32).collect();
            let mut row: Vec<u32> = Vec::with_capacity(t);
            for (k, v) in keys.iter().zip(&values) {
                row.extend([*k as u32 + 1, *v]);
            }
            // Noise of values: a key may only stand where it is asked for.
            row.extend((context..t).map(|_| rng.random_range(half..self.vocab) as u32));
            let mut left = weights.clone();
            let mut asked = Vec::with_capacity(pairs);
            for (key, value) in keys.iter().zip(&values) {
                let mut x = rng.random_range(0.0..left.iter().sum::<f64>());
                let gap = left.iter().position(|w| {
                    x -= w;
                    x < 0.0
                });
                let gap = gap.or(left.iter().rposition(|&w| w > 0.0)).unwrap_or(0);
                left[gap] = 0.0;
                let at = context + 2 * gap;
                row[at] = *key as u32 + 1;
                asked.push(((b * t + at) as u32, *value));
            }
            asked.sort_unstable();
            rows.extend(asked.iter().map(|a| a.0));
            answers.extend(asked.iter().map(|a| a.1));
            ids.extend(row);
        }
        Ok(Batch { input: Tensor::from_vec(ids, (size, t), &Device::Cpu)?, rows, answers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_query_asks_for_a_key_seen_before() {
        let task = Mqar::new(64, 8, 40, 0.01).unwrap();
        let batch = task.batch(Split::Train, 1, 5, 7).unwrap();
        let ids: Vec<Vec<u32>> = batch.input.to_vec2().unwrap();
        assert_eq!(batch.rows.len(), 7 * 8);
        for (row, answer) in batch.rows.iter().zip(&batch.answers) {
            let (seq, at) = (&ids[*row as usize / 64], *row as usize % 64);
            let pair = (0..8).find(|p| seq[2 * p] == seq[at]).expect("the key stands in the context");
            assert_eq!(seq[2 * pair + 1], *answer);
            assert!(at >= 16 && seq[at] < 20 && *answer >= 20);
        }
        let again = task.batch(Split::Train, 1, 5, 7).unwrap();
        assert_eq!(ids, again.input.to_vec2::<u32>().unwrap());
        assert_ne!(ids, task.batch(Split::Test, 1, 5, 7).unwrap().input.to_vec2::<u32>().unwrap());
        assert_ne!(ids, task.batch(Split::Train, 1, 6, 7).unwrap().input.to_vec2::<u32>().unwrap());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (t, p, v, a) in [(64, 17, 99, 0.1), (64, 0, 99, 0.1), (64, 8, 17, 0.1), (64, 8, 40, 0.0)] {
            assert!(Mqar::new(t, p, v, a).is_err());
        }
    }
}
