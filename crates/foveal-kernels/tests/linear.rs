//! Linear layers against their f64 twin, every instruction set and format.

use foveal_kernels::{Isa, PackedLinear, WeightFormat, twin};
use half::bf16;

const FORMATS: [WeightFormat; 4] = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4];

/// Deterministic values in (-1, 1).
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn worst(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}

/// The weights as the layer holds them.
fn stored(layer: &PackedLinear) -> Vec<f32> {
    let mut w = vec![0.0; layer.n() * layer.k()];
    for (i, row) in w.chunks_mut(layer.k()).enumerate() {
        layer.row(i, row).unwrap();
    }
    w
}

/// x as the byte dot products see it: 16-bit integers with a scale for each 32 inputs.
fn sixteen_bits(x: &[f32], k: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for group in x.chunks(k).flat_map(|row| row.chunks(32)) {
        let scale = group.iter().fold(0f32, |a, x| a.max(x.abs())) / 32767.0;
        out.extend(group.iter().map(|x| if scale > 0.0 { (x / scale).round() * scale } else { 0.0 }));
    }
    out
}

/// Plain f32 loop over operands rounded as the format says: the reference of equal precision.
fn same_precision(x: &[f32], w: &[f32], bias: &[f32], [m, n, k]: [usize; 3], round: fn(f32) -> f32) -> Vec<f32> {
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            let mut s = 0f32;
            for c in 0..k {
                s += round(x[i * k + c]) * round(w[j * k + c]);
            }
            out[i * n + j] = s + bias[j];
        }
    }
    out
}

