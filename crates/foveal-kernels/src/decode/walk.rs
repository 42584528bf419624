//! From the keys that a job visits to blocks of rows, across segments.

use super::Segment;
use super::block::{BLOCK, Block};
use super::codec::Raw;
use std::ops::Range;

/// One K/V head of one sequence.
pub(super) struct Head<'a> {
    segments: &'a [Segment<'a>],
    /// First token of each segment.
    starts: Vec<usize>,
    pub(super) tokens: usize,
}

impl<'a> Head<'a> {
    pub(super) fn new(segments: &'a [Segment<'a>]) -> Self {
        let mut tokens = 0;
        let starts = segments
            .iter()
            .map(|s| {
                tokens += s.len;
                tokens - s.len
            })
            .collect();
        Self { segments, starts, tokens }
    }
}

/// Keys that a job visits.
pub(super) enum Keys<'a> {
    /// The first so many.
    First(usize),
    /// These.
    Listed(&'a [u32]),
}

impl Keys<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Keys::First(n) => *n,
            Keys::Listed(l) => l.len(),
        }
    }

    /// Each segment with the number of its keys visited, if any.
    pub(super) fn visit<'a>(&self, head: &Head<'a>, mut f: impl FnMut(&Segment<'a>, usize)) {
        let mut at = 0;
        for (s, base) in head.segments.iter().zip(&head.starts) {
            let keys = match self {
                Keys::First(_) => s.len,
                Keys::Listed(l) => l[at..].partition_point(|&k| (k as usize) < base + s.len),
            };
            at += keys;
            if keys > 0 {
                f(s, keys);
            }
        }
    }

    /// Of the visited keys numbered `range`, how many each query that sees `visible` tokens sees.
    pub(super) fn seen(&self, range: &Range<usize>, visible: &[usize], seen: &mut [usize]) {
        for (seen, &visible) in seen.iter_mut().zip(visible) {
            *seen = match self {
                Keys::First(_) => visible.clamp(range.start, range.end) - range.start,
                Keys::Listed(l) if (l[range.end - 1] as usize) < visible => range.len(),
                Keys::Listed(l) => l[range.clone()].partition_point(|&k| (k as usize) < visible),
            };
        }
    }
}

/// Goes through the visited keys of one head, one block after another.
pub(super) struct Walk<'w, 'a> {
    head: &'w Head<'a>,
    keys: &'w Keys<'w>,
    /// Numbers of the keys to come.
    left: Range<usize>,
    /// The segment in hand.
    at: usize,
    even: bool,
}

/// What a block holds.
pub(super) struct Filled<'a> {
    /// Numbers of its keys among the visited.
    pub(super) keys: Range<usize>,
    pub(super) channels: Option<&'a [u32]>,
    /// Whether it is the first, third, … of its walk.
    pub(super) even: bool,
}

impl<'w, 'a> Walk<'w, 'a> {
    /// The visited keys numbered `range`.
    pub(super) fn new(head: &'w Head<'a>, keys: &'w Keys<'w>, range: Range<usize>) -> Self {
        let token = match keys {
            Keys::First(_) => range.start,
            Keys::Listed(l) => l.get(range.start).map_or(0, |&k| k as usize),
        };
        let at = head.starts.partition_point(|&s| s <= token).saturating_sub(1);
        Self { head, keys, left: range, at, even: false }
    }

    /// As many of the next keys as fit into a block and are stored alike; `None` after the last.
    pub(super) fn fill(&mut self, block: &mut Block) -> Option<Filled<'a>> {
        let first = self.left.start;
        let token = |i: usize| match self.keys {
            Keys::First(_) => i,
            Keys::Listed(l) => l[i] as usize,
        };
        let mut channels = None;
        block.len = 0;
        while block.len < BLOCK && !self.left.is_empty() {
            let i = self.left.start;
            let from = token(i);
            while from >= self.head.starts[self.at] + self.head.segments[self.at].len {
                self.at += 1;
            }
            let (s, base) = (&self.head.segments[self.at], self.head.starts[self.at]);
            let (k, v) = (s.k.raw(), s.v.raw());
            if block.len == 0 {
                (block.k_kind, block.v_kind, channels) = (k.kind, v.kind, s.channels);
            } else if (block.k_kind, block.v_kind) != (k.kind, v.kind) || channels != s.channels {
                break;
            }
            let room = (BLOCK - block.len).min(self.left.len());
            let n = match self.keys {
                Keys::First(_) => {
                    let n = room.min(base + s.len - from);
                    consecutive(block, &k, &v, from - base, n);
                    n
                }
                Keys::Listed(l) => listed(block, &k, &v, &l[i..i + room], base, s.len),
            };
            block.len += n;
            self.left.start += n;
        }
        if block.len == 0 {
            return None;
        }
        block.close();
        self.even = !self.even;
        Some(Filled { keys: first..self.left.start, channels, even: self.even })
    }
}

/// Append rows `from..from + n`.
fn consecutive(block: &mut Block, k: &Raw, v: &Raw, from: usize, n: usize) {
    let to = block.len..block.len + n;
    for (rows, scales, raw) in [(&mut block.k, &mut block.k_scale, k), (&mut block.v, &mut block.v_scale, v)] {
        let base = raw.base.wrapping_add(from * raw.step);
        for (i, row) in rows[to.clone()].iter_mut().enumerate() {
            *row = base.wrapping_add(i * raw.step);
        }
        if !raw.scales.is_null() {
            // SAFETY: the caller's segment was found to hold a scale for each of its rows.
            let from = unsafe { std::slice::from_raw_parts(raw.scales.add(from), n) };
            scales[to.clone()].copy_from_slice(from);
        }
    }
}

/// Append those of `tokens` that lie in `base..base + len`; how many.
fn listed(block: &mut Block, k: &Raw, v: &Raw, tokens: &[u32], base: usize, len: usize) -> usize {
    let mut n = 0;
    for &token in tokens {
        let row = token as usize - base;
        if row >= len {
            break;
        }
        let at = block.len + n;
        for (rows, scales, raw) in [(&mut block.k, &mut block.k_scale, k), (&mut block.v, &mut block.v_scale, v)] {
            rows[at] = raw.base.wrapping_add(row * raw.step);
            if !raw.scales.is_null() {
                // SAFETY: as above.
                scales[at] = unsafe { *raw.scales.add(row) };
            }
        }
        n += 1;
    }
    n
}
