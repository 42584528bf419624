//! Long-range grouping attention of LRGT (Yang et al. 2023, arXiv 2308.08724).
//!
//! The frames of the grid are views of one object. With `groups` g, tokens whose row and column are equal mod g, of all
//! views, form a group: a sample spread over every view. Attention runs inside groups. Layers alternate
//! with attention inside each view.
//!
//! Nothing is estimated. Cost: T·T/g² pairs across views, T·h·w within; tiles are whole, without masks.

use super::axes::{Axis, grid_of, select};
use super::run::NO_LAYER;
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lrgt {
    /// Groups along rows and along columns.
    pub groups: usize,
    /// Whether layers 0, 2, … attend within views.
    pub alternate: bool,
}

impl Default for Lrgt {
    fn default() -> Self {
        Self { groups: 7, alternate: true }
    }
}

impl Config for Lrgt {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        (
            "groups",
            "groups along rows and along columns: tokens equal mod so many attend to one another, across all views",
        ),
        ("alternate", "whether layers 0, 2, … attend within each view; tensors of no model attend across views"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.groups == 0 { Err("groups = 0: use at least 1, which is dense attention".into()) } else { Ok(()) }
    }
}

impl Lrgt {
    fn on(&self, grid: Grid, layer: usize) -> [Axis; 3] {
        let Grid { t, h, w, .. } = grid;
        if self.alternate && layer != NO_LAYER && layer.is_multiple_of(2) {
            return [Axis::new(t, 1, |i, _| i..i + 1), Axis::whole(h), Axis::whole(w)];
        }
        let spread = |n| Axis::new(n, self.groups, |_, len| 0..len);
        [Axis::whole(t), spread(h), spread(w)]
    }
}

impl Selector for Lrgt {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        Ok((select(p, &self.on(grid_of(p), p.layer), None), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }

    fn axes(&self, grid: Grid) -> Option<[Axis; 3]> {
        Some(self.on(grid, NO_LAYER))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "lrgt",
    title: "Long-Range Grouping Transformer for Multi-View 3D Reconstruction",
    authors: "Yang et al., 2023",
    arxiv: "2308.08724",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::ExactAt(&[("groups", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "groups", values: &["7", "2", "1"] },
    ],
    equation: "the query at (view, y, x) visits (view', y', x') where y = y' and x = x' mod g, for every view'",
    cost: "T²/g² pairs, in whole tiles; no estimate",
    choices: &[
        "The grouping is that of the authors' code: groups = 7 on 14 × 14 patches gives groups of 2 × 2 tokens of every view.",
        "Their layer adds a depthwise convolution of the values (the inter-view feature signature) to the output; that is no attention \
         and is left to the model.",
        "Layers alternate between within a view and across views, within first: the paper says that they alternate.",
    ],
    params: params_of::<Lrgt>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Lrgt>(CARD.id, params)?)))
}
