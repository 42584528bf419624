//! The slow `f64` twin of feature attention: its documentation and its judge.

/// o_i = Σ_j a_ij v_j / (Σ_j a_ij + ε), a_ij = c_(i−j) · (q_i·k_j) over visible keys, on contiguous (B, H, T, R or Dv)
/// data. `weights` holds (H, 2T − 1), `eps` `None` means no division; causal is bottom-right aligned.
pub fn feature_attend(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [b, h, tq, r]: [usize; 4],
    [hkv, tk, dv]: [usize; 3],
    causal: bool,
    eps: Option<f64>,
    weights: Option<&[f64]>,
) -> Vec<f64> {
    let mut out = vec![0.0; b * h * tq * dv];
    for row in 0..b * h * tq {
        let (head, i) = (row / tq, row % tq);
        let kv = head / h * hkv + head % h / (h / hkv);
        let mut den = eps.unwrap_or(1.0);
        for j in (0..tk).filter(|j| !causal || j + tq <= tk + i) {
            let c = weights.map_or(1.0, |c| c[head % h * (2 * tk - 1) + i + tk - 1 - j]);
            let a = c * (0..r).map(|x| q[row * r + x] * k[(kv * tk + j) * r + x]).sum::<f64>();
            (0..dv).for_each(|d| out[row * dv + d] += a * v[(kv * tk + j) * dv + d]);
            den += if eps.is_some() { a } else { 0.0 };
        }
        out[row * dv..][..dv].iter_mut().for_each(|o| *o = if den == 0.0 { 0.0 } else { *o / den });
    }
    out
}
