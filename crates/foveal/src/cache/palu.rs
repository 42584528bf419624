//! Palu: keys and values as low-rank latents of their projection weights, rebuilt on read
//! (Chang et al. 2024, arXiv 2407.21118).
//!
//! The K/V heads are cut into groups of `group`. For a group with stacked weights
//! W (g·D × hidden) and U its first r = rank_ratio·g·D left singular vectors, the rank-r product
//! is U·(Uᵀ W), so with k = W x + b before rotation:
//!
//! h = Uᵀ(k − b)  is stored (r wide instead of g·D);   k ≈ U h + b, then rotated at its position;
//! v ≈ U_V h_V + b_V.
//!
//! With `whiten`, U holds the left singular vectors of W·M^½, M = Σ x xᵀ over a calibration
//! text: the rank that is best for the layer's real inputs (the paper's data-aware SVD).
//!
//! On read, keys are rebuilt, rotated, attended to and forgotten tile by tile. Values are never
//! rebuilt: o = (p·H_V)·U_Vᵀ + b_V is exact, so attention gathers latents and expands once.
//!
//! Cost of a decoded token: T·r·D multiply-adds a K/V head to rebuild keys, T·(D + r) a query
//! head to attend; memory 2·T·r a group instead of 2·T·g·D, plus U_K, U_V.
//!
//! Where we had to choose: see [`CARD`].

use super::batch::{self, BATCH_FROM};
use super::{CacheCtx, CachePolicy, KvWeights, LayerCache, LayerCalibration, Needs, Prompt, Resident, Step};
use crate::error::{Error, Result};
use crate::prim::factor::{gram, symmetric_eigen};
use crate::prim::gemm;
use crate::prim::kv::RowStore;
use crate::prim::rope::Rope;
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::decode::{Codec, Decode, Segment};
use foveal_kernels::{Attend, View, ViewMut, Work, merge_row};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Palu {
    /// Stored width as a share of the original.
    pub rank_ratio: f32,
    /// K/V heads that share one factorisation.
    pub group: usize,
    /// Weigh the factorisation by the layer's inputs on the calibration text.
    pub whiten: bool,
}

impl Default for Palu {
    fn default() -> Self {
        Self { rank_ratio: 0.5, group: 4, whiten: true }
    }
}

