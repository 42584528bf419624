//! Calls of the kernels on fixed data: what `benches/kernels.rs` times and `examples/counts.rs` counts instructions of.

use foveal_kernels::conv::{
    Boundary, DampedEma, LongGrads, ShortConv, Signal, SignalMut, long_conv, long_conv_backward,
};
use foveal_kernels::decode::{Codec, Decode, Segment};
use foveal_kernels::elementwise::{rms_norm, softmax_rows};
use foveal_kernels::exp::{Fun, apply_to};
use foveal_kernels::feature::{FeatureAttend, ToeplitzForm};
use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{
    Attend, AttendGrads, BlockTable, Element, HeadKeys, HeadTable, Isa, KeyLists, PackedLinear, Upstream, View,
    ViewMut, WeightFormat, Work, attend_indexed,
};
use half::bf16;

/// One call; returns its work.
pub type Call = Box<dyn FnMut() -> Work>;

/// How large the operands are.
pub struct Size {
    /// Query heads, a multiple of 3; a third as many key/value heads for decode.
    pub heads: usize,
    /// Tokens of attention and recurrences.
    pub tokens: usize,
    /// Keys that decode reads.
    pub keys: usize,
    /// Channels of convolutions.
    pub channels: usize,
    /// Samples of convolutions.
    pub samples: usize,
    /// Features of linear layers, in and out.
    pub width: usize,
    /// Rows of a linear layer's prompt.
    pub rows: usize,
    /// Elements of row operations.
    pub numbers: usize,
}

const D: usize = 64;

/// Every case, in a fixed order.
pub const NAMES: [&str; 29] = [
    "attend full f32",
    "attend causal f32",
    "attend causal bf16",
    "attend blocks f32",
    "attend_indexed f32",
    "attend backward f32",
    "attend backward bf16",
    "decode f32",
    "decode bf16",
    "decode int8",
    "recur scalar bf16",
    "recur delta f32",
    "recur scalar backward f32",
    "recur step f32",
    "feature causal f32",
    "feature toeplitz direct f32",
    "feature toeplitz fourier f32",
    "long_conv f32",
    "long_conv backward f32",
    "short_conv f32",
    "ema f32",
    "linear f32 1 row",
    "linear bf16 1 row",
    "linear int8 1 row",
    "linear int4 1 row",
    "linear bf16 rows",
    "exp f32",
    "softmax f32",
    "rms_norm f32",
];

/// Even in −1..1, the same everywhere.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let next = || {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// The case of this name.
pub fn make(name: &str, n: &Size) -> Call {
    let words: Vec<&str> = name.split(' ').collect();
    match words[..] {
        ["attend", "backward", "f32"] => attend_backward(n, |x| x.to_vec()),
        ["attend", "backward", "bf16"] => attend_backward(n, narrow),
        ["attend", mask, "bf16"] => attend(n, mask, narrow),
        ["attend", mask, "f32"] => attend(n, mask, |x| x.to_vec()),
        ["attend_indexed", "f32"] => indexed(n),
        ["decode", dtype] => decode(n, dtype),
        ["recur", "scalar", "bf16"] => recur(n, "scalar", narrow),
        ["recur", "step", "f32"] => recur_step(n),
        ["recur", gate, ..] => recur(n, if words.contains(&"backward") { "backward" } else { gate }, |x| x.to_vec()),
        ["feature", form, ..] => feature(n, if form == "causal" { form } else { words[2] }),
        ["long_conv", ..] => long(n, words.contains(&"backward")),
        ["short_conv", ..] => short(n),
        ["ema", ..] => ema(n),
        ["linear", format, .., rows] => linear(n, format, if rows == "row" { 1 } else { n.rows }),
        ["exp", ..] => exp(n),
        ["softmax", ..] => softmax(n),
        ["rms_norm", ..] => norm(n),
        _ => panic!("no case {name}"),
    }
}

