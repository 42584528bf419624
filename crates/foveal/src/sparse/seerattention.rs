//! SeerAttention: a learned gate over blocks beside frozen attention (Gao et al. 2024, arXiv 2410.13276).
//!
//! With blocks of b tokens, q and k before rotation and, per head, matrices W_q (D, G) and W_k (3D, G):
//! Q̂_I = R_I · (mean of q in I) W_q, K̂_J = R_J · [max; min; mean of k in J] W_k, R the rotary turn of a block's first
//! position, and gate(I, J) = softmax over J ≤ I of Q̂_I·K̂_J/√G. Query block I visits its own blocks and those whose
//! gate reaches `threshold`, or the `topk` best. Trained by KL(t‖gate), t(I, J) = the largest true attention weight
//! in block (I, J), each row normalised; attention itself is left alone.
//!
//! q (Tq, D), k (Tk, D) → a table of (block_size × block_size) blocks. Cost: 4·T·D for pooling, 2·T/b·(D + 3D)·G for
//! the projections, T²/b²·G for the gate. Without trained gates the estimate is the product of mean rows, what
//! training starts ahead of.

use super::block_map::BlockMap;
use super::estimate::{SOFTMAX_FLOPS, bytes};
use super::layer_ops::numbers;
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::{ab, abt};
use crate::prim::pool::mean_blocks;
use crate::prim::rope::Rope;
use crate::prim::select::topk;
use crate::prim::{AttendOptions, attend_selected};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{D, Device, Tensor};
use candle_nn::{Init, VarBuilder};
use foveal_kernels::{HeadTable, Work};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SeerAttention {
    /// Queries and keys per block.
    pub block_size: usize,
    /// Blocks per query block, its own included; 0 = by `threshold`.
    pub topk: usize,
    /// Least gate of a visited block.
    pub threshold: f64,
    /// File of trained gates.
    pub gates: String,
    /// A layer with a gate of its own, to be trained.
    pub learn: bool,
    /// Channels of the gate; 0 = those of a head.
    pub gate_dim: usize,
    /// Base of the rotary turn of blocks.
    pub rope_base: f64,
}

impl Default for SeerAttention {
    fn default() -> Self {
        Self {
            block_size: 64,
            topk: 0,
            threshold: 2e-3,
            gates: String::new(),
            learn: false,
            gate_dim: 0,
            rope_base: 10_000.0,
        }
    }
}

impl Config for SeerAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "queries and keys per block"),
        ("topk", "blocks that a query block visits, its own included; 0: as many as reach the threshold"),
        ("threshold", "least gate, 0 to 1, of a visited block where topk is 0; 0 is exact"),
        ("gates", "safetensors file of trained gates (`foveal tune gates` writes one); empty: products of mean rows"),
        ("learn", "as a layer: a gate with parameters of its own, and the loss that trains it"),
        ("gate_dim", "channels of a gate that is learned here, even; 0: as many as a head has"),
        ("rope_base", "base of the rotary turn of blocks in a gate that is learned here"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 {
            return Err("block_size = 0: use at least 1, such as 64".into());
        }
        if !(0.0..=1.0).contains(&self.threshold) {
            return Err(format!("threshold = {}: use a share from 0 to 1", self.threshold));
        }
        if !self.gate_dim.is_multiple_of(2) {
            return Err(format!("gate_dim = {}: use an even number, or 0", self.gate_dim));
        }
        if !(self.rope_base.is_finite() && self.rope_base > 0.0) {
            return Err(format!("rope_base = {}: use a positive number such as 10000", self.rope_base));
        }
        if self.learn && !self.gates.is_empty() {
            return Err("learn = true beside gates: a gate is either learned or read; give one of them".into());
        }
        Ok(())
    }
}

