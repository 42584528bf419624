//! ThinK: channels of the key cache pruned by what the queries ask for (Xu et al. 2024,
//! arXiv 2407.21018).
//!
//! Per K/V head, with Q_obs the last `obs` queries of the prompt and K all its keys, channel c
//! scores `‖Q_obs[:,c]·K[:,c]ᵀ‖_F = ‖Q_obs[:,c]‖·‖K[:,c]‖`: how much the logits lose with it. The
//! ⌊ratio·D⌋ lowest go. Keys are stored D' = D − ⌊ratio·D⌋ wide, the last `recent` tokens D wide:
//!
//! `logits = scale · [ q[channels]·K_prunedᵀ , q·K_recentᵀ ]`.
//!
//! Cost of a decoded token: T·(D' + D) multiply-adds a query head; memory T·(D' + D) elements a
//! K/V head instead of 2·T·D, plus D' channel numbers.
//!
//! Where we had to choose: see [`CARD`].

use super::batch::{self, BATCH_FROM};
use super::{CacheCtx, CachePolicy, LayerCache, Prompt, Resident, Step};
use crate::error::Result;
use crate::prim::kv::RowStore;
use crate::prim::select::topk;
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::decode::{Decode, Segment};
use foveal_kernels::{Work, merge_row};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Think {
    /// Share of key channels dropped.
    pub ratio: f32,
    /// Last tokens kept full width.
    pub recent: usize,
    /// Prompt queries that score the channels.
    pub obs: usize,
}

impl Default for Think {
    fn default() -> Self {
        Self { ratio: 0.4, recent: 32, obs: 32 }
    }
}

impl Config for Think {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("ratio", "share of key channels dropped, 0 up to but not 1"),
        ("recent", "last tokens whose keys stay full width"),
        ("obs", "last prompt queries that score the channels, at least 1 (the engine hands over up to 64)"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(0.0..1.0).contains(&self.ratio) {
            return Err(format!("ratio = {}: use a share from 0 (exact) to below 1", self.ratio));
        }
        if self.obs == 0 {
            return Err("obs = 0: at least one query must score the channels".into());
        }
        Ok(())
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "think",
    title: "ThinK: Thinner Key Cache by Query-Driven Pruning",
    authors: "Xu et al., 2024",
    arxiv: "2407.21018",
    family: Family::Cache,
    slots: &[Slot::Cache],
    laws: &[
        Law::Causal,
        Law::StepsAgree,
        Law::BytesAsDeclared,
        Law::SmallerThanDense,
        Law::ExactAt(&[("ratio", "0")]),
        Law::Monotone { param: "ratio", values: &["0.75", "0.5", "0.25", "0"] },
    ],
    equation: "score_c = ||Q_obs[:,c]||·||K[:,c]||, summed over the group's query heads in squares\n\
               S = the D − ⌊ratio·D⌋ channels of highest score\n\
               logits = scale·[ q[S]·K_pruned[:,S]ᵀ , q·K_recentᵀ ]",
    cost: "T·(D' + D) multiply-adds a query head and token; T·(D' + D) stored elements a K/V head",
    choices: &[
        "Grouped heads: the authors' code repeats K/V per query head and prunes each copy; here one K/V head \
         keeps one channel set, scored by the sum of squared norms over its query heads.",
        "The authors never prune tokens decoded later, so their full-width part grows without end; here it is \
         pruned by the prompt's channels in blocks of max(recent, 32) tokens once it holds that many beyond `recent`.",
        "Only keys are pruned (the paper's main method); values stay whole.",
        "Without a prompt the channels are chosen when the first block is pruned, from the queries and keys seen by then.",
    ],
    params: params_of::<Think>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Cache(Box::new(configure::<Think>(CARD.id, params)?)))
}

impl Think {
    /// Stored width of a pruned key.
    fn width(&self, d: usize) -> usize {
        // In f64: 0.4·D in f32 may fall just below or above a whole number.
        let drop = (f64::from(self.ratio) * d as f64 + 1e-6).floor() as usize;
        (d - drop.min(d)).max(1)
    }

