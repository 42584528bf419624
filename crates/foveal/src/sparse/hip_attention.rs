//! HiP attention: hierarchically pruned attention (Lee et al. 2024, arXiv 2406.09827).
//!
//! Keys near each other score alike, so the top k of a long past are found by a tree search that
//! looks at one representative a node. For each block of `block_size_q` queries, the past between
//! the sinks and the window is cut into n = k/block_size_k nodes; until every node is a single
//! key block: halve each node, score each half by the key block in its middle,
//! s = max over sampled queries and the block's keys of q·k, keep the n best halves.
//! The block attends to the n key blocks found, the first `sinks` keys and its sliding window.
//!
//! q (Tq, D), k (Tk, D) → one key list per query block. Cost: 4·k·D·log2(T/k) /
//! block_stride_q flops a query for the search, O(T log T) in all; k + window + sinks keys a
//! query; O(k) extra memory.

use super::estimate::bytes;
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::prim::gemm::abt;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadKeys, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HipAttention {
    /// Keys found by the search, per query block.
    pub k: usize,
    /// Queries that share a search.
    pub block_size_q: usize,
    /// Every how manieth query of the block scores.
    pub block_stride_q: usize,
    /// Keys per leaf.
    pub block_size_k: usize,
    /// Keys of the sliding window, the query's own included.
    pub window: usize,
    /// First keys, always visited.
    pub sinks: usize,
    /// Layers from the first that stay dense.
    pub dense_layers: usize,
}

impl Default for HipAttention {
    fn default() -> Self {
        Self { k: 512, block_size_q: 64, block_stride_q: 2, block_size_k: 2, window: 256, sinks: 16, dense_layers: 0 }
    }
}

impl Config for HipAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("k", "keys found by the search, per query block; a multiple of block_size_k"),
        ("block_size_q", "queries that share a search"),
        ("block_stride_q", "every how manieth query of a block scores; 1 = all"),
        ("block_size_k", "keys per leaf of the search tree"),
        ("window", "keys of the sliding window, the query's own included"),
        ("sinks", "first keys of the prompt, always visited"),
        ("dense_layers", "layers from the first that stay dense; 3 in the paper"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        for (name, v) in [
            ("k", self.k),
            ("block_size_q", self.block_size_q),
            ("block_stride_q", self.block_stride_q),
            ("block_size_k", self.block_size_k),
            ("window", self.window),
        ] {
            if v == 0 {
                return Err(format!("{name} = 0: use at least 1"));
            }
        }
        if !self.k.is_multiple_of(self.block_size_k) {
            return Err(format!("k = {}: use a multiple of block_size_k = {}", self.k, self.block_size_k));
        }
        Ok(())
    }
}

/// A run of key blocks of which one may stand for all.
#[derive(Clone, Copy)]
struct Node {
    start: u32,
    len: u32,
}

impl Selector for HipAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let mut work = Work::default();
        if p.layer < self.dense_layers {
            return Ok((HeadSelection::dense(p), work));
        }
        let (tq, d, off) = (p.q.rows, p.q.cols, p.offset());
        let bq = self.block_size_q;
        let mut lists = HeadKeys { group: bq, indptr: vec![0], keys: Vec::new() };
        let mut tree = Tree::default();
        let mut q: Vec<f32> = Vec::new();
        for r0 in (0..tq).step_by(bq) {
            let r1 = (r0 + bq).min(tq);
            let end = off + r1;
            // The window of the block's first query; all that lies between the sinks and it is searched.
            let near = (off + r0 + 1).saturating_sub(self.window);
            let far = self.sinks.min(near);
            lists.keys.extend(0..far as u32);
            if near - far <= self.k {
                lists.keys.extend(far as u32..near as u32);
            } else {
                q.clear();
                // The last query of the block scores in any case: it is the one whose answer
                // a generation needs.
                for r in (r0..r1).rev().step_by(self.block_stride_q) {
                    q.extend_from_slice(p.q.row(r));
                }
                work.bytes += bytes(q.len() / d.max(1), d);
                tree.search(p, &q, far, near, self, &mut work);
                for x in &tree.nodes {
                    let lo = far + x.start as usize * self.block_size_k;
                    lists.keys.extend(lo as u32..(lo + self.block_size_k).min(near) as u32);
                }
            }
            lists.keys.extend(near as u32..end as u32);
            lists.indptr.push(lists.keys.len());
        }
        Ok((HeadSelection { blocks: None, keys: Some(lists) }, work))
    }
}

