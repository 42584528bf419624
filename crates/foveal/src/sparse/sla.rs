//! SLA: sparse and linear attention in one layer (Zhang et al. 2025, arXiv 2509.24006).
//!
//! Blocks of queries and keys are averaged, and per block of queries the blocks of keys are ranked by q̄·k̄. The first
//! `critical` share of them gets exact softmax attention, the last `negligible` share nothing, the marginal rest linear
//! attention with feature map φ; a linear map of a head's channels, learned, joins the two:
//!
//! O = softmax over critical keys + (φ(Q) Σ_marginal φ(K)ᵀV / (φ(Q) Σ_marginal φ(K) + ε)) Wᵀ + b
//!
//! q (B, H, T, D) → (B, H, T, D). Cost: 2·D·(T/block)² flops for the ranking, critical·T² pairs, and for the linear part
//! 4·T·D² and (T/block)²·D² flops, with the states of all key blocks in memory, T/block·D².

use super::estimate::bytes;
use super::run::with_rows;
use super::{Domain, HeadSelection, Mat};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::abt;
use crate::prim::pool::mean_blocks;
use crate::prim::select::topk;
use crate::prim::{AttendOptions, attend_selected, softmax};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Feature map of the linear part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureMap {
    /// Softmax over a head's channels.
    Softmax,
    /// ELU + 1.
    Elu,
    /// ReLU.
    Relu,
}

impl FeatureMap {
    /// φ(x) and its flops per element.
    fn apply(self, x: &Tensor) -> Result<(Tensor, u64)> {
        Ok(match self {
            FeatureMap::Softmax => (softmax(x)?.0, 4),
            FeatureMap::Elu => ((x.elu(1.0)? + 1.0)?, 2),
            FeatureMap::Relu => (x.relu()?, 0),
        })
    }
}

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sla {
    /// Queries per block.
    pub block_q: usize,
    /// Keys per block.
    pub block_k: usize,
    /// Share of the key blocks with exact attention.
    pub critical: f64,
    /// Share of the key blocks that are skipped.
    pub negligible: f64,
    /// Feature map of the linear part.
    pub feature_map: FeatureMap,
}

impl Default for Sla {
    fn default() -> Self {
        Self { block_q: 64, block_k: 64, critical: 0.05, negligible: 0.1, feature_map: FeatureMap::Softmax }
    }
}

impl Config for Sla {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_q", "queries per block"),
        ("block_k", "keys per block"),
        ("critical", "share of the key blocks that a query block attends to exactly, at least one block; 1 is exact"),
        ("negligible", "share of the key blocks that a query block skips; the rest gets linear attention"),
        ("feature_map", "feature map of the linear part: softmax, elu or relu"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_q == 0 || self.block_k == 0 {
            return Err(format!("block_q = {}, block_k = {}: use at least 1", self.block_q, self.block_k));
        }
        for (name, x) in [("critical", self.critical), ("negligible", self.negligible)] {
            if !(0.0..=1.0).contains(&x) {
                return Err(format!("{name} = {x}: use a share from 0 to 1"));
            }
        }
        Ok(())
    }
}

/// What the division of the linear part adds to its sum of weights.
const EPSILON: f64 = 1e-5;

impl Sla {
    /// Per query block the critical key blocks; and 1 where a block is marginal, in `marginal` (query blocks, key blocks).
    fn classify(&self, q: &Mat, k: &Mat, marginal: &mut [f32]) -> (Vec<Vec<u32>>, Work) {
        let d = q.cols;
        let (qb, kb) = (mean_blocks(q, self.block_q), mean_blocks(k, self.block_k));
        let (nq, nk) = (q.rows.div_ceil(self.block_q), k.rows.div_ceil(self.block_k));
        let mut score = vec![0f32; nq * nk];
        let mut flops = abt(nq, nk, d, 1.0, &qb, d, &kb, d, &mut score);
        flops += ((q.rows + k.rows + nq + nk) * d) as u64;
        let high = ((self.critical * nk as f64) as usize).clamp(1, nk.max(1));
        let low = ((self.negligible * nk as f64) as usize).min(nk - high.min(nk));
        let mut lists = Vec::with_capacity(nq);
        for (score, marginal) in score.chunks_exact_mut(nk.max(1)).zip(marginal.chunks_exact_mut(nk.max(1))) {
            marginal.fill(1.0);
            let critical = topk(score, high);
            for &b in &critical {
                marginal[b as usize] = 0.0;
                score[b as usize] = f32::INFINITY;
            }
            score.iter_mut().for_each(|x| *x = -*x);
            for b in topk(score, low) {
                marginal[b as usize] = 0.0;
            }
            lists.push(critical);
        }
        (lists, Work { flops, bytes: bytes(q.rows + k.rows + nq + nk, d), ..Work::default() })
    }
}

impl MixerSystem for Sla {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let d = dims.head_dim;
        let zeros = |shape: &[usize], name| vb.pp("proj").get_with_hints(shape, name, Init::Const(0.0));
        Ok(Box::new(Layer { sla: self.clone(), weight: zeros(&[d, d], "weight")?, bias: zeros(&[d], "bias")? }))
    }

    fn domain(&self) -> Domain {
        Domain::FULL
    }
}

struct Layer {
    sla: Sla,
    weight: Tensor,
    bias: Tensor,
}

/// `x` with zero rows up to `rows`.
fn padded(x: &Tensor, rows: usize) -> Result<Tensor> {
    let t = x.dim(2)?;
    Ok(if t == rows { x.contiguous()? } else { x.pad_with_zeros(2, 0, rows - t)?.contiguous()? })
}

