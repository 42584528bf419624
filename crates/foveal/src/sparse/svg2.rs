//! Sparse VideoGen2: attention between clusters of queries and of keys (Yang et al. 2025, arXiv 2505.18875).
//!
//! k-means on the queries of a head gives centres c^q, on its keys centres c^k and sizes n_j. The attention of query
//! cluster i on key cluster j is estimated as P_ij = n_j·exp(scale·c^q_i·c^k_j) / Σ_l n_l·exp(scale·c^q_i·c^k_l).
//! Every query of cluster i visits the fewest key clusters, heaviest first, whose P reaches `top_p`, and at least
//! `min_kc_ratio` of all.
//!
//! q (Tq, D), k (Tk, D) → single keys, with queries and keys in the order of their clusters: a group of queries
//! holds one cluster only, and the keys that it visits are few long runs. Cost: 2·D·(Tq·C_q + Tk·C_k) flops a round
//! of k-means, 2·D·C_q·C_k for P; memory for the centres and the lists.

use super::estimate::{SOFTMAX_FLOPS, bytes};
use super::{Domain, HeadProblem, HeadSelection, Selector, TokenOrder};
use crate::error::Result;
use crate::prim::cluster::{Clusters, kmeans, spread_centres};
use crate::prim::gemm::abt;
use crate::prim::select::{topk, topp};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadKeys, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Svg2 {
    /// Clusters of queries.
    pub q_clusters: usize,
    /// Clusters of keys.
    pub k_clusters: usize,
    /// Share of the estimated attention that the visited clusters hold.
    pub top_p: f32,
    /// Least share of the key clusters that a query visits.
    pub min_kc_ratio: f64,
    /// Rounds of k-means.
    pub iterations: usize,
    /// Queries that the kernel visits together.
    pub group: usize,
}

impl Default for Svg2 {
    fn default() -> Self {
        Self { q_clusters: 100, k_clusters: 500, top_p: 0.9, min_kc_ratio: 0.1, iterations: 10, group: 32 }
    }
}

impl Config for Svg2 {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("q_clusters", "clusters of queries, at most one a query"),
        ("k_clusters", "clusters of keys, at most one a key"),
        ("top_p", "share of the estimated attention that the visited clusters hold, 0 to 1; 1 is exact"),
        ("min_kc_ratio", "least share of the key clusters that a query visits, 0 to 1"),
        ("iterations", "rounds of k-means: few from the centres of the step before, more from none"),
        ("group", "queries that the kernel visits together: changes the cost, never the result"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        for (name, x) in [
            ("q_clusters", self.q_clusters),
            ("k_clusters", self.k_clusters),
            ("iterations", self.iterations),
            ("group", self.group),
        ] {
            if x == 0 {
                return Err(format!("{name} = 0: use at least 1"));
            }
        }
        for (name, x) in [("top_p", f64::from(self.top_p)), ("min_kc_ratio", self.min_kc_ratio)] {
            if !(0.0..=1.0).contains(&x) {
                return Err(format!("{name} = {x}: use a share from 0 to 1"));
            }
        }
        Ok(())
    }
}

/// Centres of a head, from which the next denoising step starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Centres {
    /// Of queries, (C_q, D).
    pub q: Vec<f32>,
    /// Of keys, (C_k, D).
    pub k: Vec<f32>,
}

impl Svg2 {
    /// The selection, its work, and the centres found: k-means starts from `warm`, those of the step before.
    pub fn step(&self, p: &HeadProblem, warm: Option<&Centres>) -> Result<(HeadSelection, Work, Centres)> {
        let d = p.q.cols;
        let start = |x, n, warm: Option<&Vec<f32>>| match warm {
            Some(c) if !c.is_empty() && c.len().is_multiple_of(d.max(1)) => c.clone(),
            _ => spread_centres(x, n),
        };
        let q = kmeans(&p.q, start(&p.q, self.q_clusters, warm.map(|w| &w.q)), self.iterations);
        let k = kmeans(&p.k, start(&p.k, self.k_clusters, warm.map(|w| &w.k)), self.iterations);
        let (nq, nk) = (q.len(), k.len());
        let mut work = Work { flops: q.flops + k.flops, ..Work::default() };
        work.bytes += q.rounds as u64 * (bytes(p.q.rows, d) + bytes(nq, d));
        work.bytes += k.rounds as u64 * (bytes(p.k.rows, d) + bytes(nk, d));
        let mut mass = vec![0f32; nq * nk];
        work.flops += abt(nq, nk, d, p.scale, &q.centres, d, &k.centres, d, &mut mass);
        work.flops += ((SOFTMAX_FLOPS + 1) * nq * nk) as u64;
        work.bytes += bytes(nq + nk, d);
        let least = (self.min_kc_ratio * nk as f64) as usize;
        let chosen = mass.chunks_exact_mut(nk.max(1)).map(|row| {
            let top = row.iter().zip(&k.sizes).filter(|(_, n)| **n > 0).fold(f32::NEG_INFINITY, |m, (x, _)| m.max(*x));
            row.iter_mut().zip(&k.sizes).for_each(|(x, &n)| *x = if n > 0 { n as f32 * (*x - top).exp() } else { 0.0 });
            let mass = topp(row, self.top_p);
            if mass.len() < least { topk(row, least) } else { mass }
        });
        let selection = clustered(&q, &k, chosen, self.group)?;
        Ok((selection, work, Centres { q: q.centres, k: k.centres }))
    }
}

