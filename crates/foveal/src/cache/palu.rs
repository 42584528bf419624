//! Palu: keys and values as low-rank latents of their projection weights, rebuilt on read
//! (Chang et al. 2024, arXiv 2407.21118).
//!
//! The K/V heads are cut into groups of `group`. For a group with stacked weights
//! W (g·D × hidden) and U its first r left singular vectors, the rank-r product is U·(Uᵀ W), so
//! with k = W x + b before rotation:
//!
//! h = Uᵀ(k − b)  is stored (r wide instead of g·D);   k ≈ U h + b, then rotated at its position;
//! v ≈ U_V h_V + b_V.
//!
//! Ranks: r_K + r_V = 2·rank_ratio·g·D with r_V = value_weight·r_K, neither above g·D.
//!
//! With `whiten`, U holds the left singular vectors of W·M^½, M = Σ x xᵀ over a calibration
//! text: the rank that is best for the layer's real inputs (the paper's data-aware SVD).
//!
//! On read, keys are rebuilt, rotated, attended to and forgotten tile by tile; unless the store is
//! f32, U_K is bf16 in that product, and so is what many rows at once attend to. Values are never
//! rebuilt: o = (p·H_V)·U_Vᵀ + b_V is exact, so attention gathers latents and expands once.
//!
//! Cost of a decoded token: T·r_K·D multiply-adds a K/V head to rebuild keys, T·(D + r_V) a query
//! head to attend; memory T·(r_K + r_V) a group instead of 2·T·g·D, plus U_K, U_V.
//!
//! Where we had to choose: see [`CARD`].

use super::batch::{self, BATCH_FROM};
use super::{CacheCtx, CachePolicy, KvWeights, LayerCache, LayerCalibration, Needs, Prompt, Resident, Step};
use crate::error::{Error, Result};
use crate::prim::factor::{gram, symmetric_eigen};
use crate::prim::gemm;
use crate::prim::kv::{KvDtype, RowStore};
use crate::prim::rope::Rope;
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::decode::{Codec, Decode, Segment};
use foveal_kernels::elementwise::{self, Heads, RopeLayout};
use foveal_kernels::{Attend, Isa, PackedLinear, View, ViewMut, WeightFormat, Work, merge_row};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Palu {
    /// Stored width of keys and values together, as a share of the original.
    pub rank_ratio: f32,
    /// Rank of values over rank of keys.
    pub value_weight: f32,
    /// First tokens stored at full width.
    pub sinks: usize,
    /// K/V heads that share one factorisation.
    pub group: usize,
    /// Weigh the factorisation by the layer's inputs on the calibration text.
    pub whiten: bool,
}

impl Default for Palu {
    fn default() -> Self {
        Self { rank_ratio: 0.5, value_weight: 2.0, sinks: 0, group: 4, whiten: true }
    }
}

