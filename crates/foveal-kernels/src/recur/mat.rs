//! Small f32 matrices in scratch memory and their products.
//!
//! Everything in a chunk is padded with zeros to multiples of [`PAD`] rows and columns, so that no
//! product has an edge. Triangular operands are multiplied over the blocks that can be nonzero.

#![allow(unsafe_op_in_unsafe_fn)]

use super::tiles;
use crate::dispatch::with_isa;
use crate::isa::Isa;
use crate::simd::Simd;
use std::ops::Range;

/// Rows and columns of every matrix are multiples of this.
pub(super) const PAD: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([f32; 16]);

/// A zero-initialised matrix that owns its memory, rows on cache lines.
pub(super) struct Mat {
    data: Vec<Line>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Mat {
    /// Zeros; both sizes are rounded up to [`PAD`].
    pub(super) fn new(rows: usize, cols: usize) -> Self {
        let (rows, cols) = (rows.next_multiple_of(PAD), cols.next_multiple_of(PAD));
        Mat { data: vec![Line([0.0; 16]); rows * cols / 16], rows, cols }
    }
    pub(super) fn all(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen f32 without padding.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.data.len() * 16) }
    }
    pub(super) fn all_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_mut_ptr().cast(), self.data.len() * 16) }
    }
    pub(super) fn row(&self, r: usize) -> &[f32] {
        &self.all()[r * self.cols..(r + 1) * self.cols]
    }
    pub(super) fn row_mut(&mut self, r: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.all_mut()[r * cols..(r + 1) * cols]
    }
    /// The first `n` rows.
    pub(super) fn top(&self, n: usize) -> Ref<'_> {
        self.part(0..n, 0..self.cols)
    }
    /// The first `n` rows.
    pub(super) fn top_mut(&mut self, n: usize) -> Mut<'_> {
        let cols = self.cols;
        self.part_mut(0..n, 0..cols)
    }
    pub(super) fn part(&self, r: Range<usize>, c: Range<usize>) -> Ref<'_> {
        assert!(r.end <= self.rows && c.end <= self.cols);
        let from = (r.start * self.cols + c.start).min(self.all().len());
        Ref { data: &self.all()[from..], ld: self.cols, rows: r.len(), cols: c.len() }
    }
    pub(super) fn part_mut(&mut self, r: Range<usize>, c: Range<usize>) -> Mut<'_> {
        assert!(r.end <= self.rows && c.end <= self.cols);
        let (ld, from) = (self.cols, (r.start * self.cols + c.start).min(self.all().len()));
        Mut { data: &mut self.all_mut()[from..], ld, rows: r.len(), cols: c.len() }
    }
    /// Two disjoint ranges of rows: before `at` for reading, from `at` on for writing.
    pub(super) fn split(&mut self, at: usize) -> (Ref<'_>, Mut<'_>) {
        let (ld, rows) = (self.cols, self.rows);
        let (a, b) = self.all_mut().split_at_mut(at * ld);
        (Ref { data: a, ld, rows: at, cols: ld }, Mut { data: b, ld, rows: rows - at, cols: ld })
    }
    /// As [`Mat::split`], the first part for writing.
    pub(super) fn split_low(&mut self, at: usize) -> (Mut<'_>, Ref<'_>) {
        let (ld, rows) = (self.cols, self.rows);
        let (a, b) = self.all_mut().split_at_mut(at * ld);
        (Mut { data: a, ld, rows: at, cols: ld }, Ref { data: b, ld, rows: rows - at, cols: ld })
    }
}

/// A rectangle of a matrix, for reading.
#[derive(Clone, Copy)]
pub(super) struct Ref<'a> {
    pub(super) data: &'a [f32],
    /// Elements from row to row.
    pub(super) ld: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// A rectangle of a matrix, for writing.
pub(super) struct Mut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) ld: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Mut<'_> {
    /// The first `n` rows.
    pub(super) fn top(self, n: usize) -> Self {
        assert!(n <= self.rows);
        Mut { rows: n, ..self }
    }
}

fn fits(len: usize, ld: usize, rows: usize, cols: usize) -> bool {
    rows == 0 || cols == 0 || (cols <= ld && len >= (rows - 1) * ld + cols)
}

/// Which operands are transposed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    /// A · B
    Nn,
    /// Aᵀ · B
    Tn,
    /// A · Bᵀ
    Nt,
}

/// What is known to be zero, or not wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tri {
    /// Nothing.
    Full,
    /// Of C only the lower triangle is wanted.
    LowerOut,
    /// A (before transposition) is lower triangular.
    LowerA,
}