fn attend<T: Element>(n: &Size, mask: &str, cast: fn(&[f32]) -> Vec<T>) -> Call {
    let (h, t) = (n.heads, n.tokens);
    let [q, k, v] = [1, 2, 3].map(|s| cast(&noise(h * t * D, s)));
    let mut out = vec![0f32; h * t * D];
    let causal = mask != "full";
    // Every fourth block of 64, and the query's own.
    let lists = |_| {
        let list = |i: usize| (0..=i as u32).filter(|j| *j == i as u32 || (j + i as u32).is_multiple_of(4)).collect();
        HeadTable::from_lists(64, 64, (0..t.div_ceil(64)).map(list).collect())
    };
    let table = (mask == "blocks").then(|| BlockTable { heads: (0..h).map(lists).collect() });
    Box::new(move || {
        let shape = [1, h, t, D];
        let attend = Attend::new(0.125).causal(causal).table(table.as_ref()).isa(Isa::active());
        let view = |x| View::contiguous("operand", x, shape).expect("shape");
        let mut o = ViewMut::contiguous("out", &mut out, shape).expect("shape");
        attend.run(&view(&q), &view(&k), &view(&v), &mut o, None).expect("call")
    })
}

fn attend_backward<T: Element>(n: &Size, cast: fn(&[f32]) -> Vec<T>) -> Call {
    let (h, t) = (n.heads, n.tokens);
    let shape = [1, h, t, D];
    let [q, k, v] = [1, 2, 3].map(|s| cast(&noise(h * t * D, s)));
    let dout = noise(h * t * D, 4);
    let (mut out, mut lse) = (vec![0f32; h * t * D], vec![0f32; h * t]);
    let attend = || Attend::new(0.125).causal(true).isa(Isa::active());
    {
        let view = |x| View::contiguous("operand", x, shape).expect("shape");
        let mut o = ViewMut::contiguous("out", &mut out, shape).expect("shape");
        attend().run(&view(&q), &view(&k), &view(&v), &mut o, Some(&mut lse)).expect("call");
    }
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0f32; h * t * D]);
    Box::new(move || {
        let view = |x| View::contiguous("operand", x, shape).expect("shape");
        let wide = |x| View::contiguous("operand", x, shape).expect("shape");
        let up = Upstream { out: &wide(&out), lse: &lse, dout: &wide(&dout), dlse: None };
        let grads = AttendGrads {
            dq: &mut ViewMut::contiguous("dq", &mut dq, shape).expect("shape"),
            dk: &mut ViewMut::contiguous("dk", &mut dk, shape).expect("shape"),
            dv: &mut ViewMut::contiguous("dv", &mut dv, shape).expect("shape"),
            dsinks: None,
            dbias: None,
        };
        attend().backward(&view(&q), &view(&k), &view(&v), &up, grads).expect("call")
    })
}

fn indexed(n: &Size) -> Call {
    let (h, t) = (n.heads, n.tokens);
    let shape = [1, h, t, D];
    let [q, k, v] = [1, 2, 3].map(|s| noise(h * t * D, s));
    let mut out = vec![0f32; h * t * D];
    // A quarter of the keys for each 16 queries.
    let list = |g: usize| (0..t as u32).filter(|j| (j.wrapping_mul(2_654_435_761) >> 20) % 4 == g as u32 % 4).collect();
    let heads = (0..h).map(|_| HeadKeys::from_lists(16, (0..t.div_ceil(16)).map(list).collect())).collect();
    let lists = KeyLists { heads };
    Box::new(move || {
        let view = |x| View::contiguous("operand", x, shape).expect("shape");
        let mut o = ViewMut::contiguous("out", &mut out, shape).expect("shape");
        let attend = Attend::new(0.125).isa(Isa::active());
        attend_indexed(&attend, &lists, &view(&q), &view(&k), &view(&v), &mut o, None).expect("call")
    })
}

