//! The backward pass: from a call to cells of queries × keys, and from those to strip × tile visits.
//!
//! Probabilities are computed anew from the log-sum-exp, tile by tile (the backward pass of
//! FlashAttention-2: Dao 2023, arXiv 2307.08691), so that memory stays linear. A cell is a range of queries
//! of all heads of a group against a range of keys: it sums dK and dV of its keys in scratch and adds them
//! to the result once, and dQ of its queries likewise. Cells of one K/V head are done in rounds, in each of
//! which no two share queries or keys; a round's cells run in any order, rounds in theirs. So nothing is
//! computed twice, nobody waits for a lock, and sums are in the same order whatever the threads. Sizes of
//! cells follow from the shape alone, for the same reason.

use super::bias;
use super::bias_sums::{self, BiasGrad, Sums};
use super::drive::{Buf, wide};
use super::grad::{self, KEY_TILE};
use super::scope::{Listed, MASKS, Scope, Source, no_lse};
use super::strip::{KEY_PAD, Kernels, MAX_STRIP};
use super::{Attend, Normalizer, check_shapes};
use crate::error::{KernelError, Result, same};
use crate::exp::LOG2_E;
use crate::isa::Isa;
use crate::view::{Element, Rows, View, ViewMut};
use crate::work::Work;
use half::bf16;
use rayon::prelude::*;
use std::any::TypeId;
use std::ops::Range;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, PoisonError};

/// What the backward pass starts from.
pub struct Upstream<'a> {
    /// Output of the forward call, (B, H, Tq, Dv).
    pub out: &'a View<'a, f32>,
    /// Log-sum-exp of the forward call, (B, H, Tq) contiguous; empty with a sigmoid.
    pub lse: &'a [f32],
    /// Gradient of the loss in the output, (B, H, Tq, Dv).
    pub dout: &'a View<'a, f32>,
    /// Gradient of the loss in the log-sum-exp, (B, H, Tq) contiguous; `None` where the loss does not use
    /// it (it does where parts of attention are merged).
    pub dlse: Option<&'a [f32]>,
}

/// Where gradients go; all is overwritten.
pub struct AttendGrads<'g, 'd> {
    /// In q, (B, H, Tq, D).
    pub dq: &'g mut ViewMut<'d, f32>,
    /// In k, (B, H_kv, Tk, D), summed over the query heads of a group.
    pub dk: &'g mut ViewMut<'d, f32>,
    /// In v, (B, H_kv, Tk, Dv), likewise.
    pub dv: &'g mut ViewMut<'d, f32>,
    /// In the sinks, one a query head.
    pub dsinks: Option<&'g mut [f32]>,
    /// In the bias.
    pub dbias: Option<BiasGrad<'g, 'd>>,
}

/// Most queries and keys of a cell, and least: multiples of the work grid and of KEY_TILE. Larger ones add
/// to the results less often, smaller ones feed more threads.
const CELLS: [usize; 5] = [2304, 1152, 576, 384, 192];
/// Of those, the ones for calls that visit most pairs; the others are for those that would prepare the queries of a
/// cell for a block or two of its keys.
const DENSE_CELLS: usize = 2;
/// Cells wanted side by side.
const WIDTH: usize = 32;
/// Queries that share one pass over the keys of a cell.
const MAX_ROWS: usize = 192;

/// What a worker keeps between cells.
pub(super) struct Scratch {
    /// Q, dO, and the same transposed in strips; dQᵀ in strips.
    pub(super) q: Buf,
    pub(super) dout: Buf,
    pub(super) qt: Buf,
    pub(super) dot: Buf,
    pub(super) dqt: Buf,
    /// Rows of dQ once they are whole.
    pub(super) dq: Buf,
    pub(super) stat: Buf,
    pub(super) s: Buf,
    pub(super) ds: Buf,
    pub(super) bias: bias::Room,
    pub(super) dbias: Buf,
    pub(super) sums: bias_sums::Room,
    pub(super) wide_k: Buf,
    pub(super) wide_v: Buf,
    /// dK and dV of the cell.
    pub(super) dk: Buf,
    pub(super) dv: Buf,
    /// P and dS in bf16, and a tile of keys with its sums, for the path on AMX tiles.
    pub(super) narrow: Buf,
    pub(super) tile: Buf,
    pub(super) listed: Listed,
    pub(super) masks: [u64; MASKS],
}

