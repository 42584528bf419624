//! TokenSelect: a few tokens per step, chosen for all heads together (Wu et al. 2024,
//! arXiv 2411.02886).
//!
//! Candidates are the tokens between the `sinks` first and the `local` last ones. Each query
//! head's raw logits over them become a softmax, and the softmaxes add up to a soft vote:
//!
//! vote_j = Σ_h softmax_j(q_h·K_jᵀ);  I = top-k of vote.
//!
//! Every head attends to sinks ∪ I ∪ local. Selection Cache: while the cosine between the query
//! (all heads as one vector) and the query of the last selection is at least `threshold`, that
//! selection is used again.
//!
//! Cost of a decoded token, a query head: T·D to vote (nothing when the selection is used
//! again) and (sinks + k + local)·2D to attend; memory as dense.
//!
//! Where we had to choose: see [`CARD`].

use super::batch::{self, BATCH_FROM, ScoreTile};
use super::dense::{DenseLayer, dense_bytes};
use super::{CacheCtx, CachePolicy, LayerCache, Prompt, Resident, Step};
use crate::error::Result;
use crate::prim::gemm;
use crate::prim::select::topk;
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::decode::{Decode, Segment, key_scores};
use foveal_kernels::rank::{WIDTH, add_softmax, top_marks};
use foveal_kernels::{HeadKeys, Isa, KeyLists, Work};
use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSelect {
    /// Tokens chosen by the vote.
    pub topk: usize,
    /// First tokens always read.
    pub sinks: usize,
    /// Last tokens always read, the query's own included.
    pub local: usize,
    /// Cosine from which the last selection is used again.
    pub threshold: f32,
    /// Vote on scale·q·k instead of q·k.
    pub scaled: bool,
}

impl Default for TokenSelect {
    fn default() -> Self {
        Self { topk: 2048, sinks: 128, local: 512, threshold: 0.9, scaled: false }
    }
}

impl Config for TokenSelect {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("topk", "tokens chosen by the vote of all heads, at least 1"),
        ("sinks", "first tokens that are always read"),
        ("local", "last tokens that are always read, the query's own included, at least 1"),
        ("threshold", "cosine of queries from which the last selection is used again; above 1 = never"),
        ("scaled", "vote on scale·q·k instead of the raw q·k of the authors' code"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.topk == 0 {
            return Err("topk = 0: choose at least 1 token".into());
        }
        if self.local == 0 {
            return Err("local = 0: the query's own token must be read; use at least 1".into());
        }
        if !self.threshold.is_finite() || self.threshold < -1.0 {
            return Err(format!(
                "threshold = {}: use a cosine from -1 (always use again) up; above 1 never",
                self.threshold
            ));
        }
        Ok(())
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "tokenselect",
    title: "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection",
    authors: "Wu et al., 2024",
    arxiv: "2411.02886",
    family: Family::Cache,
    slots: &[Slot::Cache],
    laws: &[
        Law::Causal,
        Law::StepsAgree,
        Law::BytesAsDeclared,
        Law::ExactAt(&[("topk", "1000000000")]),
        Law::Monotone { param: "topk", values: &["4", "16", "64", "1000000000"] },
    ],
    equation: "vote_j = Σ_h softmax_j(q_h·K_jᵀ) over tokens outside sinks and local window\n\
               I = sinks ∪ top-k(vote) ∪ local, shared by all heads\n\
               I is used again while cos(q, q of the last selection) ≥ threshold",
    cost: "T·D to vote (skipped on reuse) and (sinks + k + local)·2D multiply-adds a query head and token; bytes as dense",
    choices: &[
        "The vote's softmax runs over raw q·k without 1/√D and over the candidates only, as in the authors' code; \
         scaled=true puts the scale back.",
        "The authors' kernel pairs query head h with K/V head h mod H_kv, which mixes up grouped heads; here h / (H/H_kv).",
        "When sinks + topk + local cover everything the step is dense and neither uses nor sets the selection cache, \
         as in the authors' code.",
        "Several tokens in one step are treated as decoded one after the other, each with its own query; the authors \
         average the queries of a prefill chunk, which would let a token's selection depend on later tokens.",
        "Three or more tokens in one step, on a machine with AMX and a store of bf16 or int8: votes come from queries split in two bf16 \
         parts (error 2⁻¹⁶), and attention runs on bf16 queries and weights, as in a prompt. One or two tokens, and f32 stores, keep \
         f32 queries.",
        "No pooling of votes (the authors' optional KERNEL_SIZE).",
    ],
    params: params_of::<TokenSelect>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Cache(Box::new(configure::<TokenSelect>(CARD.id, params)?)))
}