/// How products are computed, with room to pack operands.
pub(super) struct Engine {
    pub(super) isa: Isa,
    /// Multiply in bf16 on tiles.
    pub(super) tiles: bool,
    /// Split operands into two bf16 from now on: where errors would add up, or cancel in what follows.
    pub(super) split: bool,
    turned: Vec<f32>,
    pack: tiles::Pack,
}

impl Engine {
    pub(super) fn new(isa: Isa, tiles: bool) -> Self {
        // The kernels rely on the machine having `isa`; a caller can name any.
        let isa = isa.min(Isa::detect());
        let tiles = tiles && isa == Isa::Amx;
        Engine { isa, tiles, split: false, turned: Vec::new(), pack: tiles::Pack::new(tiles) }
    }

    /// C = alpha · op(A, B), or C += it. Sizes are multiples of [`PAD`].
    pub(super) fn mm(&mut self, op: Op, tri: Tri, alpha: f32, a: Ref, b: Ref, c: Mut, add: bool) {
        if self.tiles {
            self.pack.mm(op, tri, alpha, a, b, c, add, self.split);
        } else {
            self.mm_f32(op, tri, alpha, a, b, c, add);
        }
    }

    /// [`Engine::mm`] in f32 whatever the engine.
    pub(super) fn mm_f32(&mut self, op: Op, tri: Tri, alpha: f32, a: Ref, b: Ref, c: Mut, add: bool) {
        let [m, n, k] = check(op, a, b, &c);
        let (rs, cs) = if op == Op::Tn { (1, a.ld) } else { (a.ld, 1) };
        let (mut b_ptr, mut b_ld) = (b.data.as_ptr(), b.ld);
        if op == Op::Nt {
            self.turned.resize(self.turned.len().max(n * k), 0.0);
            // SAFETY: `check` bounds B; `turned` holds k rows of n.
            unsafe { transpose(self.isa, b.data.as_ptr(), b.ld, [n, k], self.turned.as_mut_ptr(), n) };
            (b_ptr, b_ld) = (self.turned.as_ptr(), n);
        }
        for r in (0..m).step_by(PAD) {
            let (cols, inner) = bounds(op, tri, r, r + PAD, n, k);
            // SAFETY: `check` bounds all three operands, and the block lies inside them; `isa` is
            // at most what was detected.
            unsafe {
                block(
                    self.isa,
                    [PAD, cols, inner.len()],
                    a.data.as_ptr().add(r * rs + inner.start * cs),
                    [rs, cs],
                    b_ptr.add(inner.start * b_ld),
                    b_ld,
                    c.data.as_mut_ptr().add(r * c.ld),
                    c.ld,
                    alpha,
                    add,
                );
            }
        }
    }

    /// X ← (I + L)⁻¹ X for strictly lower L (n, n), or with `transposed` (I + Lᵀ)⁻¹ X, in f32, by
    /// substitution in blocks of [`PAD`].
    pub(super) fn solve(&mut self, l: &Mat, x: &mut Mat, n: usize, transposed: bool) {
        assert!(l.rows >= n && l.cols >= n && x.rows >= n && n.is_multiple_of(PAD));
        let cols = x.cols;
        let blocks = n / PAD;
        for i in 0..blocks {
            let at = if transposed { blocks - 1 - i } else { i } * PAD;
            let end = at + PAD;
            if transposed {
                let (low, high) = x.split_low(end);
                if n > end {
                    let high = Ref { rows: n - end, ..high };
                    let c = Mut { data: &mut low.data[at * cols..], rows: PAD, ..low };
                    self.mm_f32(Op::Tn, Tri::Full, -1.0, l.part(end..n, at..end), high, c, true);
                }
            } else if at > 0 {
                let (done, rest) = x.split(at);
                self.mm_f32(Op::Nn, Tri::Full, -1.0, l.part(at..end, 0..at), done, rest.top(PAD), true);
            }
            let (l_ld, l) = (l.cols, &l.all()[at * l.cols + at..]);
            let x = x.all_mut()[at * cols..end * cols].as_mut_ptr();
            for j in 1..PAD {
                // SAFETY: the block of L on the diagonal and rows at..end of X are in bounds; each
                // call reads rows other than the one it writes.
                unsafe {
                    if transposed {
                        let r = PAD - 1 - j;
                        let (l, b) = (l.as_ptr().add((r + 1) * l_ld + r), x.add((r + 1) * cols));
                        block(self.isa, [1, cols, j], l, [0, l_ld], b, cols, x.add(r * cols), cols, -1.0, true);
                    } else {
                        let l = l.as_ptr().add(j * l_ld);
                        block(self.isa, [1, cols, j], l, [0, 1], x, cols, x.add(j * cols), cols, -1.0, true);
                    }
                }
            }
        }
    }
}

