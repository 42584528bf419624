//! Fused neighborhood attention: neighborhood attention as one pass over tiles (Hassani, Hwu and Shi 2024, arXiv
//! 2403.04690).
//!
//! A tile of queries, of as many axes as the grid has, visits the union of its queries' windows and nothing else; inside
//! the union a mask says which query visits which key; the softmax runs along as in flash attention, so that no T × w
//! matrix of weights is ever stored. Exact: the result is attention under the window's mask.
//!
//! Here a tile is up to 64 queries put next to one another, the union a list of keys with a bit a query each, and the
//! kernel that of [`crate::prim::attend()`]. Work per tile: 64·Π(tile + w − 1) pairs at most, against 64·T of dense.

use crate::error::Result;
use crate::sparse::axes::{Axis, Sides};
use crate::sparse::neighborhood::{self, Neighborhood, causal_axes, check_letters};
use crate::sparse::{Domain, Grid, HeadProblem, HeadSelection, Selector};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FusedNeighborhoodAttention {
    /// Keys that a query visits on each axis.
    pub window: Sides,
    /// Distance between the keys of a window on each axis.
    pub dilation: Sides,
    /// Axes on which no later key is visited.
    pub causal_axes: String,
    /// Tile of queries.
    pub tile: Sides,
}

impl Default for FusedNeighborhoodAttention {
    fn default() -> Self {
        Self { window: Sides::every(7), dilation: Sides::every(1), causal_axes: String::new(), tile: Sides::every(0) }
    }
}

impl Config for FusedNeighborhoodAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("window", "keys that a query visits on each axis, 0 for all: one number, or h;w or t;h;w"),
        ("dilation", "distance between the keys of a window on each axis"),
        ("causal_axes", "axes on which no later key is visited: letters of t, h and w"),
        ("tile", "queries of a tile, w, h;w or t;h;w, at most 64 in all; 0 takes the tile with the least work"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.dilation.three().contains(&0) {
            return Err(format!("dilation = {}: use at least 1", self.dilation));
        }
        check_letters(&self.causal_axes)?;
        neighborhood::check(&self.window, &Sides::every(1), &self.tile)
    }
}

impl FusedNeighborhoodAttention {
    fn windows<'a>(&'a self, stride: &'a Sides) -> Neighborhood<'a> {
        let (dilation, causal) = (self.dilation.three(), causal_axes(&self.causal_axes));
        Neighborhood { window: &self.window, stride, dilation, causal }
    }
}

impl Selector for FusedNeighborhoodAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        Ok((self.windows(&Sides::every(1)).select(p, &self.tile), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::ANY
    }

    fn axes(&self, grid: Grid) -> Option<[Axis; 3]> {
        Some(self.windows(&Sides::every(1)).axes(grid))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "fused-neighborhood-attention",
    title: "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    authors: "Hassani, Hwu and Shi, 2024",
    arxiv: "2403.04690",
    family: Family::Kernel,
    slots: &[Slot::Prefill, Slot::Kernel],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("window", "0")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::Linear },
        Law::Monotone { param: "window", values: &["1", "7", "63", "0"] },
    ],
    equation: "O(i) = softmax over j in N(i) of scale·q(i)·k(j), times v(j);  N(i) the product of its axes' windows\n\
               a tile of queries Q visits K = union of N(i), i in Q, once;  bit (i, j) = j in N(i)",
    cost: "T·Π(tile + w - 1)/Π(tile)·64 pairs in tiles of 64 queries; O(T) extra memory, never T·w weights",
    choices: &[
        "The paper's tiles of keys are boxes of a size fixed when its kernels are compiled; here they are single keys, which the CPU kernels \
         find through a list, so that no key outside of the union is ever computed.",
        "The shape of the tile of queries is chosen for the least work by counting, where the paper's package times candidates; tile \
         sets it.",
        "Unfused kernels (products of windows as matrices of T × w) are not built: the fused form is faster in every case of the paper \
         and needs no such memory.",
        "window = 7 is that of NAT, the model that the package was made for.",
    ],
    params: params_of::<FusedNeighborhoodAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<FusedNeighborhoodAttention>(CARD.id, params)?)))
}