impl Scratch {
    fn new() -> Self {
        let b = Buf::new;
        Self {
            q: b(),
            dout: b(),
            qt: b(),
            dot: b(),
            dqt: b(),
            dq: b(),
            stat: b(),
            s: b(),
            ds: b(),
            bias: bias::Room::new(),
            dbias: b(),
            sums: bias_sums::Room::new(),
            wide_k: b(),
            wide_v: b(),
            dk: b(),
            dv: b(),
            narrow: b(),
            tile: b(),
            listed: Listed::default(),
            masks: [0; MASKS],
        }
    }
}

/// Rows of K and V of a key (null on tiles), and of its sums.
pub(super) struct Pointers {
    k: *const f32,
    v: *const f32,
    pub(super) dk: *mut f32,
    pub(super) dv: *mut f32,
}

/// One call, or one sequence of a ragged one, shared by its cells.
pub(super) struct Call<'a, T> {
    pub(super) scope: Scope<'a>,
    pub(super) kernels: &'static Kernels,
    pub(super) isa: Isa,
    pub(super) q: View<'a, T>,
    pub(super) k: View<'a, T>,
    pub(super) v: View<'a, T>,
    pub(super) dout: View<'a, f32>,
    /// (B, H, Tq, 1); none with a sigmoid.
    pub(super) lse: Option<View<'a, f32>>,
    /// Σ dO·O less the gradient of the log-sum-exp, (B, H, Tq); none with a sigmoid.
    pub(super) delta: Vec<f32>,
    pub(super) dq: Rows<'a, f32>,
    pub(super) dk: Rows<'a, f32>,
    pub(super) dv: Rows<'a, f32>,
    pub(super) sums: Sums<'a>,
}

/// `half::bf16::from_f32` and back, without its branches.
fn nearest_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
    if x.is_nan() { x } else { rounded }
}

pub(super) fn same_shape(
    op: &'static str,
    left: &'static str,
    l: [usize; 4],
    right: &'static str,
    r: [usize; 4],
) -> Result<()> {
    for (dim, i) in [("batch", 0), ("heads", 1), ("tokens", 2), ("head_dim", 3)] {
        same(op, dim, left, l[i], right, r[i])?;
    }
    Ok(())
}

