//! ALISA's Sparse Window Attention: half of a token budget for the last tokens, half for the
//! ones that the last few queries attended to most (Zhao et al. 2024, arXiv 2403.17312).
//!
//! For a query that sees n tokens, with k = ⌊n·ratio/2⌉ and AW_s(j) the attention weight of
//! token j in step s summed over heads:
//!
//! S_j = Σ_{s in the last `steps` steps} AW_s(j);  I = last k tokens ∪ the k others of highest S;
//! o = softmax(scale·q·K_Iᵀ)·V_I, all heads over the same I.
//!
//! **What is resident.** A token outside I is not gone: its sum still holds what it received in
//! the last `steps` steps, so it may come back (the paper keeps it in CPU memory or recomputes
//! it). But a token that no query of the last `steps` steps attended to has S = 0, can gain
//! nothing, and never comes back: dropping it changes no output. This store does exactly that.
//! Right after the prompt all tokens have S > 0 (the prompt's own attention was dense), so it is
//! as large as the dense store; from `steps` decoded tokens on it holds about ratio·n tokens.
//!
//! Cost of a decoded token, a query head: (stored tokens)·D + ratio·n·2D multiply-adds; memory
//! (stored tokens)·2D elements a K/V head plus 12 bytes a token and the last `steps` weight rows.
//!
//! Where we had to choose: see [`CARD`].

use super::batch::{self, BATCH_FROM};
use super::{CacheCtx, CachePolicy, LayerCache, Prompt, Resident, Step};
use crate::error::Result;
use crate::prim::gemm;
use crate::prim::kv::RowStore;
use crate::system::{Card, Config, Family, Law, Params, Slot, System, configure, params_of};
use foveal_kernels::decode::{Decode, Segment, key_scores};
use foveal_kernels::{HeadKeys, Isa, KeyLists, Work};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alisa {
    /// Share of the tokens read.
    pub ratio: f32,
    /// Steps whose attention weights are summed; 0 = k, as Algorithm 1 has it.
    pub steps: usize,
}

impl Default for Alisa {
    fn default() -> Self {
        Self { ratio: 0.2, steps: 16 }
    }
}

impl Config for Alisa {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        (
            "ratio",
            "caching ratio: share of the visible tokens read, half recent, half important; above 0 up to 1 (exact)",
        ),
        (
            "steps",
            "last steps whose attention weights are summed; 0 = ratio·n/2 as in the paper's Algorithm 1 (its weight rows then outweigh what the store saves)",
        ),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !(self.ratio > 0.0 && self.ratio <= 1.0) {
            return Err(format!("ratio = {}: use a share above 0, up to 1 (exact)", self.ratio));
        }
        Ok(())
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "alisa",
    title: "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
    authors: "Zhao et al., 2024",
    arxiv: "2403.17312",
    family: Family::Cache,
    slots: &[Slot::Cache],
    laws: &[
        Law::Causal,
        Law::StepsAgree,
        Law::BytesAsDeclared,
        Law::ExactAt(&[("ratio", "1")]),
        Law::Monotone { param: "ratio", values: &["0.125", "0.25", "0.5", "1"] },
    ],
    equation: "k = ⌊n·ratio/2⌉;  S_j = Σ over the last steps, Σ over heads of attention weight on j\n\
               I = last k tokens ∪ k highest S of the others\n\
               o = softmax(scale·q·K_Iᵀ)·V_I",
    cost: "stored·D + ratio·n·2D multiply-adds a query head and token; about ratio·n tokens stored from `steps` decoded \
           tokens on (all of them before), 12 bytes and the last weight rows beside",
    choices: &[
        "Resident: all prompt tokens until `steps` tokens are decoded, since any of them may still be chosen; then a \
         token that nobody attended to in `steps` steps is dropped, which changes no output. The paper moves tokens \
         to CPU memory or recomputes them; this store has one memory.",
        "From Algorithm 1: k = ⌊n·ratio/2⌉ tokens by their sums and the last k, both for all heads of a layer together (the sum also \
         runs over heads); the rows summed are those of earlier steps, so the query itself has no say; the weights of a step are \
         computed over the chosen tokens alone, so a token that is not chosen receives nothing. ratio = 0.2 is the 80% sparsity \
         that the paper's throughput figures use, there the largest that costs most tasks less than 5%.",
        "Algorithm 1 sums the last k rows, Figure 6 two rows at k = 1, the text says a few steps: `steps` is a \
         parameter, 16 by default; 0 is Algorithm 1.",
        "The first sums come from the prompt's last queries that the engine hands over (up to 64), with dense attention; \
         the paper does not say how its prompts are attended to.",
        "The k important tokens are chosen outside the window of the last k, so the budget is always used; the window \
         includes the query's own token.",
        "What is asked for only later is mostly lost: a passkey that the last steps before the question did not look at is not chosen, gets \
         no weight and cannot come back. At the default ratio SmolLM2-135M finds 1 of 10 at 512 and at 2,048 tokens, the one inside the window, \
         where dense finds 10 and 9; at ratio = 0.5 it finds 6 of 10 at both. It is the method: Algorithm 1 written separately on the transformers \
         package also finds the one in the window and no other, with 16 rows and with k rows at both lengths, and at 512 even with the \
         question in the dense prompt. The paper measures perplexity and 4-shot questions, no retrieval.",
        "Sums are kept in fixed point (2⁻²⁴), so that adding and removing a row is exact; ties go to the later token.",
        "The paper's INT8 storage is the store's dtype (int8), its GPU/CPU scheduling is not part of a one-memory store.",
    ],
    params: params_of::<Alisa>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Cache(Box::new(configure::<Alisa>(CARD.id, params)?)))
}

