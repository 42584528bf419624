//! Superlinear multi-step attention, N = 2 (Huang 2026, arXiv 2601.18401), used training-free.
//!
//! The query at position p scores single keys at distances that grow as squares: anchor a_i = p + 1 − i² for
//! i > `window_index`, about √p of them. Around each of the `spans` anchors of largest q·k_a it attends to the span
//! from `backward`·√(p+1) keys before to `forward`·√(p+1) keys after the anchor, and to its window, the
//! (window_index + 1)² − 1 keys up to its own. Between neighbouring anchors lie at most 2√(p+1) keys, so no key is
//! out of reach.
//!
//! q (Tq, D), k (Tk, D) → a table of `block_q` queries by `block_k` keys with one bit per query. Cost: 2·D·T^1.5 for
//! the search, spans·(backward + forward)·√T + window keys a query; O(T^1.5/block_k) extra memory.

use super::estimate::bytes;
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::prim::pool::row_dots;
use crate::prim::select::topk_into;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Superlinear {
    /// Spans per query.
    pub spans: usize,
    /// Keys before an anchor, in roots of the position.
    pub backward: f64,
    /// Keys after an anchor, in roots of the position.
    pub forward: f64,
    /// The window is (window_index + 1)² − 1 keys.
    pub window_index: usize,
    /// First keys that every query attends to.
    pub sinks: usize,
    /// Queries that the kernel visits together.
    pub block_q: usize,
    /// Spans are rounded outwards to blocks of so many keys.
    pub block_k: usize,
}

impl Default for Superlinear {
    fn default() -> Self {
        Self { spans: 3, backward: 3.0, forward: 1.0, window_index: 15, sinks: 0, block_q: 16, block_k: 16 }
    }
}

impl Config for Superlinear {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("spans", "spans that each query attends to"),
        (
            "backward",
            "keys of a span before its anchor, in roots of the query's position; 2 or more leave no gap between anchors",
        ),
        ("forward", "keys of a span after its anchor, in roots of the query's position"),
        ("window_index", "the window is (window_index + 1)² - 1 keys, the query's own included"),
        (
            "sinks",
            "first keys that every query attends to besides; not in the paper (0), for models that were not trained with it",
        ),
        ("block_q", "queries that the kernel visits together, 1 to 64: changes the cost, never the result"),
        ("block_k", "spans are rounded outwards to blocks of so many keys; 1 keeps them as they are"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        for (name, x) in [("backward", self.backward), ("forward", self.forward)] {
            if !(0.0..=1e6).contains(&x) {
                return Err(format!("{name} = {x}: use a factor from 0 to 1000000"));
            }
        }
        if !(1..=64).contains(&self.block_q) {
            return Err(format!("block_q = {}: use 1 to 64, one bit a query", self.block_q));
        }
        if self.block_k == 0 {
            return Err("block_k = 0: use at least 1".into());
        }
        if self.window_index > 1 << 20 {
            return Err(format!("window_index = {}: use at most {}", self.window_index, 1 << 20));
        }
        Ok(())
    }
}

