//! Times single kernel calls on request, so that another library can be timed in turn with them;
//! `benches/peers/` drives it.
//!
//! Each line of standard input is one request, each answer one line of JSON:
//!
//!     attend B H HKV T D f32|bf16 full|causal   exact attention, {"seconds", "flops"}
//!     attend_grad B H HKV T D f32|bf16 full|causal   the same and its backward pass, with {"forward"} seconds
//!     sparse B H HKV T D f32|bf16 KIND BLOCK PERCENT full|causal   over random keys as `attend_density` makes them
//!     sparse_grad ...                           the backward pass of the same, alone
//!     linear M N K f32|bf16|int8|int4           y = x·Wᵀ of M rows, {"seconds", "flops"}
//!     long_conv C T causal|ready|circular|backward   C channels of T samples, filters as long, seconds
//!     recur B H T D f32|bf16 GATE               chunked recurrence, {"seconds", "flops"}
//!     recur_grad B H T D f32|bf16 GATE          the same and its backward pass, {"seconds", "flops" of both}
//!     exp N CALLS                               e^x of N numbers on one thread, seconds of one call
//!     decode H HKV T D f32|bf16|int8|int4       one query over T keys and values, on the pool, with {"bytes"}
//!     stream BYTES                              reads so many bytes on the pool, seconds
//!     read MIB THREADS                          sums MIB mebibytes, seconds and bytes
//!
//! GATE is identity, scalar, channel, delta, gated_delta, channel_delta, low_rank or ssd.
//!
//! The first request of a kind and shape makes the operands and warms up; a repeated line times one
//! call on the same operands. FOVEAL_ISA caps the instruction set, RAYON_NUM_THREADS the threads.

#[path = "common/visited.rs"]
mod visited;

use foveal_kernels::conv::{Boundary, LongConv, LongGrads, Signal, SignalMut, long_conv, long_conv_backward};
use foveal_kernels::decode::{Codec, Decode, Segment, int4_row_bytes, pack_int4};
use foveal_kernels::exp::{Fun, apply_to};
use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{
    Attend, AttendGrads, Element, Isa, PackedLinear, Upstream, View, ViewMut, WeightFormat, attend_indexed,
    attend_indexed_backward,
};
use half::bf16;
use rayon::prelude::*;
use std::io::{BufRead, Write};
use std::time::Instant;
use visited::Visited;

type Failure = Box<dyn std::error::Error>;
/// One call under the clock: seconds, and the fields to answer beside them.
type Call = Box<dyn FnMut() -> Result<(f64, String), Failure>>;

fn noise() -> impl FnMut() -> f32 {
    let mut seed = 1u64;
    move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((seed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 3.4
    }
}

fn attend<T: Element>(
    [b, h, hkv, t, d]: [usize; 5],
    causal: bool,
    narrow: impl Fn(f32) -> T + 'static,
) -> Result<Call, Failure> {
    if [b, h, hkv, t, d].contains(&0) {
        return Err("a dimension is 0".into());
    }
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| narrow(random())).collect::<Vec<T>>();
    let (q, k, v) = (some(b * h * t * d), some(b * hkv * t * d), some(b * hkv * t * d));
    let mut out = vec![0f32; b * h * t * d];
    let call = move |q: &[T], k: &[T], v: &[T], out: &mut [f32]| -> Result<(f64, String), Failure> {
        let (qs, ks) = ([b, h, t, d], [b, hkv, t, d]);
        let attend = Attend::new(1.0 / (d as f32).sqrt()).causal(causal).isa(Isa::active());
        let begin = Instant::now();
        let work = attend.run(
            &View::contiguous("q", q, qs)?,
            &View::contiguous("k", k, ks)?,
            &View::contiguous("v", v, ks)?,
            &mut ViewMut::contiguous("out", out, qs)?,
            None,
        )?;
        Ok((begin.elapsed().as_secs_f64(), format!(", \"flops\": {}", work.flops)))
    };
    Ok(Box::new(move || call(&q, &k, &v, &mut out)))
}