fn decode(n: &Size, dtype: &str) -> Call {
    let (h, t) = (n.heads, n.keys);
    let rows = |seed: u32| (0..h / 3).map(|i| noise(t * D, seed + i as u32)).collect::<Vec<_>>();
    let (q, k, v) = (noise(h * D, 1), rows(10), rows(50));
    let (mut out, mut lse) = (vec![0f32; h * D], vec![0f32; h]);
    let dtype = dtype.to_string();
    let half: Vec<_> = k.iter().zip(&v).map(|(k, v)| (narrow(k), narrow(v))).collect();
    let bytes = |x: &[f32]| x.iter().map(|x| (x * 127.0) as i8).collect::<Vec<i8>>();
    let int8: Vec<_> = k.iter().zip(&v).map(|(k, v)| (bytes(k), bytes(v))).collect();
    let scales = vec![1.0 / 127.0; t];
    Box::new(move || {
        let segments: Vec<Vec<Segment>> = (0..h / 3)
            .map(|i| {
                let codec = |second: bool| {
                    let of = |a, b| if second { b } else { a };
                    match dtype.as_str() {
                        "f32" => Codec::F32 { data: if second { &v[i] } else { &k[i] }, stride: D },
                        "bf16" => Codec::Bf16 { data: of(&half[i].0, &half[i].1), stride: D },
                        _ => {
                            let data = if second { &int8[i].1 } else { &int8[i].0 };
                            Codec::Int8 { data, stride: D, scales: &scales }
                        }
                    }
                };
                vec![Segment { k: codec(false), v: codec(true), len: t, channels: None }]
            })
            .collect();
        Decode::new(0.125).run(&q, [h, 1, D], &segments, D, None, &mut out, &mut lse).expect("call")
    })
}

fn recur<T: Element>(n: &Size, what: &str, cast: fn(&[f32]) -> Vec<T>) -> Call {
    let (h, t) = (n.heads, n.tokens);
    let [q, k, v] = [(1, 0.5), (2, 0.2), (3, 1.0)]
        .map(|(s, size)| cast(&noise(h * t * D, s).iter().map(|x| x * size).collect::<Vec<_>>()));
    let g: Vec<f32> = noise(h * t, 4).iter().map(|x| 0.05 * (x - 1.0)).collect();
    let beta: Vec<f32> = noise(h * t, 5).iter().map(|x| 0.5 * x + 0.5).collect();
    let (mut out, dout) = (vec![0f32; h * t * D], noise(h * t * D, 6));
    let (delta, backward) = (what == "delta", what == "backward");
    Box::new(move || {
        let shape = [1, h, t, D];
        let view = |x| View::contiguous("operand", x, shape).expect("shape");
        let gate = |x| View::contiguous("gate", x, [1, h, t, 1]).expect("shape");
        let gate = if delta { Gate::Delta { beta: gate(&beta) } } else { Gate::Scalar { g: gate(&g) } };
        let (r, q, k, v) = (Recur::new(gate, 0.125), view(&q), view(&k), view(&v));
        if backward {
            let dout = View::contiguous("dout", &dout, shape).expect("shape");
            return r.backward(&q, &k, &v, None, &dout, None).expect("call").1;
        }
        r.forward(&q, &k, &v, None, &mut ViewMut::contiguous("out", &mut out, shape).expect("shape"), None)
            .expect("call")
    })
}

fn recur_step(n: &Size) -> Call {
    let h = n.heads;
    let [q, k, v] = [1, 2, 3].map(|s| noise(h * D, s));
    let g: Vec<f32> = noise(h, 4).iter().map(|x| 0.05 * (x - 1.0)).collect();
    let (mut state, mut out) = (noise(h * D * D, 5), vec![0f32; h * D]);
    Box::new(move || {
        let view = |x, d| View::contiguous("operand", x, [1, h, 1, d]).expect("shape");
        let mut o = ViewMut::contiguous("out", &mut out, [1, h, 1, D]).expect("shape");
        let r = Recur::new(Gate::Scalar { g: view(&g, 1) }, 0.125);
        r.step(&view(&q, D), &view(&k, D), &view(&v, D), &mut state, &mut o).expect("call")
    })
}

fn feature(n: &Size, form: &str) -> Call {
    let (h, t) = (n.heads, n.tokens);
    let [q, k, v] = [1, 2, 3].map(|s| noise(h * t * D, s));
    let c = noise(h * (2 * t - 1), 4);
    let mut out = vec![0f32; h * t * D];
    let form = match form {
        "direct" => Some(ToeplitzForm::Direct),
        "fourier" => Some(ToeplitzForm::Fourier),
        _ => None,
    };
    Box::new(move || {
        let shape = [1, h, t, D];
        let view = |x| View::contiguous("operand", x, shape).expect("shape");
        let p = FeatureAttend {
            causal: true,
            normalise: Some(1e-3),
            weights: form.map(|_| &c[..]),
            form: form.unwrap_or_default(),
            isa: Some(Isa::active()),
        };
        let mut o = ViewMut::contiguous("out", &mut out, shape).expect("shape");
        p.run(&view(&q), &view(&k), &view(&v), &mut o, None).expect("call")
    })
}