impl SeerAttention {
    /// Blocks of a query block whose own blocks begin at `own`, given the gate's logits of all blocks up to its last.
    fn choose(&self, logits: &[f32], own: usize) -> Vec<u32> {
        let mut list = if self.topk > 0 {
            topk(&logits[..own], self.topk - 1)
        } else {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = logits.iter().map(|x| (x - top).exp()).sum();
            let least = self.threshold as f32 * total;
            // An estimate that overflowed hides nothing.
            let kept = |x: &f32| least.is_nan() || (x - top).exp() >= least;
            (0..own as u32).filter(|&j| kept(&logits[j as usize])).collect()
        };
        list.extend(own as u32..logits.len() as u32);
        list
    }

    /// The table that logits (query blocks, key blocks) of a problem of `tq` queries behind `offset` keys lead to.
    fn table(&self, logits: &[f32], tq: usize, offset: usize) -> HeadTable {
        let b = self.block_size;
        let cols = (offset + tq).div_ceil(b);
        let lists = (0..tq)
            .step_by(b)
            .zip(logits.chunks_exact(cols.max(1)))
            .map(|(r0, row)| {
                let end = (offset + (r0 + b).min(tq) - 1) / b + 1;
                self.choose(&row[..end], (offset + r0) / b)
            })
            .collect();
        HeadTable::from_lists(b, b, lists)
    }
}

/// Largest, smallest and mean entries of each block of `block` rows, (ceil(rows/block), 3·cols) in this order.
pub fn pool_keys(m: &Mat, block: usize) -> Vec<f32> {
    let (n, d) = (m.rows.div_ceil(block), m.cols);
    let mut out = vec![0f32; n * 3 * d];
    for (i, (o, mean)) in out.chunks_exact_mut((3 * d).max(1)).zip(mean_blocks(m, block).chunks_exact(d)).enumerate() {
        let (most, rest) = o.split_at_mut(d);
        let (least, average) = rest.split_at_mut(d);
        most.copy_from_slice(m.row(i * block));
        least.copy_from_slice(m.row(i * block));
        average.copy_from_slice(mean);
        for r in i * block + 1..((i + 1) * block).min(m.rows) {
            for ((most, least), x) in most.iter_mut().zip(&mut *least).zip(m.row(r)) {
                *most = most.max(*x);
                *least = least.min(*x);
            }
        }
    }
    out
}

/// cos and sin of the turns at `positions`, each (positions, dim/2).
fn turns(dim: usize, base: f64, positions: impl Iterator<Item = usize>) -> (Vec<f32>, Vec<f32>) {
    let rope = Rope::new(dim, base);
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for p in positions {
        let (c, s) = rope.tables(p, 1);
        cos.extend(c);
        sin.extend(s);
    }
    (cos, sin)
}

/// Trained gates of all layers of one model, and the rotation that they undo.
#[derive(Debug)]
pub struct Gates {
    /// Layers, query heads, K/V heads, channels of a head, channels of the gate.
    pub shape: [usize; 5],
    /// Queries and keys per block.
    pub block_size: usize,
    /// Base of the rotary turn of blocks.
    pub rope_base: f64,
    /// The model's rotation of q and k.
    pub rope: Rope,
    /// W_q, (layers, heads, D, G).
    pub q: Vec<f32>,
    /// W_k, (layers, K/V heads, 3D, G).
    pub k: Vec<f32>,
    /// Angles of the model's rotation backwards, for as many positions as were asked for.
    back: RwLock<Arc<(Vec<f32>, Vec<f32>)>>,
}

impl Gates {
    /// Gates from their parts.
    ///
    /// # Errors
    /// Numbers of elements that do not fit the shape.
    pub fn new(
        shape: [usize; 5],
        block_size: usize,
        rope_base: f64,
        rope: Rope,
        q: Vec<f32>,
        k: Vec<f32>,
    ) -> Result<Self> {
        let [layers, heads, kv, d, g] = shape;
        let wrong = |message: String| Err(Error::Param { system: ID.into(), message });
        let product = |x: &[usize]| x.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        if product(&[layers, heads, d, g]) != Some(q.len()) || product(&[layers, kv, 3, d, g]) != Some(k.len()) {
            return wrong(format!(
                "gates of shape {shape:?} do not hold {} and {} numbers; train them again",
                q.len(),
                k.len()
            ));
        }
        if block_size == 0
            || kv == 0
            || !heads.is_multiple_of(kv)
            || !g.is_multiple_of(2)
            || 2 * rope.inv_freq.len() > d
        {
            return wrong(format!(
                "gates of shape {shape:?}, blocks of {block_size} are of no model; train them again"
            ));
        }
        Ok(Self { shape, block_size, rope_base, rope, q, k, back: RwLock::default() })
    }

