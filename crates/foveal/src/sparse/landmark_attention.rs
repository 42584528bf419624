//! Landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300).
//!
//! The last of every `block_size` tokens is a landmark, which stands for its block. A query's own block (up to
//! itself, landmark left out) and the landmarks of the blocks before it share one softmax; the weight of a landmark
//! is shared out among the other tokens of its block by a softmax of their own:
//! o_i = Σ_{j own} p_j v_j + Σ_b p_b Σ_{j∈b} softmax_j∈b(s_ij) v_j. With `topk` only the blocks with the best landmarks
//! are fetched and take part.
//!
//! q (B, H, Tq, D), k and v (B, H_kv, Tk, D) → (B, H, Tq, D). Cost: 2·T·(T/block_size)·D for landmarks,
//! (topk + 1)·block_size keys per query; memory (topk + 1)·T·D, one row for each block that a query looks into.

use super::HeadSelection;
use super::estimate::{SOFTMAX_FLOPS, bytes};
use super::layer_ops::numbers;
use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::select::topk;
use crate::prim::{AttendOptions, attend_indexed, softmax};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use foveal_kernels::{HeadKeys, KeyLists, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Landmark {
    /// Tokens from landmark to landmark.
    pub block_size: usize,
    /// Past blocks per query.
    pub topk: usize,
}

impl Default for Landmark {
    fn default() -> Self {
        Self { block_size: 51, topk: 4 }
    }
}

impl Config for Landmark {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "tokens from landmark to landmark, one landmark included: every block_size-th token is one"),
        ("topk", "past blocks that a query looks into; 0: all of them, as in the paper's training"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size < 2 {
            return Err(format!("block_size = {}: use at least 2, a token and its landmark", self.block_size));
        }
        Ok(())
    }
}

impl MixerSystem for Landmark {
    fn layer(&self, _: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(self.clone()))
    }
}

/// Logits of the first `n` landmarks, (B, H, Tq, n).
fn landmarks(i: &MixInput, block: usize, n: usize) -> Result<Tensor> {
    let (b, h, tq, d) = i.q.dims4()?;
    let kv = i.k.dim(1)?;
    let at: Vec<u32> = (1..=n as u32).map(|x| x * block as u32 - 1).collect();
    let marks = i.k.contiguous()?.index_select(&Tensor::from_vec(at, n, &Device::Cpu)?, 2)?;
    let q = i.q.reshape((b, kv, h / kv * tq, d))?;
    Ok((q.matmul(&marks.t()?.contiguous()?)? * f64::from(i.scale()?))?.reshape((b, h, tq, n))?)
}

