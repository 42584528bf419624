//! Sparsifiner: a predicted mask for each image (Wei et al. 2023, arXiv 2303.13755).
//!
//! A light predictor guesses the attention map from narrow rows: q' = W_q q + b_q and k' = W_k k + b_k have D/2
//! channels, keys are mixed down to m = T/`reduce_tokens` of them, and the guess is low-rank, A ≈ softmax(q' (k'ᵀ
//! P)/√H) · B, with P (T, m) and the basis B (m, T) learned. Of the coefficients only the largest few stay, of |B|
//! what exceeds a threshold; the ⌈keep_rate·T⌉ largest entries of a row are attended, exactly. Training shows the
//! predictor the true map: the squared distance of softmax(…) · B, nothing dropped, from it.
//!
//! q, k, v (B, H or H_kv, T, D) over a token grid of fixed size → (B, H, T, D). Cost: T²·(D + 16)/reduce_tokens and
//! 2·T²·coefficients for the guess, keep_rate·T keys per query; parameters 2·T²/reduce_tokens.

use super::estimate::{SOFTMAX_FLOPS, bytes};
use super::layer_ops::{for_each_query_head, linear, numbers};
use super::{Domain, HeadSelection};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::select::topk;
use crate::prim::{AttendOptions, attend_selected, softmax};
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use candle_core::{D, Tensor};
use candle_nn::{Init, VarBuilder};
use foveal_kernels::{HeadKeys, Work};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sparsifiner {
    /// Share of the keys that a query attends to.
    pub keep_rate: f64,
    /// Tokens per row of the basis.
    pub reduce_tokens: usize,
    /// Channels of a head per channel of the predictor.
    pub reduce_channels: usize,
    /// Coefficients of a row that stay.
    pub coefficients: usize,
    /// Least entry of the basis that stays.
    pub basis_threshold: f64,
    /// Whether the loss that shows the predictor the true map is computed.
    pub distil: bool,
}

impl Default for Sparsifiner {
    fn default() -> Self {
        Self {
            keep_rate: 0.25,
            reduce_tokens: 6,
            reduce_channels: 2,
            coefficients: 8,
            basis_threshold: 0.02,
            distil: false,
        }
    }
}

impl Config for Sparsifiner {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("keep_rate", "share, 0 to 1, of the keys that a query attends to; 1 is exact"),
        ("reduce_tokens", "tokens for each row of the basis of guessed maps"),
        ("reduce_channels", "channels of a head for each channel of the predictor"),
        ("coefficients", "basis rows that a guessed row of the map is made of"),
        ("basis_threshold", "entries of the basis below this count as 0"),
        ("distil", "compute the loss that shows the predictor the true map; for training, takes T² memory"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(self.keep_rate > 0.0 && self.keep_rate <= 1.0) {
            return Err(format!("keep_rate = {}: use a share above 0, up to 1", self.keep_rate));
        }
        if self.reduce_tokens == 0 || self.reduce_channels == 0 || self.coefficients == 0 {
            return Err(format!(
                "reduce_tokens = {}, reduce_channels = {}, coefficients = {}: use at least 1",
                self.reduce_tokens, self.reduce_channels, self.coefficients
            ));
        }
        if !(self.basis_threshold.is_finite() && self.basis_threshold >= 0.0) {
            return Err(format!("basis_threshold = {}: use a number of 0 or more", self.basis_threshold));
        }
        Ok(())
    }
}

struct Layer {
    config: Sparsifiner,
    /// Tokens of an image, those before the grid first.
    tokens: usize,
    /// Tokens before the grid, which attend to everything.
    first: usize,
    q: [Tensor; 2],
    k: [Tensor; 2],
    mix: Tensor,
    /// (T, m): the basis, transposed.
    basis: Tensor,
}

impl MixerSystem for Sparsifiner {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let grid = dims.grid.ok_or_else(|| Error::Param {
            system: CARD.id.into(),
            message: "no token grid: the predictor is made for one number of tokens".into(),
        })?;
        let d = dims.head_dim;
        let (c, tokens) = ((d / self.reduce_channels).max(1), grid.range().end);
        let m = (tokens / self.reduce_tokens).max(1);
        let narrow = |name: &str| -> Result<[Tensor; 2]> {
            let init = Init::Randn { mean: 0.0, stdev: 1.0 / (d as f64).sqrt() };
            let bias = vb.get_with_hints((c,), &format!("{name}.bias"), Init::Const(0.0))?;
            Ok([vb.get_with_hints((c, d), &format!("{name}.weight"), init)?, bias])
        };
        let small = Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Box::new(Layer {
            config: self.clone(),
            tokens,
            first: grid.first,
            q: narrow("proj_q")?,
            k: narrow("proj_k")?,
            mix: vb.get_with_hints((tokens, m), "proj_n", small)?,
            basis: vb.get_with_hints((tokens, m), "proj_back_n", small)?,
        }))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }
}

