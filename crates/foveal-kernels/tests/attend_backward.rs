//! The backward pass of attention against its f64 twin, under every instruction set of the machine; the twin
//! against differences of the forward twin, and both against PyTorch's autograd.
//!
//! Error rule for gradients: max|g − ref64| ≤ 3 · max|simple f32 − ref64|, with a floor for cases in which
//! the simple version happens to be (nearly) exact.

#[path = "common/problem.rs"]
mod problem;

use foveal_kernels::{
    Attend, AttendGrads, Band, Bias, BiasGrad, BlockTable, CuSeqlens, Element, HeadTable, Isa, KeyLists, Normalizer,
    Upstream, View, ViewMut, Work, attend_indexed, attend_indexed_backward, twin,
};
use half::bf16;
use problem::*;
use proptest::prelude::*;

/// Gradients of a call, f32: dq, dk, dv, dsinks, dbias.
type Grads = [Vec<f32>; 5];
const NAMES: [&str; 5] = ["dq", "dk", "dv", "dsinks", "dbias"];

/// What the loss says: Σ out · dout + Σ lse · dlse.
fn upstream(s: Shape) -> (Vec<f32>, Vec<f32>) {
    let mut r = Rng(s.seed + 77);
    let mut fill = |n: usize| (0..n).map(|_| r.normal()).collect();
    (fill(s.b * s.h * s.tq * s.dv), fill(s.b * s.h * s.tq))
}

/// Which gradient of a bias to ask for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Nothing,
    /// Of the scores.
    Dense,
    /// Of the bias's own parameters, those of key factors after those of query factors.
    Own,
}

/// Keys a query can have at most: the row length of a dense bias.
fn longest(s: Shape, p: &Attend) -> usize {
    p.cu_seqlens.map_or(s.tk, |cu| cu.k.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0))
}

/// Parameters of the bias of `p`, were nothing shared.
fn own_parameters(s: Shape, p: &Attend) -> usize {
    match &p.bias {
        None => 0,
        Some(Bias::Alibi(x)) => x.len(),
        Some(Bias::Dense(_)) => s.b * s.h * s.tq * longest(s, p),
        Some(Bias::Keys(_)) => s.b * s.h * s.tk,
        Some(Bias::Relative { table, .. }) => table.len(),
        Some(Bias::Factors { q, .. }) => s.b * s.h * (s.tq + s.tk) * q.shape[3],
    }
}

/// Gradients of those parameters from gradients of scores, `at(b, h, i, j)`.
fn contract(s: Shape, p: &Attend, at: &dyn Fn(usize, usize, usize, usize) -> f64) -> Vec<f64> {
    let mut g = vec![0f64; own_parameters(s, p)];
    for r in 0..s.b * s.h * s.tq {
        let (b, h, i) = (r / (s.h * s.tq), r / s.tq % s.h, r % s.tq);
        for j in sequence(s, p, i)[1].clone() {
            let ds = at(b, h, i, j);
            let d = distance(s, p, i, j);
            match &p.bias {
                Some(Bias::Alibi(_)) => g[h] -= ds * d.abs() as f64,
                Some(Bias::Dense(_)) => g[r * longest(s, p) + j - sequence(s, p, i)[1].start] += ds,
                Some(Bias::Keys(_)) => g[(b * s.h + h) * s.tk + j] += ds,
                Some(Bias::Relative { table, left }) => {
                    let n = table.len() / s.h;
                    g[h * n + place(d, *left, n)] += ds;
                }
                Some(Bias::Factors { q, k }) => {
                    let n = q.shape[3];
                    let key = (s.b * s.h * s.tq + (b * s.h + h) * s.tk + j) * n;
                    for c in 0..n {
                        g[r * n + c] += ds * f64::from(k.row(b, h, j)[c]);
                        g[key + c] += ds * f64::from(q.row(b, h, i)[c]);
                    }
                }
                None => {}
            }
        }
    }
    g
}

/// Forward, then backward into poisoned memory.
fn call<T: Element>(
    s: Shape,
    x: &Data<T>,
    p: &Attend,
    lists: Option<&KeyLists>,
    dlse: bool,
) -> (Grads, Vec<f32>, Work) {
    call_for(s, x, p, lists, dlse, Ask::Dense)
}

