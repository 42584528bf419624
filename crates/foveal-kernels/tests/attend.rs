//! The tiled kernel against the f64 twin, under every instruction set of the machine.
//!
//! Error rule: max|out − ref64| ≤ 2 · max|simple f32 − ref64|, with a floor for cases in which
//! the simple version happens to be (nearly) exact.

#[path = "common/problem.rs"]
mod problem;

use foveal_kernels::{
    Attend, Band, Bias, BlockTable, CuSeqlens, Element, HeadKeys, HeadTable, Isa, KeyLists, View, ViewMut, Work,
};
use foveal_kernels::{attend_indexed, merge_row, twin};
use half::bf16;
use problem::*;
use proptest::prelude::*;

/// Two-pass attention in f32, in the plainest order. `narrow` rounds the probabilities to bf16 before
/// the second product, as a model in bf16 does that computes them whole.
fn simple<T: Element>(
    s: Shape,
    x: &Data<T>,
    p: &Attend,
    narrow: bool,
    visible: &dyn Fn(usize, usize, usize, usize) -> bool,
) -> Vec<f32> {
    let mut out = vec![0f32; s.b * s.h * s.tq * s.dv];
    let round = |w: f32| if narrow { bf16::from_f32(w).to_f32() } else { w };
    for b in 0..s.b {
        for h in 0..s.h {
            let kv = b * s.hkv + h / (s.h / s.hkv);
            for i in 0..s.tq {
                let r = (b * s.h + h) * s.tq + i;
                let mut scores = Vec::new();
                for j in (0..s.tk).filter(|&j| visible(b, h, i, j)) {
                    let mut a = 0f32;
                    for c in 0..s.d {
                        a += x.q[r * s.d + c].to_f32() * x.k[(kv * s.tk + j) * s.d + c].to_f32();
                    }
                    a *= p.scale;
                    let a = p.softcap.map_or(a, |c| c * (a / c).tanh());
                    scores.push((j, a + bias_of(s, p, b, h, i, j)));
                }
                let sink = p.sinks.map(|s| s[h]);
                let m = scores.iter().map(|x| x.1).chain(sink).fold(f32::NEG_INFINITY, f32::max);
                if m == f32::NEG_INFINITY {
                    continue;
                }
                let l: f32 = scores.iter().map(|x| (x.1 - m).exp()).sum();
                let l = l + sink.map_or(0.0, |x| (x - m).exp());
                for (j, a) in scores {
                    let w = round((a - m).exp() / l);
                    for c in 0..s.dv {
                        out[r * s.dv + c] += w * x.v[(kv * s.tk + j) * s.dv + c].to_f32();
                    }
                }
            }
        }
    }
    out
}

fn call<T: Element>(s: Shape, x: &Data<T>, p: &Attend, lists: Option<&KeyLists>) -> (Vec<f32>, Vec<f32>, Work) {
    let [q, k, v] = views(s, x);
    // Poisoned, so that a row left unwritten shows.
    let mut out = vec![f32::NAN; s.b * s.h * s.tq * s.dv];
    let mut lse = vec![f32::NAN; s.b * s.h * s.tq];
    let mut o = ViewMut::contiguous("out", &mut out, [s.b, s.h, s.tq, s.dv]).unwrap();
    let work = match lists {
        None => p.run(&q, &k, &v, &mut o, Some(&mut lse)),
        Some(l) => attend_indexed(p, l, &q, &k, &v, &mut o, Some(&mut lse)),
    }
    .unwrap();
    (out, lse, work)
}

