//! Steps on single rows; those on whole matrices are `foveal_kernels::elementwise`.

/// ln Σ e^x with f64 sums of short f32 runs.
pub(crate) fn log_sum_exp(x: &[f32]) -> f64 {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !top.is_finite() {
        return f64::from(top);
    }
    let sum: f64 = x.chunks(64).map(|c| f64::from(c.iter().map(|v| (v - top).exp()).sum::<f32>())).sum();
    f64::from(top) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-6);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
    }
}