impl CachePolicy for TokenSelect {
    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>> {
        batch::check_ctx(CARD.id, ctx)?;
        Ok(Box::new(Layer { ctx: ctx.clone(), cfg: *self, store: DenseLayer::new(ctx), last: None, visited: None }))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        dense_bytes(ctx, tokens)
    }
}

/// A selection and the query that made it.
#[derive(Clone)]
struct Selection {
    /// All query heads, (H, D).
    query: Vec<f32>,
    /// Voted tokens, ascending.
    tokens: Arc<Vec<u32>>,
}

#[derive(Clone)]
struct Layer {
    ctx: CacheCtx,
    cfg: TokenSelect,
    store: DenseLayer,
    last: Option<Selection>,
    /// Tokens the last row read, if it selected.
    visited: Option<Arc<Vec<u32>>>,
}

/// What a row reads.
#[derive(Clone)]
enum Reads {
    /// Everything visible.
    All,
    /// Sinks, these, and the local window.
    Some(Arc<Vec<u32>>),
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(p, q)| f64::from(*p) * f64::from(*q)).sum::<f64>();
    let norm = (dot(a, a) * dot(b, b)).sqrt();
    if norm > 0.0 { (dot(a, b) / norm) as f32 } else { 0.0 }
}

impl Layer {
    /// Sinks end, candidates end and window start of a row that sees `visible` tokens;
    /// `None` if it reads everything.
    fn bounds(&self, visible: usize) -> Option<(usize, usize, usize)> {
        let (c, lo) = (&self.cfg, batch::window_from(&self.ctx, visible));
        let seen = visible - lo;
        if c.sinks.saturating_add(c.local).saturating_add(c.topk) >= seen {
            return None;
        }
        Some((lo + c.sinks, visible - c.local, lo))
    }

    /// Positions read, ascending.
    fn positions(&self, visible: usize, reads: &Reads) -> Option<Vec<u32>> {
        let (sinks, local, lo) = self.bounds(visible)?;
        let Reads::Some(tokens) = reads else { return None };
        let mut p: Vec<u32> = (lo as u32..sinks as u32).collect();
        // With a window in the model, a used-again selection may hold tokens that left it.
        p.extend(tokens.iter().filter(|&&t| (sinks as u32..local as u32).contains(&t)));
        p.extend(local as u32..visible as u32);
        Some(p)
    }

    /// Sum over heads of the softmax of each head's logits (rows of `scores`), into `vote`.
    fn vote(&self, scores: &mut [f32], candidates: usize, vote: &mut [f32]) {
        let scale = if self.cfg.scaled { self.ctx.scale } else { 1.0 };
        for row in scores.chunks_exact_mut(candidates) {
            let sum = batch::exp_row(row, scale);
            let inv = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            for (v, x) in vote.iter_mut().zip(row) {
                *v += *x * inv;
            }
        }
    }

