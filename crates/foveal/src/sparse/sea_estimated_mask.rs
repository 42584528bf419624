//! SEA: sparse attention under an estimated mask (Lee et al. 2023, arXiv 2310.01777).
//!
//! A linear attention with features φ (ReLU of a random projection) looks at positions and values, c_i = Σ_j
//! φ(q_i)·φ(k_j) [pos_j; v_j] / Σ_j φ(q_i)·φ(k_j); a small encoder and two causal convolutions turn [c_i; v_i] into a
//! row of K cells, and a softmax over them into an estimate of attention in which cell c of query i stands for its
//! visible keys j with ⌊jK/(i+1)⌋ = c. The best max(1, round(keys·K/(i+1))) cells are expanded to their keys, and
//! attention over those is exact: o_i = σ(b_i) σ(a_i) · sparse_i + (1 − σ(b_i)) · mean of v up to i. The estimate is
//! taught by KL(true attention summed over cells‖estimate).
//!
//! q (B, H, T, D), k and v (B, H_kv, T, D) → (B, H, T, D). Cost: linear in T: ~T·D·(6D + channels·K/2) for the encoder,
//! T·K·(9·channels²·H/4) for the convolutions, `keys` keys per query, more from keys·K
//! tokens on (a cell is then more keys than that); memory T·K.

use super::estimate::{SOFTMAX_FLOPS, bytes, hide};
use super::layer_ops::{for_each_query_head, layer_norm, linear, numbers};
use super::{HeadProblem, HeadSelection, Mat};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::{Columns, Precision, Rows, scores};
use crate::prim::pool::{column_exp, column_max};
use crate::prim::rope::Rope;
use crate::prim::select::topk;
use crate::prim::{AttendOptions, FeatureOptions, attend_selected, feature_attend};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{D, Device, Tensor};
use candle_nn::{Init, VarBuilder};
use foveal_kernels::{HeadKeys, Work};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sea {
    /// Cells of a row of the estimate.
    pub width: usize,
    /// Keys per query, about.
    pub keys: usize,
    /// Features of the linear attention; 0 = D·ln D.
    pub features: usize,
    /// Channels of the decoder per head.
    pub channels: usize,
    /// Whether the loss that teaches the estimate is computed.
    pub distil: bool,
}

impl Default for Sea {
    fn default() -> Self {
        Self { width: 256, keys: 64, features: 0, channels: 2, distil: false }
    }
}

impl Config for Sea {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("width", "cells of a row of the estimated map, a multiple of 4"),
        ("keys", "keys that a query attends to, up to the size of a cell more or less"),
        ("features", "features of the linear attention; 0: D·ln D"),
        ("channels", "channels of the decoder for each head"),
        ("distil", "compute the loss that teaches the estimate, at the cost of dense attention's scores; for training"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.width == 0 || !self.width.is_multiple_of(4) {
            return Err(format!("width = {}: use a positive multiple of 4, such as 256", self.width));
        }
        if self.keys == 0 || self.channels == 0 {
            return Err(format!("keys = {}, channels = {}: use at least 1", self.keys, self.channels));
        }
        Ok(())
    }
}

struct Layer {
    config: Sea,
    projection: Tensor,
    encoder: [Tensor; 4],
    decoder: [Tensor; 2],
    conv1: [Tensor; 2],
    conv2: Tensor,
    norm: [Tensor; 2],
    scale: [Tensor; 2],
}

