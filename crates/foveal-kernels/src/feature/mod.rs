//! Attention whose score is a product of feature maps, forward and backward.
//!
//! o_i = Σ_j c_(i−j) (φ(q_i)·φ(k_j)) v_j / (Σ_j c_(i−j) φ(q_i)·φ(k_j) + ε), over all keys or (causal) those up to the
//! query's own position, bottom-right aligned; q and k arrive as feature maps. Without weights c the sums
//! factor as φ(Q)(φ(K)ᵀV) (Katharopoulos et al. 2020, arXiv 2006.16236): O(T·R·Dv), a causal call in chunks that
//! carry φ(K)ᵀV. With weights (relative positions in kernelised attention: Luo et al. 2021, arXiv 2106.12566)
//! the sum over j is a product with a Toeplitz matrix for each pair of a feature and a value channel, done by
//! [`crate::conv`]'s transform in O(T log T · R · Dv), or directly in O(T²·(R + Dv)), which is less work for
//! short sequences.
//!
//! The weights must not be all positive, nor the features: a denominator of exactly zero gives a zero row, and
//! what is nearly zero is the caller's affair (ε > 0 or positive features).

mod chunked;
mod matrix;
mod toeplitz;
pub mod twin;

use crate::error::{KernelError, Result, same};
use crate::isa::Isa;
use crate::view::{Element, Rows, View, ViewMut};
use crate::work::Work;

/// Rows of a tile.
const CHUNK: usize = 128;
/// Tokens of a causal chunk: of 16 to 128 the fastest at 64 features and value channels, and the fewest operations.
const STEP: usize = 32;

/// How weighted sums are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ToeplitzForm {
    /// Whichever costs fewer operations.
    #[default]
    Auto,
    /// Tile by tile, O(T²).
    Direct,
    /// By fast transform, O(T log T).
    Fourier,
}

/// Parameters of one call.
#[derive(Debug, Clone, Default)]
pub struct FeatureAttend<'a> {
    /// Query i of n sees keys up to m − n + i.
    pub causal: bool,
    /// Divide by the sum of weights plus this ε; `None`: no division.
    pub normalise: Option<f32>,
    /// c_(i−j) at index (i − j) + T − 1 of each head's 2T − 1, contiguous (H, 2T − 1); needs Tq = Tk = T.
    pub weights: Option<&'a [f32]>,
    /// How weights are applied.
    pub form: ToeplitzForm,
    /// Instruction set of the transforms; `None`: the best there is.
    pub isa: Option<Isa>,
}

/// Σ φ(k)ᵀv and Σ φ(k) of all keys so far: what a causal call carries to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureState {
    /// (B, H_kv, R, Dv).
    pub kv: Vec<f32>,
    /// (B, H_kv, R).
    pub k: Vec<f32>,
}

impl FeatureState {
    /// No keys yet.
    pub fn zeros(batch: usize, kv_heads: usize, features: usize, v_dim: usize) -> Self {
        let heads = batch * kv_heads;
        Self { kv: vec![0.0; heads * features * v_dim], k: vec![0.0; heads * features] }
    }
}

/// Gradients of [`FeatureAttend`]; all are overwritten.
pub struct FeatureGrads<'a, 'b> {
    /// Of φ(q), (B, H, Tq, R).
    pub dq: &'a mut ViewMut<'b, f32>,
    /// Of φ(k), (B, H_kv, Tk, R).
    pub dk: &'a mut ViewMut<'b, f32>,
    /// Of v, (B, H_kv, Tk, Dv).
    pub dv: &'a mut ViewMut<'b, f32>,
    /// Of the weights, (H, 2T − 1).
    pub dweights: Option<&'a mut [f32]>,
}

/// Shapes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    h: usize,
    hkv: usize,
    tq: usize,
    tk: usize,
    r: usize,
    dv: usize,
}

impl Sizes {
    fn group(&self) -> usize {
        self.h / self.hkv
    }

    fn work<T>(&self, flops: usize, tiles: usize, pairs: usize, written: usize) -> Work {
        let read = self.b * (self.h * self.tq * self.r + self.hkv * self.tk * (self.r + self.dv)) * size_of::<T>();
        Work {
            flops: flops as u64,
            bytes: (read + 4 * written) as u64,
            tiles: tiles as u64,
            pairs: pairs as u64,
            ..Work::default()
        }
    }
}

