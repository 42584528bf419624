//! DHSA: dynamic hierarchical sparse attention (Xiong et al. 2025, arXiv 2510.24606).
//!
//! Keys are cut into chunks of varying length where their direction turns: with L(t) and R(t) the sums of the
//! `window` keys before t and from t on, a chunk that begins at b ends at the t of
//! b + `min_chunk` .. b + `max_chunk` with the least cos(L(t), R(t)). A chunk c of n keys is k̃_c = (Σ_{j∈c} k_j)/√n,
//! a block of queries q̃_b likewise. The chunk score q̃_b·k̃_c is the score of each token of c, and block b visits
//! the `topk` tokens of highest score: `local` of them are the latest in any case. The first `global` tokens
//! come on top, and the last `dense_last` queries visit everything.
//!
//! q (Tq, D), k (Tk, D) → key lists of `block_size` queries. Cost: 4·T·D for boundaries, T·D for the chunks,
//! 2·D·T²/(block_size · mean chunk) for their scores; topk + global keys a query; O(T) extra memory.

use super::estimate::bytes;
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::Result;
use crate::prim::gemm::abt;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadKeys, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dhsa {
    /// Tokens per query block, beside the global ones.
    pub topk: usize,
    /// Queries per block.
    pub block_size: usize,
    /// Latest tokens, part of the budget.
    pub local: usize,
    /// First tokens, on top of the budget.
    pub global: usize,
    /// Last queries of the prompt, which visit everything.
    pub dense_last: usize,
    /// Least keys of a chunk.
    pub min_chunk: usize,
    /// Most keys of a chunk.
    pub max_chunk: usize,
    /// Keys on either side of a boundary that are compared.
    pub window: usize,
}

impl Default for Dhsa {
    fn default() -> Self {
        Self {
            topk: 1024,
            block_size: 64,
            local: 128,
            global: 128,
            dense_last: 64,
            min_chunk: 8,
            max_chunk: 32,
            window: 8,
        }
    }
}

impl Config for Dhsa {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("topk", "tokens that a block of queries visits, the local ones included"),
        ("block_size", "queries per block, which share a list of tokens"),
        ("local", "latest tokens, always visited; at least block_size"),
        ("global", "first tokens, always visited and on top of topk"),
        ("dense_last", "last queries of the prompt, which visit everything"),
        ("min_chunk", "least keys of a chunk, the last one apart"),
        ("max_chunk", "most keys of a chunk"),
        ("window", "keys before and after a place whose directions are compared to find a boundary"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 || self.window == 0 {
            return Err(format!("block_size = {}, window = {}: use at least 1", self.block_size, self.window));
        }
        if self.local < self.block_size {
            return Err(format!(
                "local = {}: use at least block_size = {}, so that every query sees itself",
                self.local, self.block_size
            ));
        }
        if self.min_chunk == 0 || self.max_chunk < self.min_chunk {
            return Err(format!(
                "min_chunk = {}, max_chunk = {}: use 1 or more, and no less for max_chunk",
                self.min_chunk, self.max_chunk
            ));
        }
        Ok(())
    }
}

/// Query blocks scored by one product.
const PANEL: usize = 64;

/// cos of the sums of up to `window` rows before and from each t in 1..rows; entry 0 is 1.
fn turns(k: &Mat, window: usize) -> Vec<f64> {
    let (n, d) = (k.rows, k.cols);
    let mut cos = vec![1f64; n.max(1)];
    let (mut left, mut right) = (vec![0f64; d], vec![0f64; d]);
    let add =
        |s: &mut [f64], row: &[f32], sign: f64| s.iter_mut().zip(row).for_each(|(s, x)| *s += sign * f64::from(*x));
    (0..window.min(n)).for_each(|j| add(&mut right, k.row(j), 1.0));
    for t in 1..n {
        // Key t − 1 passes from the right to the left.
        add(&mut right, k.row(t - 1), -1.0);
        add(&mut left, k.row(t - 1), 1.0);
        if t > window {
            add(&mut left, k.row(t - 1 - window), -1.0);
        }
        if t + window <= n {
            add(&mut right, k.row(t + window - 1), 1.0);
        }
        let (mut lr, mut ll, mut rr) = (0f64, 0f64, 0f64);
        for (l, r) in left.iter().zip(&right) {
            (lr, ll, rr) = (lr + l * r, ll + l * l, rr + r * r);
        }
        cos[t] = lr / (ll * rr).sqrt().max(f64::MIN_POSITIVE);
    }
    cos
}

impl Dhsa {
    /// Starts of the chunks of `k`, and its end.
    fn boundaries(&self, k: &Mat) -> Vec<usize> {
        let cos = turns(k, self.window);
        let mut starts = vec![0];
        let mut b = 0;
        while k.rows - b > self.max_chunk {
            let places = b + self.min_chunk..=b + self.max_chunk;
            b = places.min_by(|&s, &t| cos[s].total_cmp(&cos[t])).unwrap_or(k.rows);
            starts.push(b);
        }
        starts.push(k.rows);
        starts
    }
}

/// Sums of the rows of each range over the root of their number.
fn aggregate(m: &Mat, ranges: impl Iterator<Item = std::ops::Range<usize>>) -> Vec<f32> {
    let mut out = Vec::new();
    for range in ranges {
        let at = out.len();
        out.resize(at + m.cols, 0f32);
        let factor = 1.0 / (range.len().max(1) as f32).sqrt();
        for r in range {
            out[at..].iter_mut().zip(m.row(r)).for_each(|(s, x)| *s += x);
        }
        out[at..].iter_mut().for_each(|x| *x *= factor);
    }
    out
}