impl Config for Palu {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("rank_ratio", "stored width of keys and values together as a share of the original, above 0 up to 1 (exact)"),
        ("value_weight", "rank of values over rank of keys, above 0; neither exceeds the full width; 1 = equal ranks"),
        ("sinks", "first tokens stored at full width; not in the paper (0), see the choices"),
        ("group", "K/V heads that share one factorisation; lowered to the largest divisor of the model's K/V heads"),
        ("whiten", "weigh the factorisation by the calibration text's inputs, where the calibration has them"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(self.rank_ratio > 0.0 && self.rank_ratio <= 1.0) {
            return Err(format!("rank_ratio = {}: use a share above 0, up to 1 (exact)", self.rank_ratio));
        }
        if !(self.value_weight > 0.0 && self.value_weight.is_finite()) {
            return Err(format!("value_weight = {}: use a number above 0", self.value_weight));
        }
        if self.group == 0 {
            return Err("group = 0: factorise at least 1 head at a time".into());
        }
        Ok(())
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "palu",
    title: "Palu: Compressing KV-Cache with Low-Rank Projection",
    authors: "Chang et al., 2024",
    arxiv: "2407.21118",
    family: Family::Cache,
    slots: &[Slot::Cache],
    laws: &[
        Law::Causal,
        Law::StepsAgree,
        Law::BytesAsDeclared,
        Law::SmallerThanDense,
        Law::ExactAt(&[("rank_ratio", "1")]),
        Law::Monotone { param: "rank_ratio", values: &["0.25", "0.5", "0.75", "1"] },
    ],
    equation: "W_group·M^½ = U Σ Vᵀ (M = Σ x xᵀ, or 1);  U = first r columns\n\
               r_K + r_V = 2·rank_ratio·g·D,  r_V = value_weight·r_K\n\
               h_K = U_Kᵀ(k − b_K),  h_V = U_Vᵀ(v − b_V)  are stored\n\
               k ≈ rope(U_K h_K + b_K);  o = (p·H_V)·U_Vᵀ + b_V",
    cost: "T·r_K·D multiply-adds a K/V head to rebuild keys and T·(D + r_V) a query head to attend; T·(r_K + r_V) stored elements \
           a group of g heads instead of 2·T·g·D, plus U_K and U_V",
    choices: &[
        "Ranks are the same in all layers, with values getting value_weight times the keys'. The authors share ranks out by Fisher \
         information (root mean square of the loss's gradient on each weight), which needs a backward pass. On \
         SmolLM2-135M, computed with PyTorch, it gives keys 0.34 of all ranks, hence value_weight = 2; the rest of it, the \
         sharing among layers, did not help there (perplexity of 2,048 tokens with both projections replaced, rank_ratio 0.5, dense 6.95: equal ranks \
         10.24, Fisher 10.41, value_weight 2 9.30), so it is not built.",
        "The factors are as good as they can be: on held-out text of SmolLM2-135M (192 wide, rank 96) keys come back with a relative error of \
         0.10 and values of 0.34, where the principal components of that text itself would give 0.07 and 0.24, and factors from the \
         weights alone 0.21 and 0.53. Perplexity with the former is 9.49 (equal ranks, whitened: 10.24). The model has \
         3 K/V heads; the authors' example compresses Llama 2 7B (32 of them) in groups of 4, and their code also takes Mistral (8). \
         Whether the number of heads is what makes the difference was not tested.",
        "A third of the loss is the first token's: attention sinks there, its key and value are small and unlike all others, so the \
         factors, fitted to the sum over all tokens, miss it. sinks keeps so many first tokens as they are, which is not in the paper: \
         perplexity 7.81 for 9.30 above, with one token kept.",
        "Latents come from projecting k and v by U, which equals the product of the paper's two factors since U is \
         orthonormal; so the model's own projections stay in place and only the store is thin.",
        "B_V is not folded into the output projection but applied to the attended latent: the same product in the other order.",
        "A biased projection (Qwen2) is factorised without its bias, which is taken off before and added after.",
        "Keys normalised per head (Qwen3) are no linear image of the input. The factors are those of diag(gain)·W_K and \
         the normalised key is projected: exact in span for group = 1, where the norm only rescales a token's key; with \
         several heads the rescaling differs by head, so the kept directions are near the best but not the best.",
        "whiten uses the calibration's input moments; where it has none the factors come from the weights alone (a warning says so).",
        "The quantisation of latents with folded Hadamard rotation is left to the store's dtype (int8), without rotation.",
    ],
    params: params_of::<Palu>,
    build,
};

fn build(params: &Params) -> Result<System> {
    let cfg = configure::<Palu>(CARD.id, params)?;
    Ok(System::Cache(Box::new(PaluPolicy { cfg, made: Mutex::default(), angles: Mutex::default() })))
}

impl Palu {
    /// Heads a group, of `kv_heads`.
    fn heads(&self, kv_heads: usize) -> usize {
        (1..=self.group.min(kv_heads)).rev().find(|g| kv_heads.is_multiple_of(*g)).unwrap_or(1)
    }

