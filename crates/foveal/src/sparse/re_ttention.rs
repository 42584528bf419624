//! Re-ttention: sparse attention whose weights keep their level, by statistics of earlier steps (Chen et al. 2025,
//! arXiv 2505.22918).
//!
//! A diffusion model attends to almost the same tokens from one denoising step to the next. A mask S of a few keys makes
//! the denominator of the softmax too small and the weights too large. At a dense step the layer keeps, per query,
//! ρ = Σ_{j∈S} e^{s_j} / Σ_j e^{s_j} and r = O − ρ·O_S; at the sparse steps after it O = ρ·O_S + r, and ρ grows by `ratio_step`
//! each time, as attention comes closer to its mask.
//!
//! S: text, and of every frame the places at most share·h·w/2 from the query's own (in row-major order). q (B, H, T, D) → the
//! same; a sparse step visits about share·T² pairs. The layer counts its calls: each is a step.

use super::{Domain, Grid, HeadSelection};
use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::{AttendOptions, attend, attend_selected};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use foveal_kernels::{HeadKeys, Work};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReTtention {
    /// Share of a frame's places that a query visits.
    pub share: f64,
    /// Dense steps before the first whose statistics are kept.
    pub warmup: usize,
    /// Steps from one that keeps statistics to the next; those between are sparse.
    pub period: usize,
    /// Growth of the ratio per sparse step.
    pub ratio_step: f64,
    /// Queries that share a list of keys.
    pub group: usize,
}

impl Default for ReTtention {
    fn default() -> Self {
        Self { share: 0.03125, warmup: 5, period: 5, ratio_step: 0.04, group: 16 }
    }
}

impl Config for ReTtention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("share", "share of a frame's places that a query visits, in every frame, 0 to 1"),
        ("warmup", "dense steps before the first whose statistics are kept"),
        ("period", "steps from one that keeps statistics to the next; those between are sparse"),
        ("ratio_step", "what the ratio of weights in the mask to all grows by at each sparse step"),
        ("group", "consecutive queries that share a list of keys: each visits what any of them would"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(0.0..=1.0).contains(&self.share) {
            return Err(format!("share = {}: use a share from 0 to 1", self.share));
        }
        if !(0.0..=1.0).contains(&self.ratio_step) {
            return Err(format!("ratio_step = {}: use 0 to 1", self.ratio_step));
        }
        if self.period == 0 || self.group == 0 {
            return Err(format!("period = {}, group = {}: use at least 1", self.period, self.group));
        }
        Ok(())
    }
}

impl ReTtention {
    /// The mask of `t` tokens, on a grid if there is one, else on a line.
    pub fn mask(&self, t: usize, grid: Option<Grid>) -> HeadSelection {
        let grid = grid.unwrap_or(Grid::new(1, 1, t));
        let frame = grid.frame();
        let half = (frame as f64 * self.share) as usize / 2;
        let mut lists = HeadKeys { group: self.group, indptr: vec![0], keys: Vec::new() };
        for first in (0..t).step_by(self.group) {
            let end = (first + self.group).min(t);
            if first < grid.first || end > grid.range().end {
                // Text attends to everything, and so does who shares its list.
                lists.keys.extend(0..t as u32);
            } else {
                let mut near = vec![false; frame];
                for i in first..end {
                    let place = (i - grid.first) % frame;
                    near[place.saturating_sub(half)..(place + half + 1).min(frame)].fill(true);
                }
                lists.keys.extend(0..grid.first as u32);
                for f in 0..grid.t {
                    let at = grid.first + f * frame;
                    lists.keys.extend((0..frame).filter(|&p| near[p]).map(|p| (at + p) as u32));
                }
                lists.keys.extend(grid.range().end as u32..t as u32);
            }
            lists.indptr.push(lists.keys.len());
        }
        HeadSelection::of_keys(lists)
    }
}

impl MixerSystem for ReTtention {
    fn layer(&self, dims: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(Layer { system: self.clone(), grid: dims.grid, state: Mutex::default() }))
    }

    fn domain(&self) -> Domain {
        Domain::FULL
    }
}

