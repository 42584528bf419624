//! Decompositions through faer, in f64.

use crate::error::{Error, Result};
use faer::{Mat, Side};

/// Eigenvectors of a symmetric (n, n) row-major matrix, columns by falling eigenvalue, and the
/// eigenvalues. The basis of PCA when the matrix is a second moment.
pub fn symmetric_eigen(a: &[f64], n: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let m = Mat::from_fn(n, n, |i, j| a[i * n + j]);
    let e = m.self_adjoint_eigen(Side::Lower).map_err(|_| Error::Decomposition {
        op: "eigendecomposition",
        rows: n,
        cols: n,
    })?;
    let (u, s) = (e.U(), e.S());
    // faer gives rising eigenvalues.
    let values = (0..n).rev().map(|j| s[j]).collect();
    let mut vectors = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            vectors[i * n + j] = u[(i, n - 1 - j)];
        }
    }
    Ok((vectors, values))
}

/// Thin singular value decomposition A (m, n) = U diag(s) Vᵀ, singular values falling.
pub struct Svd {
    /// (m, k) row-major, k = min(m, n).
    pub u: Vec<f64>,
    /// k values.
    pub s: Vec<f64>,
    /// (n, k) row-major.
    pub v: Vec<f64>,
    /// min(m, n).
    pub k: usize,
}

/// Thin SVD of a row-major (m, n) matrix.
pub fn svd(a: &[f64], m: usize, n: usize) -> Result<Svd> {
    let mat = Mat::from_fn(m, n, |i, j| a[i * n + j]);
    let d = mat.thin_svd().map_err(|_| Error::Decomposition { op: "SVD", rows: m, cols: n })?;
    let k = m.min(n);
    let flat = |x: faer::MatRef<f64>| {
        let mut out = Vec::with_capacity(x.nrows() * x.ncols());
        for i in 0..x.nrows() {
            for j in 0..x.ncols() {
                out.push(x[(i, j)]);
            }
        }
        out
    };
    Ok(Svd { u: flat(d.U()), s: (0..k).map(|i| d.S()[i]).collect(), v: flat(d.V()), k })
}

/// W Wᵀ of a row-major (m, n) matrix, or W M Wᵀ with a symmetric row-major (n, n) `moment`:
/// (m, m) row-major. Its eigenvectors are the left singular vectors of W, or of W M^½.
pub fn gram(w: &[f64], m: usize, n: usize, moment: Option<&[f64]>) -> Vec<f64> {
    let w = faer::MatRef::from_row_major_slice(w, m, n);
    let g = match moment {
        None => w * w.transpose(),
        Some(x) => (w * faer::MatRef::from_row_major_slice(x, n, n)) * w.transpose(),
    };
    let mut out = vec![0.0; m * m];
    for i in 0..m {
        for j in 0..m {
            // Rounding makes the two triangles differ in the last bits.
            out[i * m + j] = 0.5 * (g[(i, j)] + g[(j, i)]);
        }
    }
    out
}
