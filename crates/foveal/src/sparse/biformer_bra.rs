//! BiFormer: bi-level routing attention (Zhu et al. 2023, arXiv 2303.08810).
//!
//! A frame is cut into side × side regions. With q̄_r, k̄_r the means of region r over its tokens, all heads side by side,
//! region r's tokens attend to the tokens of the `topk` regions of largest q̄_r·k̄_s; every head of a layer takes the
//! same. A depthwise `lce` × `lce` convolution of V, learned, adds local context: O = Attention(Q, K^g, V^g) + LCE(V).
//!
//! q (B, H, T, D) → (B, H, T, D). Cost: T·H·D for the means, 2·H·D·R² flops for R regions, T·topk·T/R pairs: with R ~ T^(2/3)
//! O(T^(4/3)).

use super::boxes::Boxes;
use super::estimate::bytes;
use super::run::with_rows;
use super::{Domain, Grid, HeadSelection, Mat};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::abt;
use crate::prim::select::topk;
use crate::prim::{AttendOptions, attend_selected};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BiformerBra {
    /// Regions along each side of a frame.
    pub side: usize,
    /// Regions that each region attends to.
    pub topk: usize,
    /// Side of the convolution of V; 0 for none.
    pub lce: usize,
}

impl Default for BiformerBra {
    fn default() -> Self {
        Self { side: 7, topk: 4, lce: 0 }
    }
}

impl Config for BiformerBra {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("side", "regions along each side of a frame"),
        ("topk", "regions that each region attends to"),
        ("lce", "side of the depthwise convolution of V, odd; 0 for none, which needs no weights; 5 in the paper"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.side == 0 || self.topk == 0 {
            return Err(format!("side = {}, topk = {}: use at least 1", self.side, self.topk));
        }
        if self.lce > 0 && self.lce.is_multiple_of(2) {
            return Err(format!("lce = {}: use an odd side such as 5, or 0 for no convolution", self.lce));
        }
        Ok(())
    }
}

impl MixerSystem for BiformerBra {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let Some(grid) = dims.grid else {
            return Err(Error::Param {
                system: CARD.id.into(),
                message: "no token grid: give the layer's dimensions one".into(),
            });
        };
        let channels = dims.heads * dims.head_dim;
        let lce = match self.lce {
            0 => None,
            n => {
                let bound = 1.0 / n as f64;
                let init = Init::Uniform { lo: -bound, up: bound };
                let vb = vb.pp("lce");
                let weight = vb.get_with_hints((channels, 1, n, n), "weight", init)?;
                Some((weight, vb.get_with_hints(channels, "bias", init)?))
            }
        };
        Ok(Box::new(Layer { bra: self.clone(), grid, lce }))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }
}

struct Layer {
    bra: BiformerBra,
    grid: Grid,
    /// Weight (H·Dv, 1, n, n) and bias (H·Dv) of the convolution.
    lce: Option<(Tensor, Tensor)>,
}

impl Layer {
    /// The selection of every head of each batch.
    fn route(&self, i: &MixInput) -> Result<(Vec<HeadSelection>, Work)> {
        let ((b, h, t, d), (_, hkv, ..)) = (i.q.dims4()?, i.k.dims4()?);
        let side = |n: usize| (n / self.bra.side).max(1);
        let boxes = Boxes::new(self.grid, [1, side(self.grid.h), side(self.grid.w)], t);
        let n = boxes.len();
        let mut work = Work::default();
        let mut selections = Vec::with_capacity(b * h);
        with_rows("q", i.q, |q, qs| {
            with_rows("k", i.k, |k, ks| -> Result<()> {
                for bi in 0..b {
                    // Means of all heads side by side.
                    let mut sides = [vec![0f32; n * h * d], vec![0f32; n * h * d]];
                    for hi in 0..h {
                        let rows = [
                            Mat::new(&q[bi * qs[0] + hi * qs[1]..], t, d, qs[2]),
                            Mat::new(&k[bi * ks[0] + hi / (h / hkv) * ks[1]..], t, d, ks[2]),
                        ];
                        for (side, rows) in sides.iter_mut().zip(&rows) {
                            let (means, flops) = boxes.means(rows);
                            work.flops += flops;
                            work.bytes += bytes(boxes.tokens(), d);
                            for (to, from) in side.chunks_exact_mut(h * d).zip(means.chunks_exact(d)) {
                                to[hi * d..(hi + 1) * d].copy_from_slice(from);
                            }
                        }
                    }
                    let mut score = vec![0f32; n * n];
                    work.flops += abt(n, n, h * d, 1.0, &sides[0], h * d, &sides[1], h * d, &mut score);
                    let chosen: Vec<Vec<u32>> = score.chunks_exact(n).map(|s| topk(s, self.bra.topk)).collect();
                    let one = boxes.selection(64, true, |own, _, bits| {
                        chosen[own].iter().for_each(|&r| bits[r as usize] = u64::MAX);
                    })?;
                    selections.extend((0..h).map(|_| one.clone()));
                }
                Ok(())
            })
        })???;
        Ok((selections, work))
    }

