//! LLSA: log-linear sparse attention over a pyramid of pooled tokens (Zhou et al. 2025, arXiv 2512.16615).
//!
//! Level l of the pyramid holds the means of b^l tokens of q, k and v. At the coarsest level L each pooled query chooses
//! the `topk` pooled keys of largest q̄·k̄; at every level below, a pooled query scores the children of its parent's
//! choice alone and chooses `topk` of them. A block of b queries then attends, in one softmax, to the tokens of the blocks
//! that it chose, to the level-l tokens that were scored on its way (all of level L), each weighed by its tokens:
//! e^{s + ln n}.
//!
//! q (B, H, T, D) → (B, H, T, Dv). Cost: 2·D·b·topk·T·(1/b + 1/b² + …) + 2·D·(T/b^L)² flops to choose; topk·b·L + T/b^L keys
//! a query, with L so that T/b^L stays bounded: O(T·log T).

use super::estimate::bytes;
use super::run::with_rows;
use super::{Domain, Grid, Mat};
use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::abt;
use crate::prim::pool::mean_blocks;
use crate::prim::select::topk;
use crate::prim::{AttendBias, AttendOptions, attend, attend_indexed};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use foveal_kernels::{HeadKeys, KeyLists, Work};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Llsa {
    /// Tokens per block, and tokens of a level that one of the next level stands for.
    pub block_size: usize,
    /// Levels above the tokens; 0: as few as leave less than 1,024 tokens at the top.
    pub levels: usize,
    /// Children chosen at each level.
    pub topk: usize,
    /// Leave pooled tokens out where what they stand for is visited at the level below.
    pub disjoint: bool,
}

impl Default for Llsa {
    fn default() -> Self {
        Self { block_size: 16, levels: 0, topk: 8, disjoint: false }
    }
}

impl Config for Llsa {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        (
            "block_size",
            "tokens per block and children per pooled token; of a square number a grid is put in nested squares",
        ),
        ("levels", "levels above the tokens; 0: as few as leave less than 1,024 tokens at the top"),
        ("topk", "pooled tokens that each pooled query chooses at each level"),
        (
            "disjoint",
            "leave a pooled token out where its children are visited; not in the paper, exact with all chosen",
        ),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size < 2 || self.topk == 0 {
            return Err(format!(
                "block_size = {}, topk = {}: use at least 2 tokens per block and choose at least 1",
                self.block_size, self.topk
            ));
        }
        Ok(())
    }
}

/// Tokens at the top that the automatic number of levels stays below.
const TOP: usize = 1024;

impl Llsa {
    /// Levels above `t` tokens: never more than it takes to come to one token.
    fn levels(&self, t: usize) -> usize {
        let (mut n, mut levels) = (t, 0);
        while n > 1 && if self.levels == 0 { levels == 0 || n >= TOP } else { levels < self.levels } {
            n = n.div_ceil(self.block_size);
            levels += 1;
        }
        levels
    }

    /// The lists of one head, over tokens followed by level 1, level 2, …; and the work of choosing.
    fn choose(&self, q: &Mat, k: &Mat, levels: usize) -> (HeadKeys, Work) {
        let (b, d, t) = (self.block_size, q.cols, k.rows);
        let mut work = Work { bytes: bytes(2 * t, d), ..Work::default() };
        // chosen[l − 1][i]: what pooled query i of level l chose.
        let mut chosen: Vec<Vec<Vec<u32>>> = vec![Vec::new(); levels];
        let mut rows = Vec::new();
        let mut scores = Vec::new();
        for l in (1..=levels).rev() {
            let span = b.pow(l as u32);
            let (pq, pk) = (mean_blocks(q, span), mean_blocks(k, span));
            let (nq, nk) = (q.rows.div_ceil(span), t.div_ceil(span));
            work.flops += (2 * t * d) as u64;
            let mut of = Vec::with_capacity(nq);
            if l == levels {
                scores.resize(nq * nk, 0.0);
                work.flops += abt(nq, nk, d, 1.0, &pq, d, &pk, d, &mut scores);
                of.extend(scores[..nq * nk].chunks_exact(nk).map(|s| topk(s, self.topk)));
            } else {
                for (parent, queries) in chosen[l].iter().zip(pq.chunks(b * d)) {
                    let among: Vec<u32> = children(parent, b, nk).collect();
                    rows.clear();
                    among.iter().for_each(|&j| rows.extend_from_slice(&pk[j as usize * d..(j as usize + 1) * d]));
                    let m = queries.len() / d;
                    scores.resize((m * among.len()).max(scores.len()), 0.0);
                    work.flops += abt(m, among.len(), d, 1.0, queries, d, &rows, d, &mut scores);
                    let scores = &scores[..m * among.len()];
                    of.extend(
                        scores
                            .chunks_exact(among.len())
                            .map(|s| topk(s, self.topk).into_iter().map(|x| among[x as usize]).collect::<Vec<u32>>()),
                    );
                    work.bytes += bytes(m + among.len(), d);
                }
            }
            chosen[l - 1] = of;
        }
        let mut lists = HeadKeys { group: b, indptr: vec![0], keys: Vec::new() };
        for i in 0..q.rows.div_ceil(b) {
            // Level 0 with its children of level 1's choice, up to the top with everything.
            let mut base = 0;
            for l in 0..=levels {
                let n = t.div_ceil(b.pow(l as u32));
                let gone: &[u32] = if self.disjoint && l > 0 { &chosen[l - 1][i / b.pow(l as u32 - 1)] } else { &[] };
                let mut name = |j: u32| {
                    if gone.binary_search(&j).is_err() {
                        lists.keys.push(base + j);
                    }
                };
                if l == levels {
                    (0..n as u32).for_each(&mut name);
                } else {
                    children(&chosen[l][i / b.pow(l as u32)], b, n).for_each(&mut name);
                }
                base += n as u32;
            }
            lists.indptr.push(lists.keys.len());
        }
        (lists, work)
    }
}

