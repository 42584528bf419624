//! Rotary frequencies of a model under its scaling rule.
//!
//! Formulas as the `transformers` package has them (its goldens judge them). With
//! θ_c = base^(−2c/d), c = 0..d/2:
//!
//! - linear: θ_c / factor;
//! - dynamic: base' = base · (factor · L / L₀ − (factor − 1))^(d / (d − 2)), L = max(length, L₀);
//! - YaRN: a ramp over c between θ_c (fast) and θ_c / factor (slow), amplitude 0.1 ln(factor) + 1;
//! - Llama 3: θ_c / factor for wavelengths above L₀/low, θ_c below L₀/high, blended between.
//!
//! The dynamic rule depends on the sequence's current length. A whole prompt, chunked or not,
//! is rotated with the frequencies of the prompt's length. Afterwards every new token takes the
//! frequencies of the length it makes; keys that are already cached keep the rotation they were
//! stored with, as in the reference implementation: nothing that a cache holds is ever re-rotated.

use crate::config::{ModelConfig, RopeScaling};
use foveal::prim::rope::Rope;
use std::f64::consts::PI;
use std::sync::Arc;

/// Rotary frequencies by sequence length.
#[derive(Debug, Clone)]
pub struct Rotary {
    fixed: Arc<Rope>,
    dynamic: Option<Dynamic>,
}

#[derive(Debug, Clone)]
struct Dynamic {
    dim: usize,
    base: f64,
    factor: f64,
    max: usize,
}

impl Rotary {
    /// The model's rule.
    pub fn new(c: &ModelConfig) -> Self {
        let (dim, base) = (c.rope_dim, c.rope_theta);
        let mut rope = Rope::new(dim, base);
        let mut dynamic = None;
        let exact = |i: usize| base.powf(-2.0 * i as f64 / dim as f64);
        match &c.rope_scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => rope.inv_freq.iter_mut().for_each(|f| *f /= factor),
            RopeScaling::Dynamic { factor, original_max } => {
                dynamic = Some(Dynamic { dim, base, factor: f64::from(*factor), max: *original_max });
            }
            RopeScaling::Yarn {
                factor,
                original_max,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                let factor = f64::from(*factor);
                // The dimension that turns `rotations` times over the trained length.
                let turns = |rotations: f32| {
                    let wavelength = *original_max as f64 / (f64::from(rotations) * 2.0 * PI);
                    dim as f64 * wavelength.ln() / (2.0 * base.ln())
                };
                let (mut low, mut high) = (turns(*beta_fast), turns(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let mut high = high.min(dim as f64 - 1.0);
                if low == high {
                    high += 0.001;
                }
                for (i, f) in rope.inv_freq.iter_mut().enumerate() {
                    let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    *f = (exact(i) / factor * slow + exact(i) * (1.0 - slow)) as f32;
                }
                let amplitude = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                rope.factor = match (attention_factor, mscale, mscale_all_dim) {
                    (Some(a), _, _) => *a,
                    (None, Some(m), Some(all)) if *m != 0.0 && *all != 0.0 => {
                        (amplitude(f64::from(*m)) / amplitude(f64::from(*all))) as f32
                    }
                    _ => amplitude(1.0) as f32,
                };
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
                let (factor, low, high) =
                    (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let trained = *original_max as f64;
                for (i, f) in rope.inv_freq.iter_mut().enumerate() {
                    let wavelength = 2.0 * PI / exact(i);
                    // 1 keeps the frequency, 0 divides it in full.
                    let keep = ((trained / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                    *f = (exact(i) * (keep + (1.0 - keep) / factor)) as f32;
                }
            }
            RopeScaling::Divisors { factors } => {
                for (f, d) in rope.inv_freq.iter_mut().zip(factors) {
                    *f /= d;
                }
            }
        }
        Self { fixed: Arc::new(rope), dynamic }
    }

    /// The rotation of tokens that make the sequence `len` tokens long.
    pub fn at(&self, len: usize) -> Arc<Rope> {
        match &self.dynamic {
            Some(d) if len > d.max => {
                let stretch = d.factor * len as f64 / d.max as f64 - (d.factor - 1.0);
                // A head of 2 has one frequency of exponent 0, which no base changes.
                let exponent = d.dim as f64 / (d.dim as f64 - 2.0).max(1.0);
                Arc::new(Rope::new(d.dim, d.base * stretch.powf(exponent)))
            }
            _ => self.fixed.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(scaling: RopeScaling) -> Rotary {
        let mut c = crate::testing::config(1, 4);
        c.rope_scaling = scaling;
        Rotary::new(&c)
    }

    #[test]
    fn dynamic_changes_past_the_trained_length_only() {
        let r = rotary(RopeScaling::Dynamic { factor: 2.0, original_max: 32 });
        let plain = rotary(RopeScaling::Default);
        assert_eq!(r.at(32), plain.at(32));
        let (a, b) = (r.at(33), plain.at(33));
        assert_eq!(a.inv_freq[0], b.inv_freq[0]);
        assert!(a.inv_freq[1..].iter().zip(&b.inv_freq[1..]).all(|(x, y)| x < y));
    }

    #[test]
    fn llama3_keeps_the_fast_and_divides_the_slow() {
        let r =
            rotary(RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 64 });
        let plain = rotary(RopeScaling::Default);
        let (a, b) = (&r.at(1).inv_freq, &plain.at(1).inv_freq);
        assert_eq!(a[0], b[0]);
        let last = a.len() - 1;
        assert!((a[last] * 8.0 / b[last] - 1.0).abs() < 1e-6);
    }
}
