//! Random problems and their judges, shared by the device tests and the benchmark.
#![allow(dead_code)]

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Standard normal numbers in bf16.
pub fn normal(seed: u64, n: usize) -> Vec<bf16> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = n.div_ceil(threads).max(1);
    let mut out = vec![bf16::ZERO; n];
    std::thread::scope(|s| {
        for (i, out) in out.chunks_mut(part).enumerate() {
            s.spawn(move || {
                let mut rng = ChaCha8Rng::seed_from_u64(seed * 1000 + i as u64);
                for pair in out.chunks_mut(2) {
                    let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random());
                    let (r, a) = ((-2.0 * u.ln()).sqrt(), std::f32::consts::TAU * v);
                    pair[0] = bf16::from_f32(r * a.cos());
                    if let Some(x) = pair.get_mut(1) {
                        *x = bf16::from_f32(r * a.sin());
                    }
                }
            });
        }
    });
    out
}

/// A problem of attention: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv), contiguous.
pub struct Problem {
    pub q: Vec<bf16>,
    pub k: Vec<bf16>,
    pub v: Vec<bf16>,
    pub b: usize,
    pub h: usize,
    pub hkv: usize,
    pub tq: usize,
    pub tk: usize,
    pub d: usize,
    pub dv: usize,
}

impl Problem {
    pub fn new(seed: u64, [b, h, hkv]: [usize; 3], [tq, tk]: [usize; 2], [d, dv]: [usize; 2]) -> Self {
        let q = normal(seed, b * h * tq * d);
        let (k, v) = (normal(seed + 1, b * hkv * tk * d), normal(seed + 2, b * hkv * tk * dv));
        Self { q, k, v, b, h, hkv, tq, tk, d, dv }
    }
}

pub type Visible<'a> = &'a (dyn Fn(usize, usize, usize) -> bool + Sync);

/// One row (number (b h) tq + i) in f64: the answer, its log-sum-exp, and what plain code in bf16 makes of it (weights
/// before division and the output rounded).
fn row(
    p: &Problem,
    r: usize,
    scale: f64,
    cap: Option<f64>,
    sinks: Option<&[f32]>,
    visible: Visible,
) -> (Vec<f64>, f64, Vec<f64>) {
    let (bh, i) = (r / p.tq, r % p.tq);
    let kv = bh / p.h * p.hkv + bh % p.h / (p.h / p.hkv);
    let q = &p.q[r * p.d..][..p.d];
    let mut s: Vec<(usize, f64)> = Vec::new();
    for j in (0..p.tk).filter(|&j| visible(bh, i, j)) {
        let k = &p.k[(kv * p.tk + j) * p.d..][..p.d];
        let x = q.iter().zip(k).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>() * scale;
        s.push((j, cap.map_or(x, |c| c * (x / c).tanh())));
    }
    let sink = sinks.map_or(f64::NEG_INFINITY, |s| s[bh % p.h].into());
    let m = s.iter().map(|x| x.1).fold(sink, f64::max);
    let (mut out, mut plain) = (vec![0.0; p.dv], vec![0.0; p.dv]);
    if m == f64::NEG_INFINITY {
        return (out, m, plain);
    }
    let sum: f64 = s.iter().map(|x| (x.1 - m).exp()).sum::<f64>() + (sink - m).exp();
    for (j, x) in s {
        let w = (x - m).exp();
        let rounded = bf16::from_f64(w).to_f64();
        for (c, v) in p.v[(kv * p.tk + j) * p.dv..][..p.dv].iter().enumerate() {
            out[c] += w * v.to_f64() / sum;
            plain[c] += rounded * v.to_f64() / sum;
        }
    }
    plain.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
    (out, m + sum.ln(), plain)
}

/// The worst errors over some rows: ours, plain code's, of the log-sum-exp.
#[derive(Debug, Clone, Copy, Default)]
pub struct Verdict {
    pub ours: f64,
    pub plain: f64,
    pub lse: f64,
}

