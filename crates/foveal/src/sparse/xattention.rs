//! XAttention: block-sparse attention with antidiagonal scoring (Xu et al. 2025, arXiv 2503.16428).
//!
//! With stride S, tile (i, j) of S queries by S keys is scored by its antidiagonal:
//! a(i, j) = scale/S · Σ_s q[iS + S−1−s] · k[jS + s]. P = causal softmax of a over j; the weight of
//! key block B for query block A is w(A, B) = Σ_{i∈A, j∈B} P(i, j). A visits block 0, its own
//! blocks and then the heaviest others until they hold `threshold` of Σ_B w(A, B).
//!
//! q (Tq, D), k (Tk, D) → a table of (block_size × block_size) blocks. Cost: T²·D/S flops for the
//! scores (1/(2S) of dense causal scores and values together), T²/(2S²) exponentials, memory
//! 32·T/S for two tiles of reshaped queries at a time, and the keys in the precision of the estimate.

use super::estimate::{SOFTMAX_FLOPS, bytes, hide};
use super::{HeadProblem, HeadSelection, Selector};
use crate::error::Result;
use crate::prim::gemm::{self, Columns, Rows};
use crate::prim::pool::{column_exp, column_max};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct XAttention {
    /// Queries and keys per block.
    pub block_size: usize,
    /// Side of the tiles of which one antidiagonal is scored.
    pub stride: usize,
    /// Share of the estimated attention that the visited blocks hold.
    pub threshold: f64,
}

impl Default for XAttention {
    fn default() -> Self {
        Self { block_size: 128, stride: 8, threshold: 0.9 }
    }
}

impl Config for XAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "queries and keys per block, a multiple of stride"),
        ("stride", "side of the tiles of which only the antidiagonal is scored; 8 or 16 in the paper"),
        ("threshold", "share of the estimated attention that the visited blocks hold, 0 to 1; 1 is exact"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.stride == 0 || self.block_size == 0 || !self.block_size.is_multiple_of(self.stride) {
            return Err(format!(
                "block_size = {}, stride = {}: block_size must be a positive multiple of stride, such as 128 and 8",
                self.block_size, self.stride
            ));
        }
        if !(0.0..=1.0).contains(&self.threshold) {
            return Err(format!("threshold = {}: use a share from 0 to 1", self.threshold));
        }
        Ok(())
    }
}

impl Selector for XAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (b, s) = (self.block_size, self.stride);
        let (tq, tk, d, off) = (p.q.rows, p.k.rows, p.q.cols, p.offset());
        let mut work = Work::default();
        if self.threshold >= 1.0 {
            let blocks = Some(HeadTable::dense_causal(b, b, tq, tk));
            return Ok((HeadSelection { blocks, ..HeadSelection::default() }, work));
        }
        // S consecutive key rows are one row of the reshaped keys; the queries of a few blocks,
        // reversed within each group of S, are the columns of one product.
        let k = Rows::of(&p.k, s, p.precision);
        let (groups, per) = (tk.div_ceil(s), b / s);
        let panel = (PANEL / per).max(1) * b;
        let mut q = Columns::new(panel / s, s, d, p.scale / s as f32, p.precision);
        let mut scores = Vec::new();
        let (mut top, mut sum, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut weight = vec![0f32; tk.div_ceil(b)];
        let mut order: Vec<u32> = Vec::with_capacity(weight.len());
        let mut lists = Vec::with_capacity(tq.div_ceil(b));
        for p0 in (0..tq).step_by(panel) {
            let p1 = (p0 + panel).min(tq);
            let m = (p1 - p0).div_ceil(s);
            q.fill(m, |i, t| {
                let r = p0 + i * s + s - 1 - t;
                (r < p1).then(|| p.q.row(r))
            });
            // A group of keys takes part once its last key is no later than the group of queries.
            let seen = |i: usize| ((off + p0 + i * s) / s + 1).min(groups);
            let n = seen(m - 1);
            work.flops += gemm::scores(&k, 0..n, &q, &mut scores);
            work.bytes += bytes(p1 - p0, d) + bytes((n * s).min(tk), d);
            let stride = q.stride();
            let scores = &mut scores[..n * stride];
            hide(scores, stride, m, seen);
            refill(&mut top, stride, f32::NEG_INFINITY);
            column_max(scores, &mut top);
            // Sums over the keys of each block; their sum is the normaliser.
            let blocks = n.div_ceil(per);
            refill(&mut weights, blocks * stride, 0.0);
            refill(&mut sum, stride, 0.0);
            for (x, w) in scores.chunks_mut(per * stride).zip(weights.chunks_exact_mut(stride)) {
                column_exp(x, &top, w);
                sum.iter_mut().zip(w).for_each(|(s, w)| *s += *w);
            }
            work.flops += (0..m).map(|i| ((SOFTMAX_FLOPS + 1) * seen(i)) as u64).sum::<u64>();
            sum.iter_mut().for_each(|s| *s = 1.0 / *s);
            for r0 in (p0..p1).step_by(b) {
                let r1 = (r0 + b).min(p1);
                let columns = (r0 - p0) / s..(r1 - p0).div_ceil(s);
                // Blocks that hold the queries' own positions may lie past the last whole group.
                let blocks = (off + r1 - 1) / b + 1;
                weight[..blocks].fill(0.0);
                for (w, of) in weight[..blocks].iter_mut().zip(weights.chunks_exact(stride)) {
                    *w = of[columns.clone()].iter().zip(&sum[columns.clone()]).map(|(w, inv)| w * inv).sum();
                }
                lists.push(self.heaviest(&weight[..blocks], (off + r0) / b, &mut order));
            }
        }
        Ok((HeadSelection::of_blocks(HeadTable::from_lists(b, b, lists)), work))
    }
}

