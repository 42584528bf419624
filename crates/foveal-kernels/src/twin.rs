//! Slow `f64` twins: each kernel in a few lines, as its documentation and its judge.

/// What a twin of attention may mask: `visible(b, h, query, key)`.
pub type Visible<'a> = &'a dyn Fn(usize, usize, usize, usize) -> bool;

/// Exact attention in f64 on contiguous (B,H,T,D) data.
///
/// s = scale · q·k, optionally soft-capped; p = e^s over visible keys; o = Σ p v / (Σ p + e^sink);
/// lse = ln of that denominator. A row that sees nothing is zero with lse = −∞.
/// Returns (out (B,H,Tq,Dv), lse (B,H,Tq)).
#[allow(clippy::too_many_arguments)]
pub fn attend(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [b, h, tq, d]: [usize; 4],
    [hkv, tk, dv]: [usize; 3],
    scale: f64,
    softcap: Option<f64>,
    sinks: Option<&[f64]>,
    visible: Visible,
) -> (Vec<f64>, Vec<f64>) {
    attend_biased(q, k, v, [b, h, tq, d], [hkv, tk, dv], scale, softcap, sinks, &|_, _, _, _| 0.0, visible)
}

/// [`attend`] with `bias(b, h, query, key)` added to each score after the softcap; −∞ masks.
#[allow(clippy::too_many_arguments)]
pub fn attend_biased(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [b, h, tq, d]: [usize; 4],
    [hkv, tk, dv]: [usize; 3],
    scale: f64,
    softcap: Option<f64>,
    sinks: Option<&[f64]>,
    bias: &dyn Fn(usize, usize, usize, usize) -> f64,
    visible: Visible,
) -> (Vec<f64>, Vec<f64>) {
    let mut out = vec![0.0; b * h * tq * dv];
    let mut lse = vec![f64::NEG_INFINITY; b * h * tq];
    for bi in 0..b {
        for hi in 0..h {
            let kv = bi * hkv + hi / (h / hkv);
            for i in 0..tq {
                let r = (bi * h + hi) * tq + i;
                let s: Vec<(usize, f64)> = (0..tk)
                    .filter(|&j| visible(bi, hi, i, j))
                    .map(|j| {
                        let s: f64 = (0..d).map(|c| q[r * d + c] * k[(kv * tk + j) * d + c]).sum::<f64>() * scale;
                        (j, softcap.map_or(s, |c| c * (s / c).tanh()) + bias(bi, hi, i, j))
                    })
                    .collect();
                let sink = sinks.map(|s| s[hi]);
                let m = s.iter().map(|x| x.1).chain(sink).fold(f64::NEG_INFINITY, f64::max);
                if m == f64::NEG_INFINITY {
                    continue;
                }
                let l: f64 = s.iter().map(|x| x.1).chain(sink).map(|x| (x - m).exp()).sum();
                for (j, x) in s {
                    let p = (x - m).exp() / l;
                    for c in 0..dv {
                        out[r * dv + c] += p * v[(kv * tk + j) * dv + c];
                    }
                }
                lse[r] = m + l.ln();
            }
        }
    }
    (out, lse)
}

/// Gradients of attention.
#[derive(Debug, Clone)]
pub struct AttendGradients {
    /// (B, H, Tq, D).
    pub dq: Vec<f64>,
    /// (B, H_kv, Tk, D).
    pub dk: Vec<f64>,
    /// (B, H_kv, Tk, Dv).
    pub dv: Vec<f64>,
    /// (H); empty without sinks.
    pub dsinks: Vec<f64>,
    /// (B, H, Tq, Tk).
    pub dbias: Vec<f64>,
}