fn long(n: &Size, backward: bool) -> Call {
    let (c, t) = (n.channels, n.samples);
    let (h, u, d) = (noise(c * t, 1), noise(c * t, 2), noise(c, 3));
    let (mut y, mut dh, mut dd) = (vec![0f32; c * t], vec![0f32; c * t], vec![0f32; c]);
    Box::new(move || {
        let signal = |x| Signal::channel_major("signal", x, [1, c, t]).expect("shape");
        let mut out = SignalMut::channel_major("y", &mut y, [1, c, t]).expect("shape");
        if backward {
            let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh), dd: Some(&mut dd) };
            let (boundary, isa) = (Boundary::Causal, Isa::active());
            return long_conv_backward(&signal(&h), &signal(&u), Some(&d), &signal(&u), grads, boundary, isa)
                .expect("call");
        }
        long_conv(&signal(&h), &signal(&u), Some(&d), &mut out, Boundary::Causal, Isa::active()).expect("call")
    })
}

fn short(n: &Size) -> Call {
    let (c, t) = (n.channels, n.samples);
    let (x, w, bias) = (noise(c * t, 1), noise(c * 4, 2), noise(c, 3));
    let mut y = vec![0f32; c * t];
    Box::new(move || {
        let conv = ShortConv::new(&w, c, Some(&bias), true, Isa::active()).expect("shape");
        let xs = Signal::time_major("x", &x, [1, c, t]).expect("shape");
        let mut out = SignalMut::time_major("y", &mut y, [1, c, t]).expect("shape");
        conv.forward(&xs, None, None, &mut out, None).expect("call")
    })
}

fn ema(n: &Size) -> Call {
    const STATES: usize = 16;
    let (c, t) = (n.channels, n.samples);
    let gate: Vec<f32> = noise(c * STATES, 1).into_iter().map(|x| 0.5 + 0.4 * x).collect();
    let (beta, u) = (noise(c * STATES, 2), noise(c * t, 3));
    let mut y = vec![0f32; c * t];
    Box::new(move || {
        let ema = DampedEma::new(&gate, &gate, &beta, &beta, c, Isa::active()).expect("shape");
        let us = Signal::time_major("u", &u, [1, c, t]).expect("shape");
        let mut out = SignalMut::time_major("y", &mut y, [1, c, t]).expect("shape");
        ema.forward(&us, None, &mut out, None).expect("call")
    })
}

fn linear(n: &Size, format: &str, rows: usize) -> Call {
    let format = match format {
        "f32" => WeightFormat::F32,
        "bf16" => WeightFormat::Bf16,
        "int8" => WeightFormat::Int8,
        _ => WeightFormat::Int4,
    };
    let w = PackedLinear::pack(&noise(n.width * n.width, 1), n.width, n.width, format).expect("shape");
    let (x, mut out) = (noise(rows * n.width, 2), vec![0f32; rows * n.width]);
    Box::new(move || w.forward(&x, rows, &mut out, Isa::active()).expect("call"))
}

fn exp(n: &Size) -> Call {
    let x: Vec<f32> = noise(n.numbers, 1).iter().map(|x| x * 10.0 - 10.0).collect();
    let mut y = vec![0f32; n.numbers];
    Box::new(move || {
        apply_to(Fun::Exp, &x, &mut y, Isa::active()).expect("lengths");
        // One exponential counts as one operation.
        Work { flops: x.len() as u64, bytes: 8 * x.len() as u64, ..Work::default() }
    })
}

fn softmax(n: &Size) -> Call {
    let (x, mut y) = (noise(n.numbers, 1), vec![0f32; n.numbers]);
    Box::new(move || {
        y.copy_from_slice(&x);
        softmax_rows(&mut y, 1024, Isa::active()).expect("rows")
    })
}

fn norm(n: &Size) -> Call {
    let (x, w, mut y) = (noise(n.numbers, 1), noise(1024, 2), vec![0f32; n.numbers]);
    Box::new(move || rms_norm(&x, &w, 1e-5, &mut y, Isa::active()).expect("rows"))
}
