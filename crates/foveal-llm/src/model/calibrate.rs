//! Second moments of keys and inputs on a calibration text, for policies that ask for them.

use super::{LogitsFor, Model, PrefillOptions, ROWS, Scratch};
use crate::error::Result;
use crate::plan::Plan;
use candle_core::{DType, Device, Tensor};
use foveal::cache::LayerCalibration;
use foveal_kernels::elementwise;
use rayon::prelude::*;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Statistics of every layer.
#[derive(Clone, Default)]
pub struct Calibration {
    /// One entry a layer.
    pub layers: Vec<Arc<LayerCalibration>>,
}

impl Model {
    /// Run `tokens` with exact attention and sum up k kᵀ per head before and after rotation, and
    /// with `input_moment` also x xᵀ of each layer's attention input (after its normalisation),
    /// in f64. An input moment takes 8·hidden² bytes a layer.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn calibrate(&self, tokens: &[u32], input_moment: bool) -> Result<Calibration> {
        self.calibrate_until(tokens, input_moment, None)
    }

    /// As [`Model::calibrate`]; once `cancel` is set, the next layer ends in
    /// [`LlmError::Interrupted`](crate::LlmError::Interrupted).
    ///
    /// # Errors
    /// As [`Model::prefill`], and the interruption.
    pub fn calibrate_until(
        &self,
        tokens: &[u32],
        input_moment: bool,
        cancel: Option<Arc<AtomicBool>>,
    ) -> Result<Calibration> {
        let c = self.config();
        let plan = Plan::dense().resolve(c)?;
        let d = c.head_dim;
        let o = PrefillOptions { capture_pre: true, logits: LogitsFor::None, cancel, ..Default::default() };
        let inputs = Mutex::new(Vec::new());
        let mut layers = Vec::with_capacity(c.num_layers);
        let watch = |x: &[f32], layer: usize| -> Result<()> {
            if input_moment {
                let m = self.input_moment(x, layer)?;
                inputs.lock().unwrap_or_else(|e| e.into_inner()).push(m);
            }
            Ok(())
        };
        self.run_watched(tokens, &plan, &o, true, &watch, |_, p| {
            let moments = |k: &[f32]| -> Vec<Vec<f64>> {
                k.par_chunks_exact(p.len * d).map(|head| second_moment(head, d)).collect()
            };
            layers.push(LayerCalibration {
                tokens: p.len,
                key_moment: moments(p.k),
                key_pre_moment: moments(p.k_pre),
                input_moment: Vec::new(),
            });
            Ok(())
        })?;
        let inputs = inputs.into_inner().unwrap_or_else(|e| e.into_inner());
        for (l, m) in layers.iter_mut().zip(inputs) {
            l.input_moment = m;
        }
        Ok(Calibration { layers: layers.into_iter().map(Arc::new).collect() })
    }

    fn input_moment(&self, x: &[f32], layer: usize) -> Result<Vec<f64>> {
        let c = self.config();
        let h = c.hidden_size;
        let mut s = Scratch::default();
        let mut sum = Tensor::zeros((h, h), DType::F64, &Device::Cpu)?;
        for block in x.chunks(ROWS * h) {
            let normed = super::room(&mut s.normed, block.len());
            let gain = &self.layers[layer].attn_norm;
            elementwise::rms_norm(block, gain, c.rms_norm_eps as f32, normed, self.isa)?;
            let rows: Vec<f64> = normed.iter().map(|&v| f64::from(v)).collect();
            let rows = Tensor::from_vec(rows, (block.len() / h, h), &Device::Cpu)?;
            sum = (sum + rows.t()?.matmul(&rows)?)?;
        }
        Ok(sum.flatten_all()?.to_vec1()?)
    }
}

/// Σ r rᵀ over rows of `d`, (d, d) row-major.
fn second_moment(rows: &[f32], d: usize) -> Vec<f64> {
    let mut m = vec![0f64; d * d];
    let mut wide = vec![0f64; d];
    for r in rows.chunks_exact(d) {
        wide.iter_mut().zip(r).for_each(|(w, r)| *w = f64::from(*r));
        for (m, a) in m.chunks_exact_mut(d).zip(&wide) {
            m.iter_mut().zip(&wide).for_each(|(m, b)| *m += a * b);
        }
    }
    m
}
