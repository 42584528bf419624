//! Gradients of what `bias` adds: sums over the gradients of scores, taken tile by tile while those are at hand.
//!
//! A cell of the backward pass has its queries and keys to itself, so what is one a query or one a key is added to
//! the result there. What is one a distance is summed along the diagonals of a cell, and cells are added up in
//! their order, so that results do not depend on threads and memory stays linear.

use super::Bias;
use super::backward::{Call, same_shape};
use super::bias::{SHORT, place, runs};
use super::drive::Buf;
use super::grad;
use super::scope::MASKS;
use crate::error::{KernelError, Result, same};
use crate::view::{Element, Rows, ViewMut};
use std::ops::Range;
use std::ptr::{null, null_mut};

/// Where the gradient of a bias goes; all is overwritten. It has the full shape even where the bias is shared along
/// an axis: the sum along that is the caller's.
pub enum BiasGrad<'g, 'd> {
    /// Of the scores as they enter the normaliser, (B, H, Tq, Tk), zero where no key is visited; for any bias or
    /// none. In a ragged batch (1, H, Tq, longest Tk). Memory of Tq × Tk is the caller's choice here; nothing else
    /// needs any.
    Dense(&'g mut ViewMut<'d, f32>),
    /// In [`Bias::Alibi`], (H).
    Slopes(&'g mut [f32]),
    /// In [`Bias::Keys`], (B, H, 1, Tk).
    Keys(&'g mut ViewMut<'d, f32>),
    /// In [`Bias::Relative`], (H, n).
    Relative(&'g mut [f32]),
    /// In [`Bias::Factors`].
    Factors {
        /// (B, H, Tq, R).
        q: &'g mut ViewMut<'d, f32>,
        /// (B, H, Tk, R).
        k: &'g mut ViewMut<'d, f32>,
    },
}

impl BiasGrad<'_, '_> {
    /// Against the bias it is the gradient of, and shapes of q and k.
    pub(super) fn check(
        &self,
        op: &'static str,
        bias: Option<Bias>,
        [b, h, tq, _]: [usize; 4],
        [_, _, tk, _]: [usize; 4],
        longest: usize,
    ) -> Result<()> {
        let view = |x: &ViewMut<f32>, want| same_shape(op, "dbias", x.shape, "bias", want);
        match (self, bias) {
            (BiasGrad::Dense(x), _) => view(x, [b, h, tq, longest]),
            (BiasGrad::Slopes(x), Some(Bias::Alibi(_))) => same(op, "heads", "dbias", x.len(), "q", h),
            (BiasGrad::Keys(x), Some(Bias::Keys(_))) => view(x, [b, h, 1, tk]),
            (BiasGrad::Relative(x), Some(Bias::Relative { table, .. })) => {
                same(op, "distances", "dbias", x.len(), "table", table.len())
            }
            (BiasGrad::Factors { q, k }, Some(Bias::Factors { q: of, .. })) => {
                view(q, [b, h, tq, of.shape[3]])?;
                view(k, [b, h, tk, of.shape[3]])
            }
            (_, bias) => Err(KernelError::Param {
                op,
                name: "dbias",
                value: format!("for another bias than the call's, {}", bias.map_or("none", |b| b.name())),
                remedy: "ask for the gradient of the bias that is there, or the dense one".into(),
            }),
        }
    }
}

/// Where sums of one sequence go.
pub(super) enum Sums<'a> {
    Nothing,
    Dense(Rows<'a, f32>),
    Keys(Rows<'a, f32>),
    /// To what a cell returns.
    Distances,
    Factors {
        q: Rows<'a, f32>,
        k: Rows<'a, f32>,
    },
}

impl<'a> Sums<'a> {
    /// Where they go, and what is one a distance, all zeroed.
    pub(super) fn of(grad: Option<BiasGrad<'a, '_>>) -> (Self, Option<&'a mut [f32]>) {
        let zeroed = |x: &'a mut ViewMut<f32>| {
            let rows = x.rows();
            rows.clear();
            rows
        };
        match grad {
            None => (Sums::Nothing, None),
            Some(BiasGrad::Dense(x)) => (Sums::Dense(zeroed(x)), None),
            Some(BiasGrad::Keys(x)) => (Sums::Keys(zeroed(x)), None),
            Some(BiasGrad::Slopes(x) | BiasGrad::Relative(x)) => {
                x.fill(0.0);
                (Sums::Distances, Some(x))
            }
            Some(BiasGrad::Factors { q, k }) => (Sums::Factors { q: zeroed(q), k: zeroed(k) }, None),
        }
    }

    /// Those of the sequence of these tokens.
    pub(super) fn part(&self, q: &Range<usize>, k: &Range<usize>) -> Self {
        let whole = |x: &Rows<'a, f32>, tokens: &Range<usize>| x.part(tokens.clone(), 0..x.shape()[3]);
        match self {
            Sums::Nothing => Sums::Nothing,
            Sums::Distances => Sums::Distances,
            Sums::Dense(x) => Sums::Dense(x.part(q.clone(), 0..k.len())),
            Sums::Keys(x) => Sums::Keys(x.part(0..1, k.clone())),
            Sums::Factors { q: x, k: y } => Sums::Factors { q: whole(x, q), k: whole(y, k) },
        }
    }

    /// Whether gradients of scores are wanted at all.
    pub(super) fn wanted(&self) -> bool {
        !matches!(self, Sums::Nothing)
    }
}

/// What a worker keeps for the sums of a cell.
pub(super) struct Room {
    turned: Buf,
    /// Factors of the queries of a task, in rows of whole vectors; their gradients, transposed, in strips; and
    /// gradients of the factors of the cell's keys, in rows of whole vectors.
    fq: Buf,
    dfqt: Buf,
    dfk: Buf,
    /// Sums along the diagonals of the cell, for each query head of the group.
    diagonals: Vec<f32>,
    /// Those of the head at hand start here, with the distance back from query to key of the first.
    at: usize,
    low: i64,
    /// First key of the cell, first query of the task.
    key: usize,
    row: usize,
}

impl Room {
    pub(super) fn new() -> Self {
        let b = Buf::new;
        Self { turned: b(), fq: b(), dfqt: b(), dfk: b(), diagonals: Vec::new(), at: 0, low: 0, key: 0, row: 0 }
    }

    /// The sums along diagonals that a cell leaves.
    pub(super) fn take_diagonals(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.diagonals)
    }
}

impl<T: Element> Call<'_, T> {
    /// Distance from the last key of a cell to its first query: where its diagonals start.
    fn low(&self, rows: &Range<usize>, keys: &Range<usize>) -> i64 {
        self.scope.own(rows.start) - (keys.end as i64 - 1)
    }

