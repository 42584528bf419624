//! Routing transformer: content-based attention by clusters (Roy et al. 2020, arXiv 2003.05997), used training-free.
//!
//! `clusters` centroids μ_c are found by spherical k-means on the prompt's keys. Each centroid takes the
//! w = ⌈T/clusters⌉ queries and the w keys that are nearest to it, so that clusters are balanced, and its queries
//! attend to its keys, causally. Every query also attends to the `local` keys up to its block.
//!
//! q (Tq, D), k (Tk, D) → a table of `block_q` queries by single keys with one bit per query. Cost:
//! 2·T·clusters·D for every iteration and for routing, w keys a query and cluster; at clusters = √T both are T^1.5.

use super::estimate::bytes;
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::Result;
use crate::prim::gemm::abt;
use crate::prim::pool::mean_blocks;
use crate::prim::select::topk_into;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoutingTransformer {
    /// Clusters; 0 is the root of the number of keys.
    pub clusters: usize,
    /// Iterations of k-means; 0 leaves the centroids at keys evenly spaced over the prompt.
    pub iterations: usize,
    /// Keys that every query attends to besides its clusters.
    pub local: usize,
    /// First keys that every query attends to.
    pub sinks: usize,
    /// Queries that the kernel visits together.
    pub block_q: usize,
}

impl Default for RoutingTransformer {
    fn default() -> Self {
        Self { clusters: 16, iterations: 10, local: 256, sinks: 0, block_q: 16 }
    }
}

impl Config for RoutingTransformer {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("clusters", "clusters, each of T/clusters queries and as many keys; 0 = the root of T; 1 is exact"),
        ("iterations", "iterations of k-means; 0 leaves the centroids at keys evenly spaced over the prompt"),
        (
            "local",
            "keys up to a block's first query, its own included, that its queries attend to besides their clusters",
        ),
        (
            "sinks",
            "first keys that every query attends to besides; not in the paper (0), for models that were not trained with it",
        ),
        ("block_q", "queries that the kernel visits together, 1 to 64"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.local == 0 {
            return Err("local = 0: use at least 1, so that every query sees itself".into());
        }
        if !(1..=64).contains(&self.block_q) {
            return Err(format!("block_q = {}: use 1 to 64, one bit a query", self.block_q));
        }
        Ok(())
    }
}

/// Rows less `mean`, at length 1 (a row of zeros stays).
fn directions(m: &Mat, mean: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(m.rows * m.cols);
    for i in 0..m.rows {
        let at = out.len();
        out.extend(m.row(i).iter().zip(mean).map(|(x, m)| x - m));
        normalise(&mut out[at..]);
    }
    out
}

fn normalise(x: &mut [f32]) {
    let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt();
    if norm > 0.0 {
        x.iter_mut().for_each(|x| *x /= norm);
    }
}

/// Spherical k-means of rows of length 1: `n` centroids of length 1, begun at evenly spaced rows. Returns the work.
fn centroids(x: &[f32], d: usize, n: usize, iterations: usize) -> (Vec<f32>, Work) {
    let rows = x.len() / d.max(1);
    let mut work = Work::default();
    let mut means: Vec<f32> = (0..n).flat_map(|c| x[(2 * c + 1) * rows / (2 * n) * d..][..d].iter().copied()).collect();
    let mut near = vec![0f32; ROWS * n];
    for _ in 0..iterations {
        let mut sums = vec![0f32; n * d];
        let mut counts = vec![0usize; n];
        for r0 in (0..rows).step_by(ROWS) {
            let m = ROWS.min(rows - r0);
            work.flops += abt(m, n, d, 1.0, &x[r0 * d..], d, &means, d, &mut near);
            work.bytes += bytes(m + n, d);
            for (row, near) in x[r0 * d..(r0 + m) * d].chunks_exact(d).zip(near.chunks_exact(n)) {
                // The first of the nearest.
                let c = (1..n).fold(0, |best, c| if near[c] > near[best] { c } else { best });
                counts[c] += 1;
                sums[c * d..(c + 1) * d].iter_mut().zip(row).for_each(|(s, x)| *s += x);
            }
        }
        work.flops += ((rows + 3 * n) * d) as u64;
        for (c, count) in counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            debug_assert!(*count <= rows);
            let sum = &mut sums[c * d..(c + 1) * d];
            normalise(sum);
            means[c * d..(c + 1) * d].copy_from_slice(sum);
        }
    }
    (means, work)
}

/// Rows compared with the centroids by one product.
const ROWS: usize = 256;

/// The `w` rows of `x` nearest to each centroid, ascending. Returns the work.
fn members(means: &[f32], x: &[f32], d: usize, w: usize) -> (Vec<Vec<u32>>, Work) {
    let (n, rows) = (means.len() / d.max(1), x.len() / d.max(1));
    let mut near = vec![0f32; n * rows];
    let flops = abt(n, rows, d, 1.0, means, d, x, d, &mut near);
    let mut ranks = Vec::new();
    let lists = near.chunks_exact(rows.max(1)).map(|near| {
        let mut list = Vec::new();
        topk_into(near, w, &mut ranks, &mut list);
        list
    });
    (lists.collect(), Work { flops, bytes: bytes(n + rows, d), ..Work::default() })
}

