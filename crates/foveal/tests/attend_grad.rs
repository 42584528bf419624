//! Attention inside candle's autograd: directional derivatives against central differences, and against the
//! same attention composed of candle operations.

use candle_core::{D, DType, Device, Tensor, Var};
use foveal::prim::{
    AttendBias, AttendOptions, Band, Normalizer, Sequences, attend, attend_indexed, attend_selected, merge,
};
use foveal::sparse::HeadSelection;
use foveal_kernels::{BlockTable, HeadKeys, HeadTable, KeyLists};
use std::f32::consts::TAU;

/// Smooth, seeded, the same everywhere.
fn wave(seed: usize, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let at = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 1009.0;
    let x: Vec<f32> = (0..n).map(|i| (TAU * at(i)).sin()).collect();
    Tensor::from_vec(x, shape, &Device::Cpu).unwrap()
}

fn number(x: &Tensor) -> f64 {
    f64::from(x.to_dtype(DType::F32).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
}

/// Σ of the outputs (of which −∞ of a row without keys says nothing) under fixed weights.
fn weigh(outs: &[Tensor]) -> Tensor {
    let term = |(i, o): (usize, &Tensor)| {
        let some = o.gt(-1e30).unwrap();
        let o = some.where_cond(o, &o.zeros_like().unwrap()).unwrap();
        (o * wave(90 + i, some.dims())).unwrap().sum_all().unwrap()
    };
    outs.iter().enumerate().map(term).reduce(|a, b| (a + b).unwrap()).unwrap()
}

/// Gradients of `weigh(f(inputs))`.
fn gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Vec<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = weigh(&f(&tensors)).backward().unwrap();
    tensors.iter().map(|x| grads.get(x).unwrap().clone()).collect()
}

/// For each input: ⟨gradient, v⟩ equals (L(x + εv) − L(x − εv)) / 2ε.
fn check(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Vec<Tensor>) {
    let step = 1e-2;
    for (i, grad) in gradients(inputs, &f).into_iter().enumerate() {
        let dir = wave(40 + i, inputs[i].dims());
        let loss = |s: f64| {
            let mut moved = inputs.to_vec();
            moved[i] = (&inputs[i] + (&dir * s).unwrap()).unwrap();
            number(&weigh(&f(&moved)))
        };
        let quotient = (loss(step) - loss(-step)) / (2.0 * step);
        assert_eq!(grad.dims(), inputs[i].dims());
        let product = number(&(&grad * &dir).unwrap());
        let size = number(&(&grad * &dir).unwrap().abs().unwrap()).max(1.0);
        assert!((quotient - product).abs() < 2e-3 * size, "{name} input {i}: {quotient} against {product}");
    }
}

const SHAPE: [usize; 4] = [2, 4, 21, 6];

fn inputs() -> [Tensor; 3] {
    [wave(1, &SHAPE), wave(2, &[2, 2, 30, 6]), wave(3, &[2, 2, 30, 5])]
}

fn tables(rows: bool) -> BlockTable {
    let head = |h: usize| {
        let mut t = HeadTable::from_lists(8, 7, (0..3).map(|i| vec![0, 1 + (h + i) as u32 % 4]).collect());
        t.rows = rows.then(|| (0..t.blocks.len() as u64).map(|i| 0x5b5b >> (i % 4)).collect());
        t
    };
    BlockTable { heads: (0..8).map(head).collect() }
}

fn lists() -> KeyLists {
    let head = |h: usize| HeadKeys::from_lists(4, (0..6).map(|g| vec![g, 3 * g + h as u32, 29]).collect());
    KeyLists { heads: (0..8).map(head).collect() }
}

fn sinks() -> Tensor {
    Tensor::new(&[0.3f32, -1.0, 0.0, 2.0], &Device::Cpu).unwrap()
}

/// Gradients of sinks and of every kind of bias, each beside those of q, k and v.
#[test]
fn biases_and_sinks() {
    let t = tables(true);
    type Of = fn(&[Tensor]) -> AttendBias;
    let cases: [(&str, Vec<Tensor>, Of); 8] = [
        ("slopes", vec![wave(5, &[4])], |x| AttendBias::Alibi((&x[0] * 0.1).unwrap())),
        ("dense", vec![wave(5, &[2, 4, 21, 30])], |x| AttendBias::Dense(x[0].clone())),
        ("dense of all", vec![wave(5, &[21, 30])], |x| AttendBias::Dense(x[0].clone())),
        ("keys", vec![wave(5, &[2, 4, 30])], |x| AttendBias::Keys(x[0].clone())),
        ("keys of heads", vec![wave(5, &[4, 30])], |x| AttendBias::Keys(x[0].clone())),
        ("table", vec![wave(5, &[1, 9])], |x| AttendBias::Relative { table: x[0].clone(), left: 7 }),
        ("factors", vec![wave(5, &[2, 4, 21, 3]), wave(6, &[2, 4, 30, 3])], |x| AttendBias::Factors {
            q: x[0].clone(),
            k: x[1].clone(),
        }),
        ("factors of all", vec![wave(5, &[21, 2]), wave(6, &[30, 2])], |x| AttendBias::Factors {
            q: x[0].clone(),
            k: x[1].clone(),
        }),
    ];
    for (name, operands, bias) in cases {
        for normalizer in [Normalizer::Softmax, Normalizer::Sigmoid { bias: -2.0 }] {
            let softmax = normalizer == Normalizer::Softmax;
            let all = inputs().into_iter().chain(operands.clone()).chain(softmax.then(sinks));
            let run = |x: &[Tensor]| {
                let mut o = AttendOptions { softcap: Some(4.0), normalizer, ..AttendOptions::causal() };
                o.bias = Some(bias(&x[3..]));
                o.sinks = if softmax { x.last().cloned() } else { None };
                let a = attend(&x[0], &x[1], &x[2], &o, Some(&t)).unwrap();
                if softmax { vec![a.out, a.lse] } else { vec![a.out] }
            };
            let all: Vec<Tensor> = all.collect();
            check(name, &all, run);
        }
    }
}