fn check_as<T: Element>(
    s: Shape,
    p: &Attend,
    lists: Option<&KeyLists>,
    visible: &dyn Fn(usize, usize, usize, usize) -> bool,
) {
    let x = data::<T>(s);
    let visible = |b: usize, h: usize, i: usize, j: usize| allowed(s, p, i, j) && visible(b, h, i, j);
    let sinks: Option<Vec<f64>> = p.sinks.map(f64s);
    let (want, want_lse) = twin::attend_biased(
        &f64s(&x.q),
        &f64s(&x.k),
        &f64s(&x.v),
        [s.b, s.h, s.tq, s.d],
        [s.hkv, s.tk, s.dv],
        f64::from(p.scale),
        p.softcap.map(f64::from),
        sinks.as_deref(),
        &|b, h, i, j| bias64_of(s, p, b, h, i, j),
        &visible,
    );
    let top = want_lse.iter().filter(|x| x.is_finite()).fold(1f64, |m, x| m.max(x.abs()));
    let bound = |narrow| {
        let plain = simple(s, &x, p, narrow, &visible);
        // Weights are off by a factor of at most 1 ± 2⁻⁸ (half a step of bf16), so is their sum.
        let lse = top * 2e-6 + if narrow { 1.0 / 256.0 + 1e-4 } else { 0.0 };
        (2.0 * worst(plain.iter().map(|&x| f64::from(x)), &want) + 3e-7, lse)
    };
    let (wide, narrow) = (bound(false), bound(true));
    let mut work = None;
    for isa in Isa::available() {
        let (out, lse, w) = call(s, &x, &p.clone().isa(isa), lists);
        let err = worst(out.iter().map(|&x| f64::from(x)), &want);
        let (bound, lse_bound) = if T::NAME == "bf16" && isa == Isa::Amx { narrow } else { wide };
        assert!(err <= bound, "{isa} {} {s:?}: error {err:e} over {bound:e}", T::NAME);
        let err = worst(lse.iter().map(|&x| f64::from(x)), &want_lse);
        assert!(err <= lse_bound, "{isa} {} {s:?}: lse error {err:e} over {lse_bound:e}", T::NAME);
        for (r, l) in want_lse.iter().enumerate().filter(|x| *x.1 == f64::NEG_INFINITY) {
            assert_eq!(lse[r], f32::NEG_INFINITY, "row {r} of lse {l}");
            assert!(out[r * s.dv..(r + 1) * s.dv].iter().all(|&x| x == 0.0), "row {r}");
        }
        // What fell to a slower path is the machine's affair; the rest is not.
        let w = Work { fallback: 0, ..w };
        assert_eq!(*work.get_or_insert(w), w, "{isa}: work differs");
    }
}

fn check(s: Shape, p: &Attend, lists: Option<&KeyLists>, visible: &dyn Fn(usize, usize, usize, usize) -> bool) {
    check_as::<f32>(s, p, lists, visible);
    check_as::<bf16>(s, p, lists, visible);
}

#[test]
fn head_widths() {
    for (d, dv) in WIDTHS {
        let s = Shape { d, dv, tq: 37, tk: 101, ..BASE };
        check(s, &scaled(s).causal(true), None, &all);
        check(s, &scaled(s), None, &all);
    }
}

#[test]
fn lengths() {
    for (tq, tk) in
        [(1, 1), (1, 300), (3, 2), (16, 16), (17, 31), (64, 64), (65, 97), (128, 128), (200, 90), (90, 200), (300, 300)]
    {
        for causal in [false, true] {
            let s = Shape { tq, tk, d: 20, dv: 12, ..BASE };
            check(s, &scaled(s).causal(causal), None, &all);
        }
    }
}

#[test]
fn batches_and_groups() {
    for (b, h, hkv) in [(0, 2, 1), (2, 6, 2), (3, 4, 4), (1, 7, 1)] {
        let s = Shape { b, h, hkv, tq: 33, tk: 70, d: 16, dv: 24, ..BASE };
        check(s, &scaled(s).causal(true), None, &all);
    }
}

#[test]
fn no_keys_no_queries() {
    for (tq, tk) in [(5, 0), (0, 5), (0, 0)] {
        let s = Shape { tq, tk, ..BASE };
        check(s, &scaled(s), None, &all);
        check(s, &scaled(s).causal(true), None, &all);
    }
}

#[test]
fn windows() {
    for (tq, tk) in [(150, 150), (70, 260), (130, 60)] {
        for w in [1, 2, 17, 64, 100, 1000] {
            let s = Shape { tq, tk, d: 24, dv: 16, ..BASE };
            check(s, &scaled(s).causal(true).window(Some(w)), None, &all);
        }
    }
}

#[test]
fn bands() {
    for (tq, tk) in [(150, 150), (70, 260), (130, 60), (3, 90), (260, 70)] {
        for (left, right) in [(1, 0), (0, 5), (0, 0), (17, 3), (1, 64), (64, usize::MAX), (usize::MAX, 20), (90, 90)] {
            let s = Shape { tq, tk, d: 24, dv: 16, ..BASE };
            check(s, &scaled(s).band(Some(Band { left, right })), None, &all);
        }
    }
    // Causality takes the right part away, and what a window says is then the same.
    let s = Shape { tq: 100, tk: 130, ..BASE };
    let x = data::<f32>(s);
    let band = Some(Band { left: 30, right: 9 });
    let [a, b, c] =
        [scaled(s).causal(true).band(band), scaled(s).window(Some(30)), scaled(s).causal(true).window(Some(30))]
            .map(|p| call(s, &x, &p, None));
    assert!(a == b && b == c);
}