    /// Read a file that [`Gates::bytes`] made.
    ///
    /// # Errors
    /// A file that is missing, no safetensors file, or lacks a part; the message names which.
    pub fn load(path: &Path) -> Result<Self> {
        let wrong = |what: String| Error::Param {
            system: ID.into(),
            message: format!(
                "gates = {:?}: {what}; `foveal tune gates` writes such a file",
                path.display().to_string()
            ),
        };
        let data = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
        let file = SafeTensors::deserialize(&data).map_err(|e| wrong(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&data).map_err(|e| wrong(e.to_string()))?;
        let about = |name: &str| {
            let parts =
                header.metadata().as_ref().and_then(|m| m.get(ABOUT)).map(|x| x.split(' ')).into_iter().flatten();
            let number = |part: &str| part.strip_prefix(name)?.strip_prefix('=')?.parse::<f64>().ok();
            parts.filter_map(number).next().ok_or_else(|| wrong(format!("no number {name} in its metadata")))
        };
        let tensor = |name: &str| -> Result<(Vec<usize>, Vec<f32>)> {
            let t = file.tensor(name).map_err(|e| wrong(e.to_string()))?;
            if t.dtype() != Dtype::F32 {
                return Err(wrong(format!("tensor {name} is not f32")));
            }
            let x: Vec<f32> = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            if x.iter().any(|x| !x.is_finite()) {
                return Err(wrong(format!("tensor {name} holds NaN or infinity")));
            }
            Ok((t.shape().to_vec(), x))
        };
        let ((qs, q), (ks, k)) = (tensor("gate.q")?, tensor("gate.k")?);
        let (&[layers, heads, d, g], &[_, kv, ..]) = (&qs[..], &ks[..]) else {
            return Err(wrong(format!("gate.q has shape {qs:?}, gate.k {ks:?}, which should have four dimensions")));
        };
        let rope = Rope { inv_freq: tensor("rope.inv_freq")?.1, factor: about("rope_factor")? as f32 };
        let block = about("block_size")?;
        Self::new([layers, heads, kv, d, g], block as usize, about("rope_base")?, rope, q, k)
    }

    /// The safetensors file that [`Gates::load`] reads.
    ///
    /// # Errors
    /// The format refuses.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let [layers, heads, kv, d, g] = self.shape;
        let tensor = |x: &[f32], shape: &[usize]| Tensor::from_slice(x, shape, &Device::Cpu);
        let tensors = [
            ("gate.q", tensor(&self.q, &[layers, heads, d, g])?),
            ("gate.k", tensor(&self.k, &[layers, kv, 3 * d, g])?),
            ("rope.inv_freq", tensor(&self.rope.inv_freq, &[self.rope.inv_freq.len()])?),
        ];
        let (block, base, factor) = (self.block_size, self.rope_base, self.rope.factor);
        // One entry, so that the same gates are the same bytes: a map's order differs from run to run.
        let about = format!("block_size={block} rope_base={base} rope_factor={factor}");
        let about = HashMap::from([(ABOUT.to_owned(), about)]);
        safetensors::serialize(tensors.iter().map(|(n, t)| (*n, t)), Some(about))
            .map_err(|e| Error::Param { system: ID.into(), message: format!("gates cannot be written: {e}") })
    }