/// Columns (groups of queries) of one product: two tiles.
const PANEL: usize = 32;

/// `n` elements `x`.
fn refill(v: &mut Vec<f32>, n: usize, x: f32) {
    v.clear();
    v.resize(n, x);
}

impl XAttention {
    /// Block 0 and the blocks from `own` on, whatever they weigh, then the heaviest others.
    fn heaviest(&self, weight: &[f32], own: usize, order: &mut Vec<u32>) -> Vec<u32> {
        let total: f64 = weight.iter().map(|&w| f64::from(w)).sum();
        let mut held: f64 = weight[own..].iter().map(|&w| f64::from(w)).sum();
        let mut list: Vec<u32> = (own as u32..weight.len() as u32).collect();
        if own > 0 {
            held += f64::from(weight[0]);
            list.push(0);
        }
        order.clear();
        order.extend(1..own.max(1) as u32);
        order.sort_unstable_by(|&x, &y| weight[y as usize].total_cmp(&weight[x as usize]).then(x.cmp(&y)));
        for &x in &*order {
            if held >= total * self.threshold {
                break;
            }
            held += f64::from(weight[x as usize]);
            list.push(x);
        }
        list
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "xattention",
    title: "XAttention: Block Sparse Attention with Antidiagonal Scoring",
    authors: "Xu et al., 2025",
    arxiv: "2503.16428",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalInBlocks("block_size"),
        Law::ExactAt(&[("threshold", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "threshold", values: &["0.3", "0.6", "0.8", "0.9", "0.97", "1"] },
    ],
    equation: "a(i,j) = scale/S · sum_s q[iS + S-1-s]·k[jS + s];  P = causal softmax of a over j\n\
               w(A,B) = sum over i in A, j in B of P(i,j)\n\
               query block A visits block 0, its own, then the heaviest until sum w >= threshold · total",
    cost: "estimate T²·D/S flops, O(T) extra memory; attention quadratic at the density that the threshold leaves",
    choices: &[
        "The paper gives S = 8 and 16; 8 is the default here because at 2k to 8k tokens the estimate is cheap and \
         S = 16 leaves 8 scores a block.",
        "The authors' code always keeps key block 0 and the diagonal block and counts their weight towards the \
         threshold; so do we. (Its keep_sink option sets the first query row instead of the first key column; not \
         followed.)",
        "One threshold for all heads; the paper's per-head minimum thresholds are what a plan's rules express.",
        "Partial groups at the end are zero-padded as in the authors' code. In chunked prefill whose offset is no \
         multiple of S, a group of keys is scored once its last key is no later than the group of queries, and all \
         blocks that hold the queries' own positions count as diagonal.",
        "threshold = 1 visits everything, without an estimate.",
    ],
    params: params_of::<XAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<XAttention>(CARD.id, params)?)))
}
