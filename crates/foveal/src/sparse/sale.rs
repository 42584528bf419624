//! SALE: low-bit estimation for sparse attention (Ji et al. 2025, arXiv 2505.24179).
//!
//! q and k are rounded to 4 bits. A block of queries always visits the first `sinks` keys and the `local` keys
//! before it. What their estimated scores sum to is the reference that a pair in between is held against: with
//! ŝ the estimated score, the relative attention score is
//! r(i, j) = e^{ŝ(i, j)} / Σ_{j' sink or local} e^{ŝ(i, j')}, and a key block is visited if any of its pairs has
//! r ≥ `threshold`. The sum is part of the softmax's denominator, so no pair whose estimated weight is at least
//! `threshold` is missed.
//!
//! q (Tq, D), k (Tk, D) → a table of `block_q` queries by `block_k` keys. Cost: the estimate is a whole product of
//! q and k, T²·D flops of 4-bit integers (half of dense attention's, on cheaper numbers where a machine has them);
//! extra memory O(T·D) for the rounded keys.

use super::estimate::{SOFTMAX_FLOPS, bytes, hide};
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::Result;
use crate::prim::gemm::{self, Columns, Precision, Rows, abt};
use crate::prim::pool::{column_affine_max, column_exp, column_max, mean_blocks};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sale {
    /// Least relative attention score of a pair whose block is visited.
    pub threshold: f64,
    /// Queries per block.
    pub block_q: usize,
    /// Keys per block.
    pub block_k: usize,
    /// First keys, always visited.
    pub sinks: usize,
    /// Keys up to a block's first query, always visited.
    pub local: usize,
}

impl Default for Sale {
    fn default() -> Self {
        Self { threshold: 0.004, block_q: 64, block_k: 32, sinks: 128, local: 128 }
    }
}

impl Config for Sale {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        (
            "threshold",
            "a key block is visited if the estimated weight of one of its pairs is at least this share of what sink and local keys hold; 0 is exact",
        ),
        ("block_q", "queries per block"),
        ("block_k", "keys per block; a block shares one scale of its 4-bit numbers"),
        ("sinks", "first keys, always visited and part of the reference; rounded up to blocks"),
        ("local", "keys up to a block's first query, always visited and part of the reference; rounded up to blocks"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_q == 0 || self.block_k == 0 {
            return Err(format!("block_q = {}, block_k = {}: use at least 1", self.block_q, self.block_k));
        }
        if !(self.threshold >= 0.0 && self.threshold.is_finite()) {
            return Err(format!("threshold = {}: use a share from 0, such as 0.004", self.threshold));
        }
        Ok(())
    }
}

/// Largest of the 4-bit numbers; −8 is not used, so that the range is symmetric.
const MOST: f32 = 7.0;
/// Keys scored by one product, so that the scores stay in cache.
const KEYS: usize = 256;
/// Query blocks whose means are multiplied with the keys at a time.
const PANEL: usize = 16;

/// Round the rows less `mean` to 4 bits with one scale for all; returns the scale.
fn round(rows: impl Iterator<Item = impl AsRef<[f32]>> + Clone, mean: &[f32], out: &mut Vec<f32>) -> f32 {
    let at = out.len();
    for row in rows {
        out.extend(row.as_ref().iter().zip(mean).map(|(x, m)| x - m));
    }
    let top = out[at..].iter().fold(0f32, |t, x| t.max(x.abs()));
    let scale = if top > 0.0 { top / MOST } else { 1.0 };
    let inv = 1.0 / scale;
    out[at..].iter_mut().for_each(|x| *x = (*x * inv).round_ties_even());
    scale
}

impl Sale {
    /// First local block of the queries from position `first` on, and the sink blocks before it.
    fn ends(&self, first: usize) -> (usize, usize) {
        let local = (first + 1).saturating_sub(self.local.max(1)) / self.block_k;
        (self.sinks.div_ceil(self.block_k).min(local), local)
    }
}