#[test]
fn forward_obeys_the_error_rule() {
    let shapes = [
        [1, 16, 32],
        [1, 1, 1],
        [1, 576, 576],
        [2, 33, 65],
        [3, 17, 31],
        [4, 192, 96],
        [5, 40, 64],
        [8, 100, 577],
        [13, 48, 100],
        [16, 64, 64],
        [17, 31, 33],
        [31, 65, 128],
        [33, 96, 160],
        [130, 72, 96],
        [300, 50, 40],
    ];
    for (seed, [m, n, k]) in shapes.into_iter().enumerate() {
        let x = noise(m * k, 3 * seed as u64 + 1);
        let w = noise(n * k, 3 * seed as u64 + 2);
        let bias = noise(n, 3 * seed as u64 + 3);
        for format in FORMATS {
            let layer = PackedLinear::pack(&w, n, k, format).unwrap().with_bias(&bias).unwrap();
            let held = stored(&layer);
            let want = twin::linear(&f64s(&x), &f64s(&held), Some(&f64s(&bias)), [m, n, k]);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; m * n];
                let work = layer.forward(&x, m, &mut out, isa).unwrap();
                assert_eq!(work.flops, 2 * (m * n * k) as u64);
                // The tile unit rounds its operands to bf16.
                let rounds = isa == Isa::Amx && format != WeightFormat::F32 && m > 4;
                let round: fn(f32) -> f32 = if rounds { |x| bf16::from_f32(x).to_f32() } else { |x| x };
                let mut x_held = x.clone();
                if format.is_integer() && isa >= Isa::Avx512 && m <= 8 {
                    x_held = sixteen_bits(&x, k);
                }
                let reference = same_precision(&x_held, &held, &bias, [m, n, k], round);
                let (got, allowed) = (worst(&out, &want), worst(&reference, &want));
                assert!(
                    got <= 2.0 * allowed + 1e-7,
                    "{format} {isa} m {m} n {n} k {k}: error {got:e}, reference {allowed:e}"
                );
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_rows() {
    // Decode one by one and prefill must agree where neither rounds x to bf16.
    let (n, k) = (70, 96);
    let (x, w) = (noise(30 * k, 1), noise(n * k, 2));
    for format in FORMATS {
        let layer = PackedLinear::pack(&w, n, k, format).unwrap();
        // Six standard deviations of the 16-bit rounding of x, for integers.
        let tolerance = if format.is_integer() { 3e-4 } else { 2e-5 };
        for isa in Isa::available().into_iter().filter(|i| *i < Isa::Amx) {
            let mut all = vec![0.0; 30 * n];
            layer.forward(&x, 30, &mut all, isa).unwrap();
            let mut one = vec![0.0; n];
            for i in 0..30 {
                layer.forward(&x[i * k..(i + 1) * k], 1, &mut one, isa).unwrap();
                for (a, b) in one.iter().zip(&all[i * n..]) {
                    assert!((a - b).abs() < tolerance, "{format} {isa} row {i}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn packing_keeps_what_the_format_promises() {
    let (n, k) = (37, 75);
    let w = noise(n * k, 5);
    assert_eq!(stored(&PackedLinear::pack_f32(&w, n, k).unwrap()), w);
    let rounded: Vec<f32> = w.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    assert_eq!(stored(&PackedLinear::pack_bf16(&w, n, k).unwrap()), rounded);
    // bf16 input packs to the same.
    let short: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
    assert_eq!(stored(&PackedLinear::pack(&short, n, k, WeightFormat::Bf16).unwrap()), rounded);
    // int8: half a step, and f16 rounding of the scale, whatever the size of the weights.
    for size in [1.0, 1e-3, 1e-20, 1e20] {
        let w: Vec<f32> = w.iter().map(|x| x * size).collect();
        let held = stored(&PackedLinear::pack_int8(&w, n, k).unwrap());
        for (row, held) in w.chunks(k).zip(held.chunks(k)) {
            for (group, held) in row.chunks(32).zip(held.chunks(32)) {
                let top = group.iter().fold(0f32, |a, x| a.max(x.abs()));
                for (a, b) in group.iter().zip(held) {
                    assert!((a - b).abs() <= top * (0.5 / 127.0 + 1.0 / 1024.0), "{a} held as {b} at size {size}");
                }
            }
        }
    }
}

#[test]
fn int4_is_within_half_a_step() {
    let (n, k) = (37, 75);
    for size in [1.0, 1e-3, 1e-20, 1e20] {
        // Off centre, so that the minimum matters.
        let w: Vec<f32> = noise(n * k, 6).iter().map(|x| (x + 0.3) * size).collect();
        let held = stored(&PackedLinear::pack_int4(&w, n, k).unwrap());
        for (row, held) in w.chunks(k).zip(held.chunks(k)) {
            for (group, held) in row.chunks(32).zip(held.chunks(32)) {
                let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
                // The sum of squares is no more than that of half steps of the range, and what f16 rounds off.
                let step = (high - low) / 15.0 * 0.5 + (high.abs() + low.abs()) / 1024.0;
                let error: f32 = group.iter().zip(held).map(|(a, b)| ((a - b) / size).powi(2)).sum();
                assert!(error <= group.len() as f32 * (step / size).powi(2), "{error:e} at size {size}");
            }
        }
    }
}

#[test]
fn int4_keeps_q4_weights_exactly() {
    // Q4_1: minimum + scale · q; both ends of q occur. Q4_0: scale · (q − 8), 0 occurs, 15 need not.
    let f16 = |x: f32| half::f16::from_f32(x).to_f32();
    let (mut affine, mut around) = (Vec::new(), Vec::new());
    for (g, x) in noise(64 * 32, 10).chunks(32).enumerate() {
        let (scale, minimum) = (f16(0.003 * (g + 1) as f32), f16(-0.02 * (g + 3) as f32));
        for (i, x) in x.iter().enumerate() {
            let q = match i {
                3 => 0.0,
                9 => 15.0,
                _ => ((x + 1.0) * 7.5).round(),
            };
            affine.push(q * scale + minimum);
            // Scales of both signs occur in files.
            let scale = if g % 2 == 0 { scale } else { -scale };
            around.push((if i == 3 { 0.0 } else { (1.0 + (x + 1.0) * 6.0).round() } - 8.0) * scale);
        }
    }
    for w in [affine, around] {
        assert_eq!(stored(&PackedLinear::pack_int4(&w, 64, 32).unwrap()), w);
    }
}

#[test]
fn inputs_that_are_not_finite_reach_the_output() {
    for (isa, format) in Isa::available().into_iter().flat_map(|i| [(i, WeightFormat::Int8), (i, WeightFormat::Int4)]) {
        let layer = PackedLinear::pack(&noise(64 * 64, 4), 64, 64, format).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            for m in [1, 9] {
                let mut x = vec![1.0; m * 64];
                x[3] = bad;
                let mut out = vec![0.0; m * 64];
                layer.forward(&x, m, &mut out, isa).unwrap();
                assert!(out[..64].iter().any(|y| !y.is_finite()), "{isa} {m} {bad}");
                assert!(out[64..].iter().all(|y| y.is_finite()));
            }
        }
        // Zeros and numbers too small for an inverse stay zero.
        let mut out = vec![f32::NAN; 64];
        layer.forward(&[1e-44; 64], 1, &mut out, isa).unwrap();
        assert!(out.iter().all(|y| y.abs() < 1e-40), "{isa}");
    }
}

#[test]
fn int8_keeps_q8_0_weights_exactly() {
    // A Q8_0 group is an f16 scale times int8 of which the largest is 127 in magnitude.
    let mut w = Vec::new();
    for (g, q) in noise(64 * 32, 9).chunks(32).enumerate() {
        let scale = half::f16::from_f32(0.001 * (g + 1) as f32).to_f32();
        w.extend(
            q.iter().enumerate().map(|(i, q)| if i == g % 32 { 127.0 * scale } else { (q * 127.0).round() * scale }),
        );
    }
    assert_eq!(stored(&PackedLinear::pack_int8(&w, 64, 32).unwrap()), w);
}

#[test]
fn bytes_are_those_of_the_format() {
    let w = vec![0.5; 64 * 96];
    let size = |f| PackedLinear::pack(&w, 64, 96, f).unwrap().bytes() - 64 * 4;
    assert_eq!(size(WeightFormat::F32), 64 * 96 * 4);
    assert_eq!(size(WeightFormat::Bf16), 64 * 96 * 2);
    assert_eq!(size(WeightFormat::Int8), 64 * 96 * 34 / 32);
    assert_eq!(size(WeightFormat::Int4), 64 * 96 * 20 / 32);
}

#[test]
fn empty_and_ill_fitting_calls() {
    let layer = PackedLinear::pack_bf16(&[1.0; 6], 2, 3).unwrap();
    assert!(layer.forward(&[], 0, &mut [], Isa::active()).is_ok());
    let e = layer.forward(&[0.0; 5], 2, &mut [0.0; 4], Isa::active()).unwrap_err();
    assert!(e.to_string().contains("m*k"), "{e}");
    let e = layer.forward(&[0.0; 6], 2, &mut [0.0; 3], Isa::active()).unwrap_err();
    assert!(e.to_string().contains("m*n"), "{e}");
    assert!(PackedLinear::pack_f32(&[1.0; 5], 2, 3).is_err());
    assert!(PackedLinear::pack_int8(&[f32::NAN, 1.0], 1, 2).is_err());
    assert!(PackedLinear::pack_int8(&[f32::INFINITY, f32::NAN], 1, 2).is_err());
    assert!(PackedLinear::pack_int4(&[f32::INFINITY, f32::NAN], 1, 2).is_err());
    assert!(layer.row(2, &mut [0.0; 3]).is_err());
    assert!(layer.with_bias(&[1.0]).is_err());
    // No inputs: the bias alone.
    let layer = PackedLinear::pack_int8(&[], 2, 0).unwrap().with_bias(&[1.0, 2.0]).unwrap();
    for isa in Isa::available() {
        let mut out = vec![f32::NAN; 12];
        layer.forward(&[], 6, &mut out, isa).unwrap();
        assert_eq!(out, [1.0, 2.0].repeat(6));
    }
}
