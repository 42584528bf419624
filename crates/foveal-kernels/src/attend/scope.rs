//! What the queries of a call see: keys by list and mask, and the work that comes of it.

use super::ragged::{Piece, pieces};
use super::strip::{Kernels, MAX_STRIP};
use super::{Attend, Band, Bias};
use crate::error::{KernelError, Result, same};
use crate::isa::Isa;
use crate::table::{HeadKeys, HeadTable};
use crate::work::Work;
use std::ops::Range;
use std::ptr::null;

/// What each query visits, before causality and band.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Every key.
    Dense,
    /// Blocks; one table a (batch, head).
    Table(&'a [HeadTable]),
    /// Key lists; one a (batch, head).
    Keys(&'a [HeadKeys]),
    /// Blocks and, besides them, single keys, which all queries of their group visit whatever row masks say. One of
    /// block and group divides the other.
    Both(&'a [HeadTable], &'a [HeadKeys]),
}

impl<'a> Source<'a> {
    /// That of sequence `s` of `n`, each of `heads`, once it was checked against its queries and keys.
    fn part(&self, op: &'static str, s: usize, n: usize, heads: usize, tq: usize, tk: usize) -> Result<Self> {
        let of = s * heads..(s + 1) * heads;
        let tables = |t: &'a [HeadTable]| {
            same(op, "batch*heads", "block table", t.len(), "q", n * heads)?;
            let t = &t[of.clone()];
            t.iter().try_for_each(|t| t.check(tq, tk))?;
            Ok(t)
        };
        let lists = |k: &'a [HeadKeys]| {
            same(op, "batch*heads", "key lists", k.len(), "q", n * heads)?;
            let k = &k[of.clone()];
            k.iter().try_for_each(|k| k.check(tq, tk))?;
            Ok(k)
        };
        Ok(match self {
            Source::Dense => Source::Dense,
            Source::Table(t) => Source::Table(tables(t)?),
            Source::Keys(k) => Source::Keys(lists(k)?),
            Source::Both(t, k) => Source::Both(tables(t)?, lists(k)?),
        })
    }

    /// Pairs of queries and keys that are named, roughly; `None` for all of them.
    pub(super) fn pairs(&self) -> Option<usize> {
        let tables = |t: &[HeadTable]| t.iter().map(|t| t.blocks.len() * t.block_k * t.block_q).sum::<usize>();
        let lists = |k: &[HeadKeys]| k.iter().map(|k| k.keys.len() * k.group).sum::<usize>();
        match self {
            Source::Dense => None,
            Source::Table(t) => Some(tables(t)),
            Source::Keys(k) => Some(lists(k)),
            Source::Both(t, k) => Some(tables(t) + lists(k)),
        }
    }

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

impl Listed {
    /// Row masks of the `n` keys from place `at` on; none without a table that has them.
    pub(super) fn marks_of(&self, at: usize, n: usize) -> &[u64] {
        if self.marks.is_empty() { &[] } else { &self.marks[at..at + n] }
    }
}

/// One call, or one sequence of a ragged one, as far as it concerns who sees whom.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) p: &'a Attend<'a>,
    pub(super) source: Source<'a>,
    pub(super) bias: Option<Bias<'a>>,
    pub(super) isa: Isa,
    pub(super) kernels: &'static Kernels,
    pub(super) heads: usize,
    /// Queries and keys.
    pub(super) tq: usize,
    pub(super) tk: usize,
    /// Keys up to its own position, that included, and after it that a query may see.
    band: Band,
}

/// What of a tile of keys a strip of queries visits.
pub(super) struct Part {
    /// Places in the tile.
    pub(super) keys: Range<usize>,
    /// Lanes that see each, or null when all do.
    pub(super) masks: *const u64,
}

impl<'a> Scope<'a> {
    /// The scopes of a call, one for each sequence, once all that concerns them was checked against shapes of q
    /// and k.
    pub(super) fn all(
        op: &'static str,
        p: &'a Attend<'a>,
        source: Source<'a>,
        q: [usize; 4],
        k: [usize; 4],
    ) -> Result<Vec<(Piece, Self)>> {
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
        if let Some(beta) = p.repeated_max
            && !(beta > 1.0 && beta.is_finite())
        {
            return Err(KernelError::Param {
                op,
                name: "repeated_max",
                value: beta.to_string(),
                remedy: "use a factor above 1, as 2, or none".into(),
            });
        }
        let [b, h, ..] = q;
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
        let pieces = pieces(op, p.cu_seqlens, q, k[2])?;
        if let Some(bias) = p.bias {
            bias.check(op, q, k, pieces.iter().map(|p| p.k.len()).max().unwrap_or(0))?;
        }
        let isa = p.isa.min(Isa::detect());
        let mut band = p.band.unwrap_or(Band { left: usize::MAX, right: usize::MAX });
        if p.causal {
            band.right = 0;
        }
        let n = pieces.len();
        let one = |(s, piece): (usize, Piece)| {
            let (tq, tk) = (piece.q.len(), piece.k.len());
            let scope = Self {
                p,
                source: source.part(op, s, n, b * h, tq, tk)?,
                bias: p.bias.map(|x| x.part(&piece.q, &piece.k)),
                isa,
                kernels: Kernels::of(isa),
                heads: h,
                tq,
                tk,
                band,
            };
            Ok((piece, scope))
        };
        pieces.into_iter().enumerate().map(one).collect()
    }

