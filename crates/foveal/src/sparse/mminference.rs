//! MMInference: patterns of heads by modality (Li et al. 2025, arXiv 2504.16083).
//!
//! Tokens of the grid are vision, those around it text. What a head visits follows one pattern:
//!
//! * `grid`: a vision query visits the text before the grid, the last `local` keys, and of the vision keys those at
//!   phase p of a stride s, (j − first) mod s = p. The phase is the one whose keys the last vision queries weigh
//!   most. Text queries visit everything.
//! * `q-boundary`: columns and diagonals as in MInference's vertical-slash, estimated once for each modality from the
//!   last queries of that modality, and used by its queries.
//! * `two-d-boundary`: the same for each pair of a queries' and a keys' modality; diagonals end at the modality's border.
//! * `no-boundary`: one estimate for all.
//!
//! q (Tq, D), k (Tk, D), a token grid → blocks and single keys. Cost of the estimates: 2·last_q·T·D a modality.

use super::estimate::{SOFTMAX_FLOPS, bytes, hide};
use super::minference::{Lines, MInference, cover};
use super::{Domain, Grid, HeadProblem, HeadSelection, Mat, Selector};
use crate::error::Result;
use crate::prim::gemm::{self, Columns, Rows};
use crate::prim::pool::{column_exp, column_max};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadKeys, HeadTable, Work};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What a head visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Keys at one phase of a stride.
    #[default]
    Grid,
    /// Columns and diagonals for each modality of queries.
    QBoundary,
    /// Columns and diagonals for each pair of modalities.
    #[serde(rename = "two-d-boundary")]
    TwoDBoundary,
    /// Columns and diagonals for all.
    NoBoundary,
}

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MmInference {
    /// Pattern of the head.
    pub pattern: Pattern,
    /// Stride of the grid pattern in tokens; 0 = a frame, or a row where there is one frame.
    pub stride: usize,
    /// Phase of the grid pattern; −1 = estimated.
    pub phase: i64,
    /// Last keys of the grid pattern, the query's own included.
    pub local: usize,
    /// Columns, as in MInference.
    pub vertical_size: f64,
    /// Diagonals, as in MInference.
    pub slash_size: f64,
    /// Cap on sizes that are counts, as a share.
    pub max_share: f64,
    /// Queries at the end of each modality that the estimates look at.
    pub last_q: usize,
    /// First columns, taken in any case.
    pub sinks: usize,
    /// Nearest diagonals, taken in any case.
    pub recent: usize,
    /// Queries and keys per block.
    pub block_size: usize,
}

impl Default for MmInference {
    fn default() -> Self {
        let m = MInference::default();
        Self {
            pattern: Pattern::Grid,
            stride: 0,
            phase: -1,
            local: 1024,
            vertical_size: m.vertical_size,
            slash_size: m.slash_size,
            max_share: m.max_share,
            last_q: m.last_q,
            sinks: m.sinks,
            recent: m.recent,
            block_size: m.block_size,
        }
    }
}

impl MmInference {
    /// The vertical-slash settings.
    fn lines(&self) -> MInference {
        MInference {
            vertical_size: self.vertical_size,
            slash_size: self.slash_size,
            max_share: self.max_share,
            last_q: self.last_q,
            sinks: self.sinks,
            recent: self.recent,
            block_size: self.block_size,
            ..MInference::default()
        }
    }
}

impl Config for MmInference {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("pattern", "grid, q-boundary, two-d-boundary or no-boundary"),
        ("stride", "grid: distance of visited vision keys in tokens; 0 = a frame, or a row where there is one frame"),
        (
            "phase",
            "grid: place of the visited keys within a stride; -1 = the one that the last vision queries weigh most",
        ),
        ("local", "grid: last keys, the query's own included"),
        ("vertical_size", "boundaries: columns; a count from 1 on, below 1 a share of the keys of the modality"),
        ("slash_size", "boundaries: diagonals; a count from 1 on, below 1 a share of the keys"),
        ("max_share", "boundaries: cap on vertical_size and slash_size where they are counts, as a share; 1 = no cap"),
        ("last_q", "queries at the end of each modality that the estimates look at"),
        ("sinks", "boundaries: first columns, taken in any case"),
        ("recent", "boundaries: nearest diagonals, taken in any case"),
        ("block_size", "queries and keys per block"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.local == 0 || self.phase < -1 {
            return Err(format!(
                "local = {}, phase = {}: use at least 1, and a phase from 0 on or -1 for the estimate",
                self.local, self.phase
            ));
        }
        self.lines().validate()
    }
}

