//! Generalized neighborhood attention: windows with a stride on every axis (Hassani et al. 2025, arXiv 2504.16922).
//!
//! On each axis of n places, window w, stride s and dilation δ: places fall into δ classes by their remainder, of which
//! one with len members is treated by itself. Member i belongs to the group ⌊i/s⌋, whose leader
//! ℓ = min(⌊i/s⌋·s + ⌊s/2⌋, len − 1) stands for all of it: they visit members start..start + w with
//! start = clamp(ℓ − ⌊w/2⌋, 0, len − w). On a causal axis ℓ = min(⌊i/s⌋·s + s − 1, len − 1) and they visit
//! max(ℓ − w + 1, 0)..i + 1. A query visits the product of its axes' windows. s = 1 is a sliding window, s = w blocked
//! attention; what lies between trades overlap for whole tiles.
//!
//! Nothing is estimated. Cost: T·w_t·w_h·w_w pairs, rounded up to tiles: queries are put into the order of tiles of up
//! to 64, whose union of windows is visited with a bit a (query, key) where windows differ.

use super::axes::{Axis, Sides};
use super::neighborhood::{self, Neighborhood, causal_axes, check_letters};
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GeneralizedNeighborhoodAttention {
    /// Keys that a query visits on each axis.
    pub window: Sides,
    /// Neighbouring queries of each axis that share a window.
    pub stride: Sides,
    /// Distance between the keys of a window on each axis.
    pub dilation: Sides,
    /// Axes on which no later key is visited.
    pub causal_axes: String,
    /// Tile of queries.
    pub tile: Sides,
}

impl Default for GeneralizedNeighborhoodAttention {
    fn default() -> Self {
        let one = Sides::every(1);
        Self {
            window: Sides::every(16),
            stride: one.clone(),
            dilation: one,
            causal_axes: String::new(),
            tile: Sides::every(0),
        }
    }
}

impl Config for GeneralizedNeighborhoodAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("window", "keys that a query visits on each axis, 0 for all: one number, or h;w or t;h;w"),
        ("stride", "neighbouring queries of each axis that share a window, from 1 (sliding) to the window (blocked)"),
        ("dilation", "distance between the keys of a window on each axis"),
        ("causal_axes", "axes on which no later key is visited: letters of t, h and w"),
        ("tile", "queries of a tile, w, h;w or t;h;w, at most 64 in all; 0 takes the tile with the least work"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.dilation.three().contains(&0) {
            return Err(format!("dilation = {}: use at least 1", self.dilation));
        }
        check_letters(&self.causal_axes)?;
        neighborhood::check(&self.window, &self.stride, &self.tile)
    }
}

impl GeneralizedNeighborhoodAttention {
    fn windows(&self) -> Neighborhood<'_> {
        Neighborhood {
            window: &self.window,
            stride: &self.stride,
            dilation: self.dilation.three(),
            causal: causal_axes(&self.causal_axes),
        }
    }
}

impl Selector for GeneralizedNeighborhoodAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        Ok((self.windows().select(p, &self.tile), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::ANY
    }

    fn axes(&self, grid: Grid) -> Option<[Axis; 3]> {
        Some(self.windows().axes(grid))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "generalized-neighborhood-attention",
    title: "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    authors: "Hassani et al., 2025",
    arxiv: "2504.16922",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("window", "0")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::Linear },
        Law::Monotone { param: "window", values: &["1", "5", "16", "64", "300", "0"] },
    ],
    equation: "on each axis of n: leader l = min(floor(i/s)·s + floor(s/2), n - 1), start = clamp(l - floor(w/2), 0, n - w)\n\
               the query at i visits start..start + w;  on a causal axis max(min(floor(i/s)·s + s - 1, n - 1) - w + 1, 0)..i + 1\n\
               dilation d: the same within each class of places equal mod d;  a query visits the product of its axes",
    cost: "T·w_t·w_h·w_w pairs, rounded up to the windows' union over tiles of 64 queries; no estimate; \
           the table takes time linear in its entries",
    choices: &[
        "Windows at borders, even windows (one key more before the leader than after), strides that do not divide an axis and \
         classes of unequal length are as in NATTEN's kernels.",
        "A window longer than an axis (or than a class of it) is the whole of it, where NATTEN refuses.",
        "window = 16 is ours, as the paper's windows belong to its models; stride = dilation = 1 is NATTEN's default.",
        "Tiles of queries are laid out in token order and put back after; keys stay where they are, because the kernels \
         find each key of a tile by itself. A tile of keys is thus one key, and the speed-up that `foveal show --simulate` predicts \
         for this machine is that of such tiles.",
        "Text tokens around a grid visit everything and are visited by all, as in the video models that the paper treats.",
        "In a causal problem the first axis of more than one place is causal; without a grid all tokens are one line. With a stride \
         above 1 the leader of the last group depends on the length, so that only stride 1 keeps a prefix's output.",
    ],
    params: params_of::<GeneralizedNeighborhoodAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<GeneralizedNeighborhoodAttention>(CARD.id, params)?)))
}