    /// Vote of one query (H, D) straight from the store.
    fn select_one(&self, q: &[f32], from: usize, to: usize) -> Result<(Vec<u32>, Work)> {
        let (d, hkv) = (self.ctx.head_dim, self.ctx.num_kv_heads);
        let (group, m) = (self.ctx.num_heads / hkv, to - from);
        let heads: Vec<(Vec<f32>, Work)> = (0..hkv)
            .into_par_iter()
            .map(|g| -> Result<_> {
                let mut scores = vec![0f32; group * m];
                let keys = self.store.k[g].codec_from(from);
                let work = key_scores(&q[g * group * d..(g + 1) * group * d], d, keys, m, &mut scores, Isa::active())?;
                let mut vote = vec![0f32; m];
                self.vote(&mut scores, m, &mut vote);
                Ok((vote, work))
            })
            .collect::<Result<_>>()?;
        let (mut vote, mut work) = (vec![0f32; m], Work::default());
        for (v, w) in &heads {
            vote.iter_mut().zip(v).for_each(|(a, b)| *a += b);
            work += *w;
        }
        Ok((topk(&vote, self.cfg.topk).into_iter().map(|j| j + from as u32).collect(), work))
    }

    /// Whether a query may use the last selection again.
    fn similar(&self, last: Option<&[f32]>, q: &[f32]) -> bool {
        last.is_some_and(|l| cosine(l, q) >= self.cfg.threshold)
    }

    fn row(&mut self, s: &Step, i: usize, out: &mut [f32]) -> Result<Work> {
        let (d, n, h) = (self.ctx.head_dim, s.n, self.ctx.num_heads);
        let visible = s.pos + i + 1;
        let lo = batch::window_from(&self.ctx, visible);
        let q = batch::stack_rows(s.q, 0, h, n, d, i..i + 1);
        let mut work = Work::default();
        let reads = match self.bounds(visible) {
            None => Reads::All,
            Some((from, to, _)) => {
                let last = self.last.as_ref().filter(|l| self.similar(Some(&l.query), &q));
                let tokens = match last {
                    Some(l) => l.tokens.clone(),
                    None => {
                        let (tokens, w) = self.select_one(&q, from, to)?;
                        work += w;
                        let tokens = Arc::new(tokens);
                        self.last = Some(Selection { query: q.clone(), tokens: tokens.clone() });
                        tokens
                    }
                };
                Reads::Some(tokens)
            }
        };
        let segments: Vec<Vec<Segment>> = self
            .store
            .k
            .iter()
            .zip(&self.store.v)
            .map(|(k, v)| vec![Segment { k: k.codec_from(lo), v: v.codec_from(lo), len: visible - lo, channels: None }])
            .collect();
        let positions = self.positions(visible, &reads);
        let lists = positions.as_ref().map(|p| {
            let local: Vec<u32> = p.iter().map(|j| j - lo as u32).collect();
            KeyLists { heads: vec![HeadKeys::from_lists(1, vec![local]); h] }
        });
        let (mut o, mut lse) = (vec![0f32; h * d], vec![0f32; h]);
        work += Decode::new(self.ctx.scale).run(&q, [h, 1, d], &segments, d, lists.as_ref(), &mut o, &mut lse)?;
        batch::unstack_rows(&o, out, 0, h, n, d, i..i + 1);
        self.visited = positions.map(Arc::new);
        Ok(work)
    }

