//! What is added to scores, in tiles of keys × queries as `strip` wants them: a row for each key, a lane for each
//! query. No bias but a dense one needs memory of Tq × Tk.

use super::drive::Buf;
use super::scope::{MASKS, Scope};
use super::strip::{self, KEY_PAD, MAX_STRIP};
use crate::error::{KernelError, Result, same};
use crate::exp::LOG2_E;
use crate::view::View;
use std::ops::Range;
use std::ptr::null;

/// What is added to the scaled (and soft-capped) score of a query and a key.
///
/// Distances are between the key and the query's own position, bottom-right aligned: key − (m − n + i) for query
/// i of n and m keys.
#[derive(Clone, Copy)]
pub enum Bias<'a> {
    /// −slope · |distance|, one slope a query head (ALiBi: Press, Smith and Lewis 2021, arXiv 2108.12409).
    Alibi(&'a [f32]),
    /// Any bias, of shape (B, H, Tq, Tk); a stride of 0 shares it along an axis. −∞ masks.
    Dense(View<'a, f32>),
    /// One number a key, whatever the query: (B, H, 1, Tk); a stride of 0 shares it along an axis. −∞ masks.
    Keys(View<'a, f32>),
    /// One number a distance: `table[h · n + distance + left]` of n = `table.len() / H`; what lies beyond either
    /// end takes the number at that end. A table by buckets (T5: Raffel et al. 2019, arXiv 1910.10683) is one of
    /// distances once the caller has looked each distance up.
    Relative {
        /// (H, n).
        table: &'a [f32],
        /// Where a table keeps distance 0.
        left: usize,
    },
    /// φ_q · φ_k (FlashBias: Wu et al. 2025, arXiv 2505.12044): as if the factors were appended to q and k, but in
    /// f32 whatever q and k are, outside of scale and softcap, and with heads of their own where K has fewer.
    /// A stride of 0 shares a factor along an axis.
    Factors {
        /// (B, H, Tq, R).
        q: View<'a, f32>,
        /// (B, H, Tk, R).
        k: View<'a, f32>,
    },
}

impl Bias<'_> {
    /// Its name in messages.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Bias::Alibi(_) => "slopes",
            Bias::Dense(_) => "dense bias",
            Bias::Keys(_) => "bias of keys",
            Bias::Relative { .. } => "bias of distances",
            Bias::Factors { .. } => "factors",
        }
    }

    /// Against shapes of q and k, and the longest sequence of keys.
    pub(super) fn check(
        &self,
        op: &'static str,
        [b, h, tq, _]: [usize; 4],
        [_, _, tk, _]: [usize; 4],
        longest: usize,
    ) -> Result<()> {
        let heads = |x: &View<f32>, name| {
            same(op, "batch", name, x.shape[0], "q", b)?;
            same(op, "heads", name, x.shape[1], "q", h)
        };
        match self {
            Bias::Alibi(slopes) => same(op, "heads", "slopes", slopes.len(), "q", h),
            Bias::Dense(x) => {
                heads(x, "bias")?;
                same(op, "tokens", "bias", x.shape[2], "q", tq)?;
                same(op, "keys", "bias", x.shape[3], "k", longest)
            }
            Bias::Keys(x) => {
                heads(x, "bias")?;
                same(op, "tokens", "bias", x.shape[2], "one row a head", 1)?;
                same(op, "keys", "bias", x.shape[3], "k", tk)
            }
            Bias::Relative { table, left } => {
                let n = table.len() / h.max(1);
                if n * h != table.len() || (h > 0 && *left >= n) {
                    return Err(KernelError::Param {
                        op,
                        name: "bias of distances",
                        value: format!("{} numbers for {h} heads, distance 0 at {left}", table.len()),
                        remedy: "give every head as many, with distance 0 among them".into(),
                    });
                }
                Ok(())
            }
            Bias::Factors { q, k } => {
                heads(q, "query factors")?;
                heads(k, "key factors")?;
                same(op, "tokens", "query factors", q.shape[2], "q", tq)?;
                same(op, "tokens", "key factors", k.shape[2], "k", tk)?;
                same(op, "rank", "query factors", q.shape[3], "key factors", k.shape[3])
            }
        }
    }

    /// That of the sequence of these tokens.
    pub(super) fn part(self, q: &Range<usize>, k: &Range<usize>) -> Self {
        match self {
            Bias::Alibi(_) | Bias::Relative { .. } => self,
            Bias::Dense(x) => Bias::Dense(x.part(q.clone(), 0..k.len())),
            Bias::Keys(x) => Bias::Keys(x.part(0..1, k.clone())),
            Bias::Factors { q: a, k: b } => {
                let r = 0..a.shape[3];
                Bias::Factors { q: a.part(q.clone(), r.clone()), k: b.part(k.clone(), r) }
            }
        }
    }

    /// Width of the factors, if it is made of such.
    pub(super) fn rank(&self) -> usize {
        match self {
            Bias::Factors { q, .. } => q.shape[3],
            _ => 0,
        }
    }
}

/// Room for a tile and what it is made of.
pub(super) struct Room {
    tile: Buf,
    factors: Buf,
    line: Vec<f32>,
}

impl Room {
    pub(super) fn new() -> Self {
        Self { tile: Buf::new(), factors: Buf::new(), line: Vec::new() }
    }
}

/// Runs of consecutive keys, as ranges of places in the list.
pub(super) fn runs(keys: &[u32]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    keys.chunk_by(|a, b| a + 1 == *b).map(move |run| {
        at += run.len();
        at - run.len()..at
    })
}