impl Layer {
    /// Linear attention of q over the marginal key blocks: (B, H, Tq, Dv) and its flops.
    fn linear(&self, i: &MixInput, marginal: Vec<f32>) -> Result<(Tensor, u64)> {
        let (bq, bk) = (self.sla.block_q, self.sla.block_k);
        let ((b, h, tq, d), (_, hkv, tk, dv)) = (i.q.dims4()?, i.v.dims4()?);
        let (nq, nk) = (tq.div_ceil(bq), tk.div_ceil(bk));
        let (q, per) = self.sla.feature_map.apply(i.q)?;
        let (k, _) = self.sla.feature_map.apply(i.k)?;
        // A column of ones beside v carries the sum of weights along.
        let ones = Tensor::ones((b, hkv, tk, 1), i.v.dtype(), i.v.device())?;
        let v = Tensor::cat(&[i.v, &ones], 3)?;
        let width = d * (dv + 1);
        let k = padded(&k, nk * bk)?.reshape((b * hkv * nk, bk, d))?.transpose(1, 2)?.contiguous()?;
        let v = padded(&v, nk * bk)?.reshape((b * hkv * nk, bk, dv + 1))?;
        let states = k.matmul(&v)?.reshape((b * hkv, nk, width))?;
        // Heads of a K/V group share its states.
        let marginal = Tensor::from_vec(marginal, (b * hkv, h / hkv * nq, nk), &Device::Cpu)?;
        let sums = marginal.matmul(&states)?.reshape((b * h * nq, d, dv + 1))?;
        let q = padded(&q, nq * bq)?.reshape((b * h * nq, bq, d))?;
        let out = q.matmul(&sums)?.reshape((b, h, nq * bq, dv + 1))?.narrow(2, 0, tq)?;
        let weights = (out.narrow(3, dv, 1)? + EPSILON)?;
        let linear = out.narrow(3, 0, dv)?.broadcast_div(&weights)?.contiguous()?;
        let out = linear.reshape((b * h * tq, dv))?.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?;
        let products = b * hkv * tk * width + b * h * nq * nk * width + b * h * tq * width + b * h * tq * dv * dv;
        let flops = 2 * products as u64 + per * (b * d * (h * tq + hkv * tk)) as u64 + (2 * b * h * tq * dv) as u64;
        Ok((out.reshape((b, h, tq, dv))?, flops))
    }
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((b, h, tq, d), (_, hkv, tk, _)) = (i.q.dims4()?, i.k.dims4()?);
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(foveal_kernels::KernelError::Groups { op: "sla", heads: h, kv_heads: hkv }.into());
        }
        if i.v.dim(3)? != d {
            let expected = format!("(batch, heads, tokens, {d}) as q: the learned map is of one width");
            return Err(Error::Shape { op: "sla", tensor: "v", shape: i.v.dims().to_vec(), expected });
        }
        let (bq, bk) = (self.sla.block_q, self.sla.block_k);
        let (nq, nk) = (tq.div_ceil(bq), tk.div_ceil(bk));
        let mut marginal = vec![0f32; b * h * nq * nk];
        let mut select = Work::default();
        let mut selections = Vec::with_capacity(b * h);
        with_rows("q", i.q, |q, qs| {
            with_rows("k", i.k, |k, ks| {
                for (bh, marginal) in marginal.chunks_exact_mut((nq * nk).max(1)).enumerate() {
                    let (bi, hi) = (bh / h, bh % h);
                    let q = Mat::new(&q[bi * qs[0] + hi * qs[1]..], tq, d, qs[2]);
                    let k = Mat::new(&k[bi * ks[0] + hi / (h / hkv) * ks[1]..], tk, d, ks[2]);
                    let (lists, work) = self.sla.classify(&q, &k, marginal);
                    select += work;
                    selections.push(HeadSelection::of_blocks(HeadTable::from_lists(bq, bk, lists)));
                }
            })
        })??;
        let options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        let exact = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        let (linear, flops) = self.linear(i, marginal)?;
        let mut work = exact.work;
        work.flops += flops;
        Ok(Mixed { out: (exact.out + linear)?, work, select, loss: None, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "sla",
    title: "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    authors: "Zhang et al., 2025",
    arxiv: "2509.24006",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::ExactAt(&[("critical", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "critical", values: &["0", "0.1", "0.3", "0.7", "1"] },
        Law::Gradients,
    ],
    equation: "blocks of keys ranked by mean(Q_a)·mean(K_b): first critical, last negligible, else marginal\n\
               O = softmax(q·k over critical keys) V + Proj(phi(Q) sum_marginal phi(K)^T V / (phi(Q) sum_marginal phi(K)))",
    cost: "ranking 2·D·(T/block)² flops; critical·T² pairs; linear part O(T·D²) and (T/block)²·D² flops",
    choices: &[
        "Shares 0.05 and 0.1, blocks of 64, softmax over channels as the feature map: the paper's setting. Its softmax over blocks \
         changes no rank and is not computed; nor does taking the mean key off all keys, which the published code does.",
        "The published code runs linear attention over all keys, critical and negligible ones too; the paper's text and figure say \
         the marginal ones, and so it is here.",
        "Sums of states over marginal blocks are one product of a 0/1 matrix of blocks with the states. The learned map starts at zero \
         as in the published code: an untrained layer is its exact part alone.",
        "At least one block is critical where `critical` of the blocks is less than one.",
    ],
    params: params_of::<Sla>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Sla>(CARD.id, params)?)))
}