    /// The convolution of v over each frame: (B, H, T, Dv), zero for text; and its flops.
    fn local(&self, v: &Tensor, heads: usize, weight: &Tensor, bias: &Tensor) -> Result<(Tensor, u64)> {
        let (b, hkv, tokens, dv) = v.dims4()?;
        let (Grid { first, t, h, w }, n) = (self.grid, self.bra.lce);
        let m = t * h * w;
        let v = v.narrow(2, first, m)?;
        let v = if hkv == heads {
            v.contiguous()?
        } else {
            // Channels of each query head have weights of their own.
            let shape = (b, hkv, heads / hkv, m, dv);
            v.unsqueeze(2)?.broadcast_as(shape)?.contiguous()?.reshape((b, heads, m, dv))?
        };
        let image =
            v.reshape((b, heads, t, h, w, dv))?.pad_with_zeros(3, n / 2, n / 2)?.pad_with_zeros(4, n / 2, n / 2)?;
        let weight = weight.reshape((heads, dv, n, n))?;
        // Tap by tap, in the layout that attention has: a grouped convolution would take a pass a channel.
        let mut out = bias.reshape((1, heads, 1, 1, 1, dv))?.broadcast_as((b, heads, t, h, w, dv))?.contiguous()?;
        for y in 0..n {
            for x in 0..n {
                let tap = weight.narrow(2, y, 1)?.narrow(3, x, 1)?.contiguous()?.reshape((1, heads, 1, 1, 1, dv))?;
                out = (out + image.narrow(3, y, h)?.narrow(4, x, w)?.contiguous()?.broadcast_mul(&tap)?)?;
            }
        }
        let out = out.reshape((b, heads, m, dv))?;
        let out = out.pad_with_zeros(2, first, tokens - first - m)?;
        Ok((out, (2 * n * n * b * heads * m * dv) as u64))
    }
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((_, h, tq, _), (_, hkv, tk, _)) = (i.q.dims4()?, i.k.dims4()?);
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(foveal_kernels::KernelError::Groups { op: "biformer-bra", heads: h, kv_heads: hkv }.into());
        }
        self.grid.check(tk)?;
        if tq != tk {
            return Err(Error::Shape {
                op: "biformer-bra",
                tensor: "q",
                shape: i.q.dims().to_vec(),
                expected: format!("as many tokens as k's {tk}: a grid has a query for every key"),
            });
        }
        let (selections, select) = self.route(i)?;
        let options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        let a = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        let (mut out, mut work) = (a.out, a.work);
        if let Some((weight, bias)) = &self.lce {
            let (local, flops) = self.local(i.v, h, weight, bias)?;
            out = (out + local)?;
            work.flops += flops;
        }
        Ok(Mixed { out, work, select, loss: None, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "biformer-bra",
    title: "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    authors: "Zhu et al., 2023",
    arxiv: "2303.08810",
    family: Family::Sparse,
    slots: &[Slot::Prefill, Slot::Mixer],
    laws: &[
        Law::ExactAt(&[("topk", "1000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "topk", values: &["1", "2", "4", "16", "1000000"] },
    ],
    equation: "region r attends to the tokens of the topk regions s of largest mean(Q_r)·mean(K_s), all heads together\n\
               O = Attention(Q, K, V over these) + LCE(V)",
    cost: "2·H·D·R² flops for R regions a layer, topk/R of all pairs; O(T^(4/3)) at R ~ T^(2/3)",
    choices: &[
        "side 7 and topk 4 as in the published code's second stage. The convolution of V is 5x5 there; it is off by default, as its \
         weights belong to a trained layer: lce=5.",
        "Regions of floor(side of the frame / side) tokens and a smaller last one, averaged over what they have, as the published code \
         does. Several frames have regions each, which route among all frames.",
        "Scores use the factor of the layer, 1/√D of a head; the published code takes 1/√(heads·D) to be true to its first models.",
        "Text before and after the grid sees everything, is seen by everything and is not convolved.",
        "The published code lets the choice have no gradient; so it is here. Gradients of q, k, v and the convolution are tested where \
         regions are far from a tie: at the defaults a small grid has regions of one token, whose choice turns within any step of a \
         difference.",
        "On the made video of the grid_quality example (4x24x24 tokens): side=6,topk=24 holds 84.5% of the attention on 16.7% of the pairs \
         (best choice 91.0%); the default, made for one 7x7 grid of regions, 38.7% on 1.6%.",
    ],
    params: params_of::<BiformerBra>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<BiformerBra>(CARD.id, params)?)))
}