/// Fixed-point one.
const ONE: f32 = (1u32 << 24) as f32;
/// Sum of a token that can never be chosen again.
const DEAD: i64 = -1;

impl Alisa {
    /// Tokens in each half of the budget when `visible` tokens are seen.
    fn half(&self, visible: usize) -> usize {
        ((f64::from(self.ratio) * visible as f64 / 2.0).round() as usize).max(1)
    }

    /// Rows summed for a query that sees `visible` tokens.
    fn rows(&self, visible: usize) -> usize {
        if self.steps == 0 { self.half(visible) } else { self.steps }
    }
}

impl CachePolicy for Alisa {
    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>> {
        batch::check_ctx(CARD.id, ctx)?;
        let heads = || (0..ctx.num_kv_heads).map(|_| RowStore::new(ctx.dtype, ctx.head_dim)).collect();
        Ok(Box::new(Layer {
            ctx: ctx.clone(),
            cfg: *self,
            k: heads(),
            v: heads(),
            positions: Vec::new(),
            sums: Vec::new(),
            history: VecDeque::new(),
            dead: 0,
            total: 0,
            visited: None,
        }))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        let rows = self.rows(tokens + 1).min(tokens).min(64);
        super::dense::dense_bytes(ctx, tokens) + 12 * tokens + 4 * rows * tokens
    }
}

/// Attention weights of one step, summed over heads, in fixed point.
#[derive(Clone)]
enum WeightRow {
    /// Of the first slots.
    Dense(Vec<u32>),
    /// (slot, weight), weights above 0.
    Sparse(Vec<(u32, u32)>),
}

impl WeightRow {
    fn for_each(&self, mut f: impl FnMut(usize, u32)) {
        match self {
            WeightRow::Dense(w) => w.iter().enumerate().for_each(|(j, &w)| f(j, w)),
            WeightRow::Sparse(w) => w.iter().for_each(|&(j, w)| f(j as usize, w)),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            WeightRow::Dense(w) => size_of_val(w.as_slice()),
            WeightRow::Sparse(w) => size_of_val(w.as_slice()),
        }
    }
}

/// Stored tokens are numbered by slot, in order of position.
#[derive(Clone)]
struct Layer {
    ctx: CacheCtx,
    cfg: Alisa,
    /// Keys per K/V head.
    k: Vec<RowStore>,
    /// Values per K/V head.
    v: Vec<RowStore>,
    /// Position of each slot.
    positions: Vec<u32>,
    /// S of each slot in fixed point, or [`DEAD`].
    sums: Vec<i64>,
    /// The last steps' weights, oldest first.
    history: VecDeque<WeightRow>,
    /// Dead slots.
    dead: usize,
    /// Tokens appended.
    total: usize,
    /// Positions the last row read.
    visited: Option<Vec<u32>>,
}

fn fixed(w: f32) -> u32 {
    (w * ONE).round() as u32
}