    /// Width of rows of factors in whole vectors.
    fn factor_width(&self) -> usize {
        self.scope.rank().next_multiple_of(self.kernels.lanes)
    }

    /// Before the next head of a cell of `rows` × `keys`.
    pub(super) fn begin_head(&self, room: &mut Room, rows: &Range<usize>, keys: &Range<usize>) {
        (room.low, room.key) = (self.low(rows, keys), keys.start);
        match self.sums {
            Sums::Distances => {
                room.at = room.diagonals.len();
                room.diagonals.resize(room.at + rows.len() + keys.len(), 0.0);
            }
            Sums::Factors { .. } => {
                let n = keys.len() * self.factor_width();
                // SAFETY: `at_least` gave so many elements, initialised.
                unsafe { std::slice::from_raw_parts_mut(room.dfk.at_least(n), n).fill(0.0) };
            }
            _ => {}
        }
    }

    /// After it.
    pub(super) fn end_head(&self, room: &mut Room, [bi, hi]: [usize; 2], keys: &Range<usize>) {
        let Sums::Factors { k, .. } = &self.sums else { return };
        let (r, rp) = (self.scope.rank(), self.factor_width());
        let from = room.dfk.at_least(keys.len() * rp);
        for (x, j) in keys.clone().enumerate() {
            // SAFETY: rows of rp; in this round only this cell has these rows of the result; the instruction set is
            // at most what the machine has.
            unsafe { grad::add_scaled(self.isa, from.add(x * rp), r, 1.0, k.row_mut(bi, hi, j).as_mut_ptr()) };
        }
    }

    /// Before a task of `rows`, in strips of `padded` queries altogether.
    pub(super) fn begin_rows(&self, room: &mut Room, [bi, hi]: [usize; 2], rows: &Range<usize>, padded: usize) {
        room.row = rows.start;
        let (Sums::Factors { .. }, Some(Bias::Factors { q, .. })) = (&self.sums, self.scope.bias) else { return };
        let (r, rp) = (self.scope.rank(), self.factor_width());
        let (fq, dfqt) = (room.fq.at_least(rows.len() * rp), room.dfqt.at_least(padded * r));
        // SAFETY: `at_least` gave so many elements, initialised.
        let (fq, dfqt) = unsafe {
            (std::slice::from_raw_parts_mut(fq, rows.len() * rp), std::slice::from_raw_parts_mut(dfqt, padded * r))
        };
        dfqt.fill(0.0);
        for (to, i) in fq.chunks_exact_mut(rp.max(1)).zip(rows.clone()) {
            to[..r].copy_from_slice(q.row(bi, hi, i));
            to[r..].fill(0.0);
        }
    }

    /// After it, for each strip of it: the queries `of` in rows of `w`.
    ///
    /// # Safety
    /// `w` is that of the strip in [`Call::sum_tile`].
    pub(super) unsafe fn end_rows(&self, room: &mut Room, [bi, hi]: [usize; 2], of: Range<usize>, w: usize) {
        let Sums::Factors { q, .. } = &self.sums else { return };
        let r = self.scope.rank();
        let at = (of.start - room.row) * r;
        let from = room.dfqt.at_least(at + r * w).wrapping_add(at);
        // SAFETY: r rows of w; in this round only this cell has these rows of the result.
        unsafe { self.add_turned(&mut room.turned, q, [bi, hi], of, from, r, w, 1.0) };
    }

