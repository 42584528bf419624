//! SSA: full and sparse attention side by side, aligned in both directions (Shen et al. 2025, arXiv 2511.20102).
//!
//! Of the same q, k, v: o_f exact, o_s over the `topk` blocks of `block_size` keys whose mean key is nearest to the
//! query, its own included. A training step runs the model on one of the two; every layer computes the other as
//! well and adds L(o_f, sg o_s) + L(sg o_f, o_s), L the smooth L1 distance: full attention is drawn towards what
//! few blocks can say, and keys that the sparse one leaves out still get gradients. At inference either serves.
//!
//! q (B, H, T, D), k and v (B, H_kv, T, D) → (B, H, T, D) and the loss. Cost: dense attention while aligned, else
//! that of [`super::moba`]: T²/block_size·D for the choice, topk·block_size keys per query.

use super::moba::Moba;
use super::run::{At, prefill};
use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::{AttendOptions, attend};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use foveal_kernels::Work;
use serde::{Deserialize, Serialize};

/// Which attention the layer's output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Over the chosen blocks.
    Sparse,
    /// Over everything.
    Full,
}

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ssa {
    /// Keys per block.
    pub block_size: usize,
    /// Blocks per query, its own included.
    pub topk: usize,
    /// Which attention the output is.
    pub mode: Mode,
    /// Whether the other one is computed too, for the loss.
    pub align: bool,
}

impl Default for Ssa {
    fn default() -> Self {
        Self { block_size: 16, topk: 16, mode: Mode::Sparse, align: true }
    }
}

impl Config for Ssa {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "keys per block"),
        ("topk", "blocks that each query of the sparse attention attends to, its own included"),
        ("mode", "which attention the output is: sparse or full"),
        ("align", "compute the other attention too, for the loss; turn off at inference"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 || self.topk == 0 {
            return Err(format!("block_size = {}, topk = {}: use at least 1", self.block_size, self.topk));
        }
        Ok(())
    }
}

impl MixerSystem for Ssa {
    fn layer(&self, _: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(self.clone()))
    }
}

/// Mean of ½d² where |d| < 1 and |d| − ½ elsewhere.
fn smooth_l1(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let far = (a - b)?.abs()?;
    let near = (far.sqr()? * 0.5)?;
    Ok(far.lt(1.0)?.where_cond(&near, &(&far - 0.5)?)?.mean_all()?)
}

impl Mixer for Ssa {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let options = AttendOptions { scale: i.scale, ..AttendOptions::causal() };
        let wanted = |mode| self.align || self.mode == mode;
        let (mut work, mut select, mut selections) = (Work::default(), Work::default(), Vec::new());
        let mut sparse = None;
        if wanted(Mode::Sparse) {
            let moba = Moba { block_size: self.block_size, topk: self.topk, ..Moba::default() };
            let p = prefill(|_| Some(&moba), i.q, i.k, i.v, &options, At::NOWHERE)?;
            work += p.attended.work;
            select += p.select;
            sparse = Some(p.attended.out);
            if self.mode == Mode::Sparse {
                selections = p.selections;
            }
        }
        let mut full = None;
        if wanted(Mode::Full) {
            let a = attend(i.q, i.k, i.v, &options, None)?;
            work += a.work;
            full = Some(a.out);
        }
        let loss = match (&sparse, &full) {
            (Some(s), Some(f)) if s.elem_count() > 0 => Some(smooth_l1(s, f)?),
            _ => None,
        };
        let out = if self.mode == Mode::Sparse { sparse } else { full };
        let Some(out) = out else { unreachable!("the attention of the layer's mode is always computed") };
        Ok(Mixed { out, work, select, loss, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "ssa",
    title: "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space",
    authors: "Shen et al., 2025",
    arxiv: "2511.20102",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("mode", "full")]),
        Law::ExactAt(&[("topk", "1000000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "topk", values: &["1", "2", "5", "20", "1000000"] },
        Law::Gradients,
    ],
    equation: "o_f = softmax(scale·QK') V;  o_s over the topk blocks of largest q·mean(K_b), own block included\n\
               loss += L(o_f, sg o_s) + L(sg o_f, o_s), L smooth L1;  output o_s or o_f by mode",
    cost: "training: dense and sparse attention; inference in sparse mode: T²·D/block_size choice, \
           topk·block_size keys per query",
    choices: &[
        "The loss is L(o_f, o_s) without stopped gradients: its gradient is the sum of the two terms', its value \
         half of theirs. L and the defaults (16 blocks of 16) are the authors' code's; the weight of the loss is \
         the training loop's.",
        "The authors choose blocks through the kernels of native sparse attention, once for a group of query heads; \
         here each query head chooses by mean keys as in MoBA, which the paper names as an equal choice.",
        "The authors draw the mode anew for every training step: here it is a parameter, and a training loop that \
         wants to switch keeps two layers (there are no weights to share). Their gate on both outputs, left over \
         from native sparse attention, is not part of the method and left out.",
    ],
    params: params_of::<Ssa>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Ssa>(CARD.id, params)?)))
}
