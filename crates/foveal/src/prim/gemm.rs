//! Small dense products for estimators and factorisations.

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
    product([m, n, k], alpha, a, a_stride, b, [b_stride, 1], c, false)
}

/// C (m, n) = A (m, k) · B (k, n), all row-major contiguous. Returns the FLOPs done.
pub fn ab(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) -> u64 {
    product([m, n, k], 1.0, a, k, b, [1, n], c, false)
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
    product([m, n, k], 1.0, a, a_stride, b, [b_stride, 1], c, true)
}

/// C (m, n) = or += alpha · A · B on one thread, C contiguous. A has rows of k elements, `a_stride`
/// apart; element (column j of C, inner index i) of B lies at `j·b_strides[0] + i·b_strides[1]`.
fn product(
    [m, n, k]: [usize; 3],
    alpha: f32,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    b_strides: [usize; 2],
    c: &mut [f32],
    add: bool,
) -> u64 {
    assert!(c.len() >= m * n, "C too short");
    if m == 0 || n == 0 || (k == 0 && add) {
        return 0;
    }
    assert!(k == 0 || a.len() > (m - 1) * a_stride + (k - 1), "A too short");
    assert!(k == 0 || b.len() > (n - 1) * b_strides[0] + (k - 1) * b_strides[1], "B too short");
    // SAFETY: the three asserts above bound every element that these strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
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
