//! Selection on key-major tiles of scores against sorting, every instruction set.

use foveal_kernels::Isa;
use foveal_kernels::rank::{WIDTH, add_softmax, top_marks};
use std::ops::Range;

/// Deterministic values, about normal.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut one = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (0..6).map(|_| one()).sum::<f32>() - 3.0).collect()
}

/// The `keep` largest of a column within its span, earlier keys first among equals.
fn best(scores: &[f32], column: usize, span: Range<usize>, keep: usize) -> Vec<usize> {
    let mut keys: Vec<usize> = span.filter(|j| scores[j * WIDTH + column] > f32::NEG_INFINITY).collect();
    // Zeros of either sign are equal.
    keys.sort_by(|&a, &b| scores[b * WIDTH + column].partial_cmp(&scores[a * WIDTH + column]).unwrap());
    keys.truncate(keep);
    keys.sort_unstable();
    keys
}

#[test]
fn marks_are_the_largest_scores() {
    for (keys, queries) in [(1usize, 1usize), (3, 2), (70, 17), (501, 64), (3001, 5), (5000, 33)] {
        for kind in 0..7 {
            let mut scores = noise(keys * WIDTH, keys as u64 + kind);
            for (i, x) in scores.iter_mut().enumerate() {
                *x = match kind {
                    0 => *x,
                    1 => (*x * 2.0).round(),
                    2 => 1.25,
                    3 if i % 5 == 0 => f32::NAN,
                    4 if i % 7 == 0 => f32::NEG_INFINITY,
                    // A heavy tail, of both signs.
                    5 => x.powi(9) * 1e30,
                    // Nothing like its sample: two levels, then noise.
                    6 => *x + if i / WIDTH < keys / 2 { 50.0 } else { 0.0 },
                    _ => *x,
                };
            }
            let spans: Vec<Range<usize>> =
                (0..queries).map(|i| i.min(keys) / 3..keys - (queries - 1 - i).min(keys / 2)).collect();
            let keep: Vec<usize> =
                (0..queries).map(|i| [0, 1, keys / 10, keys / 4, keys / 2, keys, keys + 9][i % 7]).collect();
            for isa in Isa::available() {
                let mut marks = vec![u64::MAX; keys];
                top_marks(&mut scores.clone(), &spans, &keep, &mut marks, isa).unwrap();
                for i in 0..queries {
                    let got: Vec<usize> = (0..keys).filter(|&j| marks[j] >> i & 1 == 1).collect();
                    let want = best(&scores, i, spans[i].clone(), keep[i]);
                    assert_eq!(got, want, "{isa}, {keys} keys, query {i}, keep {}, kind {kind}", keep[i]);
                }
                if queries < WIDTH {
                    assert!(marks.iter().all(|m| m >> queries == 0), "{isa}: marks past the queries");
                }
            }
        }
    }
}

#[test]
fn softmaxes_add_up() {
    let (keys, queries) = (333, 21);
    let scores = noise(keys * WIDTH, 3);
    let mut spans: Vec<Range<usize>> = (0..queries).map(|i| i..keys - i).collect();
    spans[4] = 9..9;
    for isa in Isa::available() {
        let mut sums = vec![0.25f32; keys * WIDTH];
        add_softmax(&mut scores.clone(), &spans, 1.5, &mut sums, isa).unwrap();
        for (i, span) in spans.iter().enumerate() {
            let e: Vec<f64> = span.clone().map(|j| (1.5 * f64::from(scores[j * WIDTH + i])).exp()).collect();
            let total: f64 = e.iter().sum();
            for j in 0..keys {
                let want = if span.contains(&j) { e[j - span.start] / total } else { 0.0 } + 0.25;
                let got = f64::from(sums[j * WIDTH + i]);
                assert!((got - want).abs() < 1e-7, "{isa}, key {j}, query {i}: {got} for {want}");
            }
        }
    }
}

// One query's span is a slice of one range.
#[allow(clippy::single_range_in_vec_init)]
#[test]
fn wrong_sizes_are_refused() {
    let isa = Isa::active();
    let mut x = vec![0f32; 3 * WIDTH];
    assert!(top_marks(&mut x, &[0..3], &[1], &mut [0; 2], isa).is_err());
    assert!(top_marks(&mut x, &[0..4], &[1], &mut [0; 3], isa).is_err());
    assert!(top_marks(&mut x, &[0..3], &[1, 2], &mut [0; 3], isa).is_err());
    assert!(top_marks(&mut x, &vec![0..3; 65], &[1; 65], &mut [0; 3], isa).is_err());
    assert!(add_softmax(&mut x, &[0..3], 1.0, &mut [0.0; 64], isa).is_err());
}
