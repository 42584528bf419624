//! Sparse patterns (family B): which keys each query of the prompt visits.

pub mod anchorattention;
mod estimate;
pub mod hip_attention;
pub mod mask;
pub mod minference;
pub mod moba;
mod pattern;
pub mod run;
pub mod s2_attention;
pub mod xattention;

use crate::error::Result;
pub use crate::prim::gemm::Precision;
use crate::system::Card;
use foveal_kernels::{HeadKeys, HeadTable, Work};

/// Cards of this family.
pub const CARDS: &[&Card] = &[
    &minference::CARD,
    &xattention::CARD,
    &hip_attention::CARD,
    &moba::CARD,
    &anchorattention::CARD,
    &s2_attention::CARD,
];

/// Rows of a matrix of f32, with a row stride.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from row to row.
    pub stride: usize,
}

impl<'a> Mat<'a> {
    /// `rows` rows of `cols` elements, `stride` apart. Panics if the data is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + cols <= data.len(), "matrix reaches past its data");
        Self { data, rows, cols, stride }
    }
    /// Row `i`.
    #[inline]
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..i * self.stride + self.cols]
    }
    /// The memory from the first row on.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }
}

/// Attention of one query head, as a selector sees it. Causal, bottom-right aligned:
/// query i of `q.rows` sees keys up to `offset() + i`.
#[derive(Clone, Copy, Debug)]
pub struct HeadProblem<'a> {
    /// Queries after rotation, (Tq, D).
    pub q: Mat<'a>,
    /// Keys of this head's group after rotation, (Tk, D), Tk ≥ Tq.
    pub k: Mat<'a>,
    /// Factor on q·k.
    pub scale: f32,
    /// Layer number, for systems with per-layer parameters.
    pub layer: usize,
    /// Query head number.
    pub head: usize,
    /// How exact products need to be. What is estimated in bf16 may differ in decisions that are
    /// close to a tie.
    pub precision: Precision,
}

impl HeadProblem<'_> {
    /// Keys before the first query.
    pub fn offset(&self) -> usize {
        self.k.rows - self.q.rows
    }
    /// Keys that query `i` may see: 0..visible(i).
    pub fn visible(&self, i: usize) -> usize {
        self.offset() + i + 1
    }
}

/// What one head visits: blocks, single keys, or both. The two parts must not share a
/// (query, key) pair: their results are merged by log-sum-exp. Causality is applied by the
/// kernels; a selection may name keys later than a query.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadSelection {
    /// Key blocks per query block.
    pub blocks: Option<HeadTable>,
    /// Single keys per group of queries.
    pub keys: Option<HeadKeys>,
}

impl HeadSelection {
    /// Everything causal.
    pub fn dense(p: &HeadProblem) -> Self {
        Self { blocks: Some(HeadTable::dense_causal(128, 128, p.q.rows, p.k.rows)), keys: None }
    }
}

/// Chooses what each query of a prompt visits, one head at a time. Heads run in parallel.
pub trait Selector: Send + Sync {
    /// The selection and the work of making it (`pairs` stays 0: estimates are not attention).
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)>;
}