    /// Widths of the key and the value latent of `width` elements.
    fn ranks(&self, width: usize) -> [usize; 2] {
        let total = ((2.0 * self.rank_ratio * width as f32).round() as usize).clamp(2, 2 * width);
        let v = (total as f32 * self.value_weight / (1.0 + self.value_weight)).round() as usize;
        // What does not fit one goes to the other.
        let v = v.clamp(total.saturating_sub(width).max(1), width.min(total - 1));
        [total - v, v]
    }

    /// How the factor that rebuilds keys is stored.
    fn format(dtype: KvDtype) -> WeightFormat {
        if dtype == KvDtype::F32 { WeightFormat::F32 } else { WeightFormat::Bf16 }
    }
}

/// Orthonormal factors of one layer, one entry a group of heads.
struct Factors {
    /// U_K, (g·D, r_K) row-major.
    uk: Vec<Vec<f32>>,
    /// U_K as keys are rebuilt with it.
    rebuild: Vec<PackedLinear>,
    /// U_V, (g·D, r_V) row-major.
    uv: Vec<Vec<f32>>,
    /// Key bias, (H_kv·D) or empty.
    bk: Vec<f32>,
    /// Value bias, (H_kv·D) or empty.
    bv: Vec<f32>,
}

/// Factors already made, with the layer, storage, weights and calibration they belong to.
type Factorised = (usize, KvDtype, Weak<KvWeights>, Option<Weak<LayerCalibration>>, Arc<Factors>);

/// The policy, with what its layers share.
struct PaluPolicy {
    cfg: Palu,
    made: Mutex<Vec<Factorised>>,
    angles: Mutex<Option<Arc<Angles>>>,
}

/// cos and sin by position, grown on demand and shared by all layers of a model, like the
/// model's own tables; not part of any sequence's store.
struct Angles {
    rope: Arc<Rope>,
    tables: Mutex<Arc<Tables>>,
}

#[derive(Default)]
struct Tables {
    len: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Tables for positions below `len` at least.
    fn upto(&self, len: usize) -> Arc<Tables> {
        let mut t = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if t.len < len {
            let to = len.max(2 * t.len).next_multiple_of(256);
            let (cos, sin) = self.rope.tables(t.len, to - t.len);
            let grow = |old: &[f32], new: Vec<f32>| old.iter().copied().chain(new).collect();
            *t = Arc::new(Tables { len: to, cos: grow(&t.cos, cos), sin: grow(&t.sin, sin) });
        }
        t.clone()
    }
}

/// First `r` eigenvectors of diag(gain)·W·M·Wᵀ·diag(gain) for rows `rows` of W, (rows, r).
fn basis(w: &[f32], hidden: usize, gain: &[f32], moment: Option<&[f64]>, r: usize) -> Result<Vec<f32>> {
    let n = w.len() / hidden;
    let scaled: Vec<f64> = w
        .chunks_exact(hidden)
        .enumerate()
        .flat_map(|(i, row)| {
            let f = if gain.is_empty() { 1.0 } else { f64::from(gain[i % gain.len()]) };
            row.iter().map(move |&x| f64::from(x) * f)
        })
        .collect();
    let (u, _) = symmetric_eigen(&gram(&scaled, n, hidden, moment), n)?;
    Ok(u.chunks_exact(n).flat_map(|row| row[..r].iter().map(|&x| x as f32)).collect())
}

impl PaluPolicy {
    fn factors(&self, ctx: &CacheCtx) -> Result<Arc<Factors>> {
        let w = ctx.weights.as_ref().ok_or_else(|| Error::Missing {
            system: CARD.id.into(),
            what: "the key and value projection weights",
            remedy: "give the layer's KvWeights".into(),
        })?;
        let cal = ctx.calibration.as_ref().filter(|_| self.cfg.whiten);
        let same = |a: &Option<Weak<LayerCalibration>>| match (a, cal) {
            (Some(a), Some(b)) => std::ptr::eq(a.as_ptr(), Arc::as_ptr(b)),
            (None, None) => true,
            _ => false,
        };
        // The lock is not held while factors are made: layers are built side by side.
        let made = || self.made.lock().unwrap_or_else(PoisonError::into_inner);
        // A Weak keeps its address from being used again, so equal pointers are the same weights.
        let known = |m: &&Factorised| {
            m.0 == ctx.layer && m.1 == ctx.dtype && std::ptr::eq(m.2.as_ptr(), Arc::as_ptr(w)) && same(&m.3)
        };
        if let Some(f) = made().iter().find(known) {
            return Ok(f.4.clone());
        }
        let (d, hkv) = (ctx.head_dim, ctx.num_kv_heads);
        for (tensor, len, want) in [
            ("wk", w.wk.len(), hkv * d * w.hidden),
            ("wv", w.wv.len(), hkv * d * w.hidden),
            ("bk", w.bk.len(), if w.bk.is_empty() { 0 } else { hkv * d }),
            ("bv", w.bv.len(), if w.bv.is_empty() { 0 } else { hkv * d }),
            ("k_norm", w.k_norm.len(), if w.k_norm.is_empty() { 0 } else { d }),
        ] {
            if len != want || w.hidden == 0 {
                return Err(Error::Shape {
                    op: CARD.id,
                    tensor,
                    shape: vec![len],
                    expected: format!("{want} elements for {hkv} K/V heads of {d} and hidden width {}", w.hidden),
                });
            }
        }
        let moment = match cal {
            Some(c) if c.input_moment.len() == w.hidden * w.hidden => Some(c.input_moment.as_slice()),
            Some(c) if !c.input_moment.is_empty() => {
                return Err(Error::Shape {
                    op: CARD.id,
                    tensor: "calibration input_moment",
                    shape: vec![c.input_moment.len()],
                    expected: format!("{0}x{0}", w.hidden),
                });
            }
            _ => None,
        };
        if self.cfg.whiten && moment.is_none() && ctx.layer == 0 {
            tracing::warn!("palu: the calibration has no input moments; factors come from the weights alone");
        }
        let width = self.cfg.heads(hkv) * d;
        let [rk, rv] = self.cfg.ranks(width);
        let each = |w: &KvWeights, x: &[f32], gain: &[f32], r: usize| -> Result<Vec<Vec<f32>>> {
            x.par_chunks_exact(width * w.hidden).map(|x| basis(x, w.hidden, gain, moment, r)).collect()
        };
        // The bias of a normalised key is inside the norm: nothing linear to take off.
        let bk = if w.k_norm.is_empty() { w.bk.clone() } else { Vec::new() };
        let uk = each(w, &w.wk, &w.k_norm, rk)?;
        let format = Palu::format(ctx.dtype);
        let rebuild = uk.iter().map(|u| Ok(PackedLinear::pack(u, width, rk, format)?)).collect::<Result<_>>()?;
        let f = Arc::new(Factors { uk, rebuild, uv: each(w, &w.wv, &[], rv)?, bk, bv: w.bv.clone() });
        let mut made = made();
        made.retain(|m| m.2.strong_count() > 0);
        made.push((ctx.layer, ctx.dtype, Arc::downgrade(w), cal.map(Arc::downgrade), f.clone()));
        Ok(f)
    }