fn attend_grad<T: Element>(
    [b, h, hkv, t, d]: [usize; 5],
    causal: bool,
    narrow: impl Fn(f32) -> T + 'static,
) -> Result<Call, Failure> {
    if [b, h, hkv, t, d].contains(&0) {
        return Err("a dimension is 0".into());
    }
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| narrow(random())).collect::<Vec<T>>();
    let (qs, ks) = ([b, h, t, d], [b, hkv, t, d]);
    let (nq, nk) = (b * h * t * d, b * hkv * t * d);
    let (q, k, v) = (some(nq), some(nk), some(nk));
    let dout: Vec<f32> = some(nq).into_iter().map(T::to_f32).collect();
    Ok(Box::new(move || {
        // Results are the call's own, as they are in another library.
        let begin = Instant::now();
        let attend = Attend::new(1.0 / (d as f32).sqrt()).causal(causal).isa(Isa::active());
        let (q, k, v) =
            (View::contiguous("q", &q, qs)?, View::contiguous("k", &k, ks)?, View::contiguous("v", &v, ks)?);
        let (mut out, mut lse) = (vec![0f32; nq], vec![0f32; b * h * t]);
        attend.run(&q, &k, &v, &mut ViewMut::contiguous("out", &mut out, qs)?, Some(&mut lse))?;
        let forward = begin.elapsed().as_secs_f64();
        let (mut dq, mut dk, mut dv) = (vec![0f32; nq], vec![0f32; nk], vec![0f32; nk]);
        let work = attend.backward(
            &q,
            &k,
            &v,
            &Upstream {
                out: &View::contiguous("out", &out, qs)?,
                lse: &lse,
                dout: &View::contiguous("dout", &dout, qs)?,
                dlse: None,
            },
            AttendGrads {
                dq: &mut ViewMut::contiguous("dq", &mut dq, qs)?,
                dk: &mut ViewMut::contiguous("dk", &mut dk, ks)?,
                dv: &mut ViewMut::contiguous("dv", &mut dv, ks)?,
                dsinks: None,
                dbias: None,
            },
        )?;
        let seconds = begin.elapsed().as_secs_f64();
        std::hint::black_box((&dq, &dk, &dv));
        Ok((seconds, format!(", \"forward\": {forward:e}, \"backward_flops\": {}", work.flops)))
    }))
}

/// Attention over random choices of keys, or with `grad` its backward pass alone.
fn sparse<T: Element>(
    [b, h, hkv, t, d]: [usize; 5],
    kind: &str,
    [block, percent]: [usize; 2],
    causal: bool,
    grad: bool,
) -> Result<Call, Failure> {
    if [b, h, hkv, t, d, block].contains(&0) {
        return Err("a dimension is 0".into());
    }
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| T::from_f32(random())).collect::<Vec<T>>();
    let (qs, ks) = ([b, h, t, d], [b, hkv, t, d]);
    let (nq, nk) = (b * h * t * d, b * hkv * t * d);
    let (q, k, v) = (some(nq), some(nk), some(nk));
    let dout: Vec<f32> = some(nq).into_iter().map(T::to_f32).collect();
    let mut unit = || random() / 3.4 + 0.5;
    let visited = match percent {
        100 => Visited::DENSE,
        _ => Visited::random(kind, b * h, t, block, percent as f32 / 100.0, &mut unit),
    };
    let (mut out, mut lse) = (vec![0f32; nq], vec![0f32; b * h * t]);
    let (mut dq, mut dk, mut dv) = (vec![0f32; nq], vec![0f32; nk], vec![0f32; nk]);
    Ok(Box::new(move || {
        let p = Attend::new(1.0 / (d as f32).sqrt()).causal(causal).isa(Isa::active()).table(visited.table.as_ref());
        let (q, k, v) =
            (View::contiguous("q", &q, qs)?, View::contiguous("k", &k, ks)?, View::contiguous("v", &v, ks)?);
        let mut begin = Instant::now();
        let mut o = ViewMut::contiguous("out", &mut out, qs)?;
        let mut work = match &visited.lists {
            None => p.run(&q, &k, &v, &mut o, Some(&mut lse))?,
            Some(l) => attend_indexed(&p, l, &q, &k, &v, &mut o, Some(&mut lse))?,
        };
        if grad {
            let out = View::contiguous("out", &out, qs)?;
            let up = Upstream { out: &out, lse: &lse, dout: &View::contiguous("dout", &dout, qs)?, dlse: None };
            begin = Instant::now();
            let grads = AttendGrads {
                dq: &mut ViewMut::contiguous("dq", &mut dq, qs)?,
                dk: &mut ViewMut::contiguous("dk", &mut dk, ks)?,
                dv: &mut ViewMut::contiguous("dv", &mut dv, ks)?,
                dsinks: None,
                dbias: None,
            };
            work = match &visited.lists {
                None => p.backward(&q, &k, &v, &up, grads)?,
                Some(l) => attend_indexed_backward(&p, l, &q, &k, &v, &up, grads)?,
            };
        }
        Ok((begin.elapsed().as_secs_f64(), format!(", \"pairs\": {}", work.pairs)))
    }))
}