impl Selector for Dhsa {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let bq = self.block_size;
        let (tq, tk, d, off) = (p.q.rows, p.k.rows, p.q.cols, p.offset());
        let mut work = Work::default();
        let nq = tq.div_ceil(bq);
        let dense_from = tq.saturating_sub(self.dense_last);
        let budget = self.topk.saturating_sub(self.local);
        // Middle tokens of a block of queries: after the global, before the local ones.
        let middle = |b: usize| {
            let end = off + ((b + 1) * bq).min(tq);
            let near = end.saturating_sub(self.local);
            (self.global.min(near), near, end)
        };
        let searches = |b: usize| {
            let (far, near, _) = middle(b);
            near - far > budget && ((b + 1) * bq).min(tq) <= dense_from
        };
        let mut lists = HeadKeys { group: bq, indptr: vec![0], keys: Vec::new() };
        let (mut starts, mut chunks, mut queries) = (Vec::new(), Vec::new(), Vec::new());
        if (0..nq).any(searches) {
            starts = self.boundaries(&p.k);
            chunks = aggregate(&p.k, starts.windows(2).map(|w| w[0]..w[1]));
            queries = aggregate(&p.q, (0..nq).map(|b| b * bq..((b + 1) * bq).min(tq)));
            // Four running sums and three products a channel and place; the aggregates.
            work.flops += (10 * tk * d + (tk + starts.len() - 1) * d + (tq + nq) * d) as u64;
            work.bytes += bytes(5 * tk + tq, d);
        }
        let n = starts.len().saturating_sub(1);
        let mut scores = vec![0f32; PANEL.min(nq) * n];
        let mut scored = 0..0;
        let mut order: Vec<u32> = Vec::new();
        for b in 0..nq {
            let (far, near, end) = middle(b);
            if !searches(b) {
                lists.keys.extend(0..end as u32);
                lists.indptr.push(lists.keys.len());
                continue;
            }
            if !scored.contains(&b) {
                scored = b..(b + PANEL).min(nq);
                work.flops += abt(scored.len(), n, d, 1.0, &queries[b * d..], d, &chunks, d, &mut scores);
                work.bytes += bytes(scored.len() + n, d);
            }
            let score = &scores[(b - scored.start) * n..][..n];
            let first = starts.partition_point(|&s| s <= far) - 1;
            let last = starts.partition_point(|&s| s < near);
            order.clear();
            order.extend(first as u32..last as u32);
            let key = |c: u32| if score[c as usize].is_nan() { f32::NEG_INFINITY } else { score[c as usize] };
            order.sort_unstable_by(|&x, &y| key(y).total_cmp(&key(x)).then(x.cmp(&y)));
            lists.keys.extend(0..far as u32);
            let at = lists.keys.len();
            let mut left = budget;
            for &c in &order {
                let (from, to) = (starts[c as usize].max(far), starts[c as usize + 1].min(near));
                let to = to.min(from + left);
                lists.keys.extend(from as u32..to as u32);
                left -= to - from;
                if left == 0 {
                    break;
                }
            }
            lists.keys[at..].sort_unstable();
            lists.keys.extend(near as u32..end as u32);
            lists.indptr.push(lists.keys.len());
        }
        Ok((HeadSelection::of_keys(lists), work))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "dhsa",
    title: "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    authors: "Xiong et al., 2025",
    arxiv: "2510.24606",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("topk", "1000000000")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::Quadratic },
        Law::Monotone { param: "topk", values: &["0", "128", "256", "512", "1024", "1000000"] },
    ],
    equation: "chunk ends where cos(sum of the keys before, sum of the keys after) is least\n\
               chunk c: sum of its keys / sqrt(their number); query block b likewise;  S(b,j) = q_b·k_c(j)\n\
               block b visits the topk tokens of largest S(b,j), the latest included, and the first global tokens",
    cost: "boundaries 10·T·D, scores 2·D·T²/(block_size·chunk), topk + global keys per query; O(T) extra memory",
    choices: &[
        "The paper predicts boundaries with a small trained network (encoder, feature fusion, MLP). There are no such weights \
         for other models, so a boundary here is where the mean direction of the keys turns most, between a least and a \
         most chunk length: training-free, and the rest of the method is unchanged.",
        "Queries form blocks of fixed size and only keys form chunks of varying length, as in the authors' code; topk counts \
         the local tokens and the global ones come on top, as there. The sizes 128, 128 and 64 are that code's; topk, \
         which its scripts choose by task, is 1,024 here.",
        "Each head scores its own chunks; the authors' code scores the means over heads and shares the tokens among them.",
        "Which of the tokens of the last chunk taken fit into the budget is open: its first ones.",
        "A chunk may reach past the queries that score it, and a boundary looks window keys ahead: only the mask is promised \
         causal.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.92, default 7.04 with 83% of the pairs computed, topk=512 7.22 with \
         56%. 8,192 tokens: dense 8.05, default 8.61 with 27%, topk=2048 8.30 with 47%. Single keys are gathered for \
         every 64 queries, so that attention is no faster than dense at these lengths.",
    ],
    params: params_of::<Dhsa>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Dhsa>(CARD.id, params)?)))
}
