//! Why bf16 training with a flash kernel may fail, and the reference that mends it (Qiu and Yao 2025, arXiv
//! 2510.04212): where a row's maximum is repeated, weights of exactly 1 add values of one sign whose sum, rounded to
//! bf16, errs to one side.

use foveal_kernels::{Attend, Isa, View, ViewMut, twin};
use half::bf16;

const KEYS: usize = 64;
const D: usize = 16;
const ROWS: usize = 256;

fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut s = seed;
    move || {
        s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (s >> 40) as f32 / (1 << 24) as f32
    }
}

fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// q, k, v of one row: two keys that are the same and that the query looks for, others that it hardly sees, values of
/// one sign; `sign` of the maximum.
fn problem(row: u64, sign: f32) -> [Vec<f32>; 3] {
    let mut r = noise(row * 77 + 1);
    let q: Vec<f32> = (0..D).map(|_| round(0.5 + r())).collect();
    let key = |x: f32| q.iter().map(|q| round(q * x)).collect::<Vec<f32>>();
    let length: f32 = q.iter().map(|x| x * x).sum();
    // Scores are four times these: the others weigh e^−12 and less, which is lost in bf16 but not in a sum before that.
    let top = sign * (2.0 + r());
    let k = (0..KEYS)
        .flat_map(|j| key(if [5, 40].contains(&j) { top } else { top - 3.0 - 0.25 * r() } * D as f32 / length / 4.0))
        .collect();
    let v = (0..KEYS * D).map(|_| round(-1.0 - r())).collect();
    [q, k, v]
}

fn scores(q: &[f32], k: &[f32]) -> Vec<f32> {
    k.chunks(D).map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum()).collect()
}

fn exact(s: &[f32], v: &[f32]) -> Vec<f64> {
    let m = s.iter().fold(f32::NEG_INFINITY, |a, x| a.max(*x));
    let p: Vec<f64> = s.iter().map(|x| f64::from(x - m).exp()).collect();
    let l: f64 = p.iter().sum();
    (0..D).map(|c| p.iter().zip(v.chunks(D)).map(|(p, v)| p * f64::from(v[c])).sum::<f64>() / l).collect()
}

/// Mean error of all outputs, and how many standard errors it is away from none.
fn drift(of: impl Fn(&[Vec<f32>; 3]) -> Vec<f32>, sign: f32) -> (f64, f64) {
    let errors: Vec<f64> = (0..ROWS as u64)
        .flat_map(|row| {
            let x = problem(row, sign);
            let want = exact(&scores(&x[0], &x[1]), &x[2]);
            of(&x).into_iter().zip(want).map(|(a, b)| f64::from(a) - b).collect::<Vec<_>>()
        })
        .collect();
    let n = errors.len() as f64;
    let mean = errors.iter().sum::<f64>() / n;
    let var = errors.iter().map(|e| (e - mean) * (e - mean)).sum::<f64>() / n;
    (mean, mean / (var / n).sqrt())
}

#[test]
fn sums_in_bf16_drift_and_the_moved_reference_mends_it() {
    for sign in [1.0, -1.0] {
        let row = |beta| move |[q, k, v]: &[Vec<f32>; 3]| twin::attend_row_in_bf16(&scores(q, k), v, D, KEYS, beta);
        let (plain, away) = drift(row(None), sign);
        assert!(plain < -5e-4 && away < -15.0, "no drift: {plain:e}, {away} standard errors");
        let (mended, _) = drift(row(Some(2.0)), sign);
        assert!(mended.abs() < plain.abs() / 5.0, "{mended:e} with, {plain:e} without");
    }
}

/// Sums here are f32: no drift, with the option or without; and the option changes nothing but roundings.
#[test]
fn the_kernel_has_no_drift() {
    for sign in [1.0, -1.0] {
        let (plain, _) = drift(|x| twin::attend_row_in_bf16(&scores(&x[0], &x[1]), &x[2], D, KEYS, None), sign);
        for isa in Isa::available() {
            for beta in [None, Some(2.0), Some(8.0)] {
                let (mean, _) = drift(
                    |x| {
                        // As many queries as tiles want.
                        const N: usize = 16;
                        let [q, k, v] = [x[0].repeat(N), x[1].clone(), x[2].clone()]
                            .map(|x| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
                        let view = |x, n| View::contiguous("x", x, [1, 1, n, D]).unwrap();
                        let mut out = vec![0f32; N * D];
                        let mut p = Attend::new(1.0).isa(isa);
                        p.repeated_max = beta;
                        let mut o = ViewMut::contiguous("out", &mut out, [1, 1, N, D]).unwrap();
                        p.run(&view(&q, N), &view(&k, KEYS), &view(&v, KEYS), &mut o, None).unwrap();
                        out.truncate(D);
                        out
                    },
                    sign,
                );
                assert!(mean.abs() < plain.abs() / 5.0, "{isa} {beta:?}: {mean:e}; in bf16 {plain:e}");
            }
        }
    }
}

#[test]
fn far_references_leave_weights() {
    // Maxima of ±3000, repeated: twice that would leave nothing.
    let mut r = noise(3);
    for sign in [1.0, -1.0] {
        let q = vec![bf16::from_f32(10.0); 32 * D];
        let k: Vec<bf16> = (0..KEYS * D)
            .map(|i| bf16::from_f32(if (i / D).is_multiple_of(9) { 18.75 } else { 18.0 } * sign))
            .collect();
        let v: Vec<f32> = (0..KEYS * D).map(|_| round(r() - 0.5)).collect();
        let narrow: Vec<bf16> = v.iter().map(|&x| bf16::from_f32(x)).collect();
        let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let want = exact(&scores(&wide(&q)[..D], &wide(&k)), &v);
        for isa in Isa::available() {
            let mut p = Attend::new(1.0).isa(isa);
            p.repeated_max = Some(2.0);
            let mut out = vec![f32::NAN; 32 * D];
            let view = |x, n| View::contiguous("x", x, [1, 1, n, D]).unwrap();
            let mut o = ViewMut::contiguous("out", &mut out, [1, 1, 32, D]).unwrap();
            p.run(&view(&q, 32), &view(&k, KEYS), &view(&narrow, KEYS), &mut o, None).unwrap();
            for (a, b) in out.chunks(D).flat_map(|row| row.iter().zip(&want)) {
                assert!((f64::from(*a) - b).abs() < 4e-3, "{isa}: {a}, {b}");
            }
        }
        let mut p = Attend::new(1.0);
        p.repeated_max = Some(1.0);
        let view = View::contiguous("x", &q, [1, 1, 32, D]).unwrap();
        let mut o = vec![0f32; 32 * D];
        let mut o = ViewMut::contiguous("out", &mut o, [1, 1, 32, D]).unwrap();
        assert!(p.run(&view, &view, &view, &mut o, None).unwrap_err().to_string().contains("repeated_max"));
    }
}