/// Only a bias asks for gradients, twice over; its gradient is that which it has among others.
#[test]
fn a_bias_alone() {
    let [q, k, v] = inputs();
    let table = Var::from_tensor(&wave(5, &[4, 9])).unwrap();
    let o = |table: &Tensor| AttendOptions {
        bias: Some(AttendBias::Relative { table: table.clone(), left: 7 }),
        sinks: Some(sinks()),
        ..AttendOptions::causal()
    };
    let loss = weigh(&[attend(&q, &k, &v, &o(&table), None).unwrap().out]);
    let all = gradients(&[q.clone(), k, v, table.as_tensor().clone()], |x| {
        vec![attend(&x[0], &x[1], &x[2], &o(&x[3]), None).unwrap().out]
    });
    for _ in 0..2 {
        let grads = loss.backward().unwrap();
        assert!(grads.get(&q).is_none());
        assert_eq!(number(&(grads.get(&table).unwrap() - &all[3]).unwrap().abs().unwrap()), 0.0);
    }
}

#[test]
fn ragged_batches() {
    let cu = Sequences { q: vec![0, 9, 9, 21], k: vec![0, 12, 17, 30] };
    let inputs = [wave(1, &[1, 4, 21, 6]), wave(2, &[1, 2, 30, 6]), wave(3, &[1, 2, 30, 5]), wave(4, &[4, 7])];
    check("ragged", &inputs, |x| {
        let bias = Some(AttendBias::Relative { table: x[3].clone(), left: 5 });
        let o = AttendOptions { cu_seqlens: Some(cu.clone()), bias, ..AttendOptions::causal() };
        let a = attend(&x[0], &x[1], &x[2], &o, None).unwrap();
        vec![a.out, a.lse]
    });
    // Each sequence by itself.
    let o = AttendOptions { cu_seqlens: Some(cu.clone()), ..AttendOptions::causal() };
    let whole = attend(&inputs[0], &inputs[1], &inputs[2], &o, None).unwrap();
    for (q, k) in cu.q.windows(2).zip(cu.k.windows(2)) {
        let part = |x: &Tensor, w: &[usize]| x.narrow(2, w[0], w[1] - w[0]).unwrap();
        let one = [part(&inputs[0], q), part(&inputs[1], k), part(&inputs[2], k)];
        let one = attend(&one[0], &one[1], &one[2], &AttendOptions::causal(), None).unwrap();
        assert!(number(&(part(&whole.out, q) - one.out).unwrap().abs().unwrap()) < 1e-4);
    }
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let [q, k, v] = inputs();
    let refused = |o: AttendOptions, what: &str| {
        let e = attend(&q, &k, &v, &o, None).unwrap_err().to_string();
        assert!(e.contains(what), "{what}: {e}");
    };
    let with = |bias| AttendOptions { bias: Some(bias), ..AttendOptions::default() };
    refused(with(AttendBias::Alibi(wave(1, &[3]))), "slopes");
    refused(with(AttendBias::Dense(wave(1, &[21, 29]))), "broadcasts");
    refused(with(AttendBias::Keys(wave(1, &[4, 29]))), "bias of keys");
    refused(with(AttendBias::Factors { q: wave(1, &[21, 2]), k: wave(1, &[30, 3]) }), "key factors");
    refused(AttendOptions { sinks: Some(wave(1, &[5])), ..AttendOptions::default() }, "sinks");
    let both = AttendOptions { window: Some(3), band: Some(Band::window(3)), ..AttendOptions::default() };
    refused(both, "window");
    let cu = Some(Sequences { q: vec![0, 21], k: vec![0, 30] });
    refused(AttendOptions { cu_seqlens: cu, ..AttendOptions::default() }, "batch");
}