    /// Votes of the listed rows, in blocks that each task takes through all heads.
    fn select_many(&self, s: &Step, rows: &[usize], keys: &[Vec<f32>]) -> (Vec<Vec<u32>>, Work) {
        let (d, hkv, n) = (self.ctx.head_dim, self.ctx.num_kv_heads, s.n);
        let group = self.ctx.num_heads / hkv;
        let tile = batch::tile_rows(group, s.pos + n);
        let parts: Vec<(Vec<Vec<u32>>, Work)> = rows
            .par_chunks(tile)
            .map(|block| {
                let total = s.pos + block[block.len() - 1] + 1;
                let mut votes = vec![0f32; block.len() * total];
                let mut scores = vec![0f32; group * block.len() * total];
                let mut work = Work::default();
                for (g, k) in keys.iter().enumerate() {
                    let mut q = Vec::with_capacity(block.len() * group * d);
                    for &i in block {
                        for h in g * group..(g + 1) * group {
                            q.extend_from_slice(&s.q[(h * n + i) * d..(h * n + i + 1) * d]);
                        }
                    }
                    work.flops += gemm::abt(block.len() * group, total, d, 1.0, &q, d, k, d, &mut scores);
                    for (b, &i) in block.iter().enumerate() {
                        let Some((from, to, _)) = self.bounds(s.pos + i + 1) else { continue };
                        for a in 0..group {
                            let row = &mut scores[(b * group + a) * total..][from..to];
                            self.vote(row, to - from, &mut votes[b * total..][from..to]);
                        }
                    }
                }
                let lists = block
                    .iter()
                    .enumerate()
                    .map(|(b, &i)| {
                        let Some((from, to, _)) = self.bounds(s.pos + i + 1) else { return Vec::new() };
                        let mut scratch = Vec::new();
                        let vote = &mut votes[b * total..][from..to];
                        batch::keep_top(vote, self.cfg.topk, &mut scratch);
                        batch::kept(vote, from)
                    })
                    .collect();
                (lists, work)
            })
            .collect();
        let mut work = Work::default();
        let mut lists = Vec::with_capacity(rows.len());
        for (l, w) in parts {
            lists.extend(l);
            work += w;
        }
        (lists, work)
    }

    /// [`Self::select_many`] on bf16 tiles.
    fn select_on_tiles(&self, s: &Step, rows: &[usize], keys: &[Cow<[bf16]>]) -> Result<(Vec<Vec<u32>>, Work)> {
        let (d, hkv, n) = (self.ctx.head_dim, self.ctx.num_kv_heads, s.n);
        let group = self.ctx.num_heads / hkv;
        if rows.is_empty() {
            return Ok((Vec::new(), Work::default()));
        }
        let keys: Vec<Vec<f32>> = keys.par_iter().map(|k| batch::doubled(k, d, d)).collect();
        let scale = if self.cfg.scaled { self.ctx.scale } else { 1.0 };
        let block = rows.len().div_ceil(rayon::current_num_threads()).next_multiple_of(16).min(WIDTH);
        let parts: Vec<(Vec<Vec<u32>>, u64)> = rows
            .par_chunks(block)
            .map(|block| -> Result<_> {
                let bounds = |&i: &usize| self.bounds(s.pos + i + 1).map_or(0..0, |(from, to, _)| from..to);
                let spans: Vec<Range<usize>> = block.iter().map(bounds).collect();
                let seen = spans.iter().map(|s| s.end).max().unwrap_or(0);
                let keep = vec![self.cfg.topk; spans.len()];
                let (mut marks, mut flops) = (vec![0u64; seen], 0);
                batch::with_tile(2 * seen * WIDTH, |tile| -> Result<()> {
                    let (votes, scores) = tile.split_at_mut(seen * WIDTH);
                    votes.fill(0.0);
                    for h in 0..hkv * group {
                        let of = ScoreTile::new(block.iter().map(|&i| &s.q[(h * n + i) * d..][..d]), d)?;
                        flops += of.scores(&keys[h / group][..seen * 2 * d], scores)?;
                        add_softmax(scores, &spans, scale, votes, Isa::active())?;
                    }
                    Ok(top_marks(votes, &spans, &keep, &mut marks, Isa::active())?)
                })?;
                let mut lists = vec![Vec::with_capacity(self.cfg.topk.min(seen)); block.len()];
                for (j, mut m) in marks.into_iter().enumerate() {
                    while m != 0 {
                        lists[m.trailing_zeros() as usize].push(j as u32);
                        m &= m - 1;
                    }
                }
                Ok((lists, flops))
            })
            .collect::<Result<_>>()?;
        let mut work = Work::default();
        let mut lists = Vec::with_capacity(rows.len());
        for (l, flops) in parts {
            lists.extend(l);
            work.flops += flops;
        }
        Ok((lists, work))
    }

