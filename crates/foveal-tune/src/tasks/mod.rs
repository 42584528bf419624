//! Tasks: where batches come from and what a right answer is.

pub mod fashion;
pub mod mqar;
pub mod needle;

use crate::error::Result;
use crate::model::{Input, Output};
use candle_core::Tensor;
use foveal::sparse::Grid;

/// A batch of a task.
pub struct Batch {
    /// u32 token ids (B, T) or f32 vectors (B, T, n).
    pub input: Tensor,
    /// Rows of the logits that are judged, as indices into B·T (or into B for classes).
    pub rows: Vec<u32>,
    /// The right answer of each.
    pub answers: Vec<u32>,
}

/// Which examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Those that are learned from.
    Train,
    /// Those that are kept for judging.
    Test,
}

/// A task.
pub trait Task: Send + Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;
    /// What a model reads.
    fn input(&self) -> Input;
    /// What a model answers.
    fn output(&self) -> Output;
    /// Tokens a sequence.
    fn tokens(&self) -> usize;
    /// Whether tokens may see later ones.
    fn causal(&self) -> bool;
    /// The grid that the tokens form, if any.
    fn grid(&self) -> Option<Grid> {
        None
    }
    /// Batch `n` of `size` examples: the same for the same arguments, and never one of the other split.
    fn batch(&self, split: Split, seed: u64, n: u64, size: usize) -> Result<Batch>;
}

/// The generator of batch `n` of a split. Splits never share a seed: the test's has the highest bit set.
pub(crate) fn generator(split: Split, seed: u64, n: u64) -> rand_chacha::ChaCha8Rng {
    use rand::SeedableRng;
    let of = match split {
        Split::Train => 0,
        Split::Test => 1 << 63,
    };
    rand_chacha::ChaCha8Rng::seed_from_u64(of | (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ n) >> 1)
}
