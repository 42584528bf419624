//! Random problems for the conformance suite.

use crate::cache::{CacheCtx, KvWeights, LayerCalibration};
use crate::error::Result;
use crate::prim::gemm::abt;
use crate::prim::kv::KvDtype;
use crate::prim::rope::Rope;
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Standard normal numbers times `scale` (Box-Muller).
pub(super) fn normal(rng: &mut ChaCha8Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random());
            (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos() * scale
        })
        .collect()
}

/// q, k, v of a causal prompt. Keys carry a slow component shared by neighbours and a few loud
/// sinks, so that estimators have something to find.
#[derive(Clone)]
pub struct PrefillProblem {
    /// Batch, query heads, K/V heads, queries, keys, head width.
    pub shape: [usize; 6],
    /// (B, H, Tq, D).
    pub q: Vec<f32>,
    /// (B, Hkv, Tk, D).
    pub k: Vec<f32>,
    /// (B, Hkv, Tk, D).
    pub v: Vec<f32>,
}

impl PrefillProblem {
    /// A seeded problem of `shape` = [B, H, Hkv, Tq, Tk, D]; queries are scaled by `loud`.
    pub fn new(shape: [usize; 6], loud: f32, seed: u64) -> Self {
        let [b, h, hkv, tq, tk, d] = shape;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let q = normal(&mut rng, b * h * tq * d, loud);
        let mut k = normal(&mut rng, b * hkv * tk * d, 1.0);
        let v = normal(&mut rng, b * hkv * tk * d, 1.0);
        for head in k.chunks_exact_mut((tk * d).max(1)) {
            let mut slow = vec![0f32; d];
            for (t, row) in head.chunks_exact_mut(d).enumerate() {
                for (s, x) in slow.iter_mut().zip(row) {
                    *s = 0.95 * *s + 0.05 * *x;
                    *x = 0.5 * *x + 2.0 * *s + if t % 97 == 3 { 1.0 } else { 0.0 };
                }
            }
        }
        Self { shape, q, k, v }
    }

    /// As tensors q, k, v.
    pub fn tensors(&self) -> Result<(Tensor, Tensor, Tensor)> {
        let [b, h, hkv, tq, tk, d] = self.shape;
        let t = |x: &[f32], s| Tensor::from_slice(x, s, &Device::Cpu);
        Ok((t(&self.q, (b, h, tq, d))?, t(&self.k, (b, hkv, tk, d))?, t(&self.v, (b, hkv, tk, d))?))
    }

    /// Replace rows `from..` of every head (of `t` rows of `d`) in `x` by noise.
    pub fn scramble(x: &mut [f32], t: usize, d: usize, from: usize, seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for head in x.chunks_exact_mut((t * d).max(1)) {
            let tail = &mut head[from * d..];
            tail.copy_from_slice(&normal(&mut rng, tail.len(), 3.0));
        }
    }

    /// The first `t` tokens of a square problem (Tq = Tk).
    pub fn prefix(&self, t: usize) -> Self {
        let [b, h, hkv, tq, tk, d] = self.shape;
        assert_eq!(tq, tk, "only a square problem has prefixes");
        let cut = |x: &[f32]| x.chunks_exact(tk * d).flat_map(|r| r[..t * d].to_vec()).collect();
        Self { shape: [b, h, hkv, t, t, d], q: cut(&self.q), k: cut(&self.k), v: cut(&self.v) }
    }
}

/// One layer's prompt and continuation for cache policies, made the way a model makes them: inputs x,
/// keys and values x·Wᵀ, rotation.
pub struct CacheProblem {
    /// Context of the layer.
    pub ctx: CacheCtx,
    /// Tokens in all.
    pub len: usize,
    /// (H, len, D) after rotation.
    pub q: Vec<f32>,
    /// (Hkv, len, D) before rotation.
    pub k_pre: Vec<f32>,
    /// (Hkv, len, D) after rotation.
    pub k: Vec<f32>,
    /// (Hkv, len, D).
    pub v: Vec<f32>,
}

impl CacheProblem {
    /// A seeded problem of `len` tokens with storage `dtype`; queries are scaled by `loud`.
    pub fn new(len: usize, dtype: KvDtype, loud: f32, seed: u64) -> Self {
        let (h, hkv, d, hidden) = (4usize, 2usize, 16usize, 48usize);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let wk = normal(&mut rng, hkv * d * hidden, 1.0 / (hidden as f32).sqrt());
        let wv = normal(&mut rng, hkv * d * hidden, 1.0 / (hidden as f32).sqrt());
        let rope = Arc::new(Rope::new(d, 10_000.0));
        // Calibration needs some tokens even where the problem itself has few.
        let calibration_len = 64;
        let n = len.max(calibration_len);
        let x = normal(&mut rng, n * hidden, 1.0);
        let project = |w: &[f32]| {
            let mut out = vec![0f32; hkv * n * d];
            for (kh, head) in out.chunks_exact_mut(n * d).enumerate() {
                abt(n, d, hidden, 1.0, &x, hidden, &w[kh * d * hidden..], hidden, head);
            }
            out
        };
        let rotated = |mut rows: Vec<f32>| {
            rows.chunks_exact_mut(n * d).for_each(|head| rope.rotate(head, d, 0));
            rows
        };
        let (k_pre, v) = (project(&wk), project(&wv));
        let k = rotated(k_pre.clone());
        let q = rotated(normal(&mut rng, h * n * d, loud));
        let moment = |rows: &[f32]| {
            rows.chunks_exact(n * d)
                .map(|head| {
                    let mut m = vec![0f64; d * d];
                    for r in head[..calibration_len * d].chunks_exact(d) {
                        for i in 0..d {
                            for j in 0..d {
                                m[i * d + j] += f64::from(r[i]) * f64::from(r[j]);
                            }
                        }
                    }
                    m
                })
                .collect()
        };
        let calibration = LayerCalibration {
            tokens: calibration_len,
            key_moment: moment(&k),
            key_pre_moment: moment(&k_pre),
            input_moment: Vec::new(),
        };
        let weights = KvWeights { hidden, wk, wv, bk: Vec::new(), bv: Vec::new(), k_norm: Vec::new() };
        let ctx = CacheCtx {
            layer: 0,
            num_layers: 1,
            num_heads: h,
            num_kv_heads: hkv,
            head_dim: d,
            scale: 1.0 / (d as f32).sqrt(),
            window: None,
            rope,
            dtype,
            weights: Some(Arc::new(weights)),
            calibration: Some(Arc::new(calibration)),
        };
        let cut = |x: Vec<f32>| x.chunks_exact(n * d).flat_map(|r| r[..len * d].to_vec()).collect();
        Self { ctx, len, q: cut(q), k_pre: cut(k_pre), k: cut(k), v: cut(v) }
    }

    /// Tokens `from..to` of a (heads, len, D) array.
    pub fn span(&self, x: &[f32], from: usize, to: usize) -> Vec<f32> {
        let d = self.ctx.head_dim;
        x.chunks_exact(self.len * d).flat_map(|r| r[from * d..to * d].to_vec()).collect()
    }
}