    /// Sum one tile of gradients of scores: `keys` in rows of `w`, the queries `of` in lanes.
    ///
    /// # Safety
    /// `tile` is such; `w` is whole vectors; the strip lies in the rows of the last [`Call::begin_rows`] and the keys
    /// in those of [`Call::begin_head`]; no other task has rows of these queries or keys.
    pub(super) unsafe fn sum_tile(
        &self,
        room: &mut Room,
        [bi, hi]: [usize; 2],
        keys: &[u32],
        of: Range<usize>,
        tile: *const f32,
        w: usize,
    ) {
        let n = of.len();
        // SAFETY: by the contract, here and below.
        let line = |y: usize| unsafe { std::slice::from_raw_parts(tile.add(y * w), n) };
        match &self.sums {
            Sums::Nothing => {}
            Sums::Dense(to) => {
                for run in runs(keys) {
                    let (first, len) = (keys[run.start] as usize, run.len());
                    if len < SHORT {
                        for (x, i) in of.clone().enumerate() {
                            let row = to.row_ptr(bi, hi, i).wrapping_add(first);
                            for y in 0..len {
                                // SAFETY: keys are below the row's length.
                                unsafe { *row.add(y) = line(run.start + y)[x] };
                            }
                        }
                        continue;
                    }
                    let mut lines = [null(); MASKS];
                    for (p, y) in lines.iter_mut().zip(run.clone()) {
                        *p = line(y).as_ptr();
                    }
                    let padded = len.next_multiple_of(self.kernels.lanes);
                    let turned = room.turned.at_least(n * padded);
                    // SAFETY: rows of n; room for n rows of whole vectors; keys are below the row's length.
                    unsafe {
                        (self.kernels.pack)(&lines[..len], n, 1.0, padded, turned);
                        for (x, i) in of.clone().enumerate() {
                            let row = to.row_ptr(bi, hi, i).add(first);
                            std::ptr::copy_nonoverlapping(turned.add(x * padded), row, len);
                        }
                    }
                }
            }
            Sums::Keys(to) => {
                let row = to.row_ptr(bi, hi, 0);
                for (y, &j) in keys.iter().enumerate() {
                    let sum: f32 = line(y).iter().sum();
                    // SAFETY: keys are below the row's length.
                    unsafe { *row.add(j as usize) += sum };
                }
            }
            Sums::Distances => {
                let own = self.scope.own(of.start) - room.low;
                for (y, &j) in keys.iter().enumerate() {
                    let at = room.at + (own - i64::from(j)) as usize;
                    for (to, x) in room.diagonals[at..at + n].iter_mut().zip(line(y)) {
                        *to += x;
                    }
                }
            }
            Sums::Factors { .. } => {
                let Some(Bias::Factors { k, .. }) = self.scope.bias else { return };
                let (r, rp) = (self.scope.rank(), self.factor_width());
                let (mut k_rows, mut dk_rows) = ([null(); MASKS], [null_mut(); MASKS]);
                let dfk = room.dfk.at_least(0);
                for (y, &j) in keys.iter().enumerate() {
                    k_rows[y] = k.row(bi, hi, j as usize).as_ptr();
                    dk_rows[y] = dfk.wrapping_add((j as usize - room.key) * rp);
                }
                let x = of.start - room.row;
                let (fq, dfqt) = (room.fq.at_least(0), room.dfqt.at_least(0));
                let nv = w / self.kernels.lanes;
                // SAFETY: the rooms were sized by `begin_head` and `begin_rows`; the instruction set is at most what
                // the machine has.
                unsafe {
                    let (q, dqt) = (fq.add(x * rp), dfqt.add(x * r));
                    let (k, dk) = (k_rows.as_ptr(), dk_rows.as_ptr());
                    grad::factors(self.isa, nv, keys.len(), n, r, rp, tile, k, q, dqt, dk);
                }
            }
        }
    }

    /// How many numbers a head has that are one a distance.
    pub(super) fn distances(&self) -> usize {
        match self.scope.bias {
            Some(Bias::Relative { table, .. }) => table.len() / self.scope.heads,
            _ => 1,
        }
    }

    /// Add the diagonals of a cell to those numbers of its heads.
    pub(super) fn add_diagonals(&self, rows: &Range<usize>, keys: &Range<usize>, diagonals: &[f32], to: &mut [f64]) {
        let low = self.low(rows, keys);
        let heads = diagonals.chunks_exact(rows.len() + keys.len());
        for (to, diagonals) in to.chunks_exact_mut(self.distances()).zip(heads) {
            for (back, &x) in (low..).zip(diagonals) {
                match self.scope.bias {
                    Some(Bias::Relative { left, .. }) => to[place(-back, left, to.len())] += f64::from(x),
                    _ => to[0] -= f64::from(x) * back.abs() as f64,
                }
            }
        }
    }
}