impl MixerSystem for Sea {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let (d, h, c, w) = (dims.head_dim, dims.heads, self.channels, self.width);
        let features = if self.features > 0 { self.features } else { (d as f64 * (d as f64).ln()).max(1.0) as usize };
        let draw = |shape: &[usize], name: &str, fan: usize| {
            vb.get_with_hints(shape, name, Init::Randn { mean: 0.0, stdev: 1.0 / (fan.max(1) as f64).sqrt() })
        };
        let fill = |n: usize, name: &str, x: f64| vb.get_with_hints((n,), name, Init::Const(x));
        Ok(Box::new(Layer {
            config: self.clone(),
            projection: draw(&[features, d], "performer.projection", 1)?,
            encoder: [
                draw(&[2 * d, 3 * d], "encoder.weight", 3 * d)?,
                fill(2 * d, "encoder.bias", 0.0)?,
                fill(2 * d, "encoder.norm.weight", 1.0)?,
                fill(2 * d, "encoder.norm.bias", 0.0)?,
            ],
            decoder: [draw(&[c * w / 4, 2 * d], "decoder.weight", 2 * d)?, fill(c * w / 4, "decoder.bias", 0.0)?],
            conv1: [draw(&[c * h, c * h, 3, 3], "conv1.weight", 9 * c * h)?, fill(c * h, "conv1.bias", 0.0)?],
            conv2: draw(&[h, c * h, 1, 1], "conv2.weight", c * h)?,
            norm: [fill(w, "map.norm.weight", 1.0)?, fill(w, "map.norm.bias", 0.0)?],
            scale: [draw(&[2, 2 * d], "scale.weight", 2 * d)?, fill(2, "scale.bias", 2.0)?],
        }))
    }
}

/// Keys of cell `c` of `width` over the first `n` keys.
fn cell(c: usize, width: usize, n: usize) -> Range<u32> {
    (c * n).div_ceil(width) as u32..((c + 1) * n).div_ceil(width) as u32
}

/// What one query visits, given its row of the estimate and the number of keys that it sees; ascending.
fn keys_of(row: &[f32], n: usize, keys: usize, out: &mut Vec<u32>) {
    let width = row.len();
    let occupied: Vec<usize> = (0..width).filter(|&c| !cell(c, width, n).is_empty()).collect();
    let share = (keys * occupied.len()) as f64 / n as f64;
    let z = ((share + 0.5).floor() as usize).max(1);
    let scores: Vec<f32> = occupied.iter().map(|&c| row[c]).collect();
    for c in topk(&scores, z) {
        out.extend(cell(occupied[c as usize], width, n));
    }
}

/// True causal attention of one head, each query's weights summed over its cells: (Tq, width).
fn cell_mass(p: &HeadProblem, width: usize) -> (Vec<f32>, Work) {
    const PANEL: usize = 64;
    let (tq, d, off) = (p.q.rows, p.q.cols, p.offset());
    let keys = Rows::of(&p.k, 1, Precision::F32);
    let mut columns = Columns::new(PANEL, 1, d, p.scale, Precision::F32);
    let (mut table, mut out, mut work) = (Vec::new(), vec![0f32; tq * width], Work::default());
    for r0 in (0..tq).step_by(PANEL) {
        let m = PANEL.min(tq - r0);
        columns.fill(m, |c, _| Some(p.q.row(r0 + c)));
        let n = off + r0 + m;
        work.flops += scores(&keys, 0..n, &columns, &mut table) + (SOFTMAX_FLOPS * n * m) as u64;
        work.bytes += bytes(n + m, d);
        let stride = columns.stride();
        let table = &mut table[..n * stride];
        hide(table, stride, m, |c| off + r0 + c + 1);
        let (mut top, mut sum) = (vec![f32::NEG_INFINITY; stride], vec![0f32; stride]);
        column_max(table, &mut top);
        column_exp(table, &top, &mut sum);
        for c in 0..m {
            let seen = off + r0 + c + 1;
            let row = &mut out[(r0 + c) * width..(r0 + c + 1) * width];
            for (x, to) in row.iter_mut().enumerate() {
                *to = cell(x, width, seen).map(|j| table[j as usize * stride + c]).sum::<f32>() / sum[c];
            }
        }
    }
    (out, work)
}

