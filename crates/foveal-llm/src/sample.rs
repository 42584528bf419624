//! Choosing the next token from logits.
//!
//! Order: repetition penalty on the logits, then temperature, then top-k, top-p and min-p on the
//! probabilities, then one draw. Temperature 0 is greedy. The same seed and logits give the same
//! tokens on every machine.

use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use std::collections::HashSet;

/// How the next token is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Divisor of the logits; 0 (or below) takes the largest.
    pub temperature: f32,
    /// Keep the likeliest tokens whose probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens below this fraction of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens already seen; 1 does nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Draws tokens; holds the random state and a scratch buffer.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SampleOptions,
    rng: ChaCha12Rng,
    candidates: Vec<(f32, u32)>,
    seen: HashSet<u32>,
}

impl Sampler {
    /// A sampler from its seed.
    pub fn new(options: &SampleOptions) -> Self {
        Self {
            options: options.clone(),
            rng: ChaCha12Rng::seed_from_u64(options.seed),
            candidates: Vec::new(),
            seen: HashSet::new(),
        }
    }

    /// The next token from `logits` (vocabulary) given the tokens so far. The logits of repeated
    /// tokens are changed in place. NaN logits are never chosen; without any finite logit the
    /// answer is token 0.
    pub fn next(&mut self, logits: &mut [f32], history: &[u32]) -> u32 {
        let o = &self.options;
        if o.repetition_penalty != 1.0 && o.repetition_penalty > 0.0 {
            self.seen.clear();
            for &t in history {
                if let Some(x) = logits.get_mut(t as usize)
                    && self.seen.insert(t)
                {
                    *x = if *x > 0.0 { *x / o.repetition_penalty } else { *x * o.repetition_penalty };
                }
            }
        }
        let best = argmax(logits);
        if o.temperature <= 0.0 || o.top_k == 1 {
            return best;
        }
        let top = logits.get(best as usize).copied().unwrap_or(0.0);
        if !top.is_finite() {
            return best;
        }
        // Probabilities relative to the likeliest token. What is below e⁻⁴⁰ of it cannot be drawn
        // by a 24-bit uniform and is left out, so that sorting stays short.
        let c = &mut self.candidates;
        c.clear();
        for (i, &x) in logits.iter().enumerate() {
            let z = (x - top) / o.temperature;
            if z > -40.0 {
                let p = z.exp();
                if p >= o.min_p {
                    c.push((p, i as u32));
                }
            }
        }
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if o.top_k > 0 && o.top_k < c.len() {
            c.select_nth_unstable_by(o.top_k - 1, order);
            c.truncate(o.top_k);
        }
        c.sort_unstable_by(order);
        let mut total: f64 = c.iter().map(|x| f64::from(x.0)).sum();
        if o.top_p < 1.0 {
            let goal = total * f64::from(o.top_p.max(0.0));
            let (mut sum, mut keep) = (0f64, 0);
            for x in c.iter() {
                sum += f64::from(x.0);
                keep += 1;
                if sum >= goal {
                    break;
                }
            }
            c.truncate(keep);
            total = sum;
        }
        let mut u = self.rng.random::<f64>() * total;
        for &(p, i) in c.iter() {
            u -= f64::from(p);
            if u < 0.0 {
                return i;
            }
        }
        c.last().map_or(best, |x| x.1)
    }
}

/// Index of the largest entry, the first of equals; NaN loses.
pub fn argmax(x: &[f32]) -> u32 {
    let mut best = 0;
    let mut top = f32::NEG_INFINITY;
    for (i, &v) in x.iter().enumerate() {
        if v > top {
            (best, top) = (i as u32, v);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(o: SampleOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut s = Sampler::new(&o);
        let mut c = vec![0; logits.len()];
        for _ in 0..n {
            c[s.next(&mut logits.to_vec(), &[]) as usize] += 1;
        }
        c
    }

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -3.0];

    #[test]
    fn temperature_zero_is_greedy_and_nan_loses() {
        assert_eq!(counts(SampleOptions::default(), &LOGITS, 5), [0, 5, 0, 0]);
        assert_eq!(counts(SampleOptions::default(), &[f32::NAN, 1.0, 1.0], 3), [0, 3, 0]);
        assert_eq!(counts(SampleOptions { temperature: 1.0, ..Default::default() }, &[f32::NAN; 2], 3), [3, 0]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let n = 20_000;
        let t = 1.3;
        let c = counts(SampleOptions { temperature: t, seed: 3, ..Default::default() }, &LOGITS, n);
        let z: f64 = LOGITS.iter().map(|x| f64::from(x / t).exp()).sum();
        for (c, x) in c.iter().zip(LOGITS) {
            let p = f64::from(x / t).exp() / z;
            let sd = (p * (1.0 - p) / n as f64).sqrt();
            // 6 standard deviations: fails by chance less than once in 10⁸.
            assert!((*c as f64 / n as f64 - p).abs() < 6.0 * sd, "{c} of {n}, expected {p}");
        }
    }

    #[test]
    fn limits_cut_the_tail() {
        let hot = SampleOptions { temperature: 100.0, ..Default::default() };
        assert!(counts(hot.clone(), &LOGITS, 400).iter().all(|&c| c > 0));
        let c = counts(SampleOptions { top_k: 2, ..hot.clone() }, &LOGITS, 400);
        assert!(c[0] == 0 && c[3] == 0 && c[1] > 0 && c[2] > 0);
        let one = SampleOptions { temperature: 1.0, ..Default::default() };
        // Probabilities 0.090, 0.665, 0.245, 0.004: 0.7 takes the first two.
        let c = counts(SampleOptions { top_p: 0.7, ..one.clone() }, &LOGITS, 400);
        assert!(c[0] == 0 && c[3] == 0 && c[2] > 0);
        let c = counts(SampleOptions { top_p: 0.6, ..one.clone() }, &LOGITS, 400);
        assert_eq!(c[1], 400);
        // 0.245 / 0.665 = 0.37 stays, 0.090 / 0.665 = 0.135 goes.
        let c = counts(SampleOptions { min_p: 0.2, ..one }, &LOGITS, 400);
        assert!(c[0] == 0 && c[3] == 0 && c[2] > 0);
    }

    #[test]
    fn repetition_penalty_pushes_seen_tokens_down_once() {
        let o = SampleOptions { repetition_penalty: 4.0, ..Default::default() };
        let mut s = Sampler::new(&o);
        let mut l = LOGITS;
        assert_eq!(s.next(&mut l, &[1, 1, 3, 99]), 2);
        assert_eq!(l, [0.0, 0.5, 1.0, -12.0]);
    }

    #[test]
    fn same_seed_same_tokens() {
        let o = |seed| SampleOptions { temperature: 2.0, seed, ..Default::default() };
        let draw = |seed| {
            let mut s = Sampler::new(&o(seed));
            (0..50).map(|_| s.next(&mut LOGITS.to_vec(), &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
