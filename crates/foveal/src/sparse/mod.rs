//! Sparse patterns (family B): which keys each query of the prompt visits.

pub mod anchorattention;
pub mod axes;
pub mod biformer_bra;
pub mod block_map;
mod boxes;
pub mod catanet;
pub mod combiner;
pub mod core_context_attention;
pub mod dhsa;
pub mod dilated_neighborhood_attention;
pub mod dynamic_mask_attention;
mod estimate;
pub mod generalized_neighborhood_attention;
mod grid;
pub mod halonet;
pub mod hip_attention;
pub mod hyperattention;
pub mod landmark_attention;
pub(crate) mod layer_ops;
pub mod llsa;
pub mod lrgt;
pub mod mask;
pub mod minference;
pub mod mminference;
pub mod moa_sparse;
pub mod moba;
pub(crate) mod neighborhood;
mod order;
pub mod paroattention;
mod pattern;
pub mod pixelfly;
pub mod radial_attention;
pub mod re_ttention;
pub mod routing_transformer;
pub mod run;
pub mod s2_attention;
pub mod sale;
pub mod sea_estimated_mask;
pub mod search;
pub mod seerattention;
pub mod sla;
pub mod sparse_vdit;
pub mod sparsifiner;
pub mod ssa;
pub mod superlinear;
pub mod svg2;
pub mod vmoba;
pub mod vsa_window;
pub mod xattention;

use crate::error::{Error, Result};
pub use crate::prim::gemm::Precision;
use crate::system::Card;
use foveal_kernels::{HeadKeys, HeadTable, Work};
pub use grid::Grid;
pub use order::TokenOrder;

/// Cards of this family.
pub const CARDS: &[&Card] = &[
    &minference::CARD,
    &xattention::CARD,
    &hip_attention::CARD,
    &moba::CARD,
    &anchorattention::CARD,
    &s2_attention::CARD,
    &dhsa::CARD,
    &hyperattention::CARD,
    &mminference::CARD,
    &routing_transformer::CARD,
    &sale::CARD,
    &superlinear::CARD,
    &dilated_neighborhood_attention::CARD,
    &generalized_neighborhood_attention::CARD,
    &halonet::CARD,
    &lrgt::CARD,
    &moa_sparse::CARD,
    &paroattention::CARD,
    &pixelfly::CARD,
    &radial_attention::CARD,
    &sparse_vdit::CARD,
    &biformer_bra::CARD,
    &catanet::CARD,
    &combiner::CARD,
    &llsa::CARD,
    &re_ttention::CARD,
    &sla::CARD,
    &svg2::CARD,
    &vmoba::CARD,
    &core_context_attention::CARD,
    &dynamic_mask_attention::CARD,
    &landmark_attention::CARD,
    &sea_estimated_mask::CARD,
    &seerattention::CARD,
    &sparsifiner::CARD,
    &ssa::CARD,
    &vsa_window::CARD,
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

/// Attention of one query head, as a selector sees it. A causal one is bottom-right aligned: query i of `q.rows` sees
/// keys up to `offset() + i`; else every query sees every key.
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
    /// Whether queries see no later keys.
    pub causal: bool,
    /// The token grid among the keys, if there is one.
    pub grid: Option<Grid>,
}

impl<'a> HeadProblem<'a> {
    /// A causal problem in f32: head 0 of no model, no grid.
    pub fn new(q: Mat<'a>, k: Mat<'a>, scale: f32) -> Self {
        Self { q, k, scale, layer: run::NO_LAYER, head: 0, precision: Precision::F32, causal: true, grid: None }
    }
    /// Keys before the first query.
    pub fn offset(&self) -> usize {
        self.k.rows - self.q.rows
    }
    /// Keys that query `i` may see: 0..visible(i).
    pub fn visible(&self, i: usize) -> usize {
        if self.causal { self.offset() + i + 1 } else { self.k.rows }
    }
}

/// What problems a system can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Domain {
    /// Causal ones.
    pub causal: bool,
    /// Those in which every query sees every key.
    pub full: bool,
    /// Whether it needs a token grid.
    pub grid: bool,
}

impl Domain {
    /// Causal attention of a sequence.
    pub const CAUSAL: Self = Self { causal: true, full: false, grid: false };
    /// Attention of a sequence, causal or not.
    pub const ANY: Self = Self { causal: true, full: true, grid: false };
    /// Attention without a direction.
    pub const FULL: Self = Self { causal: false, full: true, grid: false };
    /// Attention without a direction over a token grid.
    pub const GRID: Self = Self { causal: false, full: true, grid: true };