impl Selector for Sale {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (bq, bk) = (self.block_q, self.block_k);
        let (tq, tk, d, off) = (p.q.rows, p.k.rows, p.q.cols, p.offset());
        let mut work = Work::default();
        let last = tq.saturating_sub(1) / bq * bq;
        let (sink, local) = self.ends(off + last);
        if self.threshold <= 0.0 || sink >= local {
            return Ok((HeadSelection::of_blocks(HeadTable::dense_causal(bq, bk, tq, tk)), work));
        }
        // Keys less their mean, which shifts all scores of a query alike, in 4 bits with a scale a block.
        // Integers of 4 bits are exact in bf16 and so are their sums, hence tiles wherever there are some.
        let mean = mean_blocks(&p.k, tk.max(1));
        let mut whole = Vec::with_capacity(tk * d);
        let scales: Vec<f32> =
            (0..tk).step_by(bk).map(|j| round((j..(j + bk).min(tk)).map(|j| p.k.row(j)), &mean, &mut whole)).collect();
        work.flops += ((3 * tk + 1) * d) as u64;
        work.bytes += bytes(2 * tk, d);
        let k = Rows::of(&Mat::new(&whole, tk, d, d), 1, Precision::Bf16);
        let mut q = Columns::new(bq, 1, d, 1.0, Precision::Bf16);
        let means = mean_blocks(&p.q, bq);
        work.flops += ((tq + tq.div_ceil(bq)) * d) as u64;
        work.bytes += bytes(tq, d);
        let (mut shift, mut width) = (vec![0f32; PANEL * tk], 0);
        let (mut rounded, mut scores, mut region) = (Vec::with_capacity(bq * d), Vec::new(), Vec::new());
        let (mut top, mut sum) = (Vec::new(), Vec::new());
        let mut lists = Vec::with_capacity(tq.div_ceil(bq));
        for (b, r0) in (0..tq).step_by(bq).enumerate() {
            let r1 = (r0 + bq).min(tq);
            let (m, end) = (r1 - r0, off + r1);
            if b % PANEL == 0 {
                // Queries are rounded less their block's mean, whose own scores are exact: one a key and block.
                let blocks = PANEL.min(tq.div_ceil(bq) - b);
                width = (off + (b + blocks) * bq).min(tk);
                let means = &means[b * d..];
                work.flops += abt(blocks, width, d, p.scale, means, d, p.k.data(), p.k.stride, &mut shift);
                work.bytes += bytes(blocks + width, d);
            }
            let (sink, local) = self.ends(off + r0);
            let blocks = end.div_ceil(bk) as u32;
            let mut list: Vec<u32> = (0..sink as u32).chain(local as u32..blocks).collect();
            if sink >= local {
                lists.push(list);
                continue;
            }
            let shift = &shift[b % PANEL * width..][..width];
            rounded.clear();
            let unit = p.scale * round((r0..r1).map(|r| p.q.row(r)), &means[b * d..(b + 1) * d], &mut rounded);
            q.fill(m, |i, _| Some(&rounded[i * d..(i + 1) * d]));
            let stride = q.stride();
            work.flops += (2 * m * d) as u64;
            work.bytes += bytes(m, d);
            // The reference: log of the sum over sink and local keys.
            region.clear();
            for (from, to) in [(0, sink * bk), (local * bk, end)] {
                for j in (from..to).step_by(KEYS) {
                    let n = KEYS.min(to - j);
                    work.flops += gemm::scores(&k, j..j + n, &q, &mut scores);
                    let at = region.len();
                    region.extend_from_slice(&scores[..n * stride]);
                    for (j, row) in (j..).zip(region[at..].chunks_exact_mut(stride)) {
                        let f = unit * scales[j / bk];
                        row.iter_mut().for_each(|x| *x = f * *x + shift[j]);
                    }
                    if from > 0 {
                        hide(&mut region[at..], stride, m, |i| (off + r0 + i + 1).saturating_sub(j));
                    }
                }
                work.flops += ((2 + SOFTMAX_FLOPS) * (to - from) * m) as u64;
                work.bytes += bytes(to - from, d);
            }
            top.clear();
            top.resize(stride, f32::NEG_INFINITY);
            column_max(&region, &mut top);
            sum.clear();
            sum.resize(stride, 0.0);
            column_exp(&mut region, &top, &mut sum);
            // Least score to be visited for.
            let least = (self.threshold as f32).ln();
            top.iter_mut().zip(&sum).for_each(|(t, s)| *t += s.ln() + least);
            for j in (sink * bk..local * bk).step_by(KEYS / bk.min(KEYS) * bk) {
                let n = (KEYS / bk.min(KEYS) * bk).min(local * bk - j);
                work.flops += gemm::scores(&k, j..j + n, &q, &mut scores);
                for (x, j) in scores[..n * stride].chunks(bk * stride).zip((j..).step_by(bk)) {
                    sum.fill(f32::NEG_INFINITY);
                    column_affine_max(x, unit * scales[j / bk], &shift[j..j + bk], &mut sum);
                    if sum[..m].iter().zip(&top).fold(false, |hit, (s, least)| hit | (s >= least)) {
                        list.push((j / bk) as u32);
                    }
                }
            }
            work.flops += (2 * (local - sink) * bk * m) as u64;
            work.bytes += bytes((local - sink) * bk, d);
            lists.push(list);
        }
        Ok((HeadSelection::of_blocks(HeadTable::from_lists(bq, bk, lists)), work))
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "sale",
    title: "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
    authors: "Ji et al., 2025",
    arxiv: "2505.24179",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("threshold", "0")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "threshold", values: &["10", "0.1", "0.01", "0.001", "0.00001", "0"] },
    ],
    equation: "s(i,j) = scale·(4-bit(q_i - mean q)·4-bit(k_j - mean k) + mean q·k_j)\n\
               r(i,j) = exp(s(i,j)) / sum over sink and local keys j' of exp(s(i,j'))\n\
               a query block visits sink and local keys and every key block with some r(i,j) >= threshold",
    cost: "estimate T²·D flops on 4-bit integers, O(T·D) extra memory; attention at the density that the threshold leaves",
    choices: &[
        "The abstract gives no formula of the relative score. Taken here: weight over the sum of weights of the sink and \
         local keys, which the sparse kernel visits in any case; blocks of 64 by 32, 128 local keys and a threshold near \
         0.004 are the authors' code's. Their per-head calibration of the threshold to an output error is what a plan's \
         rules express. Their code runs prompts of up to 1,024 tokens densely; here a threshold of 0 does.",
        "128 sink keys: the authors' code does not say how many it counts apart from its first segment of 128.",
        "As in that code keys lose their mean, queries the mean of their block before they are rounded, and the latter's \
         exact scores are added again. Scales are one for each block of queries and one for each of keys; the code has \
         one for each warp's share of a block.",
        "The mean runs over all keys of the prompt, so that what is estimated of an early query may depend on later keys; \
         hence only the mask is promised causal.",
        "There are no 4-bit products on this machine's CPU: rounded numbers are multiplied as bf16 on tiles, where they are \
         exact, or as f32. The estimate then costs half of dense attention: what is measured is the quality of a 4-bit \
         estimate, and a gain only where attention is slower than the product of q and k.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.92, default 6.95 with 69% of the pairs computed, threshold=0.02 \
         7.27 with 48%. 8,192 tokens: dense 8.05, default 8.11 with 40%. Attention with the estimate takes 3 and 2 times \
         dense's time.",
    ],
    params: params_of::<Sale>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<Sale>(CARD.id, params)?)))
}
