//! Small dense products for estimators and factorisations.

use crate::sparse::Mat;
use foveal_kernels::Isa;
use foveal_kernels::scores::{self, Bf16Columns, Bf16Rows};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Once;

/// How exact the products of an estimate are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// f32.
    #[default]
    F32,
    /// Operands rounded to bf16, sums in f32, where the machine has tiles for it; f32 elsewhere.
    Bf16,
}

impl Precision {
    /// Whether bf16 is asked for and can be had.
    fn tiles(self) -> bool {
        if self == Precision::Bf16 && Isa::active() != Isa::Amx {
            static SAID: Once = Once::new();
            SAID.call_once(|| tracing::debug!("estimates run in f32: no bf16 tiles under {}", Isa::active()));
        }
        self == Precision::Bf16 && Isa::active() == Isa::Amx
    }
}

/// Rows that take part in many products.
pub struct Rows<'a> {
    rows: usize,
    /// Elements of a row.
    width: usize,
    data: Data<'a>,
}

enum Data<'a> {
    F32(Cow<'a, [f32]>),
    Bf16(Bf16Rows),
}

impl<'a> Rows<'a> {
    /// The rows of `m`, each `group` consecutive ones as one row; the last is filled up with zeros.
    /// Borrowed where nothing has to change.
    pub fn of(m: &Mat<'a>, group: usize, precision: Precision) -> Self {
        let (rows, width) = (m.rows.div_ceil(group), group * m.cols);
        if precision.tiles()
            && let Some(mut x) = Bf16Rows::new(rows, group, m.cols, Isa::active())
        {
            x.set_all(m.data(), m.stride, m.rows, 1.0);
            return Self { rows, width, data: Data::Bf16(x) };
        }
        Self { rows, width, data: Data::F32(packed(m, rows * group)) }
    }

    /// Zeros, to be filled by [`Rows::copy`].
    pub fn zeros(rows: usize, width: usize, precision: Precision) -> Rows<'static> {
        let half = if precision.tiles() { Bf16Rows::new(rows, 1, width, Isa::active()) } else { None };
        let data = half.map_or_else(|| Data::F32(Cow::Owned(vec![0.0; rows * width])), Data::Bf16);
        Rows { rows, width, data }
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Copy `rows` of `from`, of the same width and precision, to the rows from `at` on.
    pub fn copy(&mut self, at: usize, from: &Rows, rows: Range<usize>) {
        let w = self.width;
        match (&mut self.data, &from.data) {
            (Data::F32(to), Data::F32(from)) => {
                to.to_mut()[at * w..(at + rows.len()) * w].copy_from_slice(&from[rows.start * w..rows.end * w]);
            }
            (Data::Bf16(to), Data::Bf16(from)) => to.copy(at, from, rows),
            _ => unreachable!("rows of one estimate have one precision"),
        }
    }
}

/// The matrix as contiguous rows, zero-padded to `rows` rows; borrowed where it already is.
pub fn packed<'a>(m: &Mat<'a>, rows: usize) -> Cow<'a, [f32]> {
    if rows == m.rows && (m.stride == m.cols || m.rows <= 1) {
        return Cow::Borrowed(&m.data()[..m.rows * m.cols]);
    }
    let mut out = Vec::with_capacity(rows * m.cols);
    for i in 0..m.rows {
        out.extend_from_slice(m.row(i));
    }
    out.resize(rows * m.cols, 0.0);
    Cow::Owned(out)
}

/// A few rows, times a factor, as the other operand of products: refilled for each.
pub struct Columns {
    n: usize,
    pieces: usize,
    width: usize,
    factor: f32,
    data: Vec<f32>,
    half: Option<(Bf16Rows, Bf16Columns)>,
}

impl Columns {
    /// Room for `capacity` columns of `pieces` pieces of `width` elements.
    pub fn new(capacity: usize, pieces: usize, width: usize, factor: f32, precision: Precision) -> Self {
        let rows = if precision.tiles() { Bf16Rows::new(capacity, pieces, width, Isa::active()) } else { None };
        let data = if rows.is_some() { Vec::new() } else { vec![0.0; capacity * pieces * width] };
        Self { n: 0, pieces, width, factor, data, half: rows.map(|r| (r, Bf16Columns::default())) }
    }

