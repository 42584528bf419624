//! Loki: top-k attention with scores in a low-dimensional key space (Singhania et al. 2024,
//! arXiv 2406.02542).
//!
//! Offline, per layer and K/V head, P holds the principal directions of calibration keys
//! (eigenvectors of Σ k kᵀ after rotation, by falling eigenvalue). The store keeps K P; since P
//! is orthogonal, (q P)·(k P) = q·k. For each query:
//!
//! ŝ_j = Σ_{c < d'} (qP)_c (kP)_jc,  d' = rank·D;  I = the ⌊topk·T⌋ largest ŝ;
//! o = softmax(scale·(qP)(K P)_Iᵀ)·V_I, exact with all D components.
//!
//! Cost of a decoded token, a query head: T·d' + topk·T·2D multiply-adds and the bytes of
//! d' of D key columns plus the selected rows; memory as dense, plus P (D×D) a K/V head.
//!
//! Where we had to choose: see [`CARD`].

use super::batch::{self, BATCH_FROM, ScoreTile};
use super::{CacheCtx, CachePolicy, LayerCache, Needs, Prompt, Resident, Step};
use crate::error::{Error, Result};
use crate::prim::factor::symmetric_eigen;
use crate::prim::gemm;
use crate::prim::kv::RowStore;
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::decode::{Decode, Segment, key_scores};
use foveal_kernels::rank::{WIDTH, top_marks};
use foveal_kernels::{HeadKeys, Isa, KeyLists, Work};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loki {
    /// Share of principal components used for scoring.
    pub rank: f32,
    /// Share of tokens attended to.
    pub topk: f32,
}

impl Default for Loki {
    fn default() -> Self {
        Self { rank: 0.25, topk: 0.25 }
    }
}

impl Config for Loki {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("rank", "share of the D principal components that score tokens, above 0 up to 1"),
        ("topk", "share of the visible tokens that each query head attends to, above 0 up to 1 (exact)"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        for (name, x) in [("rank", self.rank), ("topk", self.topk)] {
            if !(x > 0.0 && x <= 1.0) {
                return Err(format!("{name} = {x}: use a share above 0, up to 1"));
            }
        }
        Ok(())
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "loki",
    title: "Loki: Low-Rank Keys for Efficient Sparse Attention",
    authors: "Singhania et al., 2024",
    arxiv: "2406.02542",
    family: Family::Cache,
    slots: &[Slot::Cache],
    laws: &[
        Law::Causal,
        Law::StepsAgree,
        Law::BytesAsDeclared,
        Law::ExactAt(&[("topk", "1")]),
        Law::Monotone { param: "topk", values: &["0.125", "0.25", "0.5"] },
    ],
    equation: "P = eigenvectors of Σ k kᵀ (calibration, after rotation), falling eigenvalues\n\
               ŝ = (qP)[:d']·(KP)[:,:d']ᵀ;  I = top ⌊topk·T⌋ of ŝ\n\
               o = softmax(scale·(qP)(KP)_Iᵀ)·V_I",
    cost: "T·d' + topk·T·2D multiply-adds a query head and token; bytes as dense plus D² a K/V head",
    choices: &[
        "Keys after rotation are analysed (the authors' default setting \"postrotary\"; they find either usable).",
        "Directions come from the uncentred second moment: scores are inner products, so a mean that is \
         subtracted would have to be added back; the authors' code stores means but does not use them.",
        "Each query head of a group chooses its own tokens, as the authors do after repeating K/V heads.",
        "Three or more tokens in one step, on a machine with AMX and a store of bf16 or int8: tokens are chosen by scores of queries \
         split in two bf16 parts (error 2⁻¹⁶) and attended to with bf16 queries and weights, as in a prompt. One or two tokens, and \
         f32 stores, keep f32 queries.",
        "The number of tokens is ⌊topk·T⌋ of what the query sees, at least 1; no recent window is forced.",
    ],
    params: params_of::<Loki>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Cache(Box::new(configure::<Loki>(CARD.id, params)?)))
}

impl Loki {
    /// Components used for scoring.
    fn width(&self, d: usize) -> usize {
        ((self.rank * d as f32).round() as usize).clamp(1, d)
    }

    /// Tokens attended of `visible`.
    fn count(&self, visible: usize) -> usize {
        ((f64::from(self.topk) * visible as f64 + 1e-6).floor() as usize).clamp(1, visible.max(1))
    }
}

