//! Radial attention: a static video mask whose density decays with distance in time (Li et al. 2025, arXiv 2506.19852).
//!
//! A frame has s tokens. For place k of frame i and place l of frame j, with b = 2^⌊log₂ max(|i − j|, 1)⌋: the query
//! visits the key if |k − l| + 1 ≤ s/b, or if k = l and |i − j| mod ⌈b/s⌉ = 0. The first frame is visited by all.
//! `decay` multiplies s in these bounds.
//!
//! Nothing is estimated. Cost: O(s·log₂(frames)) keys a query, T·s·log₂(T/s) pairs in all. Tiles of 64 queries visit the
//! union of their windows: far frames want few places in a tile, near ones few frames, and the tile is the best between.

use super::axes::grid_of;
use super::pattern::runs_table;
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector, TokenOrder};
use crate::error::Result;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RadialAttention {
    /// Factor on the width of windows.
    pub decay: f64,
    /// First frames that every query visits.
    pub sink_frames: usize,
}

impl Default for RadialAttention {
    fn default() -> Self {
        Self { decay: 1.0, sink_frames: 1 }
    }
}

impl Config for RadialAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("decay", "factor on the width of windows; 1 starts at whole frames, less visits fewer keys"),
        ("sink_frames", "first frames that every query visits"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(self.decay > 0.0 && self.decay.is_finite()) {
            return Err(format!("decay = {}: use a number above 0", self.decay));
        }
        Ok(())
    }
}

impl RadialAttention {
    /// Places of a frame of `s` that place `k` visits `distance` frames away.
    fn window(&self, distance: usize, k: usize, s: usize) -> Range<usize> {
        let b = (1u64 << distance.max(1).ilog2()) as f64;
        let width = s as f64 * self.decay / b;
        if width >= 1.0 {
            // |k − l| + 1 ≤ width; a cast of what is too large saturates.
            let reach = width as usize - 1;
            return k.saturating_sub(reach)..k.saturating_add(reach).saturating_add(1).min(s);
        }
        let every = (1.0 / width).ceil() as usize;
        if distance.is_multiple_of(every) { k..k + 1 } else { k..k }
    }
}

/// Queries of a tile.
const TILE: usize = 64;

impl RadialAttention {
    /// Frames of a tile of queries with which the union of windows is least.
    fn frames(&self, grid: Grid) -> usize {
        let (s, mut best) = (grid.frame(), (usize::MAX, 1));
        for frames in (0..7).map(|x| 1 << x).filter(|&f| f <= grid.t && TILE / f <= s) {
            let (places, tiles) = (TILE / frames, grid.t.div_ceil(frames));
            let middle = (s - places) / 2;
            // A window is widest for the query of the tile that is nearest in time.
            let keys: usize = (0..tiles)
                .flat_map(|f| (self.sink_frames..grid.t).map(move |j| (f * frames, j)))
                .map(|(f, j)| {
                    let distance = f.saturating_sub(j).max(j.saturating_sub(f + frames - 1));
                    let r = self.window(distance, middle, s);
                    if r.is_empty() { 0 } else { (r.len() + places - 1).min(s) }
                })
                .sum();
            let cost = keys * s.div_ceil(places);
            if cost < best.0 {
                best = (cost, frames);
            }
        }
        best.1
    }

    /// Tokens in the order of tiles of `frames` frames, each of which begins at a multiple of 64; text comes last.
    fn places(grid: Grid, frames: usize, tokens: usize) -> Vec<u32> {
        let (own, s, places) = (grid.range(), grid.frame(), TILE / frames);
        let mut at: Vec<u32> = Vec::with_capacity(tokens);
        for t in (0..grid.t).step_by(frames) {
            for k in (0..s).step_by(places) {
                at.resize(at.len().next_multiple_of(TILE), TokenOrder::NONE);
                for t in t..(t + frames).min(grid.t) {
                    let row = own.start + t * s;
                    at.extend((row + k) as u32..(row + (k + places).min(s)) as u32);
                }
            }
        }
        at.resize(at.len().next_multiple_of(TILE), TokenOrder::NONE);
        at.extend((0..own.start).chain(own.end..tokens).map(|i| i as u32));
        at
    }
}

