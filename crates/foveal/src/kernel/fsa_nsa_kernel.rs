//! FSA: keys-outer loop order for attention to selected blocks (Yan et al. 2025, Flash Sparse Attention).
//!
//! In the selected branch of native sparse attention (Yuan et al. 2025, arXiv 2502.11089) each query visits its own
//! few key blocks, shared by the heads of its group. A loop over queries fills the rows of a matrix tile with the
//! group's heads, few in most models. Here the loop over key blocks is the outer one: the queries that chose block b,
//! found in an inverse index built beforehand, are gathered and fill the rows, S_b = scale·Q_b K_bᵀ. Their
//! partial outputs and log-sum-exps go to a buffer, and a reduction merges each query's parts:
//! l = ln Σ_b e^{l_b}, o = Σ_b e^{l_b − l} o_b.
//!
//! [`keys_outer`] is that kernel for any lists of blocks. As a prefill system it runs over NSA's choice without its
//! trained parts: with k̄_b the mean of block b, a group's heads vote by Σ_h softmax_b(scale·q_h·k̄_b) over the complete
//! blocks of the past; the first `init_blocks` and the last `local_blocks` are taken in any case, `topk` in all.
//!
//! q (B, H, Tq, D), k (B, H_kv, Tk, D) → exact attention over the lists. Cost: 2·(D + Dv) flops for each query, head
//! and key listed; extra memory [`ROWS`]·group·(D + Dv) a K/V head.

use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::abt;
use crate::prim::pool::{mean_blocks, row_softmax};
use crate::prim::select::topk_into;
use crate::prim::{AttendOptions, Attended, attend};
use crate::sparse::{HeadSelection, Mat};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use foveal_kernels::{BlockTable, HeadTable, Work, merge_row};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Gathered queries of a head that are attended at once: what the buffer of partial outputs holds.
pub const ROWS: usize = 1 << 16;
/// Queries of a tile; what a block's queries leave of their last tile is spent on nothing.
const TILE: usize = 32;

/// The inverse of one K/V head's lists.
struct Inverse {
    /// Queries by the blocks that they see whole: `queries[indptr[b]..indptr[b + 1]]` of block b.
    indptr: Vec<usize>,
    queries: Vec<u32>,
    /// Blocks that reach past their query's own position.
    edge: HeadTable,
}

impl Inverse {
    /// `lists` has a query a row; query i sees keys up to `offset + i`.
    fn of(lists: &HeadTable, offset: usize, tk: usize) -> Self {
        let b = lists.block_k;
        let whole = |i: usize, x: u32| ((x as usize + 1) * b).min(tk) <= offset + i + 1;
        let rows = lists.indptr.windows(2).enumerate();
        let mut indptr = vec![0usize; tk.div_ceil(b) + 1];
        for (i, w) in rows.clone() {
            lists.blocks[w[0]..w[1]].iter().filter(|&&x| whole(i, x)).for_each(|&x| indptr[x as usize + 1] += 1);
        }
        (1..indptr.len()).for_each(|x| indptr[x] += indptr[x - 1]);
        let mut next = indptr.clone();
        let mut queries = vec![0u32; indptr.last().copied().unwrap_or(0)];
        let (mut edges, mut group) = (Vec::new(), 0);
        let mut edge = HeadTable { block_q: TILE, block_k: b, indptr: vec![0], blocks: Vec::new(), rows: Some(vec![]) };
        let mut close = |edges: &mut Vec<(u32, u64)>| {
            edges.sort_unstable();
            let marks = edge.rows.get_or_insert_default();
            for &(x, bit) in &*edges {
                // Only blocks of this tile: `marks` and `blocks` have grown alike.
                let fresh = edge.blocks.len() == edge.indptr[edge.indptr.len() - 1] || edge.blocks.last() != Some(&x);
                if fresh {
                    edge.blocks.push(x);
                    marks.push(0);
                }
                if let Some(m) = marks.last_mut() {
                    *m |= bit;
                }
            }
            edges.clear();
            edge.indptr.push(edge.blocks.len());
        };
        for (i, w) in rows {
            if i / TILE > group {
                close(&mut edges);
                group = i / TILE;
            }
            for &x in &lists.blocks[w[0]..w[1]] {
                if whole(i, x) {
                    queries[next[x as usize]] = i as u32;
                    next[x as usize] += 1;
                } else if x as usize * b <= offset + i {
                    edges.push((x, 1 << (i % TILE)));
                }
            }
        }
        if lists.indptr.len() > 1 {
            close(&mut edges);
        }
        Self { indptr, queries, edge }
    }
}

