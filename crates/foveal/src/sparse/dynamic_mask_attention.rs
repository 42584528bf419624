//! Trainable dynamic mask attention (Shi et al. 2025, arXiv 2508.02124).
//!
//! Every key of a K/V head has one score, whatever the query: δ_j = exp(a · softplus(v_j W)), v_j the values of all
//! K/V heads side by side, W (H_kv·D, H_kv) and a (H_kv) learned. A query attends to the `keep_window` visible
//! keys of largest δ, with δ added to q·k: o_i = Σ_j softmax_j(scale · q_i·k_j + δ_j) v_j. Through the bias, δ is
//! trained by the loss of the model.
//!
//! q (B, H, Tq, D), k and v (B, H_kv, Tk, D) → (B, H, Tq, D). Cost: 2·T·H_kv²·D for the scores, T·log T to follow the
//! best of a growing prompt, keep_window keys per query.

use super::HeadSelection;
use super::estimate::bytes;
use super::layer_ops::{for_each_query_head, linear, numbers};
use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::{AttendBias, AttendOptions, attend, attend_selected};
use crate::sparse::Domain;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DynamicMask {
    /// Keys per query.
    pub keep_window: usize,
}

impl Default for DynamicMask {
    fn default() -> Self {
        Self { keep_window: 2048 }
    }
}

impl Config for DynamicMask {
    const DOCS: &'static [(&'static str, &'static str)] =
        &[("keep_window", "keys that a query attends to: of those it sees, the ones with the largest scores")];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.keep_window == 0 {
            return Err("keep_window = 0: use at least 1, such as 2048".into());
        }
        Ok(())
    }
}

/// Queries of a tile with row masks.
const TILE: usize = 64;

/// An integer that grows with x.
fn rank(x: f32) -> i32 {
    let b = x.to_bits() as i32;
    b ^ (((b >> 31) as u32) >> 1) as i32
}

/// For each key the queries that keep it, as (first, end): from where it is seen until so many better or
/// later ones are. Query i sees keys up to `offset` + i, or all of them.
fn kept(scores: &[f32], window: usize, tq: usize, causal: bool) -> Vec<(usize, usize)> {
    let offset = scores.len() - tq;
    let first = |j: usize| if causal { j.saturating_sub(offset) } else { 0 };
    let mut spans: Vec<(usize, usize)> = (0..scores.len()).map(|j| (first(j), tq)).collect();
    let mut best = BinaryHeap::with_capacity(window + 1);
    for (j, &x) in scores.iter().enumerate() {
        best.push(Reverse((rank(x), j)));
        if best.len() > window
            && let Some(Reverse((_, out))) = best.pop()
        {
            spans[out].1 = first(j);
        }
    }
    spans
}

/// Spans of keys as a table of one-key blocks with a bit a query.
fn table(spans: &[(usize, usize)], tq: usize) -> HeadTable {
    let mut out = HeadTable { block_q: TILE, block_k: 1, indptr: vec![0], blocks: Vec::new(), rows: Some(Vec::new()) };
    let (mut live, mut next) = (Vec::new(), 0);
    for r0 in (0..tq).step_by(TILE) {
        let r1 = (r0 + TILE).min(tq);
        while next < spans.len() && spans[next].0 < r1 {
            live.push(next);
            next += 1;
        }
        live.retain(|&j| spans[j].1 > r0);
        for &j in &live {
            let (from, to) = (spans[j].0.max(r0) - r0, spans[j].1.min(r1) - r0);
            if from < to {
                out.blocks.push(j as u32);
                out.rows.get_or_insert_default().push((u64::MAX >> (TILE - (to - from))) << from);
            }
        }
        out.indptr.push(out.blocks.len());
    }
    out
}

struct Layer {
    config: DynamicMask,
    causal: bool,
    w: Tensor,
    a: Tensor,
}