    fn angles(&self, rope: &Arc<Rope>) -> Arc<Angles> {
        let mut a = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        match &*a {
            Some(x) if *x.rope == **rope => x.clone(),
            _ => {
                let x = Arc::new(Angles { rope: rope.clone(), tables: Mutex::default() });
                *a = Some(x.clone());
                x
            }
        }
    }
}

impl CachePolicy for PaluPolicy {
    fn needs(&self) -> Needs {
        Needs { weights: true, calibration: self.cfg.whiten, input_moment: self.cfg.whiten, pre_rotation: true }
    }

    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>> {
        batch::check_ctx(CARD.id, ctx)?;
        let factors = self.factors(ctx)?;
        let heads = self.cfg.heads(ctx.num_kv_heads);
        let ranks = self.cfg.ranks(heads * ctx.head_dim);
        let stores = |n: usize, width: usize| -> Vec<_> { (0..n).map(|_| RowStore::new(ctx.dtype, width)).collect() };
        let groups = ctx.num_kv_heads / heads;
        Ok(Box::new(Layer {
            ctx: ctx.clone(),
            heads,
            ranks,
            sinks: self.cfg.sinks,
            factors,
            angles: self.angles(&ctx.rope),
            k: stores(groups, ranks[0]),
            v: stores(groups, ranks[1]),
            first_k: stores(ctx.num_kv_heads, ctx.head_dim),
            first_v: stores(ctx.num_kv_heads, ctx.head_dim),
        }))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        let heads = self.cfg.heads(ctx.num_kv_heads);
        let width = heads * ctx.head_dim;
        let [rk, rv] = self.cfg.ranks(width);
        let biases =
            ctx.weights.as_ref().map_or(0, |w| 4 * (w.bv.len() + if w.k_norm.is_empty() { w.bk.len() } else { 0 }));
        let first = self.cfg.sinks.min(tokens);
        // The packed factor: panels of 32 rows, blocks of 32 columns, and a row of zero biases.
        let element = if Palu::format(ctx.dtype) == WeightFormat::F32 { 4 } else { 2 };
        let packed = width.next_multiple_of(32) * (rk.next_multiple_of(32) * element + 4);
        let latents = ctx.dtype.bytes(tokens - first, rk) + ctx.dtype.bytes(tokens - first, rv);
        ctx.num_kv_heads / heads * (latents + 4 * width * (rk + rv) + packed)
            + 2 * ctx.num_kv_heads * ctx.dtype.bytes(first, ctx.head_dim)
            + biases
    }
}

#[derive(Clone)]
struct Layer {
    ctx: CacheCtx,
    /// K/V heads a group.
    heads: usize,
    /// Widths of a key and a value latent.
    ranks: [usize; 2],
    /// First tokens kept at full width.
    sinks: usize,
    factors: Arc<Factors>,
    angles: Arc<Angles>,
    /// Key latents per group.
    k: Vec<RowStore>,
    /// Value latents per group.
    v: Vec<RowStore>,
    /// Rotated keys of the first tokens per K/V head.
    first_k: Vec<RowStore>,
    /// Values of the first tokens per K/V head.
    first_v: Vec<RowStore>,
}

/// Tokens rebuilt at a time for one row, and for many.
const TILE_ROW: usize = 512;
const TILE_ROWS: usize = 1024;

/// Output rows of one K/V head, their log-sum-exp, and the work.
struct Part {
    head: usize,
    out: Vec<f32>,
    lse: Vec<f32>,
    work: Work,
}

impl Layer {
    /// First tokens held at full width.
    fn first(&self) -> usize {
        self.first_k[0].len()
    }

