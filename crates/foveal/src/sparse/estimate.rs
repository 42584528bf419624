//! What the estimators of this family share: contiguous rows, a softmax row, and the
//! rule by which their work is counted.
//!
//! Counting: a product costs 2·m·n·k, an addition, multiplication or exponential one flop;
//! comparisons, selection and index arithmetic are free. Bytes are the f32 rows of q and k that
//! each product, pooling or gather reads.

use super::Mat;
use foveal_kernels::Isa;
use foveal_kernels::exp::{self, Fun};
use std::borrow::Cow;

/// Flops of one softmax entry: difference, exponential, sum.
pub(crate) const SOFTMAX_FLOPS: usize = 3;

/// Bytes of `rows` f32 rows of `cols`.
pub(crate) fn bytes(rows: usize, cols: usize) -> u64 {
    (rows * cols * size_of::<f32>()) as u64
}

/// The matrix as contiguous rows, zero-padded to `rows` rows; borrowed where it already is.
pub(crate) fn packed<'a>(m: &Mat<'a>, rows: usize) -> Cow<'a, [f32]> {
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

/// In-place e^{x − max x}; returns 1 / Σ, the factor that makes the row a softmax. The row must
/// not be empty and holds no −∞: callers cut the row at the causal edge instead of masking.
pub(crate) fn exp_row(x: &mut [f32]) -> f32 {
    let m = max_of(x);
    x.iter_mut().for_each(|v| *v -= m);
    exp::apply(Fun::Exp, x, Isa::active());
    // Eight partial sums: one chain would hold the loop to the latency of an addition.
    let mut s8 = [0f32; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for c in chunks {
        for (s, v) in s8.iter_mut().zip(c) {
            *s += *v;
        }
    }
    1.0 / (s8.iter().sum::<f32>() + rest.iter().sum::<f32>())
}

/// Largest entry, in eight chains.
pub(crate) fn max_of(x: &[f32]) -> f32 {
    let mut m8 = [f32::NEG_INFINITY; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for c in chunks {
        for (m, v) in m8.iter_mut().zip(c) {
            *m = m.max(*v);
        }
    }
    m8.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_row_is_a_softmax() {
        for n in [1usize, 7, 8, 9, 40] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 11) as f32 - 5.0) * 3.0).collect();
            let mut y = x.clone();
            let inv = exp_row(&mut y);
            let z: f64 = x.iter().map(|v| f64::from(*v).exp()).sum();
            for (a, b) in x.iter().zip(&y) {
                assert!((f64::from(b * inv) - f64::from(*a).exp() / z).abs() < 1e-6);
            }
            assert_eq!(max_of(&x), x.iter().copied().fold(f32::MIN, f32::max));
        }
    }

    #[test]
    fn packing_copies_only_when_it_must() {
        let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        assert!(matches!(packed(&Mat::new(&data, 4, 3, 3), 4), Cow::Borrowed(x) if x.len() == 12));
        assert_eq!(&*packed(&Mat::new(&data, 3, 2, 4), 4), &[0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 0.0, 0.0]);
    }
}