/// Run a call whose shapes were checked.
pub(crate) fn run<T: Element>(
    op: &'static str,
    p: &Attend,
    source: Source,
    [q, k, v]: [&View<T>; 3],
    up: &Upstream,
    grads: AttendGrads,
) -> Result<Work> {
    check_shapes(op, q.shape, k.shape, v.shape, up.out.shape)?;
    let [b, h, tq, d] = q.shape;
    let [_, hkv, tk, dv] = v.shape;
    let scopes = Scope::all(op, p, source, q.shape, k.shape)?;
    same_shape(op, "dout", up.dout.shape, "out", up.out.shape)?;
    same_shape(op, "dq", grads.dq.shape, "q", q.shape)?;
    same_shape(op, "dk", grads.dk.shape, "k", k.shape)?;
    same_shape(op, "dv", grads.dv.shape, "v", v.shape)?;
    no_lse(op, p, "lse", !up.lse.is_empty())?;
    no_lse(op, p, "dlse", up.dlse.is_some())?;
    let rows = [b, h, tq, 1];
    let mut lse = None;
    if p.normalizer.sigmoid().is_none() {
        same(op, "batch*heads*tokens", "lse", up.lse.len(), "q", b * h * tq)?;
        lse = Some(View::contiguous("lse", up.lse, rows)?);
    }
    let mut dlse = None;
    if let Some(x) = up.dlse {
        same(op, "batch*heads*tokens", "dlse", x.len(), "q", b * h * tq)?;
        dlse = Some(View::contiguous("dlse", x, rows)?);
    }
    if let Some(x) = &grads.dbias {
        let longest = scopes.iter().map(|s| s.0.k.len()).max().unwrap_or(0);
        x.check(op, p.bias, q.shape, k.shape, longest)?;
    }
    match (&grads.dsinks, p.sinks) {
        (Some(x), Some(_)) => same(op, "heads", "dsinks", x.len(), "q", h)?,
        (Some(x), None) => {
            return Err(KernelError::Param {
                op,
                name: "dsinks",
                value: format!("{} gradients", x.len()),
                remedy: "the call has no sinks; ask for none".into(),
            });
        }
        (None, _) => {}
    }
    let (dq, dk, dvs) = (grads.dq.rows(), grads.dk.rows(), grads.dv.rows());
    for rows in [&dq, &dk, &dvs] {
        rows.clear();
    }
    let (sums, distances) = Sums::of(grads.dbias);
    let calls: Vec<Call<T>> = scopes
        .into_iter()
        .map(|(piece, scope)| {
            let mut call = Call {
                kernels: scope.kernels,
                isa: scope.isa,
                scope,
                q: q.part(piece.q.clone(), 0..d),
                k: k.part(piece.k.clone(), 0..d),
                v: v.part(piece.k.clone(), 0..dv),
                dout: up.dout.part(piece.q.clone(), 0..dv),
                lse: lse.map(|x| x.part(piece.q.clone(), 0..1)),
                delta: Vec::new(),
                dq: dq.part(piece.q.clone(), 0..d),
                dk: dk.part(piece.k.clone(), 0..d),
                dv: dvs.part(piece.k.clone(), 0..dv),
                sums: sums.part(&piece.q, &piece.k),
            };
            if lse.is_some() {
                let dlse = dlse.map(|x| x.part(piece.q.clone(), 0..1));
                call.delta = call.deltas(&up.out.part(piece.q, 0..dv), dlse.as_ref());
            }
            call
        })
        .collect();
    if let (Some(to), Some(sinks)) = (grads.dsinks, p.sinks) {
        let mut sums = vec![0f64; h];
        calls.iter().for_each(|c| c.add_sinks(sinks, &mut sums));
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = sum as f32;
        }
    }
    if [b, h, tq, tk, d].contains(&0) {
        return Ok(Work::default());
    }
    let pool = Mutex::new(Vec::new());
    let longest = |c: &Call<T>| c.scope.tq.max(c.scope.tk);
    let cells = |n: usize| calls.iter().map(|c| b * hkv * longest(c).div_ceil(n)).sum::<usize>();
    let dense = source.pairs().is_none_or(|pairs| 2 * pairs > b * h * tq * tk);
    let sizes = if dense { &CELLS[DENSE_CELLS..] } else { &CELLS[..] };
    let size = sizes.iter().copied().find(|&n| cells(n) >= WIDTH).unwrap_or(CELLS[CELLS.len() - 1]);
    // Long sequences first: their rounds follow each other.
    let mut heads: Vec<_> = calls.iter().flat_map(|c| (0..b * hkv).map(move |bk| (c, bk))).collect();
    heads.sort_by_key(|(c, _)| std::cmp::Reverse(longest(c)));
    let done: Vec<_> = heads
        .into_par_iter()
        .with_max_len(1)
        .map(|(call, bk)| {
            let (work, sums) = call.head(&pool, [bk / hkv, bk % hkv], size);
            (bk % hkv, work, sums)
        })
        .collect();
    if let Some(to) = distances {
        let mut sums = vec![0f64; to.len()];
        for (kh, _, part) in &done {
            for (to, x) in sums[kh * part.len()..].iter_mut().zip(part) {
                *to += x;
            }
        }
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = sum as f32;
        }
    }
    Ok(done.into_iter().map(|x| x.1).sum())
}