/// Columns of C wanted and inner indices needed for its rows `r..end`.
pub(super) fn bounds(op: Op, tri: Tri, r: usize, end: usize, n: usize, k: usize) -> (usize, Range<usize>) {
    match (tri, op) {
        (Tri::Full, _) => (n, 0..k),
        (Tri::LowerOut, _) => (end.min(n), 0..k),
        (Tri::LowerA, Op::Tn) => (n, r.min(k)..k),
        (Tri::LowerA, _) => (n, 0..end.min(k)),
    }
}

/// The sizes [m, n, k] of a product. Panics if operands do not fit together: chunks are padded by
/// this module alone.
pub(super) fn check(op: Op, a: Ref, b: Ref, c: &Mut) -> [usize; 3] {
    let (m, k) = if op == Op::Tn { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let (n, k2) = if op == Op::Nt { (b.rows, b.cols) } else { (b.cols, b.rows) };
    assert!(k == k2 && c.rows == m && c.cols == n, "{op:?} {m}x{k} by {k2}x{n} into {}x{}", c.rows, c.cols);
    assert!([m, n, k].iter().all(|x| x.is_multiple_of(PAD)), "{m} {n} {k}");
    assert!(fits(a.data.len(), a.ld, a.rows, a.cols) && fits(b.data.len(), b.ld, b.rows, b.cols));
    assert!(fits(c.data.len(), c.ld, c.rows, c.cols));
    [m, n, k]
}

/// MR rows and NV vectors of C in registers.
#[inline(always)]
unsafe fn registers<S: Simd, const MR: usize, const NV: usize>(
    k: usize,
    a: *const f32,
    [rs, cs]: [usize; 2],
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    alpha: f32,
    add: bool,
) {
    let mut acc = [[S::splat(0.0); NV]; MR];
    for i in 0..k {
        let mut row = [S::splat(0.0); NV];
        for v in 0..NV {
            row[v] = S::load(b.add(i * ldb + v * S::LANES));
        }
        for r in 0..MR {
            let x = S::splat(*a.add(r * rs + i * cs));
            for v in 0..NV {
                acc[r][v] = S::fma(x, row[v], acc[r][v]);
            }
        }
    }
    let alpha = S::splat(alpha);
    for r in 0..MR {
        for v in 0..NV {
            let at = c.add(r * ldc + v * S::LANES);
            let old = if add { S::load(at) } else { S::splat(0.0) };
            S::store(at, S::fma(alpha, acc[r][v], old));
        }
    }
}

/// C (m, n) = alpha · A (m, k) · B (k, n), or += it; n a multiple of 16; A by two strides.
#[inline(always)]
unsafe fn block_on<S: Simd>(
    [m, n, k]: [usize; 3],
    a: *const f32,
    strides: [usize; 2],
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    alpha: f32,
    add: bool,
) {
    // As many accumulators as there are registers beside a row of B and a broadcast.
    macro_rules! rows {
        ($mr:literal, $nv:literal, $j:ident, $r:ident) => {
            while m - $r >= $mr {
                let (a, c) = (a.add($r * strides[0]), c.add($r * ldc + $j));
                registers::<S, $mr, $nv>(k, a, strides, b.add($j), ldb, c, ldc, alpha, add);
                $r += $mr;
            }
        };
    }
    let mut j = 0;
    if S::LANES == 16 {
        while j + 64 <= n {
            let mut r = 0;
            rows!(6, 4, j, r);
            rows!(5, 4, j, r);
            rows!(1, 4, j, r);
            j += 64;
        }
    }
    while j < n {
        let mut r = 0;
        match S::LANES {
            16 => {
                rows!(16, 1, j, r);
                rows!(4, 1, j, r);
                rows!(1, 1, j, r);
            }
            8 => {
                rows!(6, 2, j, r);
                rows!(5, 2, j, r);
                rows!(1, 2, j, r);
            }
            _ => {
                rows!(2, 4, j, r);
                rows!(1, 4, j, r);
            }
        }
        j += 16;
    }
}

with_isa!(
    simd,
    unsafe fn block => block_on(
        sizes: [usize; 3],
        a: *const f32,
        strides: [usize; 2],
        b: *const f32,
        ldb: usize,
        c: *mut f32,
        ldc: usize,
        alpha: f32,
        add: bool,
    )
);

/// B (n, k) with rows `ldb` apart into k rows of n, `ldc` apart; both multiples of 16.
///
/// # Safety
/// Pointers reach all elements; the machine has `isa`.
unsafe fn transpose(isa: Isa, b: *const f32, ldb: usize, [n, k]: [usize; 2], c: *mut f32, ldc: usize) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        return transpose_avx512(b, ldb, [n, k], c, ldc);
    }
    let _ = isa;
    for i in (0..n).step_by(8) {
        for j in 0..k {
            for x in i..i + 8 {
                *c.add(j * ldc + x) = *b.add(x * ldb + j);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose_avx512(b: *const f32, ldb: usize, [n, k]: [usize; 2], c: *mut f32, ldc: usize) {
    use std::arch::x86_64::*;
    for i in (0..n).step_by(16) {
        for j in (0..k).step_by(16) {
            let mut x = [_mm512_setzero_si512(); 16];
            for r in 0..16 {
                x[r] = _mm512_loadu_si512(b.add((i + r) * ldb + j).cast());
            }
            let y = crate::simd::transpose(x);
            for r in 0..16 {
                _mm512_storeu_si512(c.add((j + r) * ldc + i).cast(), y[r]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(m: &mut Mat, seed: usize) {
        let mut x = seed as u64 + 1;
        for v in m.all_mut() {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *v = (x >> 40) as f32 / (1 << 23) as f32 - 1.0;
        }
    }

    /// Every form of the product against sums in f64, on every instruction set and on tiles.
    #[test]
    fn products() {
        for isa in Isa::available() {
            for (tiles, split) in [(false, false), (true, false), (true, true)] {
                if tiles && isa < Isa::Amx {
                    continue;
                }
                let mut engine = Engine::new(isa, tiles);
                engine.split = split;
                for (m, n, k) in [(16, 16, 16), (48, 80, 64), (64, 64, 64), (32, 128, 48), (64, 48, 32)] {
                    for op in [Op::Nn, Op::Tn, Op::Nt] {
                        for tri in [Tri::Full, Tri::LowerOut, Tri::LowerA] {
                            let mut a = if op == Op::Tn { Mat::new(k, m) } else { Mat::new(m, k) };
                            let mut b = if op == Op::Nt { Mat::new(n, k) } else { Mat::new(k, n) };
                            let mut c = Mat::new(m, n);
                            fill(&mut a, m);
                            fill(&mut b, n);
                            fill(&mut c, k);
                            if tri == Tri::LowerA {
                                for r in 0..a.rows {
                                    let from = (r + 1).min(a.cols);
                                    a.row_mut(r)[from..].fill(0.0);
                                }
                            }
                            let old = c.all().to_vec();
                            for add in [false, true] {
                                c.all_mut().copy_from_slice(&old);
                                engine.mm(op, tri, -0.5, a.top(a.rows), b.top(b.rows), c.top_mut(m), add);
                                for i in 0..m {
                                    for j in 0..n {
                                        if tri == Tri::LowerOut && j > i {
                                            continue;
                                        }
                                        let x = |i: usize, l: usize| {
                                            f64::from(if op == Op::Tn { a.row(l)[i] } else { a.row(i)[l] })
                                        };
                                        let y = |l: usize, j: usize| {
                                            f64::from(if op == Op::Nt { b.row(j)[l] } else { b.row(l)[j] })
                                        };
                                        let sum: f64 = (0..k).map(|l| x(i, l) * y(l, j)).sum();
                                        let want = if add { f64::from(old[i * n + j]) } else { 0.0 } - 0.5 * sum;
                                        let got = f64::from(c.row(i)[j]);
                                        let limit = match (tiles, split) {
                                            (false, _) => 1e-5,
                                            (_, true) => 1e-4,
                                            _ => 0.03,
                                        };
                                        assert!(
                                            (got - want).abs() < limit,
                                            "{isa} {tiles} {split} {op:?} {tri:?} {m} {n} {k}: {got} {want}"
                                        );
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn substitution_inverts() {
        for isa in Isa::available() {
            let mut engine = Engine::new(isa, false);
            for n in [16, 48, 64] {
                for transposed in [false, true] {
                    let mut l = Mat::new(n, n);
                    fill(&mut l, n);
                    for r in 0..n {
                        l.row_mut(r)[r..].fill(0.0);
                        l.row_mut(r).iter_mut().for_each(|x| *x *= 0.2);
                    }
                    let mut x = Mat::new(64, 32);
                    fill(&mut x, 7);
                    let rhs = x.all().to_vec();
                    engine.solve(&l, &mut x, n, transposed);
                    for i in 0..n {
                        for j in 0..32 {
                            let at = |s: usize| if transposed { l.row(s)[i] } else { l.row(i)[s] };
                            let back: f64 = f64::from(x.row(i)[j])
                                + (0..n).map(|s| f64::from(at(s)) * f64::from(x.row(s)[j])).sum::<f64>();
                            assert!((back - f64::from(rhs[i * 32 + j])).abs() < 1e-4);
                        }
                    }
                    assert_eq!(&x.all()[n * 32..], &rhs[n * 32..], "rows beyond n are untouched");
                }
            }
        }
    }
}
