//! Needle: one token of another kind somewhere in noise; the last position must name it.
//!
//! The sequence is noise of tokens of the lower half of the vocabulary; at a random place stands one of the upper half, the
//! needle; the last token, 0, asks for it. One layer suffices, if it visits the part of its keys that holds the
//! needle: a random part of a tenth of them holds it in a tenth of the sequences.

use super::{Batch, Split, Task, generator};
use crate::error::{Result, setting};
use crate::model::{Input, Output};
use candle_core::{Device, Tensor};
use rand::Rng;

/// The task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needle {
    tokens: usize,
    vocab: usize,
}

impl Needle {
    /// Sequences of `tokens` tokens (at least 4) over `vocab` tokens (at least 4).
    pub fn new(tokens: usize, vocab: usize) -> Result<Self> {
        if tokens < 4 {
            return Err(setting("tokens", tokens, "use at least 4"));
        }
        if vocab < 4 {
            return Err(setting("vocab", vocab, "use at least 4"));
        }
        Ok(Self { tokens, vocab })
    }
}

impl Task for Needle {
    fn name(&self) -> &'static str {
        "needle"
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
        let t = self.tokens;
        let (mut ids, mut rows, mut answers) = (Vec::with_capacity(size * t), Vec::new(), Vec::new());
        for b in 0..size {
            let half = self.vocab / 2;
            let mut row: Vec<u32> = (0..t).map(|_| rng.random_range(1..half) as u32).collect();
            let needle = rng.random_range(half..self.vocab) as u32;
            row[rng.random_range(0..t - 1)] = needle;
            row[t - 1] = 0;
            rows.push((b * t + t - 1) as u32);
            answers.push(needle);
            ids.extend(row);
        }
        Ok(Batch { input: Tensor::from_vec(ids, (size, t), &Device::Cpu)?, rows, answers })
    }
}
