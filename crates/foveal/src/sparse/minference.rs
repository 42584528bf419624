//! MInference 1.0: one dynamic sparse pattern per head (Jiang et al. 2024, arXiv 2407.02490).
//!
//! * `vertical-slash`: P = causal softmax of scale · Q_last K^T for the last `last_q` queries.
//!   vertical(j) = Σ_i P(i, j); slash(δ) = Σ_i P(i, i − δ). The first `sinks` columns and the
//!   nearest `recent` diagonals are taken, then the largest, `vertical_size` and `slash_size` in
//!   all. A query block visits every key block that one of the diagonals crosses, and the columns
//!   outside these blocks as single keys.
//! * `a-shape`: the first `init` keys and the last `local` keys.
//! * `block-sparse`: the `blocks` key blocks of largest mean(q)·mean(k), the diagonal included.
//! * `dense`: everything.
//!
//! q (Tq, D), k (Tk, D) → blocks and, for vertical-slash, single keys. Cost of the estimates:
//! vertical-slash 2·last_q·T·D, a-shape nothing, block-sparse T²·D/block_size²;
//! extra memory last_q·T, none, O(T).
//!
//! Which pattern with which sizes suits a head is found offline by [`search`].

use super::estimate::{SOFTMAX_FLOPS, bytes, hide};
use super::search::{Judge, cost};
use super::{HeadProblem, HeadSelection, Mat, Selector};
use crate::error::Result;
use crate::prim::gemm::{self, Columns, Rows, abt};
use crate::prim::pool::{column_exp, column_max, mean_blocks};
use crate::prim::select::topk;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, Spec, System, configure, params_of};
use foveal_kernels::{HeadKeys, HeadTable, Work};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ops::Range;

/// What a head visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Columns and diagonals estimated from the last queries.
    #[default]
    VerticalSlash,
    /// First and last keys.
    AShape,
    /// Best blocks by their means.
    BlockSparse,
    /// Everything.
    Dense,
}

/// Parameters. The four sizes are counts from 1 on, and shares of the keys (of the key blocks for
/// `blocks`) below 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MInference {
    /// Pattern of the head.
    pub pattern: Pattern,
    /// Columns (vertical-slash).
    pub vertical_size: f64,
    /// Diagonals (vertical-slash).
    pub slash_size: f64,
    /// First keys (a-shape).
    pub init: usize,
    /// Last keys, the query's own included (a-shape).
    pub local: f64,
    /// Key blocks per query block (block-sparse).
    pub blocks: f64,
    /// Cap on vertical_size, slash_size and blocks where they are counts, as a share.
    pub max_share: f64,
    /// Queries at the end of the prompt that the estimate looks at.
    pub last_q: usize,
    /// Columns taken in any case.
    pub sinks: usize,
    /// Diagonals taken in any case.
    pub recent: usize,
    /// Queries and keys per block.
    pub block_size: usize,
}

impl Default for MInference {
    fn default() -> Self {
        Self {
            pattern: Pattern::VerticalSlash,
            vertical_size: 1000.0,
            slash_size: 6096.0,
            init: 128,
            local: 1024.0,
            blocks: 100.0,
            max_share: 0.05,
            last_q: 64,
            sinks: 30,
            recent: 100,
            block_size: 64,
        }
    }
}

impl Config for MInference {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("pattern", "vertical-slash, a-shape, block-sparse or dense"),
        ("vertical_size", "vertical-slash: columns; a count from 1 on, below 1 a share of the keys"),
        ("slash_size", "vertical-slash: diagonals; a count from 1 on, below 1 a share of the keys"),
        ("init", "a-shape: first keys"),
        ("local", "a-shape: last keys, the query's own included; a count from 1 on, below 1 a share of the keys"),
        ("blocks", "block-sparse: key blocks per query block; a count from 1 on, below 1 a share of the key blocks"),
        ("max_share", "cap on vertical_size, slash_size and blocks where they are counts, as a share; 1 = no cap"),
        ("last_q", "queries at the end of the prompt that the vertical-slash estimate looks at"),
        ("sinks", "vertical-slash: first columns, taken in any case"),
        ("recent", "vertical-slash: nearest diagonals, taken in any case"),
        ("block_size", "queries and keys per block"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        for (name, x) in [
            ("vertical_size", self.vertical_size),
            ("slash_size", self.slash_size),
            ("local", self.local),
            ("blocks", self.blocks),
        ] {
            if !(x >= 0.0 && x.is_finite()) {
                return Err(format!("{name} = {x}: use a count from 1 on or a share from 0 to 1"));
            }
        }
        if !(0.0..=1.0).contains(&self.max_share) {
            return Err(format!("max_share = {}: use a share from 0 to 1", self.max_share));
        }
        if self.last_q == 0 || self.block_size == 0 {
            return Err(format!("last_q = {}, block_size = {}: use at least 1", self.last_q, self.block_size));
        }
        Ok(())
    }
}

