//! Steps on single rows; those on whole matrices are `foveal_kernels::elementwise`.

/// Sum of squares in 16 chains, so that the compiler vectorises it.
fn sum_squares(x: &[f32]) -> f32 {
    let mut acc = [0f32; 16];
    let (body, tail) = x.as_chunks::<16>();
    for c in body {
        for i in 0..16 {
            acc[i] += c[i] * c[i];
        }
    }
    acc.iter().sum::<f32>() + tail.iter().map(|v| v * v).sum::<f32>()
}

/// x = x / √(mean x² + eps) · gain, in place.
pub(crate) fn rms_norm_row(x: &mut [f32], gain: &[f32], eps: f32) {
    let r = 1.0 / (sum_squares(x) / gain.len() as f32 + eps).sqrt();
    for (x, g) in x.iter_mut().zip(gain) {
        *x *= r * g;
    }
}

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
        let mut row = [3.0, 4.0, 0.0, 0.0];
        rms_norm_row(&mut row, &[1.0, 2.0, 1.0, 1.0], 0.0);
        assert_eq!(row, [1.2, 3.2, 0.0, 0.0]);
        let mut row: Vec<f32> = (0..37).map(|i| i as f32).collect();
        rms_norm_row(&mut row, &[1.0; 37], 0.0);
        // Σ i² below 37 is 36·37·73/6.
        let r = (36.0f32 * 37.0 * 73.0 / 6.0 / 37.0).sqrt();
        assert!(row.iter().enumerate().all(|(i, x)| (x * r - i as f32).abs() < 1e-5 * 37.0));
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-6);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
    }
}