impl Layer {
    /// The estimate's logits (B, H, T, width) and what the encoder saw (B, H, T, 2D).
    fn estimate(&self, i: &MixInput) -> Result<(Tensor, Tensor, Work)> {
        let (b, h, t, d) = i.q.dims4()?;
        let kv = i.k.dim(1)?;
        let (c, w) = (self.config.channels, self.config.width);
        let features = |x: &Tensor| -> Result<Tensor> {
            Ok((linear(&(x * (d as f64).powf(-0.25))?, &self.projection, None)?.relu()? + 1e-3)?)
        };
        // Positions as sines and cosines of the usual frequencies.
        let (cos, sin) = Rope::new(d, 10_000.0).tables(0, t);
        let half = d / 2;
        let mut position = vec![0f32; t * d];
        for ((x, s), c) in position.chunks_exact_mut(d).zip(sin.chunks(half.max(1))).zip(cos.chunks(half.max(1))) {
            x[..half].copy_from_slice(&s[..half]);
            x[half..2 * half].copy_from_slice(&c[..half]);
        }
        let position = Tensor::from_vec(position, (1, 1, t, d), &Device::Cpu)?.broadcast_as((b, kv, t, d))?;
        let values = Tensor::cat(&[&position, i.v], 3)?;
        let options = FeatureOptions { causal: true, normalise: Some(0.0) };
        let (context, mut work) = feature_attend(&features(i.q)?, &features(i.k)?, &values, None, &options)?;
        let x = Tensor::cat(&[&context, &for_each_query_head(i.v, h)?], 3)?;
        let [weight, bias, norm, shift] = &self.encoder;
        let x = layer_norm(&linear(&x, weight, Some(bias))?, norm, shift)?.gelu_erf()?;
        let map = linear(&x, &self.decoder[0], Some(&self.decoder[1]))?;
        let map = map.reshape((b, h, t, c, w / 4))?.permute((0, 1, 3, 2, 4))?.reshape((b, h * c, t, w / 4))?;
        // Rows of the past alone.
        let map = map.pad_with_zeros(2, 2, 0)?.pad_with_zeros(3, 1, 1)?;
        let [weight, bias] = &self.conv1;
        let map = map.conv2d(weight, 0, 1, 1, 1)?.broadcast_add(&bias.reshape((1, (), 1, 1))?)?.relu()?;
        let map = map.unsqueeze(4)?.broadcast_as((b, h * c, t, w / 4, 4))?.reshape((b, h * c, t, w))?;
        let map = layer_norm(&map.conv2d(&self.conv2, 0, 1, 1, 1)?, &self.norm[0], &self.norm[1])?;
        let r = self.projection.dim(0)?;
        let each = 2 * d * (r + 3 * 2 * d + c * w / 4) + c * w / 4 * (18 * c * h) + 2 * w * c * h + 8 * (2 * d + w);
        work.flops += (b * h * t * each + 2 * b * kv * t * d * r) as u64;
        work.bytes += bytes(b * (h + 2 * kv) * t, d);
        Ok((map, x, work))
    }

