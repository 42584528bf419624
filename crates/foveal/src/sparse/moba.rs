//! MoBA: mixture of block attention (Lu et al. 2025, arXiv 2502.13189), used training-free.
//!
//! Keys form blocks of `block_size`; k̄_b is the mean of block b. The query at position t scores
//! every complete block of its past, g_b = q_t · k̄_b, and attends to the `topk` − 1 best of them
//! and, causally, to its own block, and to the first `sink_blocks` (ours; 0).
//!
//! q (Tq, D), k (Tk, D) → a table of `block_q` queries by `block_size` keys with one bit per
//! query, so that each query sees exactly its own choice. Cost: T·D for the means,
//! 2·T·(T/(2·block_size))·D for the gate, topk·block_size keys per query.

use super::estimate::bytes;
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::Result;
use crate::prim::gemm::abt;
use crate::prim::pool::mean_blocks;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Moba {
    /// Keys per block.
    pub block_size: usize,
    /// Blocks per query, its own included.
    pub topk: usize,
    /// First blocks that every query attends to besides, wherever their gate ranks.
    pub sink_blocks: usize,
    /// Queries that the kernel visits together.
    pub block_q: usize,
}

impl Default for Moba {
    fn default() -> Self {
        Self { block_size: 512, topk: 3, sink_blocks: 0, block_q: 16 }
    }
}

impl Config for Moba {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "keys per block"),
        ("topk", "blocks that each query attends to, its own included"),
        (
            "sink_blocks",
            "first blocks that every query attends to besides its topk; not in the paper (0), for models that were not trained with MoBA",
        ),
        ("block_q", "queries that the kernel visits together, 1 to 64: changes the cost, never the result"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 || self.topk == 0 {
            return Err(format!("block_size = {}, topk = {}: use at least 1", self.block_size, self.topk));
        }
        if !(1..=64).contains(&self.block_q) {
            return Err(format!("block_q = {}: use 1 to 64, one bit a query", self.block_q));
        }
        Ok(())
    }
}

impl Selector for Moba {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (b, bq, off) = (self.block_size, self.block_q, p.offset());
        let (tq, d) = (p.q.rows, p.q.cols);
        let mut work = Work::default();
        // Only blocks that are complete and wholly past can be chosen by their mean.
        let past = (off + tq).saturating_sub(1) / b;
        let means = mean_blocks(&Mat::new(p.k.data(), past * b, d, p.k.stride), b);
        work.flops += (past * (b + 1) * d) as u64;
        work.bytes += bytes(past * b, d);
        let mut gate = vec![0f32; GATE_ROWS * past];
        let mut order: Vec<u32> = Vec::with_capacity(past);
        let mut bits = vec![0u64; past + 1];
        let mut table =
            HeadTable { block_q: bq, block_k: b, indptr: vec![0], blocks: Vec::new(), rows: Some(Vec::new()) };
        let mut gated = 0..0;
        let mut width = 0;
        for r0 in (0..tq).step_by(bq) {
            let r1 = (r0 + bq).min(tq);
            for r in r0..r1 {
                let own = (off + r) / b;
                let sinks = self.sink_blocks.min(own);
                bits[own] |= 1 << (r - r0);
                bits[..sinks].iter_mut().for_each(|x| *x |= 1 << (r - r0));
                if own - sinks < self.topk {
                    bits[..own].iter_mut().for_each(|x| *x |= 1 << (r - r0));
                    continue;
                }
                if !gated.contains(&r) {
                    gated = r..(r + GATE_ROWS).min(tq);
                    width = (off + gated.end - 1) / b;
                    let q = &p.q.data()[r * p.q.stride..];
                    work.flops += abt(gated.len(), width, d, 1.0, q, p.q.stride, &means, d, &mut gate);
                    work.bytes += bytes(gated.len() + width, d);
                }
                let score = &gate[(r - gated.start) * width..][sinks..own];
                for &x in best(score, self.topk - 1, &mut order) {
                    bits[sinks + x as usize] |= 1 << (r - r0);
                }
            }
            let last = (off + r1 - 1) / b;
            for (x, rows) in bits[..=last].iter_mut().enumerate().filter(|(_, rows)| **rows != 0) {
                table.blocks.push(x as u32);
                table.rows.get_or_insert_default().push(std::mem::take(rows));
            }
            table.indptr.push(table.blocks.len());
        }
        Ok((HeadSelection::of_blocks(table), work))
    }
}

/// Queries gated by one product.
const GATE_ROWS: usize = 128;

/// The `n` largest entries; ties to the smaller index, NaN last. In no order.
fn best<'a>(x: &[f32], n: usize, order: &'a mut Vec<u32>) -> &'a [u32] {
    order.clear();
    if n == 0 {
        return order;
    }
    order.extend(0..x.len() as u32);
    if n < order.len() {
        let key = |i: u32| if x[i as usize].is_nan() { f32::NEG_INFINITY } else { x[i as usize] };
        order.select_nth_unstable_by(n - 1, |&i, &j| key(j).total_cmp(&key(i)).then(i.cmp(&j)));
        order.truncate(n);
    }
    order
}

/// Card.
pub const CARD: Card = Card {
    id: "moba",
    title: "MoBA: Mixture of Block Attention for Long-Context LLMs",
    authors: "Lu et al., 2025",
    arxiv: "2502.13189",
    family: Family::Sparse,
    slots: &[Slot::Prefill, Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("topk", "1000000000")]),
        Law::Gradients,
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "topk", values: &["1", "2", "3", "5", "9", "1000000"] },
    ],
    equation: "g_b = q_t · mean(K_b) for complete past blocks b\n\
               query t attends to the topk - 1 blocks of largest g_b and, causally, to its own block",
    cost: "T·D means, T²·D/block_size gate, topk·block_size keys per query; O(T) extra memory",
    choices: &[
        "topk counts the query's own block, as in the authors' code (the own block's gate is +infinity there).",
        "block_size 512 and topk 3 are the paper's setting for 8k tokens; its long-context models use larger blocks.",
        "MoBA is meant to be trained in (the authors say that it is no drop-in replacement, and keep the last layers dense; a plan's rules can); \
         here it runs on models that never saw it. What such a model misses is the first block: it is where attention \
         sinks, no gate finds it, and without it the softmax weighs what is left. sink_blocks=1 always visits it, which is not in the paper.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.95, default 14.5, sink_blocks=1 6.95; block_size=128,topk=3 23.1, with \
         sink_blocks=1 7.29. 8,192 tokens: dense 8.06, default 18.7, sink_blocks=1 8.52; block_size=128,topk=12 19.5, with \
         sink_blocks=1 8.37; block_size=64,topk=24 20.6, with sink_blocks=1 8.32; block_size=512,topk=6 20.2, with \
         sink_blocks=1 8.21. Neither smaller blocks nor more of them replace the first one. Recommended without training: \
         block_size=64,topk=24,sink_blocks=1.",
        "Queries are not regrouped by chosen block: neighbouring queries share a tile with one bit a query. The result \
         is the same, and `pairs` counts what the tiles really compute: linear in T only once a tile's queries have \
         chosen all different blocks, hence declared quadratic.",
    ],
    params: params_of::<Moba>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Moba>(CARD.id, params)?)))
}