/// A band costs what it holds, however long the sequence.
#[test]
fn work_of_a_band_is_linear() {
    let pairs = |t: usize, band| {
        let s = Shape { h: 1, tq: t, tk: t, d: 4, dv: 4, ..BASE };
        call(s, &data::<f32>(s), &scaled(s).band(Some(band)), None).2.pairs
    };
    let band = Band { left: 33, right: 32 };
    let (a, b, c) = (pairs(1024, band), pairs(2048, band), pairs(3072, band));
    assert_eq!(c - b, b - a);
    assert_eq!(b - a, 1024 * (64 + 64), "a work tile of 64 queries sees 64 more keys than one query");
}

#[test]
fn extreme_logits() {
    // Scores of about ±1e4: sums must neither overflow nor lose the winner.
    for std in [30.0, 100.0] {
        let s = Shape { std, d: 64, tq: 40, tk: 200, ..BASE };
        check(s, &scaled(s), None, &all);
        check(s, &scaled(s).causal(true), None, &all);
    }
}

/// Rows of several tiles of keys, whose references settle after the first: scores that stay within
/// what bf16 weights can hold, scores that do not, and a late key that beats all before it.
#[test]
fn long_rows() {
    for (std, d) in [(1.0, 64), (3.0, 64), (12.0, 64), (1.0, 40), (2.0, 128)] {
        let s = Shape { std, d, dv: d, h: 1, tq: 140, tk: 1100, ..BASE };
        check(s, &scaled(s), None, &all);
        check(s, &scaled(s).causal(true), None, &all);
        check(s, &scaled(s).causal(true).window(Some(700)), None, &all);
    }
    let s = Shape { h: 1, d: 64, dv: 64, tq: 140, tk: 1100, ..BASE };
    for factor in [8.0, 20.0, 200.0] {
        let mut x = data::<bf16>(s);
        // The late key points along query 0, `factor` times as long as others are.
        for c in 0..s.d {
            x.k[900 * s.d + c] = bf16::from_f32(x.q[c].to_f32() * factor);
        }
        let visible = |_: usize, _: usize, _: usize, _: usize| true;
        let (want, _) = twin::attend_biased(
            &f64s(&x.q),
            &f64s(&x.k),
            &f64s(&x.v),
            [s.b, s.h, s.tq, s.d],
            [s.hkv, s.tk, s.dv],
            f64::from(scaled(s).scale),
            None,
            None,
            &|_, _, _, _| 0.0,
            &visible,
        );
        let plain = simple(s, &x, &scaled(s), true, &visible);
        let bound = 2.0 * worst(plain.iter().map(|&x| f64::from(x)), &want) + 3e-7;
        for isa in Isa::available() {
            let (out, ..) = call(s, &x, &scaled(s).isa(isa), None);
            let err = worst(out.iter().map(|&x| f64::from(x)), &want);
            assert!(err <= bound, "{isa} factor {factor}: error {err:e} over {bound:e}");
        }
    }
}

#[test]
fn biases() {
    let slopes = [0.5f32, 0.03];
    for tq in [2, 70, 200] {
        let s = Shape { tq, ..BASE };
        for p in [scaled(s), scaled(s).causal(true), Attend::new(-0.2), Attend::new(0.0)] {
            check(s, &p.clone().bias(Some(Bias::Alibi(&slopes))), None, &all);
            // One bias for both heads, with some keys masked by it and one row wholly.
            let mut r = Rng(9);
            let mut x: Vec<f32> = (0..tq * s.tk).map(|_| r.normal() * 2.0).collect();
            x.iter_mut().step_by(7).for_each(|x| *x = f32::NEG_INFINITY);
            x[s.tk..2 * s.tk].fill(f32::NEG_INFINITY);
            let view = View::new("bias", &x, [1, 2, tq, s.tk], [0, 0, s.tk]).unwrap();
            let mut p = p.bias(Some(Bias::Dense(view)));
            check(s, &p, None, &all);
            p.softcap = Some(3.0);
            check(s, &p, None, &all);
        }
    }
}