/// A size: a share of `n` below 1, else a count of at most `cap` · `n`.
fn size(x: f64, n: usize, cap: f64) -> usize {
    let count = if x < 1.0 { x * n as f64 } else { x.min(cap * n as f64) };
    (count.ceil() as usize).min(n)
}

impl Selector for MInference {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        if p.q.rows == 0 {
            return Ok((HeadSelection::dense(p), Work::default()));
        }
        Ok(match self.pattern {
            Pattern::VerticalSlash => self.vertical_slash(p),
            Pattern::AShape => (self.a_shape(p), Work::default()),
            Pattern::BlockSparse => self.block_sparse(p),
            Pattern::Dense => (HeadSelection::dense(p), Work::default()),
        })
    }
}

impl MInference {
    fn vertical_slash(&self, p: &HeadProblem) -> (HeadSelection, Work) {
        let (tq, tk) = (p.q.rows, p.k.rows);
        let (vertical, slash) =
            (size(self.vertical_size, tk, self.max_share), size(self.slash_size, tk, self.max_share));
        if vertical >= tk || slash >= tk {
            // All columns, or all diagonals, are everything: nothing to estimate.
            let all = Lines { columns: Vec::new(), diagonals: (0..tk as u32).collect(), keys: 0..tk };
            return (cover(self.block_size, [tq, tk], |_, _| [&all]), Work::default());
        }
        let (lines, work) = self.lines(p, self.last_q, std::slice::from_ref(&(0..tk)));
        (cover(self.block_size, [tq, tk], |_, _| &lines), work)
    }

    /// The heaviest columns and diagonals of each of these ranges of keys, as the last `last_q` queries weigh them; a size
    /// that is a share is one of the range's columns, or of all diagonals.
    pub(super) fn lines(&self, p: &HeadProblem, last_q: usize, ranges: &[Range<usize>]) -> (Vec<Lines>, Work) {
        let (tq, tk, d) = (p.q.rows, p.k.rows, p.q.cols);
        let mut work = Work::default();
        let m = last_q.min(tq);
        let k = Rows::of(&p.k, 1, p.precision);
        let mut q = Columns::new(m, 1, d, p.scale, p.precision);
        q.fill(m, |i, _| Some(p.q.row(tq - m + i)));
        let mut scores = Vec::new();
        work.flops += gemm::scores(&k, 0..tk, &q, &mut scores);
        work.bytes += bytes(m + tk, d);
        let stride = q.stride();
        let scores = &mut scores[..tk * stride];
        let before = tk - m;
        hide(scores, stride, m, |i| before + i + 1);
        let mut top = vec![f32::NEG_INFINITY; stride];
        column_max(scores, &mut top);
        let mut inv = vec![0f32; stride];
        column_exp(scores, &top, &mut inv);
        inv.iter_mut().for_each(|s| *s = 1.0 / *s);
        let mut vertical = vec![0f32; tk];
        let mut slash = vec![0f32; tk];
        let of = |keys: &Range<usize>| {
            slash.fill(0.0);
            let rows = scores.chunks_exact(stride).enumerate().take(keys.end).skip(keys.start);
            for ((j, row), v) in rows.zip(&mut vertical[keys.clone()]) {
                // Column i is the query at position before + i: diagonals of a key are consecutive.
                let first = j.saturating_sub(before);
                *v = spread(&row[first..m], &inv[first..m], &mut slash[before + first - j..]);
            }
            vertical[..self.sinks.min(tk)].fill(f32::INFINITY);
            slash[..self.recent.max(1).min(tk)].fill(f32::INFINITY);
            let n = keys.len();
            let columns = size(self.vertical_size, n, self.max_share).max(self.sinks.saturating_sub(keys.start).min(n));
            let columns = topk(&vertical[keys.clone()], columns).into_iter().map(|j| j + keys.start as u32).collect();
            let diagonals = size(self.slash_size, tk, self.max_share).max(self.recent.max(1));
            Lines { columns, diagonals: topk(&slash, diagonals), keys: keys.clone() }
        };
        let lines = ranges.iter().map(of).collect();
        work.flops += ((SOFTMAX_FLOPS + 3) * (m * before + m * (m + 1) / 2)) as u64;
        (lines, work)
    }