/// Buffers of one head's searches.
#[derive(Default)]
struct Tree {
    nodes: Vec<Node>,
    halves: Vec<Node>,
    keys: Vec<f32>,
    scores: Vec<f32>,
    best: Vec<f32>,
    order: Vec<u32>,
}

impl Tree {
    /// Leave in `nodes` the key blocks found in keys `lo..hi`, ascending.
    fn search(&mut self, p: &HeadProblem, q: &[f32], lo: usize, hi: usize, c: &HipAttention, work: &mut Work) {
        let (d, bk, n) = (p.k.cols, c.block_size_k, c.k / c.block_size_k);
        let m = q.len() / d.max(1);
        let leaves = (hi - lo).div_ceil(bk);
        self.nodes.clear();
        self.nodes.extend((0..n).map(|i| {
            let (a, b) = (leaves * i / n, leaves * (i + 1) / n);
            Node { start: a as u32, len: (b - a) as u32 }
        }));
        // There are more leaves than nodes, so none is empty and every level has halves to prune.
        while self.nodes.iter().any(|x| x.len > 1) {
            self.halves.clear();
            for x in &self.nodes {
                let first = x.len / 2;
                if first > 0 {
                    self.halves.push(Node { start: x.start, len: first });
                }
                self.halves.push(Node { start: x.start + first, len: x.len - first });
            }
            self.keys.clear();
            for x in &self.halves {
                let at = lo + (x.start + x.len / 2) as usize * bk;
                for j in at..at + bk {
                    // Past the end of a short last block its last key stands in.
                    self.keys.extend_from_slice(p.k.row(j.min(hi - 1)));
                }
            }
            let rows = self.halves.len() * bk;
            if self.scores.len() < m * rows {
                self.scores.resize(m * rows, 0.0);
            }
            work.flops += abt(m, rows, d, p.scale, q, d, &self.keys, d, &mut self.scores);
            work.bytes += bytes(rows, d);
            self.best.clear();
            self.best.extend_from_slice(&self.scores[..rows]);
            for row in self.scores[rows..m * rows].chunks_exact(rows) {
                for (b, s) in self.best.iter_mut().zip(row) {
                    *b = b.max(*s);
                }
            }
            for i in 0..self.halves.len() {
                let x = self.best[i * bk..(i + 1) * bk].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                self.best[i] = x;
            }
            let best = &self.best;
            self.order.clear();
            self.order.extend(0..self.halves.len() as u32);
            self.order
                .select_nth_unstable_by(n - 1, |&i, &j| best[j as usize].total_cmp(&best[i as usize]).then(i.cmp(&j)));
            self.order.truncate(n);
            // Halves are in order of position, so sorted indices keep the nodes sorted.
            self.order.sort_unstable();
            self.nodes.clear();
            self.nodes.extend(self.order.iter().map(|&i| self.halves[i as usize]));
        }
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "hip-attention",
    title: "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned Attention",
    authors: "Lee et al., 2024",
    arxiv: "2406.09827",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalInBlocks("block_size_q"),
        Law::ExactAt(&[("k", "1000000000")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::LogLinear },
        Law::Monotone { param: "k", values: &["16", "64", "256", "512", "1000000"] },
    ],
    equation: "nodes: n = k/block_size_k equal runs of key blocks between the sinks and the window\n\
               until all are one block: halve each node; s(half) = max over queries of the block and keys of\n\
               the half's middle block of q·k; keep the n best halves\n\
               visit the n blocks, the first `sinks` keys and the last `window` keys",
    cost: "4·k·D·log2(T/k)/block_stride_q flops a query for the search; k + window + sinks keys a query; O(k) memory",
    choices: &[
        "The representative is the node's middle block, the paper's and the code's default; the halves are scored \
         afresh at each level.",
        "The authors search up to (end of block - window - sinks), which overlaps the windows of the block's earlier \
         queries and masks the overlap; here the search stops where the first query's window begins, so no key is \
         found twice, and every query of the block may use the whole union.",
        "Sampled queries are counted from the block's last one, so that a shorter last block keeps its last query.",
        "dense_layers is 0 by default so that one call on raw tensors shows the method; the paper keeps 3 dense layers \
         (dense_layers=3, or a plan rule).",
        "The list is visited as single keys (gathered once per query block), not as blocks of block_size_k.",
    ],
    params: params_of::<HipAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<HipAttention>(CARD.id, params)?)))
}