impl Config for Palu {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("rank_ratio", "stored width as a share of the original, above 0 up to 1 (exact)"),
        ("group", "K/V heads that share one factorisation; lowered to the largest divisor of the model's K/V heads"),
        ("whiten", "weigh the factorisation by the calibration text's inputs, where the calibration has them"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(self.rank_ratio > 0.0 && self.rank_ratio <= 1.0) {
            return Err(format!("rank_ratio = {}: use a share above 0, up to 1 (exact)", self.rank_ratio));
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
    equation: "W_group·M^½ = U Σ Vᵀ (M = Σ x xᵀ, or 1);  U = first r = rank_ratio·g·D columns\n\
               h_K = U_Kᵀ(k − b_K),  h_V = U_Vᵀ(v − b_V)  are stored\n\
               k ≈ rope(U_K h_K + b_K);  o = (p·H_V)·U_Vᵀ + b_V",
    cost: "T·r·D multiply-adds a K/V head to rebuild keys and T·(D + r) a query head to attend; 2·T·r stored elements \
           a group of g heads instead of 2·T·g·D, plus U_K and U_V",
    choices: &[
        "One rank for keys, values and all layers; the paper also searches ranks per layer by Fisher information \
         (values get more than keys).",
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

    /// Width of a latent of `width` elements.
    fn rank(&self, width: usize) -> usize {
        ((self.rank_ratio * width as f32).round() as usize).clamp(1, width)
    }
}

/// Orthonormal factors of one layer, one entry a group of heads.
struct Factors {
    /// U_K, (g·D, r) row-major.
    uk: Vec<Vec<f32>>,
    /// U_V, (g·D, r) row-major.
    uv: Vec<Vec<f32>>,
    /// Key bias, (H_kv·D) or empty.
    bk: Vec<f32>,
    /// Value bias, (H_kv·D) or empty.
    bv: Vec<f32>,
}

/// Factors already made: layer, weights and calibration they belong to.
type Made = Vec<(usize, Weak<KvWeights>, Option<Weak<LayerCalibration>>, Arc<Factors>)>;

/// The policy, with what its layers share.
struct PaluPolicy {
    cfg: Palu,
    made: Mutex<Made>,
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
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        // A Weak keeps its address from being used again, so equal pointers are the same weights.
        if let Some(f) =
            made.iter().find(|m| m.0 == ctx.layer && std::ptr::eq(m.1.as_ptr(), Arc::as_ptr(w)) && same(&m.2))
        {
            return Ok(f.3.clone());
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
        let r = self.cfg.rank(width);
        let each = |w: &KvWeights, x: &[f32], gain: &[f32]| -> Result<Vec<Vec<f32>>> {
            x.chunks_exact(width * w.hidden).map(|x| basis(x, w.hidden, gain, moment, r)).collect()
        };
        // The bias of a normalised key is inside the norm: nothing linear to take off.
        let bk = if w.k_norm.is_empty() { w.bk.clone() } else { Vec::new() };
        let f = Arc::new(Factors { uk: each(w, &w.wk, &w.k_norm)?, uv: each(w, &w.wv, &[])?, bk, bv: w.bv.clone() });
        made.retain(|m| m.1.strong_count() > 0);
        made.push((ctx.layer, Arc::downgrade(w), cal.map(Arc::downgrade), f.clone()));
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
        let rank = self.cfg.rank(heads * ctx.head_dim);
        let stores = || (0..ctx.num_kv_heads / heads).map(|_| RowStore::new(ctx.dtype, rank)).collect();
        Ok(Box::new(Layer {
            ctx: ctx.clone(),
            heads,
            rank,
            factors,
            angles: self.angles(&ctx.rope),
            k: stores(),
            v: stores(),
        }))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        let heads = self.cfg.heads(ctx.num_kv_heads);
        let width = heads * ctx.head_dim;
        let rank = self.cfg.rank(width);
        let biases =
            ctx.weights.as_ref().map_or(0, |w| 4 * (w.bv.len() + if w.k_norm.is_empty() { w.bk.len() } else { 0 }));
        ctx.num_kv_heads / heads * 2 * (ctx.dtype.bytes(tokens, rank) + 4 * width * rank) + biases
    }
}

#[derive(Clone)]
struct Layer {
    ctx: CacheCtx,
    /// K/V heads a group.
    heads: usize,
    /// Width of a latent.
    rank: usize,
    factors: Arc<Factors>,
    angles: Arc<Angles>,
    /// Key latents per group.
    k: Vec<RowStore>,
    /// Value latents per group.
    v: Vec<RowStore>,
}

/// Tokens rebuilt at a time for one row, and for many.
const TILE_ROW: usize = 512;
const TILE_ROWS: usize = 1024;

impl Layer {
    /// Latents (n, r) of one group from (H_kv, n, D) rows.
    fn project(&self, x: &[f32], bias: &[f32], u: &[f32], group: usize, n: usize) -> Vec<f32> {
        let (d, first) = (self.ctx.head_dim, group * self.heads);
        let width = self.heads * d;
        let mut rows = vec![0f32; n * width];
        for a in 0..self.heads {
            let h = first + a;
            for i in 0..n {
                let to = &mut rows[i * width + a * d..][..d];
                to.copy_from_slice(&x[(h * n + i) * d..][..d]);
                if !bias.is_empty() {
                    to.iter_mut().zip(&bias[h * d..]).for_each(|(t, b)| *t -= b);
                }
            }
        }
        let mut h = vec![0f32; n * self.rank];
        gemm::ab(n, self.rank, width, &rows, u, &mut h);
        h
    }

    fn push(&mut self, k_pre: &[f32], v: &[f32], n: usize) {
        let f = self.factors.clone();
        for g in 0..self.k.len() {
            let h = self.project(k_pre, &f.bk, &f.uk[g], g, n);
            self.k[g].push(&h);
            let h = self.project(v, &f.bv, &f.uv[g], g, n);
            self.v[g].push(&h);
        }
    }

    /// Rotated keys (tokens, D) of K/V head `h` for a span of tokens; the FLOPs spent.
    fn rebuild(&self, h: usize, span: std::ops::Range<usize>, tables: &Tables) -> (Vec<f32>, u64) {
        let (d, r, n) = (self.ctx.head_dim, self.rank, span.len());
        let mut latent = Vec::with_capacity(n * r);
        self.k[h / self.heads].extend_f32(span.start, n, &mut latent);
        let u = &self.factors.uk[h / self.heads][h % self.heads * d * r..][..d * r];
        let mut k = vec![0f32; n * d];
        let flops = gemm::abt(n, d, r, 1.0, &latent, r, u, r, &mut k);
        let half = self.ctx.rope.inv_freq.len();
        let bias = self.factors.bk.get(h * d..(h + 1) * d).unwrap_or(&[]);
        for (row, t) in k.chunks_exact_mut(d).zip(span) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            let at = t * half..(t + 1) * half;
            Rope::rotate_row(row, &tables.cos[at.clone()], &tables.sin[at]);
        }
        (k, flops)
    }

    /// Attended latents (rows, r) of K/V head `h` to outputs (rows, D).
    fn expand(&self, h: usize, latent: &[f32]) -> (Vec<f32>, u64) {
        let (d, r) = (self.ctx.head_dim, self.rank);
        let rows = latent.len() / r;
        let u = &self.factors.uv[h / self.heads][h % self.heads * d * r..][..d * r];
        let mut o = vec![0f32; rows * d];
        let flops = gemm::abt(rows, d, r, 1.0, latent, r, u, r, &mut o);
        if let Some(b) = self.factors.bv.get(h * d..(h + 1) * d) {
            o.chunks_exact_mut(d).for_each(|row| row.iter_mut().zip(b).for_each(|(x, b)| *x += b));
        }
        (o, flops)
    }

    /// Merge the partial results of each K/V head's tiles, expand and write rows `rows`.
    fn finish(
        &self,
        parts: Vec<(usize, Vec<f32>, Vec<f32>, Work)>,
        out: &mut [f32],
        n: usize,
        rows: std::ops::Range<usize>,
    ) -> Work {
        let (hkv, r, d) = (self.ctx.num_kv_heads, self.rank, self.ctx.head_dim);
        let group = self.ctx.num_heads / hkv;
        let done: Vec<(Vec<f32>, Work)> = (0..hkv)
            .into_par_iter()
            .map(|h| {
                let mut work = Work::default();
                let mut o = vec![0f32; group * rows.len() * r];
                let mut lse = vec![f32::NEG_INFINITY; group * rows.len()];
                for (_, po, pl, w) in parts.iter().filter(|p| p.0 == h) {
                    for (i, row) in o.chunks_exact_mut(r).enumerate() {
                        merge_row(row, &mut lse[i], &po[i * r..(i + 1) * r], pl[i]);
                    }
                    work += *w;
                }
                let (o, flops) = self.expand(h, &o);
                work.flops += flops;
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

    /// One row over the tokens up to its own, tile by tile.
    fn row(&self, s: &Step, i: usize, out: &mut [f32]) -> Result<Work> {
        let (d, n, r, hkv) = (self.ctx.head_dim, s.n, self.rank, self.ctx.num_kv_heads);
        let group = self.ctx.num_heads / hkv;
        let visible = s.pos + i + 1;
        let tables = self.angles.upto(visible);
        let lo = batch::window_from(&self.ctx, visible);
        let tasks: Vec<(usize, usize)> =
            (lo..visible).step_by(TILE_ROW).flat_map(|t| (0..hkv).map(move |h| (h, t))).collect();
        let parts = tasks
            .into_par_iter()
            .map(|(h, t)| -> Result<_> {
                let span = t..(t + TILE_ROW).min(visible);
                let (k, flops) = self.rebuild(h, span.clone(), &tables);
                let q = batch::stack_rows(s.q, h, group, n, d, i..i + 1);
                let latents = &self.v[h / self.heads];
                let segment = Segment {
                    k: Codec::F32 { data: &k, stride: d },
                    v: latents.codec_from(t),
                    len: span.len(),
                    channels: None,
                };
                let (mut o, mut lse) = (vec![0f32; group * r], vec![0f32; group]);
                let mut work =
                    Decode::new(self.ctx.scale).run(&q, [group, 1, d], &[vec![segment]], r, None, &mut o, &mut lse)?;
                work.flops += flops;
                Ok((h, o, lse, work))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(self.finish(parts, out, n, i..i + 1))
    }

    /// All rows of a step: each tile of keys is rebuilt once for all of them.
    fn rows(&self, s: &Step, out: &mut [f32]) -> Result<Work> {
        let (d, n, r, hkv) = (self.ctx.head_dim, s.n, self.rank, self.ctx.num_kv_heads);
        let group = self.ctx.num_heads / hkv;
        let total = s.pos + n;
        let tables = self.angles.upto(total);
        // Whole tiles before the step, then one causal tile that ends with it.
        let whole = s.pos / TILE_ROWS;
        let tasks: Vec<(usize, usize)> = (0..=whole).rev().flat_map(|t| (0..hkv).map(move |h| (h, t))).collect();
        let parts = tasks
            .into_par_iter()
            .map(|(h, t)| -> Result<_> {
                let causal = t == whole;
                let span = t * TILE_ROWS..if causal { total } else { (t + 1) * TILE_ROWS };
                let keys = span.len();
                let (k, flops) = self.rebuild(h, span.clone(), &tables);
                let q = batch::stack_rows(s.q, h, group, n, d, 0..n);
                let mut v = Vec::with_capacity(keys * r);
                self.v[h / self.heads].extend_f32(span.start, keys, &mut v);
                let (mut o, mut lse) = (vec![0f32; group * n * r], vec![f32::NEG_INFINITY; group * n]);
                // Without a mask the group's heads are just more rows.
                let (heads, rows) = if causal { (group, n) } else { (1, group * n) };
                let mut work = Attend::new(self.ctx.scale).causal(causal).run(
                    &View::contiguous("q", &q, [1, heads, rows, d])?,
                    &View::contiguous("k", &k, [1, 1, keys, d])?,
                    &View::contiguous("v", &v, [1, 1, keys, r])?,
                    &mut ViewMut::contiguous("out", &mut o, [1, heads, rows, r])?,
                    Some(&mut lse),
                )?;
                work.flops += flops;
                Ok((h, o, lse, work))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut work = self.finish(parts, out, n, 0..n);
        work.bytes += self.k.iter().chain(&self.v).map(|s| s.bytes() as u64).sum::<u64>();
        Ok(work)
    }
}

impl LayerCache for Layer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        batch::check_prompt(CARD.id, &self.ctx, p, true)?;
        self.push(p.k_pre, p.v, p.len);
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        batch::check_step(CARD.id, &self.ctx, s, out, self.len(), true)?;
        self.push(s.k_pre, s.v, s.n);
        if s.n >= BATCH_FROM && self.ctx.window.is_none_or(|w| w >= s.pos + s.n) {
            return self.rows(s, out);
        }
        let mut work = Work::default();
        for i in 0..s.n {
            work += self.row(s, i, out)?;
        }
        Ok(work)
    }

    fn len(&self) -> usize {
        self.k[0].len()
    }

    fn resident(&self) -> Resident {
        let f = &self.factors;
        Resident {
            keys: self.k.iter().map(RowStore::bytes).sum(),
            values: self.v.iter().map(RowStore::bytes).sum(),
            aux: f.uk.iter().chain(&f.uv).chain([&f.bk, &f.bv]).map(|u| size_of_val(u.as_slice())).sum(),
        }
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }
}