    /// Latents (rows, r) of one group from rows `rows` of (H_kv, n, D).
    fn project(&self, x: &[f32], bias: &[f32], u: &[f32], group: usize, n: usize, rows: Range<usize>) -> Vec<f32> {
        let (d, first) = (self.ctx.head_dim, group * self.heads);
        let width = self.heads * d;
        let m = rows.len();
        let mut wide = vec![0f32; m * width];
        for a in 0..self.heads {
            let h = first + a;
            for (i, at) in rows.clone().enumerate() {
                let to = &mut wide[i * width + a * d..][..d];
                to.copy_from_slice(&x[(h * n + at) * d..][..d]);
                if !bias.is_empty() {
                    to.iter_mut().zip(&bias[h * d..]).for_each(|(t, b)| *t -= b);
                }
            }
        }
        let r = u.len() / width;
        let mut h = vec![0f32; m * r];
        gemm::ab(m, r, width, &wide, u, &mut h);
        h
    }

    fn push(&mut self, k_pre: &[f32], k: &[f32], v: &[f32], n: usize) {
        let f = self.factors.clone();
        let d = self.ctx.head_dim;
        let first = self.sinks.saturating_sub(self.len()).min(n);
        for h in 0..if first > 0 { self.ctx.num_kv_heads } else { 0 } {
            let span = h * n * d..(h * n + first) * d;
            self.first_k[h].push(&k[span.clone()]);
            self.first_v[h].push(&v[span]);
        }
        for g in 0..if first < n { self.k.len() } else { 0 } {
            let h = self.project(k_pre, &f.bk, &f.uk[g], g, n, first..n);
            self.k[g].push(&h);
            let h = self.project(v, &f.bv, &f.uv[g], g, n, first..n);
            self.v[g].push(&h);
        }
    }

