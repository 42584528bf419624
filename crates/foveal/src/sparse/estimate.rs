//! What the estimators of this family share: contiguous rows, a fast exponential, and the
//! rule by which their work is counted.
//!
//! Counting: a product costs 2·m·n·k, an addition, multiplication or exponential one flop;
//! comparisons, selection and index arithmetic are free. Bytes are the f32 rows of q and k that
//! each product, pooling or gather reads.

use super::Mat;
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

/// e^x for x ≤ 0, within 2 ulp of f32; below −87 it is e^−87, which no share of a softmax
/// notices. Free of branches and calls, so that loops over it run in vector registers.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer in the low mantissa bits; the extra 127 makes those
    // bits the biased exponent of 2^n.
    const MAGIC: f32 = 12_582_912.0 + 127.0;
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts: the first has so few bits that n·HI is exact.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.0
        + r * (1.0 + r * (0.5 + r * (0.166_666_65 + r * (0.041_665_795 + r * (0.008_333_452 + r * 0.001_394_087)))));
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// In-place e^{x − max x}; returns 1 / Σ, the factor that makes the row a softmax. The row must
/// not be empty and holds no −∞: callers cut the row at the causal edge instead of masking.
pub(crate) fn exp_row(x: &mut [f32]) -> f32 {
    // Eight partial maxima and sums: one chain would hold the loop to the latency of an addition.
    let mut m8 = [f32::NEG_INFINITY; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for c in chunks {
        for (m, v) in m8.iter_mut().zip(c) {
            *m = m.max(*v);
        }
    }
    let m = m8.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut s8 = [0f32; 8];
    let (chunks, rest) = x.as_chunks_mut::<8>();
    for c in chunks {
        for (s, v) in s8.iter_mut().zip(c) {
            *v = exp_nonpositive(*v - m);
            *s += *v;
        }
    }
    let mut sum: f32 = s8.iter().sum();
    for v in rest {
        *v = exp_nonpositive(*v - m);
        sum += *v;
    }
    1.0 / sum
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
    fn exponential_is_within_two_ulp() {
        let mut worst = 0f64;
        let mut x = -86.9f32;
        while x <= 0.0 {
            let want = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
            worst = worst.max((f64::from(exp_nonpositive(x)) - want).abs() / ulp);
            x += 0.000_917;
        }
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert!(exp_nonpositive(-1e30) < 2e-38);
        assert!(exp_nonpositive(f32::NEG_INFINITY) < 2e-38);
    }

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
