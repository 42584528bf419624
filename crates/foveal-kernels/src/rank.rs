//! Choosing keys from tiles of scores that lie key by key: row j holds key j's scores for up to
//! [`WIDTH`] queries side by side, the order in which a product of keys with a tile of
//! queries comes out. Sixteen queries then share every comparison, and what a key's row of
//! comparisons gives is the key's mark in a [`crate::HeadTable`].

// The whole file runs under the contract of `simd`; a block per vector operation would only repeat it.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::dispatch::with_isa;
use crate::error::{KernelError, Result, same};
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::Simd;
use std::cell::Cell;
use std::cmp::Ordering;
use std::ops::Range;

/// Queries of a tile: one bit each in a mark.
pub const WIDTH: usize = 64;

/// Queries that are searched together.
const GROUP: usize = 16;
/// Keys of the sample in which the search begins.
const SAMPLE: usize = 512;
/// Scores that may lie between two thresholds when the search of the sample, and of all, ends.
const CLOSE: f32 = 4.0;
const LISTED: f32 = 64.0;
/// Most passes over the scores. Every other one halves the floats between the two thresholds, of
/// which there are fewer than 2³².
const PASSES: usize = 72;

/// Bits of the lanes with x ≥ t (NaN in x counts as at least t).
#[inline(always)]
unsafe fn at_least<S: Simd>(x: S::V, t: S::V) -> u32 {
    let one = S::zero_below(x, t, S::splat(1.0));
    !S::abs_lt(one, S::splat(0.5)) & (u32::MAX >> (32 - S::LANES))
}

