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
//! block_stride_q flops a query for the search (or 2·T·D/block_stride_q while that is less than
//! twice as much: all is scored once, which needs no gathering), O(T log T) in all; k + window + sinks keys a
//! query; O(k) extra memory and the keys in the precision of the estimate.

use super::estimate::bytes;
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::prim::gemm::{self, Columns, Rows};
use crate::prim::pool::group_max;
use crate::prim::select::topk_into;
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
        Self { k: 512, block_size_q: 64, block_stride_q: 2, block_size_k: 2, window: 256, sinks: 16, dense_layers: 3 }
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
        ("dense_layers", "layers of a model, from the first, that stay dense"),
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

impl Node {
    /// The key block that stands for all.
    fn middle(&self) -> usize {
        (self.start + self.len / 2) as usize
    }
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
        let mut tree: Option<Tree> = None;
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
                let tree = tree.get_or_insert_with(|| Tree::new(p, self));
                // The last query of the block scores in any case: it is the one whose answer
                // a generation needs. It stands in for what the last tile of queries lacks.
                let m = (r1 - r0).div_ceil(self.block_stride_q);
                tree.queries.fill(m.next_multiple_of(LANES), |i, _| {
                    Some(p.q.row(r1 - 1 - if i < m { i * self.block_stride_q } else { 0 }))
                });
                work.bytes += bytes(m, d);
                tree.search(far, near, self, &mut work);
                for x in &tree.nodes {
                    let lo = far + x.start as usize * self.block_size_k;
                    lists.keys.extend(lo as u32..(lo + self.block_size_k).min(near) as u32);
                }
            }
            lists.keys.extend(near as u32..end as u32);
            lists.indptr.push(lists.keys.len());
        }
        Ok((HeadSelection::of_keys(lists), work))
    }
}

/// Queries come in multiples of this: what a product has to offer anyway.
const LANES: usize = 32;
/// Halves scored by one product, whose scores then stay in cache.
const HALVES: usize = 128;

/// One head's keys and the buffers of its searches.
struct Tree<'a> {
    keys: Rows<'a>,
    /// Representatives of some halves.
    some: Rows<'static>,
    queries: Columns,
    /// Scores of all key blocks, where they are taken at once.
    table: Vec<f32>,
    nodes: Vec<Node>,
    halves: Vec<Node>,
    scores: Vec<f32>,
    best: Vec<f32>,
    ranks: Vec<u32>,
    order: Vec<u32>,
}

impl<'a> Tree<'a> {
    fn new(p: &HeadProblem<'a>, c: &HipAttention) -> Self {
        let d = p.k.cols;
        let queries = c.block_size_q.div_ceil(c.block_stride_q).next_multiple_of(LANES);
        Self {
            keys: Rows::of(&p.k, 1, p.precision),
            some: Rows::zeros(HALVES * c.block_size_k, d, p.precision),
            queries: Columns::new(queries, 1, d, p.scale, p.precision),
            table: Vec::new(),
            nodes: Vec::new(),
            halves: Vec::new(),
            scores: Vec::new(),
            best: Vec::new(),
            ranks: Vec::new(),
            order: Vec::new(),
        }
    }

    /// Leave in `nodes` the key blocks found in keys `lo..hi`, ascending.
    fn search(&mut self, lo: usize, hi: usize, c: &HipAttention, work: &mut Work) {
        let (bk, n) = (c.block_size_k, c.k / c.block_size_k);
        let leaves = (hi - lo).div_ceil(bk);
        self.nodes.clear();
        self.nodes.extend((0..n).map(|i| {
            let (a, b) = (leaves * i / n, leaves * (i + 1) / n);
            Node { start: a as u32, len: (b - a) as u32 }
        }));
        // Keys as they lie cost less than half of keys picked one by one. Where the levels together
        // would look at half of the leaves, all are scored once and the levels look the scores up.
        let longest = leaves.div_ceil(n);
        let levels = (usize::BITS - (longest - 1).leading_zeros()) as usize;
        let once = leaves <= 2 * (levels * 2 * n);
        if once {
            self.score_all(lo, hi, bk, work);
        }
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
            if once {
                self.best.clear();
                self.best.extend(self.halves.iter().map(|x| self.table[x.middle()]));
            } else {
                self.score_halves(lo, hi, bk, work);
            }
            // Halves are in order of position, and so are the indices of the best.
            topk_into(&self.best, n, &mut self.ranks, &mut self.order);
            self.nodes.clear();
            self.nodes.extend(self.order.iter().map(|&i| self.halves[i as usize]));
        }
    }

    /// Fill `table` with the score of every key block of keys `lo..hi`.
    fn score_all(&mut self, lo: usize, hi: usize, bk: usize, work: &mut Work) {
        let (whole, stride) = ((hi - lo) / bk, self.queries.stride());
        self.table.resize((hi - lo).div_ceil(bk), 0.0);
        for (i, best) in self.table[..whole].chunks_mut(HALVES).enumerate() {
            let at = lo + i * HALVES * bk;
            work.flops += gemm::scores(&self.keys, at..at + best.len() * bk, &self.queries, &mut self.scores);
            group_max(&self.scores, stride, bk, best);
        }
        let at = lo + whole * bk;
        if at < hi {
            work.flops += gemm::scores(&self.keys, at..hi, &self.queries, &mut self.scores);
            group_max(&self.scores, stride, hi - at, &mut self.table[whole..]);
        }
        work.bytes += bytes(hi - lo, self.keys.width());
    }

    /// Fill `best` with the score of each half's middle block.
    fn score_halves(&mut self, lo: usize, hi: usize, bk: usize, work: &mut Work) {
        self.best.resize(self.halves.len(), 0.0);
        for (halves, best) in self.halves.chunks(HALVES).zip(self.best.chunks_mut(HALVES)) {
            for (i, x) in halves.iter().enumerate() {
                let at = lo + x.middle() * bk;
                let whole = bk.min(hi - at);
                self.some.copy(i * bk, &self.keys, at..at + whole);
                // Past the end of a short last block its last key stands in.
                (whole..bk).for_each(|j| self.some.copy(i * bk + j, &self.keys, hi - 1..hi));
            }
            let rows = halves.len() * bk;
            work.flops += gemm::scores(&self.some, 0..rows, &self.queries, &mut self.scores);
            work.bytes += bytes(rows, self.keys.width());
            group_max(&self.scores, self.queries.stride(), bk, best);
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
        "The first 3 layers stay dense, as in the paper. Raw tensors (foveal apply) belong to no layer: there the method \
         itself runs.",
        "Where the levels of the tree would look at half of the past or more (up to 8k tokens at the default k), every \
         block of it is scored once and the levels look the scores up: the same choice, cheaper than gathering keys.",
        "The list is visited as single keys (gathered once per query block), not as blocks of block_size_k.",
    ],
    params: params_of::<HipAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<HipAttention>(CARD.id, params)?)))
}
