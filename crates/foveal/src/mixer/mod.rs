//! Attention layers: what maps the q, k, v of a whole layer to its output, with parameters and gradients.
//!
//! A [`Mixer`] is written in candle operations on [`crate::prim`], so that gradients come by themselves. Every prefill
//! system is one too: [`layer`] makes a layer of any [`System`] that has the slot. A mixer without parameters
//! also serves pretrained models as a prefill system.

mod selected;
mod weights;

pub use selected::SelectorMixer;
pub use weights::Weights;

use crate::error::{Error, Result};
use crate::prim::{AttendOptions, attend};
use crate::sparse::run::NO_LAYER;
use crate::sparse::{Domain, Grid, HeadSelection};
use crate::system::System;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use foveal_kernels::Work;

/// Dimensions of a layer, fixed when its parameters are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MixerDims {
    /// Channels of the layer's input x.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// K/V heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Whether queries see no later keys.
    pub causal: bool,
    /// The token grid, where tokens stand on one.
    pub grid: Option<Grid>,
    /// Number of the layer, [`NO_LAYER`] outside of a model.
    pub layer: usize,
}

impl MixerDims {
    /// Dimensions of a layer of no model: `heads` query and K/V heads, hidden = heads·head_dim, no grid.
    pub fn new(heads: usize, head_dim: usize, causal: bool) -> Self {
        Self { hidden: heads * head_dim, heads, kv_heads: heads, head_dim, causal, grid: None, layer: NO_LAYER }
    }
}

/// What a layer's attention starts from.
#[derive(Debug, Clone, Copy)]
pub struct MixInput<'a> {
    /// Queries after rotation, (B, H, Tq, D).
    pub q: &'a Tensor,
    /// Keys after rotation, (B, H_kv, Tk, D), Tk ≥ Tq; causal attention is bottom-right aligned.
    pub k: &'a Tensor,
    /// Values, (B, H_kv, Tk, Dv).
    pub v: &'a Tensor,
    /// The layer's input, (B, Tk, hidden), where the caller has it.
    pub x: Option<&'a Tensor>,
    /// q and k before rotation, where the caller has them; models without rotation give q and k themselves.
    pub before_rotation: Option<(&'a Tensor, &'a Tensor)>,
    /// Factor on q·k; `None` = 1/√D.
    pub scale: Option<f32>,
}

impl<'a> MixInput<'a> {
    /// q, k and v alone.
    pub fn new(q: &'a Tensor, k: &'a Tensor, v: &'a Tensor) -> Self {
        Self { q, k, v, x: None, before_rotation: None, scale: None }
    }

    /// The layer's input, or the error that says who needs it.
    pub fn x(&self, system: &str) -> Result<&'a Tensor> {
        self.x.ok_or_else(|| Error::Param {
            system: system.into(),
            message: "the layer's input x is missing: this system reads it; use it as a layer, not on q, k, v alone"
                .into(),
        })
    }

    /// q and k before rotation, or the error that says who needs them.
    pub fn before_rotation(&self, system: &str) -> Result<(&'a Tensor, &'a Tensor)> {
        self.before_rotation.ok_or_else(|| Error::Param {
            system: system.into(),
            message: "q and k before rotation are missing: this system reads them; use it inside a model".into(),
        })
    }

    /// The factor on q·k.
    pub fn scale(&self) -> Result<f32> {
        let d = self.q.dims4()?.3;
        Ok(self.scale.unwrap_or(1.0 / (d.max(1) as f32).sqrt()))
    }
}

/// What a layer's attention gives.
#[derive(Debug, Clone)]
pub struct Mixed {
    /// (B, H, Tq, Dv).
    pub out: Tensor,
    /// Work of the attention itself, every branch of it.
    pub work: Work,
    /// Work of choosing what to visit.
    pub select: Work,
    /// A scalar to add to the training loss, where the method has one.
    pub loss: Option<Tensor>,
    /// What each (batch, query head) visited exactly, batch major; empty where there is nothing to tell.
    pub selections: Vec<HeadSelection>,
}

/// One attention layer with its parameters.
pub trait Mixer: Send + Sync {
    /// Attention of one layer.
    fn mix(&self, input: &MixInput) -> Result<Mixed>;
}

/// A system whose layers change more than which keys are visited.
pub trait MixerSystem: Send + Sync {
    /// A layer of these dimensions; its parameters come from `vb` under plain names (`gate.weight`).
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>>;

    /// What problems its layers can serve.
    fn domain(&self) -> Domain {
        Domain::CAUSAL
    }

    /// Whether its layers read q and k before rotation.
    fn reads_before_rotation(&self) -> bool {
        false
    }
}

/// A layer of any system that has one: `id` names it in errors.
pub fn layer(id: &str, system: System, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
    system.domain().check(id, dims.causal, dims.grid, dims.grid.map_or(0, |g| g.range().end))?;
    match system {
        System::Dense => Ok(Box::new(Dense { causal: dims.causal })),
        System::Selector(s) => Ok(Box::new(SelectorMixer::new(s, dims))),
        System::Mixer(m) => m.layer(dims, vb),
        System::Cache(_) => {
            Err(Error::WrongSlot { system: id.into(), wanted: "an attention layer", slots: "cache".into() })
        }
    }
}

/// Exact attention.
struct Dense {
    causal: bool,
}

impl Mixer for Dense {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let options = AttendOptions { scale: i.scale, causal: self.causal, ..AttendOptions::default() };
        let a = attend(i.q, i.k, i.v, &options, None)?;
        Ok(Mixed { out: a.out, work: a.work, select: Work::default(), loss: None, selections: Vec::new() })
    }
}