/// Every query of cluster i visits the keys of the clusters that the i-th item names, ascending.
fn clustered(
    q: &Clusters,
    k: &Clusters,
    chosen: impl Iterator<Item = Vec<u32>>,
    group: usize,
) -> Result<HeadSelection> {
    let mut first = vec![0u32];
    first.extend(k.sizes.iter().scan(0, |at, &n| {
        *at += n;
        Some(*at)
    }));
    let mut at = Vec::with_capacity(q.labels.len() + q.len() * group);
    let mut lists = HeadKeys { group, indptr: vec![0], keys: Vec::new() };
    for (members, clusters) in q.members().into_iter().zip(chosen) {
        let groups = members.len().div_ceil(group);
        at.extend(members);
        at.resize(at.len().next_multiple_of(group), TokenOrder::NONE);
        for _ in 0..groups {
            lists.keys.extend(clusters.iter().flat_map(|&c| first[c as usize]..first[c as usize + 1]));
            lists.indptr.push(lists.keys.len());
        }
    }
    let keys = TokenOrder::new(k.members().concat())?;
    Ok(HeadSelection::of_keys(lists).in_order(Some(TokenOrder::new(at)?), Some(keys)))
}

impl Selector for Svg2 {
    fn domain(&self) -> Domain {
        Domain::FULL
    }

    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        if self.top_p >= 1.0 {
            return Ok((HeadSelection::dense(p), Work::default()));
        }
        self.step(p, None).map(|(s, w, _)| (s, w))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "svg2",
    title: "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
    authors: "Yang et al., 2025",
    arxiv: "2505.18875",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::ExactAt(&[("top_p", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "top_p", values: &["0", "0.3", "0.6", "0.9", "0.99"] },
        Law::Monotone { param: "min_kc_ratio", values: &["0", "0.1", "0.5", "1"] },
    ],
    equation: "c^q, c^k: k-means centres of queries and of keys; n_j keys in cluster j\n\
               P_ij = n_j·exp(scale·c^q_i·c^k_j) / sum_l n_l·exp(scale·c^q_i·c^k_l)\n\
               cluster i visits the heaviest key clusters until sum P_ij >= top_p",
    cost: "k-means 2·D·(Tq·q_clusters + Tk·k_clusters) flops a round; attention quadratic at the density that top_p leaves",
    choices: &[
        "100 and 500 clusters, top_p 0.9 and at least 0.1 of the key clusters are the paper's setting for video of some 100,000 tokens; \
         with fewer tokens fewer clusters are as good.",
        "The authors start k-means at random tokens; here it starts at evenly spaced ones, so that the same input gives the same answer.",
        "They run 50 rounds at the first denoising step and 2 from the centres of the step before at each later one. A selector keeps \
         nothing between calls: `select` starts anew with 10 rounds, `Svg2::step` takes and returns centres for those who have steps.",
        "The P of the published code: sizes weigh the keys, and clusters are kept up to and with the one that passes top_p.",
        "Clusters of queries are padded to whole groups with places that hold no query, so that every query visits exactly what its \
         own cluster chose. Those places cost work too and count in it: clusters of fewer queries than a group are a waste, as 100 are \
         below some 5,000 tokens.",
        "On the made video of the grid_quality example (4x24x24 tokens): 95.2% of the attention on 23% of the pairs, where the best \
         choice of as many keys holds 96.3%; but 2,304 tokens are too few for 600 centres, the estimate costs as much as the attention.",
    ],
    params: params_of::<Svg2>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Svg2>(CARD.id, params)?)))
}
