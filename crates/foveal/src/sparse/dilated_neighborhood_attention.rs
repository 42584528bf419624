//! Dilated neighborhood attention (DiNA): windows within the classes of a dilated grid (Hassani and Shi 2022, arXiv
//! 2209.15001).
//!
//! With dilation δ on an axis, places equal mod δ form a class; a query visits the `window` members of its class
//! nearest to it, the window moved inwards at the borders so that it stays full. A query visits the product of its
//! axes' windows. Layers alternate between δ = 1 (local) and the large δ (global).
//!
//! Nothing is estimated. Cost: T·w_t·w_h·w_w pairs whatever the dilation; tiles of queries are cut from one class,
//! so that dilation costs no more tiles either.

use super::axes::{Axis, Sides};
use super::neighborhood::{self, Neighborhood};
use super::run::NO_LAYER;
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DilatedNeighborhoodAttention {
    /// Keys that a query visits on each axis.
    pub window: Sides,
    /// Distance between the keys of a window on each axis.
    pub dilation: Sides,
    /// Whether layers 0, 2, … have dilation 1.
    pub alternate: bool,
    /// Tile of queries.
    pub tile: Sides,
}

impl Default for DilatedNeighborhoodAttention {
    fn default() -> Self {
        Self { window: Sides::every(7), dilation: Sides::every(0), alternate: true, tile: Sides::every(0) }
    }
}

impl Config for DilatedNeighborhoodAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("window", "keys that a query visits on each axis, 0 for all of its class: one number, or h;w or t;h;w"),
        ("dilation", "distance between the keys of a window on each axis; 0 for the largest at which the window fits"),
        ("alternate", "whether layers 0, 2, … have dilation 1; tensors of no model are a dilated layer"),
        ("tile", "queries of a tile, w, h;w or t;h;w, at most 64 in all; 0 takes the tile with the least work"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        neighborhood::check(&self.window, &Sides::every(1), &self.tile)
    }
}

impl DilatedNeighborhoodAttention {
    fn dilation(&self, grid: Grid, layer: usize) -> [usize; 3] {
        if self.alternate && layer != NO_LAYER && layer.is_multiple_of(2) {
            return [1; 3];
        }
        let (sides, window, dilation) = ([grid.t, grid.h, grid.w], self.window.three(), self.dilation.three());
        // ⌊n / w⌋ is the largest dilation at which each class has w members.
        std::array::from_fn(|a| if dilation[a] > 0 { dilation[a] } else { sides[a] / window[a].max(1) }.max(1))
    }

    fn windows<'a>(&'a self, stride: &'a Sides, grid: Grid, layer: usize) -> Neighborhood<'a> {
        Neighborhood { window: &self.window, stride, dilation: self.dilation(grid, layer), causal: [false; 3] }
    }
}

impl Selector for DilatedNeighborhoodAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (stride, grid) = (Sides::every(1), super::axes::grid_of(p));
        Ok((self.windows(&stride, grid, p.layer).select(p, &self.tile), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }

    fn axes(&self, grid: Grid) -> Option<[Axis; 3]> {
        Some(self.windows(&Sides::every(1), grid, NO_LAYER).axes(grid))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "dilated-neighborhood-attention",
    title: "Dilated Neighborhood Attention Transformer",
    authors: "Hassani and Shi, 2022",
    arxiv: "2209.15001",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::ExactAt(&[("window", "0"), ("dilation", "1")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::Linear },
        Law::Monotone { param: "window", values: &["1", "3", "7"] },
    ],
    equation: "on each axis of n, with dilation d: the query at c + i·d visits c + j·d for j in start..start + w,\n\
               start = clamp(i - floor(w/2), 0, len(c) - w), len(c) = members of class c;  a query visits the product of its axes",
    cost: "T·w_t·w_h·w_w pairs, rounded up to the windows' union over tiles of 64 queries of one class; no estimate",
    choices: &[
        "window = 7 is the window of DiNAT. Its dilations differ from model to model and level to level; dilation = 0 stands for the largest \
         that fits, the paper's global layers.",
        "Layers alternate between 1 and the dilation, local first, as in DiNAT.",
        "The relative bias of DiNAT is the model's own affair: a bias on scores cannot be combined with the order in which tiles \
         are laid out here yet.",
        "Text tokens around a grid visit everything and are visited by all; the paper has none.",
    ],
    params: params_of::<DilatedNeighborhoodAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<DilatedNeighborhoodAttention>(CARD.id, params)?)))
}
