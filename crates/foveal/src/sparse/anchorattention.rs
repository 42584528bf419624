//! AnchorAttention: difference-aware stripes (Zhang et al. 2025, arXiv 2505.23520).
//!
//! The largest score of a query almost always lies among the first keys or near the query. For
//! query t, the anchor x_t = max over initial and local keys of scale · q_t·k. Queries form blocks,
//! `step` blocks form a group. With q̄ and x̄ the means over block b,
//! key j between the initial keys and the group is visited by the whole group where
//! x̄_b − scale · q̄_b·k_j ≤ theta for any block b of the group.
//! The group also visits the initial keys and, causally, its own keys.
//!
//! q (Tq, D), k (Tk, D) → blocks for the initial and local keys, single keys for the stripes.
//! Cost: the anchors 2·D·(initial + step·block_size/2) flops a query, the stripes
//! 2·D·T/(2·block_size) a query; extra memory: the keys in the precision of the estimate.

use super::estimate::{bytes, hide};
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::prim::gemm::{self, Columns, Rows};
use crate::prim::pool::column_max;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadKeys, HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnchorAttention {
    /// Queries and keys per block.
    pub block_size: usize,
    /// Query blocks per group; a group shares its stripes and its local keys.
    pub step: usize,
    /// Largest difference from the anchor at which a key is visited, in logits.
    pub theta: f32,
    /// Initial key blocks.
    pub init_blocks: usize,
}

impl Default for AnchorAttention {
    fn default() -> Self {
        Self { block_size: 128, step: 4, theta: 12.0, init_blocks: 1 }
    }
}

impl Config for AnchorAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "queries and keys per block; queries are averaged over a block"),
        ("step", "query blocks per group; a group shares its stripes and its local keys"),
        ("theta", "largest difference from the anchor, in logits, at which a key is visited"),
        ("init_blocks", "initial key blocks, always visited"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 || self.step == 0 {
            return Err(format!("block_size = {}, step = {}: use at least 1", self.block_size, self.step));
        }
        if self.theta.is_nan() {
            return Err("theta is not a number: use a difference of logits such as 12".into());
        }
        Ok(())
    }
}