/// Children of these tokens among `n` of the level below.
fn children(of: &[u32], b: usize, n: usize) -> impl Iterator<Item = u32> + '_ {
    of.iter().flat_map(move |&c| c * b as u32..((c as usize + 1) * b).min(n) as u32)
}

/// Tokens of a sequence with a grid in which frames are in nested squares of side √b, √b², …: a block of b^l tokens
/// is a square. None if b is no square.
fn nested(grid: Grid, b: usize, levels: usize, tokens: usize) -> Option<Vec<u32>> {
    let side = b.isqrt();
    if side * side != b {
        return None;
    }
    let whole = side.checked_pow(levels as u32)?;
    let mut all: Vec<u32> = (0..tokens as u32).collect();
    all[grid.range()].sort_by_cached_key(|&i| {
        let [t, y, x] = grid.place(i as usize).unwrap_or_default();
        let mut digits = (t * grid.h.div_ceil(whole) + y / whole) * grid.w.div_ceil(whole) + x / whole;
        let mut unit = whole;
        while unit > 1 {
            unit /= side;
            digits = (digits * side + y / unit % side) * side + x / unit % side;
        }
        digits
    });
    Some(all)
}

/// x (B, H, T, D) followed by the means of b tokens, of b² and so on; b^levels in the end.
fn pyramid(x: &Tensor, b: usize, levels: usize) -> Result<Tensor> {
    let (bs, h, t, d) = x.dims4()?;
    let mut all = vec![x.clone()];
    let mut sums = x.clone();
    for l in 1..=levels {
        let n = sums.dim(2)?.div_ceil(b);
        let pad = n * b - sums.dim(2)?;
        let full = if pad > 0 { sums.pad_with_zeros(2, 0, pad)? } else { sums };
        sums = full.contiguous()?.reshape((bs, h, n, b, d))?.sum(3)?;
        let inverse: Vec<f32> = sizes(t, b.pow(l as u32)).map(|n| 1.0 / n as f32).collect();
        all.push(sums.broadcast_mul(&Tensor::from_vec(inverse, (n, 1), &Device::Cpu)?)?);
    }
    Ok(Tensor::cat(&all, 2)?)
}

/// Tokens of each of the blocks of `span` that cut `t` tokens.
fn sizes(t: usize, span: usize) -> impl Iterator<Item = usize> {
    (0..t.div_ceil(span)).map(move |i| span.min(t - i * span))
}

impl MixerSystem for Llsa {
    fn layer(&self, dims: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(Layer { llsa: self.clone(), grid: dims.grid }))
    }

    fn domain(&self) -> Domain {
        Domain::FULL
    }
}