    /// All rows of a step on bf16 tiles, each reading what `reads` says.
    fn attend_on_tiles(
        &self,
        s: &Step,
        reads: &[Reads],
        keys: &[Cow<[bf16]>],
        values: &[Cow<[bf16]>],
        out: &mut [f32],
    ) -> Result<Work> {
        let c = &self.ctx;
        let (d, n, group) = (c.head_dim, s.n, c.num_heads / c.num_kv_heads);
        let mut pairs = 0;
        let dense = reads.iter().all(|r| matches!(r, Reads::All));
        let mut blocks = Vec::new();
        for first in (0..n).step_by(WIDTH) {
            let rows = first..(first + WIDTH).min(n);
            let mut marks = vec![0u64; if dense { 0 } else { s.pos + rows.end }];
            for i in rows {
                let (visible, bit) = (s.pos + i + 1, 1u64 << (i - first));
                let lo = batch::window_from(c, visible);
                match self.positions(visible, &reads[i]) {
                    _ if dense => pairs += visible - lo,
                    None => {
                        marks[lo..visible].iter_mut().for_each(|m| *m |= bit);
                        pairs += visible - lo;
                    }
                    Some(p) => {
                        p.iter().for_each(|&j| marks[j as usize] |= bit);
                        pairs += p.len();
                    }
                }
            }
            blocks.push(marks);
        }
        let table = (!dense).then(|| batch::marked(blocks.iter().map(Vec::as_slice)));
        let mut work = Work::default();
        for (g, (k, v)) in keys.iter().zip(values).enumerate() {
            let window = if dense { c.window } else { None };
            let rows = batch::Rows { scale: c.scale, causal: true, window, shape: [group, n, d, d], k, v };
            let span = g * group * n * d..(g + 1) * group * n * d;
            let mut lse = vec![0f32; group * n];
            let tables = table.as_ref().map(|t| vec![t.clone(); group]);
            work += rows.attend(&batch::to_bf16(&s.q[span.clone()]), tables, &mut out[span], &mut lse)?;
        }
        work.pairs = (pairs * c.num_heads) as u64;
        Ok(work)
    }

    /// A tile of rows of one K/V head: all scores, those not read set to −∞.
    fn tile(&self, s: &Step, g: usize, rows: Range<usize>, reads: &[Reads], k: &[f32], v: &[f32]) -> batch::Tiled {
        let (d, n) = (self.ctx.head_dim, s.n);
        let group = self.ctx.num_heads / self.ctx.num_kv_heads;
        let (keys, r) = (s.pos + rows.end, group * rows.len());
        let q = batch::stack_rows(s.q, g, group, n, d, rows.clone());
        let mut scores = vec![0f32; r * keys];
        let mut work =
            Work { flops: gemm::abt(r, keys, d, 1.0, &q, d, k, d, &mut scores), tiles: 1, ..Work::default() };
        let mut read = vec![0f32; keys];
        for i in rows.clone() {
            let visible = s.pos + i + 1;
            // 0 where the row reads, −∞ elsewhere: added to every head's scores.
            read.fill(f32::NEG_INFINITY);
            let lo = batch::window_from(&self.ctx, visible);
            let count = match self.positions(visible, &reads[i]) {
                None => {
                    read[lo..visible].fill(0.0);
                    visible - lo
                }
                Some(p) => {
                    p.iter().for_each(|&j| read[j as usize] = 0.0);
                    p.len()
                }
            };
            work.pairs += (group * count) as u64;
            for a in 0..group {
                let row = &mut scores[(a * rows.len() + i - rows.start) * keys..][..keys];
                row.iter_mut().zip(&read).for_each(|(x, m)| *x += m);
            }
        }
        let sums: Vec<f32> = scores.chunks_exact_mut(keys).map(|row| batch::exp_row(row, self.ctx.scale)).collect();
        let (out, flops) = batch::gather_values(&scores, &sums, v, keys, d);
        work.flops += flops;
        batch::Tiled { out, work }
    }
}