impl Selector for RadialAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (grid, tk, offset) = (grid_of(p), p.k.rows, p.offset());
        let (own, s) = (grid.range(), grid.frame());
        let frames = if p.q.rows == tk { self.frames(grid) } else { 1 };
        let at = (frames > 1).then(|| Self::places(grid, frames, tk));
        let table = runs_table(at.as_ref().map_or(p.q.rows, Vec::len), tk, |x, f| {
            let token = at.as_ref().map_or(offset + x, |at| at[x] as usize);
            if token == TokenOrder::NONE as usize {
                return;
            }
            let Some([t, h, w]) = grid.place(token) else { return f(0..tk) };
            let mut name = |run: Range<usize>| {
                if !run.is_empty() {
                    f(run);
                }
            };
            let sinks = self.sink_frames.min(grid.t);
            name(0..own.start + sinks * s);
            for j in sinks..grid.t {
                let r = self.window(t.abs_diff(j), h * grid.w + w, s);
                let at = own.start + j * s;
                name(at + r.start..at + r.end);
            }
            name(own.end..tk);
        });
        let order = at.map(TokenOrder::new).transpose()?;
        Ok((HeadSelection::of_blocks(table).in_order(order, None), Work::default()))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "radial-attention",
    title: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
    authors: "Li et al., 2025",
    arxiv: "2506.19852",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::ExactAt(&[("decay", "1000000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "decay", values: &["0.25", "0.5", "1", "2", "1000"] },
    ],
    equation: "b = 2^floor(log2(max(|i - j|, 1)));  place k of frame i visits place l of frame j where |k - l| + 1 <= s/b,\n\
               or k = l and |i - j| mod ceil(b/s) = 0, or j = 0",
    cost: "T·s·log2(frames) pairs for frames of s tokens, so O(T log T) in the length of a video; no estimate;  \
           tiles of 64 queries add up to 64 keys a tile and frame, T²/s at worst",
    choices: &[
        "The mask is the paper's, kept exactly: a bit a (query, key). The authors' code rounds it to blocks of 128, drops blocks of which \
         little is set, lets windows end at 128 keys, and has other widths for its two models.",
        "decay stands for the code's decay_factor, but multiplies s itself, so that it also moves the distance from which on only every \
         n-th frame is visited.",
        "Pairs named grow as T log T (a test counts them). What the kernels compute are tiles of 64 queries by the union of their windows, \
         at most 64 more keys a frame, which the law on work counts honestly as quadratic. Tiles of several frames keep that small: at 128 frames \
         of 256 tokens they visit 23 % of dense where rows of one frame visit 37 %. (The authors' code has the same floor: its windows end at \
         the block of 128.)",
        "Text tokens around a grid visit everything and are visited by all, as in the code.",
        "Inside a frame places count in row order: neighbours below one another are w places apart, in the paper too.",
    ],
    params: params_of::<RadialAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<RadialAttention>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::Mat;
    use crate::sparse::mask::{dense_mask, pairs};

    fn selection(c: &RadialAttention, grid: Grid, n: usize, tq: usize) -> HeadSelection {
        let x = vec![0f32; n];
        let p = HeadProblem {
            causal: false,
            grid: Some(grid),
            ..HeadProblem::new(Mat::new(&x, tq, 1, 1), Mat::new(&x, n, 1, 1), 1.0)
        };
        c.select(&p).unwrap().0
    }

    #[test]
    fn pairs_grow_as_the_length_times_its_logarithm() {
        let c = RadialAttention { decay: 0.5, ..RadialAttention::default() };
        let named = |t: usize| pairs(&selection(&c, Grid::new(t, 8, 8), t * 64, t * 64), t * 64, t * 64, false) as f64;
        let growth = (named(128) / named(64)).log2();
        assert!(growth < 1.3, "T^{growth}");
    }

    #[test]
    fn tiles_of_frames_change_nothing() {
        let (g, n) = (Grid { first: 2, t: 19, h: 9, w: 11 }, 2 + 19 * 99 + 4);
        let c = RadialAttention { decay: 0.3, ..RadialAttention::default() };
        let whole = selection(&c, g, n, n);
        whole.check(n, n).unwrap();
        assert!(whole.is_ordered(), "tiles of several frames pay here");
        let mask = dense_mask(&whole, n, n, false);
        // A chunk of queries is never put in order.
        let late = selection(&c, g, n, n - 100);
        assert!(!late.is_ordered());
        assert_eq!(dense_mask(&late, n - 100, n, false), mask[100 * n..]);
    }
}