    /// Take `n` columns: `piece(i, t)` is piece t of column i, `None` zeros.
    pub fn fill<'x>(&mut self, n: usize, piece: impl Fn(usize, usize) -> Option<&'x [f32]>) {
        self.n = n;
        for i in 0..n {
            for t in 0..self.pieces {
                let x = piece(i, t).unwrap_or_default();
                match &mut self.half {
                    Some((rows, _)) => rows.set(i, t, x, self.factor),
                    None => {
                        let to = &mut self.data[(i * self.pieces + t) * self.width..][..self.width];
                        to[..x.len()].copy_from_slice(x);
                        to[x.len()..].fill(0.0);
                    }
                }
            }
        }
        if let Some((rows, columns)) = &mut self.half {
            columns.pack(rows, 0..n);
        }
    }

    /// Entries from row to row of a product: a multiple of 32, the columns first.
    pub fn stride(&self) -> usize {
        self.n.next_multiple_of(32)
    }
}

/// `out[j][i]` = factor · row j of `range` · column i, in rows of `columns.stride()`, of which those
/// past the columns are zero. `out` grows as needed. Returns the FLOPs done.
pub fn scores(rows: &Rows, range: Range<usize>, columns: &Columns, out: &mut Vec<f32>) -> u64 {
    let (m, n, k, stride) = (range.len(), columns.n, rows.width, columns.stride());
    assert!(range.end <= rows.rows && k == columns.pieces * columns.width, "rows and columns do not fit");
    let need = m.next_multiple_of(16) * stride;
    if out.len() < need {
        out.resize(need, 0.0);
    }
    match (&rows.data, &columns.half) {
        (Data::Bf16(rows), Some((_, columns))) => scores::product(rows, range, columns, out),
        (Data::F32(x), None) => {
            out[..m * stride].fill(0.0);
            product([m, n, k], columns.factor, &x[range.start * k..], k, &columns.data, [k, 1], out, stride, false);
        }
        _ => unreachable!("rows and columns of one estimate have one precision"),
    }
    2 * (m * n * k) as u64
}

/// C (m, n) = alpha · A (m, k) · B (n, k)ᵀ in f32; rows of A and B are `a_stride` and
/// `b_stride` apart. Returns the FLOPs done.
#[allow(clippy::too_many_arguments)]
pub fn abt(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    b_stride: usize,
    c: &mut [f32],
) -> u64 {
    product([m, n, k], alpha, a, a_stride, b, [b_stride, 1], c, n, false)
}

/// C (m, n) = A (m, k) · B (k, n), all row-major contiguous. Returns the FLOPs done.
pub fn ab(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) -> u64 {
    product([m, n, k], 1.0, a, k, b, [1, n], c, n, false)
}

/// C (m, n) += A (m, k) · B (n, k)ᵀ in f32; rows of A and B are `a_stride` and `b_stride`
/// apart. Returns the FLOPs done.
pub fn abt_add(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    b_stride: usize,
    c: &mut [f32],
) -> u64 {
    product([m, n, k], 1.0, a, a_stride, b, [b_stride, 1], c, n, true)
}

/// C (m, n) = or += alpha · A · B on one thread. Rows of C are `c_stride` apart. A has rows of k
/// elements, `a_stride` apart; element (column j of C, inner index i) of B lies at `j·b_strides[0] + i·b_strides[1]`.
fn product(
    [m, n, k]: [usize; 3],
    alpha: f32,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    b_strides: [usize; 2],
    c: &mut [f32],
    c_stride: usize,
    add: bool,
) -> u64 {
    if m == 0 || n == 0 || (k == 0 && add) {
        return 0;
    }
    assert!(c_stride >= n && c.len() >= (m - 1) * c_stride + n, "C too short");
    assert!(k == 0 || a.len() > (m - 1) * a_stride + (k - 1), "A too short");
    assert!(k == 0 || b.len() > (n - 1) * b_strides[0] + (k - 1) * b_strides[1], "B too short");
    // SAFETY: the asserts above bound every element that these strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            add,
            a.as_ptr(),
            1,
            a_stride as isize,
            b.as_ptr(),
            b_strides[0] as isize,
            b_strides[1] as isize,
            if add { 1.0f32 } else { 0.0 },
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    2 * (m * n * k) as u64
}