/// Set scores outside each query's span to −∞.
fn hide(scores: &mut [f32], spans: &[Range<usize>]) {
    let keys = scores.len() / WIDTH;
    let from = spans.iter().map(|s| s.start).max().unwrap_or(0).min(keys);
    let to = spans.iter().map(|s| s.end).min().unwrap_or(0).clamp(from, keys);
    for j in (0..from).chain(to..keys) {
        for (x, s) in scores[j * WIDTH..].iter_mut().zip(spans) {
            if !s.contains(&j) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
}

fn check(op: &'static str, scores: &[f32], spans: &[Range<usize>], rows: usize) -> Result<()> {
    same(op, "keys*64", "scores", scores.len(), "output", rows * WIDTH)?;
    if spans.len() > WIDTH {
        return Err(KernelError::Param {
            op,
            name: "queries",
            value: spans.len().to_string(),
            remedy: format!("a tile has at most {WIDTH}"),
        });
    }
    if let Some(s) = spans.iter().find(|s| s.end > rows) {
        return Err(KernelError::Param {
            op,
            name: "span",
            value: format!("{s:?}"),
            remedy: format!("there are {rows} keys"),
        });
    }
    Ok(())
}

/// Mark each query's largest scores: bit i of `marks[j]` says that key j is among the `keep[i]`
/// largest of query i's scores within `spans[i]`. Of equal scores the earlier keys come first; a
/// score of −∞ or NaN is never marked. `scores` is (keys, [`WIDTH`]), its columns past the
/// queries are ignored; scores outside the spans are overwritten.
///
/// # Errors
/// More queries than a tile has, a span past the keys, or lengths that do not fit.
pub fn top_marks(
    scores: &mut [f32],
    spans: &[Range<usize>],
    keep: &[usize],
    marks: &mut [u64],
    isa: Isa,
) -> Result<()> {
    check("top_marks", scores, spans, marks.len())?;
    same("top_marks", "queries", "keep", keep.len(), "spans", spans.len())?;
    hide(scores, spans);
    marks.fill(0);
    let isa = isa.min(Isa::detect());
    for first in (0..spans.len()).step_by(GROUP) {
        let n = GROUP.min(spans.len() - first);
        let mut want = [0f32; GROUP];
        for (w, k) in want.iter_mut().zip(&keep[first..first + n]) {
            *w = (*k).min(marks.len()) as f32;
        }
        // SAFETY: the machine has `isa`; columns first..first + GROUP lie inside every row.
        unsafe { group(isa, scores, first, n, &want, marks) };
    }
    Ok(())
}

/// Add each query's softmax over its span to `sums`, laid out as `scores`:
/// `sums[j][i]` += e^(scale·(s_ji − max)) / Σ. A query whose span is empty adds nothing.
/// `scores` is overwritten. `scale` must be positive.
///
/// # Errors
/// As [`top_marks`].
pub fn add_softmax(scores: &mut [f32], spans: &[Range<usize>], scale: f32, sums: &mut [f32], isa: Isa) -> Result<()> {
    let keys = scores.len() / WIDTH;
    check("add_softmax", scores, spans, keys)?;
    same("add_softmax", "keys*64", "sums", sums.len(), "scores", scores.len())?;
    hide(scores, spans);
    let isa = isa.min(Isa::detect());
    for first in (0..spans.len()).step_by(GROUP) {
        // SAFETY: the machine has `isa`; columns first..first + GROUP lie inside every row.
        unsafe { softmax(isa, scores, first, scale, sums) };
    }
    Ok(())
}

/// Thresholds of one group of queries, one a lane.
struct Search {
    /// More scores than wanted lie at or above it.
    low: [f32; GROUP],
    /// At most as many as wanted lie at or above it.
    high: [f32; GROUP],
    /// Scores at or above the two.
    n_low: [f32; GROUP],
    n_high: [f32; GROUP],
}

/// For each lane, how many rows of `x` (keys, GROUP) lie at or above the thresholds.
#[inline(always)]
unsafe fn count<S: Simd>(x: &[f32], thresholds: &[f32; GROUP]) -> [f32; GROUP] {
    let mut n = [0f32; GROUP];
    let keys = x.len() / GROUP;
    let mut c = 0;
    while c < GROUP {
        let at = x.as_ptr().add(c);
        let (t, one) = (S::load(thresholds.as_ptr().add(c)), S::splat(1.0));
        let mut sums = [S::splat(0.0); 4];
        let mut j = 0;
        while j + 4 <= keys {
            for i in 0..4 {
                sums[i] = S::add(sums[i], S::zero_below(S::load(at.add((j + i) * GROUP)), t, one));
            }
            j += 4;
        }
        while j < keys {
            sums[0] = S::add(sums[0], S::zero_below(S::load(at.add(j * GROUP)), t, one));
            j += 1;
        }
        S::store(n.as_mut_ptr().add(c), S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        c += S::LANES;
    }
    n
}

impl Search {
    /// Begin between two thresholds (low ≤ high), which need not enclose the one wanted. A query that
    /// wants all there are gets the lowest float for both, one that wants none +∞.
    #[inline(always)]
    unsafe fn begin<S: Simd>(x: &[f32], want: &[f32; GROUP], low: &[f32; GROUP], high: &[f32; GROUP]) -> Search {
        let all = count::<S>(x, &[f32::MIN; GROUP]);
        let (n_low, n_high) = (count::<S>(x, low), count::<S>(x, high));
        let mut s = Search { low: [f32::MIN; GROUP], high: [f32::INFINITY; GROUP], n_low: all, n_high: [0.0; GROUP] };
        for i in 0..GROUP {
            if all[i] <= want[i] || want[i] == 0.0 {
                let end = if want[i] > 0.0 { f32::MIN } else { f32::INFINITY };
                (s.low[i], s.high[i], s.n_low[i]) = (end, end, 0.0);
                continue;
            }
            for (t, n) in [(low[i], n_low[i]), (high[i], n_high[i])] {
                if n > want[i] && t >= s.low[i] {
                    (s.low[i], s.n_low[i]) = (t, n);
                }
                if n <= want[i] && t <= s.high[i] {
                    (s.high[i], s.n_high[i]) = (t, n);
                }
            }
        }
        s
    }

    /// Narrow the thresholds until at most `close` scores lie between them.
    #[inline(always)]
    unsafe fn narrow<S: Simd>(&mut self, x: &[f32], want: &[f32; GROUP], close: f32) {
        let mut guess = [0f32; GROUP];
        let mut open = [false; GROUP];
        for pass in 0..PASSES {
            for i in 0..GROUP {
                let (low, high) = (self.low[i], self.high[i]);
                let inside = self.n_low[i] - self.n_high[i];
                open[i] = inside > close && self.n_high[i] < want[i] && low.next_up() < high;
                guess[i] = high;
                if open[i] {
                    // By the counts, as if scores were evenly spread between the two, which is soon true
                    // of the middle of a distribution; or by number of floats, which also finds the
                    // end of a heavy tail.
                    let share = ((self.n_low[i] - want[i]) / inside).clamp(0.02, 0.98);
                    let even = low + (high - low) * share;
                    let g = if pass % 2 == 0 && even.is_finite() { even } else { between(low, high) };
                    guess[i] = g.clamp(low.next_up(), high);
                }
            }
            if !open.contains(&true) {
                break;
            }
            let above = count::<S>(x, &guess);
            for i in 0..GROUP {
                if !open[i] {
                    continue;
                }
                if above[i] > want[i] {
                    (self.low[i], self.n_low[i]) = (guess[i], above[i]);
                } else {
                    (self.high[i], self.n_high[i]) = (guess[i], above[i]);
                }
            }
        }
    }
}

thread_local! {
    /// Columns of one group side by side: fresh memory each time would cost as much as filling it.
    static COLUMNS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

#[inline(always)]
unsafe fn group_on<S: Simd>(scores: &[f32], first: usize, n: usize, want: &[f32; GROUP], marks: &mut [u64]) {
    let keys = marks.len();
    let mut x = COLUMNS.take();
    x.resize(keys * GROUP, 0.0);
    let mut c = 0;
    while c < GROUP {
        let none = S::splat(f32::NEG_INFINITY);
        for j in 0..keys {
            // The second of `max` wins over a NaN.
            let v = S::max(S::load(scores.as_ptr().add(j * WIDTH + first + c)), none);
            S::store(x.as_mut_ptr().add(j * GROUP + c), v);
        }
        c += S::LANES;
    }
    // Thresholds in a sample of the keys, at ranks between which the one wanted nearly always lies.
    let size = SAMPLE.min(keys);
    let mut sample = vec![0f32; size * GROUP];
    for (i, to) in sample.chunks_exact_mut(GROUP).enumerate() {
        let j = i * keys / size;
        to.copy_from_slice(&x[j * GROUP..][..GROUP]);
    }
    let (mut more, mut fewer) = ([0f32; GROUP], [0f32; GROUP]);
    for i in 0..GROUP {
        let p = want[i] / keys as f32;
        let (rank, margin) = (p * size as f32, 2.0 * (p * (1.0 - p) * size as f32).max(0.0).sqrt() + 1.0);
        (more[i], fewer[i]) = (rank + margin, (rank - margin).max(1.0));
    }
    let ends = [[f32::MIN; GROUP], [f32::MAX; GROUP]];
    let mut low = Search::begin::<S>(&sample, &more, &ends[0], &ends[1]);
    low.narrow::<S>(&sample, &more, CLOSE);
    let mut high = Search::begin::<S>(&sample, &fewer, &low.low, &ends[1]);
    high.narrow::<S>(&sample, &fewer, CLOSE);
    let mut s = Search::begin::<S>(&x, want, &low.low, &high.high);
    s.narrow::<S>(&x, want, LISTED);

    // Everything from `high` on is marked; what lies between the two is listed and ranked.
    let mut listed: [Vec<(f32, u32)>; GROUP] = Default::default();
    let mut c = 0;
    while c < GROUP {
        let (low, high) = (S::load(s.low.as_ptr().add(c)), S::load(s.high.as_ptr().add(c)));
        for j in 0..keys {
            let v = S::load(x.as_ptr().add(j * GROUP + c));
            let sure = at_least::<S>(v, high);
            let mut rest = at_least::<S>(v, low) & !sure;
            marks[j] |= u64::from(sure) << (first + c);
            while rest != 0 {
                let i = rest.trailing_zeros() as usize;
                listed[c + i].push((x[j * GROUP + c + i], j as u32));
                rest &= rest - 1;
            }
        }
        c += S::LANES;
    }
    for (i, list) in listed.iter_mut().enumerate().take(n) {
        let more = (want[i] - s.n_high[i]).max(0.0) as usize;
        if more < list.len() && more > 0 {
            // Of equal scores the earlier keys come first.
            let order =
                |a: &(f32, u32), b: &(f32, u32)| b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1));
            list.select_nth_unstable_by(more - 1, order);
        }
        for &(_, j) in list.iter().take(more) {
            marks[j as usize] |= 1 << (first + i);
        }
    }
    // Columns past the queries hold anything.
    if n < GROUP {
        let bits = (((1u64 << (GROUP - n)) - 1) << n) << first;
        marks.iter_mut().for_each(|m| *m &= !bits);
    }
    COLUMNS.set(x);
}

/// The middle float of two, counting floats.
fn between(a: f32, b: f32) -> f32 {
    let order = |x: f32| {
        let i = x.to_bits() as i32;
        i64::from(if i < 0 { i32::MIN - i } else { i })
    };
    let middle = (order(a) + order(b)).div_euclid(2) as i32;
    f32::from_bits(if middle < 0 { i32::MIN - middle } else { middle } as u32)
}

#[inline(always)]
unsafe fn softmax_on<S: Simd>(scores: &mut [f32], first: usize, scale: f32, sums: &mut [f32]) {
    let keys = scores.len() / WIDTH;
    let (base, to) = (scores.as_mut_ptr().add(first), sums.as_mut_ptr().add(first));
    let mut c = 0;
    while c < GROUP {
        let none = S::splat(f32::NEG_INFINITY);
        let mut top = none;
        for j in 0..keys {
            top = S::max(S::load(base.add(j * WIDTH + c)), top);
        }
        // Nothing seen: any finite shift keeps −∞ − shift from being a NaN.
        top = S::zero_below(top, S::splat(f32::MIN), top);
        let factor = S::splat(scale);
        let mut sum = S::splat(0.0);
        for j in 0..keys {
            let p = base.add(j * WIDTH + c);
            let e = exp::<S>(S::mul(S::sub(S::load(p), top), factor));
            S::store(p, e);
            sum = S::add(sum, e);
        }
        let sum = S::max(sum, S::splat(f32::MIN_POSITIVE));
        let inv = S::div(S::splat(1.0), sum);
        for j in 0..keys {
            let (p, t) = (base.add(j * WIDTH + c), to.add(j * WIDTH + c));
            S::store(t, S::fma(S::load(p), inv, S::load(t)));
        }
        c += S::LANES;
    }
}

with_isa!(simd, unsafe fn group => group_on(scores: &[f32], first: usize, n: usize, want: &[f32; GROUP], marks: &mut [u64]));
with_isa!(simd, unsafe fn softmax => softmax_on(scores: &mut [f32], first: usize, scale: f32, sums: &mut [f32]));