fn linear([m, n, k]: [usize; 3], format: WeightFormat) -> Result<Call, Failure> {
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| random()).collect::<Vec<f32>>();
    let (x, w) = (some(m * k), some(n * k));
    let layer = PackedLinear::pack(&w, n, k, format)?;
    let mut out = vec![0f32; m * n];
    Ok(Box::new(move || {
        let begin = Instant::now();
        let work = layer.forward(&x, m, &mut out, Isa::active())?;
        Ok((begin.elapsed().as_secs_f64(), format!(", \"flops\": {}", work.flops)))
    }))
}

/// Long convolution of one batch row: with filters to transform or spectra that are ready, around a ring, or the gradients
/// of input, filter and skip.
fn long([c, t]: [usize; 2], form: &str) -> Result<Call, Failure> {
    let boundary = match form {
        "causal" | "ready" | "backward" => Boundary::Causal,
        "circular" => Boundary::Circular,
        _ => return Err("the form is causal, ready, circular or backward".into()),
    };
    if c * t == 0 {
        return Err("a dimension is 0".into());
    }
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| random()).collect::<Vec<f32>>();
    let (h, u, d) = (some(c * t), some(c * t), some(c));
    let (ready, backward) = (form == "ready", form == "backward");
    let kept = match ready {
        true => Some(LongConv::new(&Signal::channel_major("h", &h, [1, c, t])?, t, boundary, Isa::active())?),
        false => None,
    };
    Ok(Box::new(move || {
        let begin = Instant::now();
        let (h, u) = (Signal::channel_major("h", &h, [1, c, t])?, Signal::channel_major("u", &u, [1, c, t])?);
        let mut y = vec![0f32; c * t];
        let mut out = SignalMut::channel_major("y", &mut y, [1, c, t])?;
        if backward {
            let (mut dh, mut dd) = (vec![0f32; c * t], vec![0f32; c]);
            let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh), dd: Some(&mut dd) };
            long_conv_backward(&h, &u, Some(&d), &u, grads, boundary, Isa::active())?;
            std::hint::black_box((&dh, &dd));
        } else if let Some(kept) = &kept {
            kept.forward(&u, Some(&d), &mut out)?;
        } else {
            long_conv(&h, &u, Some(&d), &mut out, boundary, Isa::active())?;
        }
        let seconds = begin.elapsed().as_secs_f64();
        std::hint::black_box(&y);
        Ok((seconds, String::new()))
    }))
}