    /// Tokens pruned at a time.
    fn block(&self) -> usize {
        self.recent.max(32)
    }
}

impl CachePolicy for Think {
    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>> {
        batch::check_ctx(CARD.id, ctx)?;
        let d = ctx.head_dim;
        let heads = (0..ctx.num_kv_heads)
            .map(|_| Head {
                channels: Vec::new(),
                pruned: RowStore::new(ctx.dtype, self.width(d)),
                recent: RowStore::new(ctx.dtype, d),
                v: RowStore::new(ctx.dtype, d),
                energy: Vec::new(),
            })
            .collect();
        Ok(Box::new(Layer { ctx: ctx.clone(), cfg: *self, heads, total: 0 }))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        let (d, w) = (ctx.head_dim, self.width(ctx.head_dim));
        let recent = tokens.min(self.recent);
        let channels = if tokens > 0 { 4 * w } else { 0 };
        ctx.num_kv_heads
            * (ctx.dtype.bytes(tokens - recent, w) + ctx.dtype.bytes(recent, d) + ctx.dtype.bytes(tokens, d) + channels)
    }
}

/// One K/V head.
#[derive(Clone)]
struct Head {
    /// Channels kept, ascending; empty until chosen.
    channels: Vec<u32>,
    /// Older keys, narrow.
    pruned: RowStore,
    /// Recent keys, full width.
    recent: RowStore,
    /// All values.
    v: RowStore,
    /// Σ q² per channel while no prompt has chosen the channels; else empty.
    energy: Vec<f64>,
}

impl Head {
    /// Choose channels from Σ q² and keys (tokens, D).
    fn choose(&mut self, q2: &[f64], keys: &[f32], width: usize) {
        let d = q2.len();
        let mut k2 = vec![0f64; d];
        for row in keys.chunks_exact(d) {
            for (a, x) in k2.iter_mut().zip(row) {
                *a += f64::from(*x).powi(2);
            }
        }
        let score: Vec<f32> = q2.iter().zip(&k2).map(|(a, b)| (a * b).sqrt() as f32).collect();
        self.channels = topk(&score, width);
        self.energy = Vec::new();
    }

    /// Store full-width rows narrow.
    fn push_pruned(&mut self, rows: &[f32], d: usize) {
        let narrow = narrow(rows, d, &self.channels);
        self.pruned.push(&narrow);
    }
}

/// The channels of each row (rows, d).
fn narrow(rows: &[f32], d: usize, channels: &[u32]) -> Vec<f32> {
    rows.chunks_exact(d).flat_map(|r| channels.iter().map(|&c| r[c as usize])).collect()
}

fn add_squares(acc: &mut [f64], rows: &[f32]) {
    for row in rows.chunks_exact(acc.len()) {
        for (a, x) in acc.iter_mut().zip(row) {
            *a += f64::from(*x).powi(2);
        }
    }
}

#[derive(Clone)]
struct Layer {
    ctx: CacheCtx,
    cfg: Think,
    heads: Vec<Head>,
    total: usize,
}

impl Layer {
    fn group(&self) -> usize {
        self.ctx.num_heads / self.ctx.num_kv_heads
    }

    fn boundary(&self) -> usize {
        self.heads[0].pruned.len()
    }

    /// Rows that may still be appended before a block is pruned, at least 1.
    fn room(&self, boundary: usize, stored: usize) -> usize {
        (boundary + self.cfg.recent + self.cfg.block()).saturating_sub(stored).max(1)
    }

    /// Whether a block is due with `stored` tokens and `boundary` of them pruned.
    fn due(&self, boundary: usize, stored: usize) -> bool {
        stored - boundary >= self.cfg.recent + self.cfg.block()
    }

