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
    assert!(c.len() >= m * n, "C too short");
    assert!(m == 0 || a.len() >= (m - 1) * a_stride + k, "A too short");
    assert!(n == 0 || b.len() >= (n - 1) * b_stride + k, "B too short");
    if m == 0 || n == 0 {
        return 0;
    }
    // SAFETY: the three asserts above bound every element that these strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            a_stride as isize,
            b.as_ptr(),
            b_stride as isize,
            1,
            0.0f32,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    2 * (m * n * k) as u64
}

/// C (m, n) = A (m, k) · B (k, n), all row-major contiguous. Returns the FLOPs done.
pub fn ab(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) -> u64 {
    assert!(c.len() >= m * n && a.len() >= m * k && b.len() >= k * n, "operand too short");
    if m == 0 || n == 0 {
        return 0;
    }
    // SAFETY: contiguous row-major operands of the asserted lengths.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            1,
            n as isize,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    2 * (m * n * k) as u64
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
    assert!(c.len() >= m * n, "C too short");
    assert!(m == 0 || k == 0 || a.len() >= (m - 1) * a_stride + k, "A too short");
    assert!(n == 0 || k == 0 || b.len() >= (n - 1) * b_stride + k, "B too short");
    if m == 0 || n == 0 || k == 0 {
        return 0;
    }
    // SAFETY: the three asserts above bound every element that these strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            true,
            a.as_ptr(),
            1,
            a_stride as isize,
            b.as_ptr(),
            b_stride as isize,
            1,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    2 * (m * n * k) as u64
}