impl CachePolicy for Loki {
    fn needs(&self) -> Needs {
        Needs { calibration: true, ..Needs::default() }
    }

    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>> {
        batch::check_ctx(CARD.id, ctx)?;
        let d = ctx.head_dim;
        let cal = ctx.calibration.as_ref().ok_or_else(|| Error::Missing {
            system: CARD.id.into(),
            what: "calibration statistics",
            remedy: "run the model over a calibration text first".into(),
        })?;
        if cal.key_moment.len() != ctx.num_kv_heads || cal.key_moment.iter().any(|m| m.len() != d * d) {
            return Err(Error::Shape {
                op: CARD.id,
                tensor: "calibration key_moment",
                shape: vec![cal.key_moment.len(), cal.key_moment.first().map_or(0, Vec::len)],
                expected: format!("{} K/V heads of {d}x{d}", ctx.num_kv_heads),
            });
        }
        let heads = cal
            .key_moment
            .iter()
            .map(|m| {
                let (p, _) = symmetric_eigen(m, d)?;
                Ok(Head {
                    basis: Arc::new(p.iter().map(|&x| x as f32).collect()),
                    k: RowStore::new(ctx.dtype, d),
                    v: RowStore::new(ctx.dtype, d),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Box::new(Layer { ctx: ctx.clone(), cfg: *self, heads, visited: None }))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        ctx.num_kv_heads * (2 * ctx.dtype.bytes(tokens, ctx.head_dim) + 4 * ctx.head_dim * ctx.head_dim)
    }
}

/// One K/V head.
#[derive(Clone)]
struct Head {
    /// P, (D, D) row-major, columns by falling eigenvalue.
    basis: Arc<Vec<f32>>,
    /// K P.
    k: RowStore,
    /// Values.
    v: RowStore,
}

#[derive(Clone)]
struct Layer {
    ctx: CacheCtx,
    cfg: Loki,
    heads: Vec<Head>,
    visited: Option<Vec<Vec<u32>>>,
}

/// What one tile of rows gives.
struct Part {
    g: usize,
    rows: Range<usize>,
    out: Vec<f32>,
    /// Lists of the step's last row, one per query head of the group, if it is in this tile.
    lists: Vec<Vec<u32>>,
    work: Work,
}

impl Layer {
    fn push(&mut self, k: &[f32], v: &[f32], n: usize) {
        let d = self.ctx.head_dim;
        for (g, h) in self.heads.iter_mut().enumerate() {
            let mut kp = vec![0f32; n * d];
            gemm::ab(n, d, d, &k[g * n * d..(g + 1) * n * d], &h.basis, &mut kp);
            h.k.push(&kp);
            h.v.push(&v[g * n * d..(g + 1) * n * d]);
        }
    }

    /// Row `i` alone, from the stores as they are.
    fn row(&mut self, s: &Step, i: usize, out: &mut [f32]) -> Result<Work> {
        let c = &self.ctx;
        let (d, n, h) = (c.head_dim, s.n, c.num_heads);
        let group = h / c.num_kv_heads;
        let visible = s.pos + i + 1;
        let lo = batch::window_from(c, visible);
        let (len, width, count) = (visible - lo, self.cfg.width(d), self.cfg.count(visible - lo));
        let parts: Vec<(Vec<f32>, Vec<Vec<u32>>, Work)> = self
            .heads
            .par_iter()
            .enumerate()
            .map(|(g, head)| -> Result<_> {
                let q = batch::stack_rows(s.q, g, group, n, d, i..i + 1);
                let mut qp = vec![0f32; group * d];
                let flops = gemm::ab(group, d, d, &q, &head.basis, &mut qp);
                let short: Vec<f32> = qp.chunks_exact(d).flat_map(|r| &r[..width]).copied().collect();
                let mut scores = vec![0f32; group * len];
                let mut work = Work { flops, ..Work::default() };
                if count < len {
                    work += key_scores(&short, width, head.k.codec_from(lo), len, &mut scores, Isa::active())?;
                }
                let mut scratch = Vec::new();
                let lists = scores
                    .chunks_exact_mut(len)
                    .map(|r| {
                        batch::keep_top(r, count, &mut scratch);
                        batch::kept(r, 0)
                    })
                    .collect();
                Ok((qp, lists, work))
            })
            .collect::<Result<_>>()?;
        let mut work = Work::default();
        let (mut q, mut lists) = (Vec::with_capacity(h * d), Vec::with_capacity(h));
        for (qp, l, w) in parts {
            q.extend_from_slice(&qp);
            lists.extend(l);
            work += w;
        }
        let segments: Vec<Vec<Segment>> = self
            .heads
            .iter()
            .map(|x| vec![Segment { k: x.k.codec_from(lo), v: x.v.codec_from(lo), len, channels: None }])
            .collect();
        let select = KeyLists { heads: lists.iter().map(|l| HeadKeys::from_lists(1, vec![l.clone()])).collect() };
        let (mut o, mut lse) = (vec![0f32; h * d], vec![0f32; h]);
        work += Decode::new(c.scale).run(&q, [h, 1, d], &segments, d, Some(&select), &mut o, &mut lse)?;
        batch::unstack_rows(&o, out, 0, h, n, d, i..i + 1);
        for l in &mut lists {
            l.iter_mut().for_each(|j| *j += lo as u32);
        }
        self.visited = Some(lists);
        Ok(work)
    }

    /// A tile of rows of one K/V head by matrix products.
    fn tile(&self, s: &Step, g: usize, rows: Range<usize>, k: &[f32], v: &[f32]) -> Part {
        let c = &self.ctx;
        let (d, n) = (c.head_dim, s.n);
        let group = c.num_heads / c.num_kv_heads;
        let (width, keys, r) = (self.cfg.width(d), s.pos + rows.end, group * rows.len());
        let q = batch::stack_rows(s.q, g, group, n, d, rows.clone());
        let mut qp = vec![0f32; r * d];
        let mut work = Work { flops: gemm::ab(r, d, d, &q, &self.heads[g].basis, &mut qp), ..Work::default() };
        let mut scores = vec![0f32; r * keys];
        work.flops += gemm::abt(r, keys, width, 1.0, &qp, d, k, d, &mut scores);
        let mut scratch = Vec::new();
        let mut lists = Vec::new();
        for (x, row) in scores.chunks_exact_mut(keys).enumerate() {
            let i = rows.start + x % rows.len();
            let visible = s.pos + i + 1;
            let lo = batch::window_from(c, visible);
            row[..lo].fill(f32::NEG_INFINITY);
            row[visible..].fill(f32::NEG_INFINITY);
            let count = self.cfg.count(visible - lo);
            batch::keep_top(&mut row[lo..visible], count, &mut scratch);
            work.pairs += count as u64;
            if i + 1 == n {
                lists.push(batch::kept(&row[lo..visible], lo));
            }
        }
        work.flops += gemm::abt_add(r, keys, d - width, &qp[width..], d, &k[width..], d, &mut scores);
        let sums: Vec<f32> = scores.chunks_exact_mut(keys).map(|row| batch::exp_row(row, c.scale)).collect();
        let (out, flops) = batch::gather_values(&scores, &sums, v, keys, d);
        work.flops += flops;
        work.tiles += 1;
        Part { g, rows, out, lists, work }
    }
}

impl Layer {
    /// All rows of a step on bf16 tiles.
    fn rows_on_tiles(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        let c = &self.ctx;
        let (d, n, keys) = (c.head_dim, s.n, s.pos + s.n);
        let group = c.num_heads / c.num_kv_heads;
        let width = self.cfg.width(d);
        let blocks = n.div_ceil(WIDTH);
        let mut work = Work::default();
        let mut visited = Vec::with_capacity(c.num_heads);
        for (g, head) in self.heads.iter().enumerate() {
            let (k, v) = (batch::bf16_rows(&head.k), batch::bf16_rows(&head.v));
            let q = &s.q[g * group * n * d..][..group * n * d];
            let mut qp = vec![0f32; group * n * d];
            work.flops += gemm::ab(group * n, d, d, q, &head.basis, &mut qp);
            let short = batch::doubled(&k, d, width);
            // Long rows first: they take longer.
            let tasks: Vec<(usize, usize)> = (0..blocks).rev().flat_map(|b| (0..group).map(move |a| (a, b))).collect();
            let parts: Vec<(Vec<u64>, u64, u64)> = tasks
                .par_iter()
                .with_max_len(1)
                .map(|&(a, b)| -> Result<_> {
                    let rows = b * WIDTH..((b + 1) * WIDTH).min(n);
                    let seen = s.pos + rows.end;
                    let spans: Vec<Range<usize>> =
                        rows.clone().map(|i| batch::window_from(c, s.pos + i + 1)..s.pos + i + 1).collect();
                    let keep: Vec<usize> = spans.iter().map(|s| self.cfg.count(s.len())).collect();
                    let tile = ScoreTile::new(rows.map(|i| &qp[(a * n + i) * d..][..width]), width)?;
                    let mut marks = vec![0u64; seen];
                    let flops = batch::with_tile(seen * WIDTH, |scores| -> Result<_> {
                        let flops = tile.scores(&short[..seen * 2 * width], scores)?;
                        top_marks(scores, &spans, &keep, &mut marks, Isa::active())?;
                        Ok(flops)
                    })?;
                    Ok((marks, flops, keep.iter().map(|&k| k as u64).sum()))
                })
                .collect::<Result<_>>()?;
            let pairs: u64 = parts.iter().map(|p| p.2).sum();
            work.flops += parts.iter().map(|p| p.1).sum::<u64>();
            let of = |a: usize, b: usize| parts[(blocks - 1 - b) * group + a].0.as_slice();
            let tables = (0..group).map(|a| batch::marked((0..blocks).map(|b| of(a, b)))).collect();
            let bit = (n - 1) % WIDTH;
            visited.extend((0..group).map(|a| {
                let last = of(a, blocks - 1);
                (0..keys as u32).filter(|&j| last[j as usize] >> bit & 1 == 1).collect::<Vec<u32>>()
            }));
            let rows =
                batch::Rows { scale: c.scale, causal: true, window: None, shape: [group, n, d, d], k: &k, v: &v };
            let mut lse = vec![0f32; group * n];
            let o = &mut out[g * group * n * d..][..group * n * d];
            work += Work { pairs, ..rows.attend(&batch::to_bf16(&qp), Some(tables), o, &mut lse)? };
        }
        self.visited = Some(visited);
        Ok(work)
    }
}

impl LayerCache for Layer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        batch::check_prompt(CARD.id, &self.ctx, p, false)?;
        self.push(p.k, p.v, p.len);
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        batch::check_step(CARD.id, &self.ctx, s, out, self.len(), false)?;
        self.push(s.k, s.v, s.n);
        let (n, d, hkv) = (s.n, self.ctx.head_dim, self.ctx.num_kv_heads);
        let mut work = Work::default();
        if n < BATCH_FROM {
            for i in 0..n {
                work += self.row(s, i, out)?;
            }
            return Ok(work);
        }
        if batch::on_tiles(&self.ctx) {
            return self.rows_on_tiles(s, out);
        }
        let group = self.ctx.num_heads / hkv;
        let flat: Vec<(Vec<f32>, Vec<f32>)> = self.heads.par_iter().map(|h| (h.k.to_f32(), h.v.to_f32())).collect();
        work.bytes += self.heads.iter().map(|h| (h.k.bytes() + h.v.bytes()) as u64).sum::<u64>();
        let tile = batch::tile_rows(group, s.pos + n);
        let tasks: Vec<(usize, usize)> = (0..n).step_by(tile).flat_map(|i| (0..hkv).map(move |g| (g, i))).collect();
        let parts: Vec<Part> =
            tasks.into_par_iter().map(|(g, i)| self.tile(s, g, i..(i + tile).min(n), &flat[g].0, &flat[g].1)).collect();
        let mut visited = vec![Vec::new(); self.ctx.num_heads];
        for part in parts {
            batch::unstack_rows(&part.out, out, part.g, group, n, d, part.rows);
            for (a, l) in part.lists.into_iter().enumerate() {
                visited[part.g * group + a] = l;
            }
            work += part.work;
        }
        self.visited = Some(visited);
        Ok(work)
    }

    fn len(&self) -> usize {
        self.heads[0].k.len()
    }

    fn resident(&self) -> Resident {
        let mut r = Resident::default();
        for h in &self.heads {
            r.keys += h.k.bytes();
            r.values += h.v.bytes();
            r.aux += size_of_val(h.basis.as_slice());
        }
        r
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }

    fn last_visited(&self) -> Option<Vec<Vec<u32>>> {
        self.visited.clone()
    }
}