impl Layer {
    /// Add one token's slot (its key and value are stored already).
    fn add_slot(&mut self) {
        self.positions.push(self.total as u32);
        self.sums.push(0);
        self.total += 1;
    }

    /// Slots that the newest token reads, ascending. Retires tokens that can never be read again.
    fn choose(&mut self) -> Vec<u32> {
        let (n, slots) = (self.total, self.positions.len());
        while self.history.len() > self.cfg.rows(n) {
            if let Some(row) = self.history.pop_front() {
                let sums = &mut self.sums;
                // A dead slot has no weight in any row left.
                row.for_each(|j, w| sums[j] -= i64::from(w));
            }
        }
        let half = self.cfg.half(n);
        let first = batch::window_from(&self.ctx, n);
        let window = slots - half.min(n - first);
        // Sum above slot in one word: the highest word is the best, later tokens win ties.
        let cap = (1i64 << 38) - 1;
        let mut best: Vec<u64> = Vec::with_capacity(window);
        for j in 0..window {
            if self.sums[j] == DEAD {
                continue;
            }
            if (self.positions[j] as usize) < first {
                // Left the model's own window. Its weights leave the sums with it.
                self.retire(j);
                continue;
            }
            best.push((self.sums[j].min(cap) as u64) << 26 | j as u64);
        }
        if best.len() > half {
            best.select_nth_unstable_by(half - 1, |a, b| b.cmp(a));
            for x in &best[half..] {
                if x >> 26 == 0 {
                    let j = (x & ((1 << 26) - 1)) as usize;
                    self.sums[j] = DEAD;
                    self.dead += 1;
                }
            }
            best.truncate(half);
        }
        let mut chosen: Vec<u32> = best.iter().map(|x| (x & ((1 << 26) - 1)) as u32).collect();
        chosen.sort_unstable();
        chosen.extend(window as u32..slots as u32);
        chosen
    }

    /// Retire a slot whatever its sum: its weights are struck from the rows.
    fn retire(&mut self, slot: usize) {
        for row in &mut self.history {
            match row {
                WeightRow::Dense(w) => {
                    if let Some(x) = w.get_mut(slot) {
                        *x = 0;
                    }
                }
                WeightRow::Sparse(w) => w.retain(|x| x.0 as usize != slot),
            }
        }
        self.sums[slot] = DEAD;
        self.dead += 1;
    }

    /// Record the newest row's weights.
    fn record(&mut self, chosen: &[u32], weight: impl Fn(usize) -> f32) {
        let mut row = Vec::with_capacity(chosen.len());
        for &j in chosen {
            let w = fixed(weight(j as usize));
            if w > 0 {
                row.push((j, w));
                self.sums[j as usize] += i64::from(w);
            }
        }
        self.history.push_back(WeightRow::Sparse(row));
    }

    /// Drop dead slots from the stores once they are worth the copying.
    fn compact(&mut self) {
        if self.dead < 64.max(self.positions.len() / 8) {
            return;
        }
        let keep: Vec<u32> = (0..self.sums.len()).filter(|&j| self.sums[j] != DEAD).map(|j| j as u32).collect();
        let mut to = vec![u32::MAX; self.sums.len()];
        for (new, &old) in keep.iter().enumerate() {
            to[old as usize] = new as u32;
        }
        self.k.iter_mut().chain(&mut self.v).for_each(|s| s.retain(&keep));
        self.positions = keep.iter().map(|&j| self.positions[j as usize]).collect();
        self.sums = keep.iter().map(|&j| self.sums[j as usize]).collect();
        for row in &mut self.history {
            let mut moved = Vec::new();
            row.for_each(|j, w| {
                if w > 0 && to[j] != u32::MAX {
                    moved.push((to[j], w));
                }
            });
            moved.shrink_to_fit();
            *row = WeightRow::Sparse(moved);
        }
        self.dead = 0;
    }

    fn visit(&mut self, chosen: &[u32]) {
        self.visited = Some(chosen.iter().map(|&j| self.positions[j as usize]).collect());
    }

    fn push(&mut self, k: &[f32], v: &[f32], n: usize, from: usize, rows: usize) {
        let d = self.ctx.head_dim;
        for g in 0..self.ctx.num_kv_heads {
            let span = (g * n + from) * d..(g * n + from + rows) * d;
            self.k[g].push(&k[span.clone()]);
            self.v[g].push(&v[span]);
        }
    }

