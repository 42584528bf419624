//! HaloNet's blocked local attention (Vaswani et al. 2021, arXiv 2103.12731).
//!
//! Every frame is cut into blocks of b × b queries, which share one window: their block and a halo of h around it,
//! (b + 2h)² keys. At the borders the window is cut off.
//!
//! Nothing is estimated. Cost: T·(b + 2h)² pairs at most; every (query, key) of a visited tile is used, so that
//! no mask is needed.

use super::axes::{Axis, Sides, check_tile, grid_of, select, tile_of};
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HaloNet {
    /// Side of a block of queries.
    pub block_size: usize,
    /// Keys that the window reaches past the block on every side.
    pub halo: usize,
    /// Tile of queries.
    pub tile: Sides,
}

impl Default for HaloNet {
    fn default() -> Self {
        Self { block_size: 8, halo: 3, tile: Sides::every(0) }
    }
}

impl Config for HaloNet {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "side of a block of queries that share a window"),
        ("halo", "rows and columns that the window reaches past the block on every side"),
        ("tile", "queries of a tile, w, h;w or t;h;w, at most 64 in all; 0 takes the tile with the least work"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 {
            return Err("block_size = 0: use at least 1".into());
        }
        check_tile(&self.tile)
    }
}

impl HaloNet {
    fn on(&self, grid: Grid) -> [Axis; 3] {
        let (b, halo) = (self.block_size, self.halo);
        let window = |i: usize, n: usize| {
            let first = i / b * b;
            first.saturating_sub(halo)..first.saturating_add(b).saturating_add(halo).min(n)
        };
        // A frame sees itself alone.
        [Axis::new(grid.t, 1, |i, _| i..i + 1), Axis::new(grid.h, 1, window), Axis::new(grid.w, 1, window)]
    }
}

impl Selector for HaloNet {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let axes = self.on(grid_of(p));
        Ok((select(p, &axes, tile_of(&self.tile, &axes)), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }

    fn axes(&self, grid: Grid) -> Option<[Axis; 3]> {
        Some(self.on(grid))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "halonet",
    title: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    authors: "Vaswani et al., 2021",
    arxiv: "2103.12731",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::Work { pairs: Growth::Linear, flops: Growth::Linear },
        Law::Monotone { param: "halo", values: &["0", "1", "3", "8", "1000000"] },
    ],
    equation: "the query at (y, x) visits rows b·floor(y/b) - h .. b·floor(y/b) + b + h - 1 and columns alike, inside its frame",
    cost: "T·(b + 2h)² pairs; no estimate, no mask inside tiles of one block",
    choices: &[
        "Keys outside of the image take no part. The paper pads with zeros, and public versions differ in whether the zeros enter the \
         softmax; masking them makes the result attention under a mask.",
        "The relative position logits belong to the model: a bias on scores cannot be combined with the order in which tiles are laid \
         out here yet. Attention downsampling (queries on every second place only) is not built.",
        "block_size 8 and halo 3 are the setting of the paper's ImageNet models H0 to H3 up to the image size.",
        "A video is so many images; text tokens around a grid visit everything and are visited by all.",
    ],
    params: params_of::<HaloNet>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<HaloNet>(CARD.id, params)?)))
}