    fn a_shape(&self, p: &HeadProblem) -> HeadSelection {
        let (tq, tk, b) = (p.q.rows, p.k.rows, self.block_size);
        let local = size(self.local, tk, 1.0).max(1);
        let lists = (0..tq)
            .step_by(b)
            .map(|r0| {
                let end = p.visible((r0 + b).min(tq) - 1);
                let near = (p.visible(r0).saturating_sub(local) / b) as u32;
                let init = (self.init.min(tk).div_ceil(b) as u32).min(near);
                (0..init).chain(near..end.div_ceil(b) as u32).collect()
            })
            .collect();
        HeadSelection::of_blocks(HeadTable::from_lists(b, b, lists))
    }

    fn block_sparse(&self, p: &HeadProblem) -> (HeadSelection, Work) {
        let (tq, tk, d, off, b) = (p.q.rows, p.k.rows, p.q.cols, p.offset(), self.block_size);
        let (nq, nk) = (tq.div_ceil(b), tk.div_ceil(b));
        let n = size(self.blocks, nk, self.max_share).max(1);
        let (q, k) = (mean_blocks(&p.q, b), mean_blocks(&p.k, b));
        let mut work = Work { flops: ((tq + nq + tk + nk) * d) as u64, bytes: bytes(tq + tk, d), ..Work::default() };
        let mut scores = vec![0f32; PANEL.min(nq) * nk];
        let mut lists = Vec::with_capacity(nq);
        for q0 in (0..nq).step_by(PANEL) {
            let m = PANEL.min(nq - q0);
            work.flops += abt(m, nk, d, 1.0, &q[q0 * d..], d, &k, d, &mut scores);
            work.bytes += bytes(m + nk, d);
            for (i, row) in scores[..m * nk].chunks_exact_mut(nk).enumerate() {
                let (r0, r1) = ((q0 + i) * b, ((q0 + i + 1) * b).min(tq));
                let (own, end) = ((off + r0) / b, (off + r1 - 1) / b + 1);
                row[own..end].fill(f32::INFINITY);
                lists.push(topk(&row[..end], n.max(end - own)));
            }
        }
        (HeadSelection::of_blocks(HeadTable::from_lists(b, b, lists)), work)
    }

    /// The parameters that differ from the defaults, as a plan writes them.
    pub fn spec(&self) -> Spec {
        let mut spec = Spec::new(CARD.id);
        let all = |c: &MInference| serde_json::to_value(c).unwrap_or(Value::Null);
        let (mine, default) = (all(self), all(&MInference::default()));
        for (name, _) in Self::DOCS {
            if mine[name] != default[name] {
                spec.params.insert((*name).into(), mine[name].clone());
            }
        }
        spec
    }
}

/// Columns and diagonals to visit of some keys.
pub(super) struct Lines {
    columns: Vec<u32>,
    /// Distances of key and query, ascending.
    diagonals: Vec<u32>,
    keys: Range<usize>,
}