    /// One row straight from the stores; the row's key and value are appended already.
    fn row(&self, s: &Step, i: usize, out: &mut [f32]) -> Result<Work> {
        let c = &self.ctx;
        let (d, n, p) = (c.head_dim, s.n, self.boundary());
        let visible = s.pos + i + 1;
        let lo = batch::window_from(c, visible);
        let segments: Vec<Vec<Segment>> = self
            .heads
            .iter()
            .map(|h| {
                let (a, b) = (lo.min(p), lo.max(p));
                [
                    Segment {
                        k: h.pruned.codec_from(a),
                        v: h.v.codec_from(a),
                        len: p - a,
                        channels: Some(&h.channels),
                    },
                    Segment { k: h.recent.codec_from(b - p), v: h.v.codec_from(b), len: visible - b, channels: None },
                ]
                .into_iter()
                .filter(|s| s.len > 0)
                .collect()
            })
            .collect();
        let q = batch::stack_rows(s.q, 0, c.num_heads, n, d, i..i + 1);
        let (mut o, mut lse) = (vec![0f32; c.num_heads * d], vec![0f32; c.num_heads]);
        let work = Decode::new(c.scale).run(&q, [c.num_heads, 1, d], &segments, d, None, &mut o, &mut lse)?;
        batch::unstack_rows(&o, out, 0, c.num_heads, n, d, i..i + 1);
        Ok(work)
    }

    /// Move the oldest block of the full-width part into the narrow one.
    fn prune(&mut self) {
        let (d, block, width) = (self.ctx.head_dim, self.cfg.block(), self.cfg.width(self.ctx.head_dim));
        for h in &mut self.heads {
            let mut rows = Vec::new();
            if h.channels.is_empty() {
                h.recent.extend_f32(0, h.recent.len(), &mut rows);
                let energy = std::mem::take(&mut h.energy);
                h.choose(&energy, &rows, width);
                rows.truncate(block * d);
            } else {
                h.recent.extend_f32(0, block, &mut rows);
            }
            h.push_pruned(&rows, d);
            h.recent.drop_front(block);
        }
    }

    fn push(&mut self, s: &Step, i: usize, rows: usize) {
        let d = self.ctx.head_dim;
        let group = self.group();
        for (g, h) in self.heads.iter_mut().enumerate() {
            let span = (g * s.n + i) * d..(g * s.n + i + rows) * d;
            h.recent.push(&s.k[span.clone()]);
            h.v.push(&s.v[span]);
            if h.channels.is_empty() {
                h.energy.resize(d, 0.0);
                for a in g * group..(g + 1) * group {
                    add_squares(&mut h.energy, &s.q[(a * s.n + i) * d..(a * s.n + i + rows) * d]);
                }
            }
        }
        self.total += rows;
    }
}

/// Dense attention of stacked query heads over contiguous keys and values, on bf16 tiles if `low`; output
/// and lse.
fn attend(
    (scale, causal, low): (f32, bool, bool),
    q: &[f32],
    shape: [usize; 4],
    k: &[f32],
    v: &[f32],
) -> Result<(Vec<f32>, Vec<f32>, Work)> {
    let [heads, rows, _, dv] = shape;
    let (mut out, mut lse) = (vec![0f32; heads * rows * dv], vec![f32::NEG_INFINITY; heads * rows]);
    let work = if low {
        let [q, k, v] = [q, k, v].map(batch::to_bf16);
        batch::Rows { scale, causal, window: None, shape, k: &k, v: &v }.attend(&q, None, &mut out, &mut lse)?
    } else {
        batch::Rows { scale, causal, window: None, shape, k, v }.attend(q, None, &mut out, &mut lse)?
    };
    Ok((out, lse, work))
}