/// The same with another gradient of the bias.
fn call_for<T: Element>(
    s: Shape,
    x: &Data<T>,
    p: &Attend,
    lists: Option<&KeyLists>,
    dlse: bool,
    ask: Ask,
) -> (Grads, Vec<f32>, Work) {
    let [q, k, v] = views(s, x);
    let (dout, dl) = upstream(s);
    let shape = [s.b, s.h, s.tq, s.dv];
    let mut out = vec![0f32; dout.len()];
    let softmax = p.normalizer == Normalizer::Softmax;
    let mut lse = vec![0f32; if softmax { dl.len() } else { 0 }];
    let mut o = ViewMut::contiguous("out", &mut out, shape).unwrap();
    let to = softmax.then_some(lse.as_mut_slice());
    match lists {
        None => p.run(&q, &k, &v, &mut o, to),
        Some(l) => attend_indexed(p, l, &q, &k, &v, &mut o, to),
    }
    .unwrap();
    let poison = |n: usize| vec![f32::NAN; n];
    let mut g = [
        poison(x.q.len()),
        poison(x.k.len()),
        poison(x.v.len()),
        poison(p.sinks.map_or(0, <[f32]>::len)),
        poison(match ask {
            Ask::Nothing => 0,
            Ask::Dense => s.b * s.h * s.tq * longest(s, p),
            Ask::Own => own_parameters(s, p),
        }),
    ];
    let [dq, dk, dv, dsinks, dbias] = &mut g;
    let own = ask == Ask::Own;
    let rank = match &p.bias {
        Some(Bias::Factors { q, .. }) if own => q.shape[3],
        _ => 0,
    };
    let (first, second) = dbias.split_at_mut(s.b * s.h * s.tq * rank);
    let mut slice = Vec::new();
    let shape_of_second = match &p.bias {
        _ if ask == Ask::Nothing => [0; 4],
        Some(Bias::Alibi(_) | Bias::Relative { .. }) if own => {
            slice = second.to_vec();
            [1, 1, 1, second.len()]
        }
        Some(Bias::Keys(_)) if own => [s.b, s.h, 1, s.tk],
        _ if rank > 0 => [s.b, s.h, s.tk, rank],
        _ => [s.b, s.h, s.tq, longest(s, p)],
    };
    let mut first = ViewMut::contiguous("dbias", first, [s.b, s.h, s.tq, rank]).unwrap();
    let mut view = ViewMut::contiguous("dbias", second, shape_of_second).unwrap();
    let grads = AttendGrads {
        dq: &mut ViewMut::contiguous("dq", dq, q.shape).unwrap(),
        dk: &mut ViewMut::contiguous("dk", dk, k.shape).unwrap(),
        dv: &mut ViewMut::contiguous("dv", dv, v.shape).unwrap(),
        dsinks: p.sinks.is_some().then_some(dsinks.as_mut_slice()),
        dbias: match (ask, &p.bias) {
            (Ask::Nothing, _) => None,
            (Ask::Dense, _) | (Ask::Own, None | Some(Bias::Dense(_))) => Some(BiasGrad::Dense(&mut view)),
            (_, Some(Bias::Alibi(_))) => Some(BiasGrad::Slopes(&mut slice)),
            (_, Some(Bias::Relative { .. })) => Some(BiasGrad::Relative(&mut slice)),
            (_, Some(Bias::Keys(_))) => Some(BiasGrad::Keys(&mut view)),
            (_, Some(Bias::Factors { .. })) => Some(BiasGrad::Factors { q: &mut first, k: &mut view }),
        },
    };
    let up = Upstream {
        out: &View::contiguous("out", &out, shape).unwrap(),
        lse: &lse,
        dout: &View::contiguous("dout", &dout, shape).unwrap(),
        dlse: (dlse && softmax).then_some(&dl),
    };
    let work = match lists {
        None => p.backward(&q, &k, &v, &up, grads),
        Some(l) => attend_indexed_backward(p, l, &q, &k, &v, &up, grads),
    }
    .unwrap();
    if !slice.is_empty() {
        g[4] = slice;
    }
    (g, out, work)
}

/// The backward pass in f32, in the plainest order. `narrow` rounds to bf16 what enters a product, as a model
/// in bf16 does that computes weights and their gradients whole.
fn simple<T: Element>(
    s: Shape,
    x: &Data<T>,
    p: &Attend,
    dlse: bool,
    narrow: bool,
    visible: &dyn Fn(usize, usize, usize, usize) -> bool,
) -> Grads {
    let wide = |x: &[T]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (q, k, v) = (wide(&x.q), wide(&x.k), wide(&x.v));
    let (mut dout, dl) = upstream(s);
    let round = |w: f32| if narrow { bf16::from_f32(w).to_f32() } else { w };
    dout.iter_mut().for_each(|x| *x = round(*x));
    let mut g = [
        vec![0f32; q.len()],
        vec![0f32; k.len()],
        vec![0f32; v.len()],
        vec![0f32; p.sinks.map_or(0, <[f32]>::len)],
        vec![0f32; s.b * s.h * s.tq * s.tk],
    ];
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0f32, |a, (x, y)| a + x * y);
    for r in 0..s.b * s.h * s.tq {
        let (b, h, i) = (r / (s.h * s.tq), r / s.tq % s.h, r % s.tq);
        let kv = b * s.hkv + h / (s.h / s.hkv);
        let (q, dout) = (&q[r * s.d..(r + 1) * s.d], &dout[r * s.dv..(r + 1) * s.dv]);
        let row = |x: &[f32], j: usize, n: usize| x[(kv * s.tk + j) * n..(kv * s.tk + j + 1) * n].to_vec();
        let scores: Vec<_> = (0..s.tk)
            .filter(|&j| visible(b, h, i, j))
            .map(|j| {
                let a = dot(q, &row(&k, j, s.d)) * p.scale;
                let bent = p.softcap.map_or(0.0, |c| (a / c).tanh());
                (j, p.softcap.map_or(a, |c| c * bent) + bias_of(s, p, b, h, i, j), bent)
            })
            .collect();
        let sink = p.sinks.map(|s| s[h]);
        let m = scores.iter().map(|x| x.1).chain(sink).fold(f32::NEG_INFINITY, f32::max);
        if m == f32::NEG_INFINITY {
            continue;
        }
        // Anew from the log-sum-exp in f32, which is what a backward pass has.
        let lse = m + scores.iter().map(|x| x.1).chain(sink).fold(0f32, |a, x| a + (x - m).exp()).ln();
        let mut delta = if dlse { -dl[r] } else { 0.0 };
        for &(j, a, _) in &scores {
            delta += round((a - lse).exp()) * dot(dout, &row(&v, j, s.dv));
        }
        if let Some(sink) = sink {
            g[3][h] -= (sink - lse).exp() * delta;
        }
        for &(j, a, bent) in &scores {
            let w = round((a - lse).exp());
            let ds = w * (dot(dout, &row(&v, j, s.dv)) - delta);
            g[4][r * s.tk + j] = ds;
            let ds = round(ds * (1.0 - bent * bent)) * p.scale;
            let at = kv * s.tk + j;
            for c in 0..s.d {
                g[0][r * s.d + c] += ds * k[at * s.d + c];
                g[1][at * s.d + c] += ds * q[c];
            }
            for c in 0..s.dv {
                g[2][at * s.dv + c] += w * dout[c];
            }
        }
    }
    g
}