impl Mixer for Landmark {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let (b, h, tq, d) = i.q.dims4()?;
        let (tk, dv) = (i.k.dim(2)?, i.v.dim(3)?);
        let (block, offset) = (self.block_size, tk - tq);
        // Complete blocks before the last query's own.
        let n = (offset + tq).saturating_sub(1) / block;
        let most = if self.topk == 0 { n } else { self.topk.min(n) };
        let mut select = Work::default();
        let logits = if n > 0 { Some(landmarks(i, block, n)?) } else { None };
        if n > 0 {
            select.flops = (2 * b * h * tq * n * d) as u64;
            select.bytes = bytes(b * h * (tq + n), d);
        }
        let scores = logits.as_ref().map(numbers).transpose()?.unwrap_or_default();
        let rows = most + 1;
        let (mut lists, mut selections) = (Vec::with_capacity(b * h), Vec::with_capacity(b * h));
        let mut picks = Vec::with_capacity(b * h * tq * most);
        let mut taken = Vec::with_capacity(b * h * tq * most);
        for x in 0..b * h {
            // One row for the query's own block and one for each past block that it looks into.
            let mut list = HeadKeys { group: 1, indptr: vec![0], keys: Vec::new() };
            let mut all = HeadKeys { group: 1, indptr: vec![0], keys: Vec::new() };
            for r in 0..tq {
                let p = offset + r;
                let (own, past) = (p / block * block, p / block);
                list.keys.extend(own as u32..(p + 1).min(own + block - 1) as u32);
                list.indptr.push(list.keys.len());
                let chosen = if past == 0 { Vec::new() } else { topk(&scores[(x * tq + r) * n..][..past], most) };
                for &c in &chosen {
                    let inside = c * block as u32..(c + 1) * block as u32 - 1;
                    all.keys.extend(inside.clone());
                    list.keys.extend(inside);
                    list.indptr.push(list.keys.len());
                }
                list.indptr.extend(std::iter::repeat_n(list.keys.len(), most - chosen.len()));
                all.keys.extend(own as u32..(p + 1).min(own + block - 1) as u32);
                all.indptr.push(all.keys.len());
                taken.extend((0..most).map(|y| u8::from(y < chosen.len())));
                picks.extend((0..most).map(|y| chosen.get(y).copied().unwrap_or(0)));
            }
            lists.push(list);
            selections.push(HeadSelection::of_keys(all));
        }
        let q = i.q.unsqueeze(3)?.broadcast_as((b, h, tq, rows, d))?.reshape((b, h, tq * rows, d))?;
        let options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        let a = attend_indexed(&q, i.k, i.v, &options, &KeyLists { heads: lists })?;
        let mut work = a.work;
        let Some(logits) = logits else {
            return Ok(Mixed { out: a.out, work, select, loss: None, selections });
        };
        let shape = (b, h, tq, most);
        let picks = Tensor::from_vec(picks, shape, &Device::Cpu)?;
        let taken = Tensor::from_vec(taken, shape, &Device::Cpu)?;
        let never = Tensor::full(f32::NEG_INFINITY, shape, &Device::Cpu)?;
        let marks = taken.where_cond(&logits.gather(&picks, 3)?, &never)?;
        let own = a.lse.reshape((b, h, tq, rows))?.narrow(3, 0, 1)?;
        let (p, shares) = softmax(&Tensor::cat(&[&own, &marks], 3)?)?;
        let parts = a.out.reshape((b, h, tq, rows, dv))?;
        let out = parts.broadcast_mul(&p.unsqueeze(4)?)?.sum(3)?;
        work += shares;
        work.flops += (b * h * tq * rows * (2 * dv + SOFTMAX_FLOPS)) as u64;
        Ok(Mixed { out, work, select, loss: None, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "landmark-attention",
    title: "Landmark Attention: Random-Access Infinite Context Length for Transformers",
    authors: "Mohtashami and Jaggi, 2023",
    arxiv: "2305.16300",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::Work { pairs: Growth::Linear, flops: Growth::Quadratic },
        Law::Monotone { param: "topk", values: &["1", "2", "4", "9", "1000"] },
        Law::Gradients,
    ],
    equation: "landmark of block b: its last token m_b\n\
               p = softmax over own block's s_ij (its landmark left out) and the past landmarks' s_i,m_b\n\
               o_i = sum over own j of p_j v_j + sum over b of p_b · sum over j in b of softmax_j(s_ij) v_j",
    cost: "T²·D/block_size landmarks, (topk + 1)·block_size keys per query; memory (topk + 1)·T·D",
    choices: &[
        "The input holds the landmarks already, at every block_size-th place (the paper: after 50 tokens each); a \
         layer cannot insert tokens. Whoever builds the input puts the landmark token there, and leaves it out of \
         the loss.",
        "As in the authors' code a landmark never lends its own value: its weight goes to the other tokens of its \
         block, and a landmark that asks does not see itself.",
        "The authors train with all past blocks (topk = 0) and fetch the best ones at inference; 4 is the most that \
         the paper's table fetches per head and token. Fetched blocks alone share the softmax, as there.",
        "Positions are as given; the paper's mapping of far positions onto near ones belongs to whoever rotates q \
         and k.",
    ],
    params: params_of::<Landmark>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Landmark>(CARD.id, params)?)))
}