impl Verdict {
    /// The error rule; a log-sum-exp is f32.
    pub fn good(&self) -> bool {
        self.ours <= 2.0 * self.plain + 1e-6 && self.lse <= 2e-3
    }
}

/// Judge the rows of `rows` of an output (B, H, Tq, Dv) and its log-sum-exp.
pub fn judge(
    p: &Problem,
    out: &[bf16],
    lse: &[f32],
    rows: &[usize],
    scale: f64,
    cap: Option<f64>,
    sinks: Option<&[f32]>,
    visible: Visible,
) -> Verdict {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts: Vec<Verdict> = std::thread::scope(|s| {
        let tasks: Vec<_> = rows
            .chunks(rows.len().div_ceil(threads).max(1))
            .map(|rows| {
                s.spawn(move || {
                    let mut worst = Verdict::default();
                    for &r in rows {
                        let (want, l, plain) = row(p, r, scale, cap, sinks, visible);
                        for c in 0..p.dv {
                            let x = out[r * p.dv + c].to_f64();
                            let e = (x - want[c]).abs();
                            worst.ours = worst.ours.max(if e.is_nan() { f64::INFINITY } else { e });
                            worst.plain = worst.plain.max((plain[c] - want[c]).abs());
                        }
                        let e = if f64::from(lse[r]) == l { 0.0 } else { (f64::from(lse[r]) - l).abs() };
                        worst.lse = worst.lse.max(if e.is_nan() { f64::INFINITY } else { e });
                    }
                    worst
                })
            })
            .collect();
        tasks.into_iter().map(|t| t.join().unwrap()).collect()
    });
    parts.iter().fold(Verdict::default(), |a, b| Verdict {
        ours: a.ours.max(b.ours),
        plain: a.plain.max(b.plain),
        lse: a.lse.max(b.lse),
    })
}

/// Some rows of `n`, the first and the last among them.
pub fn some_rows(n: usize, count: usize, seed: u64) -> Vec<usize> {
    if n <= count {
        return (0..n).collect();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    [0, n - 1].into_iter().chain((2..count).map(|_| rng.random_range(0..n))).collect()
}

/// A recurrence of one head in f64, and the same with what plain bf16 code rounds: states as they are read, what is
/// written, the output. q, k (T, D), v (T, Dv), log decays g and strengths beta (T). Returns both outputs; `state`
/// becomes the last one.
pub fn recur(
    [q, k, v]: [&[bf16]; 3],
    [g, beta]: [Option<&[f32]>; 2],
    [t, d, dv]: [usize; 3],
    scale: f64,
    state: &mut [f64],
) -> (Vec<f64>, Vec<f64>) {
    let first = state.to_vec();
    let walk = |state: &mut [f64], round: &dyn Fn(f64) -> f64| {
        let mut out = vec![0.0; t * dv];
        for i in 0..t {
            let by = g.map_or(1.0, |g| f64::from(g[i]).exp());
            let row = |x: &[bf16], a: usize| x[i * d + a].to_f64();
            let mut write: Vec<f64> = v[i * dv..(i + 1) * dv].iter().map(|x| x.to_f64()).collect();
            if let Some(beta) = beta {
                for (c, w) in write.iter_mut().enumerate() {
                    let said: f64 = (0..d).map(|a| row(k, a) * round(state[a * dv + c])).sum();
                    *w = round(f64::from(beta[i]) * (*w - by * said));
                }
            }
            for a in 0..d {
                for c in 0..dv {
                    let s = &mut state[a * dv + c];
                    *s = *s * by + row(k, a) * write[c];
                    out[i * dv + c] += scale * row(q, a) * round(*s);
                }
            }
        }
        out
    };
    let rounded = |x: f64| bf16::from_f64(x).to_f64();
    let out = walk(state, &|x| x);
    let mut plain = walk(&mut first.clone(), &rounded);
    plain.iter_mut().for_each(|x| *x = rounded(*x));
    (out, plain)
}