    fn row(&mut self, s: &Step, i: usize, out: &mut [f32]) -> Result<Work> {
        self.push(s.k, s.v, s.n, i, 1);
        self.add_slot();
        let chosen = self.choose();
        let (d, n, h, hkv) = (self.ctx.head_dim, s.n, self.ctx.num_heads, self.ctx.num_kv_heads);
        let (group, slots) = (h / hkv, self.positions.len());
        let q = batch::stack_rows(s.q, 0, h, n, d, i..i + 1);
        let scale = self.ctx.scale;
        // Attention weights per K/V head, over the chosen tokens.
        let parts: Vec<(Vec<f32>, Work)> = self
            .k
            .par_iter()
            .enumerate()
            .map(|(g, k)| -> Result<_> {
                let mut scores = vec![0f32; group * slots];
                let q = &q[g * group * d..(g + 1) * group * d];
                let work = key_scores(q, d, k.codec(), slots, &mut scores, Isa::active())?;
                let mut weights = vec![0f32; chosen.len()];
                for row in scores.chunks_exact(slots) {
                    let mut x: Vec<f32> = chosen.iter().map(|&j| row[j as usize]).collect();
                    let sum = batch::exp_row(&mut x, scale);
                    weights.iter_mut().zip(&x).for_each(|(w, x)| *w += x / sum);
                }
                Ok((weights, work))
            })
            .collect::<Result<_>>()?;
        let (mut weights, mut work) = (vec![0f32; slots], Work::default());
        for (part, w) in &parts {
            work += *w;
            for (&j, x) in chosen.iter().zip(part) {
                weights[j as usize] += x;
            }
        }
        let segments: Vec<Vec<Segment>> = self
            .k
            .iter()
            .zip(&self.v)
            .map(|(k, v)| vec![Segment { k: k.codec(), v: v.codec(), len: slots, channels: None }])
            .collect();
        let select = KeyLists { heads: vec![HeadKeys::from_lists(1, vec![chosen.clone()]); h] };
        let (mut o, mut lse) = (vec![0f32; h * d], vec![0f32; h]);
        work += Decode::new(scale).run(&q, [h, 1, d], &segments, d, Some(&select), &mut o, &mut lse)?;
        batch::unstack_rows(&o, out, 0, h, n, d, i..i + 1);
        self.visit(&chosen);
        self.record(&chosen, |j| weights[j]);
        self.compact();
        Ok(work)
    }

    /// Rows of one step in blocks: scores of a block by matrix products, then row by row (each
    /// choice depends on the weights before it), then the block's values.
    fn rows(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        let (d, n, h, hkv) = (self.ctx.head_dim, s.n, self.ctx.num_heads, self.ctx.num_kv_heads);
        let (group, scale) = (h / hkv, self.ctx.scale);
        self.push(s.k, s.v, n, 0, n);
        let flat: Vec<(Vec<f32>, Vec<f32>)> =
            self.k.par_iter().zip(&self.v).map(|(k, v)| (k.to_f32(), v.to_f32())).collect();
        let mut work = Work::default();
        work.bytes += self.k.iter().chain(&self.v).map(|s| s.bytes() as u64).sum::<u64>();
        let block = batch::tile_rows(group, self.positions.len() + n).min(32);
        let mut i = 0;
        while i < n {
            let rows = block.min(n - i);
            let slots = self.positions.len() + rows;
            let mut scores: Vec<Vec<f32>> = flat
                .par_iter()
                .enumerate()
                .map(|(g, (k, _))| {
                    let q = batch::stack_rows(s.q, g, group, n, d, i..i + rows);
                    let mut x = vec![0f32; group * rows * slots];
                    gemm::abt(group * rows, slots, d, 1.0, &q, d, k, d, &mut x);
                    x
                })
                .collect();
            let mut read = vec![0f32; slots];
            let mut weights = vec![0f32; slots];
            for r in 0..rows {
                self.add_slot();
                let chosen = self.choose();
                let seen = self.positions.len();
                // 0 where the row reads, −∞ elsewhere: added to every head's scores.
                read.fill(f32::NEG_INFINITY);
                chosen.iter().for_each(|&j| read[j as usize] = 0.0);
                weights[..seen].fill(0.0);
                for x in &mut scores {
                    for a in 0..group {
                        let row = &mut x[(a * rows + r) * slots..][..slots];
                        row[seen..].fill(0.0);
                        let row = &mut row[..seen];
                        row.iter_mut().zip(&read).for_each(|(x, m)| *x += m);
                        let sum = batch::exp_row(row, scale);
                        let inv = if sum > 0.0 { 1.0 / sum } else { 0.0 };
                        for (x, w) in row.iter_mut().zip(&mut weights) {
                            *x *= inv;
                            *w += *x;
                        }
                    }
                }
                work.pairs += (h * chosen.len()) as u64;
                if i + r + 1 == n {
                    self.visit(&chosen);
                }
                self.record(&chosen, |j| weights[j]);
            }
            let parts: Vec<Vec<f32>> = scores
                .par_iter()
                .zip(&flat)
                .map(|(x, (_, v))| {
                    let mut o = vec![0f32; group * rows * d];
                    gemm::ab(group * rows, d, slots, x, v, &mut o);
                    o
                })
                .collect();
            for (g, o) in parts.iter().enumerate() {
                batch::unstack_rows(o, out, g, group, n, d, i..i + rows);
            }
            work.flops += 4 * (h * rows * slots * d) as u64;
            work.tiles += hkv as u64;
            i += rows;
        }
        self.compact();
        Ok(work)
    }
}