/// Gradients of Σ out · dout + Σ lse · dlse for [`attend_biased`]: with p the weights and D = Σ dout · out,
/// dv = Σ p dout, the gradient of a score is p (dout · v − D + dlse), and dq, dk are its sums over k and q
/// times the scale and the slope of the softcap. Rows that see nothing give nothing.
#[allow(clippy::too_many_arguments)]
pub fn attend_backward(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
    dlse: Option<&[f64]>,
    [b, h, tq, d]: [usize; 4],
    [hkv, tk, dv]: [usize; 3],
    scale: f64,
    softcap: Option<f64>,
    sinks: Option<&[f64]>,
    bias: &dyn Fn(usize, usize, usize, usize) -> f64,
    visible: Visible,
) -> AttendGradients {
    let (out, lse) = attend_biased(q, k, v, [b, h, tq, d], [hkv, tk, dv], scale, softcap, sinks, bias, visible);
    let mut g = AttendGradients {
        dq: vec![0.0; q.len()],
        dk: vec![0.0; k.len()],
        dv: vec![0.0; v.len()],
        dsinks: vec![0.0; sinks.map_or(0, <[f64]>::len)],
        dbias: vec![0.0; b * h * tq * tk],
    };
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for r in (0..b * h * tq).filter(|&r| lse[r] > f64::NEG_INFINITY) {
        let (bi, hi, i) = (r / (h * tq), r / tq % h, r % tq);
        let kv = bi * hkv + hi / (h / hkv);
        let (q, dout) = (&q[r * d..(r + 1) * d], &dout[r * dv..(r + 1) * dv]);
        let delta = dot(dout, &out[r * dv..(r + 1) * dv]) - dlse.map_or(0.0, |x| x[r]);
        if let Some(s) = sinks {
            g.dsinks[hi] -= (s[hi] - lse[r]).exp() * delta;
        }
        for j in (0..tk).filter(|&j| visible(bi, hi, i, j)) {
            let at = kv * tk + j;
            let k = &k[at * d..(at + 1) * d];
            let s = dot(q, k) * scale;
            let bent = softcap.map_or(0.0, |c| (s / c).tanh());
            let p = (softcap.map_or(s, |c| c * bent) + bias(bi, hi, i, j) - lse[r]).exp();
            let ds = p * (dot(dout, &v[at * dv..(at + 1) * dv]) - delta);
            g.dbias[r * tk + j] = ds;
            let ds = ds * (1.0 - bent * bent) * scale;
            for c in 0..d {
                g.dq[r * d + c] += ds * k[c];
                g.dk[at * d + c] += ds * q[c];
            }
            for c in 0..dv {
                g.dv[at * dv + c] += p * dout[c];
            }
        }
    }
    g
}

/// Attention of which each weight is a sigmoid of its own: p = 1 / (1 + e^−(s + shift)), o = Σ p v, with the
/// scores of [`attend_biased`]; and the gradients of Σ out · dout (no sinks).
#[allow(clippy::too_many_arguments)]
pub fn attend_sigmoid(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
    [b, h, tq, d]: [usize; 4],
    [hkv, tk, dv]: [usize; 3],
    scale: f64,
    softcap: Option<f64>,
    shift: f64,
    bias: &dyn Fn(usize, usize, usize, usize) -> f64,
    visible: Visible,
) -> (Vec<f64>, AttendGradients) {
    let mut out = vec![0.0; dout.len()];
    let mut g = AttendGradients {
        dq: vec![0.0; q.len()],
        dk: vec![0.0; k.len()],
        dv: vec![0.0; v.len()],
        dsinks: Vec::new(),
        dbias: vec![0.0; b * h * tq * tk],
    };
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for r in 0..b * h * tq {
        let (bi, hi, i) = (r / (h * tq), r / tq % h, r % tq);
        let kv = bi * hkv + hi / (h / hkv);
        let (q, dout) = (&q[r * d..(r + 1) * d], &dout[r * dv..(r + 1) * dv]);
        for j in (0..tk).filter(|&j| visible(bi, hi, i, j)) {
            let at = kv * tk + j;
            let (k, v) = (&k[at * d..(at + 1) * d], &v[at * dv..(at + 1) * dv]);
            let s = dot(q, k) * scale;
            let bent = softcap.map_or(0.0, |c| (s / c).tanh());
            let p = 1.0 / (1.0 + (-softcap.map_or(s, |c| c * bent) - bias(bi, hi, i, j) - shift).exp());
            let ds = p * (1.0 - p) * dot(dout, v);
            g.dbias[r * tk + j] = ds;
            let ds = ds * (1.0 - bent * bent) * scale;
            for c in 0..d {
                g.dq[r * d + c] += ds * k[c];
                g.dk[at * d + c] += ds * q[c];
            }
            for c in 0..dv {
                out[r * dv + c] += p * v[c];
                g.dv[at * dv + c] += p * dout[c];
            }
        }
    }
    (out, g)
}