/// Causal attention of q (B, H, Tq, D) over k, v (B, H_kv, Tk, D) to the blocks of `lists`, one table with one query a
/// row (`block_q` = 1) for each (batch, K/V head), with key blocks in the outer loop. No gradients.
///
/// Errors: tables that are not of that kind or number, options other than `scale`, operands that track gradients.
pub fn keys_outer(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttendOptions,
    lists: &[HeadTable],
) -> Result<Attended> {
    const OP: &str = "keys_outer";
    let ((b, h, tq, _), (_, hkv, tk, _), (_, _, _, dv)) = (q.dims4()?, k.dims4()?, v.dims4()?);
    for (name, t) in [("q", q), ("k", k), ("v", v)] {
        if t.track_op() {
            return Err(Error::NoBackward { op: OP, tensor: name });
        }
    }
    if hkv == 0 || !h.is_multiple_of(hkv) {
        return Err(foveal_kernels::KernelError::Groups { op: OP, heads: h, kv_heads: hkv }.into());
    }
    let bad = |name: &'static str, value: String, remedy: &str| {
        Err(foveal_kernels::KernelError::Param { op: OP, name, value, remedy: remedy.into() }.into())
    };
    if lists.len() != b * hkv {
        return bad("lists", lists.len().to_string(), &format!("give one for each of {b}·{hkv} batches and K/V heads"));
    }
    if tk < tq {
        return bad("queries", tq.to_string(), "give at least as many keys as queries");
    }
    for t in lists {
        t.check(tq, tk)?;
        if t.block_q != 1 || t.rows.is_some() {
            return bad("block_q", t.block_q.to_string(), "use 1 and no row masks: a list for each query");
        }
    }
    let group = h / hkv;
    let head = |bh: usize| -> Result<(Vec<f32>, Vec<f32>, Work)> {
        let (bi, hi) = (bh / hkv, bh % hkv);
        let q = q.narrow(0, bi, 1)?.narrow(1, hi * group, group)?.contiguous()?;
        let (k, v) = (k.narrow(0, bi, 1)?.narrow(1, hi, 1)?, v.narrow(0, bi, 1)?.narrow(1, hi, 1)?);
        let inverse = Inverse::of(&lists[bh], tk - tq, tk);
        let edge = BlockTable { heads: vec![inverse.edge.clone(); group] };
        let first = attend(&q, &k, &v, &AttendOptions { causal: true, ..options.clone() }, Some(&edge))?;
        // Rows of (query, head), as attention returns them.
        let rows = |a: &Attended| -> Result<(Vec<f32>, Vec<f32>)> {
            Ok((a.out.transpose(1, 2)?.flatten_all()?.to_vec1()?, a.lse.transpose(1, 2)?.flatten_all()?.to_vec1()?))
        };
        let ((mut out, mut lse), mut work) = (rows(&first)?, first.work);
        let blocks = inverse.indptr.len() - 1;
        let mut from = 0;
        while from < blocks {
            // As many blocks as the buffer holds the queries of, padded to whole tiles; one at least.
            let (mut at, mut tiles, mut queries, mut to) = (vec![0], Vec::new(), Vec::new(), from);
            while to < blocks && (to == from || queries.len() + inverse.indptr[to + 1] - inverse.indptr[to] <= ROWS) {
                queries.extend_from_slice(&inverse.queries[inverse.indptr[to]..inverse.indptr[to + 1]]);
                let whole = queries.len().next_multiple_of(TILE);
                for _ in at.len()..=whole / TILE {
                    tiles.push(to as u32);
                    at.push(tiles.len());
                }
                queries.resize(whole, u32::MAX);
                to += 1;
            }
            from = to;
            if queries.is_empty() {
                continue;
            }
            let table = HeadTable { block_q: TILE, block_k: lists[bh].block_k, indptr: at, blocks: tiles, rows: None };
            // What pads a tile repeats query 0 and is dropped.
            let index: Vec<u32> = queries.iter().map(|&i| if i == u32::MAX { 0 } else { i }).collect();
            let gathered = q.index_select(&Tensor::from_vec(index, queries.len(), &Device::Cpu)?, 2)?;
            let table = BlockTable { heads: vec![table; group] };
            let part = attend(&gathered, &k, &v, &AttendOptions { causal: false, ..options.clone() }, Some(&table))?;
            work += part.work;
            let (parts, lses) = rows(&part)?;
            for (n, &i) in queries.iter().enumerate().filter(|(_, i)| **i != u32::MAX) {
                for g in 0..group {
                    let (to, from) = (i as usize * group + g, n * group + g);
                    merge_row(
                        &mut out[to * dv..(to + 1) * dv],
                        &mut lse[to],
                        &parts[from * dv..(from + 1) * dv],
                        lses[from],
                    );
                }
            }
        }
        Ok((out, lse, work))
    };
    let heads: Vec<_> = (0..b * hkv).into_par_iter().map(head).collect::<Result<_>>()?;
    let (mut outs, mut lses, mut work) =
        (Vec::with_capacity(heads.len()), Vec::with_capacity(heads.len()), Work::default());
    for (out, lse, w) in heads {
        outs.push(Tensor::from_vec(out, (1, tq, group, dv), &Device::Cpu)?.transpose(1, 2)?);
        lses.push(Tensor::from_vec(lse, (1, tq, group), &Device::Cpu)?.transpose(1, 2)?);
        work += w;
    }
    let batches = |x: Vec<Tensor>| -> Result<Tensor> {
        let of = x.chunks(hkv).map(|x| Tensor::cat(x, 1)).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&of, 0)?)
    };
    Ok(Attended { out: batches(outs)?, lse: batches(lses)?, work })
}

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FsaNsaKernel {
    /// Keys per block.
    pub block_size: usize,
    /// Blocks per query.
    pub topk: usize,
    /// First blocks, part of topk.
    pub init_blocks: usize,
    /// Last blocks, the query's own included, part of topk.
    pub local_blocks: usize,
}