#[test]
fn biases_of_keys_distances_and_factors() {
    for (tq, tk, b, group, rank) in [(2, 130, 1, 2, 3), (40, 70, 2, 2, 8), (150, 60, 1, 1, 17), (30, 300, 1, 3, 1)] {
        let s = Shape { b, h: 2 * group, hkv: 2, tq, tk, d: 12, dv: 8, ..BASE };
        // Distances clipped on both sides, and none clipped.
        for (n, left, others) in [(40, 30, true), (1, 0, false), (tq + tk, tq.max(tk), false)] {
            let x = Biases::of(s, n, rank);
            for bias in x.all(s, left).into_iter().filter(|b| others || matches!(b, Bias::Relative { .. })) {
                let p = scaled(s).causal(true).bias(Some(bias));
                check(s, &p, None, &all);
                let mut p = Attend::new(0.3).band(Some(Band { left: 50, right: 30 })).bias(Some(bias));
                p.softcap = Some(3.0);
                check(s, &p, None, &all);
            }
        }
    }
    // Keys here and there.
    let s = Shape { tq: 70, tk: 390, d: 8, dv: 8, ..BASE };
    let x = Biases::of(s, 50, 5);
    let mut r = Rng(3);
    let (l, t) = (random_lists(s, &mut r, 32, 60), random_table(s, &mut r, 16, 24, 0.3, true));
    for bias in x.all(s, 25) {
        let p = scaled(s).bias(Some(bias));
        check(s, &p, Some(&l), &|b, h, i, j| in_lists(s, &l, b, h, i, j));
        check(s, &p.table(Some(&t)), None, &|b, h, i, j| in_table(s, &t, b, h, i, j));
    }
}

/// Factors are what q and k would be with the factors appended.
#[test]
fn factors_are_channels_more() {
    let s = Shape { tq: 70, tk: 130, h: 2, hkv: 2, d: 20, ..BASE };
    let (x, f, r) = (data::<f32>(s), Biases::of(s, 1, 4), 4);
    let append = |x: &[f32], f: &[f32], factor: f32| -> Vec<f32> {
        x.chunks(s.d)
            .zip(f.chunks(r))
            .flat_map(|(x, f)| x.iter().copied().chain(f.iter().map(move |f| f * factor)))
            .collect()
    };
    let scale = scaled(s).scale;
    let wide =
        Data { q: append(&x.q, &f.factors[0], 1.0 / scale), k: append(&x.k, &f.factors[1], 1.0), v: x.v.clone() };
    for isa in Isa::available() {
        let p = Attend::new(scale).causal(true).isa(isa);
        let (want, want_lse, _) = call(Shape { d: s.d + r, ..s }, &wide, &p, None);
        let (got, lse, work) = call(s, &x, &p.bias(Some(f.all(s, 0)[3])), None);
        let near = |a: &[f32], b: &[f32]| worst(a.iter().map(|&x| f64::from(x)), &f64s(b)) < 3e-6;
        assert!(near(&got, &want) && near(&lse, &want_lse), "{isa}");
        assert_eq!(work.flops, 2 * work.pairs * (s.d + r + s.dv) as u64);
    }
}

const RAGGED: [[&[usize]; 2]; 3] =
    [[&[70, 1, 0, 130, 33], &[70, 40, 5, 130, 33]], [&[3, 200, 17], &[250, 0, 60]], [&[64, 64, 64], &[64, 32, 128]]];

#[test]
fn ragged_batches() {
    for [q, k] in RAGGED {
        let (q, k) = (bounds(q), bounds(k));
        let s = Shape { h: 4, hkv: 2, tq: q[q.len() - 1], tk: k[k.len() - 1], d: 24, dv: 16, ..BASE };
        let ragged = |p: Attend<'static>| p.cu_seqlens(Some(CuSeqlens { q: q.clone().leak(), k: k.clone().leak() }));
        check(s, &ragged(scaled(s)), None, &all);
        check(s, &ragged(scaled(s).causal(true)), None, &all);
        let mut p = ragged(scaled(s).band(Some(Band { left: 30, right: 9 })));
        let sinks = [0.5, -2.0, 0.0, 3.0];
        p.softcap = Some(4.0);
        p.sinks = Some(&sinks);
        check(s, &p, None, &all);
        let x = Biases::of(s, 60, 6);
        for bias in x.all(s, 20) {
            check(s, &ragged(scaled(s).causal(true)).bias(Some(bias)), None, &all);
        }
        let longest = k.windows(2).map(|w| w[1] - w[0]).max().unwrap();
        let dense: Vec<f32> = (0..s.h * s.tq * longest).map(|i| (i as f32 * 0.37).sin()).collect();
        let view = View::contiguous("bias", &dense, [1, s.h, s.tq, longest]).unwrap();
        check(s, &ragged(scaled(s)).bias(Some(Bias::Dense(view))), None, &all);
        // A table and lists a sequence and head.
        let mut r = Rng(4);
        let (mut tables, mut lists) = (Vec::new(), Vec::new());
        for (q, k) in q.windows(2).zip(k.windows(2)) {
            let one = Shape { tq: q[1] - q[0], tk: k[1] - k[0], ..s };
            tables.extend(random_table(one, &mut r, 16, 24, 0.5, true).heads);
            lists.extend(if one.tk == 0 {
                vec![HeadKeys::from_lists(16, vec![Vec::new(); one.tq.div_ceil(16)]); s.h]
            } else {
                random_lists(one, &mut r, 16, 30).heads
            });
        }
        let place = |i: usize, j: usize| {
            let n = q.windows(2).position(|w| (w[0]..w[1]).contains(&i)).unwrap();
            (n, i - q[n], j - k[n])
        };
        let (tables, lists) = (BlockTable { heads: tables }, KeyLists { heads: lists });
        let visible = |_: usize, h: usize, i: usize, j: usize| {
            let (n, i, j) = place(i, j);
            in_table(s, &tables, n, h, i, j)
        };
        check(s, &ragged(scaled(s).causal(true)).table(Some(&tables)), None, &visible);
        let visible = |_: usize, h: usize, i: usize, j: usize| {
            let (n, i, j) = place(i, j);
            in_lists(s, &lists, n, h, i, j)
        };
        check(s, &ragged(scaled(s)), Some(&lists), &visible);
    }
}