    /// Rotated keys (tokens, heads·D) of a group for a span of tokens; the FLOPs spent.
    fn rebuild(&self, group: usize, span: Range<usize>, tables: &Tables) -> Result<(Vec<f32>, u64)> {
        let (d, n, first) = (self.ctx.head_dim, span.len(), self.first());
        let mut latent = Vec::with_capacity(n * self.ranks[0]);
        self.k[group].extend_f32(span.start - first, n, &mut latent);
        let width = self.heads * d;
        let mut k = vec![0f32; n * width];
        let isa = Isa::active();
        let flops = self.factors.rebuild[group].forward(&latent, n, &mut k, isa)?.flops;
        if let Some(bias) = self.factors.bk.get(group * width..(group + 1) * width) {
            k.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
        }
        let half = self.ctx.rope.inv_freq.len();
        if half > 0 {
            let at = span.start * half..span.end * half;
            let positions: Vec<u32> = (0..n as u32).collect();
            elementwise::rope(
                &mut k,
                Heads::in_rows(n, width, 0, self.heads, d),
                &tables.cos[at.clone()],
                &tables.sin[at],
                2 * half,
                &positions,
                RopeLayout::Halves,
                isa,
            )?;
        }
        Ok((k, flops))
    }

    /// Attended latents (rows, r_V) of K/V head `h` to outputs (rows, D).
    fn expand(&self, h: usize, latent: &[f32]) -> (Vec<f32>, u64) {
        let (d, r) = (self.ctx.head_dim, self.ranks[1]);
        let rows = latent.len() / r;
        let u = &self.factors.uv[h / self.heads][h % self.heads * d * r..][..d * r];
        let mut o = vec![0f32; rows * d];
        let flops = gemm::abt(rows, d, r, 1.0, latent, r, u, r, &mut o);
        if let Some(b) = self.factors.bv.get(h * d..(h + 1) * d) {
            o.chunks_exact_mut(d).for_each(|row| row.iter_mut().zip(b).for_each(|(x, b)| *x += b));
        }
        (o, flops)
    }

    /// Merge the partial results of each K/V head's tiles, expand, join what `firsts` give at full
    /// width, and write rows `rows`.
    fn finish(&self, parts: &[Part], firsts: &[Part], out: &mut [f32], n: usize, rows: Range<usize>) -> Work {
        let (hkv, r, d) = (self.ctx.num_kv_heads, self.ranks[1], self.ctx.head_dim);
        let group = self.ctx.num_heads / hkv;
        let merge = |o: &mut [f32], lse: &mut [f32], width: usize, parts: &[Part], h: usize| {
            let mut work = Work::default();
            for p in parts.iter().filter(|p| p.head == h) {
                for (i, row) in o.chunks_exact_mut(width).enumerate() {
                    merge_row(row, &mut lse[i], &p.out[i * width..(i + 1) * width], p.lse[i]);
                }
                work += p.work;
            }
            work
        };
        let done: Vec<(Vec<f32>, Work)> = (0..hkv)
            .into_par_iter()
            .map(|h| {
                let mut latent = vec![0f32; group * rows.len() * r];
                let mut lse = vec![f32::NEG_INFINITY; group * rows.len()];
                let mut work = merge(&mut latent, &mut lse, r, parts, h);
                let (mut o, flops) = self.expand(h, &latent);
                work.flops += flops;
                work += merge(&mut o, &mut lse, d, firsts, h);
                (o, work)
            })
            .collect();
        let mut work = Work::default();
        for (h, (o, w)) in done.iter().enumerate() {
            batch::unstack_rows(o, out, h, group, n, d, rows.clone());
            work += *w;
        }
        work
    }