fn twin_of<T: Element>(
    s: Shape,
    x: &Data<T>,
    p: &Attend,
    dlse: bool,
    visible: &dyn Fn(usize, usize, usize, usize) -> bool,
) -> [Vec<f64>; 5] {
    let (dout, dl) = upstream(s);
    let (sinks, dl): (Option<Vec<f64>>, _) = (p.sinks.map(f64s), f64s(&dl));
    let g = twin::attend_backward(
        &f64s(&x.q),
        &f64s(&x.k),
        &f64s(&x.v),
        &f64s(&dout),
        dlse.then_some(&dl),
        [s.b, s.h, s.tq, s.d],
        [s.hkv, s.tk, s.dv],
        f64::from(p.scale),
        p.softcap.map(f64::from),
        sinks.as_deref(),
        &|b, h, i, j| bias64_of(s, p, b, h, i, j),
        visible,
    );
    [g.dq, g.dk, g.dv, g.dsinks, g.dbias]
}

fn check_as<T: Element>(
    s: Shape,
    p: &Attend,
    lists: Option<&KeyLists>,
    visible: &dyn Fn(usize, usize, usize, usize) -> bool,
) {
    let x = data::<T>(s);
    let visible = |b: usize, h: usize, i: usize, j: usize| allowed(s, p, i, j) && visible(b, h, i, j);
    let dlse = s.seed.is_multiple_of(2);
    let want = twin_of(s, &x, p, dlse, &visible);
    // Rounding, where nearly all cancels: terms are of the size of one, times k or q.
    let bounds = |narrow| -> Vec<f64> {
        let plain = simple(s, &x, p, dlse, narrow, &visible);
        let floor = if narrow { 4e-3 } else { 3e-6 };
        let bound = |(plain, want): (&Vec<f32>, &Vec<f64>)| {
            let top = want.iter().fold(1f64, |a, x| a.max(x.abs()));
            3.0 * worst(plain.iter().map(|&x| f64::from(x)), want) + floor * top
        };
        plain.iter().zip(&want).map(bound).collect()
    };
    let (wide, narrow) = (bounds(false), bounds(true));
    // Of the bias's own parameters, which are sums over gradients of scores.
    let dense = |g: &[f64], b: usize, h: usize, i: usize, j: usize| g[((b * s.h + h) * s.tq + i) * s.tk + j];
    let own = contract(s, p, &|b, h, i, j| dense(&want[4], b, h, i, j));
    let own_bounds = |narrow| {
        let plain = f64s(&simple(s, &x, p, dlse, narrow, &visible)[4]);
        let plain = contract(s, p, &|b, h, i, j| dense(&plain, b, h, i, j));
        let all = contract(s, p, &|b, h, i, j| dense(&want[4], b, h, i, j).abs());
        let top = |x: &[f64]| x.iter().fold(1f64, |a, x| a.max(x.abs()));
        // Rounding of sums: against the terms, of which some cancel.
        3.0 * worst(plain.into_iter(), &own)
            + if narrow { 4e-3 * top(&own) + 5e-5 * top(&all) } else { 3e-7 * top(&all).max(10.0) }
    };
    let (wide_own, narrow_own) = (own_bounds(false), own_bounds(true));
    let mut work = None;
    for isa in Isa::available() {
        let tiles = T::NAME == "bf16" && isa == Isa::Amx;
        let p = p.clone().isa(isa);
        let bounds = if tiles { &narrow } else { &wide };
        for ask in [Ask::Dense, Ask::Nothing, Ask::Own] {
            if ask == Ask::Own && p.bias.is_none() {
                continue;
            }
            let (got, _, w) = call_for(s, &x, &p, lists, dlse, ask);
            for (i, name) in NAMES.into_iter().enumerate().take(4) {
                let (err, bound) = (worst(got[i].iter().map(|&x| f64::from(x)), &want[i]), bounds[i]);
                assert!(err <= bound, "{isa} {} {s:?}: error of {name} {err:e} over {bound:e}", T::NAME);
            }
            match ask {
                Ask::Nothing => {}
                Ask::Dense => {
                    let at = |r: usize| sequence(s, &p, r % s.tq)[1].clone();
                    let n = longest(s, &p);
                    let row = |r: usize| want[4][r * s.tk..(r + 1) * s.tk][at(r)].to_vec();
                    for r in 0..s.b * s.h * s.tq {
                        let want = row(r);
                        let err = worst(got[4][r * n..].iter().map(|&x| f64::from(x)).take(want.len()), &want);
                        assert!(
                            err <= bounds[4],
                            "{isa} {} {s:?}: error of dbias {err:e} over {:e}",
                            T::NAME,
                            bounds[4]
                        );
                        assert!(got[4][r * n..(r + 1) * n][want.len()..].iter().all(|&x| x == 0.0), "past the keys");
                    }
                }
                Ask::Own => {
                    let bound = if tiles { narrow_own } else { wide_own };
                    let err = worst(got[4].iter().map(|&x| f64::from(x)), &own);
                    let name = NAMES_OF_BIASES[kind(&p)];
                    assert!(err <= bound, "{isa} {} {s:?}: error of {name} {err:e} over {bound:e}", T::NAME);
                }
            }
            if ask != Ask::Own {
                assert_eq!(*work.get_or_insert(w), w, "{isa}: work differs");
            }
        }
    }
}

const NAMES_OF_BIASES: [&str; 6] = ["none", "slopes", "dense", "keys", "distances", "factors"];

fn kind(p: &Attend) -> usize {
    match &p.bias {
        None => 0,
        Some(Bias::Alibi(_)) => 1,
        Some(Bias::Dense(_)) => 2,
        Some(Bias::Keys(_)) => 3,
        Some(Bias::Relative { .. }) => 4,
        Some(Bias::Factors { .. }) => 5,
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
    }
}