/// For each block of queries, at positions `first..=last`, the key blocks that a diagonal of its `lines` crosses within
/// the line's keys, and the columns outside of these blocks as single keys.
pub(super) fn cover<'a, I: IntoIterator<Item = &'a Lines> + Clone>(
    b: usize,
    [tq, tk]: [usize; 2],
    lines: impl Fn(usize, usize) -> I,
) -> HeadSelection {
    let (nq, off) = (tq.div_ceil(b), tk - tq);
    let mut table =
        HeadTable { block_q: b, block_k: b, indptr: Vec::with_capacity(nq + 1), blocks: Vec::new(), rows: None };
    let mut lists = HeadKeys { group: b, indptr: Vec::with_capacity(nq + 1), keys: Vec::new() };
    table.indptr.push(0);
    lists.indptr.push(0);
    let mut covered = vec![false; tk.div_ceil(b)];
    for r0 in (0..tq).step_by(b) {
        let (first, last) = (off + r0, off + (r0 + b).min(tq) - 1);
        let of = lines(first, last);
        for l in of.clone().into_iter().filter(|l| !l.keys.is_empty()) {
            let (low, high) = (l.keys.start / b, (l.keys.end - 1) / b);
            for &delta in l.diagonals.iter().take_while(|&&d| d as usize <= last) {
                let delta = delta as usize;
                let (from, to) = (first.saturating_sub(delta) / b, (last - delta) / b);
                covered[from.max(low)..(to.min(high) + 1).max(from.max(low))].fill(true);
            }
        }
        let at = lists.keys.len();
        for l in of {
            lists.keys.extend(l.columns.iter().filter(|&&j| j as usize <= last && !covered[j as usize / b]));
        }
        lists.keys[at..].sort_unstable();
        let mut end = at;
        for i in at..lists.keys.len() {
            if end == at || lists.keys[end - 1] != lists.keys[i] {
                lists.keys[end] = lists.keys[i];
                end += 1;
            }
        }
        lists.keys.truncate(end);
        lists.indptr.push(end);
        for (x, hit) in covered[..last / b + 1].iter_mut().enumerate() {
            if std::mem::take(hit) {
                table.blocks.push(x as u32);
            }
        }
        table.indptr.push(table.blocks.len());
    }
    HeadSelection::of_both(table, lists)
}

/// to[i] += x[i] · by[i]; returns the sum of these products, in eight chains.
fn spread(x: &[f32], by: &[f32], to: &mut [f32]) -> f32 {
    let to = &mut to[..x.len()];
    let (x8, x1) = x.as_chunks::<8>();
    let (b8, b1) = by.as_chunks::<8>();
    let (t8, t1) = to.as_chunks_mut::<8>();
    let mut sums = [0f32; 8];
    for ((x, b), t) in x8.iter().zip(b8).zip(t8) {
        for c in 0..8 {
            let y = x[c] * b[c];
            t[c] += y;
            sums[c] += y;
        }
    }
    let mut sum = sums.iter().sum::<f32>();
    for ((x, b), t) in x1.iter().zip(b1).zip(t1) {
        *t += x * b;
        sum += x * b;
    }
    sum
}

/// Query blocks scored by one product.
const PANEL: usize = 64;

/// What [`search`] tries.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchOptions {
    /// Cost that every candidate is scaled to, as a share of dense causal attention.
    pub budget: f64,
    /// Cost of a pair visited as a single key over that of a pair inside a block: how much dearer
    /// gathering is on this machine's kernels.
    pub gather_cost: f64,
    /// Largest relative output error that a pattern may have; a head whose every pattern is worse
    /// stays dense, whatever that costs. Infinity takes the best pattern in any case.
    pub max_error: f64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self { budget: 0.3, gather_cost: super::search::GATHER_COST, max_error: 0.5 }
    }
}

/// One candidate of [`search`].
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Parameters; sizes are shares, so that they carry over to other lengths.
    pub config: MInference,
    /// ‖O − O_exact‖ / ‖O_exact‖ over the head's whole output.
    pub error: f64,
    /// Estimated cost as a share of dense causal attention: tiles, gathers and the estimate.
    pub cost: f64,
}

/// Result of [`search`].
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What the head should use: the first of `tried`, or dense attention where that is worse than
    /// [`SearchOptions::max_error`].
    pub best: Candidate,
    /// All candidates, those within the budget first, in order of error.
    pub tried: Vec<Candidate>,
}