impl Selector for RoutingTransformer {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let bq = self.block_q;
        let (tq, tk, d, off) = (p.q.rows, p.k.rows, p.q.cols, p.offset());
        let n = match self.clusters {
            0 => (tk as f64).sqrt().round() as usize,
            n => n,
        }
        .clamp(1, tk.max(1));
        if tq == 0 || n == 1 {
            return Ok((HeadSelection::dense(p), Work::default()));
        }
        // What all keys share shifts the scores of a query alike, and would make all centroids alike.
        let mean = mean_blocks(&p.k, tk);
        let keys = directions(&p.k, &mean);
        let queries = directions(&p.q, &vec![0.0; d]);
        let mut work = Work { flops: ((5 * tk + 4 * tq) * d) as u64, bytes: bytes(2 * tk + tq, d), ..Work::default() };
        let (means, w) = centroids(&keys, d, n, self.iterations);
        work += w;
        let (of_keys, w) = members(&means, &keys, d, tk.div_ceil(n));
        work += w;
        let (of_queries, w) = members(&means, &queries, d, tq.div_ceil(n));
        work += w;
        let mut table =
            HeadTable { block_q: bq, block_k: 1, indptr: vec![0], blocks: Vec::new(), rows: Some(Vec::new()) };
        let mut bits = vec![0u64; tk];
        let mut next = vec![0usize; n];
        for r0 in (0..tq).step_by(bq) {
            let r1 = (r0 + bq).min(tq);
            let end = off + r1;
            for ((next, queries), keys) in next.iter_mut().zip(&of_queries).zip(&of_keys) {
                let mut rows = 0u64;
                while let Some(&r) = queries.get(*next).filter(|&&r| (r as usize) < r1) {
                    rows |= 1 << (r as usize - r0);
                    *next += 1;
                }
                if rows != 0 {
                    let seen = keys.partition_point(|&j| (j as usize) < end);
                    keys[..seen].iter().for_each(|&j| bits[j as usize] |= rows);
                }
            }
            let all = u64::MAX >> (64 - (r1 - r0));
            bits[(off + r0 + 1).saturating_sub(self.local)..end].fill(all);
            bits[..self.sinks.min(end)].fill(all);
            for (j, rows) in bits[..end].iter_mut().enumerate().filter(|(_, rows)| **rows != 0) {
                table.blocks.push(j as u32);
                table.rows.get_or_insert_default().push(std::mem::take(rows));
            }
            table.indptr.push(table.blocks.len());
        }
        Ok((HeadSelection::of_blocks(table), work))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "routing-transformer",
    title: "Efficient Content-Based Sparse Attention with Routing Transformers",
    authors: "Roy et al., 2020",
    arxiv: "2003.05997",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("clusters", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "local", values: &["1", "64", "256", "512", "1000000"] },
    ],
    equation: "centroids: spherical k-means of the keys (less their mean)\n\
               cluster c: the T/clusters queries and the T/clusters keys of largest product with its centroid\n\
               a query attends to the earlier keys of its clusters and to the local keys",
    cost: "k-means 2·iterations·T·clusters·D, routing 4·T·clusters·D, T/clusters keys per query and cluster",
    choices: &[
        "In the paper centroids follow all tokens of training as an exponential moving average. A pretrained softmax model \
         has none, so they are found on this prompt's keys: k-means from evenly spaced keys, 10 iterations as the public \
         implementation starts with, the same for the same prompt. iterations=0 is the control: centroids at keys as they come.",
        "The paper shares one normalised vector for query and key; here both are the model's own and only routing looks at \
         directions. Keys lose their mean first: it changes no softmax, and without it all of a pretrained model's keys \
         point one way.",
        "A query may be in several clusters, or in none. Its clusters' keys are one set under one softmax; the public \
         implementation averages the clusters' outputs instead.",
        "The paper gives part of the heads local attention instead of routing; here every head has a local window, without \
         which a query in no cluster would see nothing. Heads of their own kind are what a plan's rules express.",
        "Membership looks at the whole prompt, later tokens included: only the mask is promised causal.",
        "Queries are not regrouped by cluster: neighbouring queries share a tile with one bit a query, so a tile computes the \
         keys of all clusters of its queries, which `pairs` counts.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.92, default 19.9, for want of the first keys; sinks=16 7.99 with 35% \
         of the pairs computed, clusters=8,sinks=16 8.06, iterations=0,sinks=16 7.80. 8,192 tokens: dense 8.05, \
         iterations=0,sinks=16 10.7 with 23%. Used without training it loses, and k-means is no better than its control.",
    ],
    params: params_of::<RoutingTransformer>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<RoutingTransformer>(CARD.id, params)?)))
}
