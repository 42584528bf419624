//! Row operations against their f64 twins, every instruction set.

use foveal_kernels::elementwise::{
    Heads, RopeLayout, add, add_rms_norm, rms_norm, rms_norm_backward, rms_norm_heads, rope, rope_into, softmax_rows,
    softmax_rows_backward, swiglu,
};
use foveal_kernels::{Isa, twin};

/// Deterministic values in (-size, size).
fn noise(n: usize, seed: u64, size: f32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            ((s >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size
        })
        .collect()
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn worst(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}

/// The error rule: at most twice the error of a plain f32 loop (and one rounding, and the flush of exp, are allowed).
fn check(what: &str, got: &[f32], reference: &[f32], want: &[f64]) {
    let (g, r) = (worst(got, want), worst(reference, want));
    let top = want.iter().fold(0f64, |a, x| a.max(x.abs()));
    assert!(g <= (2.0 * r).max(top * f64::from(f32::EPSILON)).max(1e-30), "{what}: error {g:e}, reference {r:e}");
}

fn plain_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    x.chunks(weight.len())
        .flat_map(|r| {
            let f = 1.0 / (r.iter().map(|x| x * x).sum::<f32>() / r.len() as f32 + eps).sqrt();
            r.iter().zip(weight).map(move |(x, w)| x * f * w).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn norms() {
    for (rows, d) in [(1, 1), (3, 5), (2, 64), (7, 100), (200, 576)] {
        let (x, w, delta) = (noise(rows * d, 1, 3.0), noise(d, 2, 1.0), noise(rows * d, 3, 1.0));
        let want = twin::rms_norm(&f64s(&x), &f64s(&w), 1e-5);
        let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
        let want_sum = twin::rms_norm(&f64s(&sum), &f64s(&w), 1e-5);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * d];
            rms_norm(&x, &w, 1e-5, &mut out, isa).unwrap();
            check("rms_norm", &out, &plain_norm(&x, &w, 1e-5), &want);
            let (mut y, mut out) = (x.clone(), vec![f32::NAN; rows * d]);
            add_rms_norm(&mut y, &delta, &w, 1e-5, &mut out, isa).unwrap();
            assert_eq!(y, sum);
            check("add_rms_norm", &out, &plain_norm(&sum, &w, 1e-5), &want_sum);
            let mut y = x.clone();
            add(&mut y, &delta, isa).unwrap();
            assert_eq!(y, sum);
        }
    }
}

#[test]
fn norm_of_heads_leaves_the_rest_alone() {
    let (tokens, width, d) = (5, 70, 20);
    let heads = Heads::in_rows(tokens, width, 4, 3, d);
    let (x, w) = (noise(tokens * width, 1, 2.0), noise(d, 2, 1.0));
    for isa in Isa::available() {
        let mut y = x.clone();
        rms_norm_heads(&mut y, heads, &w, 1e-6, isa).unwrap();
        for t in 0..tokens {
            for c in 0..width {
                let i = t * width + c;
                if (4..64).contains(&c) {
                    let h = (c - 4) / d;
                    let at = t * width + 4 + h * d;
                    let row = twin::rms_norm(&f64s(&x[at..at + d]), &f64s(&w), 1e-6);
                    assert!((f64::from(y[i]) - row[c - 4 - h * d]).abs() < 1e-6);
                } else {
                    assert_eq!(y[i], x[i]);
                }
            }
        }
    }
}

#[test]
fn rope_in_place_and_into_another_layout() {
    for (d, rotary) in [(64, 64), (20, 12), (80, 40), (6, 2), (4, 0)] {
        let (tokens, heads, width) = (9, 3, 3 * d + 7);
        let half = rotary / 2;
        let angle = |p: usize, i: usize| (p as f32 * 1000f32.powf(-(i as f32) / half as f32)).sin_cos();
        let cos: Vec<f32> = (0..50 * half).map(|j| angle(j / half, j % half).1).collect();
        let sin: Vec<f32> = (0..50 * half).map(|j| angle(j / half, j % half).0).collect();
        let positions: Vec<u32> = (0..tokens as u32).map(|t| (t * 7 + 3) % 50).collect();
        let x = noise(tokens * width, 5, 1.0);
        let from = Heads::in_rows(tokens, width, 2, heads, d);
        let to = Heads::head_major(heads, tokens, d);
        for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
            let mut want = f64s(&x);
            for t in 0..tokens {
                let at = positions[t] as usize * half;
                let angles: Vec<(f64, f64)> = (at..at + half).map(|j| (f64::from(cos[j]), f64::from(sin[j]))).collect();
                for h in 0..heads {
                    let row = t * width + 2 + h * d;
                    let y = twin::rope(&want[row..row + d], &angles, layout == RopeLayout::Interleaved);
                    want[row..row + d].copy_from_slice(&y);
                }
            }
            for isa in Isa::available() {
                let mut y = x.clone();
                rope(&mut y, from, &cos, &sin, rotary, &positions, layout, isa).unwrap();
                // Two products and a sum of values up to 1: three roundings.
                assert!(worst(&y, &want) < 2e-7, "{layout:?} {isa} {d}");
                let mut z = vec![f32::NAN; heads * tokens * d];
                rope_into(&x, from, &mut z, to, &cos, &sin, rotary, &positions, layout, isa).unwrap();
                for t in 0..tokens {
                    for h in 0..heads {
                        let (a, b) = (t * width + 2 + h * d, (h * tokens + t) * d);
                        assert_eq!(y[a..a + d], z[b..b + d]);
                    }
                }
            }
        }
    }
}

