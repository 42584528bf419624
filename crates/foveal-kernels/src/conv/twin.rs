//! Slow `f64` twins of the convolutions: their documentation and their judge. Memory is contiguous
//! (B, C, T); filters are (C, L), shared over the batch.

/// `y[c, t] = Σ_s h[c, s] · u[c, t − s] + d[c] · u[c, t]`; indices before 0 read zero, or with `circular` the other end.
pub fn long_conv(h: &[f64], u: &[f64], d: &[f64], [b, c, t]: [usize; 3], l: usize, circular: bool) -> Vec<f64> {
    let mut y = vec![0.0; b * c * t];
    for r in 0..b * c {
        for i in 0..t {
            let past = (0..l).filter(|&s| circular || s <= i);
            let sum: f64 = past.map(|s| h[r % c * l + s] * u[r * t + (i + t - s) % t]).sum();
            y[r * t + i] = sum + d[r % c] * u[r * t + i];
        }
    }
    y
}

/// Gradients of [`long_conv`] for the output gradient `dy`: (du, dh, dd).
pub fn long_conv_backward(
    h: &[f64],
    u: &[f64],
    d: &[f64],
    dy: &[f64],
    [b, c, t]: [usize; 3],
    l: usize,
    circular: bool,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut du, mut dh, mut dd) = (vec![0.0; b * c * t], vec![0.0; c * l], vec![0.0; c]);
    for r in 0..b * c {
        for i in 0..t {
            let g = dy[r * t + i];
            for s in (0..l).filter(|&s| circular || s <= i) {
                let j = r * t + (i + t - s) % t;
                du[j] += h[r % c * l + s] * g;
                dh[r % c * l + s] += u[j] * g;
            }
            du[r * t + i] += d[r % c] * g;
            dd[r % c] += u[r * t + i] * g;
        }
    }
    (du, dh, dd)
}

/// `y[c, t] = act(bias[c] + Σ_k w[c, k] · x[c, t − W + 1 + k])`, act the identity or SiLU. `past` (B, C, W − 1) holds
/// the inputs before time 0.
pub fn short_conv(
    x: &[f64],
    w: &[f64],
    bias: &[f64],
    past: &[f64],
    [b, c, t]: [usize; 3],
    width: usize,
    silu: bool,
) -> Vec<f64> {
    let mut y = Vec::with_capacity(b * c * t);
    for r in 0..b * c {
        let seq: Vec<f64> =
            past[r * (width - 1)..][..width - 1].iter().chain(&x[r * t..(r + 1) * t]).copied().collect();
        for i in 0..t {
            let z = bias[r % c] + (0..width).map(|k| w[r % c * width + k] * seq[i + k]).sum::<f64>();
            y.push(if silu { z / (1.0 + (-z).exp()) } else { z });
        }
    }
    y
}

/// Damped EMA of one channel (Ma et al. 2022, arXiv 2209.10655, equation 5): for each of N states
/// h_i ← α_i β_i u + (1 − α_i δ_i) h_i, and y = Σ_i η_i h_i. `state` (N) is carried.
pub fn damped_ema(u: &[f64], alpha: &[f64], delta: &[f64], beta: &[f64], eta: &[f64], state: &mut [f64]) -> Vec<f64> {
    let mut step = |u: f64| {
        (0..state.len())
            .map(|i| {
                state[i] = alpha[i] * beta[i] * u + (1.0 - alpha[i] * delta[i]) * state[i];
                eta[i] * state[i]
            })
            .sum()
    };
    u.iter().map(|&u| step(u)).collect()
}