    /// Rows `rows` over the first tokens from `lo` on, which all of them see.
    fn attend_first(&self, s: &Step, rows: Range<usize>, lo: usize, hi: usize) -> Result<Vec<Part>> {
        if lo >= hi {
            return Ok(Vec::new());
        }
        let (d, hkv) = (self.ctx.head_dim, self.ctx.num_kv_heads);
        let group = self.ctx.num_heads / hkv;
        (0..hkv)
            .map(|h| {
                let q = batch::stack_rows(s.q, h, group, s.n, d, rows.clone());
                let m = q.len() / d;
                let (mut k, mut v) = (Vec::new(), Vec::new());
                self.first_k[h].extend_f32(lo, hi - lo, &mut k);
                self.first_v[h].extend_f32(lo, hi - lo, &mut v);
                let (mut out, mut lse) = (vec![0f32; m * d], vec![f32::NEG_INFINITY; m]);
                let work = Attend::new(self.ctx.scale).run(
                    &View::contiguous("q", &q, [1, 1, m, d])?,
                    &View::contiguous("k", &k, [1, 1, hi - lo, d])?,
                    &View::contiguous("v", &v, [1, 1, hi - lo, d])?,
                    &mut ViewMut::contiguous("out", &mut out, [1, 1, m, d])?,
                    Some(&mut lse),
                )?;
                Ok(Part { head: h, out, lse, work })
            })
            .collect()
    }

    /// One row over the tokens up to its own, tile by tile.
    fn row(&self, s: &Step, i: usize, out: &mut [f32]) -> Result<Work> {
        let (d, n, r, hkv) = (self.ctx.head_dim, s.n, self.ranks[1], self.ctx.num_kv_heads);
        let group = self.ctx.num_heads / hkv;
        let visible = s.pos + i + 1;
        let tables = self.angles.upto(visible);
        let (lo, first) = (batch::window_from(&self.ctx, visible), self.first());
        let firsts = self.attend_first(s, i..i + 1, lo, first.min(visible))?;
        let tasks: Vec<(usize, usize)> =
            (lo.max(first)..visible).step_by(TILE_ROW).flat_map(|t| (0..self.k.len()).map(move |g| (g, t))).collect();
        let parts: Vec<Vec<Part>> = tasks
            .into_par_iter()
            .with_max_len(1)
            .map(|(g, t)| -> Result<_> {
                let span = t..(t + TILE_ROW).min(visible);
                let (k, mut flops) = self.rebuild(g, span.clone(), &tables)?;
                let width = self.heads * d;
                (0..self.heads)
                    .map(|a| {
                        let head = g * self.heads + a;
                        let q = batch::stack_rows(s.q, head, group, n, d, i..i + 1);
                        let segment = Segment {
                            k: Codec::F32 { data: &k[a * d..], stride: width },
                            v: self.v[g].codec_from(t - first),
                            len: span.len(),
                            channels: None,
                        };
                        let (mut out, mut lse) = (vec![0f32; group * r], vec![0f32; group]);
                        let decode = Decode::new(self.ctx.scale);
                        let mut work = decode.run(&q, [group, 1, d], &[vec![segment]], r, None, &mut out, &mut lse)?;
                        work.flops += std::mem::take(&mut flops);
                        Ok(Part { head, out, lse, work })
                    })
                    .collect()
            })
            .collect::<Result<_>>()?;
        let parts: Vec<Part> = parts.into_iter().flatten().collect();
        Ok(self.finish(&parts, &firsts, out, n, i..i + 1))
    }