#[test]
fn gated_activation() {
    for (rows, f) in [(1, 1), (2, 7), (3, 16), (40, 1536)] {
        let mut x = noise(rows * 2 * f, 7, 12.0);
        x[0] = -200.0;
        let want: Vec<f64> = x.chunks(2 * f).flat_map(|r| twin::swiglu(&f64s(r))).collect();
        let plain: Vec<f32> = x
            .chunks(2 * f)
            .flat_map(|r| (0..f).map(|i| r[i] / (1.0 + (-r[i]).exp()) * r[f + i]).collect::<Vec<_>>())
            .collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * f];
            swiglu(&x, f, &mut out, isa).unwrap();
            check("swiglu", &out, &plain, &want);
        }
    }
}

#[test]
fn softmax() {
    for (rows, n) in [(1, 1), (4, 3), (3, 16), (5, 77), (64, 1000)] {
        let mut x = noise(rows * n, 11, 20.0);
        if rows > 3 {
            x[n..2 * n].fill(f32::NEG_INFINITY);
            x[2 * n] = f32::NEG_INFINITY;
        }
        let want: Vec<f64> = x.chunks(n).flat_map(|r| twin::softmax(&f64s(r))).collect();
        for isa in Isa::available() {
            let mut y = x.clone();
            softmax_rows(&mut y, n, isa).unwrap();
            assert!(worst(&y, &want) < 5e-7, "{isa} {n}: {:e}", worst(&y, &want));
            assert!(y.iter().all(|y| y.is_finite()));
        }
    }
}

/// The error rule for gradients: at most three times the error of a plain f32 loop; in short rows, where that may be
/// exact by luck, four roundings of the largest value (our exponential is within 2 ULP, the plain loop's within 1).
fn check_grad(what: &str, got: &[f32], reference: &[f32], want: &[f64]) {
    let (g, r) = (worst(got, want), worst(reference, want));
    let top = want.iter().fold(0f64, |a, x| a.max(x.abs()));
    assert!(g <= (3.0 * r).max(4.0 * top * f64::from(f32::EPSILON)), "{what}: error {g:e}, reference {r:e}");
}

#[test]
fn softmax_gradients() {
    for (rows, n) in [(1, 1), (4, 3), (3, 16), (5, 77), (64, 1000)] {
        let (mut x, dy) = (noise(rows * n, 11, 5.0), noise(rows * n, 12, 1.0));
        if rows > 3 {
            x[n..2 * n].fill(f32::NEG_INFINITY);
        }
        let want: Vec<f64> =
            x.chunks(n).zip(dy.chunks(n)).flat_map(|(x, g)| twin::softmax_backward(&f64s(x), &f64s(g))).collect();
        let plain: Vec<f32> = x
            .chunks(n)
            .zip(dy.chunks(n))
            .flat_map(|(x, g)| {
                let top = x.iter().copied().fold(f32::MIN, f32::max);
                let e: Vec<f32> = x.iter().map(|x| (x - top).exp()).collect();
                let sum = e.iter().sum::<f32>().max(f32::MIN_POSITIVE);
                let s: f32 = e.iter().zip(g).map(|(e, g)| e / sum * g).sum();
                e.iter().zip(g).map(|(e, g)| e / sum * (g - s)).collect::<Vec<_>>()
            })
            .collect();
        for isa in Isa::available() {
            let (mut y, mut dx) = (x.clone(), vec![f32::NAN; rows * n]);
            softmax_rows(&mut y, n, isa).unwrap();
            softmax_rows_backward(&y, &dy, n, &mut dx, isa).unwrap();
            check_grad(&format!("{isa} softmax {rows} x {n}"), &dx, &plain, &want);
        }
    }
}