#[test]
fn masks_and_options() {
    let options = [
        AttendOptions::default(),
        AttendOptions::causal(),
        AttendOptions { window: Some(5), ..AttendOptions::causal() },
        AttendOptions { softcap: Some(1.5), scale: Some(0.9), ..AttendOptions::causal() },
        AttendOptions { normalizer: Normalizer::Sigmoid { bias: -3.0 }, ..AttendOptions::causal() },
        AttendOptions { sinks: Some(sinks()), ..AttendOptions::causal() },
        AttendOptions { band: Some(Band { left: 5, right: 3 }), ..AttendOptions::default() },
    ];
    for o in options {
        check(&format!("{o:?}"), &inputs(), |x| {
            let a = attend(&x[0], &x[1], &x[2], &o, None).unwrap();
            vec![a.out, a.lse]
        });
        // The log-sum-exp is not always asked for, and rows may lie anywhere.
        let [q, k, v] = inputs();
        let turned = [q.transpose(1, 2).unwrap().contiguous().unwrap(), k, v];
        check("turned", &turned, |x| vec![attend(&x[0].transpose(1, 2).unwrap(), &x[1], &x[2], &o, None).unwrap().out]);
    }
}

#[test]
fn tables_and_lists() {
    let o = AttendOptions::causal();
    for rows in [false, true] {
        let t = tables(rows);
        check("table", &inputs(), |x| {
            let a = attend(&x[0], &x[1], &x[2], &o, Some(&t)).unwrap();
            vec![a.out, a.lse]
        });
    }
    let l = lists();
    check("lists", &inputs(), |x| {
        let a = attend_indexed(&x[0], &x[1], &x[2], &o, &l).unwrap();
        vec![a.out, a.lse]
    });
    let selections = |rows| -> Vec<HeadSelection> {
        let both = tables(rows).heads.into_iter().zip(lists().heads);
        both.map(|(t, l)| HeadSelection::of_both(t, l)).collect()
    };
    for rows in [false, true] {
        check("both", &inputs(), |x| vec![attend_selected(&x[0], &x[1], &x[2], &o, selections(rows)).unwrap().out]);
    }
    // Groups of 10 beside blocks of 8.
    let selections = || -> Vec<HeadSelection> {
        let lists = tables(true).heads.into_iter().map(|t| {
            let n = (t.indptr.len() - 1) * t.block_q;
            let keys = HeadKeys::from_lists(t.block_q + 2, vec![vec![0, 2, 5]; n.div_ceil(t.block_q + 2)]);
            HeadSelection { blocks: Some(t), keys: Some(keys), ..HeadSelection::default() }
        });
        lists.collect()
    };
    check("apart", &inputs(), |x| vec![attend_selected(&x[0], &x[1], &x[2], &o, selections()).unwrap().out]);
    // Merging has no backward pass and says so.
    let [q, k, v] = inputs();
    let q = Var::from_tensor(&q).unwrap();
    let part = attend(&q, &k, &v, &o, None).unwrap();
    assert!(merge(&part, &part).is_err());
}

/// The same as candle operations compute that are differentiated one by one.
#[test]
fn composed_of_candle_operations() {
    let [q, k, v] = [wave(1, &[1, 2, 12, 8]), wave(2, &[1, 2, 12, 8]), wave(3, &[1, 2, 12, 8])];
    let inputs = [q, k, v];
    let hidden: Vec<f32> = (0..144).map(|i| if i % 12 > i / 12 { f32::NEG_INFINITY } else { 0.0 }).collect();
    let hidden = Tensor::from_vec(hidden, (1, 1, 12, 12), &Device::Cpu).unwrap();
    let want = gradients(&inputs, |x| {
        let s = (x[0].matmul(&x[1].t().unwrap()).unwrap() * (1.0 / 8f64.sqrt())).unwrap();
        let e = s.broadcast_add(&hidden).unwrap().exp().unwrap();
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1).unwrap()).unwrap();
        vec![p.matmul(&x[2]).unwrap()]
    });
    let got = gradients(&inputs, |x| vec![attend(&x[0], &x[1], &x[2], &AttendOptions::causal(), None).unwrap().out]);
    for (a, b) in got.iter().zip(&want) {
        assert!(number(&(a - b).unwrap().abs().unwrap()) < 1e-4);
    }
}

#[test]
fn forward_is_that_without_gradients() {
    let [q, k, v] = inputs().map(|x| x.to_dtype(DType::BF16).unwrap());
    let o = AttendOptions::causal();
    let plain = attend(&q, &k, &v, &o, None).unwrap();
    assert!(!plain.out.track_op());
    let var = Var::from_tensor(&k).unwrap();
    let tracked = attend(&q, &var, &v, &o, None).unwrap();
    assert_eq!((tracked.out.stride(), tracked.work), (plain.out.stride(), plain.work));
    assert_eq!(number(&(&tracked.out - &plain.out).unwrap().abs().unwrap()), 0.0);
    let grads = tracked.out.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&var).unwrap().dtype(), DType::BF16);
    assert!(attend(&q, &var, &v.to_dtype(DType::F32).unwrap(), &o, None).is_err());
}
