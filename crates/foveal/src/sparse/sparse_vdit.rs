//! Sparse-vDiT: one of five static patterns for each head of a video model (Chen et al. 2025, arXiv 2506.03065).
//!
//! Attention maps of video diffusion Transformers look alike for all inputs but differ from head to head: full, a band
//! around the diagonal, bands around the diagonal of every pair of frames, vertical stripes, or of no use at all. With s
//! tokens a frame and r = ⌊width·s⌋, the query at place k of frame i visits place l of frame j where
//! - `diagonal`: |(i·s + k) − (j·s + l)| ≤ r;
//! - `multi-diagonal`: |k − l| ≤ r;
//! - `stripe`: j < stripe_frames;
//! - `full`: always; `skip`: never, and the head's output is zero.
//!
//! Which head has which pattern is found offline by [`super::search`]: the cheapest within a bound on the error. Cost:
//! T·(2r + 1), frames·T·(2r + 1), T·s·stripe_frames, T² or 0 pairs.

use super::axes::{Axis, grid_of, select};
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, Spec, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Pattern of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Everything.
    Full,
    /// A band around the diagonal.
    Diagonal,
    /// A band around the diagonal of every pair of frames.
    MultiDiagonal,
    /// The first frames.
    Stripe,
    /// Nothing: the head is left out.
    Skip,
}

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SparseVdit {
    /// Pattern of the head.
    pub pattern: Pattern,
    /// Reach of a band on either side, as a share of a frame.
    pub width: f64,
    /// First frames that a stripe holds.
    pub stripe_frames: usize,
}

impl Default for SparseVdit {
    fn default() -> Self {
        Self { pattern: Pattern::MultiDiagonal, width: 0.125, stripe_frames: 1 }
    }
}

impl Config for SparseVdit {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("pattern", "full, diagonal, multi-diagonal, stripe or skip (the head's output is zero)"),
        ("width", "reach of a band on either side of its diagonal, as a share of a frame's tokens"),
        ("stripe_frames", "first frames that a stripe holds"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(self.width >= 0.0 && self.width.is_finite()) {
            return Err(format!("width = {}: use a share of a frame, 0 or more", self.width));
        }
        if self.stripe_frames == 0 {
            return Err("stripe_frames = 0: use at least 1, or pattern = skip".into());
        }
        Ok(())
    }
}

/// What [`super::search`] tries for a head: every pattern, bands in four widths.
pub fn candidates() -> Vec<Spec> {
    let of = |pattern: &str| Spec::new(CARD.id).with("pattern", pattern);
    let bands = ["diagonal", "multi-diagonal"].into_iter().flat_map(|pattern| {
        ["0.03125", "0.0625", "0.125", "0.25"]
            .map(|width| Spec::new(CARD.id).with("pattern", pattern).with("width", width))
    });
    [of("skip"), of("stripe")].into_iter().chain(bands).chain([of("full")]).collect()
}

impl Selector for SparseVdit {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (grid, n) = (grid_of(p), p.q.rows);
        let s = grid.frame();
        // A cast of what is too large saturates.
        let reach = (self.width * s as f64) as usize;
        let band = |i: usize, len: usize| i.saturating_sub(reach)..i.saturating_add(reach).saturating_add(1).min(len);
        // Each pattern is a product on some reading of the grid: as a line, or as frames of one row.
        let frames = Grid { h: 1, w: s, ..grid };
        let (grid, axes) = match self.pattern {
            Pattern::Full => return Ok((HeadSelection::dense(p), Work::default())),
            Pattern::Skip => {
                let nothing = HeadTable::from_lists(128, 128, vec![Vec::new(); n.div_ceil(128)]);
                return Ok((HeadSelection::of_blocks(nothing), Work::default()));
            }
            Pattern::Diagonal => {
                let line = Grid { t: 1, h: 1, w: grid.tokens(), ..grid };
                (line, [Axis::whole(1), Axis::whole(1), Axis::new(line.w, 1, band)])
            }
            Pattern::MultiDiagonal => (frames, [Axis::whole(grid.t), Axis::whole(1), Axis::new(s, 1, band)]),
            Pattern::Stripe => {
                let first = Axis::new(grid.t, 1, |_, len| 0..self.stripe_frames.min(len));
                (frames, [first, Axis::whole(1), Axis::whole(s)])
            }
        };
        let p = HeadProblem { grid: Some(grid), ..*p };
        Ok((select(&p, &axes, None), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "sparse-vdit",
    title: "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers",
    authors: "Chen et al., 2025",
    arxiv: "2506.03065",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::ExactAt(&[("pattern", "full")]),
        Law::ExactAt(&[("width", "1000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "width", values: &["0", "0.05", "0.125", "0.5", "1"] },
        Law::Monotone { param: "pattern", values: &["skip", "diagonal", "multi-diagonal", "full"] },
    ],
    equation: "diagonal: |q - k| <= r in token order;  multi-diagonal: |place(q) - place(k)| <= r in every frame, r = floor(width·s)\n\
               stripe: keys of the first frames;  full: all;  skip: none, output zero\n\
               offline, per head: the cheapest pattern whose output error is within a bound",
    cost: "T·(2r + 1), frames·T·(2r + 1), T·s·stripe_frames, T² or 0 pairs; no estimate",
    choices: &[
        "No code is public and the abstract gives no sizes: widths are shares of a frame, a stripe is the first frames (those that the \
         published maps show as attended by all), and both are parameters of the search.",
        "The search takes the cheapest candidate (tiles that our kernels run, as a share of dense) whose relative output error on recorded \
         q, k and v is within a bound, dense where none is; the paper's weighting of error against latency is not public.",
        "A skipped head gives zeros. Heads of one layer with the same pattern need no grouping: all heads of a layer run in one call.",
        "Text tokens around a grid visit everything and are visited by all, except in a skipped head.",
    ],
    params: params_of::<SparseVdit>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<SparseVdit>(CARD.id, params)?)))
}