    /// The rows of `m`, which stand at positions from `first` on, as they were before the model's rotation.
    pub fn unrotated(&self, m: &Mat, first: usize) -> Vec<f32> {
        let half = self.rope.inv_freq.len();
        let angles = self.angles(first + m.rows);
        let mut out = Vec::with_capacity(m.rows * m.cols);
        for i in 0..m.rows {
            let at = out.len();
            out.extend_from_slice(m.row(i));
            let of = (first + i) * half..(first + i + 1) * half;
            Rope::rotate_row(&mut out[at..], &angles.0[of.clone()], &angles.1[of]);
        }
        out
    }

    /// Angles backwards for positions 0..n at least.
    fn angles(&self, n: usize) -> Arc<(Vec<f32>, Vec<f32>)> {
        let half = self.rope.inv_freq.len();
        let kept = self.back.read().unwrap_or_else(PoisonError::into_inner).clone();
        if kept.0.len() >= n * half {
            return kept;
        }
        let mut kept = self.back.write().unwrap_or_else(PoisonError::into_inner);
        if kept.0.len() < n * half {
            let (mut cos, mut sin) = self.rope.tables(0, n.next_power_of_two());
            // The tables turn and stretch by the factor; the way back turns and shrinks.
            let shrink = 1.0 / (self.rope.factor * self.rope.factor);
            cos.iter_mut().for_each(|x| *x *= shrink);
            sin.iter_mut().for_each(|x| *x *= -shrink);
            *kept = Arc::new((cos, sin));
        }
        kept.clone()
    }

    /// The gate's logits of one head, (query blocks, key blocks), and the work of estimating them.
    fn logits(&self, p: &HeadProblem) -> Result<(Vec<f32>, Work)> {
        let [layers, heads, kv, d, g] = self.shape;
        if p.layer >= layers || p.head >= heads || p.q.cols != d {
            return Err(Error::Param {
                system: ID.into(),
                message: format!(
                    "gates are of a model of {layers} layers of {heads} heads of {d}; layer {}, head {} of {} is none \
                     of them: run them on the model that they were trained for",
                    p.layer, p.head, p.q.cols
                ),
            });
        }
        let (b, off) = (self.block_size, p.offset());
        let (nq, nk) = (p.q.rows.div_ceil(b), p.k.rows.div_ceil(b));
        let mut work = Work::default();
        let (q, k) = (self.unrotated(&p.q, off), self.unrotated(&p.k, 0));
        let half = self.rope.inv_freq.len();
        work.flops += ((p.q.rows + p.k.rows) * 6 * half) as u64;
        let q = mean_blocks(&Mat::new(&q, p.q.rows, d, d), b);
        let k = pool_keys(&Mat::new(&k, p.k.rows, d, d), b);
        work.flops += ((p.q.rows + p.k.rows) * d) as u64;
        work.bytes += bytes(p.q.rows + p.k.rows, d);
        let wq = &self.q[(p.layer * heads + p.head) * d * g..][..d * g];
        let wk = &self.k[(p.layer * kv + p.head / (heads / kv)) * 3 * d * g..][..3 * d * g];
        let (mut qg, mut kg) = (vec![0f32; nq * g], vec![0f32; nk * g]);
        work.flops += ab(nq, g, d, &q, wq, &mut qg) + ab(nk, g, 3 * d, &k, wk, &mut kg);
        for (x, first) in [(&mut qg, off), (&mut kg, 0)] {
            let (cos, sin) = turns(g, self.rope_base, (0..x.len() / g).map(|i| first + i * b));
            for ((x, c), s) in x.chunks_exact_mut(g).zip(cos.chunks_exact(g / 2)).zip(sin.chunks_exact(g / 2)) {
                Rope::rotate_row(x, c, s);
            }
        }
        let mut logits = vec![0f32; nq * nk];
        work.flops += (3 * (nq + nk) * g) as u64;
        work.flops += abt(nq, nk, g, 1.0 / (g as f32).sqrt(), &qg, g, &kg, g, &mut logits);
        Ok((logits, work))
    }
}

/// The system as a selector: with trained gates, or with products of mean rows.
struct Gated {
    config: SeerAttention,
    gates: Option<Gates>,
}