/// What a layer keeps from step to step.
#[derive(Default)]
struct State {
    /// Steps so far.
    step: usize,
    /// ρ (B, H, T, 1) and r (B, H, T, Dv).
    kept: Option<(Tensor, Tensor)>,
}

struct Layer {
    system: ReTtention,
    grid: Option<Grid>,
    state: Mutex<State>,
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((b, h, t, _), (_, _, tk, dv)) = (i.q.dims4()?, i.v.dims4()?);
        if t != tk {
            return Err(crate::Error::Shape {
                op: "re-ttention",
                tensor: "q",
                shape: i.q.dims().to_vec(),
                expected: format!("as many tokens as k's {tk}: the mask is around each query's own place"),
            });
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Tensors of another shape begin another image.
        if state.kept.as_ref().is_some_and(|(_, r)| r.dims() != [b, h, t, dv]) {
            *state = State::default();
        }
        let options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        let of = state.step.checked_sub(self.system.warmup).map(|s| s % self.system.period);
        let kept = state.kept.take().filter(|_| of != Some(0));
        let selections = vec![self.system.mask(t, self.grid); if of.is_some() { b * h } else { 0 }];
        let sparse = match of {
            Some(_) => Some(attend_selected(i.q, i.k, i.v, &options, selections.clone())?),
            None => None,
        };
        let mut work = Work::default();
        let (out, kept, selections) = match (sparse, kept) {
            (Some(sparse), Some((ratio, rest))) => {
                work += sparse.work;
                work.flops += (3 * b * h * t * dv) as u64;
                let out = (sparse.out.broadcast_mul(&ratio)? + &rest)?;
                let ratio = (ratio + self.system.ratio_step)?.minimum(1f64)?;
                (out, Some((ratio, rest)), selections)
            }
            (sparse, _) => {
                let full = attend(i.q, i.k, i.v, &options, None)?;
                work += full.work;
                let kept = match sparse {
                    Some(sparse) => {
                        work += sparse.work;
                        work.flops += (b * h * t * (2 * dv + 2)) as u64;
                        let ratio = (sparse.lse - &full.lse)?.exp()?.unsqueeze(3)?.detach();
                        let rest = (&full.out - sparse.out.broadcast_mul(&ratio)?)?.detach();
                        Some((ratio, rest))
                    }
                    None => None,
                };
                (full.out, kept, Vec::new())
            }
        };
        *state = State { step: state.step + 1, kept };
        Ok(Mixed { out, work, select: Work::default(), loss: None, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "re-ttention",
    title: "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape",
    authors: "Chen et al., 2025",
    arxiv: "2505.22918",
    family: Family::Sparse,
    slots: &[Slot::Prefill, Slot::Mixer],
    laws: &[
        Law::ExactAt(&[]),
        Law::ExactAt(&[("warmup", "0")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
    ],
    equation: "dense step: rho = sum over S of e^s / sum over all of e^s,  r = O - rho·O_S\n\
               sparse step: O = rho·O_S + r;  then rho grows by ratio_step, up to 1\n\
               S: text, and in every frame the places near the query's own",
    cost: "dense steps as exact attention, every period-th of them the mask besides; sparse steps share·T² pairs; keeps T·(Dv + 1) numbers a head",
    choices: &[
        "From the published code: the residual r, the growth of 0.04 a step, statistics at every fifth step after 5 dense ones (15 of 50 \
         for CogVideoX), 1/32 of the tokens, and the mask. There the ratio grows without a bound; here it stops at 1.",
        "A call of a layer is a step; tensors of another shape begin anew. The first calls are dense, so one call alone is exact.",
        "Queries share a list in groups of 16 and visit what any of them would: a little more than the published mask, at the cost of \
         fewer gathers.",
        "Statistics have no gradient. The method is training-free and for denoising; it does nothing for a single pass.",
    ],
    params: params_of::<ReTtention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<ReTtention>(CARD.id, params)?)))
}
