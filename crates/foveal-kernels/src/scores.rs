//! Scores for estimators: products of many rows with a few columns, and what is read off them.
//!
//! Who estimates which keys matter needs many products and none of them exactly. Here rows are
//! rounded to bf16 once, laid out as they are, and multiplied on AMX tiles with columns that were
//! transposed by pairs; the result has a key a row and a query a column, so that maxima and sums over
//! keys run down the columns in whole vectors. Machines without AMX have no [`Bf16Rows`].

use crate::dispatch::with_isa;
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::Simd;
use std::ops::Range;

/// A cache line of 32 bf16.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u16; 32]);

/// Elements of a line: the channels of one tile product.
const STEP: usize = 32;
/// Rows, and columns, of a tile.
const TILE: usize = 16;

/// Rows rounded to bf16. A row is `pieces` pieces of `width` elements, each padded with zeros to a
/// multiple of 32.
pub struct Bf16Rows {
    lines: Vec<Line>,
    rows: usize,
    pieces: usize,
    width: usize,
}

impl Bf16Rows {
    /// Zeros; `None` if `isa` or the machine has no tiles to multiply them with.
    pub fn new(rows: usize, pieces: usize, width: usize, isa: Isa) -> Option<Self> {
        // A product reads whole tiles of rows from any row on.
        let lines = || vec![Line([0; STEP]); (rows + TILE) * pieces * width.div_ceil(STEP)];
        (isa.min(Isa::detect()) == Isa::Amx).then(|| Self { lines: lines(), rows, pieces, width })
    }

    /// Lines of a row.
    fn depth(&self) -> usize {
        self.pieces * self.width.div_ceil(STEP)
    }

    /// Round `factor · x` into a piece of a row; what `x` leaves of the piece becomes zero.
    /// Panics if there is no such piece, or `x` is longer.
    pub fn set(&mut self, row: usize, piece: usize, x: &[f32], factor: f32) {
        assert!(row < self.rows && piece < self.pieces && x.len() <= self.width, "no such piece of bf16 rows");
        let n = self.width.div_ceil(STEP);
        let at = (row * self.pieces + piece) * n;
        // SAFETY: rows exist only on machines with AMX, which have the conversion.
        unsafe { imp::convert(x, factor, &mut self.lines[at..at + n]) }
    }

    /// [`Bf16Rows::set`] of the first `n` pieces, row after row, from rows of x `stride` apart.
    /// Panics if x or the pieces are fewer.
    pub fn set_all(&mut self, x: &[f32], stride: usize, n: usize, factor: f32) {
        assert!(n <= self.rows * self.pieces, "no such piece of bf16 rows");
        let lines = self.width.div_ceil(STEP);
        for (i, to) in self.lines.chunks_exact_mut(lines.max(1)).take(n).enumerate() {
            // SAFETY: as in `set`.
            unsafe { imp::convert(&x[i * stride..i * stride + self.width], factor, to) }
        }
    }

    /// Copy `rows` of `from`, of the same pieces, to the rows from `at` on.
    pub fn copy(&mut self, at: usize, from: &Bf16Rows, rows: Range<usize>) {
        let n = self.depth();
        assert!(from.depth() == n && at + rows.len() <= self.rows && rows.end <= from.rows, "rows do not fit");
        self.lines[at * n..(at + rows.len()) * n].copy_from_slice(&from.lines[rows.start * n..rows.end * n]);
    }
}

/// Rows as the right operand of products.
#[derive(Default)]
pub struct Bf16Columns {
    /// Pairs of column tiles; in a pair line after line of channels, two tiles each.
    lines: Vec<Line>,
    n: usize,
    depth: usize,
}

impl Bf16Columns {
    /// Take `rows` of `from`.
    pub fn pack(&mut self, from: &Bf16Rows, rows: Range<usize>) {
        assert!(rows.start <= rows.end && rows.end <= from.rows, "no such rows");
        (self.n, self.depth) = (rows.len(), from.depth());
        let len = self.width() * self.depth;
        self.lines.resize(len, Line([0; STEP]));
        // SAFETY: rows exist only on machines with AMX, hence AVX-512.
        unsafe { imp::pack(&from.lines[rows.start * self.depth..rows.end * self.depth], self.depth, &mut self.lines) }
    }

