//! Small dense f32 products on one thread.

/// A row-major matrix in a slice, or its transpose.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    strides: [usize; 2],
}

/// `rows` × `cols`, contiguous.
pub(super) fn mat(data: &[f32], rows: usize, cols: usize) -> Mat<'_> {
    Mat { data: &data[..rows * cols], rows, cols, strides: [cols, 1] }
}

impl Mat<'_> {
    /// The transpose, in place.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, strides: [self.strides[1], self.strides[0]], ..self }
    }
}

/// c = a·b, or c += a·b with `add`; c contiguous. Returns the operations done.
pub(super) fn product(c: &mut [f32], a: Mat, b: Mat, add: bool) -> usize {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(c.len() >= m * n && b.rows == k, "{m} x {k} times {} x {n} into {}", b.rows, c.len());
    debug_assert!(a.data.len() == m * k && b.data.len() == k * n);
    if m * n == 0 {
        return 0;
    }
    // SAFETY: `mat` bounds both operands, the assert bounds c; all strides are those of contiguous matrices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.data.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            if add { 1.0f32 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    2 * m * n * k
}

/// y_j += Σ_i a_ij.
pub(super) fn add_rows(y: &mut [f32], a: &[f32]) {
    for row in a.chunks_exact(y.len().max(1)) {
        y.iter_mut().zip(row).for_each(|(y, x)| *y += x);
    }
}

/// Σ x·y.
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let (mut acc, n) = ([0f32; 8], x.len().min(y.len()) / 8 * 8);
    for (x, y) in x[..n].chunks_exact(8).zip(y.chunks_exact(8)) {
        for i in 0..8 {
            acc[i] += x[i] * y[i];
        }
    }
    acc.iter().sum::<f32>() + x[n..].iter().zip(&y[n..]).map(|(x, y)| x * y).sum::<f32>()
}