/// One row of attention as a kernel computes it that keeps its output in bf16, tile by tile of `block` keys (so that
/// one can see what that does): weights, the product of a tile and the sum so far are rounded to bf16. With `beta` as
/// `Attend::repeated_max`, in the source's own terms. Scores are scaled; `v` is (keys, dv).
pub fn attend_row_in_bf16(scores: &[f32], v: &[f32], dv: usize, block: usize, beta: Option<f32>) -> Vec<f32> {
    let round = |x: f32| half::bf16::from_f32(x).to_f32();
    let (mut m, mut l, mut out) = (f32::NEG_INFINITY, 0f32, vec![0f32; dv]);
    for (s, v) in scores.chunks(block).zip(v.chunks(block * dv)) {
        let mut top = s.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if let Some(beta) = beta
            && s.iter().filter(|&&x| x >= top - 1e-3).count() > 1
        {
            top = if top > 0.0 { beta * top } else { 0.0 };
        }
        let new = m.max(top);
        let keep = (m - new).exp();
        let p: Vec<f32> = s.iter().map(|x| (x - new).exp()).collect();
        l = l * keep + p.iter().sum::<f32>();
        for (c, o) in out.iter_mut().enumerate() {
            let product: f32 = p.iter().zip(v.chunks(dv)).map(|(p, v)| round(*p) * v[c]).sum();
            *o = round(*o * keep + round(product));
        }
        m = new;
    }
    out.iter_mut().for_each(|o| *o /= l);
    out
}

/// Linear layer in f64: x (m, k) · wᵀ (n, k) + bias → (m, n).
pub fn linear(x: &[f64], w: &[f64], bias: Option<&[f64]>, [m, n, k]: [usize; 3]) -> Vec<f64> {
    let dot = |i: usize, j: usize| (0..k).map(|c| x[i * k + c] * w[j * k + c]).sum::<f64>();
    (0..m * n).map(|r| dot(r / n, r % n) + bias.map_or(0.0, |b| b[r % n])).collect()
}

/// Root-mean-square normalisation of rows of `weight.len()` elements.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let d = weight.len();
    let row = |r: &[f64]| {
        let f = 1.0 / (r.iter().map(|x| x * x).sum::<f64>() / d as f64 + eps).sqrt();
        r.iter().zip(weight).map(|(x, w)| x * f * w).collect::<Vec<_>>()
    };
    x.chunks(d).flat_map(row).collect()
}

/// Gradients (dx, dweight) of Σ dy · [`rms_norm`]: with f the factor of a row of d elements,
/// dx_i = f·(w_i dy_i − f²/d · x_i · Σ x w dy), dweight_i = Σ over rows of f·x_i·dy_i.
pub fn rms_norm_backward(x: &[f64], weight: &[f64], eps: f64, dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let d = weight.len();
    let (mut dx, mut dw) = (Vec::new(), vec![0.0; d]);
    for (x, dy) in x.chunks(d).zip(dy.chunks(d)) {
        let f = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / d as f64 + eps).sqrt();
        let s: f64 = (0..d).map(|i| x[i] * weight[i] * dy[i]).sum();
        dx.extend((0..d).map(|i| f * (weight[i] * dy[i] - f * f / d as f64 * x[i] * s)));
        (0..d).for_each(|i| dw[i] += f * x[i] * dy[i]);
    }
    (dx, dw)
}

/// Rotate one row: pair i = (x[first(i)], x[second(i)]) turns by angle i, given as (cos, sin).
pub fn rope(x: &[f64], angles: &[(f64, f64)], interleaved: bool) -> Vec<f64> {
    let mut y = x.to_vec();
    for (i, (c, s)) in angles.iter().enumerate() {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + angles.len()) };
        (y[a], y[b]) = (x[a] * c - x[b] * s, x[b] * c + x[a] * s);
    }
    y
}

/// silu(gate) · up for one row gate | up.
pub fn swiglu(gate_up: &[f64]) -> Vec<f64> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// Softmax of one row; zeros where every element is −∞.
pub fn softmax(x: &[f64]) -> Vec<f64> {
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY {
        return vec![0.0; x.len()];
    }
    let sum: f64 = x.iter().map(|x| (x - top).exp()).sum();
    x.iter().map(|x| (x - top).exp() / sum).collect()
}

/// Gradient of Σ dy · [`softmax`] for one row: dx_i = y_i (dy_i − Σ y dy).
pub fn softmax_backward(x: &[f64], dy: &[f64]) -> Vec<f64> {
    let y = softmax(x);
    let s: f64 = y.iter().zip(dy).map(|(y, g)| y * g).sum();
    y.iter().zip(dy).map(|(y, g)| y * (g - s)).collect()
}