impl MixerSystem for DynamicMask {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let n = dims.kv_heads;
        let init = Init::Randn { mean: 0.0, stdev: 1.0 / ((n * dims.head_dim) as f64).sqrt() };
        Ok(Box::new(Layer {
            config: self.clone(),
            causal: dims.causal,
            w: vb.get_with_hints((n, n * dims.head_dim), "dt_proj.weight", init)?,
            a: vb.get_with_hints((n,), "a", Init::Const(0.0))?,
        }))
    }

    fn domain(&self) -> Domain {
        Domain::ANY
    }
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let (b, h, tq, _) = i.q.dims4()?;
        let (_, kv, tk, dv) = i.v.dims4()?;
        let flat = i.v.transpose(1, 2)?.reshape((b, tk, kv * dv))?;
        let x = linear(&flat, &self.w, None)?;
        // softplus(x) = max(x, 0) + ln(1 + e^−|x|).
        let soft = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
        let delta = soft.broadcast_mul(&self.a)?.exp()?.transpose(1, 2)?.contiguous()?;
        let select =
            Work { flops: (b * tk * kv * (2 * kv * dv + 8)) as u64, bytes: bytes(b * kv * tk, dv), ..Work::default() };
        let bias = Some(AttendBias::Keys(for_each_query_head(&delta, h)?));
        let options = AttendOptions { scale: i.scale, causal: self.causal, bias, ..AttendOptions::default() };
        if tk <= self.config.keep_window {
            let a = attend(i.q, i.k, i.v, &options, None)?;
            return Ok(Mixed { out: a.out, work: a.work, select, loss: None, selections: Vec::new() });
        }
        let tables: Vec<HeadTable> = numbers(&delta)?
            .chunks_exact(tk)
            .map(|x| table(&kept(x, self.config.keep_window, tq, self.causal), tq))
            .collect();
        let selections: Vec<HeadSelection> =
            (0..b * h).map(|x| HeadSelection::of_blocks(tables[x / (h / kv)].clone())).collect();
        let a = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        Ok(Mixed { out: a.out, work: a.work, select, loss: None, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "dynamic-mask-attention",
    title: "Trainable Dynamic Mask Sparse Attention",
    authors: "Shi et al., 2025",
    arxiv: "2508.02124",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("keep_window", "1000000000")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::Linear },
        Law::Monotone { param: "keep_window", values: &["1", "16", "100", "700", "5000"] },
        Law::Gradients,
    ],
    equation: "d_j = exp(a · softplus(v_j W)), one for each key and K/V head\n\
               query i: the keep_window visible keys of largest d;  o_i = softmax(scale·q_i·k_j + d_j) v",
    cost: "2·T·H_kv²·D scores, keep_window keys per query; O(T) extra memory",
    choices: &[
        "The paper's and the Doge model's score, exp(a · softplus(·)); the authors' later kernels leave the \
         exponential out for the sake of low precision.",
        "Causality first, then the best of what a query sees, as in the Doge model: a query of the first \
         keep_window tokens sees them all.",
        "a starts at 0, as in the authors' code: all scores are then 1, a constant that softmax cancels, hence \
         exact at a window that holds the whole prompt. Equal scores go to the later key, so that an untrained \
         layer is a sliding window.",
        "W has no bias (the Doge default).",
        "Scores do not depend on the query, so each key is kept over one span of queries: found with a heap in \
         T·log T, and told to the kernel as one bit a query.",
    ],
    params: params_of::<DynamicMask>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<DynamicMask>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_the_best_of_every_prefix() {
        let x: Vec<f32> = (0..200).map(|i| ((i * 7919 % 101) as f32 * 0.7).sin()).collect();
        for (tq, window, causal) in [(200, 7, true), (130, 20, true), (3, 5, true), (70, 9, false)] {
            let offset = x.len() - tq;
            let table = table(&kept(&x, window, tq, causal), tq);
            table.check(tq, x.len()).unwrap();
            for i in 0..tq {
                let n = if causal { offset + i + 1 } else { x.len() };
                let mut want: Vec<usize> = (0..n).collect();
                want.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(b.cmp(&a)));
                want.truncate(window);
                want.sort_unstable();
                let of = table.indptr[i / TILE]..table.indptr[i / TILE + 1];
                let got: Vec<usize> = of
                    .filter(|&e| table.rows.as_ref().unwrap()[e] >> (i % TILE) & 1 == 1)
                    .map(|e| table.blocks[e] as usize)
                    .collect();
                assert_eq!(got, want, "{tq} queries, window {window}, query {i}");
            }
        }
    }
}
