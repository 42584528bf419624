//! What the queries of a call see: keys by list, mask and bias, and the work that comes of it.

use super::drive::Buf;
use super::strip::MAX_STRIP;
use super::{Attend, Bias};
use crate::error::{KernelError, Result, same};
use crate::exp::LOG2_E;
use crate::table::{HeadKeys, HeadTable};
use crate::work::Work;
use std::ops::Range;
use std::ptr::null;

/// What each query visits, before causality and window.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Every key.
    Dense,
    /// Blocks; one table a (batch, head).
    Table(&'a [HeadTable]),
    /// Key lists; one a (batch, head).
    Keys(&'a [HeadKeys]),
    /// Blocks without row masks and, besides them, single keys. One of block and group divides the other.
    Both(&'a [HeadTable], &'a [HeadKeys]),
}

impl Source<'_> {
    /// Queries of a (batch, head) that share a list of keys.
    pub(super) fn block(&self, bh: usize) -> usize {
        match self {
            Source::Dense => usize::MAX,
            Source::Table(t) => t[bh].block_q,
            Source::Keys(k) => k[bh].group,
            Source::Both(t, k) => t[bh].block_q.min(k[bh].group),
        }
    }
}

/// Queries of a work tile, and the alignment of task boundaries. Work is counted on this grid
/// whatever the strips of an instruction set, so that counters are the same everywhere.
pub(super) const WORK_TILE: usize = 64;

/// Keys of the longest tile of any path.
pub(super) const MASKS: usize = 256;

/// Keys that a run of queries visits.
#[derive(Default)]
pub(super) struct Listed {
    pub(super) keys: Vec<u32>,
    /// Row mask of each key, when the table has them.
    pub(super) marks: Vec<u64>,
}

/// One call as far as it concerns who sees whom.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) p: &'a Attend<'a>,
    pub(super) source: Source<'a>,
    /// Queries and keys.
    pub(super) tq: usize,
    pub(super) tk: usize,
}

impl<'a> Scope<'a> {
    /// The scope of a call, once cap, bias and sinks were checked against shapes of q and k.
    pub(super) fn new(
        op: &'static str,
        p: &'a Attend<'a>,
        source: Source<'a>,
        [b, h, tq, _]: [usize; 4],
        [_, _, tk, _]: [usize; 4],
    ) -> Result<Self> {
        if let Some(cap) = p.softcap
            && (cap.is_nan() || cap <= 0.0)
        {
            return Err(KernelError::Param {
                op,
                name: "softcap",
                value: cap.to_string(),
                remedy: "use a positive cap, or none".into(),
            });
        }
        match p.bias {
            None => {}
            Some(Bias::Alibi(slopes)) => same(op, "heads", "slopes", slopes.len(), "q", h)?,
            Some(Bias::Dense(x)) => {
                same(op, "batch", "bias", x.shape[0], "q", b)?;
                same(op, "heads", "bias", x.shape[1], "q", h)?;
                same(op, "tokens", "bias", x.shape[2], "q", tq)?;
                same(op, "keys", "bias", x.shape[3], "k", tk)?;
            }
        }
        if let (Some(_), Some(s)) = (p.normalizer.sigmoid(), p.sinks) {
            return Err(KernelError::Param {
                op,
                name: "sinks",
                value: format!("{} logits", s.len()),
                remedy: "a sigmoid has no denominator for sinks; leave them out or use the softmax".into(),
            });
        }
        if let Some(s) = p.sinks {
            same(op, "heads", "sinks", s.len(), "q", h)?;
        }
        Ok(Self { p, source, tq, tk })
    }

    /// Refuse a log-sum-exp (`name`) where there is none.
    pub(super) fn no_lse(&self, op: &'static str, name: &'static str, asked: bool) -> Result<()> {
        if !asked || self.p.normalizer.sigmoid().is_none() {
            return Ok(());
        }
        Err(KernelError::Param {
            op,
            name,
            value: "asked for".into(),
            remedy: "a sigmoid has no log-sum-exp; leave it out or use the softmax".into(),
        })
    }

    /// Keys that query `i` may see by causality and window.
    pub(super) fn visible(&self, i: usize) -> Range<usize> {
        let (tq, tk) = (self.tq, self.tk);
        if !self.p.causal {
            return 0..tk;
        }
        let hi = (tk + i + 1).saturating_sub(tq);
        hi.saturating_sub(self.p.window.unwrap_or(hi))..hi
    }