/// A ragged batch does what its sequences do by themselves, and nothing for padding.
#[test]
fn work_of_a_ragged_batch_is_that_of_its_sequences() {
    for [q, k] in RAGGED {
        let s = Shape { tq: q.iter().sum(), tk: k.iter().sum(), d: 8, dv: 8, ..BASE };
        let cu = (bounds(q), bounds(k));
        for p in [scaled(s), scaled(s).causal(true), scaled(s).window(Some(20))] {
            let ragged = p.clone().cu_seqlens(Some(CuSeqlens { q: &cu.0, k: &cu.1 }));
            let (.., whole) = call(s, &data::<f32>(s), &ragged, None);
            let parts = q.iter().zip(k).map(|(&tq, &tk)| {
                let one = Shape { tq, tk, ..s };
                call(one, &data::<f32>(one), &p, None).2
            });
            assert_eq!(whole, parts.sum());
        }
    }
}

#[test]
fn wrong_bounds_and_biases_are_refused() {
    let s = Shape { tq: 30, tk: 40, ..BASE };
    let x = data::<f32>(s);
    let [q, k, v] = views(s, &x);
    let mut out = vec![0f32; s.h * s.tq * s.dv];
    let mut refused = |p: Attend, what: &str| {
        let mut o = ViewMut::contiguous("out", &mut out, [s.b, s.h, s.tq, s.dv]).unwrap();
        let e = p.run(&q, &k, &v, &mut o, None).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains(what), "{what}: {e}");
    };
    let p = scaled(s);
    for (cu, what) in [
        (CuSeqlens { q: &[0, 30], k: &[0, 20, 40] }, "bounds"),
        (CuSeqlens { q: &[0, 20], k: &[0, 40] }, "cu_seqlens.q"),
        (CuSeqlens { q: &[0, 30], k: &[1, 40] }, "cu_seqlens.k"),
        (CuSeqlens { q: &[0, 20, 10, 30], k: &[0, 1, 2, 40] }, "ascending"),
        (CuSeqlens { q: &[], k: &[] }, "cu_seqlens.q"),
    ] {
        refused(p.clone().cu_seqlens(Some(cu)), what);
    }
    let some = [0f32; 200];
    let view = |shape| View::contiguous("bias", &some, shape).unwrap();
    refused(p.clone().bias(Some(Bias::Relative { table: &some[..5], left: 0 })), "distances");
    refused(p.clone().bias(Some(Bias::Relative { table: &some[..6], left: 3 })), "distance 0");
    refused(p.clone().bias(Some(Bias::Keys(view([1, 2, 1, 39])))), "keys");
    refused(p.clone().bias(Some(Bias::Keys(view([1, 1, 1, 40])))), "heads");
    let factors = |r, n| Bias::Factors { q: view([1, 2, 30, 2]), k: view([1, 2, n, r]) };
    refused(p.clone().bias(Some(factors(1, 40))), "rank");
    refused(p.clone().bias(Some(factors(2, 39))), "key factors");
}

#[test]
fn odd_scales() {
    for scale in [0.0, -0.3, 3.0] {
        check(BASE, &Attend::new(scale).causal(true), None, &all);
    }
}

