//! Products and reductions of estimators against plain loops.

use foveal_kernels::Isa;
use foveal_kernels::scores::{
    Bf16Columns, Bf16Rows, column_affine_max, column_exp, column_max, group_max, product, row_dots,
};
use half::bf16;

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

#[test]
fn products_are_those_of_the_rounded_rows() {
    for (m, n, pieces, width) in
        [(1, 1, 1, 64), (33, 32, 1, 64), (100, 37, 1, 64), (47, 16, 8, 64), (16, 65, 3, 20), (5, 3, 1, 7)]
    {
        let Some(mut left) = Bf16Rows::new(m, pieces, width, Isa::active()) else { return };
        let mut right = Bf16Rows::new(n, pieces, width, Isa::active()).expect("as the left rows");
        let k = pieces * width;
        let (a, b) = (noise(m * k, 1), noise(n * k, 2));
        let fill = |to: &mut Bf16Rows, x: &[f32], factor: f32| {
            for (i, x) in x.chunks_exact(width).enumerate() {
                to.set(i / pieces, i % pieces, x, factor);
            }
        };
        fill(&mut left, &a, 1.0);
        fill(&mut right, &b, 0.3);
        let mut columns = Bf16Columns::default();
        columns.pack(&right, 0..n);
        let w = columns.width();
        assert_eq!(w, n.next_multiple_of(32));
        // Any range of rows, and rows copied elsewhere.
        let first = m / 3;
        let mut out = vec![f32::NAN; (m - first).next_multiple_of(16) * w];
        product(&left, first..m, &columns, &mut out);
        let mut moved = Bf16Rows::new(m + 3, pieces, width, Isa::active()).expect("as the left rows");
        moved.copy(3, &left, first..m);
        let mut again = vec![f32::NAN; out.len()];
        product(&moved, 3..3 + m - first, &columns, &mut again);
        let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
        for i in 0..m - first {
            for j in 0..w {
                let want: f64 = if j < n {
                    (0..k).map(|c| round(a[(first + i) * k + c]) * round(0.3 * b[j * k + c])).sum()
                } else {
                    0.0
                };
                let got = out[i * w + j];
                assert!(
                    (f64::from(got) - want).abs() < 1e-6 * k as f64,
                    "({m}, {n}, {k}) [{i}, {j}]: {got} for {want}"
                );
                assert_eq!(got, again[i * w + j]);
            }
        }
    }
}

#[test]
fn pieces_may_be_set_again_and_shorter() {
    let Some(mut rows) = Bf16Rows::new(1, 2, 40, Isa::active()) else { return };
    let ones = [1f32; 40];
    rows.set(0, 0, &ones, 1.0);
    rows.set(0, 1, &ones, 1.0);
    rows.set(0, 1, &ones[..3], 2.0);
    let mut columns = Bf16Columns::default();
    columns.pack(&rows, 0..1);
    let mut out = [0f32; 16 * 32];
    product(&rows, 0..1, &columns, &mut out);
    assert_eq!(out[0], 40.0 + 3.0 * 4.0);
}

#[test]
fn reductions_equal_plain_loops_on_every_isa() {
    for isa in Isa::available() {
        for (rows, w) in [(0, 16), (1, 16), (3, 32), (9, 64), (18, 160)] {
            let mut x = noise(rows * w, 3);
            if rows > 2 {
                x[w + 5] = f32::NEG_INFINITY;
            }
            let mut top = vec![-0.9f32; w];
            column_max(&x, &mut top, isa);
            for i in 0..w {
                let want = (0..rows).map(|j| x[j * w + i]).fold(-0.9, f32::max);
                assert_eq!(top[i], want, "{isa} {rows} x {w}");
            }
            let add = noise(rows, 4);
            let mut best = vec![-0.9f32; w];
            column_affine_max(&x, 0.7, &add, &mut best, isa);
            for i in 0..w {
                let want = (0..rows).map(|j| 0.7 * x[j * w + i] + add[j]).fold(-0.9, f32::max);
                assert!((best[i] - want).abs() < 1e-6, "{isa} {rows} x {w}");
            }
            let (mut e, mut sum) = (x.clone(), vec![0.5f32; w]);
            column_exp(&mut e, &top, &mut sum, isa);
            for i in 0..w {
                let mut total = 0.5f64;
                for j in 0..rows {
                    let want = f64::from(x[j * w + i] - top[i]).exp();
                    assert!((f64::from(e[j * w + i]) - want).abs() < 3e-7, "{isa} {rows} x {w}");
                    total += want;
                }
                assert!((f64::from(sum[i]) - total).abs() < 1e-5, "{isa} {rows} x {w}");
            }
            for group in [1, 2, 3] {
                let mut best = vec![0f32; rows / group];
                group_max(&x, w, group, &mut best, isa);
                for (g, b) in best.iter().enumerate() {
                    let part = &x[g * group * w..(g + 1) * group * w];
                    assert_eq!(*b, part.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{isa} group {group}");
                }
            }
        }
    }
}

#[test]
fn row_dots_equal_plain_sums_on_every_isa() {
    for isa in Isa::available() {
        for (rows, width, [left, right]) in [(0, 4, [4, 4]), (1, 7, [7, 9]), (5, 64, [64, 80]), (3, 21, [40, 21])] {
            let (a, b) = (noise(rows * left, 5), noise(rows * right, 6));
            let mut out = vec![0f32; rows];
            row_dots(&a, &b, [left, right], width, &mut out, isa);
            for (i, o) in out.iter().enumerate() {
                let want: f64 = (0..width).map(|c| f64::from(a[i * left + c]) * f64::from(b[i * right + c])).sum();
                assert!((f64::from(*o) - want).abs() < 1e-5, "{isa} row {i}: {o} for {want}");
            }
        }
    }
}