    /// All rows of a step: each tile of keys is rebuilt once for all of them.
    fn rows(&self, s: &Step, out: &mut [f32]) -> Result<Work> {
        let (d, n, r, hkv) = (self.ctx.head_dim, s.n, self.ranks[1], self.ctx.num_kv_heads);
        let group = self.ctx.num_heads / hkv;
        let (total, first) = (s.pos + n, self.first());
        let tables = self.angles.upto(total);
        let low = batch::on_tiles(&self.ctx);
        // Whole tiles before the step, then one causal tile that ends with it.
        let whole = (s.pos - first) / TILE_ROWS;
        let tasks: Vec<(usize, usize)> =
            (0..=whole).rev().flat_map(|t| (0..self.k.len()).map(move |g| (g, t))).collect();
        let parts: Vec<Vec<Part>> = tasks
            .into_par_iter()
            .with_max_len(1)
            .map(|(g, t)| -> Result<_> {
                let causal = t == whole;
                let span = first + t * TILE_ROWS..if causal { total } else { first + (t + 1) * TILE_ROWS };
                let keys = span.len();
                let (rebuilt, mut flops) = self.rebuild(g, span.clone(), &tables)?;
                let mut v = Vec::with_capacity(keys * r);
                self.v[g].extend_f32(span.start - first, keys, &mut v);
                let low_v = if low { batch::to_bf16(&v) } else { Vec::new() };
                (0..self.heads)
                    .map(|a| {
                        let head = g * self.heads + a;
                        let q = batch::stack_rows(s.q, head, group, n, d, 0..n);
                        let mut k = Vec::with_capacity(keys * d);
                        rebuilt.chunks_exact(self.heads * d).for_each(|row| k.extend_from_slice(&row[a * d..][..d]));
                        let (mut out, mut lse) = (vec![0f32; group * n * r], vec![f32::NEG_INFINITY; group * n]);
                        // Without a mask the group's heads are just more rows.
                        let (heads, rows) = if causal { (group, n) } else { (1, group * n) };
                        let (scale, shape) = (self.ctx.scale, [heads, rows, d, r]);
                        let mut work = if low {
                            let (q, k) = (batch::to_bf16(&q), batch::to_bf16(&k));
                            batch::Rows { scale, causal, window: None, shape, k: &k, v: &low_v }
                                .attend(&q, None, &mut out, &mut lse)?
                        } else {
                            batch::Rows { scale, causal, window: None, shape, k: &k, v: &v }
                                .attend(&q, None, &mut out, &mut lse)?
                        };
                        work.flops += std::mem::take(&mut flops);
                        Ok(Part { head, out, lse, work })
                    })
                    .collect()
            })
            .collect::<Result<_>>()?;
        let parts: Vec<Part> = parts.into_iter().flatten().collect();
        let firsts = self.attend_first(s, 0..n, 0, first)?;
        let mut work = self.finish(&parts, &firsts, out, n, 0..n);
        work.bytes += self.k.iter().chain(&self.v).map(|s| s.bytes() as u64).sum::<u64>();
        Ok(work)
    }
}

impl LayerCache for Layer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        batch::check_prompt(CARD.id, &self.ctx, p, true)?;
        self.push(p.k_pre, p.k, p.v, p.len);
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        batch::check_step(CARD.id, &self.ctx, s, out, self.len(), true)?;
        self.push(s.k_pre, s.k, s.v, s.n);
        if s.n >= BATCH_FROM && s.pos >= self.sinks && self.ctx.window.is_none_or(|w| w >= s.pos + s.n) {
            return self.rows(s, out);
        }
        let mut work = Work::default();
        for i in 0..s.n {
            work += self.row(s, i, out)?;
        }
        Ok(work)
    }

    fn len(&self) -> usize {
        self.first() + self.k[0].len()
    }

    fn resident(&self) -> Resident {
        let f = &self.factors;
        Resident {
            keys: self.k.iter().chain(&self.first_k).map(RowStore::bytes).sum(),
            values: self.v.iter().chain(&self.first_v).map(RowStore::bytes).sum(),
            aux: f.rebuild.iter().map(PackedLinear::bytes).sum::<usize>()
                + f.uk.iter().chain(&f.uv).chain([&f.bk, &f.bv]).map(|u| size_of_val(u.as_slice())).sum::<usize>(),
        }
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }
}