impl MmInference {
    /// The phase of `stride` whose vision keys hold most of the last vision queries' weight.
    fn phase(&self, p: &HeadProblem, grid: Grid, stride: usize) -> (usize, Work) {
        let mut work = Work::default();
        if self.phase >= 0 {
            return (self.phase as usize % stride, work);
        }
        let (d, off, vision) = (p.q.cols, p.offset(), grid.range());
        let end = vision.end.min(off + p.q.rows);
        let m = self.last_q.min(end.saturating_sub(off.max(vision.start)));
        if m == 0 {
            return (0, work);
        }
        let keys = Rows::of(&p.k, 1, p.precision);
        let mut q = Columns::new(m, 1, d, p.scale, p.precision);
        q.fill(m, |i, _| Some(p.q.row(end - m + i - off)));
        let mut scores = Vec::new();
        work.flops += gemm::scores(&keys, vision.start..end, &q, &mut scores);
        work.bytes += bytes(m + end - vision.start, d);
        let columns = q.stride();
        let scores = &mut scores[..(end - vision.start) * columns];
        hide(scores, columns, m, |i| end - m + i + 1 - vision.start);
        let (mut top, mut sum) = (vec![f32::NEG_INFINITY; columns], vec![0f32; columns]);
        column_max(scores, &mut top);
        column_exp(scores, &top, &mut sum);
        let mut held = vec![0f32; stride];
        for (j, row) in scores.chunks_exact(columns).enumerate() {
            held[j % stride] += row[..m].iter().zip(&sum).map(|(w, s)| w / s).sum::<f32>();
        }
        work.flops += ((SOFTMAX_FLOPS + 2) * m * (end - vision.start)) as u64;
        ((1..stride).fold(0, |best, x| if held[x] > held[best] { x } else { best }), work)
    }

    fn grid(&self, p: &HeadProblem, grid: Grid) -> (HeadSelection, Work) {
        let (tq, off, b, vision) = (p.q.rows, p.offset(), self.block_size, grid.range());
        let stride = match (self.stride, grid.t) {
            (0, 1) => grid.w,
            (0, _) => grid.frame(),
            (n, _) => n,
        };
        let (phase, work) = self.phase(p, grid, stride);
        let mut table = HeadTable { block_q: b, block_k: b, indptr: vec![0], blocks: Vec::new(), rows: None };
        let mut lists = HeadKeys { group: b, indptr: vec![0], keys: Vec::new() };
        for r0 in (0..tq).step_by(b) {
            let (first, last) = (off + r0, off + (r0 + b).min(tq) - 1);
            let end = (last / b + 1) as u32;
            // A block with a text query is dense.
            if first < vision.start || last >= vision.end {
                table.blocks.extend(0..end);
            } else {
                let near = (first + 1).saturating_sub(self.local) / b;
                let sinks = vision.start.div_ceil(b).min(near);
                table.blocks.extend((0..sinks as u32).chain(near as u32..end));
                // Lines between the first and the local blocks.
                let from = sinks * b;
                let skip = from.saturating_sub(vision.start + phase).div_ceil(stride);
                lists.keys.extend((vision.start + phase + skip * stride..near * b).step_by(stride).map(|j| j as u32));
            }
            table.indptr.push(table.blocks.len());
            lists.indptr.push(lists.keys.len());
        }
        (HeadSelection::of_both(table, lists), work)
    }