    /// List those keys (and row marks) of `rows`, all of one block, that lie in `part` (which starts at a
    /// multiple of 32), and count the tiles and pairs. Returns how many keys are read for them, too.
    pub(super) fn list(&self, s: &mut Listed, bh: usize, rows: &Range<usize>, part: &Range<usize>) -> (Work, u64) {
        s.keys.clear();
        s.marks.clear();
        let within_part = |r: Range<usize>| r.start.max(part.start)..r.end.min(part.end);
        let (first, last) = (self.visible(rows.start), self.visible(rows.end - 1));
        let seen = within_part(first.start..last.end);
        let mut work = Work::default();
        let tiles: Vec<(Range<usize>, usize)> = (rows.start..rows.end)
            .step_by(WORK_TILE)
            .map(|i| {
                let end = (i + WORK_TILE).min(rows.end);
                (within_part(self.visible(i).start..self.visible(end - 1).end), end - i)
            })
            .collect();
        let mut keys = 0u64;
        // Count a run of keys in every work tile that sees some of it.
        let mut count = |run: Range<usize>, width: usize| {
            for (seen, n) in &tiles {
                let (lo, hi) = (run.start.max(seen.start), run.end.min(seen.end));
                if lo < hi {
                    work.tiles += (hi.div_ceil(width) - lo / width) as u64;
                    work.pairs += ((hi - lo) * n) as u64;
                    keys += (hi - lo) as u64;
                }
            }
        };
        // A window may start anywhere, but packed values start at multiples of 32; what that adds
        // is cut from each strip (or masked).
        let aligned = seen.start / 32 * 32;
        match self.source {
            Source::Dense => {
                count(seen.clone(), WORK_TILE);
                s.keys.extend(aligned as u32..seen.end.max(aligned) as u32);
            }
            Source::Table(t) | Source::Both(t, _) => {
                let t = &t[bh];
                let qb = rows.start / t.block_q;
                // Single keys take their places between the blocks.
                let mut singles = match self.source {
                    Source::Both(_, k) => within(k[bh].row(rows.start / k[bh].group), &seen),
                    _ => &[],
                };
                let all = singles;
                for (e, &kb) in t.row(qb).iter().enumerate() {
                    let lo = kb as usize * t.block_k;
                    let run = lo.max(seen.start)..(lo + t.block_k).min(seen.end);
                    let mark = match &t.rows {
                        None => u64::MAX,
                        Some(m) => m[t.indptr[qb] + e] >> (rows.start % t.block_q),
                    };
                    // Bits past the block's rows mean nothing.
                    if run.is_empty() || mark & (u64::MAX >> (MAX_STRIP - rows.len().min(MAX_STRIP))) == 0 {
                        continue;
                    }
                    count(run.clone(), t.block_k);
                    let from = lo.max(aligned);
                    let (before, rest) = singles.split_at(singles.partition_point(|&j| (j as usize) < from));
                    s.keys.extend_from_slice(before);
                    singles = &rest[rest.partition_point(|&j| (j as usize) < run.end)..];
                    if t.rows.is_some() {
                        s.marks.resize(s.marks.len() + run.end - from, mark);
                    }
                    s.keys.extend(from as u32..run.end as u32);
                }
                s.keys.extend_from_slice(singles);
                keys += count_singles(&tiles, all, &mut work);
            }
            Source::Keys(t) => {
                s.keys.extend_from_slice(within(t[bh].row(rows.start / t[bh].group), &seen));
                keys += count_singles(&tiles, &s.keys, &mut work);
            }
        }
        (work, keys)
    }

    /// The bias of `keys` for the queries `rows` in rows of `w`, in units in which `c` takes scores to
    /// base 2; null without a bias.
    pub(super) fn bias_tile(
        &self,
        buf: &mut Buf,
        [bi, hi]: [usize; 2],
        keys: &[u32],
        rows: Range<usize>,
        w: usize,
        c: f32,
    ) -> *const f32 {
        let Some(bias) = self.p.bias else { return null() };
        let unit = LOG2_E / c;
        let to = buf.at_least(keys.len() * w);
        // SAFETY: `at_least` gave so many elements, initialised.
        let to = unsafe { std::slice::from_raw_parts_mut(to, keys.len() * w) };
        match bias {
            Bias::Alibi(slopes) => {
                let slope = slopes[hi] * unit;
                let own = self.tk as i64 - self.tq as i64 + rows.start as i64;
                for (line, &j) in to.chunks_exact_mut(w).zip(keys) {
                    let first = (own - i64::from(j)) as i32;
                    for (x, lane) in line.iter_mut().zip(0..) {
                        *x = -slope * (first + lane).abs() as f32;
                    }
                }
            }
            Bias::Dense(view) => {
                to.fill(0.0);
                for (x, i) in rows.enumerate() {
                    let row = view.row(bi, hi, i);
                    for (line, &j) in to.chunks_exact_mut(w).zip(keys) {
                        line[x] = row[j as usize] * unit;
                    }
                }
            }
        }
        to.as_ptr()
    }

    /// For each key, the lanes that see it; lane 0 is query `i0`. Marks come with their shift.
    pub(super) fn masks(&self, masks: &mut [u64; MASKS], keys: &[u32], i0: usize, marks: Option<(&[u64], usize)>) {
        // Key j is visible from query j − (tk − tq) on, for `window` queries.
        let offset = self.tk as isize - self.tq as isize + i0 as isize;
        for (x, &j) in keys.iter().enumerate() {
            let mut m = u64::MAX;
            if self.p.causal {
                let first = j as isize - offset;
                m = match first {
                    ..=0 => m,
                    1..64 => m << first,
                    _ => 0,
                };
                if let Some(w) = self.p.window {
                    m &= match first.saturating_add_unsigned(w) {
                        ..=0 => 0,
                        end @ 1..64 => u64::MAX >> (64 - end),
                        _ => u64::MAX,
                    };
                }
            }
            if let Some((marks, shift)) = marks {
                m &= marks[x] >> shift;
            }
            masks[x] = m;
        }
    }
}

/// The part of an ascending list that lies in `seen`.
fn within<'k>(keys: &'k [u32], seen: &Range<usize>) -> &'k [u32] {
    let lo = keys.partition_point(|&j| (j as usize) < seen.start);
    let hi = keys.partition_point(|&j| (j as usize) < seen.end);
    &keys[lo..hi.max(lo)]
}

/// Count single keys in every work tile (what it sees, its queries) that sees some of them; returns
/// how many are read.
fn count_singles(tiles: &[(Range<usize>, usize)], keys: &[u32], work: &mut Work) -> u64 {
    let mut read = 0;
    for (seen, n) in tiles {
        let keys = within(keys, seen).len();
        work.tiles += u64::from(keys > 0);
        work.pairs += (keys * n) as u64;
        read += keys as u64;
    }
    read
}