fn recur<T: Element>(
    [b, h, t, d]: [usize; 4],
    gate: &str,
    grad: bool,
    narrow: impl Fn(f32) -> T + 'static,
) -> Result<Call, Failure> {
    if [b, h, t, d].contains(&0) {
        return Err("a dimension is 0".into());
    }
    const GATES: [&str; 8] =
        ["identity", "scalar", "channel", "delta", "gated_delta", "channel_delta", "low_rank", "ssd"];
    let kind = GATES.iter().position(|g| *g == gate).ok_or_else(|| format!("gates are: {}", GATES.join(", ")))?;
    let mut random = noise();
    let mut some = |n: usize, f: f32| (0..n).map(|_| random() * f).collect::<Vec<f32>>();
    let n = b * h * t;
    // Keys of about unit length, as delta rules have them.
    let unit = 1.0 / (d as f32).sqrt();
    let mut rows = |f: f32| some(n * d, f).into_iter().map(&narrow).collect::<Vec<T>>();
    let (q, k, v, a) = (rows(1.0), rows(unit), rows(1.0), rows(0.5 * unit));
    let channel = matches!(gate, "channel" | "channel_delta" | "low_rank");
    let g: Vec<f32> = some(n * if channel { d } else { 1 }, 0.05).into_iter().map(|x| x - 0.1).collect();
    let beta: Vec<f32> = some(n, 0.25).into_iter().map(|x| x + 0.5).collect();
    let (fixed, dout) = (vec![-0.5; h], some(n * d, 1.0));
    let mut out = vec![0f32; n * d];
    Ok(Box::new(move || {
        fn view<E: Copy>(x: &[E], [b, h, t]: [usize; 3]) -> Result<View<'_, E>, Failure> {
            Ok(View::contiguous("operand", x, [b, h, t, x.len() / (b * h * t)])?)
        }
        let of = [b, h, t];
        let (g, beta, a, k) = (view(&g, of)?, view(&beta, of)?, view(&a, of)?, view(&k, of)?);
        let (q, v, dout) = (view(&q, of)?, view(&v, of)?, view(&dout, of)?);
        let gate = match kind {
            0 => Gate::Identity,
            1 => Gate::Scalar { g },
            2 => Gate::Channel { g },
            3 => Gate::Delta { beta },
            4 => Gate::GatedDelta { g, beta },
            5 => Gate::ChannelDelta { g, beta },
            6 => Gate::LowRank { g, a, b: k },
            _ => Gate::Ssd { dt: beta, a: &fixed },
        };
        let call = Recur::new(gate, unit).isa(Isa::active());
        let begin = Instant::now();
        let mut o = ViewMut::contiguous("out", &mut out, [b, h, t, d])?;
        let mut work = call.forward(&q, &k, &v, None, &mut o, None)?;
        if grad {
            let (grads, more) = call.backward(&q, &k, &v, None, &dout, None)?;
            work += more;
            std::hint::black_box(&grads);
        }
        Ok((begin.elapsed().as_secs_f64(), format!(", \"flops\": {}", work.flops)))
    }))
}

/// Rows of one K/V head.
enum Rows {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Int8(Vec<i8>, Vec<f32>),
    Int4(Vec<u8>),
}

impl Rows {
    fn new(kind: &str, x: Vec<f32>, d: usize) -> Result<Self, Failure> {
        Ok(match kind {
            "f32" => Rows::F32(x),
            "bf16" => Rows::Bf16(x.into_iter().map(bf16::from_f32).collect()),
            "int8" => {
                let scales: Vec<f32> =
                    x.chunks_exact(d).map(|r| r.iter().fold(1e-9f32, |m, x| m.max(x.abs())) / 127.0).collect();
                let q = x.chunks_exact(d).zip(&scales).flat_map(|(r, s)| r.iter().map(move |x| (x / s).round() as i8));
                Rows::Int8(q.collect(), scales)
            }
            "int4" => {
                let mut out = Vec::new();
                pack_int4(&x, d, &mut out)?;
                Rows::Int4(out)
            }
            _ => return Err("the type is f32, bf16, int8 or int4".into()),
        })
    }