impl Layer {
    /// Coefficients (B, H, T, m), with the work of guessing them.
    fn guess(&self, i: &MixInput) -> Result<(Tensor, Work)> {
        let (b, h, t, d) = i.q.dims4()?;
        let kv = i.k.dim(1)?;
        let m = self.mix.dim(1)?;
        let (q, k) = (linear(i.q, &self.q[0], Some(&self.q[1]))?, linear(i.k, &self.k[0], Some(&self.k[1]))?);
        let c = q.dim(3)?;
        let k = k.transpose(2, 3)?.contiguous()?.broadcast_matmul(&self.mix)?;
        let k = for_each_query_head(&k, h)?.contiguous()?;
        let (p, work) = softmax(&(q.contiguous()?.matmul(&k)? * (1.0 / (h as f64).sqrt()))?)?;
        let narrow = 2 * b * t * d * c * (h + kv);
        let flops = narrow + 2 * b * kv * c * t * m + 2 * b * h * t * m * c;
        let read = bytes(b * t * (h + kv), d);
        Ok((p, work + Work { flops: flops as u64, bytes: read, ..Work::default() }))
    }

    /// What each (batch, head) visits, and the work of expanding the guess.
    fn choose(&self, coefficients: &Tensor) -> Result<(Vec<HeadSelection>, Work)> {
        let (t, m) = (self.tokens, self.basis.dim(1)?);
        let keep = (self.config.keep_rate * t as f64).ceil() as usize;
        let least = self.config.basis_threshold as f32;
        let mut basis = numbers(&self.basis.t()?.contiguous()?)?;
        basis.iter_mut().for_each(|x| *x = if x.abs() > least { x.abs() } else { 0.0 });
        let all = numbers(coefficients)?;
        let few = self.config.coefficients.min(m);
        let work = Work {
            flops: (all.len() / m.max(1) * few * 2 * t) as u64,
            bytes: bytes(all.len() / m.max(1) * few, t),
            ..Work::default()
        };
        let heads = all.par_chunks_exact((t * m).max(1)).map(|rows| {
            let mut keys = HeadKeys { group: 1, indptr: vec![0], keys: Vec::new() };
            let mut row = vec![0f32; t];
            for (r, x) in rows.chunks_exact(m).enumerate() {
                if r < self.first || keep >= t {
                    keys.keys.extend(0..t as u32);
                } else {
                    row.fill(0.0);
                    for &j in &topk(x, few) {
                        let (x, line) = (x[j as usize], &basis[j as usize * t..(j as usize + 1) * t]);
                        row.iter_mut().zip(line).for_each(|(to, y)| *to += x * y);
                    }
                    keys.keys.extend(topk(&row, keep));
                }
                keys.indptr.push(keys.keys.len());
            }
            HeadSelection::of_keys(keys)
        });
        Ok((heads.collect(), work))
    }
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let (_, h, t, _) = i.q.dims4()?;
        for (tensor, x) in [("q", i.q), ("k", i.k)] {
            if x.dim(2)? != self.tokens {
                return Err(Error::Shape {
                    op: CARD.id,
                    tensor,
                    shape: x.dims().to_vec(),
                    expected: format!("the {} tokens that the layer was made for", self.tokens),
                });
            }
        }
        let (p, mut select) = self.guess(i)?;
        let (selections, expanding) = self.choose(&p)?;
        select += expanding;
        let mut loss = None;
        if self.config.distil {
            let k = for_each_query_head(&i.k.detach(), h)?;
            let scores = (i.q.detach().contiguous()?.matmul(&k.t()?.contiguous()?)? * f64::from(i.scale()?))?;
            let true_map = candle_nn::ops::softmax(&scores, D::Minus1)?;
            let guess = p.broadcast_matmul(&self.basis.t()?.contiguous()?)?;
            let rows = (self.first, t - self.first);
            let apart = (guess.narrow(2, rows.0, rows.1)? - true_map.narrow(2, rows.0, rows.1)?)?;
            loss = Some(apart.sqr()?.sum(D::Minus1)?.mean_all()?);
            let entries = p.elem_count() / p.dim(3)? * t;
            select.flops += (entries * (2 * i.q.dim(3)? + 2 * p.dim(3)? + SOFTMAX_FLOPS + 3)) as u64;
        }
        let options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        let a = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        Ok(Mixed { out: a.out, work: a.work, select, loss, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "sparsifiner",
    title: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    authors: "Wei et al., 2023",
    arxiv: "2303.13755",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::ExactAt(&[("keep_rate", "1")]),
        Law::Monotone { param: "keep_rate", values: &["0.01", "0.1", "0.25", "0.6", "1"] },
    ],
    equation: "c = softmax((W_q q)(P'(W_k k))' / sqrt(H)), largest coefficients kept\n\
               A = c · |B|, small entries of B dropped\n\
               each row attends to its keep_rate·T largest entries of A, exactly\n\
               training: |c B - softmax(scale·QK')|² with nothing dropped",
    cost: "T²·(D + 16)/reduce_tokens + 2·T²·coefficients for the guess, keep_rate·T keys per query; \
           2·T²/reduce_tokens parameters",
    choices: &[
        "As in the authors' code: the scale of the guess is one over the root of the number of heads, not of their \
         width; magnitudes of the basis are taken where the mask is made, signs where it is trained; W_q and W_k \
         are shared by all heads.",
        "Class tokens are those before the grid: they attend to everything, as there.",
        "The mask has no gradient; the predictor learns from the distance to the true map alone. The authors first \
         train it so for a few epochs, then the network under its masks.",
        "Parameters are as many as pairs of tokens over reduce_tokens, and belong to one size of image: no claim on\
          growth.",
        "The guess is expanded from its few coefficients, not by a product over the whole basis: the same numbers.",
    ],
    params: params_of::<Sparsifiner>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Sparsifiner>(CARD.id, params)?)))
}