#[test]
fn lengths() {
    for (tq, tk) in
        [(1, 1), (1, 300), (3, 2), (16, 16), (17, 31), (64, 64), (65, 97), (128, 128), (200, 90), (90, 200), (500, 610)]
    {
        for causal in [false, true] {
            let s = Shape { tq, tk, d: 20, dv: 12, seed: tq as u64, ..BASE };
            check(s, &scaled(s).causal(causal), None, &all);
        }
    }
}

#[test]
fn batches_and_groups() {
    for (b, h, hkv) in [(2, 6, 2), (3, 4, 4), (1, 7, 1)] {
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
    for (tq, tk) in [(150, 150), (70, 260), (130, 60), (450, 450)] {
        for w in [1, 17, 100, 1000] {
            let s = Shape { tq, tk, d: 24, dv: 16, ..BASE };
            check(s, &scaled(s).causal(true).window(Some(w)), None, &all);
        }
    }
}

#[test]
fn bands() {
    for (tq, tk) in [(70, 260), (250, 210)] {
        for (left, right) in [(0, 5), (64, usize::MAX), (usize::MAX, 20), (200, 100)] {
            let s = Shape { tq, tk, d: 24, dv: 16, ..BASE };
            check(s, &scaled(s).band(Some(Band { left, right })), None, &all);
        }
    }
}

#[test]
fn biases_of_keys_distances_and_factors() {
    for (tq, tk, b, group, rank) in [(2, 130, 1, 2, 3), (40, 70, 2, 2, 8), (220, 210, 1, 1, 17), (30, 200, 1, 3, 1)] {
        let s = Shape { b, h: 2 * group, hkv: 2, tq, tk, d: 12, dv: 8, ..BASE };
        // Distances clipped on both sides, and none clipped.
        for (n, left, others) in [(40, 30, true), (tq + tk, tq.max(tk), false)] {
            let x = Biases::of(s, n, rank);
            for bias in x.all(s, left).into_iter().filter(|b| others || matches!(b, Bias::Relative { .. })) {
                check(s, &scaled(s).causal(true).bias(Some(bias)), None, &all);
                if tq < 100 {
                    let mut p = Attend::new(0.3).band(Some(Band { left: 50, right: 30 })).bias(Some(bias));
                    p.softcap = Some(3.0);
                    check(s, &p, None, &all);
                }
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

#[test]
fn ragged_batches() {
    for [q, k] in [[[70, 1, 0, 130, 33], [70, 40, 5, 130, 33]], [[3, 300, 17, 0, 0], [250, 0, 60, 0, 9]]] {
        let (q, k) = (bounds(&q), bounds(&k));
        let s = Shape { h: 4, hkv: 2, tq: q[5], tk: k[5], d: 24, dv: 16, seed: 2, ..BASE };
        let cu = CuSeqlens { q: &q, k: &k };
        let sinks = [0.5, -2.0, 0.0, 3.0];
        let mut p = scaled(s).causal(true).cu_seqlens(Some(cu));
        check(s, &p, None, &all);
        p.sinks = Some(&sinks);
        p.softcap = Some(4.0);
        check(s, &p.clone().causal(false).band(Some(Band { left: 30, right: 9 })), None, &all);
        let x = Biases::of(s, 60, 6);
        for bias in x.all(s, 20) {
            check(s, &p.clone().bias(Some(bias)), None, &all);
        }
        let mut r = Rng(4);
        let tables = q.windows(2).zip(k.windows(2)).flat_map(|(q, k)| {
            random_table(Shape { tq: q[1] - q[0], tk: k[1] - k[0], ..s }, &mut r, 16, 24, 0.5, true).heads
        });
        let t = BlockTable { heads: tables.collect() };
        let visible = |_: usize, h: usize, i: usize, j: usize| {
            let n = q.windows(2).position(|w| (w[0]..w[1]).contains(&i)).unwrap();
            in_table(s, &t, n, h, i - q[n], j - k[n])
        };
        check(s, &p.table(Some(&t)), None, &visible);
    }
}

#[test]
fn extreme_logits() {
    for std in [5.0, 30.0] {
        let s = Shape { std, tq: 40, tk: 200, ..BASE };
        check(s, &scaled(s), None, &all);
        check(s, &scaled(s).causal(true), None, &all);
    }
}

#[test]
fn biases() {
    let slopes = [0.5f32, 0.03];
    for tq in [2, 70, 200] {
        let s = Shape { tq, d: 24, dv: 16, ..BASE };
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
fn softcap_and_sinks() {
    let sinks = [0.7f32, -3.0];
    for (std, cap) in [(1.0, 50.0), (3.0, 20.0), (8.0, 5.0)] {
        for seed in [1, 2] {
            let s = Shape { std, seed, ..BASE };
            let mut p = scaled(s).causal(true).window(Some(100));
            p.softcap = Some(cap);
            check(s, &p, None, &all);
            p.sinks = Some(&sinks);
            check(s, &p, None, &all);
            p.softcap = None;
            check(s, &p, None, &all);
        }
    }
    // More queries than keys: the first rows see the sink alone.
    let s = Shape { tq: 50, tk: 20, ..BASE };
    let mut p = scaled(s).causal(true);
    p.sinks = Some(&sinks);
    check(s, &p, None, &all);
}

/// Sigmoid attention, forward (error rule 2) and backward (3), against its twin.
fn check_sigmoid_as<T: Element>(s: Shape, p: &Attend, table: Option<&BlockTable>) {
    let x = data::<T>(s);
    let shift = match p.normalizer {
        Normalizer::Sigmoid { bias } => bias,
        Normalizer::Softmax => unreachable!("a check of sigmoids"),
    };
    let visible = |b: usize, h: usize, i: usize, j: usize| {
        allowed(s, p, i, j) && table.is_none_or(|t| in_table(s, t, b, h, i, j))
    };
    let (dout, _) = upstream(s);
    let (want_out, g) = twin::attend_sigmoid(
        &f64s(&x.q),
        &f64s(&x.k),
        &f64s(&x.v),
        &f64s(&dout),
        [s.b, s.h, s.tq, s.d],
        [s.hkv, s.tk, s.dv],
        f64::from(p.scale),
        p.softcap.map(f64::from),
        f64::from(shift),
        &|b, h, i, j| bias64_of(s, p, b, h, i, j),
        &visible,
    );
    let want = [g.dq, g.dk, g.dv, g.dsinks, g.dbias];
    // The plain version: the same sums in f32, which the error rule multiplies; on tiles with what enters a product
    // rounded to bf16.
    let plain = [false, true].map(|narrow| simple_sigmoid(s, &x, p, shift, narrow, &visible));
    let error = |x: &[f32], want: &[f64]| worst(x.iter().map(|&x| f64::from(x)), want);
    let mut work = None;
    for isa in Isa::available() {
        let narrow = T::NAME == "bf16" && isa == Isa::Amx;
        let (plain_out, plain) = &plain[usize::from(narrow)];
        let part = if narrow { 4e-3 } else { 3e-7 };
        let floor = |want: &[f64]| part * want.iter().fold(if narrow { 0f64 } else { 1.0 }, |a, x| a.max(x.abs()));
        let (got, out, w) = call(s, &x, &p.clone().isa(isa).table(table), None, false);
        let (err, bound) = (error(&out, &want_out), 2.0 * error(plain_out, &want_out) + floor(&want_out));
        assert!(err <= bound, "{isa} {} {s:?}: error of out {err:e} over {bound:e}", T::NAME);
        for (i, name) in NAMES.into_iter().enumerate() {
            let (err, bound) = (error(&got[i], &want[i]), 3.0 * error(&plain[i], &want[i]) + floor(&want[i]));
            assert!(err <= bound, "{isa} {} {s:?}: error of {name} {err:e} over {bound:e}", T::NAME);
        }
        assert_eq!(*work.get_or_insert(w), w, "{isa}: work differs");
    }
}

/// Sigmoid attention and its gradients in f32, in the plainest order.
fn simple_sigmoid<T: Element>(
    s: Shape,
    x: &Data<T>,
    p: &Attend,
    shift: f32,
    narrow: bool,
    visible: &dyn Fn(usize, usize, usize, usize) -> bool,
) -> (Vec<f32>, Grads) {
    let wide = |x: &[T]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (q, k, v) = (wide(&x.q), wide(&x.k), wide(&x.v));
    let round = |w: f32| if narrow { bf16::from_f32(w).to_f32() } else { w };
    let (mut dout, _) = upstream(s);
    dout.iter_mut().for_each(|x| *x = round(*x));
    let mut out = vec![0f32; dout.len()];
    let mut g = [q.len(), k.len(), v.len(), 0, s.b * s.h * s.tq * s.tk].map(|n| vec![0f32; n]);
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0f32, |a, (x, y)| a + x * y);
    for r in 0..s.b * s.h * s.tq {
        let (b, h, i) = (r / (s.h * s.tq), r / s.tq % s.h, r % s.tq);
        let (q, dout) = (&q[r * s.d..(r + 1) * s.d], &dout[r * s.dv..(r + 1) * s.dv]);
        for j in (0..s.tk).filter(|&j| visible(b, h, i, j)) {
            let at = (b * s.hkv + h / (s.h / s.hkv)) * s.tk + j;
            let (k, v) = (&k[at * s.d..(at + 1) * s.d], &v[at * s.dv..(at + 1) * s.dv]);
            let a = dot(q, k) * p.scale;
            let bent = p.softcap.map_or(0.0, |c| (a / c).tanh());
            let a = p.softcap.map_or(a, |c| c * bent) + bias_of(s, p, b, h, i, j) + shift;
            let w = 1.0 / (1.0 + (-a).exp());
            let ds = w * (1.0 - w) * dot(dout, v);
            g[4][r * s.tk + j] = ds;
            let ds = round(ds * (1.0 - bent * bent)) * p.scale;
            let w = round(w);
            for c in 0..s.d {
                g[0][r * s.d + c] += ds * k[c];
                g[1][at * s.d + c] += ds * q[c];
            }
            for c in 0..s.dv {
                out[r * s.dv + c] += w * v[c];
                g[2][at * s.dv + c] += w * dout[c];
            }
        }
    }
    (out, g)
}

#[test]
fn sigmoid() {
    let slopes = [0.5f32, 0.03];
    let mut r = Rng(5);
    for (tq, tk, d, dv, std) in
        [(1, 40, 16, 16, 1.0), (3, 130, 5, 70, 1.0), (70, 130, 64, 64, 1.0), (250, 210, 20, 12, 4.0)]
    {
        let s = Shape { tq, tk, d, dv, std, ..BASE };
        let normalizer = Normalizer::Sigmoid { bias: -(tk as f32).ln() };
        let p = scaled(s).normalizer(normalizer);
        let mut capped = p.clone().causal(true).window(Some(60)).bias(Some(Bias::Alibi(&slopes)));
        capped.softcap = Some(2.0);
        let t = random_table(s, &mut r, 16, 24, 0.5, true);
        for (p, table) in [(&p, None), (&capped, None), (&p.clone().causal(true), Some(&t))] {
            check_sigmoid_as::<f32>(s, p, table);
            check_sigmoid_as::<bf16>(s, p, table);
        }
    }
    // Scores far out on both sides, and none at all.
    let s = Shape { std: 30.0, tq: 40, tk: 90, ..BASE };
    check_sigmoid_as::<f32>(s, &scaled(s).normalizer(Normalizer::Sigmoid { bias: 0.5 }), None);
    let s = Shape { tq: 50, tk: 20, ..BASE };
    check_sigmoid_as::<f32>(s, &scaled(s).causal(true).normalizer(Normalizer::Sigmoid { bias: 0.0 }), None);
}

#[test]
fn sigmoids_have_no_denominator() {
    let s = BASE;
    let x = data::<f32>(s);
    let [q, k, v] = views(s, &x);
    let shape = [s.b, s.h, s.tq, s.dv];
    let mut out = vec![0f32; s.h * s.tq * s.dv];
    let mut o = ViewMut::contiguous("out", &mut out, shape).unwrap();
    let mut lse = vec![0f32; s.h * s.tq];
    let mut p = scaled(s).normalizer(Normalizer::Sigmoid { bias: -5.0 });
    let e = p.run(&q, &k, &v, &mut o, Some(&mut lse)).unwrap_err().to_string();
    assert!(e.contains("log-sum-exp"), "{e}");
    p.sinks = Some(&[0.0, 1.0]);
    let e = p.run(&q, &k, &v, &mut o, None).unwrap_err().to_string();
    assert!(e.contains("sinks"), "{e}");
}

#[test]
fn block_tables() {
    let mut r = Rng(5);
    for (bq, bk) in BLOCKS {
        for density in [0.0, 0.2, 0.6] {
            let s = Shape { tq: 150, tk: 410, d: 8, dv: 8, ..BASE };
            let t = random_table(s, &mut r, bq, bk, density, false);
            let visible = |b, h, i, j| in_table(s, &t, b, h, i, j);
            check(s, &scaled(s).table(Some(&t)), None, &visible);
            if bq <= 64 {
                let t = random_table(s, &mut r, bq, bk, density, true);
                let visible = |b, h, i, j| in_table(s, &t, b, h, i, j);
                check(s, &scaled(s).causal(true).table(Some(&t)), None, &visible);
            }
        }
    }
    let s = Shape { tq: 600, tk: 700, d: 8, dv: 8, ..BASE };
    for (bq, bk) in [(300, 100), (512, 64), (64, 512)] {
        let t = random_table(s, &mut r, bq, bk, 0.5, false);
        let visible = |b, h, i, j| in_table(s, &t, b, h, i, j);
        check(s, &scaled(s).causal(true).window(Some(150)).table(Some(&t)), None, &visible);
    }
}

#[test]
fn key_lists_and_blocks_beside_them() {
    let mut r = Rng(7);
    let s = Shape { b: 2, tq: 130, tk: 390, d: 40, dv: 24, ..BASE };
    for group in [1, 5, 16, 64, 1000] {
        let l = random_lists(s, &mut r, group, 80);
        let listed = |b: usize, h: usize, i: usize, j: usize| in_lists(s, &l, b, h, i, j);
        check(s, &scaled(s).causal(true), Some(&l), &listed);
        let t = random_table(s, &mut r, group.min(64), 32, 0.2, false);
        if group <= 64 {
            let visible = |b, h, i, j| in_table(s, &t, b, h, i, j) || listed(b, h, i, j);
            check(s, &scaled(s).table(Some(&t)), Some(&l), &visible);
        }
    }
}

#[test]
fn rows_without_keys_give_nothing() {
    // More queries than keys under a causal mask; an empty table; and a NaN nobody may see.
    let s = Shape { tq: 80, tk: 30, ..BASE };
    let x = data::<f32>(s);
    for isa in Isa::available() {
        let ([dq, ..], ..) = call(s, &x, &scaled(s).causal(true).isa(isa), None, true);
        for h in 0..s.h {
            let row = |i: usize| &dq[(h * s.tq + i) * s.d..(h * s.tq + i + 1) * s.d];
            assert!((0..50).all(|i| row(i).iter().all(|&x| x == 0.0)), "{isa}: hidden rows have gradients");
            assert!(row(51).iter().any(|&x| x != 0.0), "{isa}");
        }
        let heads = (0..2).map(|_| HeadTable::from_lists(64, 64, vec![vec![]; 2])).collect();
        let t = BlockTable { heads };
        let (g, _, work) = call(s, &x, &scaled(s).table(Some(&t)).isa(isa), None, true);
        assert!(g.iter().flatten().all(|&x| x == 0.0), "{isa}: an empty table has gradients");
        assert_eq!(work, Work::default());
    }
    let s = Shape { tq: 200, tk: 200, ..BASE };
    let mut x = data::<f32>(s);
    let whole: Vec<_> =
        Isa::available().into_iter().map(|isa| call(s, &x, &scaled(s).causal(true).isa(isa), None, false).0).collect();
    for c in 0..s.d {
        (x.k[150 * s.d + c], x.v[150 * s.dv + c]) = (f32::NAN, f32::NAN);
    }
    for (isa, whole) in Isa::available().into_iter().zip(whole) {
        let (g, ..) = call(s, &x, &scaled(s).causal(true).isa(isa), None, false);
        for h in 0..s.h {
            let rows = |x: &[f32], a: usize, b: usize| x[(h * s.tq + a) * s.d..(h * s.tq + b) * s.d].to_vec();
            assert_eq!(rows(&g[0], 0, 64), rows(&whole[0], 0, 64), "{isa}");
            assert!(rows(&g[0], 150, 200).iter().all(|x| x.is_nan()), "{isa}: NaN must not be hidden");
        }
    }
}

#[test]
fn strided_operands_and_results() {
    // (B, T, H, D) memory with gaps, against the same numbers laid out plainly.
    let s = Shape { b: 2, h: 4, hkv: 2, tq: 75, tk: 110, d: 20, dv: 12, ..BASE };
    let x = data::<f32>(s);
    let (dout, _) = upstream(s);
    let (qs, ks, vs, os) =
        ([s.b, s.h, s.tq, s.d], [s.b, s.hkv, s.tk, s.d], [s.b, s.hkv, s.tk, s.dv], [s.b, s.h, s.tq, s.dv]);
    let ((q, qst), (k, kst), (v, vst)) = (spread(&x.q, qs, 3), spread(&x.k, ks, 1), spread(&x.v, vs, 5));
    for isa in Isa::available() {
        let p = scaled(s).causal(true).isa(isa);
        let (want, ..) = call(s, &x, &p, None, false);
        let (q, k, v) = (
            View::new("q", &q, qs, qst).unwrap(),
            View::new("k", &k, ks, kst).unwrap(),
            View::new("v", &v, vs, vst).unwrap(),
        );
        let (mut out, ost) = spread(&dout, os, 2);
        let mut lse = vec![0f32; s.b * s.h * s.tq];
        p.run(&q, &k, &v, &mut ViewMut::new("out", &mut out, os, ost).unwrap(), Some(&mut lse)).unwrap();
        let (dout, dst) = spread(&dout, os, 1);
        let ((mut dq, a), (mut dk, b), (mut dv, c)) =
            (spread(&want[0], qs, 2), spread(&want[1], ks, 4), spread(&want[2], vs, 0));
        let expect = [dq.clone(), dk.clone(), dv.clone()];
        for x in dq.iter_mut().chain(&mut dk).chain(&mut dv) {
            *x = if x.is_nan() { -7.0 } else { 1e9 };
        }
        p.backward(
            &q,
            &k,
            &v,
            &Upstream {
                out: &View::new("out", &out, os, ost).unwrap(),
                lse: &lse,
                dout: &View::new("dout", &dout, os, dst).unwrap(),
                dlse: None,
            },
            AttendGrads {
                dq: &mut ViewMut::new("dq", &mut dq, qs, a).unwrap(),
                dk: &mut ViewMut::new("dk", &mut dk, ks, b).unwrap(),
                dv: &mut ViewMut::new("dv", &mut dv, vs, c).unwrap(),
                dsinks: None,
                dbias: None,
            },
        )
        .unwrap();
        for (mut want, got) in expect.into_iter().zip([dq, dk, dv]) {
            want.iter_mut().for_each(|x| *x = if x.is_nan() { -7.0 } else { *x });
            assert!(got == want, "{isa}: rows differ or the gaps between them were touched");
        }
    }
}

#[test]
fn the_same_whatever_the_threads() {
    let s = Shape { h: 3, hkv: 1, tq: 700, tk: 650, d: 16, dv: 16, ..BASE };
    let x = data::<f32>(s);
    let p = scaled(s).causal(true);
    let with = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| call(s, &x, &p, None, true))
    };
    let one = with(1);
    for n in [2, 3, 7] {
        assert!(with(n) == one, "{n} threads change the result");
    }
}

#[test]
fn work_counts_five_products() {
    let s = Shape { h: 1, tq: 256, tk: 256, d: 16, dv: 8, ..BASE };
    let x = data::<f32>(s);
    let (.., dense) = call(s, &x, &scaled(s), None, false);
    assert_eq!((dense.pairs, dense.tiles), (256 * 256, 16));
    assert_eq!(dense.flops, 2 * dense.pairs * (3 * 16 + 2 * 8));
    let (.., causal) = call(s, &x, &scaled(s).causal(true), None, false);
    assert_eq!((causal.pairs, causal.tiles), (64 * 64 * 10, 10));
    // One cell of 192 keys and one of 64, in query tiles of 64.
    let keys = 4 * 256;
    let rows = 256 + 256;
    assert_eq!(dense.bytes, keys * (16 + 8) * 12 + rows * (16 * 12 + 8 * 4));
}

#[test]
fn wrong_calls_are_refused() {
    let s = BASE;
    let x = data::<f32>(s);
    let [q, k, v] = views(s, &x);
    let (dout, dl) = upstream(s);
    let shape = [s.b, s.h, s.tq, s.dv];
    let refused =
        |what: &str, p: &Attend, lse: &[f32], dlse: Option<&[f32]>, cut: usize, dsinks: Option<&mut [f32]>| {
            let (mut dq, mut dk, mut dv) = (vec![0f32; x.q.len()], vec![0f32; x.k.len()], vec![0f32; x.v.len()]);
            let [mut qs, mut ks, mut vs, mut os] = [q.shape, k.shape, v.shape, shape];
            if let Some(x) = [&mut qs, &mut ks, &mut vs, &mut os].into_iter().nth(cut) {
                x[2] -= 1;
            }
            let err = p
                .backward(
                    &q,
                    &k,
                    &v,
                    &Upstream {
                        out: &View::contiguous("out", &dout, shape).unwrap(),
                        lse,
                        dout: &View::contiguous("dout", &dout, os).unwrap(),
                        dlse,
                    },
                    AttendGrads {
                        dq: &mut ViewMut::contiguous("dq", &mut dq, qs).unwrap(),
                        dk: &mut ViewMut::contiguous("dk", &mut dk, ks).unwrap(),
                        dv: &mut ViewMut::contiguous("dv", &mut dv, vs).unwrap(),
                        dsinks,
                        dbias: None,
                    },
                )
                .map_err(|e| e.to_string());
            let err = err.err();
            assert!(err.as_ref().is_some_and(|e| e.contains(what)), "{what}: {err:?}");
        };
    let p = scaled(s);
    for (i, what) in ["dq", "dk", "dv", "dout"].into_iter().enumerate() {
        refused(what, &p, &dl, None, i, None);
    }
    refused("lse", &p, &dl[1..], None, 9, None);
    refused("dlse", &p, &dl, Some(&dl[1..]), 9, None);
    refused("sinks", &p, &dl, None, 9, Some(&mut [0.0; 2]));
    let mut sunk = p.clone();
    sunk.sinks = Some(&[0.0, 1.0]);
    refused("dsinks", &sunk, &dl, None, 9, Some(&mut [0.0; 3]));
    let t = BlockTable { heads: vec![] };
    refused("block table", &p.clone().table(Some(&t)), &dl, None, 9, None);
}

/// The twin's gradients are those of the forward twin: central differences in f64, along random directions.
#[test]
fn the_twin_is_the_derivative_of_the_twin() {
    let s = Shape { b: 2, h: 4, hkv: 2, tq: 9, tk: 11, d: 5, dv: 3, ..BASE };
    let x = data::<f32>(s);
    let operands = [f64s(&x.q), f64s(&x.k), f64s(&x.v), vec![0.3, -1.0, 0.0, 2.0], f64s(&upstream(s).0)];
    let (dout, dlse) = upstream(s);
    let (dout, dlse) = (f64s(&dout), f64s(&dlse));
    let mut bias: Vec<f64> = (0..s.b * s.h * s.tq * s.tk).map(|i| (i as f64 * 0.7).sin()).collect();
    bias[5] = f64::NEG_INFINITY;
    let visible = |_: usize, h: usize, i: usize, j: usize| j <= i + 1 && !(i + h).is_multiple_of(4) && i != 0;
    for (softcap, with_sinks) in [(None, false), (Some(2.0), false), (None, true), (Some(1.5), true)] {
        let loss = |x: &[Vec<f64>], bias: &[f64]| {
            let sinks = with_sinks.then_some(x[3].as_slice());
            let at = |b: usize, h: usize, i: usize, j: usize| bias[((b * s.h + h) * s.tq + i) * s.tk + j];
            let (qs, ks) = ([s.b, s.h, s.tq, s.d], [s.hkv, s.tk, s.dv]);
            let (out, lse) = twin::attend_biased(&x[0], &x[1], &x[2], qs, ks, 0.6, softcap, sinks, &at, &visible);
            let dot =
                |x: &[f64], y: &[f64]| x.iter().zip(y).filter(|x| x.0.is_finite()).map(|(x, y)| x * y).sum::<f64>();
            dot(&out, &dout) + dot(&lse, &dlse)
        };
        let at = |b: usize, h: usize, i: usize, j: usize| bias[((b * s.h + h) * s.tq + i) * s.tk + j];
        let g = twin::attend_backward(
            &operands[0],
            &operands[1],
            &operands[2],
            &dout,
            Some(&dlse),
            [s.b, s.h, s.tq, s.d],
            [s.hkv, s.tk, s.dv],
            0.6,
            softcap,
            with_sinks.then_some(operands[3].as_slice()),
            &at,
            &visible,
        );
        let grads = [g.dq, g.dk, g.dv, if with_sinks { g.dsinks } else { vec![0.0; 4] }, g.dbias];
        for (i, name) in NAMES.into_iter().enumerate() {
            let n = if i == 4 { bias.len() } else { operands[i].len() };
            let dir: Vec<f64> = (0..n).map(|c| (c as f64 * 1.3 + i as f64).cos()).collect();
            let moved = |e: f64| {
                let (mut x, mut b) = (operands.to_vec(), bias.clone());
                let to = if i == 4 { &mut b } else { &mut x[i] };
                to.iter_mut().zip(&dir).for_each(|(x, d)| *x += e * d);
                loss(&x, &b)
            };
            let quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let product: f64 = grads[i].iter().zip(&dir).map(|(g, d)| g * d).sum();
            assert!((quotient - product).abs() < 1e-7 * product.abs().max(1.0), "{name}: {quotient} against {product}");
        }
    }
}

#[test]
fn the_sigmoid_twin_is_the_derivative_of_itself() {
    let s = Shape { b: 2, h: 4, hkv: 2, tq: 9, tk: 11, d: 5, dv: 3, ..BASE };
    let x = data::<f32>(s);
    let operands = [f64s(&x.q), f64s(&x.k), f64s(&x.v)];
    let dout = f64s(&upstream(s).0);
    let visible = |_: usize, h: usize, i: usize, j: usize| j <= i + 1 && !(i + h).is_multiple_of(4);
    let run = |x: &[Vec<f64>], add: f64, softcap| {
        let (qs, ks) = ([s.b, s.h, s.tq, s.d], [s.hkv, s.tk, s.dv]);
        let bias = |_: usize, h: usize, i: usize, j: usize| (h + 2 * i + 3 * j) as f64 * (0.01 + add);
        twin::attend_sigmoid(&x[0], &x[1], &x[2], &dout, qs, ks, 0.6, softcap, -1.0, &bias, &visible)
    };
    for softcap in [None, Some(2.0)] {
        let loss = |x: &[Vec<f64>], add| run(x, add, softcap).0.iter().zip(&dout).map(|(x, y)| x * y).sum::<f64>();
        let g = run(&operands, 0.0, softcap).1;
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-7 * b.abs().max(1.0), "{a} against {b}");
        for (i, grad) in [g.dq, g.dk, g.dv].iter().enumerate() {
            let dir: Vec<f64> = (0..grad.len()).map(|c| (c as f64 * 1.3).cos()).collect();
            let moved = |e: f64| {
                let mut x = operands.to_vec();
                x[i].iter_mut().zip(&dir).for_each(|(x, d)| *x += e * d);
                loss(&x, 0.0)
            };
            near((moved(1e-5) - moved(-1e-5)) / 2e-5, grad.iter().zip(&dir).map(|(g, d)| g * d).sum());
        }
        let along = |r: usize| (r / (s.tq * s.tk) % s.h + 2 * (r / s.tk % s.tq) + 3 * (r % s.tk)) as f64;
        let product = g.dbias.iter().enumerate().map(|(r, g)| g * along(r)).sum();
        near((loss(&operands, 1e-6) - loss(&operands, -1e-6)) / 2e-6, product);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any shape, mask and table: the twin and the error rule.
    #[test]
    fn any_problem(any in problems(250, 300)) {
        let (s, table) = (any.s, any.table());
        let visible = |b: usize, h: usize, i: usize, j: usize| table.as_ref().is_none_or(|t| in_table(s, t, b, h, i, j));
        check(s, &any.params().table(table.as_ref()), None, &visible);
    }
}