    /// Columns of a product: as many as rows were taken, rounded up to a multiple of 32.
    pub fn width(&self) -> usize {
        self.n.next_multiple_of(2 * TILE)
    }
}

/// `out` (rows, columns.width()) = rows · columnsᵀ with f32 sums; the columns beyond the packed ones
/// are zero. `out` needs room for a multiple of 16 rows.
pub fn product(rows: &Bf16Rows, range: Range<usize>, columns: &Bf16Columns, out: &mut [f32]) {
    let m = range.len();
    assert!(range.end <= rows.rows, "no such rows");
    assert_eq!(rows.depth(), columns.depth, "rows and columns differ in length");
    assert!(out.len() >= m.next_multiple_of(TILE) * columns.width(), "no room for whole tiles of scores");
    if m == 0 || columns.n == 0 {
        return;
    }
    let from = &rows.lines[range.start * rows.depth()..];
    // SAFETY: rows exist only on machines with AMX; `from` has a tile of rows to spare.
    unsafe { imp::product(from, m.div_ceil(TILE), columns, out) }
}

/// `acc[i] = max(acc[i], x[j][i])` over the rows j of x (rows, acc.len()). Panics unless the length
/// of `acc` is a multiple of 16.
pub fn column_max(x: &[f32], acc: &mut [f32], isa: Isa) {
    assert!(acc.len().is_multiple_of(TILE), "columns come in multiples of 16");
    // SAFETY: the machine has `isa`; lengths are multiples of every lane count.
    unsafe { column_max_isa(isa.min(Isa::detect()), x, acc) }
}

/// `acc[i] = max(acc[i], factor · x[j][i] + add[j])` over the rows j of x (add.len(), acc.len()). Panics
/// unless the length of `acc` is a multiple of 16 and x has the rows.
pub fn column_affine_max(x: &[f32], factor: f32, add: &[f32], acc: &mut [f32], isa: Isa) {
    assert!(acc.len().is_multiple_of(TILE), "columns come in multiples of 16");
    assert_eq!(x.len(), add.len() * acc.len(), "x has a row for each of add");
    // SAFETY: the machine has `isa`; x has the rows, of a multiple of every lane count.
    unsafe { column_affine_max_isa(isa.min(Isa::detect()), x, factor, add, acc) }
}

/// `out[i]` = row i of a · row i of b, of `width` elements; rows are `strides` apart. Panics if one is too short.
pub fn row_dots(a: &[f32], b: &[f32], strides: [usize; 2], width: usize, out: &mut [f32], isa: Isa) {
    let need = |stride: usize| out.len().checked_sub(1).map_or(0, |n| n * stride + width);
    assert!(a.len() >= need(strides[0]) && b.len() >= need(strides[1]), "fewer rows than products");
    // SAFETY: the machine has `isa`; both have the rows.
    unsafe { row_dots_isa(isa.min(Isa::detect()), a, b, strides, width, out) }
}

/// `x[j][i] = e^{x[j][i] − top[i]}` for x (rows, top.len()), and `sum[i] += x[j][i]`. Entries are at
/// most `top`, or −∞, which gives 0. Panics unless the lengths agree and are a multiple of 16.
pub fn column_exp(x: &mut [f32], top: &[f32], sum: &mut [f32], isa: Isa) {
    assert!(top.len().is_multiple_of(TILE) && sum.len() == top.len(), "columns come in multiples of 16");
    // SAFETY: the machine has `isa`; lengths are multiples of every lane count.
    unsafe { column_exp_isa(isa.min(Isa::detect()), x, top, sum) }
}

/// `out[g]` = the largest entry of rows g·group.. of x (out.len() · group, width). Panics unless
/// `width` is a positive multiple of 16 and x has the rows.
pub fn group_max(x: &[f32], width: usize, group: usize, out: &mut [f32], isa: Isa) {
    assert!(width > 0 && width.is_multiple_of(TILE) && group > 0, "columns come in multiples of 16");
    assert!(x.len() >= out.len() * group * width, "fewer rows than groups need");
    // SAFETY: the machine has `isa`; x has the rows, of a multiple of every lane count.
    unsafe { group_max_isa(isa.min(Isa::detect()), x, width * group, out) }
}