impl Selector for Gated {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (b, d) = (self.config.block_size, p.q.cols);
        let (nq, nk) = (p.q.rows.div_ceil(b), p.k.rows.div_ceil(b));
        let (logits, mut work) = match &self.gates {
            Some(gates) => gates.logits(p)?,
            None => {
                let (q, k) = (mean_blocks(&p.q, b), mean_blocks(&p.k, b));
                let mut logits = vec![0f32; nq * nk];
                let mut work = Work { bytes: bytes(p.q.rows + p.k.rows, d), ..Work::default() };
                work.flops += ((p.q.rows + p.k.rows + nq + nk) * d) as u64;
                work.flops += abt(nq, nk, d, p.scale, &q, d, &k, d, &mut logits);
                (logits, work)
            }
        };
        if self.config.topk == 0 {
            work.flops += (SOFTMAX_FLOPS * nq * nk) as u64;
        }
        let table = self.config.table(&logits, p.q.rows, p.offset());
        Ok((HeadSelection::of_blocks(table), work))
    }
}

/// Rotate pairs (c, c + G/2) of x (…, n, G) by tables (n, G/2).
fn turned(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Ok(Tensor::cat(&[&first, &second], D::Minus1)?)
}

/// Where the blocks of one problem stand.
#[derive(Debug, Clone, Copy)]
pub struct BlockGrid {
    /// Tokens per block.
    pub block: usize,
    /// Keys before the first query.
    pub offset: usize,
    /// Base of the rotary turn of blocks.
    pub base: f64,
}

/// The gate's logits (B, H, query blocks, key blocks), of what is not seen yet too, from pooled rows before rotation:
/// `q` (B, H, query blocks, D), `k` (B, H_kv, key blocks, 3D), `wq` (H, D, G), `wk` (H_kv, 3D, G). Gradients reach all.
pub fn gate_logits(q: &Tensor, k: &Tensor, wq: &Tensor, wk: &Tensor, at: BlockGrid) -> Result<Tensor> {
    let (b, h, nq, _) = q.dims4()?;
    let (_, kv, nk, _) = k.dims4()?;
    let g = wq.dim(2)?;
    let (q, k) = (q.broadcast_matmul(&wq.unsqueeze(0)?)?, k.broadcast_matmul(&wk.unsqueeze(0)?)?);
    let turn = |x: &Tensor, n: usize, first: usize| {
        let (cos, sin) = turns(g, at.base, (0..n).map(|i| first + i * at.block));
        let table = |x: Vec<f32>| Tensor::from_vec(x, (n, g / 2), &Device::Cpu);
        turned(x, &table(cos)?, &table(sin)?)
    };
    let (q, k) = (turn(&q, nq, at.offset)?, turn(&k, nk, 0)?);
    // Query heads of a group side by side: their keys are never repeated.
    let q = q.reshape((b, kv, h / kv * nq, g))?;
    let logits = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (g as f64).sqrt()))?;
    Ok(logits.reshape((b, h, nq, nk))?)
}

/// KL(target‖gate), averaged over all rows but the first quarter: `logits` and `target` (B, H, query blocks, key
/// blocks), rows of the target summing to one and zero where nothing is seen. Gradients reach the logits.
pub fn gate_loss(logits: &Tensor, target: &Tensor, at: BlockGrid) -> Result<Tensor> {
    let (b, h, nq, nk) = logits.dims4()?;
    let seen = |i: usize, j: usize| j * at.block < at.offset + (i + 1) * at.block;
    // −1e9 rather than −∞: times a target of zero that is zero.
    let hidden: Vec<f32> = (0..nq * nk).map(|x| if seen(x / nk, x % nk) { 0.0 } else { -1e9 }).collect();
    let logits = logits.broadcast_add(&Tensor::from_vec(hidden, (nq, nk), &Device::Cpu)?)?;
    let from = nq / 4;
    let (logits, target) = (logits.narrow(2, from, nq - from)?, target.detach().narrow(2, from, nq - from)?);
    let entropy: f64 = numbers(&target)?.iter().filter(|t| **t > 0.0).map(|t| f64::from(*t) * f64::from(*t).ln()).sum();
    let cross = (candle_nn::ops::log_softmax(&logits, D::Minus1)? * target)?.sum_all()?;
    let rows = (b * h * (nq - from)) as f64;
    Ok(((cross.neg()? + entropy)? / rows)?)
}