impl FeatureAttend<'_> {
    fn sizes(&self, op: &'static str, q: [usize; 4], k: [usize; 4], v: [usize; 4], out: [usize; 4]) -> Result<Sizes> {
        crate::attend::check_shapes(op, q, k, v, out)?;
        let ([b, h, tq, r], [_, hkv, tk, dv]) = (q, [k[0], k[1], k[2], v[3]]);
        let param =
            |name, value: String, remedy: &str| Err(KernelError::Param { op, name, value, remedy: remedy.into() });
        if self.causal && tq > tk {
            return param("causal", format!("{tq} queries over {tk} keys"), "give at least as many keys as queries");
        }
        if let Some(c) = self.weights {
            same(op, "tokens (weights need Tq = Tk)", "q", tq, "k", tk)?;
            same(op, "elements", "weights", c.len(), "heads x (2T - 1)", h * (2 * tq).saturating_sub(1))?;
        }
        if self.normalise.is_some_and(|e| !e.is_finite()) {
            return param("normalise", format!("{:?}", self.normalise), "give a finite epsilon");
        }
        Ok(Sizes { b, h, hkv, tq, tk, r, dv })
    }

    /// q (B, H, Tq, R), k (B, H_kv, Tk, R), v (B, H_kv, Tk, Dv) into out (B, H, Tq, Dv).
    ///
    /// `state`, for causal calls without weights, holds the keys before this call's first and is moved on to its
    /// last; a step of generation is a call with one token. A row that sees no key is zero.
    pub fn run<T: Element>(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        out: &mut ViewMut<f32>,
        state: Option<&mut FeatureState>,
    ) -> Result<Work> {
        const OP: &str = "feature_attend";
        let n = self.sizes(OP, q.shape, k.shape, v.shape, out.shape)?;
        if let Some(s) = &state {
            if !self.causal || self.weights.is_some() {
                return Err(KernelError::Param {
                    op: OP,
                    name: "state",
                    value: format!("causal {}, weights {}", self.causal, self.weights.is_some()),
                    remedy: "a state belongs to causal attention without weights; pass None".into(),
                });
            }
            same(
                OP,
                "elements",
                "state kv",
                s.kv.len(),
                "batch x kv heads x features x v_dim",
                n.b * n.hkv * n.r * n.dv,
            )?;
            same(OP, "elements", "state k", s.k.len(), "batch x kv heads x features", n.b * n.hkv * n.r)?;
        }
        let out = out.rows();
        Ok(match self.weights {
            None => chunked::forward(self, n, q, k, v, &out, state),
            Some(c) if toeplitz::by_transform(self, n) => toeplitz::forward(self, n, c, q, k, v, &out),
            Some(c) => toeplitz::forward_direct(self, n, c, q, k, v, &out),
        })
    }

    /// Gradients for the output gradient `dout` (B, H, Tq, Dv). Outputs and denominators are computed again; nothing
    /// of the forward call is needed. Calls that started from a state are not covered.
    pub fn backward<T: Element>(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        dout: &View<f32>,
        grads: FeatureGrads,
    ) -> Result<Work> {
        const OP: &str = "feature_attend backward";
        let n = self.sizes(OP, q.shape, k.shape, v.shape, dout.shape)?;
        let dims = ["batch", "heads", "tokens", "features"];
        for (name, got, like, want) in [
            ("dq", grads.dq.shape, "q", q.shape),
            ("dk", grads.dk.shape, "k", k.shape),
            ("dv", grads.dv.shape, "v", v.shape),
        ] {
            for i in 0..4 {
                same(OP, dims[i], name, got[i], like, want[i])?;
            }
        }
        let weights = self.weights.map_or(0, <[f32]>::len);
        if let Some(dc) = &grads.dweights {
            same(OP, "elements", "dweights", dc.len(), "weights", weights)?;
        }
        let rows = GradRows { dq: grads.dq.rows(), dk: grads.dk.rows(), dv: grads.dv.rows() };
        Ok(match self.weights {
            None => chunked::backward(self, n, q, k, v, dout, &rows),
            Some(c) if toeplitz::by_transform(self, n) => {
                toeplitz::backward(self, n, c, q, k, v, dout, &rows, grads.dweights)
            }
            Some(c) => toeplitz::backward_direct(self, n, c, q, k, v, dout, &rows, grads.dweights),
        })
    }

    /// A row's numerator, in place, to its output; returns the factor 1 / (den + ε).
    fn finish(&self, num: &mut [f32], den: f32) -> f32 {
        let Some(eps) = self.normalise else { return 1.0 };
        let den = den + eps;
        let inverse = if den == 0.0 { 0.0 } else { 1.0 / den };
        num.iter_mut().for_each(|x| *x *= inverse);
        inverse
    }

    /// From a row's output and its gradient, in place, the gradient of the numerator; returns the denominator's.
    fn unfinish(&self, out: &[f32], dout: &mut [f32], inverse: f32) -> f32 {
        if self.normalise.is_none() {
            return 0.0;
        }
        let dot: f32 = out.iter().zip(&*dout).map(|(o, g)| o * g).sum();
        dout.iter_mut().for_each(|g| *g *= inverse);
        -dot * inverse
    }
}

/// Where gradients go.
struct GradRows<'a> {
    dq: Rows<'a, f32>,
    dk: Rows<'a, f32>,
    dv: Rows<'a, f32>,
}

/// Copy rows `from..from + n` of a head to contiguous f32.
fn load<T: Element>(x: &View<T>, b: usize, h: usize, from: usize, n: usize, out: &mut [f32]) {
    let d = x.shape[3];
    for i in 0..n {
        out[i * d..(i + 1) * d].iter_mut().zip(x.row(b, h, from + i)).for_each(|(o, x)| *o = x.to_f32());
    }
}

/// Write contiguous rows to tokens `from..` of a head.
///
/// # Safety
/// No other thread touches these rows.
unsafe fn store(x: &[f32], d: usize, out: &Rows<f32>, b: usize, h: usize, from: usize) {
    for (i, row) in x.chunks_exact(d.max(1)).enumerate() {
        // SAFETY: by the contract.
        unsafe { out.row_mut(b, h, from + i) }.copy_from_slice(row);
    }
}