struct Layer {
    llsa: Llsa,
    grid: Option<Grid>,
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((bs, h, tq, d), (_, hkv, t, _)) = (i.q.dims4()?, i.k.dims4()?);
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(foveal_kernels::KernelError::Groups { op: "llsa", heads: h, kv_heads: hkv }.into());
        }
        if tq != t {
            return Err(crate::Error::Shape {
                op: "llsa",
                tensor: "q",
                shape: i.q.dims().to_vec(),
                expected: format!("as many tokens as k's {t}: queries are pooled with their keys"),
            });
        }
        let b = self.llsa.block_size;
        let levels = self.llsa.levels(t);
        let mut options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        if levels == 0 {
            let a = attend(i.q, i.k, i.v, &options, None)?;
            return Ok(Mixed { out: a.out, work: a.work, select: Work::default(), loss: None, selections: Vec::new() });
        }
        let order = self.grid.and_then(|grid| nested(grid, b, levels, t));
        let index = |at: Vec<u32>| Tensor::from_vec(at, t, &Device::Cpu);
        let [q, k, v] = match &order {
            Some(at) => {
                let at = index(at.clone())?;
                [i.q, i.k, i.v].map(|x| x.contiguous()?.index_select(&at, 2))
            }
            None => [i.q, i.k, i.v].map(|x| Ok(x.clone())),
        };
        let (q, k, v) = (q?, k?, v?);
        let chosen: Vec<(HeadKeys, Work)> = with_rows("q", &q, |q, qs| {
            with_rows("k", &k, |k, ks| {
                let one = |bh: usize| {
                    let (bi, hi) = (bh / h, bh % h);
                    let q = Mat::new(&q[bi * qs[0] + hi * qs[1]..], t, d, qs[2]);
                    let k = Mat::new(&k[bi * ks[0] + hi / (h / hkv) * ks[1]..], t, d, ks[2]);
                    self.llsa.choose(&q, &k, levels)
                };
                (0..bs * h).into_par_iter().map(one).collect()
            })
        })??;
        let mut select: Work = chosen.iter().map(|c| c.1).sum();
        // Pooling k and v once for all heads of a group, here for the attention.
        select.flops += (2 * levels * bs * hkv * t * d) as u64;
        let lists = KeyLists { heads: chosen.into_iter().map(|c| c.0).collect() };
        let weights: Vec<f32> = (0..=levels).flat_map(|l| sizes(t, b.pow(l as u32))).map(|n| (n as f32).ln()).collect();
        let n = weights.len();
        options.bias = Some(AttendBias::Keys(Tensor::from_vec(weights, (1, 1, n), &Device::Cpu)?));
        let a = attend_indexed(&q, &pyramid(&k, b, levels)?, &pyramid(&v, b, levels)?, &options, &lists)?;
        let out = match order {
            Some(order) => {
                let mut back = vec![0u32; t];
                (0..).zip(&order).for_each(|(place, &token)| back[token as usize] = place);
                a.out.contiguous()?.index_select(&index(back)?, 2)?
            }
            None => a.out,
        };
        Ok(Mixed { out, work: a.work, select, loss: None, selections: Vec::new() })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "llsa",
    title: "Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers",
    authors: "Zhou et al., 2025",
    arxiv: "2512.16615",
    family: Family::Sparse,
    slots: &[Slot::Prefill, Slot::Mixer],
    laws: &[
        Law::ExactAt(&[("disjoint", "true"), ("topk", "1000000")]),
        Law::Work { pairs: Growth::LogLinear, flops: Growth::LogLinear },
        Law::Monotone { param: "topk", values: &["1", "2", "4", "16", "1000000"] },
        Law::Gradients,
    ],
    equation: "level l: means of b^l tokens; a pooled query chooses topk among the children of its parent's choice by q·k\n\
               block of queries: softmax over tokens of chosen blocks and pooled tokens scored on the way, e^(s + ln tokens)",
    cost: "choice O(T·D·topk); topk·b·levels + T/b^levels keys a query, O(T log T) in all",
    choices: &[
        "The published code weighs a pooled token by the tokens that it stands for, visits all of the coarsest level and, below it, the \
         children of what was chosen above; what is visited finely is counted in its coarse tokens again. So is the default here; \
         disjoint=true counts every token once, which makes a full choice exact, and is not in the paper.",
        "One level below 16,384 tokens and two from there on, blocks of 16 and 8 chosen: the published code; levels=0 continues that rule.",
        "Scores of pooled tokens are not scaled, as there, which changes no choice. A last block with fewer tokens is averaged and \
         weighed by what it has; the published code needs powers of two.",
        "A grid is put in nested squares before and back after, as the authors do for images; frames of a video follow one another, and \
         text stays where it is.",
        "On the made video of the grid_quality example (4x24x24 tokens), untrained, topk=16: relative error of the output 0.112 with the \
         published weights, 0.077 with disjoint=true, at a sixth of the dense pairs.",
    ],
    params: params_of::<Llsa>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Llsa>(CARD.id, params)?)))
}