impl Default for FsaNsaKernel {
    fn default() -> Self {
        Self { block_size: 64, topk: 16, init_blocks: 1, local_blocks: 2 }
    }
}

impl Config for FsaNsaKernel {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("block_size", "keys per block"),
        ("topk", "blocks that each query visits, shared by the heads of its group"),
        ("init_blocks", "first blocks, visited in any case and part of topk"),
        ("local_blocks", "last blocks, the query's own included, visited in any case and part of topk"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.block_size == 0 || self.local_blocks == 0 {
            return Err(format!(
                "block_size = {}, local_blocks = {}: use at least 1",
                self.block_size, self.local_blocks
            ));
        }
        if self.topk < self.init_blocks + self.local_blocks {
            return Err(format!(
                "topk = {}: use at least init_blocks + local_blocks = {}",
                self.topk,
                self.init_blocks + self.local_blocks
            ));
        }
        Ok(())
    }
}

/// Queries gated by one product.
const GATE: usize = 128;

impl FsaNsaKernel {
    /// Blocks of each query of one group of heads: q (group, Tq, D) with all rows in place, k (Tk, D).
    fn choose(&self, q: &[Mat], k: &Mat, scale: f32) -> Result<(HeadTable, Work)> {
        let (b, d, tk) = (self.block_size, k.cols, k.rows);
        let tq = q.first().map_or(0, |q| q.rows);
        let off = tk - tq;
        let mut work = Work::default();
        let mut table = HeadTable { block_q: 1, block_k: b, indptr: vec![0], blocks: Vec::new(), rows: None };
        let past = (off + tq).saturating_sub(1) / b;
        let means = mean_blocks(&Mat::new(k.data(), past * b, d, k.stride), b);
        work.flops += (past * (b + 1) * d) as u64;
        let mut gates = vec![0f32; GATE * past * q.len()];
        let (mut votes, mut ranks, mut best) = (Vec::new(), Vec::new(), Vec::new());
        for r0 in (0..tq).step_by(GATE) {
            let m = GATE.min(tq - r0);
            let width = (off + r0 + m - 1) / b;
            let some = width + 1 > self.topk;
            for (q, gate) in q.iter().zip(gates.chunks_exact_mut((GATE * past).max(1))).filter(|_| some) {
                let rows = &q.data()[r0 * q.stride..];
                work.flops += abt(m, width, d, scale, rows, q.stride, &means, d, gate);
                work.bytes += ((m + width) * d * 4) as u64;
                // Softmax over the complete blocks of each query's past.
                let gate = &mut gate[..m * width];
                for (r, row) in (off + r0..).zip(gate.chunks_exact_mut(width.max(1))) {
                    row[r / b..].fill(f32::NEG_INFINITY);
                }
                row_softmax(gate, width)?;
                work.flops += (4 * m * width) as u64;
            }
            for r in r0..r0 + m {
                let own = (off + r) / b;
                let near = (own + 1).saturating_sub(self.local_blocks);
                let init = self.init_blocks.min(near);
                table.blocks.extend(0..init as u32);
                let room = self.topk - init - (own + 1 - near);
                if near - init <= room {
                    table.blocks.extend(init as u32..near as u32);
                } else {
                    votes.clear();
                    votes.resize(near - init, 0f32);
                    for gate in gates.chunks_exact(GATE * past).take(q.len()) {
                        let gate = &gate[(r - r0) * width..][init..own];
                        votes.iter_mut().zip(gate).for_each(|(v, x)| *v += x);
                    }
                    topk_into(&votes, room, &mut ranks, &mut best);
                    table.blocks.extend(best.iter().map(|x| x + init as u32));
                }
                table.blocks.extend(near as u32..=own as u32);
                table.indptr.push(table.blocks.len());
            }
        }
        Ok((table, work))
    }
}