/// A layer with a gate of its own.
struct Learned {
    config: SeerAttention,
    heads: usize,
    kv_heads: usize,
    q: Tensor,
    k: Tensor,
}

impl MixerSystem for SeerAttention {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let d = dims.head_dim;
        let g = if self.gate_dim > 0 { self.gate_dim } else { d.next_multiple_of(2) };
        let init = |fan: usize| Init::Randn { mean: 0.0, stdev: 1.0 / (fan as f64).sqrt() };
        Ok(Box::new(Learned {
            config: self.clone(),
            heads: dims.heads,
            kv_heads: dims.kv_heads,
            q: vb.get_with_hints((dims.heads, d, g), "gate.q", init(d))?,
            k: vb.get_with_hints((dims.kv_heads, 3 * d, g), "gate.k", init(3 * d))?,
        }))
    }

    fn reads_before_rotation(&self) -> bool {
        true
    }
}

impl Mixer for Learned {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let (q0, k0) = i.before_rotation(ID)?;
        let (b, h, tq, d) = i.q.dims4()?;
        let tk = i.k.dim(2)?;
        let block = self.config.block_size;
        let (nq, nk) = (tq.div_ceil(block), tk.div_ceil(block));
        let at = BlockGrid { block, offset: tk - tq, base: self.config.rope_base };
        let (q0, k0) = (numbers(q0)?, numbers(k0)?);
        let rows = |x: &[f32], t: usize, f: &dyn Fn(&Mat) -> Vec<f32>| -> Vec<f32> {
            x.chunks_exact((t * d).max(1)).flat_map(|x| f(&Mat::new(x, t, d, d))).collect()
        };
        let qp = rows(&q0, tq, &|m| mean_blocks(m, block));
        let kp = rows(&k0, tk, &|m| pool_keys(m, block));
        let qp = Tensor::from_vec(qp, (b, h, nq, d), &Device::Cpu)?;
        let kp = Tensor::from_vec(kp, (b, self.kv_heads, nk, 3 * d), &Device::Cpu)?;
        let logits = gate_logits(&qp, &kp, &self.q, &self.k, at)?;
        let g = self.q.dim(2)?;
        let mut select = Work { bytes: bytes(b * (h * tq + self.kv_heads * tk), d), ..Work::default() };
        select.flops += (b * (h * tq + self.kv_heads * tk) * d) as u64;
        select.flops += (2 * b * g * d * (h * nq + 3 * self.kv_heads * nk)) as u64;
        select.flops += (b * h * nq * nk * (2 * g + SOFTMAX_FLOPS)) as u64;
        let selections: Vec<HeadSelection> = numbers(&logits)?
            .chunks_exact((nq * nk).max(1))
            .map(|x| HeadSelection::of_blocks(self.config.table(x, tq, tk - tq)))
            .collect();
        let mut loss = None;
        if self.q.track_op() || self.k.track_op() {
            let (target, work) = targets(i, self.heads / self.kv_heads, block)?;
            select += work;
            loss = Some(gate_loss(&logits, &target, at)?);
        }
        let options = AttendOptions { scale: i.scale, ..AttendOptions::causal() };
        let a = attend_selected(i.q, i.k, i.v, &options, selections.clone())?;
        Ok(Mixed { out: a.out, work: a.work, select, loss, selections })
    }
}

