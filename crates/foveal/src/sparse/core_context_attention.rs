//! CCA: core context aware attention (Chen et al. 2024, arXiv 2412.12465).
//!
//! Groups of g tokens are pooled into core tokens, weighted by what the group's last query attends to in it: w_i =
//! softmax(scale · q_(last of i) · K_i), K̃_i = w_i K_i, Ṽ_i = w_i V_i. A query attends, in one softmax, to the core
//! tokens of far groups and to all tokens from the end of the last of these on: at least `window` of them, so that
//! every token is within reach once.
//!
//! q (B, H, T, D), k and v (B, H_kv, T, D) → (B, H, T, D). Cost: 6·T·D for pooling, T/g + window keys per query.

use super::HeadSelection;
use super::estimate::{SOFTMAX_FLOPS, bytes};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::{AttendOptions, attend, attend_selected, softmax};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use foveal_kernels::{HeadKeys, HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoreContext {
    /// Tokens per core token.
    pub group_size: usize,
    /// Tokens that are attended one by one.
    pub window: usize,
}

impl Default for CoreContext {
    fn default() -> Self {
        Self { group_size: 16, window: 1024 }
    }
}

impl Config for CoreContext {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("group_size", "tokens that are pooled into one core token"),
        ("window", "tokens before a query's group that it attends to one by one, a multiple of group_size"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.group_size < 2 || self.window == 0 || !self.window.is_multiple_of(self.group_size) {
            return Err(format!(
                "group_size = {}, window = {}: use groups of at least 2 and a multiple of them, such as 16 and 1024",
                self.group_size, self.window
            ));
        }
        Ok(())
    }
}

impl MixerSystem for CoreContext {
    fn layer(&self, _: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(self.clone()))
    }
}

impl CoreContext {
    /// Core keys and values of the first `n` groups, (B, H_kv, n, ·).
    fn cores(&self, i: &MixInput, n: usize) -> Result<(Tensor, Tensor, Work)> {
        let g = self.group_size;
        let (b, h, _, d) = i.q.dims4()?;
        let (_, kv, _, dv) = i.v.dims4()?;
        let last: Vec<u32> = (1..=n as u32).map(|x| x * g as u32 - 1).collect();
        let q = i.q.contiguous()?.index_select(&Tensor::from_vec(last, n, &Device::Cpu)?, 2)?;
        let q = q.reshape((b, kv, h / kv, n, d))?.mean(2)?;
        let k = i.k.narrow(2, 0, n * g)?.reshape((b, kv, n, g, d))?;
        let v = i.v.narrow(2, 0, n * g)?.reshape((b, kv, n, g, dv))?;
        let scores = (k.broadcast_mul(&q.unsqueeze(3)?)?.sum(4)? * f64::from(i.scale()?))?;
        let (weights, mut work) = softmax(&scores)?;
        let weights = weights.unsqueeze(4)?;
        let rows = b * kv * n * g;
        work.flops += (rows * (4 * d + 2 * dv + SOFTMAX_FLOPS) + b * h * n * d) as u64;
        work.bytes += bytes(rows, d + dv) + bytes(b * h * n, d);
        Ok((k.broadcast_mul(&weights)?.sum(3)?, v.broadcast_mul(&weights)?.sum(3)?, work))
    }
}

impl Mixer for CoreContext {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let (b, h, t, _) = i.q.dims4()?;
        if i.k.dim(2)? != t {
            return Err(Error::Shape {
                op: CARD.id,
                tensor: "k",
                shape: i.k.dims().to_vec(),
                expected: format!("q's {t} tokens: past groups are pooled by their own queries"),
            });
        }
        let (g, near) = (self.group_size, self.window / self.group_size);
        let options = AttendOptions { scale: i.scale, ..AttendOptions::causal() };
        // Core tokens that the last group of queries sees.
        let n = t.div_ceil(g).saturating_sub(near + 1);
        if n == 0 {
            let a = attend(i.q, i.k, i.v, &options, None)?;
            return Ok(Mixed { out: a.out, work: a.work, select: Work::default(), loss: None, selections: Vec::new() });
        }
        let (ck, cv, pooling) = self.cores(i, n)?;
        // Core tokens stand before the others, filled up so that groups stay whole blocks.
        let front = n.next_multiple_of(g);
        let join = |core: &Tensor, x: &Tensor| Tensor::cat(&[&core.pad_with_zeros(2, 0, front - n)?, x], 2);
        let (k, v) = (join(&ck, i.k)?, join(&cv, i.v)?);
        let groups = 0..t.div_ceil(g);
        let blocks = groups.clone().map(|x| (x.saturating_sub(near)..=x).map(|y| (front / g + y) as u32).collect());
        let cores = groups.map(|x| (0..x.saturating_sub(near) as u32).collect());
        let selection = HeadSelection::of_both(
            HeadTable::from_lists(g, g, blocks.collect()),
            HeadKeys::from_lists(g, cores.collect()),
        );
        let a = attend_selected(i.q, &k, &v, &options, vec![selection; b * h])?;
        Ok(Mixed { out: a.out, work: a.work + pooling, select: Work::default(), loss: None, selections: Vec::new() })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "core-context-attention",
    title: "Core Context Aware Transformers for Long Context Language Modeling",
    authors: "Chen et al., 2024",
    arxiv: "2412.12465",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("window", "1073741824")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "window", values: &["16", "64", "256", "1024"] },
        Law::Gradients,
    ],
    equation: "w_i = softmax(scale · q_last(i) · K_i),  core K_i = w_i K_i,  core V_i = w_i V_i  (groups of g tokens)\n\
               query in group B: one softmax over the cores of groups < B - window/g and the tokens after them",
    cost: "6·T·D pooling, T/group_size + window keys per query; memory T/group_size core rows",
    choices: &[
        "The paper pools inputs x and projects the core tokens; with the projections linear and weights per head \
         that is pooling k and v, which is what a layer is given. Keys are pooled after rotation.",
        "The last query of a group speaks for it, as in the paper; where query heads share keys and values, their \
         mean does, so that a group of heads shares its core tokens too. With as many K/V heads as heads that is \
         the paper's.",
        "The paper moves the border between cores and tokens query by query; here all queries of a group share it, \
         so that each attends to window to window + group_size - 1 tokens before itself and the kernel works in \
         whole blocks.",
        "The paper's public code is a page without the layer; group_size and window are its defaults for language \
         models.",
    ],
    params: params_of::<CoreContext>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<CoreContext>(CARD.id, params)?)))
}