impl<T: Element> Call<'_, T> {
    /// All cells of one K/V head, of at most `size` queries and keys; and what is one a distance, of the query heads
    /// of its group.
    fn head(&self, pool: &Mutex<Vec<Scratch>>, [bi, kh]: [usize; 2], size: usize) -> (Work, Vec<f64>) {
        let (tq, tk) = (self.scope.tq, self.scope.tk);
        let (nq, nk) = (tq.div_ceil(size), tk.div_ceil(size));
        let part = |i: usize, t: usize| i * size..((i + 1) * size).min(t);
        let rounds = nq.max(nk);
        let mut work = Work::default();
        let mut sums = Vec::new();
        if matches!(self.sums, Sums::Distances) {
            sums.resize(self.scope.heads / self.k.shape[1] * self.distances(), 0.0);
        }
        for r in 0..rounds {
            // Cell (i, j) belongs to round i − j; long causal rows start first.
            let done: Vec<_> = (0..nq)
                .into_par_iter()
                .with_max_len(1)
                .rev()
                .map(|i| (i, (i + rounds - r) % rounds))
                .filter(|&(i, j)| j < nk && self.meets(&part(i, tq), &part(j, tk)))
                .map(|(i, j)| {
                    let free = || pool.lock().unwrap_or_else(PoisonError::into_inner);
                    let kept = free().pop();
                    let mut scratch = kept.unwrap_or_else(Scratch::new);
                    let work = self.cell(&mut scratch, [bi, kh], part(i, tq), part(j, tk));
                    let diagonals = scratch.sums.take_diagonals();
                    free().push(scratch);
                    (i, j, work, diagonals)
                })
                .collect();
            for (i, j, cell, diagonals) in done {
                work += cell;
                if !diagonals.is_empty() {
                    self.add_diagonals(&part(i, tq), &part(j, tk), &diagonals, &mut sums);
                }
            }
        }
        (work, sums)
    }

    fn deltas(&self, out: &View<f32>, dlse: Option<&View<f32>>) -> Vec<f32> {
        let [b, h, tq, _] = self.q.shape;
        let dv = self.v.shape[3];
        let mut delta = vec![0f32; b * h * tq];
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        let tiles = self.on_tiles().is_some();
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        let tiles = false;
        let rows = delta.par_iter_mut().with_min_len(64).enumerate();
        rows.for_each_init(
            || vec![0f32; dv],
            |rounded, (r, x)| {
                let (bi, hi, i) = (r / (h * tq), r / tq % h, r % tq);
                let (o, mut g) = (out.row(bi, hi, i), self.dout.row(bi, hi, i));
                if tiles {
                    // What dP is made of: where one key takes all, dP − D cancels only if both are.
                    for (to, &x) in rounded.iter_mut().zip(g) {
                        *to = nearest_bf16(x);
                    }
                    g = rounded;
                }
                // SAFETY: rows of dv elements; `isa` is at most what the machine has.
                let sum = unsafe { grad::dot(self.isa, o.as_ptr(), g.as_ptr(), dv) };
                *x = sum - dlse.map_or(0.0, |d| d.row(bi, hi, i)[0]);
            },
        );
        delta
    }

    /// A sink is a key with a score of its own and a value of zero: ds = P (0 − D).
    fn add_sinks(&self, sinks: &[f32], to: &mut [f64]) {
        let Some(lse) = self.lse else { return };
        let [_, h, tq, _] = self.q.shape;
        for (r, delta) in self.delta.iter().enumerate() {
            let (bi, hi, i) = (r / (h * tq), r / tq % h, r % tq);
            to[hi] -= f64::from(sinks[hi] - lse.row(bi, hi, i)[0]).exp() * f64::from(*delta);
        }
    }

    /// Whether a query of `rows` sees a key of `keys`, as far as causality and band tell.
    fn meets(&self, rows: &Range<usize>, keys: &Range<usize>) -> bool {
        self.scope.visible(rows.start).start < keys.end && keys.start < self.scope.visible(rows.end - 1).end
    }

    /// All query heads of one K/V head: `rows` against `keys`.
    fn cell(&self, s: &mut Scratch, [bi, kh]: [usize; 2], rows: Range<usize>, keys: Range<usize>) -> Work {
        let (d, dv) = (self.q.shape[3], self.v.shape[3]);
        let group = self.q.shape[1] / self.k.shape[1];
        let lanes = self.kernels.lanes;
        let (dp, dvp) = (d.next_multiple_of(lanes), dv.next_multiple_of(lanes));
        let (wide_k, wide_v) = (s.wide_k.at_least(keys.len() * d), s.wide_v.at_least(keys.len() * dv));
        let (dk, dv_sums) = (s.dk.at_least(keys.len() * dp), s.dv.at_least(keys.len() * dvp));
        // SAFETY: `at_least` gave so many elements, initialised.
        unsafe {
            std::slice::from_raw_parts_mut(dk, keys.len() * dp).fill(0.0);
            std::slice::from_raw_parts_mut(dv_sums, keys.len() * dvp).fill(0.0);
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        let tiles = self.on_tiles().is_some();
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        let tiles = false;
        let pointers: Vec<_> = keys
            .clone()
            .enumerate()
            // SAFETY: row x of room for all keys.
            .map(|(x, j)| unsafe {
                let (k, v) = if tiles {
                    (null(), null())
                } else {
                    let k = wide(self.kernels, self.k.row(bi, kh, j), wide_k.add(x * d));
                    (k, wide(self.kernels, self.v.row(bi, kh, j), wide_v.add(x * dv)))
                };
                Pointers { k, v, dk: dk.add(x * dp), dv: dv_sums.add(x * dvp) }
            })
            .collect();
        let mut work = Work::default();
        for hi in kh * group..(kh + 1) * group {
            let block = self.scope.source.block(bi * self.q.shape[1] + hi);
            let mut at = rows.start;
            self.begin_head(&mut s.sums, &rows, &keys);
            while at < rows.end {
                let end = (at / block + 1).saturating_mul(block).min(at + MAX_ROWS).min(rows.end);
                work += self.rows(s, [bi, hi], at..end, &keys, &pointers);
                at = end;
            }
            self.end_head(&mut s.sums, [bi, hi], &keys);
        }
        if work.pairs > 0 {
            for (&Pointers { dk: from_k, dv: from_v, .. }, j) in pointers.iter().zip(keys) {
                // SAFETY: in this round only this cell has these rows; `from` are rows of at least d and dv;
                // `isa` is at most what the machine has.
                unsafe {
                    let to = self.dk.row_mut(bi, kh, j);
                    grad::add_scaled(self.isa, from_k, d, self.scope.p.scale, to.as_mut_ptr());
                    let to = self.dv.row_mut(bi, kh, j);
                    grad::add_scaled(self.isa, from_v, dv, 1.0, to.as_mut_ptr());
                }
            }
        }
        work
    }

    /// `rows` of one head, all of one block and at most MAX_ROWS, against those of `part` that they visit.
    /// `pointers` are rows of K, V and of the sums for dK and dV, one for each key of `part`.
    fn rows(
        &self,
        s: &mut Scratch,
        [bi, hi]: [usize; 2],
        rows: Range<usize>,
        part: &Range<usize>,
        pointers: &[Pointers],
    ) -> Work {
        let h = self.q.shape[1];
        let (d, dv) = (self.q.shape[3], self.v.shape[3]);
        let (mut work, keys) = self.scope.list(&mut s.listed, bi * h + hi, &rows, part);
        if work.pairs == 0 {
            return work;
        }
        let size = size_of::<T>();
        // Factors: once more for scores, and, if wanted, for the gradients of both.
        let r = self.scope.rank();
        let products = if matches!(self.sums, Sums::Factors { .. }) { 3 } else { 1 };
        work.flops = 2 * work.pairs * (3 * d + 2 * dv + products * r) as u64;
        // Rows of K and V, sums for dK and dV in and out; q, dout, dq in and out; factors likewise.
        let factors = 4 * r * (2 * products - 1).min(3);
        work.bytes =
            keys * ((d + dv) * (size + 8) + factors) as u64 + (rows.len() * (d * (size + 8) + dv * 4 + factors)) as u64;

        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if let Some(same) = self.on_tiles() {
            // SAFETY: a call on tiles is on a machine with AMX.
            unsafe { same.rows_amx(s, [bi, hi], rows, part, pointers) };
            return work;
        }
        let lanes = self.kernels.lanes;
        let full = lanes * self.kernels.vecs;
        let n = rows.len();
        let padded = n.next_multiple_of(lanes);
        let (dp, dvp) = (d.next_multiple_of(lanes), dv.next_multiple_of(lanes));
        let strips = |i: usize| ((i + full).min(n), full.min(padded - i));
        let (q, dout) = (s.q.at_least(n * dp), s.dout.at_least(n * dvp));
        let (qt, dot, dqt) = (s.qt.at_least(padded * d), s.dot.at_least(padded * dv), s.dqt.at_least(padded * d));
        let stat = s.stat.at_least(2 * padded);
        let (scores, ds) = (s.s.at_least((KEY_TILE + KEY_PAD) * full), s.ds.at_least((KEY_TILE + KEY_PAD) * full));
        let dbias = if self.sums.wanted() { s.dbias.at_least(KEY_TILE * full) } else { null_mut() };
        // SAFETY: all rooms are of the sizes asked for above; rows of q are d wide and of dout dv.
        unsafe {
            for (x, i) in rows.clone().enumerate() {
                for (to, width, padded) in [(q.add(x * dp), d, dp), (dout.add(x * dvp), dv, dvp)] {
                    std::slice::from_raw_parts_mut(to.add(width), padded - width).fill(0.0);
                }
                let from = wide(self.kernels, self.q.row(bi, hi, i), q.add(x * dp));
                if from != q.add(x * dp) {
                    std::ptr::copy_nonoverlapping(from, q.add(x * dp), d);
                }
                std::ptr::copy_nonoverlapping(self.dout.row(bi, hi, i).as_ptr(), dout.add(x * dvp), dv);
            }
            let at = |base: *const f32, step: usize, i: usize| {
                let mut p = [null(); MAX_STRIP];
                for (x, p) in p.iter_mut().enumerate().take(n - i) {
                    *p = base.add((i + x) * step);
                }
                p
            };
            for i in (0..n).step_by(full) {
                let (b, w) = strips(i);
                (self.kernels.pack)(&at(q, dp, i)[..b - i], d, 1.0, w, qt.add(i * d));
                (self.kernels.pack)(&at(dout, dvp, i)[..b - i], dv, 1.0, w, dot.add(i * dv));
            }
            self.statistics(stat, [bi, hi], &rows, padded);
            std::slice::from_raw_parts_mut(dqt, padded * d).fill(0.0);
        }
        let (factor, cap) = self.factors();
        self.begin_rows(&mut s.sums, [bi, hi], &rows, padded);

        let mut k_rows = [null(); KEY_TILE + KEY_PAD];
        let mut v_rows = [null(); KEY_TILE + KEY_PAD];
        let (mut dk_rows, mut dv_rows) = ([null_mut(); KEY_TILE], [null_mut(); KEY_TILE]);
        for keys in s.listed.keys.chunks(KEY_TILE).zip((0..).step_by(KEY_TILE)) {
            let (keys, at) = keys;
            for (x, &j) in keys.iter().enumerate() {
                let p = &pointers[j as usize - part.start];
                (k_rows[x], v_rows[x], dk_rows[x], dv_rows[x]) = (p.k, p.v, p.dk, p.dv);
            }
            let (k_pad, v_pad) = (k_rows[keys.len() - 1], v_rows[keys.len() - 1]);
            k_rows[keys.len()..keys.len() + KEY_PAD].fill(k_pad);
            v_rows[keys.len()..keys.len() + KEY_PAD].fill(v_pad);
            for i in (0..n).step_by(full) {
                let (b, w) = strips(i);
                let of = rows.start + i..rows.start + b;
                let marks = s.listed.marks_of(at, keys.len());
                let Some(seen) = self.scope.part(&mut s.masks, keys, marks, &of, i, 1) else { continue };
                let (from, to) = (seen.keys.start, seen.keys.end);
                let bias = self.scope.bias_tile(&mut s.bias, [bi, hi], &keys[from..to], of.clone(), w, LOG2_E);
                // SAFETY: strip i starts after i lanes of d (dv) elements, and after i rows of dp (dvp); a part
                // of a tile starts at `from`, and KEY_PAD pointers behind the tile are readable; `isa` is at
                // most what the machine has.
                unsafe {
                    let step = grad::Step {
                        nv: w / lanes,
                        nq: b - i,
                        d,
                        dv,
                        dp,
                        dvp,
                        nk: to - from,
                        qt: qt.add(i * d),
                        dot: dot.add(i * dv),
                        q: q.add(i * dp),
                        dout: dout.add(i * dvp),
                        k: k_rows.as_ptr().add(from),
                        v: v_rows.as_ptr().add(from),
                        dk: dk_rows.as_ptr().add(from),
                        dv_rows: dv_rows.as_ptr().add(from),
                        dqt: dqt.add(i * d),
                        lse: stat.add(i),
                        delta: stat.add(padded + i),
                        masks: seen.masks,
                        bias,
                        factor,
                        cap,
                        sigmoid: self.scope.p.normalizer.sigmoid().is_some(),
                        s: scores,
                        ds,
                        dbias,
                    };
                    grad::step(self.isa, &step);
                }
                if self.sums.wanted() {
                    // SAFETY: the visit filled rows of w; in this round only this cell has these queries and keys.
                    unsafe { self.sum_tile(&mut s.sums, [bi, hi], &keys[from..to], of, dbias, w) };
                }
            }
        }

        for i in (0..n).step_by(full) {
            let (b, w) = strips(i);
            let of = rows.start + i..rows.start + b;
            // SAFETY: dQᵀ of a strip is d rows of w; in this round only this cell has these rows of dq.
            unsafe {
                self.add_to_dq(&mut s.dq, [bi, hi], of.clone(), dqt.add(i * d), w);
                self.end_rows(&mut s.sums, [bi, hi], of, w);
            }
        }
        work
    }

    /// Log-sum-exp of each of `rows` and, after `padded` of those, D: as `grad` wants them.
    ///
    /// # Safety
    /// `to` has room for twice `padded`.
    pub(super) unsafe fn statistics(&self, to: *mut f32, [bi, hi]: [usize; 2], rows: &Range<usize>, padded: usize) {
        let first = (bi * self.q.shape[1] + hi) * self.scope.tq;
        for x in 0..padded {
            let i = rows.start + x;
            // A row that sees nothing, and a lane without a row, has weights of e^−∞.
            let (lse, delta) = match (self.scope.p.normalizer, self.lse) {
                (Normalizer::Sigmoid { bias }, _) if x < rows.len() => (-bias, 0.0),
                (Normalizer::Softmax, Some(lse)) if x < rows.len() => (lse.row(bi, hi, i)[0], self.delta[first + i]),
                _ => (f32::INFINITY, 0.0),
            };
            // SAFETY: by the contract.
            unsafe {
                *to.add(x) = if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse };
                *to.add(padded + x) = delta;
            }
        }
    }

    /// Factor on q·k (with a softcap inside the tanh) and the cap, or 0.
    pub(super) fn factors(&self) -> (f32, f32) {
        match self.scope.p.softcap {
            Some(cap) => (self.scope.p.scale / cap, cap),
            None => (self.scope.p.scale, 0.0),
        }
    }

    /// Add dQᵀ of a strip, rows of `w`, times the scale to `rows` of dq.
    ///
    /// # Safety
    /// `dqt` are as many rows as dq is wide, and no other task has these rows of dq now.
    pub(super) unsafe fn add_to_dq(
        &self,
        room: &mut Buf,
        head: [usize; 2],
        rows: Range<usize>,
        dqt: *const f32,
        w: usize,
    ) {
        // SAFETY: by the contract.
        unsafe { self.add_turned(room, &self.dq, head, rows, dqt, self.q.shape[3], w, self.scope.p.scale) };
    }

    /// Add `d` rows of `w`, transposed and times `scale`, to `rows` of a result.
    ///
    /// # Safety
    /// `from` are such, and no other task has these rows now.
    pub(super) unsafe fn add_turned(
        &self,
        room: &mut Buf,
        to: &Rows<f32>,
        [bi, hi]: [usize; 2],
        rows: Range<usize>,
        from: *const f32,
        d: usize,
        w: usize,
        scale: f32,
    ) {
        let dp = d.next_multiple_of(self.kernels.lanes);
        let turned = room.at_least(w * dp);
        // SAFETY: by the contract; room for w rows of dp; `isa` is at most what the machine has.
        unsafe {
            let lines: Vec<_> = (0..d).map(|c| from.add(c * w)).collect();
            (self.kernels.pack)(&lines, w, scale, dp, turned);
            for (x, i) in rows.enumerate() {
                let to = to.row_mut(bi, hi, i);
                grad::add_scaled(self.isa, turned.add(x * dp), d, 1.0, to.as_mut_ptr());
            }
        }
    }

    /// This call as one that runs on AMX tiles, if it does.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn on_tiles(&self) -> Option<&Call<'_, bf16>> {
        if TypeId::of::<T>() != TypeId::of::<bf16>() || self.isa != Isa::Amx {
            return None;
        }
        // SAFETY: T is bf16, so the types are one.
        Some(unsafe { &*std::ptr::from_ref(self).cast::<Call<'_, bf16>>() })
    }
}