#[test]
fn norm_gradients_do_not_depend_on_threads() {
    for (rows, d) in [(1, 1), (3, 5), (2, 64), (7, 100), (200, 576)] {
        let (x, w, dy) = (noise(rows * d, 1, 3.0), noise(d, 2, 1.0), noise(rows * d, 3, 1.0));
        let (want_x, want_w) = twin::rms_norm_backward(&f64s(&x), &f64s(&w), 1e-5, &f64s(&dy));
        let (mut plain_x, mut plain_w) = (Vec::new(), vec![0f32; d]);
        for (x, g) in x.chunks(d).zip(dy.chunks(d)) {
            let f = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / d as f32 + 1e-5).sqrt();
            let s: f32 = (0..d).map(|i| x[i] * w[i] * g[i]).sum();
            plain_x.extend((0..d).map(|i| f * (w[i] * g[i] - f * f / d as f32 * x[i] * s)));
            (0..d).for_each(|i| plain_w[i] += f * x[i] * g[i]);
        }
        for isa in Isa::available() {
            let (mut dx, mut dw) = (vec![f32::NAN; rows * d], vec![f32::NAN; d]);
            let work = rms_norm_backward(&x, &w, 1e-5, &dy, &mut dx, Some(&mut dw), isa).unwrap();
            check_grad(&format!("{isa} dx {rows} x {d}"), &dx, &plain_x, &want_x);
            check_grad(&format!("{isa} dweight {rows} x {d}"), &dw, &plain_w, &want_w);
            assert_eq!(work.flops, 11 * (rows * d) as u64);
            let mut alone = vec![f32::NAN; rows * d];
            rms_norm_backward(&x, &w, 1e-5, &dy, &mut alone, None, isa).unwrap();
            assert_eq!(alone, dx);
            let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            let mut dw1 = vec![f32::NAN; d];
            one.install(|| rms_norm_backward(&x, &w, 1e-5, &dy, &mut alone, Some(&mut dw1), isa)).unwrap();
            assert_eq!((alone, dw1), (dx, dw));
        }
    }
}

#[test]
fn refusals_name_the_trouble() {
    let isa = Isa::active();
    let say = |r: foveal_kernels::Result<foveal_kernels::Work>| r.unwrap_err().to_string();
    assert!(say(rms_norm(&[0.0; 5], &[1.0; 2], 0.0, &mut [0.0; 5], isa)).contains("row width"));
    assert!(say(rms_norm(&[0.0; 4], &[1.0; 2], 0.0, &mut [0.0; 2], isa)).contains("out"));
    assert!(say(softmax_rows_backward(&[0.0; 4], &[0.0; 3], 2, &mut [0.0; 4], isa)).contains("dy"));
    let mut short = [0.0; 1];
    let grads = rms_norm_backward(&[0.0; 4], &[1.0; 2], 0.0, &[0.0; 4], &mut [0.0; 4], Some(&mut short), isa);
    assert!(say(grads).contains("dweight"));
    assert!(say(swiglu(&[0.0; 5], 2, &mut [0.0; 2], isa)).contains("row width"));
    let mut x = [0.0; 8];
    let heads = Heads::in_rows(2, 4, 0, 1, 4);
    let table = [1.0; 4];
    let mut call = |heads, rotary, positions: &[u32]| {
        say(rope(&mut x, heads, &table, &table, rotary, positions, RopeLayout::Halves, isa))
    };
    assert!(call(heads, 4, &[0, 2]).contains("position = 2"));
    assert!(call(heads, 3, &[0, 1]).contains("rotary_dim"));
    assert!(call(heads, 6, &[0, 1]).contains("rotary_dim"));
    assert!(call(heads, 4, &[0]).contains("positions"));
    assert!(call(Heads { tokens: 3, ..heads }, 4, &[0, 1, 1]).contains("needs 12"));
    assert!(call(Heads { token_stride: 2, ..heads }, 4, &[0, 1]).contains("overlap"));
    assert!(call(Heads { token_stride: usize::MAX, ..heads }, 4, &[0, 1]).contains("needs"));
}