/// The offline pattern search for one head on a calibration prompt: of several patterns and
/// ratios of sizes, each scaled to the same cost, the one whose output is nearest to exact
/// attention, or dense if even that is too far off. `v` is (Tk, Dv). The prompt should be of the length at which the plan will run, or
/// near it; 2,048 tokens and more tell the patterns apart.
pub fn search(p: &HeadProblem, v: &Mat, options: &SearchOptions) -> Result<Found> {
    let tk = p.k.rows;
    let judge = Judge::new(p, v)?;

    let base = MInference { max_share: 1.0, ..MInference::default() };
    // Ratios of columns to diagonals, from the authors' search space, as directions in which
    // both sizes grow together.
    let ratios = [(30.0, 800.0), (100.0, 750.0), (500.0, 700.0), (1000.0, 6096.0), (3500.0, 100.0)];
    let mut tried = Vec::new();
    let mut consider = |at: &dyn Fn(f64) -> MInference| -> Result<()> {
        // Largest x in [0, 1] within the budget; x is the largest of the shares.
        let (mut lo, mut hi) = (0.0, 0.999);
        for _ in 0..10 {
            let mid = (lo + hi) / 2.0;
            if cost(&at(mid), p, v.cols, options.gather_cost)? <= options.budget { lo = mid } else { hi = mid }
        }
        let config = at(lo);
        if tried.iter().any(|c: &Candidate| c.config == config) {
            return Ok(());
        }
        let cost = cost(&config, p, v.cols, options.gather_cost)?;
        let error = judge.error(config.select(p)?.0)?;
        tried.push(Candidate { config, error, cost });
        Ok(())
    };
    // Four digits: what a plan shows is what it runs.
    let share = |x: f64| (x * 1e4).floor() / 1e4;
    for (v0, s0) in ratios {
        let top: f64 = f64::max(v0, s0);
        consider(&|x| MInference {
            vertical_size: share(x * v0 / top),
            slash_size: share(x * s0 / top),
            ..base.clone()
        })?;
    }
    let init = base.init.min(tk / 4);
    consider(&|x| MInference { pattern: Pattern::AShape, init, local: share(x), ..base.clone() })?;
    consider(&|x| MInference { pattern: Pattern::BlockSparse, blocks: share(x), ..base.clone() })?;
    // A candidate whose smallest form is over the budget does not compete with those within it.
    let over = |c: &Candidate| c.cost > options.budget * 1.05;
    tried.sort_by(|a, b| over(a).cmp(&over(b)).then(a.error.total_cmp(&b.error)));
    let best = if tried[0].error <= options.max_error {
        tried[0].clone()
    } else {
        Candidate { config: MInference { pattern: Pattern::Dense, ..MInference::default() }, error: 0.0, cost: 1.0 }
    };
    Ok(Found { best, tried })
}

/// Card.
pub const CARD: Card = Card {
    id: "minference",
    title: "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    authors: "Jiang et al., 2024",
    arxiv: "2407.02490",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::CausalMask,
        Law::ExactAt(&[("vertical_size", "1000000000"), ("max_share", "1")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "slash_size", values: &["0.02", "0.05", "0.1", "0.3", "0.9"] },
    ],
    equation: "vertical-slash: P = causal softmax of scale·Q_last·K^T;  vertical(j) = sum_i P(i,j);  \
               slash(d) = sum_i P(i,i-d)\n\
               visit the largest columns and every block that a largest diagonal crosses\n\
               a-shape: first `init` and last `local` keys;  block-sparse: top blocks by mean(q)·mean(k)",
    cost: "estimates 2·last_q·T·D, 0, T²·D/block_size²; attention by the sizes; O(last_q·T) extra memory at most",
    choices: &[
        "The paper's sizes (1000 columns, 6096 diagonals, 100 blocks of 64) are meant for 128k tokens, of which 6096 \
         and 6400 are 5 %; at 2k to 8k they would be all of the prompt. Counts are therefore capped at max_share = \
         0.05 of the keys, the paper's own share; max_share=1 gives the absolute sizes.",
        "Sizes below 1 are shares of the keys, so that a plan found at one length serves another.",
        "The kernel of the authors starts its slash blocks anywhere; here a diagonal takes the aligned blocks that it \
         crosses, up to two where theirs takes one.",
        "The first 30 columns and the nearest 100 diagonals are forced as in the authors' inference kernel (their \
         search forces 30 diagonals); the sizes count them and are never below them.",
        "a-shape rounds its window outwards to blocks. block-sparse always takes the diagonal block, and a short last \
         block is averaged over the rows it has.",
        "The authors' search scores by recall (v1) or by the number of outputs off by 0.005 (v2) and stores \
         block-sparse and a-shape heads as vertical-slash; here the score is the relative output error, and the \
         pattern found is the pattern used.",
        "The authors' search takes a head's best pattern however bad it is (only whole layers below `starting_layer` \
         stay dense). Within a fixed budget a short prompt can leave nothing but bad ones: here a head whose best \
         pattern has a relative output error above 0.5 (--max-error) stays dense, and the plan says so.",
    ],
    params: params_of::<MInference>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<MInference>(CARD.id, params)?)))
}