    fn boundaries(&self, p: &HeadProblem, grid: Grid) -> (HeadSelection, Work) {
        let (tq, tk, d, off, vision) = (p.q.rows, p.k.rows, p.q.cols, p.offset(), grid.range());
        let m = self.lines();
        // Text before, vision, text after.
        let spans = [0..vision.start, vision.clone(), vision.end..tk];
        let queries = |s: &Range<usize>| s.start.max(off)..s.end.max(off);
        let ranges = |pattern: Pattern| -> Vec<Range<usize>> {
            match pattern {
                Pattern::TwoDBoundary => spans.iter().filter(|s| !s.is_empty()).cloned().collect(),
                _ => std::iter::once(0..tk).collect(),
            }
        };
        let mut work = Work::default();
        let mut estimate = |span: &Range<usize>| -> Vec<Lines> {
            // The problem as it stands at the end of the span.
            let of = queries(span);
            let part = HeadProblem {
                q: Mat::new(p.q.data(), of.end - off, d, p.q.stride),
                k: Mat::new(p.k.data(), of.end, d, p.k.stride),
                ..*p
            };
            let within = |r: Range<usize>| r.start.min(of.end)..r.end.min(of.end);
            let (lines, w) = m.lines(
                &part,
                self.last_q.min(of.len()),
                &ranges(self.pattern).into_iter().map(within).collect::<Vec<_>>(),
            );
            work += w;
            lines
        };
        let empty = |s: &Range<usize>| queries(s).is_empty();
        let (text, seen) = if self.pattern == Pattern::NoBoundary {
            (estimate(&(0..tk)), Vec::new())
        } else {
            let last_text = if empty(&spans[2]) { &spans[0] } else { &spans[2] };
            let text = if empty(last_text) { Vec::new() } else { estimate(last_text) };
            (text, if empty(&spans[1]) { Vec::new() } else { estimate(&spans[1]) })
        };
        let lines = |first: usize, last: usize| {
            let any = first < vision.start || last >= vision.end || self.pattern == Pattern::NoBoundary;
            let both = [(any, &text), (first < vision.end && last >= vision.start, &seen)];
            both.into_iter().filter(|x| x.0).flat_map(|x| x.1).collect::<Vec<&Lines>>()
        };
        (cover(self.block_size, [tq, tk], lines), work)
    }
}

impl Selector for MmInference {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let Some(grid) = p.grid.filter(|_| p.q.rows > 0) else {
            return Ok((HeadSelection::dense(p), Work::default()));
        };
        Ok(if self.pattern == Pattern::Grid { self.grid(p, grid) } else { self.boundaries(p, grid) })
    }

    fn domain(&self) -> Domain {
        Domain { causal: true, full: false, grid: true }
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "mminference",
    title: "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation Sparse Attention",
    authors: "Li et al., 2025",
    arxiv: "2504.16083",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("local", "1000000000")]),
        Law::ExactAt(&[("pattern", "q-boundary"), ("slash_size", "1000000000"), ("max_share", "1")]),
        Law::ExactAt(&[("pattern", "two-d-boundary"), ("slash_size", "1000000000"), ("max_share", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "local", values: &["64", "256", "512", "1024", "1000000"] },
    ],
    equation: "grid: vision query i visits text before, the last local keys, and vision keys j with (j - first) mod s = p\n\
               q-boundary: columns and diagonals of largest weight, estimated by the last queries of each modality\n\
               two-d-boundary: the same for each pair of modalities;  text queries of a grid head visit everything",
    cost: "2·last_q·T·D for each modality's estimate; T/s + local keys per vision query on a grid head",
    choices: &[
        "Which pattern suits which head the paper finds offline by search; here a plan's rules name it. no-boundary is its \
         plain vertical-slash head, an A-shape head is minference:pattern=a-shape.",
        "The paper permutes tokens by their place modulo the stride, so that the keys of a phase are neighbours for a dense \
         block kernel. Here the kernels gather listed keys through pointers, which visits the same pairs without a copy.",
        "Only the lines of keys of a grid head are built, which is one of the variants that the authors' code searches \
         (stride, no horizontal lines). Its horizontal lines, dense queries at the phase, are left out: a tile of 64 \
         queries would be dense for one of them.",
        "Stride a frame, or a row for a single image, as two of the strides that the code tries; it fixes the phase offline by \
         the best recall among three, here the last queries choose among all.",
        "The code takes text before the grid and the tokens before the phase as sinks; the latter are left to the local keys.",
        "Query blocks that hold tokens of two modalities visit what both would; on a grid head a block with a text query is \
         dense.",
    ],
    params: params_of::<MmInference>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<MmInference>(CARD.id, params)?)))
}