    /// KL(true attention summed over cells‖estimate), averaged over queries.
    fn loss(&self, i: &MixInput, map: &Tensor) -> Result<(Tensor, Work)> {
        let (b, h, t, d) = i.q.dims4()?;
        let (w, group) = (self.config.width, h / i.k.dim(1)?);
        let (q, k, scale) = (numbers(i.q)?, numbers(i.k)?, i.scale()?);
        let all: Vec<(Vec<f32>, Work)> = (0..b * h)
            .into_par_iter()
            .map(|x| {
                let q = Mat::new(&q[x * t * d..(x + 1) * t * d], t, d, d);
                let k = Mat::new(&k[x / group * t * d..(x / group + 1) * t * d], t, d, d);
                cell_mass(&HeadProblem::new(q, k, scale), w)
            })
            .collect();
        let work = all.iter().map(|x| x.1).sum();
        let mass: Vec<f32> = all.into_iter().flat_map(|x| x.0).collect();
        let entropy: f64 = mass.iter().filter(|x| **x > 0.0).map(|x| f64::from(*x) * f64::from(*x).ln()).sum();
        // −1e9 rather than −∞: times a mass of zero that is zero.
        let empty = |i: usize, c: usize| cell(c, w, i + 1).is_empty();
        let hidden: Vec<f32> = (0..t * w).map(|x| if empty(x / w, x % w) { -1e9 } else { 0.0 }).collect();
        let map = map.broadcast_add(&Tensor::from_vec(hidden, (t, w), &Device::Cpu)?)?;
        let mass = Tensor::from_vec(mass, (b, h, t, w), &Device::Cpu)?;
        let cross = (candle_nn::ops::log_softmax(&map, D::Minus1)? * mass)?.sum_all()?;
        Ok((((cross.neg()? + entropy)? / (b * h * t) as f64)?, work))
    }
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let (b, h, t, _) = i.q.dims4()?;
        let (_, kv, tk, dv) = i.v.dims4()?;
        if tk != t {
            return Err(Error::Shape {
                op: CARD.id,
                tensor: "k",
                shape: i.k.dims().to_vec(),
                expected: format!("q's {t} tokens: the estimate convolves over all queries"),
            });
        }
        let (map, x, mut select) = self.estimate(i)?;
        let w = self.config.width;
        let selections: Vec<HeadSelection> = numbers(&map)?
            .par_chunks_exact((t * w).max(1))
            .map(|map| {
                let mut keys = HeadKeys { group: 1, indptr: vec![0], keys: Vec::new() };
                for (r, row) in map.chunks_exact(w).enumerate() {
                    keys_of(row, r + 1, self.config.keys, &mut keys.keys);
                    keys.indptr.push(keys.keys.len());
                }
                HeadSelection::of_keys(keys)
            })
            .collect();
        let mut loss = None;
        if self.config.distil {
            let (kl, work) = self.loss(i, &map)?;
            select += work;
            loss = Some(kl);
        }
        let options = AttendOptions { scale: i.scale, ..AttendOptions::causal() };
        let a = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        // The running mean of v is a linear attention whose features are all one.
        let ones = |heads| Tensor::ones((b, heads, t, 1), i.v.dtype(), &Device::Cpu);
        let running = FeatureOptions { causal: true, normalise: Some(0.0) };
        let (mean, means) = feature_attend(&ones(h)?, &ones(kv)?, i.v, None, &running)?;
        let factors = linear(&x, &self.scale[0], Some(&self.scale[1]))?;
        let factors = (factors.neg()?.exp()? + 1.0)?.recip()?;
        let (first, second) = (factors.narrow(3, 0, 1)?, factors.narrow(3, 1, 1)?);
        let sparse = a.out.broadcast_mul(&(first * &second)?)?;
        let out = (sparse + mean.broadcast_mul(&(1.0 - second)?)?)?;
        let mut work = a.work + means;
        work.flops += (b * h * t * 3 * dv) as u64;
        Ok(Mixed { out, work, select, loss, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "sea-estimated-mask",
    title: "SEA: Sparse Linear Attention with Estimated Attention Mask",
    authors: "Lee et al., 2023",
    arxiv: "2310.01777",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::Work { pairs: Growth::Linear, flops: Growth::Linear },
        Law::Monotone { param: "keys", values: &["1", "8", "64", "400", "100000"] },
    ],
    equation: "c_i = sum_j f(q_i)·f(k_j) [pos_j; v_j] / sum_j f(q_i)·f(k_j)\n\
               row i of the map = softmax(CNN(encoder([c_i; v_i])))\n\
               the best cells of width/(i+1) keys each, keys in all, are attended exactly\n\
               o_i = s(b_i) s(a_i) sparse_i + (1 - s(b_i)) mean of v up to i, s the logistic function",
    cost: "linear: T·D·(6D + channels·width/2) encoder, 9/4·T·width·channels²·H convolutions, keys per query; \
           memory T·width",
    choices: &[
        "The authors' causal predictor, shortened: one causal 3x3 convolution at a quarter of the width where they \
         have two dilated ones, nearest-neighbour widening by 4, a 1x1 convolution (without the bias that the next \
         step takes away), and their layer normalisation of the map.",
        "Positions are fixed sines and cosines where the authors learn a table of the model's longest prompt.",
        "The projection of the features is a parameter and trains; the authors draw it anew every thousand steps.",
        "At least one cell is attended, so pairs are linear up to keys·width tokens (16,384 by default) and grow by \
         T/width from there.",
        "Each query of each head chooses its own cells; the authors rank the cells of all heads of a query \
         together.",
        "The authors resize the map to T x T, mask it and compare it there with the teacher (KL and squares). \
         Weight that is spread evenly over a cell gives the same KL, up to a constant, as the teacher summed over \
         cells: T x width is enough.",
        "distil is off by default: the loss costs what dense attention's scores cost, and its target is held fixed, \
         hence no law of gradients (a test of its own checks those of the estimator).",
    ],
    params: params_of::<Sea>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Sea>(CARD.id, params)?)))
}