    fn codec(&self, d: usize) -> Codec<'_> {
        match self {
            Rows::F32(data) => Codec::F32 { data, stride: d },
            Rows::Bf16(data) => Codec::Bf16 { data, stride: d },
            Rows::Int8(data, scales) => Codec::Int8 { data, stride: d, scales },
            Rows::Int4(data) => Codec::Int4 { data, stride: int4_row_bytes(d) },
        }
    }
}

fn decode([h, hkv, t, d]: [usize; 4], kind: &str) -> Result<Call, Failure> {
    if [h, hkv, t, d].contains(&0) {
        return Err("a dimension is 0".into());
    }
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| random()).collect::<Vec<f32>>();
    let q = some(h * d);
    let store = (0..hkv)
        .map(|_| Ok((Rows::new(kind, some(t * d), d)?, Rows::new(kind, some(t * d), d)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let (mut out, mut lse) = (vec![0f32; h * d], vec![0f32; h]);
    Ok(Box::new(move || {
        let kv: Vec<Vec<Segment>> =
            store.iter().map(|(k, v)| vec![Segment { k: k.codec(d), v: v.codec(d), len: t, channels: None }]).collect();
        let (q, out, lse) = (&q, &mut out, &mut lse);
        // On a thread of the pool, where a model decodes.
        let (seconds, work) = rayon::scope(|_| {
            let begin = Instant::now();
            let work = Decode::new(1.0 / (d as f32).sqrt()).run(q, [h, 1, d], &kv, d, None, out, lse);
            (begin.elapsed().as_secs_f64(), work)
        });
        Ok((seconds, format!(", \"bytes\": {}", work?.bytes)))
    }))
}

/// Reading as decode reads: on the pool, each thread some long runs of memory.
fn stream(bytes: usize) -> Result<Call, Failure> {
    if bytes < 4096 {
        return Err("give at least 4096 bytes".into());
    }
    let data: Vec<u32> = (0..bytes / 4).map(|i| i as u32).collect();
    Ok(Box::new(move || {
        let part = data.len().div_ceil(4 * rayon::current_num_threads());
        let data = &data;
        Ok(rayon::scope(|_| {
            let begin = Instant::now();
            std::hint::black_box(data.par_chunks(part).with_max_len(1).map(sum).reduce(|| 0, u32::wrapping_add));
            (begin.elapsed().as_secs_f64(), format!(", \"bytes\": {}", 4 * data.len()))
        }))
    }))
}

fn exp(n: usize, calls: usize) -> Result<Call, Failure> {
    if n == 0 || calls == 0 {
        return Err("give numbers and calls".into());
    }
    let mut random = noise();
    let x: Vec<f32> = (0..n).map(|_| random() * 5.0 - 10.0).collect();
    let mut y = x.clone();
    Ok(Box::new(move || {
        let begin = Instant::now();
        for _ in 0..calls {
            apply_to(Fun::Exp, &x, &mut y, Isa::active())?;
            std::hint::black_box(&y);
        }
        Ok((begin.elapsed().as_secs_f64() / calls as f64, String::new()))
    }))
}

/// Sum of a slice in 32 independent lanes, which compilers turn into vector code that waits for memory only.
fn sum(x: &[u32]) -> u32 {
    let mut lanes = [0u32; 32];
    for c in x.chunks_exact(32) {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l = l.wrapping_add(*v);
        }
    }
    lanes.iter().fold(0, |a, &b| a.wrapping_add(b))
}

fn read(mib: usize, threads: usize) -> Result<Call, Failure> {
    if mib == 0 || !(1..=1024).contains(&threads) {
        return Err("give mebibytes, and 1 to 1024 threads".into());
    }
    let data: Vec<u32> = (0..mib << 18).map(|i| i as u32).collect();
    Ok(Box::new(move || {
        let begin = Instant::now();
        std::thread::scope(|s| {
            for part in data.chunks(data.len().div_ceil(threads)) {
                s.spawn(move || std::hint::black_box(sum(part)));
            }
        });
        Ok((begin.elapsed().as_secs_f64(), format!(", \"bytes\": {}", 4 * data.len())))
    }))
}

fn prepare(line: &str) -> Result<Call, Failure> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |s: &str| s.parse::<usize>();
    match words[..] {
        [op @ ("attend" | "attend_grad"), b, h, hkv, t, d, dtype, mask] => {
            let shape = [number(b)?, number(h)?, number(hkv)?, number(t)?, number(d)?];
            let causal = match mask {
                "full" => false,
                "causal" => true,
                _ => return Err("the mask is full or causal".into()),
            };
            match (op, dtype) {
                ("attend", "f32") => attend(shape, causal, |x| x),
                ("attend", "bf16") => attend(shape, causal, bf16::from_f32),
                (_, "f32") => attend_grad(shape, causal, |x| x),
                (_, "bf16") => attend_grad(shape, causal, bf16::from_f32),
                _ => Err("the type is f32 or bf16".into()),
            }
        }
        [op @ ("sparse" | "sparse_grad"), b, h, hkv, t, d, dtype, kind, block, percent, mask] => {
            let shape = [number(b)?, number(h)?, number(hkv)?, number(t)?, number(d)?];
            let of = [number(block)?, number(percent)?];
            match dtype {
                "f32" => sparse::<f32>(shape, kind, of, mask == "causal", op == "sparse_grad"),
                "bf16" => sparse::<bf16>(shape, kind, of, mask == "causal", op == "sparse_grad"),
                _ => Err("the type is f32 or bf16".into()),
            }
        }
        [op @ ("recur" | "recur_grad"), b, h, t, d, dtype, gate] => {
            let (shape, grad) = ([number(b)?, number(h)?, number(t)?, number(d)?], op == "recur_grad");
            match dtype {
                "f32" => recur(shape, gate, grad, |x| x),
                "bf16" => recur(shape, gate, grad, bf16::from_f32),
                _ => Err("the type is f32 or bf16".into()),
            }
        }
        ["linear", m, n, k, format] => {
            let format = match format {
                "f32" => WeightFormat::F32,
                "bf16" => WeightFormat::Bf16,
                "int8" => WeightFormat::Int8,
                "int4" => WeightFormat::Int4,
                _ => return Err("weights are f32, bf16, int8 or int4".into()),
            };
            linear([number(m)?, number(n)?, number(k)?], format)
        }
        ["long_conv", c, t, form] => long([number(c)?, number(t)?], form),
        ["decode", h, hkv, t, d, kind] => decode([number(h)?, number(hkv)?, number(t)?, number(d)?], kind),
        ["stream", bytes] => stream(number(bytes)?),
        ["exp", n, calls] => exp(number(n)?, number(calls)?),
        ["read", mib, threads] => read(number(mib)?, number(threads)?),
        _ => Err("requests are: attend or attend_grad B H HKV T D f32|bf16 full|causal, \
            sparse or sparse_grad B H HKV T D f32|bf16 KIND BLOCK PERCENT full|causal, \
            linear M N K f32|bf16|int8|int4, long_conv C T causal|ready|circular|backward, \
            recur or recur_grad B H T D f32|bf16 GATE, decode H HKV T D f32|bf16|int8|int4, \
            stream BYTES, exp N CALLS, read MIB THREADS"
            .into()),
    }
}

fn main() -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{{\"isa\": \"{}\"}}", Isa::active())?;
    out.flush()?;
    let mut held: Option<(String, Call)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = (|| {
            if held.as_ref().is_none_or(|(l, _)| *l != line) {
                // The old operands go before the new ones come.
                held = None;
                let mut call = prepare(&line)?;
                call()?;
                held = Some((line.clone(), call));
            }
            let (_, call) = held.as_mut().ok_or("no call was prepared")?;
            call()
        })();
        match answer {
            Ok((seconds, rest)) => writeln!(out, "{{\"seconds\": {seconds:e}{rest}}}")?,
            Err(e) => writeln!(out, "{{\"error\": \"{}\"}}", e.to_string().replace(['"', '\\', '\n'], " "))?,
        }
        out.flush()?;
    }
    Ok(())
}