impl Selector for Superlinear {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (bq, bk) = (self.block_q, self.block_k);
        let (tq, d, off) = (p.q.rows, p.q.cols, p.offset());
        let mut work = Work::default();
        let window = ((self.window_index + 1).pow(2) - 1).max(1);
        let mut table =
            HeadTable { block_q: bq, block_k: bk, indptr: vec![0], blocks: Vec::new(), rows: Some(Vec::new()) };
        let mut bits = vec![0u64; (off + tq).div_ceil(bk)];
        // A row an anchor, a column a query of the block.
        let mut scores: Vec<f32> = Vec::new();
        let (mut column, mut ranks, mut best) = (Vec::new(), Vec::new(), Vec::new());
        for r0 in (0..tq).step_by(bq) {
            let r1 = (r0 + bq).min(tq);
            scores.clear();
            for i in self.window_index + 1.. {
                // Queries before position i² − 1 have no such anchor.
                let from = (i * i).saturating_sub(off + 1).max(r0);
                if from >= r1 {
                    break;
                }
                let at = scores.len();
                scores.resize(at + (r1 - r0), f32::NEG_INFINITY);
                let (q, k) = (&p.q.data()[from * p.q.stride..], &p.k.data()[(off + from + 1 - i * i) * p.k.stride..]);
                row_dots(q, p.q.stride, k, p.k.stride, d, &mut scores[at + (from - r0)..]);
                work.flops += (2 * d * (r1 - from)) as u64;
                work.bytes += bytes(2 * (r1 - from), d);
            }
            for r in r0..r1 {
                let (position, bit) = (off + r, 1u64 << (r - r0));
                let mut visit = |from: usize, to: usize| {
                    bits[from / bk..to / bk + 1].iter_mut().for_each(|x| *x |= bit);
                };
                visit((position + 1).saturating_sub(window), position);
                if self.sinks > 0 {
                    visit(0, (self.sinks - 1).min(position));
                }
                column.clear();
                let anchors = (position + 1).isqrt().saturating_sub(self.window_index);
                column.extend(scores.iter().skip(r - r0).step_by(r1 - r0).take(anchors));
                topk_into(&column, self.spans, &mut ranks, &mut best);
                let root = ((position + 1) as f64).sqrt();
                let (back, ahead) = ((self.backward * root).ceil() as usize, (self.forward * root).ceil() as usize);
                for &x in &best {
                    let anchor = position + 1 - (self.window_index + 1 + x as usize).pow(2);
                    visit(anchor.saturating_sub(back), (anchor + ahead).min(position));
                }
            }
            let end = (off + r1 - 1) / bk + 1;
            for (x, rows) in bits[..end].iter_mut().enumerate().filter(|(_, rows)| **rows != 0) {
                table.blocks.push(x as u32);
                table.rows.get_or_insert_default().push(std::mem::take(rows));
            }
            table.indptr.push(table.blocks.len());
        }
        Ok((HeadSelection::of_blocks(table), work))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "superlinear",
    title: "Superlinear Multi-Step Attention",
    authors: "Huang, 2026",
    arxiv: "2601.18401",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("spans", "1000000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "spans", values: &["0", "1", "2", "4", "8", "1000000"] },
    ],
    equation: "anchors a_i = p + 1 - i² for i > window_index;  g_i = q_p·k_{a_i}\n\
               query p attends to its window and, for the spans largest g_i, to keys\n\
               a_i - backward·sqrt(p+1) .. a_i + forward·sqrt(p+1)",
    cost: "search 2·D·T^1.5, spans·(backward + forward)·sqrt(T) + window keys per query: O(T^1.5) in all",
    choices: &[
        "Anchors, span lengths and the window follow the authors' code at its balanced exponents of 1/2; 3 spans, backward 3 \
         and forward 1 are its example's. Its model chooses the window; 255 keys here.",
        "The paper trains a query of its own for the search, and mixes the outputs of the spans by the softmax of their \
         search scores, which is how gradients reach the search. Used training-free there is one query for both, and one \
         softmax over the union of window and spans: the weights of a pretrained model stay what they are.",
        "The token accumulation before the search (a recurrent layer in the paper's hybrid model) belongs to the model.",
        "Spans are rounded outwards to blocks of 16 keys, so that a query of a block may see up to 30 more keys a span.",
        "Work grows as T^1.5; the laws know no class between T log T and T², hence declared quadratic.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.92, default 16.2: what is missing is where attention sinks, as with \
         MoBA. sinks=16, which is not in the paper, 7.02 with 88% of the pairs computed, spans=6,sinks=16 6.94 with 94%. \
         8,192 tokens: dense 8.05, sinks=16 8.76 with 53%. Neighbouring queries choose different spans and each span is \
         rounded to blocks, so tiles compute far more than is chosen. Recommended without training: sinks=16.",
    ],
    params: params_of::<Superlinear>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Superlinear>(CARD.id, params)?)))
}