impl LayerCache for Layer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        batch::check_prompt(CARD.id, &self.ctx, p, false)?;
        let (d, group) = (self.ctx.head_dim, self.group());
        if p.len == 0 {
            return Ok(());
        }
        let (width, old) = (self.cfg.width(d), p.len.saturating_sub(self.cfg.recent));
        let obs = p.q_len.min(self.cfg.obs);
        for (g, h) in self.heads.iter_mut().enumerate() {
            let keys = &p.k[g * p.len * d..(g + 1) * p.len * d];
            let mut q2 = vec![0f64; d];
            for a in g * group..(g + 1) * group {
                add_squares(&mut q2, &p.q_obs[((a + 1) * p.q_len - obs) * d..(a + 1) * p.q_len * d]);
            }
            if obs == 0 {
                tracing::warn!("think: no queries came with the prompt; channels are chosen by key norm alone");
                q2.fill(1.0);
            }
            h.choose(&q2, keys, width);
            h.push_pruned(&keys[..old * d], d);
            h.recent.push(&keys[old * d..]);
            h.v.push(&p.v[g * p.len * d..(g + 1) * p.len * d]);
        }
        self.total = p.len;
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        batch::check_step(CARD.id, &self.ctx, s, out, self.total, false)?;
        let (d, n, group, scale) = (self.ctx.head_dim, s.n, self.group(), self.ctx.scale);
        let mut work = Work::default();
        let windowed = self.ctx.window.is_some_and(|w| w < s.pos + n);
        if n < BATCH_FROM || windowed {
            for i in 0..n {
                self.push(s, i, 1);
                work += self.row(s, i, out)?;
                if self.due(self.boundary(), self.total) {
                    self.prune();
                }
            }
            return Ok(work);
        }
        // f32 mirrors of the stores, read once for the whole step: narrow keys, recent keys from
        // token `start` on, values from token 0 on.
        let (start, low) = (self.boundary(), batch::on_tiles(&self.ctx));
        let mut mirrors: Vec<[Vec<f32>; 3]> = self
            .heads
            .par_iter()
            .map(|h| {
                let mut m = [Vec::new(), Vec::new(), Vec::new()];
                m[0].reserve((h.pruned.len() + n) * h.pruned.width());
                h.pruned.extend_f32(0, h.pruned.len(), &mut m[0]);
                h.recent.extend_f32(0, h.recent.len(), &mut m[1]);
                m[2].reserve((h.v.len() + n) * d);
                h.v.extend_f32(0, h.v.len(), &mut m[2]);
                m
            })
            .collect();
        let mut i = 0;
        while i < n {
            let before = self.boundary();
            let rows = self.room(before, self.total).min(n - i);
            let had = self.total;
            self.push(s, i, rows);
            for (h, m) in self.heads.iter().zip(&mut mirrors) {
                h.recent.extend_f32(had - before, rows, &mut m[1]);
                h.v.extend_f32(had, rows, &mut m[2]);
            }
            let total = self.total;
            let parts: Vec<batch::Tiled> = self
                .heads
                .par_iter()
                .zip(&mirrors)
                .enumerate()
                .map(|(g, (h, [kp, kr, v]))| -> Result<batch::Tiled> {
                    let q = batch::stack_rows(s.q, g, group, n, d, i..i + rows);
                    let recent = (&kr[(before - start) * d..], &v[before * d..total * d]);
                    let (mut o, mut lse, mut work) =
                        attend((scale, true, low), &q, [group, rows, d, d], recent.0, recent.1)?;
                    if before > 0 {
                        let qn = narrow(&q, d, &h.channels);
                        let (shape, kp) = ([1, group * rows, h.channels.len(), d], &kp[..before * h.channels.len()]);
                        let (o2, l2, w) = attend((scale, false, low), &qn, shape, kp, &v[..before * d])?;
                        for (r, row) in o.chunks_exact_mut(d).enumerate() {
                            merge_row(row, &mut lse[r], &o2[r * d..(r + 1) * d], l2[r]);
                        }
                        work += w;
                    }
                    Ok(batch::Tiled { out: o, work })
                })
                .collect::<Result<_>>()?;
            for (g, part) in parts.iter().enumerate() {
                batch::unstack_rows(&part.out, out, g, group, n, d, i..i + rows);
                work += part.work;
            }
            if self.due(before, total) {
                self.prune();
                for (h, m) in self.heads.iter().zip(&mut mirrors) {
                    h.pruned.extend_f32(before, h.pruned.len() - before, &mut m[0]);
                }
            }
            i += rows;
        }
        Ok(work)
    }

    fn len(&self) -> usize {
        self.total
    }

    fn resident(&self) -> Resident {
        let mut r = Resident::default();
        for h in &self.heads {
            r.keys += h.pruned.bytes() + h.recent.bytes();
            r.values += h.v.bytes();
            r.aux += size_of_val(h.channels.as_slice()) + size_of_val(h.energy.as_slice());
        }
        r
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }
}
