//! A selector as a layer: it chooses on q and k as they are, gradients flow through the attention over its choice.

use super::{MixInput, Mixed, Mixer, MixerDims};
use crate::error::Result;
use crate::prim::AttendOptions;
use crate::sparse::run::{At, prefill};
use crate::sparse::{Grid, Selector};

/// The layer of a [`Selector`]. The choice itself has no gradient.
pub struct SelectorMixer {
    selector: Box<dyn Selector>,
    causal: bool,
    grid: Option<Grid>,
    layer: usize,
}

impl SelectorMixer {
    /// A layer of these dimensions.
    pub fn new(selector: Box<dyn Selector>, dims: &MixerDims) -> Self {
        Self { selector, causal: dims.causal, grid: dims.grid, layer: dims.layer }
    }
}

impl Mixer for SelectorMixer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let options = AttendOptions { scale: i.scale, causal: self.causal, ..AttendOptions::default() };
        let at = At { layer: self.layer, grid: self.grid };
        let p = prefill(|_| Some(self.selector.as_ref()), i.q, i.k, i.v, &options, at)?;
        let a = p.attended;
        Ok(Mixed { out: a.out, work: a.work, select: p.select, loss: None, selections: p.selections })
    }
}