impl Selector for AnchorAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (b, group) = (self.block_size, self.block_size.saturating_mul(self.step));
        let (tq, d, off) = (p.q.rows, p.q.cols, p.offset());
        let mut sides: Option<(Rows, Columns, Columns)> = None;
        let mut work = Work::default();
        let mut table = HeadTable { block_q: group, block_k: b, indptr: vec![0], blocks: Vec::new(), rows: None };
        let mut lists = HeadKeys { group, indptr: vec![0], keys: Vec::new() };
        let mut scores: Vec<f32> = Vec::new();
        let mut top: Vec<f32> = Vec::new();
        let mut pooled: Vec<f32> = Vec::new();
        let mut anchors: Vec<f32> = Vec::new();
        for g0 in (0..tq).step_by(group) {
            let g1 = g0.saturating_add(group).min(tq);
            // Local keys start at the block that holds the group's first position.
            let local = (off + g0) / b;
            let init = self.init_blocks.min(local);
            let (init_end, local_start) = (init * b, local * b);
            table.blocks.extend((0..init as u32).chain(local as u32..((off + g1 - 1) / b + 1) as u32));
            table.indptr.push(table.blocks.len());
            // Without keys in between there is nothing to find, hence no anchor to compute.
            let search = local_start > init_end;
            pooled.clear();
            anchors.clear();
            for r0 in (g0..g1).step_by(b).take_while(|_| search) {
                let r1 = (r0 + b).min(g1);
                let rows = r1 - r0;
                let (keys, q, _) = sides.get_or_insert_with(|| {
                    let columns = |n| Columns::new(n, 1, d, p.scale, p.precision);
                    (Rows::of(&p.k, 1, p.precision), columns(b), columns(self.step.min(tq.div_ceil(b))))
                });
                q.fill(rows, |i, _| Some(p.q.row(r0 + i)));
                top.clear();
                top.resize(q.stride(), f32::NEG_INFINITY);
                // The first query sees keys before `own`; of the rest each query sees one more.
                let (own, end) = (off + r0 + 1, off + r1);
                for (from, to) in [(0, init_end), (local_start, own), (own, end)] {
                    for j in (from..to).step_by(KEYS) {
                        let n = KEYS.min(to - j);
                        work.flops += gemm::scores(keys, j..j + n, q, &mut scores);
                        let scores = &mut scores[..n * q.stride()];
                        if from == own {
                            hide(scores, q.stride(), rows, |i| (own + i).saturating_sub(j));
                        }
                        column_max(scores, &mut top);
                    }
                    work.bytes += bytes(to - from, d);
                }
                work.bytes += bytes(rows, d);
                let anchor: f32 = top[..rows].iter().sum();
                anchors.push(anchor / rows as f32);
                let at = pooled.len();
                pooled.resize(at + d, 0.0);
                for r in r0..r1 {
                    for (x, y) in pooled[at..].iter_mut().zip(p.q.row(r)) {
                        *x += y;
                    }
                }
                pooled[at..].iter_mut().for_each(|x| *x /= rows as f32);
                work.flops += (rows + (rows + 1) * d) as u64;
            }
            if search && let Some((keys, _, q)) = &mut sides {
                q.fill(anchors.len(), |i, _| Some(&pooled[i * d..(i + 1) * d]));
                anchors.iter_mut().for_each(|x| *x -= self.theta);
                for j in (init_end..local_start).step_by(KEYS) {
                    let n = KEYS.min(local_start - j);
                    work.flops += gemm::scores(keys, j..j + n, q, &mut scores);
                    for (j, row) in (j as u32..).zip(scores[..n * q.stride()].chunks_exact(q.stride())) {
                        if row.iter().zip(&anchors).fold(false, |hit, (s, least)| hit | (s >= least)) {
                            lists.keys.push(j);
                        }
                    }
                }
                work.bytes += bytes(local_start - init_end, d);
                work.flops += anchors.len() as u64;
            }
            lists.indptr.push(lists.keys.len());
        }
        Ok((HeadSelection::of_both(table, lists), work))
    }
}

/// Keys scored by one product, so that the scores stay in cache.
const KEYS: usize = 256;

/// Card.
pub const CARD: Card = Card {
    id: "anchorattention",
    title: "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
    authors: "Zhang et al., 2025",
    arxiv: "2505.23520",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("theta", "1000000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "theta", values: &["-20", "0", "3", "6", "12", "1000000"] },
    ],
    equation: "anchor x_t = max over initial and local keys of scale·q_t·k\n\
               key j is a stripe of the group if any of its query blocks b has mean x - scale·mean(q)·k_j <= theta\n\
               the group visits initial blocks, its own keys (causally) and its stripes",
    cost: "anchors 2·D·(init + step·block_size/2) a query, stripes T·D/block_size a query; O(step·T) extra memory",
    choices: &[
        "step is 4 here and 16 in the paper: a group of 16 · 128 keys is itself a quarter of an 8k prompt. theta and \
         block_size are the paper's.",
        "Local keys are those of the group itself, from its first position, as in the authors' code: at most \
         step·block_size.",
        "The authors' code also leaves out the block just before a group (its stripe range ends one block early, and \
         the local range does not reach it); here stripes are looked for up to the group.",
        "A key exactly at distance theta is visited, as in the paper.",
        "Selection looks at a group of step·block_size queries as a whole, so outputs are causal in units of a group.",
        "The authors' code runs a remainder of fewer than step·block_size queries densely; here it is a shorter group.",
        "The kernel of the paper reuses the anchor's scores for the output; here the exact part computes them again, \
         and the anchor's work is counted as the estimator's.",
    ],
    params: params_of::<AnchorAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<AnchorAttention>(CARD.id, params)?)))
}