/// Shorter runs are not worth a transposition in vectors.
pub(super) const SHORT: usize = 4;

impl Scope<'_> {
    /// Position of query `i` among the keys.
    pub(super) fn own(&self, i: usize) -> i64 {
        (self.tk + i) as i64 - self.tq as i64
    }

    /// The bias of `keys` for the queries `rows` in rows of `w`, in units in which `c` takes scores to
    /// base 2; null without a bias. Lanes past the rows hold anything.
    pub(super) fn bias_tile(
        &self,
        room: &mut Room,
        [bi, hi]: [usize; 2],
        keys: &[u32],
        rows: Range<usize>,
        w: usize,
        c: f32,
    ) -> *const f32 {
        let Some(bias) = self.bias else { return null() };
        let unit = LOG2_E / c;
        let tile = room.tile.at_least((keys.len() + KEY_PAD) * w);
        // SAFETY: `at_least` gave so many elements, initialised.
        let to = unsafe { std::slice::from_raw_parts_mut(tile, keys.len() * w) };
        let own = self.own(rows.start);
        match bias {
            Bias::Alibi(slopes) => {
                let slope = slopes[hi] * unit;
                toeplitz(&mut room.line, to, keys, w, own, |d| -slope * d.abs() as f32);
            }
            Bias::Relative { table, left } => {
                let n = table.len() / self.heads;
                let table = &table[hi * n..(hi + 1) * n];
                toeplitz(&mut room.line, to, keys, w, own, |d| table[place(d, left, n)] * unit);
            }
            Bias::Keys(view) => {
                let row = view.row(bi, hi, 0);
                for (line, &j) in to.chunks_exact_mut(w).zip(keys) {
                    line.fill(row[j as usize] * unit);
                }
            }
            Bias::Dense(view) => {
                for run in runs(keys) {
                    let first = keys[run.start] as usize;
                    if run.len() < SHORT || !w.is_multiple_of(self.kernels.lanes) {
                        for (x, i) in rows.clone().enumerate() {
                            let row = &view.row(bi, hi, i)[first..first + run.len()];
                            for (line, &b) in to[run.start * w..].chunks_exact_mut(w).zip(row) {
                                line[x] = b * unit;
                            }
                        }
                        continue;
                    }
                    let mut lines = [null(); MAX_STRIP];
                    for (line, i) in lines.iter_mut().zip(rows.clone()) {
                        *line = view.row(bi, hi, i)[first..first + run.len()].as_ptr();
                    }
                    // SAFETY: as many rows as the strip has, of as many elements as the run has keys; w is whole
                    // vectors; `kernels` suits the machine.
                    unsafe { (self.kernels.pack)(&lines[..rows.len()], run.len(), unit, w, tile.add(run.start * w)) };
                }
            }
            Bias::Factors { q, k } => {
                let r = q.shape[3];
                let lanes = self.kernels.lanes;
                if !w.is_multiple_of(lanes) {
                    for (line, &j) in to.chunks_exact_mut(w).zip(keys) {
                        let k = k.row(bi, hi, j as usize);
                        for (x, i) in line.iter_mut().zip(rows.clone()) {
                            *x = q.row(bi, hi, i).iter().zip(k).map(|(q, k)| q * k).sum::<f32>() * unit;
                        }
                    }
                    return tile;
                }
                let mut lines = [null(); MAX_STRIP];
                for (line, i) in lines.iter_mut().zip(rows.clone()) {
                    *line = q.row(bi, hi, i).as_ptr();
                }
                let mut k_rows = [null(); MASKS + KEY_PAD];
                for (line, &j) in k_rows.iter_mut().zip(keys) {
                    *line = k.row(bi, hi, j as usize).as_ptr();
                }
                let pad = k_rows[keys.len() - 1];
                k_rows[keys.len()..keys.len() + KEY_PAD].fill(pad);
                let qt = room.factors.at_least(r * w);
                // SAFETY: rows of r elements, KEY_PAD more than there are keys; `qt` has room for r rows of w and
                // the tile for KEY_PAD rows behind its own; the instruction set is at most what the machine has.
                unsafe {
                    (self.kernels.pack)(&lines[..rows.len()], r, unit, w, qt);
                    strip::score_tile(self.isa, w / lanes, keys.len(), r, qt, k_rows.as_ptr(), tile);
                }
            }
        }
        tile
    }
}

/// Where a table of `n` keeps a distance.
pub(super) fn place(distance: i64, left: usize, n: usize) -> usize {
    (distance + left as i64).clamp(0, n as i64 - 1) as usize
}

/// A tile of `f(distance)`, the queries' positions starting at `own`.
fn toeplitz(line: &mut Vec<f32>, to: &mut [f32], keys: &[u32], w: usize, own: i64, f: impl Fn(i64) -> f32) {
    let (Some(&first), Some(&last)) = (keys.first(), keys.last()) else { return };
    let from_last = i64::from(last) - own;
    if (last - first) as usize > 4 * keys.len() {
        for (row, &j) in to.chunks_exact_mut(w).zip(keys) {
            for (x, lane) in row.iter_mut().zip(0..) {
                *x = f(i64::from(j) - own - lane);
            }
        }
        return;
    }
    // Every row is a part of one line.
    line.clear();
    line.extend((0..((last - first) as usize + w) as i64).map(|t| f(from_last - t)));
    for (row, &j) in to.chunks_exact_mut(w).zip(keys) {
        let at = (last - j) as usize;
        row.copy_from_slice(&line[at..at + w]);
    }
}