#[test]
fn softcap_and_sinks() {
    let sinks = [0.7f32, -3.0];
    for tq in 1..6 {
        // Too few queries to fill vectors.
        let s = Shape { tq, ..BASE };
        let mut p = scaled(s).causal(true).window(Some(100));
        p.softcap = Some(5.0);
        p.sinks = Some(&sinks);
        check(s, &p, None, &all);
    }
    for (std, cap) in [(1.0, 50.0), (3.0, 20.0), (8.0, 5.0)] {
        let s = Shape { std, ..BASE };
        let mut p = scaled(s).causal(true);
        p.softcap = Some(cap);
        check(s, &p, None, &all);
        p.sinks = Some(&sinks);
        check(s, &p, None, &all);
        p.softcap = None;
        check(s, &p, None, &all);
    }
    // More queries than keys: the first rows see the sink alone.
    let s = Shape { tq: 50, tk: 20, ..BASE };
    let mut p = scaled(s).causal(true);
    p.sinks = Some(&sinks);
    check(s, &p, None, &all);
}

#[test]
fn block_tables() {
    let mut r = Rng(5);
    for (bq, bk) in BLOCKS {
        for density in [0.0, 0.2, 0.6] {
            for causal in [false, true] {
                let s = Shape { tq: 150, tk: 210, d: 8, dv: 8, ..BASE };
                let t = random_table(s, &mut r, bq, bk, density, false);
                let visible = |b, h, i, j| in_table(s, &t, b, h, i, j);
                check(s, &scaled(s).causal(causal).table(Some(&t)), None, &visible);
                if bq <= 64 {
                    let t = random_table(s, &mut r, bq, bk, density, true);
                    let visible = |b, h, i, j| in_table(s, &t, b, h, i, j);
                    check(s, &scaled(s).causal(causal).table(Some(&t)), None, &visible);
                }
            }
        }
    }
}

/// So many tasks that each thread knows its next one while it is at another.
#[test]
fn many_tasks() {
    let mut r = Rng(11);
    let two = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let s = Shape { h: 8, hkv: 4, tq: 1030, tk: 330, d: 24, dv: 8, ..BASE };
    for (rows, causal) in [(false, false), (true, true)] {
        let t = random_table(s, &mut r, 64, 64, 0.3, rows);
        let p = scaled(s).causal(causal).table(Some(&t));
        two.install(|| check(s, &p, None, &|b, h, i, j| in_table(s, &t, b, h, i, j)));
    }
}

#[test]
fn table_with_window_and_long_blocks() {
    let mut r = Rng(6);
    let s = Shape { tq: 600, tk: 700, d: 8, dv: 8, ..BASE };
    for (bq, bk) in [(300, 100), (512, 64), (64, 512)] {
        let t = random_table(s, &mut r, bq, bk, 0.5, false);
        let visible = |b, h, i, j| in_table(s, &t, b, h, i, j);
        check(s, &scaled(s).causal(true).window(Some(150)).table(Some(&t)), None, &visible);
    }
}

#[test]
fn blocks_and_single_keys_in_one_pass() {
    let mut r = Rng(9);
    for (bq, bk, group) in [(16, 32, 16), (64, 64, 64), (128, 16, 32), (3, 7, 9), (100, 1, 50)] {
        for (causal, window) in [(false, None), (true, None), (true, Some(70))] {
            for rows in [false, true] {
                if rows && bq > 64 {
                    continue;
                }
                let s = Shape { tq: 150, tk: 210, d: 8, dv: 8, ..BASE };
                let t = random_table(s, &mut r, bq, bk, 0.3, rows);
                // Lists that name keys inside visited blocks too: these are visited once, by all rows.
                let l = random_lists(s, &mut r, group, 60);
                let visible =
                    |b: usize, h: usize, i: usize, j: usize| in_table(s, &t, b, h, i, j) || in_lists(s, &l, b, h, i, j);
                check(s, &scaled(s).causal(causal).window(window).table(Some(&t)), Some(&l), &visible);
            }
        }
    }
}

#[test]
fn key_lists() {
    let mut r = Rng(7);
    for group in [1, 2, 3, 5, 16, 64, 100, 1000] {
        for causal in [false, true] {
            let s = Shape { b: 2, tq: 130, tk: 190, d: 40, dv: 24, ..BASE };
            let l = random_lists(s, &mut r, group, 80);
            let visible = |b: usize, h: usize, i: usize, j: usize| in_lists(s, &l, b, h, i, j);
            check(s, &scaled(s).causal(causal), Some(&l), &visible);
        }
    }
}