impl LayerCache for Layer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        batch::check_prompt(CARD.id, &self.ctx, p, false)?;
        self.store.push(p.k, p.v, p.len);
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        batch::check_step(CARD.id, &self.ctx, s, out, self.store.len(), false)?;
        self.store.push(s.k, s.v, s.n);
        let (n, d, h, hkv) = (s.n, self.ctx.head_dim, self.ctx.num_heads, self.ctx.num_kv_heads);
        let mut work = Work::default();
        if n < BATCH_FROM {
            for i in 0..n {
                work += self.row(s, i, out)?;
            }
            return Ok(work);
        }
        // Which rows select is a chain of cosines; what they select does not depend on the chain,
        // so all selecting rows vote together.
        let mut query = self.last.as_ref().map(|l| l.query.clone());
        let mut fresh: Vec<usize> = Vec::new();
        let mut source: Vec<Option<usize>> = Vec::with_capacity(n);
        for i in 0..n {
            if self.bounds(s.pos + i + 1).is_none() {
                source.push(None);
                continue;
            }
            let q = batch::stack_rows(s.q, 0, h, n, d, i..i + 1);
            if !self.similar(query.as_deref(), &q) {
                fresh.push(i);
                query = Some(q);
            }
            source.push(Some(fresh.len()));
        }
        let tiles = batch::on_tiles(&self.ctx);
        let low = if tiles { hkv } else { 0 };
        let low_keys: Vec<_> = self.store.k[..low].iter().map(batch::bf16_rows).collect();
        let low_values: Vec<_> = self.store.v[..low].iter().map(batch::bf16_rows).collect();
        let flat: Vec<(Vec<f32>, Vec<f32>)> = (0..if tiles { 0 } else { hkv })
            .into_par_iter()
            .map(|g| (self.store.k[g].to_f32(), self.store.v[g].to_f32()))
            .collect();
        let (keys, values): (Vec<_>, Vec<_>) = flat.into_iter().unzip();
        let (lists, w) =
            if tiles { self.select_on_tiles(s, &fresh, &low_keys)? } else { self.select_many(s, &fresh, &keys) };
        work += w;
        let lists: Vec<Arc<Vec<u32>>> = lists.into_iter().map(Arc::new).collect();
        // Selection number 0 is the one from before this step.
        let reads: Vec<Reads> = source
            .iter()
            .map(|src| match src {
                None => Reads::All,
                Some(0) => self.last.as_ref().map_or(Reads::All, |l| Reads::Some(l.tokens.clone())),
                Some(x) => Reads::Some(lists[x - 1].clone()),
            })
            .collect();
        if tiles {
            work += self.attend_on_tiles(s, &reads, &low_keys, &low_values, out)?;
        } else {
            let r = self.store.resident();
            work.bytes += (r.keys + r.values) as u64;
            let group = h / hkv;
            let tile = batch::tile_rows(group, s.pos + n);
            let tasks: Vec<(usize, usize)> = (0..n).step_by(tile).flat_map(|i| (0..hkv).map(move |g| (g, i))).collect();
            let parts: Vec<batch::Tiled> = tasks
                .par_iter()
                .map(|&(g, i)| self.tile(s, g, i..(i + tile).min(n), &reads, &keys[g], &values[g]))
                .collect();
            for (&(g, i), part) in tasks.iter().zip(&parts) {
                batch::unstack_rows(&part.out, out, g, group, n, d, i..(i + tile).min(n));
                work += part.work;
            }
        }
        drop((low_keys, low_values));
        if let (Some(tokens), Some(query)) = (lists.last(), query) {
            self.last = Some(Selection { query, tokens: tokens.clone() });
        }
        self.visited = self.positions(s.pos + n, &reads[n - 1]).map(Arc::new);
        Ok(work)
    }

    fn len(&self) -> usize {
        self.store.len()
    }

    fn resident(&self) -> Resident {
        let mut r = self.store.resident();
        if let Some(l) = &self.last {
            r.aux += size_of_val(l.query.as_slice()) + size_of_val(l.tokens.as_slice());
        }
        r
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }

    fn last_visited(&self) -> Option<Vec<Vec<u32>>> {
        self.visited.as_ref().map(|v| vec![v.to_vec(); self.ctx.num_heads])
    }
}