    /// Whether a problem of `tokens` keys is within; the error names what is not and the remedy.
    pub fn check(&self, system: &str, causal: bool, grid: Option<Grid>, tokens: usize) -> Result<()> {
        let bad = |message: &str| Err(Error::Param { system: system.into(), message: message.into() });
        if causal && !self.causal {
            return bad("causal = true: this system is for attention without a direction; set causal to false");
        }
        if !causal && !self.full {
            return bad("causal = false: this system chooses among earlier keys only; leave causal at true");
        }
        match grid {
            Some(grid) => grid.check(tokens),
            None if self.grid => bad("no token grid: this system needs one, such as 8x16x16 frames, rows and columns"),
            None => Ok(()),
        }
    }
}

/// What one head visits: blocks, single keys, or both. No (query, key) pair should be in both parts: attention counts it
/// once, [`mask::pairs`] twice. Of a causal problem a selection may name keys later than a query: the kernels leave
/// them out.
///
/// Where an order is given, tables and lists count places of that order instead of tokens, so that tokens far from
/// one another in memory share a block. [`crate::prim::attend_selected`] puts rows in order before and back after;
/// so far only for attention without a direction.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadSelection {
    /// Key blocks per query block.
    pub blocks: Option<HeadTable>,
    /// Single keys per group of queries.
    pub keys: Option<HeadKeys>,
    /// Order in which blocks and groups count queries; there may be places without a query.
    pub q_order: Option<TokenOrder>,
    /// Order in which blocks and lists count keys, a key at every place.
    pub k_order: Option<TokenOrder>,
}

impl HeadSelection {
    /// Everything that the problem's queries may see.
    pub fn dense(p: &HeadProblem) -> Self {
        let (tq, tk) = (p.q.rows, p.k.rows);
        let blocks = if p.causal {
            HeadTable::dense_causal(128, 128, tq, tk)
        } else {
            HeadTable::from_lists(128, 128, vec![(0..tk.div_ceil(128) as u32).collect(); tq.div_ceil(128)])
        };
        Self::of_blocks(blocks)
    }

    /// Blocks alone.
    pub fn of_blocks(table: HeadTable) -> Self {
        Self { blocks: Some(table), ..Self::default() }
    }

    /// Single keys alone.
    pub fn of_keys(keys: HeadKeys) -> Self {
        Self { keys: Some(keys), ..Self::default() }
    }

    /// Blocks and single keys, which share no pair.
    pub fn of_both(table: HeadTable, keys: HeadKeys) -> Self {
        Self { blocks: Some(table), keys: Some(keys), ..Self::default() }
    }

    /// The same with its tables counting places of these orders.
    pub fn in_order(self, q: Option<TokenOrder>, k: Option<TokenOrder>) -> Self {
        Self { q_order: q, k_order: k, ..self }
    }

    /// Whether places are counted instead of tokens.
    pub fn is_ordered(&self) -> bool {
        self.q_order.is_some() || self.k_order.is_some()
    }

    /// Places of queries, of `tq` queries.
    pub fn places(&self, tq: usize) -> usize {
        self.q_order.as_ref().map_or(tq, TokenOrder::places)
    }

    /// Check tables, lists and orders against a problem of `tq` queries and `tk` keys.
    pub fn check(&self, tq: usize, tk: usize) -> Result<()> {
        let bad = |what: &str, o: &TokenOrder, n: usize| {
            let message = format!("{} {what} at {} places for {n} {what}", o.tokens(), o.places());
            Err(Error::Param { system: "token order".into(), message: message + "; build it for this problem" })
        };
        match (&self.q_order, &self.k_order) {
            (Some(q), _) if q.tokens() != tq => return bad("queries", q, tq),
            // A place without a key would be a key of zeros.
            (_, Some(k)) if k.tokens() != tk || k.places() != tk => return bad("keys", k, tk),
            _ => {}
        }
        let places = self.places(tq);
        self.blocks.as_ref().map_or(Ok(()), |t| t.check(places, tk))?;
        self.keys.as_ref().map_or(Ok(()), |k| k.check(places, tk))?;
        Ok(())
    }
}

/// Chooses what each query of a prompt visits, one head at a time. Heads run in parallel.
pub trait Selector: Send + Sync {
    /// The selection and the work of making it (`pairs` stays 0: estimates are not attention).
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)>;

    /// What problems it can serve. Callers check it before `select`.
    fn domain(&self) -> Domain {
        Domain::CAUSAL
    }

    /// What queries of each axis of a grid visit on it, of a static pattern that is the product of its axes.
    fn axes(&self, _grid: Grid) -> Option<[axes::Axis; 3]> {
        None
    }
}