#[test]
fn strided_operands() {
    // (B, T, H, D) memory with gaps, against the same numbers laid out plainly.
    let s = Shape { b: 2, h: 4, hkv: 2, tq: 75, tk: 110, d: 20, dv: 12, ..BASE };
    let x = data::<f32>(s);
    let (qs, ks, vs, os) =
        ([s.b, s.h, s.tq, s.d], [s.b, s.hkv, s.tk, s.d], [s.b, s.hkv, s.tk, s.dv], [s.b, s.h, s.tq, s.dv]);
    let (q, qst) = spread(&x.q, qs, 3);
    let (k, kst) = spread(&x.k, ks, 1);
    let (v, vst) = spread(&x.v, vs, 5);
    for isa in Isa::available() {
        let p = scaled(s).causal(true).isa(isa);
        let (want, want_lse, _) = call(s, &x, &p, None);
        let (mut out, ost) = spread(&want, os, 2);
        out.fill(-7.0);
        let mut lse = vec![0f32; want_lse.len()];
        p.run(
            &View::new("q", &q, qs, qst).unwrap(),
            &View::new("k", &k, ks, kst).unwrap(),
            &View::new("v", &v, vs, vst).unwrap(),
            &mut ViewMut::new("out", &mut out, os, ost).unwrap(),
            Some(&mut lse),
        )
        .unwrap();
        let (mut expect, _) = spread(&want, os, 2);
        expect.iter_mut().for_each(|x| *x = if x.is_nan() { -7.0 } else { *x });
        assert!(out == expect, "{isa}: rows differ or the gaps between them were touched");
        assert_eq!(lse, want_lse);
    }
}

#[test]
fn prefix_of_a_causal_call_is_the_call_on_the_prefix() {
    let s = Shape { tq: 200, tk: 200, d: 32, dv: 32, ..BASE };
    for isa in Isa::available() {
        let x = data::<f32>(s);
        let p = scaled(s).causal(true).isa(isa);
        let (whole, ..) = call(s, &x, &p, None);
        for n in [1, 63, 64, 100, 199] {
            let cut = |x: &[f32], t: usize, heads: usize, d: usize| -> Vec<f32> {
                (0..heads).flat_map(|h| x[h * t * d..(h * t + n) * d].to_vec()).collect()
            };
            let part =
                Data { q: cut(&x.q, s.tq, s.h, s.d), k: cut(&x.k, s.tk, s.hkv, s.d), v: cut(&x.v, s.tk, s.hkv, s.dv) };
            let (out, ..) = call(Shape { tq: n, tk: n, ..s }, &part, &p, None);
            let want = cut(&whole, s.tq, s.h, s.dv);
            let err = worst(out.iter().map(|&x| f64::from(x)), &f64s(&want));
            assert!(err < 1e-6, "{isa} prefix {n}: {err:e}");
        }
        // The future may be anything, even NaN.
        let mut y = data::<f32>(s);
        for c in 0..s.d {
            y.k[150 * s.d + c] = f32::NAN;
            y.v[150 * s.dv + c] = f32::NAN;
        }
        let (out, ..) = call(s, &y, &p, None);
        for h in 0..s.h {
            let rows = |x: &[f32], a: usize, b: usize| x[(h * s.tq + a) * s.dv..(h * s.tq + b) * s.dv].to_vec();
            // A tile is masked after the fact, so values of weight zero must not leak NaN.
            assert_eq!(rows(&out, 0, 64), rows(&whole, 0, 64), "{isa}");
            assert!(rows(&out, 150, 200).iter().all(|x| x.is_nan()), "{isa}: NaN must not be hidden");
        }
    }
}

#[test]
fn work_counts_what_is_visited() {
    let s = Shape { h: 1, tq: 256, tk: 256, d: 16, dv: 8, ..BASE };
    let x = data::<f32>(s);
    let (.., dense) = call(s, &x, &scaled(s), None);
    assert_eq!((dense.pairs, dense.tiles), (256 * 256, 16));
    assert_eq!(dense.flops, 2 * dense.pairs * 24);
    // Four tiles of 64 queries, each reading q, o and 256 keys.
    assert_eq!(dense.bytes, 4 * (4 * 256 * 24 + 64 * (4 * 16 + 4 * 8)));
    let (.., causal) = call(s, &x, &scaled(s).causal(true), None);
    assert_eq!((causal.pairs, causal.tiles), (64 * 64 * 10, 10));
    let diagonal = HeadTable::from_lists(64, 64, (0..4).map(|i| vec![i]).collect());
    let t = BlockTable { heads: vec![diagonal] };
    let (.., sparse) = call(s, &x, &scaled(s).table(Some(&t)), None);
    assert_eq!((sparse.pairs, sparse.tiles), (64 * 64 * 4, 4));
    assert_eq!(sparse.pairs * 4, dense.pairs);
    // A block above the diagonal costs nothing.
    let above = HeadTable::from_lists(64, 64, (0..4).map(|_| vec![3]).collect());
    let t = BlockTable { heads: vec![above] };
    let (.., w) = call(s, &x, &scaled(s).causal(true).table(Some(&t)), None);
    assert_eq!((w.pairs, w.tiles), (64 * 64, 1));
}