impl LayerCache for Layer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        batch::check_prompt(CARD.id, &self.ctx, p, false)?;
        let (d, hkv, t) = (self.ctx.head_dim, self.ctx.num_kv_heads, p.len);
        let group = self.ctx.num_heads / hkv;
        self.push(p.k, p.v, t, 0, t);
        (0..t).for_each(|_| self.add_slot());
        let rows = self.cfg.rows(t + 1).min(p.q_len);
        if rows == 0 {
            return Ok(());
        }
        let per_head: Vec<Vec<f32>> = (0..hkv)
            .into_par_iter()
            .map(|g| {
                let mut sums = vec![0f32; rows * t];
                for a in g * group..(g + 1) * group {
                    let q = &p.q_obs[((a + 1) * p.q_len - rows) * d..(a + 1) * p.q_len * d];
                    let mut x = vec![0f32; rows * t];
                    gemm::abt(rows, t, d, 1.0, q, d, &p.k[g * t * d..(g + 1) * t * d], d, &mut x);
                    for (r, row) in x.chunks_exact_mut(t).enumerate() {
                        let visible = t - rows + r + 1;
                        row[visible..].fill(f32::NEG_INFINITY);
                        row[..batch::window_from(&self.ctx, visible)].fill(f32::NEG_INFINITY);
                        let inv = 1.0 / batch::exp_row(row, self.ctx.scale);
                        let sums = &mut sums[r * t..(r + 1) * t];
                        sums.iter_mut().zip(row).for_each(|(s, x)| *s += *x * inv);
                    }
                }
                sums
            })
            .collect();
        for r in 0..rows {
            let row: Vec<u32> = (0..t).map(|j| fixed(per_head.iter().map(|x| x[r * t + j]).sum::<f32>())).collect();
            self.sums.iter_mut().zip(&row).for_each(|(s, &w)| *s += i64::from(w));
            self.history.push_back(WeightRow::Dense(row));
        }
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        batch::check_step(CARD.id, &self.ctx, s, out, self.total, false)?;
        if s.n >= BATCH_FROM {
            return self.rows(s, out);
        }
        let mut work = Work::default();
        for i in 0..s.n {
            work += self.row(s, i, out)?;
        }
        Ok(work)
    }

    fn len(&self) -> usize {
        self.total
    }

    fn resident(&self) -> Resident {
        Resident {
            keys: self.k.iter().map(RowStore::bytes).sum(),
            values: self.v.iter().map(RowStore::bytes).sum(),
            aux: size_of_val(self.positions.as_slice())
                + size_of_val(self.sums.as_slice())
                + self.history.iter().map(WeightRow::bytes).sum::<usize>(),
        }
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }

    fn last_visited(&self) -> Option<Vec<Vec<u32>>> {
        self.visited.as_ref().map(|v| vec![v.clone(); self.ctx.num_heads])
    }
}