with_isa!(simd, unsafe fn column_max_isa => column_max_on(x: &[f32], acc: &mut [f32]));
with_isa!(simd, unsafe fn column_affine_max_isa => column_affine_max_on(x: &[f32], factor: f32, add: &[f32], acc: &mut [f32]));
with_isa!(simd, unsafe fn row_dots_isa => row_dots_on(a: &[f32], b: &[f32], strides: [usize; 2], width: usize, out: &mut [f32]));
with_isa!(simd, unsafe fn column_exp_isa => column_exp_on(x: &mut [f32], top: &[f32], sum: &mut [f32]));
with_isa!(simd, unsafe fn group_max_isa => group_max_on(x: &[f32], group: usize, out: &mut [f32]));

#[inline(always)]
unsafe fn column_max_on<S: Simd>(x: &[f32], acc: &mut [f32]) {
    let w = acc.len();
    for i in (0..w).step_by(S::LANES) {
        // SAFETY: `w` is a multiple of LANES and x has whole rows of `w`.
        unsafe {
            let mut m = [S::load(acc.as_ptr().add(i)); 4];
            let rows = x.len() / w;
            let p = x.as_ptr().add(i);
            // Four chains: one would wait for each maximum.
            for j in (0..rows / 4 * 4).step_by(4) {
                for c in 0..4 {
                    m[c] = S::max(m[c], S::load(p.add((j + c) * w)));
                }
            }
            for j in rows / 4 * 4..rows {
                m[0] = S::max(m[0], S::load(p.add(j * w)));
            }
            S::store(acc.as_mut_ptr().add(i), S::max(S::max(m[0], m[1]), S::max(m[2], m[3])));
        }
    }
}

#[inline(always)]
unsafe fn column_affine_max_on<S: Simd>(x: &[f32], factor: f32, add: &[f32], acc: &mut [f32]) {
    let w = acc.len();
    for i in (0..w).step_by(S::LANES) {
        // SAFETY: `w` is a multiple of LANES and x has a row of `w` for each of `add`.
        unsafe {
            let (f, mut m) = (S::splat(factor), S::load(acc.as_ptr().add(i)));
            let p = x.as_ptr().add(i);
            for (j, &a) in add.iter().enumerate() {
                m = S::max(S::fma(f, S::load(p.add(j * w)), S::splat(a)), m);
            }
            S::store(acc.as_mut_ptr().add(i), m);
        }
    }
}

#[inline(always)]
unsafe fn row_dots_on<S: Simd>(a: &[f32], b: &[f32], strides: [usize; 2], width: usize, out: &mut [f32]) {
    let whole = width / S::LANES * S::LANES;
    for (i, o) in out.iter_mut().enumerate() {
        let (a, b) = (&a[i * strides[0]..][..width], &b[i * strides[1]..][..width]);
        // SAFETY: `whole` is a multiple of LANES and at most the length of both.
        unsafe {
            let mut s = S::splat(0.0);
            for c in (0..whole).step_by(S::LANES) {
                s = S::fma(S::load(a.as_ptr().add(c)), S::load(b.as_ptr().add(c)), s);
            }
            *o = S::sum(s) + a[whole..].iter().zip(&b[whole..]).map(|(x, y)| x * y).sum::<f32>();
        }
    }
}

#[inline(always)]
unsafe fn column_exp_on<S: Simd>(x: &mut [f32], top: &[f32], sum: &mut [f32]) {
    let w = top.len();
    if w == 0 {
        return;
    }
    let rows = x.len() / w;
    for i in (0..w).step_by(S::LANES) {
        // SAFETY: `w` is a multiple of LANES and x has whole rows of `w`.
        unsafe {
            let (t, mut s) = (S::load(top.as_ptr().add(i)), S::load(sum.as_ptr().add(i)));
            let p = x.as_mut_ptr().add(i);
            for j in 0..rows {
                let y = exp::<S>(S::sub(S::load(p.add(j * w)), t));
                S::store(p.add(j * w), y);
                s = S::add(s, y);
            }
            S::store(sum.as_mut_ptr().add(i), s);
        }
    }
}