#[test]
fn wrong_calls_are_refused() {
    let s = BASE;
    let x = data::<f32>(s);
    let [q, k, v] = views(s, &x);
    let mut out = vec![0f32; s.h * s.tq * s.dv];
    let mut o = ViewMut::contiguous("out", &mut out, [s.b, s.h, s.tq, s.dv]).unwrap();
    let p = scaled(s);
    assert!(p.run(&q, &k, &v, &mut o, Some(&mut [0.0; 3])).is_err(), "short lse");
    let mut bad = p.clone();
    bad.softcap = Some(0.0);
    assert!(bad.run(&q, &k, &v, &mut o, None).is_err(), "cap of zero");
    let sinks = [1.0f32; 3];
    let mut bad = p.clone();
    bad.sinks = Some(&sinks);
    assert!(bad.run(&q, &k, &v, &mut o, None).is_err(), "sinks of another head count");
    assert!(p.clone().bias(Some(Bias::Alibi(&sinks))).run(&q, &k, &v, &mut o, None).is_err(), "slopes likewise");
    let t = BlockTable { heads: vec![] };
    assert!(p.clone().table(Some(&t)).run(&q, &k, &v, &mut o, None).is_err(), "table of no heads");
    let l = KeyLists { heads: vec![] };
    assert!(attend_indexed(&p, &l, &q, &k, &v, &mut o, None).is_err(), "lists of no heads");
    let lists = |group: usize| HeadKeys::from_lists(group, vec![Vec::new(); s.tq.div_ceil(group)]);
    let l = KeyLists { heads: vec![lists(6), lists(6)] };
    assert!(attend_indexed(&p.clone().table(Some(&t)), &l, &q, &k, &v, &mut o, None).is_err(), "table of no heads");
    let t = random_table(s, &mut Rng(1), 4, 16, 0.5, false);
    assert!(
        attend_indexed(&p.clone().table(Some(&t)), &l, &q, &k, &v, &mut o, None).is_err(),
        "groups of 6, blocks of 4"
    );
    assert!(p.run(&q, &v, &k, &mut ViewMut::contiguous("out", &mut [0.0; 4], [1, 1, 1, 4]).unwrap(), None).is_err());
}

#[test]
fn parts_merge_to_the_whole() {
    // Keys split three ways (one part empty), each attended on its own, then folded together.
    let s = Shape { tq: 30, tk: 120, d: 24, dv: 40, std: 2.0, ..BASE };
    let x = data::<f32>(s);
    for isa in Isa::available() {
        let p = scaled(s).isa(isa);
        let (want, want_lse, _) = call(s, &x, &p, None);
        let mut acc = vec![0f32; want.len()];
        let mut lse = vec![f32::NEG_INFINITY; want_lse.len()];
        for (from, to) in [(0, 50), (50, 50), (50, 120)] {
            let cut = |x: &[f32], d: usize| x[from * d..to * d].to_vec();
            let part = Data { q: x.q.clone(), k: cut(&x.k, s.d), v: cut(&x.v, s.dv) };
            let (o, l, _) = call(Shape { tk: to - from, ..s }, &part, &p, None);
            for (r, (a, o)) in acc.chunks_mut(s.dv).zip(o.chunks(s.dv)).enumerate() {
                merge_row(a, &mut lse[r], o, l[r]);
            }
        }
        let err = worst(acc.iter().map(|&x| f64::from(x)), &f64s(&want));
        let err_lse = worst(lse.iter().map(|&x| f64::from(x)), &f64s(&want_lse));
        assert!(err < 2e-6 && err_lse < 4e-6, "{isa}: {err:e}, lse {err_lse:e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any shape, mask and table: the twin, the error rule, and counters within the dense call's.
    #[test]
    fn any_problem(any in problems(150, 200)) {
        let (s, p, table) = (any.s, any.params(), any.table());
        let visible = |b: usize, h: usize, i: usize, j: usize| table.as_ref().is_none_or(|t| in_table(s, t, b, h, i, j));
        check(s, &p.clone().table(table.as_ref()), None, &visible);
        let x = data::<f32>(s);
        let (.., dense) = call(s, &x, &p, None);
        let (.., sparse) = call(s, &x, &p.table(table.as_ref()), None);
        prop_assert!(sparse.pairs <= dense.pairs.max((s.b * s.h * s.tq * s.tk) as u64));
    }
}