/// What a gate is taught on this input, (B, H, query blocks, key blocks).
fn targets(i: &MixInput, group: usize, block: usize) -> Result<(Tensor, Work)> {
    let (b, h, tq, d) = i.q.dims4()?;
    let tk = i.k.dim(2)?;
    let (q, k, scale) = (numbers(i.q)?, numbers(i.k)?, i.scale()?);
    let maps: Vec<(BlockMap, Work)> = (0..b * h)
        .into_par_iter()
        .map(|x| {
            let q = Mat::new(&q[x * tq * d..(x + 1) * tq * d], tq, d, d);
            let k = Mat::new(&k[x / group * tk * d..(x / group + 1) * tk * d], tk, d, d);
            BlockMap::of(&HeadProblem::new(q, k, scale), block)
        })
        .collect();
    let work = maps.iter().map(|m| m.1).sum();
    let all: Vec<f32> = maps.iter().flat_map(|m| m.0.target()).collect();
    Ok((Tensor::from_vec(all, (b, h, tq.div_ceil(block), tk.div_ceil(block)), &Device::Cpu)?, work))
}

const ID: &str = "seerattention";

/// Entry of a gates file's metadata that holds its numbers.
const ABOUT: &str = "foveal.gates";

/// Card.
pub const CARD: Card = Card {
    id: ID,
    title: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    authors: "Gao et al., 2024",
    arxiv: "2410.13276",
    family: Family::Sparse,
    slots: &[Slot::Prefill, Slot::Mixer],
    laws: &[
        Law::CausalInBlocks("block_size"),
        Law::ExactAt(&[("threshold", "0")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "threshold", values: &["0.3", "0.1", "0.03", "0.002", "0"] },
        Law::Gradients,
    ],
    equation: "Q_I = R_I · mean(q in I) W_q,  K_J = R_J · [max; min; mean](k in J) W_k   (q, k before rotation)\n\
               gate(I,J) = softmax over J <= I of Q_I·K_J / sqrt(G); I visits its own and gate >= threshold (or topk)\n\
               training: KL(t || gate), t(I,J) = max of the true weights in (I,J), rows normalised",
    cost: "4·T·D pooling, 8·T/block·D·G projections, T²/block²·G gate; attention at the density the gate leaves",
    choices: &[
        "The paper's gate: Q averaged, K pooled three ways (Qavg_Kmaxminavg), one matrix for each query head and \
         one for each K/V head. The authors' code drops W_q where the gate is as wide as a head; it is kept here \
         always.",
        "Own blocks are always visited, so that no row is empty; the authors' code leaves this to the gate, and \
         makes the last two rows of blocks dense, which no layer that must not look ahead can do.",
        "topk counts a query block's own block. The authors' nz_ratio is a topk that grows with the prompt.",
        "The loss leaves out the first quarter of the rows, as the authors' code does, and is the mean over the \
         others; candle's gradient of it reaches the gate alone, not q and k.",
        "On a pretrained model q and k arrive rotated; a gates file carries the model's frequencies and they are \
         turned back, which costs 6·T·D and is counted. Scaling rules that depend on the prompt's length are not \
         covered.",
        "Without gates or learn = true the estimate is mean(q)·mean(k) of rotated rows, which nobody proposed under \
         this name: it is what a trained gate is compared with.",
        "`foveal tune gates` on SmolLM2-135M, 14 pieces of 1,024 tokens, 100 steps: share of held-out attention in 2, 4 and 8 of \
         up to 16 blocks .678, .831, .942; before training .477, .615, .770; first and nearest blocks .685, .816, .889; the \
         best there is .708, .853, .952. Perplexity at 2,048 tokens, dense 18.3: topk=8 with these gates 21.4, without 37.7; \
         topk=4 26.3 and 60.4.",
    ],
    params: params_of::<SeerAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    let config = configure::<SeerAttention>(ID, params)?;
    if config.learn {
        return Ok(System::Mixer(Box::new(config)));
    }
    let mut gates = None;
    if !config.gates.is_empty() {
        let read = Gates::load(Path::new(&config.gates))?;
        if read.block_size != config.block_size {
            return Err(Error::Param {
                system: ID.into(),
                message: format!(
                    "block_size = {}: the gates were trained for blocks of {n}; set block_size={n}",
                    config.block_size,
                    n = read.block_size
                ),
            });
        }
        gates = Some(read);
    }
    Ok(System::Selector(Box::new(Gated { config, gates })))
}
