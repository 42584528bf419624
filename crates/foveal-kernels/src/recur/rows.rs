//! Elementwise passes over the rows of a chunk.

#![allow(unsafe_op_in_unsafe_fn)]

use super::mat::{Mat, PAD};
use crate::dispatch::with_isa;
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::Simd;
use crate::view::Element;
use std::any::TypeId;

/// A factor for each row, or for each element.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a> {
    /// One.
    One,
    /// One factor a row.
    Row(&'a [f32]),
    /// One factor an element.
    Element(&'a Mat),
}

/// dst[t] = src[t] ∘ e[t] (or += it) for rows 0..n. With `late`, row t takes the factor of row
/// t − 1, and row 0 the factor 1.
pub(super) fn scale(isa: Isa, dst: &mut Mat, src: &Mat, e: Factor, n: usize, late: bool, add: bool) {
    assert!(dst.cols == src.cols && dst.rows >= n && src.rows >= n);
    scale_rows(isa, dst.all_mut(), src.all(), src.cols, e, 0..n, late, add);
}

/// [`scale`] on rows `range` of `src` and of the factors, into rows from 0 of `dst`; `late` restarts
/// at the first row.
pub(super) fn scale_from(isa: Isa, dst: &mut [f32], src: &Mat, e: Factor, range: std::ops::Range<usize>, late: bool) {
    let (cols, start) = (src.cols, range.start * src.cols);
    scale_rows(isa, dst, &src.all()[start..], cols, e, range, late, false);
}

/// dst[t] (+)= src[t] ∘ e[range.start + t].
pub(super) fn scale_rows(
    isa: Isa,
    dst: &mut [f32],
    src: &[f32],
    cols: usize,
    e: Factor,
    range: std::ops::Range<usize>,
    late: bool,
    add: bool,
) {
    let n = range.len();
    assert!(dst.len() >= n * cols && src.len() >= n * cols && cols.is_multiple_of(PAD));
    let (e, step, wide) = match e {
        Factor::One => (&[][..], 0, false),
        Factor::Row(e) => (&e[range], 1, false),
        Factor::Element(m) => {
            assert!(m.cols == cols);
            (&m.all()[range.start * cols..range.end * cols], cols, true)
        }
    };
    let sizes = Scale { n, cols, step, wide, late, add };
    // SAFETY: the slices hold n rows, factors n rows of `step`; `isa` was lowered to what the machine
    // has when the engine was made.
    unsafe { scale_all(isa, dst.as_mut_ptr(), src.as_ptr(), e.as_ptr(), sizes) }
}

#[derive(Clone, Copy)]
struct Scale {
    n: usize,
    cols: usize,
    /// Elements from factor row to factor row; 0: the factor is one.
    step: usize,
    /// A factor an element.
    wide: bool,
    late: bool,
    add: bool,
}

#[inline(always)]
unsafe fn scale_all_on<S: Simd>(dst: *mut f32, src: *const f32, e: *const f32, p: Scale) {
    for t in 0..p.n {
        let (dst, src) = (dst.add(t * p.cols), src.add(t * p.cols));
        let one = p.step == 0 || p.late && t == 0;
        let e = if one { e } else { e.add((t - usize::from(p.late)) * p.step) };
        let same = S::splat(if one || p.wide { 1.0 } else { *e });
        let each = p.wide && !one;
        for i in (0..p.cols).step_by(S::LANES) {
            let f = if each { S::load(e.add(i)) } else { same };
            let x = S::load(src.add(i));
            let y = if p.add { S::fma(x, f, S::load(dst.add(i))) } else { S::mul(x, f) };
            S::store(dst.add(i), y);
        }
    }
}
with_isa!(
    simd,
    unsafe fn scale_all => scale_all_on(dst: *mut f32, src: *const f32, e: *const f32, p: Scale)
);

/// dst ← dst · f.
pub(super) fn times(isa: Isa, dst: &mut [f32], f: f32) {
    // SAFETY: `isa` as above.
    unsafe { times_one(isa, dst, f) }
}

#[inline(always)]
unsafe fn times_one_on<S: Simd>(dst: &mut [f32], f: f32) {
    for d in dst {
        *d *= f;
    }
}
with_isa!(simd, unsafe fn times_one => times_one_on(dst: &mut [f32], f: f32));

/// Σ x[t]·y[t] for each row.
pub(super) fn dot(isa: Isa, x: &[f32], y: &[f32]) -> f32 {
    assert!(x.len() == y.len() && x.len().is_multiple_of(PAD));
    // SAFETY: equal lengths in whole vectors; `isa` as above.
    unsafe { dot_row(isa, x, y) }
}

/// dst (+)= x ∘ y · sign.
pub(super) fn add_product(isa: Isa, dst: &mut [f32], x: &[f32], y: &[f32], sign: f32) {
    assert!(x.len() == y.len() && x.len() == dst.len() && x.len().is_multiple_of(PAD));
    // SAFETY: equal lengths in whole vectors; `isa` as above.
    unsafe { fused(isa, dst, x, y, sign) }
}

/// dst += x.
pub(super) fn add(isa: Isa, dst: &mut [f32], x: &[f32]) {
    assert!(x.len() == dst.len());
    // SAFETY: equal lengths; `isa` as above.
    unsafe { sum(isa, dst, x) }
}

/// A ∘ M for the lower triangle of rows 0..n, zero above; `strict` drops the diagonal, `late` takes
/// row t − 1 of M.
pub(super) fn mask(isa: Isa, a: &mut Mat, m: Option<&Mat>, n: usize, strict: bool, late: bool) {
    for t in 0..n {
        let keep = t + usize::from(!strict);
        let row = &mut a.row_mut(t)[..n];
        row[keep..].fill(0.0);
        if let Some(m) = m
            && keep > 0
        {
            let m = &m.row(t - usize::from(late))[..keep];
            // SAFETY: equal lengths; `isa` as above.
            unsafe { times_in_place(isa, &mut row[..keep], m) };
        }
    }
}

#[inline(always)]
unsafe fn sum_on<S: Simd>(dst: &mut [f32], x: &[f32]) {
    for (d, x) in dst.iter_mut().zip(x) {
        *d += x;
    }
}
with_isa!(simd, unsafe fn sum => sum_on(dst: &mut [f32], x: &[f32]));

#[inline(always)]
unsafe fn times_in_place_on<S: Simd>(dst: &mut [f32], m: &[f32]) {
    for (d, s) in dst.iter_mut().zip(m) {
        *d *= s;
    }
}
with_isa!(simd, unsafe fn times_in_place => times_in_place_on(dst: &mut [f32], m: &[f32]));

#[inline(always)]
unsafe fn fused_on<S: Simd>(dst: &mut [f32], x: &[f32], y: &[f32], sign: f32) {
    let sign = S::splat(sign);
    for i in (0..dst.len()).step_by(S::LANES) {
        let to = dst.as_mut_ptr().add(i);
        let xy = S::mul(S::load(x.as_ptr().add(i)), S::load(y.as_ptr().add(i)));
        S::store(to, S::fma(sign, xy, S::load(to)));
    }
}
with_isa!(simd, unsafe fn fused => fused_on(dst: &mut [f32], x: &[f32], y: &[f32], sign: f32));

#[inline(always)]
unsafe fn dot_row_on<S: Simd>(x: &[f32], y: &[f32]) -> f32 {
    let mut sum = S::splat(0.0);
    for i in (0..x.len()).step_by(S::LANES) {
        sum = S::fma(S::load(x.as_ptr().add(i)), S::load(y.as_ptr().add(i)), sum);
    }
    S::sum(sum)
}
with_isa!(simd, unsafe fn dot_row => dot_row_on(x: &[f32], y: &[f32]) -> f32);

/// e^(sum of g over j < i ≤ t) in the lower triangle of rows 0..n of `m`, n ≤ 64: sums of the terms
/// themselves, since differences of long sums would lose the short ones.
pub(super) fn decay_matrix(isa: Isa, m: &mut Mat, g: &[f32], n: usize) {
    assert!(m.rows >= n && m.cols >= n && n <= 64 && g.len() >= n && n.is_multiple_of(PAD));
    let ld = m.cols;
    // SAFETY: `m` holds n rows of n; `isa` as above.
    unsafe { decay_matrix_by(isa, m.all_mut().as_mut_ptr(), ld, g, n) }
}

#[inline(always)]
unsafe fn decay_matrix_on<S: Simd>(m: *mut f32, ld: usize, g: &[f32], n: usize) {
    let mut x = [0f32; 64];
    for t in 0..n {
        for j in 0..t {
            x[j] += g[t];
        }
        for j in (0..t + 1).step_by(S::LANES) {
            S::store(m.add(t * ld + j), exp::<S>(S::load(x.as_ptr().add(j))));
        }
    }
}
with_isa!(simd, unsafe fn decay_matrix_by => decay_matrix_on(m: *mut f32, ld: usize, g: &[f32], n: usize));

/// Operands of the blocks on the diagonal under decay by channel: [`PAD`] rows of readers
/// (q and, by the rule, k or b) and writers (k and, by the rule, a), all `cols` wide.
#[derive(Clone, Copy)]
pub(super) struct Diagonal {
    pub(super) cols: usize,
    /// Row of g of the block.
    pub(super) g: *const f32,
    pub(super) readers: [*const f32; 2],
    pub(super) writers: [*const f32; 2],
    /// [reader][writer]; scores, `ld` from row to row.
    pub(super) scores: [[*mut f32; 2]; 2],
    pub(super) ld: usize,
    /// Two rows of scratch.
    pub(super) x: *mut f32,
    pub(super) e: *mut f32,
    /// Gradients (backward only).
    pub(super) d_readers: [*mut f32; 2],
    pub(super) d_writers: [*mut f32; 2],
}

/// Rules as constants: one reader and writer; a second reader after the decay; a second reader
/// before the decay, and a second writer.
pub(super) const ADD: u8 = 0;
pub(super) const DELTA: u8 = 1;
pub(super) const LOW_RANK: u8 = 2;

/// Scores of the block, every pair with its own exponential.
///
/// # Safety
/// Pointers reach what [`Diagonal`] says; the machine has `isa`.
pub(super) unsafe fn diagonal(isa: Isa, rule: u8, p: &Diagonal) {
    match rule {
        ADD => diagonal_add(isa, p),
        DELTA => diagonal_delta(isa, p),
        _ => diagonal_low_rank(isa, p),
    }
}

/// Gradients of the block: `scores` holds those of the scores.
///
/// # Safety
/// As [`diagonal`].
pub(super) unsafe fn diagonal_back(isa: Isa, rule: u8, p: &Diagonal) {
    match rule {
        ADD => diagonal_add_back(isa, p),
        DELTA => diagonal_delta_back(isa, p),
        _ => diagonal_low_rank_back(isa, p),
    }
}

#[inline(always)]
unsafe fn walk<S: Simd, const RULE: u8, const BACK: bool>(p: &Diagonal) {
    let zero = S::splat(0.0);
    let n = p.cols;
    for j in 0..PAD {
        for i in (0..n).step_by(S::LANES) {
            S::store(p.x.add(i), zero);
            S::store(p.e.add(i), S::splat(1.0));
        }
        for t in j..PAD {
            let score = |r: usize, w: usize| p.scores[r][w].add(t * p.ld + j);
            let mut sum = [[zero; 2]; 2];
            let mut given = sum;
            if BACK {
                for r in 0..1 + usize::from(RULE != ADD) {
                    for w in 0..1 + usize::from(RULE == LOW_RANK) {
                        given[r][w] = S::splat(*score(r, w));
                    }
                }
            }
            for i in (0..n).step_by(S::LANES) {
                let before = S::load(p.e.add(i));
                let mut e = before;
                if t > j {
                    let x = S::add(S::load(p.x.add(i)), S::load(p.g.add(t * n + i)));
                    e = exp::<S>(x);
                    S::store(p.x.add(i), x);
                    S::store(p.e.add(i), e);
                }
                // The second reader sees no writer of its own token.
                let readers = 1 + usize::from(RULE != ADD && t > j);
                let writers = 1 + usize::from(RULE == LOW_RANK);
                for r in 0..readers {
                    let e = if r == 1 && RULE == LOW_RANK { before } else { e };
                    let read = S::mul(S::load(p.readers[r].add(t * n + i)), e);
                    for w in 0..writers {
                        let write = S::load(p.writers[w].add(j * n + i));
                        if BACK {
                            let to = p.d_readers[r].add(t * n + i);
                            S::store(to, S::fma(given[r][w], S::mul(write, e), S::load(to)));
                            let to = p.d_writers[w].add(j * n + i);
                            S::store(to, S::fma(given[r][w], read, S::load(to)));
                        } else {
                            sum[r][w] = S::fma(read, write, sum[r][w]);
                        }
                    }
                }
            }
            if !BACK {
                for r in 0..1 + usize::from(RULE != ADD) {
                    for w in 0..1 + usize::from(RULE == LOW_RANK) {
                        *score(r, w) = S::sum(sum[r][w]);
                    }
                }
            }
        }
    }
}

macro_rules! walks {
    ($($name:ident $on:ident $rule:ident $back:literal)*) => { $(
        #[inline(always)]
        unsafe fn $on<S: Simd>(p: &Diagonal) {
            walk::<S, { $rule }, $back>(p)
        }
        with_isa!(simd, unsafe fn $name => $on(p: &Diagonal));
    )* };
}
walks! {
    diagonal_add diagonal_add_on ADD false
    diagonal_delta diagonal_delta_on DELTA false
    diagonal_low_rank diagonal_low_rank_on LOW_RANK false
    diagonal_add_back diagonal_add_back_on ADD true
    diagonal_delta_back diagonal_delta_back_on DELTA true
    diagonal_low_rank_back diagonal_low_rank_back_on LOW_RANK true
}

/// Ask for a row that will be read.
#[inline(always)]
pub(super) fn ask<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..std::mem::size_of_val(row)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address has no effect but on caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().wrapping_add(at)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// to = from · f, widened; the rest of `to` is zeroed.
pub(super) fn widen<T: Element>(isa: Isa, to: &mut [f32], from: &[T], f: f32) {
    let (to, rest) = to.split_at_mut(from.len());
    rest.fill(0.0);
    // SAFETY: equal lengths, and bits of bf16 and f32 read as such alone; `isa` was lowered to what the machine has.
    unsafe { widen_any(isa, to, from, f) }
}

#[inline(always)]
unsafe fn widen_any_on<S: Simd, T: Element>(to: &mut [f32], from: &[T], f: f32) {
    let (n, p, q) = (to.len(), from.as_ptr(), to.as_mut_ptr());
    let factor = S::splat(f);
    let mut i = 0;
    // Whole vectors; left to the compiler, rows of 64 went one by one.
    if TypeId::of::<T>() == TypeId::of::<half::bf16>() {
        while i + S::LANES <= n {
            S::store(q.add(i), S::mul(S::load_bf16(p.cast::<u16>().add(i)), factor));
            i += S::LANES;
        }
    } else if TypeId::of::<T>() == TypeId::of::<f32>() {
        while i + S::LANES <= n {
            S::store(q.add(i), S::mul(S::load(p.cast::<f32>().add(i)), factor));
            i += S::LANES;
        }
    }
    while i < n {
        *q.add(i) = (*p.add(i)).to_f32() * f;
        i += 1;
    }
}
with_isa!(simd, unsafe fn widen_any => widen_any_on<T: Element>(to: &mut [f32], from: &[T], f: f32));
