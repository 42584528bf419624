//! AdamW with clipping, whose state can be saved, and the schedule of its learning rate.

use crate::error::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101). Weight decay applies to matrices, not to vectors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; larger ones are scaled down to it.
    pub clip: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

/// The optimiser's state.
pub struct AdamW {
    config: AdamWConfig,
    vars: Vec<(String, Var)>,
    /// Means of gradients and of their squares, by parameter; absent before the first gradient.
    moments: BTreeMap<String, (Tensor, Tensor)>,
    steps: i32,
}

impl AdamW {
    /// An optimiser of these parameters.
    pub fn new(config: AdamWConfig, vars: Vec<(String, Var)>) -> Self {
        Self { config, vars, moments: BTreeMap::new(), steps: 0 }
    }

    /// One step at learning rate `lr`; the norm of the gradients before clipping. Parameters without a gradient stay.
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> Result<f64> {
        let c = self.config;
        let mut squares = 0f64;
        for (_, var) in &self.vars {
            if let Some(g) = grads.get(var.as_tensor()) {
                squares += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let norm = squares.sqrt();
        let factor = if norm > c.clip { c.clip / norm } else { 1.0 };
        self.steps += 1;
        let (fix1, fix2) = (1.0 - c.beta1.powi(self.steps), 1.0 - c.beta2.powi(self.steps));
        for (name, var) in &self.vars {
            let Some(g) = grads.get(var.as_tensor()) else { continue };
            let g = (g.detach() * factor)?;
            let (m, v) = match self.moments.get(name) {
                Some((m, v)) => {
                    (((m * c.beta1)? + (&g * (1.0 - c.beta1))?)?, ((v * c.beta2)? + (g.sqr()? * (1.0 - c.beta2))?)?)
                }
                None => ((&g * (1.0 - c.beta1))?, (g.sqr()? * (1.0 - c.beta2))?),
            };
            let step = ((&m / fix1)? / ((&v / fix2)?.sqrt()? + c.eps)?)?;
            let decay = if var.dims().len() > 1 { c.weight_decay } else { 0.0 };
            let old = var.as_tensor().detach();
            var.set(&((&old * (1.0 - lr * decay))? - (step * lr)?)?)?;
            self.moments.insert(name.clone(), (m, v));
        }
        Ok(norm)
    }

    /// State as tensors: `m.NAME` and `v.NAME`, beside [`AdamW::steps`].
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let pair =
            |(n, (m, v)): (&String, &(Tensor, Tensor))| [(format!("m.{n}"), m.clone()), (format!("v.{n}"), v.clone())];
        self.moments.iter().flat_map(pair).collect()
    }

    /// Steps taken.
    pub fn steps(&self) -> usize {
        self.steps as usize
    }

    /// Take back a state of [`AdamW::tensors`] after `steps` steps; what is missing starts from nothing.
    pub fn restore(&mut self, steps: usize, tensors: &std::collections::HashMap<String, Tensor>) {
        self.steps = steps as i32;
        let pair =
            |n: &String| Some((tensors.get(&format!("m.{n}"))?.clone(), tensors.get(&format!("v.{n}"))?.clone()));
        self.moments = self.vars.iter().filter_map(|(n, _)| Some((n.clone(), pair(n)?))).collect();
    }
}

/// Learning rate of step `i` of `n`: a linear rise over `warmup` steps, then half a cosine down to a tenth of `top`.
pub fn learning_rate(i: usize, n: usize, warmup: usize, top: f64) -> f64 {
    if i < warmup {
        return top * (i + 1) as f64 / warmup as f64;
    }
    let x = (i - warmup) as f64 / (n - warmup).max(1) as f64;
    top * (0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI * x).cos()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn steps_are_those_of_the_paper_and_clipping_bounds_them() {
        // One parameter, worked by hand: m̂/(√v̂ + ε) of the first step is the gradient's sign.
        let var = Var::new(&[[2f32, -3.0]], &Device::Cpu).unwrap();
        let c = AdamWConfig { weight_decay: 0.5, clip: 1e9, ..AdamWConfig::default() };
        let mut o = AdamW::new(c, vec![("w".into(), var.clone())]);
        let loss = || var.as_tensor().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let norm = o.step(&loss(), 0.1).unwrap();
        assert!((norm - (16f64 + 36.0).sqrt()).abs() < 1e-5);
        let x: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        assert!((x[0] - (2.0 * 0.95 - 0.1)).abs() < 1e-5 && (x[1] - (-3.0 * 0.95 + 0.1)).abs() < 1e-5, "{x:?}");
        // The second, with m and v of both gradients.
        let (g1, g2) = (4.0f64, 2.0 * 1.8);
        let m = (0.1 * 0.9 * g1 + 0.1 * g2) / (1.0 - 0.81);
        let v = (0.02 * 0.98 * g1 * g1 + 0.02 * g2 * g2) / (1.0 - 0.98f64.powi(2));
        o.step(&loss(), 0.1).unwrap();
        let y: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
        assert!((f64::from(y[0]) - (1.8 * 0.95 - 0.1 * m / v.sqrt())).abs() < 1e-5, "{y:?}");
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let r: Vec<f64> = (0..100).map(|i| learning_rate(i, 100, 10, 1.0)).collect();
        assert!((r[0] - 0.1).abs() < 1e-12 && (r[9] - 1.0).abs() < 1e-12 && r[99] < 0.11 && r[99] >= 0.1);
        assert!(r[10..].windows(2).all(|w| w[1] <= w[0]));
    }
}