#[inline(always)]
unsafe fn group_max_on<S: Simd>(x: &[f32], group: usize, out: &mut [f32]) {
    for g in 0..out.len() {
        // SAFETY: x has `group` elements for each of `out`, a multiple of LANES and not 0.
        unsafe {
            let p = x.as_ptr().add(g * group);
            let mut m = S::load(p);
            for i in (S::LANES..group).step_by(S::LANES) {
                m = S::max(m, S::load(p.add(i)));
            }
            out[g] = S::top(m);
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod imp {
    use super::{Bf16Columns, Line};

    pub(super) unsafe fn convert(_: &[f32], _: f32, _: &mut [Line]) {
        unreachable!("Isa::Amx is only detected on x86-64 Linux");
    }
    pub(super) unsafe fn pack(_: &[Line], _: usize, _: &mut [Line]) {
        unreachable!("Isa::Amx is only detected on x86-64 Linux");
    }
    pub(super) unsafe fn product(_: &[Line], _: usize, _: &Bf16Columns, _: &mut [f32]) {
        unreachable!("Isa::Amx is only detected on x86-64 Linux");
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod imp {
    use super::{Bf16Columns, Line, STEP, TILE};
    use crate::amx::Tiles;
    use crate::simd::transpose;
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Bytes of a line.
    const LINE: usize = 64;

    /// Round `factor · x` to lines, zeros after it.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn convert(x: &[f32], factor: f32, to: &mut [Line]) {
        let f = _mm512_set1_ps(factor);
        if x.len() == to.len() * STEP {
            for (x, line) in x.chunks_exact(STEP).zip(to) {
                // SAFETY: 32 elements to one line.
                unsafe {
                    let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
                    let both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, f), _mm512_mul_ps(low, f));
                    _mm512_store_si512(line.0.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(both));
                }
            }
            return;
        }
        for (t, line) in to.iter_mut().enumerate() {
            let left = x.len().saturating_sub(t * STEP);
            let mask = |n: usize| if n >= 16 { 0xffff } else { (1u16 << n) - 1 };
            let p = x.as_ptr().wrapping_add(t * STEP);
            // SAFETY: loads are masked to the elements of x; the store is one line.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask(left), p);
                let high = _mm512_maskz_loadu_ps(mask(left.saturating_sub(16)), p.wrapping_add(16));
                let both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, f), _mm512_mul_ps(low, f));
                _mm512_store_si512(line.0.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(both));
            }
        }
    }

    /// Rows of `depth` lines as pairs of column tiles; rows that are missing in a pair are zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn pack(rows: &[Line], depth: usize, to: &mut [Line]) {
        if depth == 0 {
            return;
        }
        let n = rows.len() / depth;
        for (pair, to) in to.chunks_exact_mut(2 * TILE * depth).enumerate() {
            for (step, to) in to.chunks_exact_mut(2 * TILE).enumerate() {
                for (half, to) in to.chunks_exact_mut(TILE).enumerate() {
                    let first = (2 * pair + half) * TILE;
                    // SAFETY: rows below `n` have `depth` lines; `to` has 16.
                    unsafe {
                        let mut x = [_mm512_setzero_si512(); TILE];
                        for (i, x) in x.iter_mut().enumerate().take(n.saturating_sub(first)) {
                            *x = _mm512_load_si512(rows.as_ptr().add((first + i) * depth + step).cast());
                        }
                        for (y, line) in transpose(x).into_iter().zip(to) {
                            _mm512_store_si512(line.0.as_mut_ptr().cast(), y);
                        }
                    }
                }
            }
        }
    }

    /// One tile instruction between memory and a tile.
    macro_rules! tile {
        ($op:literal, $p:expr, $line:expr) => {
            asm!($op, p = in(reg) $p, l = in(reg) $line, options(nostack, preserves_flags))
        };
    }

    /// Scores of `tiles` tiles of rows with all columns.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it; `rows` holds the tiles, `out` their scores.
    pub(super) unsafe fn product(rows: &[Line], tiles: usize, columns: &Bf16Columns, out: &mut [f32]) {
        let (depth, width) = (columns.depth, columns.width());
        let (a, c): (*const u8, *mut u8) = (rows.as_ptr().cast(), out.as_mut_ptr().cast());
        let (a_line, c_line) = (depth * LINE, width * 4);
        // SAFETY: AMX by the contract; every load and store is within the rows, columns and scores
        // counted above.
        unsafe {
            let _tiles = Tiles::new();
            for (pair, b) in columns.lines.chunks_exact((2 * TILE * depth).max(1)).enumerate() {
                let (b, c): (*const u8, _) = (b.as_ptr().cast(), c.add(pair * 2 * LINE));
                if depth == 2 {
                    narrow(a, a_line, tiles, b, c, c_line);
                    continue;
                }
                for t in (0..tiles).step_by(2) {
                    let (a, c) = (a.add(t * TILE * a_line), c.add(t * TILE * c_line));
                    if t + 1 < tiles {
                        square::<true>(a, a_line, depth, b, c, c_line);
                    } else {
                        square::<false>(a, a_line, depth, b, c, c_line);
                    }
                }
            }
        }
    }

    /// Rows of 64 channels: a tile of rows stays in registers for both column tiles.
    #[inline(always)]
    unsafe fn narrow(a: *const u8, a_line: usize, tiles: usize, b: *const u8, c: *mut u8, c_line: usize) {
        // SAFETY: as the caller's.
        unsafe {
            for t in 0..tiles {
                let (a, c) = (a.add(t * TILE * a_line), c.add(t * TILE * c_line));
                tile!("tileloadd tmm2, [{p} + {l}*1]", a, a_line);
                tile!("tileloadd tmm3, [{p} + {l}*1 + 64]", a, a_line);
                asm!("tilezero tmm0", options(nostack, preserves_flags));
                tile!("tileloadd tmm4, [{p} + {l}*1]", b, LINE);
                asm!("tdpbf16ps tmm0, tmm2, tmm4", "tilezero tmm4", options(nostack, preserves_flags));
                tile!("tileloadd tmm5, [{p} + {l}*1 + 2048]", b, LINE);
                asm!("tdpbf16ps tmm0, tmm3, tmm5", "tilezero tmm5", options(nostack, preserves_flags));
                tile!("tilestored [{p} + {l}*1], tmm0", c, c_line);
                asm!("tilezero tmm1", options(nostack, preserves_flags));
                tile!("tileloadd tmm4, [{p} + {l}*1 + 1024]", b, LINE);
                asm!("tdpbf16ps tmm1, tmm2, tmm4", "tilezero tmm4", "tilezero tmm2", options(nostack, preserves_flags));
                tile!("tileloadd tmm5, [{p} + {l}*1 + 3072]", b, LINE);
                asm!("tdpbf16ps tmm1, tmm3, tmm5", "tilezero tmm5", "tilezero tmm3", options(nostack, preserves_flags));
                tile!("tilestored [{p} + {l}*1 + 64], tmm1", c, c_line);
            }
        }
    }

    /// One or two tiles of rows with a pair of column tiles.
    #[inline(always)]
    unsafe fn square<const TWO: bool>(
        a: *const u8,
        a_line: usize,
        depth: usize,
        b: *const u8,
        c: *mut u8,
        c_line: usize,
    ) {
        // SAFETY: as the caller's.
        unsafe {
            let low = a.wrapping_add(TILE * a_line);
            asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
            if TWO {
                asm!("tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
            }
            for t in 0..depth {
                let b = b.add(t * 2 * TILE * LINE);
                tile!("tileloadd tmm6, [{p} + {l}*1]", b, LINE);
                tile!("tileloadd tmm4, [{p} + {l}*1]", a.add(t * LINE), a_line);
                asm!("tdpbf16ps tmm0, tmm4, tmm6", options(nostack, preserves_flags));
                tile!("tileloadd tmm7, [{p} + {l}*1 + 1024]", b, LINE);
                asm!("tdpbf16ps tmm1, tmm4, tmm7", "tilezero tmm4", options(nostack, preserves_flags));
                if TWO {
                    tile!("tileloadd tmm5, [{p} + {l}*1]", low.wrapping_add(t * LINE), a_line);
                    asm!("tdpbf16ps tmm2, tmm5, tmm6", options(nostack, preserves_flags));
                    asm!("tdpbf16ps tmm3, tmm5, tmm7", options(nostack, preserves_flags));
                }
                // The pool of tiles is small; see `amx`.
                asm!("tilezero tmm5", "tilezero tmm6", "tilezero tmm7", options(nostack, preserves_flags));
            }
            tile!("tilestored [{p} + {l}*1], tmm0", c, c_line);
            tile!("tilestored [{p} + {l}*1 + 64], tmm1", c, c_line);
            if TWO {
                let c = c.wrapping_add(TILE * c_line);
                tile!("tilestored [{p} + {l}*1], tmm2", c, c_line);
                tile!("tilestored [{p} + {l}*1 + 64], tmm3", c, c_line);
            }
        }
    }
}