    /// Width of the factors of the bias, 0 without such.
    pub(super) fn rank(&self) -> usize {
        self.bias.map_or(0, |b| b.rank())
    }

    /// Keys that query `i` may see by causality and band.
    pub(super) fn visible(&self, i: usize) -> Range<usize> {
        let (tq, tk) = (self.tq, self.tk);
        // Its own position and one, and `tq` on top so that it is not negative.
        let next = tk + i + 1;
        let hi = next.saturating_add(self.band.right).saturating_sub(tq).min(tk);
        next.saturating_sub(self.band.left.saturating_add(tq))..hi
    }

    /// What the queries `rows` visit of a tile of `keys` (with row `marks`, or none): from a multiple of `grain` to
    /// one or the tile's end. `lane` is the first query's place in its list. `None` if they see nothing of it.
    pub(super) fn part(
        &self,
        masks: &mut [u64; MASKS],
        keys: &[u32],
        marks: &[u64],
        rows: &Range<usize>,
        lane: usize,
        grain: usize,
    ) -> Option<Part> {
        let (first, last) = (self.visible(rows.start), self.visible(rows.end - 1));
        // Keys ascend: what these queries cannot see lies at the two ends.
        let inside = keys[0] as usize >= first.start && (keys[keys.len() - 1] as usize) < last.end;
        let (mut from, mut to) = (0, keys.len());
        if !inside {
            from = keys.partition_point(|&j| (j as usize) < first.start);
            to = keys.partition_point(|&j| (j as usize) < last.end);
            if from >= to {
                return None;
            }
            (from, to) = (from / grain * grain, to.next_multiple_of(grain).min(keys.len()));
        }
        let edge = (keys[to - 1] as usize) >= first.end || (keys[from] as usize) < last.start;
        let marks = (!marks.is_empty()).then(|| (&marks[from..to], lane));
        let masked = edge || marks.is_some();
        if masked {
            self.masks(masks, &keys[from..to], rows.start, marks);
        }
        Some(Part { keys: from..to, masks: if masked { masks.as_ptr() } else { null() } })
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
                    let (inside, rest) = rest.split_at(rest.partition_point(|&j| (j as usize) < run.end));
                    singles = rest;
                    if t.rows.is_some() {
                        s.marks.resize(s.marks.len() + before.len(), u64::MAX);
                        let block = s.marks.len();
                        s.marks.resize(block + run.end - from, mark);
                        for &j in inside {
                            s.marks[block + j as usize - from] = u64::MAX;
                        }
                    }
                    s.keys.extend(from as u32..run.end as u32);
                }
                s.keys.extend_from_slice(singles);
                if t.rows.is_some() {
                    s.marks.resize(s.marks.len() + singles.len(), u64::MAX);
                }
                keys += count_singles(&tiles, all, &mut work);
            }
            Source::Keys(t) => {
                s.keys.extend_from_slice(within(t[bh].row(rows.start / t[bh].group), &seen));
                keys += count_singles(&tiles, &s.keys, &mut work);
            }
        }
        (work, keys)
    }

    /// For each key, the lanes that see it; lane 0 is query `i0`. Marks come with their shift.
    fn masks(&self, masks: &mut [u64; MASKS], keys: &[u32], i0: usize, marks: Option<(&[u64], usize)>) {
        let own = self.own(i0) as isize;
        for (x, &j) in keys.iter().enumerate() {
            // Seen from the query on whose band ends with it to the one whose band starts with it.
            let ahead = j as isize - own;
            let mut m = match ahead.saturating_sub_unsigned(self.band.right) {
                ..=0 => u64::MAX,
                first @ 1..64 => u64::MAX << first,
                _ => 0,
            };
            m &= match ahead.saturating_add_unsigned(self.band.left) {
                ..=0 => 0,
                end @ 1..64 => u64::MAX >> (64 - end),
                _ => u64::MAX,
            };
            if let Some((marks, shift)) = marks {
                m &= marks[x] >> shift;
            }
            masks[x] = m;
        }
    }

    /// How much `rows` of one head are to do, roughly: what orders tasks, nothing more.
    pub(super) fn cost(&self, bh: usize, rows: &Range<usize>) -> usize {
        let seen = self.visible(rows.end - 1).end.saturating_sub(self.visible(rows.start).start);
        let listed = match self.source {
            Source::Dense => seen,
            Source::Table(t) | Source::Both(t, _) => t[bh].row(rows.start / t[bh].block_q).len() * t[bh].block_k,
            Source::Keys(k) => k[bh].row(rows.start / k[bh].group).len(),
        };
        listed.min(seen) * rows.len()
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

/// Refuse a log-sum-exp (`name`) where there is none.
pub(super) fn no_lse(op: &'static str, p: &Attend, name: &'static str, asked: bool) -> Result<()> {
    if !asked || p.normalizer.sigmoid().is_none() {
        return Ok(());
    }
    Err(KernelError::Param {
        op,
        name,
        value: "asked for".into(),
        remedy: "a sigmoid has no log-sum-exp; leave it out or use the softmax".into(),
    })
}