impl MixerSystem for FsaNsaKernel {
    fn layer(&self, _: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(self.clone()))
    }
}

impl Mixer for FsaNsaKernel {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((b, h, tq, d), (_, hkv, tk, _)) = (i.q.dims4()?, i.k.dims4()?);
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(foveal_kernels::KernelError::Groups { op: CARD.id, heads: h, kv_heads: hkv }.into());
        }
        let scale = i.scale()?;
        let flat = |t: &Tensor| -> Result<Vec<f32>> {
            Ok(t.detach().to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?)
        };
        let (q, k) = (flat(i.q)?, flat(i.k)?);
        let group = h / hkv;
        let chosen = (0..b * hkv)
            .into_par_iter()
            .map(|x| {
                let of = (0..group).map(|g| Mat::new(&q[(x * group + g) * tq * d..], tq, d, d)).collect::<Vec<_>>();
                self.choose(&of, &Mat::new(&k[x * tk * d..], tk, d, d), scale)
            })
            .collect::<Result<Vec<_>>>()?;
        let select = chosen.iter().map(|c| c.1).sum();
        let lists: Vec<HeadTable> = chosen.into_iter().map(|c| c.0).collect();
        let options = AttendOptions { scale: Some(scale), ..AttendOptions::default() };
        let a = keys_outer(i.q, i.k, i.v, &options, &lists)?;
        let selections =
            lists.into_iter().flat_map(|t| std::iter::repeat_n(HeadSelection::of_blocks(t), group)).collect();
        Ok(Mixed { out: a.out, work: a.work, select, loss: None, selections })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "fsa-nsa-kernel",
    title: "Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse Attention Kernel",
    authors: "Yan et al., 2025",
    arxiv: "2508.18224",
    family: Family::Kernel,
    slots: &[Slot::Prefill, Slot::Kernel],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("topk", "1000000000")]),
        Law::Work { pairs: Growth::Linear, flops: Growth::Quadratic },
        Law::Monotone { param: "topk", values: &["3", "4", "8", "16", "1000000"] },
    ],
    equation: "for each key block b, over the queries Q_b that chose it: S = scale·Q_b K_bᵀ, o_b = softmax(S) V_b, l_b = lse(S)\n\
               for each query: l = ln(sum of exp(l_b)), o = sum of exp(l_b - l)·o_b",
    cost: "2·(D + Dv) per query, head and listed key, tiles filled by queries; a buffer of partial outputs",
    choices: &[
        "The kernel is an order of loops and takes any lists. To be run and tested as a system it needs some: NSA's choice \
         without its trained compression, means of blocks with the votes of a group's heads summed after the softmax, \
         block 64, 16 blocks of which 1 first and 2 last, as in NSA. Its other branches and gates are not part of the kernel.",
        "Blocks that a query sees whole go through the inverse index; those that reach past its position (its own) through an \
         ordinary table with the causal mask, and their result starts the reduction.",
        "The paper's kernel keeps the buffer for all blocks; here the partial outputs of 65,536 gathered queries a head at a \
         time are merged before the next are computed.",
        "Forward only: the paper also gives the backward pass. Training uses the query-outer kernels, which are exact for the \
         same lists.",
        "On a CPU this order loses: a tile of queries finds its keys in the cache in either order, and what the gathering and the \
         merging of partial outputs cost is not won back. On recorded heads of SmolLM2, 8,192 tokens, whole and in bf16, topk=8 \
         takes 1.9 and topk=16 3.0 times dense's time; the same choice by MoBA with row masks of 16 queries 0.8 and 1.1.",
        "Perplexity of SmolLM2-135M, 2,048 tokens: dense 6.92, default 6.97 with 75% of the pairs computed, topk=8 7.19 with 43%.",
    ],
    params: params_of::<FsaNsaKernel>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<FsaNsaKernel>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::PrefillProblem;
    use crate::prim::attend_selected;

    #[test]
    fn both_loop_orders_agree_and_keys_outer_fills_tiles() {
        for (shape, block_size) in [([2, 6, 2, 300, 300, 16], 16), ([1, 4, 1, 77, 411, 8], 32), ([1, 1, 1, 1, 1, 4], 8)]
        {
            let [b, h, hkv, tq, tk, _] = shape;
            let (q, k, v) = PrefillProblem::new(shape, 1.0, 3).tensors().unwrap();
            let system = FsaNsaKernel { block_size, topk: 5, ..Default::default() };
            let m = system.mix(&MixInput::new(&q, &k, &v)).unwrap();
            assert_eq!(m.selections.len(), b * h);
            let a = attend_selected(&q, &k, &v, &AttendOptions::causal(), m.selections.clone()).unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (x, y) in flat(&m.out).iter().zip(flat(&a.out)) {
                assert!((x - y).abs() < 2e-5, "{shape:?}: {x} for {y}");
            }
            let lists: Vec<HeadTable> = m.selections.iter().step_by(h / hkv).filter_map(|s| s.blocks.clone()).collect();
            let again = keys_outer(&q, &k, &v, &AttendOptions::default(), &lists).unwrap();
            for (x, y) in flat(&again.lse).iter().zip(flat(&a.lse)) {
                assert!((x - y).abs() < 2e-5, "{shape:?}: {x} for {y}");
            }
            assert!(keys_outer(&q, &k, &v, &AttendOptions::default(), &lists[1..]).is_err());
            // Every listed pair is computed once, and no more than what pads tiles and hides later keys besides.
            let named: u64 = m.selections.iter().map(|s| crate::sparse::mask::pairs(s, tq, tk, true)).sum();
            assert!(m.work.pairs >= named, "{shape:?}");
        }
    }
}
