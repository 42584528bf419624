//! `bench ops`: the primitives over a sweep of shapes, as JSON, CSV or Markdown rows.
//!
//! Each row is the median and the minimum of repeated calls after one warm-up; FLOP/s and B/s
//! come from the work that the call itself returned, not from a formula.

use crate::compare::median;
use crate::error::{LabError, Result};
use foveal_kernels::conv::{Boundary, LongGrads, ShortConv, Signal, SignalMut, long_conv, long_conv_backward};
use foveal_kernels::decode::{Codec, Decode, Segment};
use foveal_kernels::elementwise::{rms_norm, softmax_rows};
use foveal_kernels::exp::{Fun, apply_to};
use foveal_kernels::feature::FeatureAttend;
use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{
    Attend, AttendGrads, BlockTable, HeadKeys, HeadTable, Isa, KeyLists, PackedLinear, Upstream, View, ViewMut,
    WeightFormat, Work, merge_row,
};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpRow {
    /// Primitive and variant.
    pub op: String,
    /// Shape in words.
    pub shape: String,
    /// Storage type.
    pub dtype: String,
    /// Instruction set asked for.
    pub isa: String,
    /// Threads.
    pub threads: usize,
    /// Median milliseconds.
    pub median_ms: f64,
    /// Fastest, milliseconds.
    pub min_ms: f64,
    /// Calls timed.
    pub reps: usize,
    /// 10⁹ floating-point operations a second, from the median.
    pub gflops: f64,
    /// 10⁹ bytes a second, from the median.
    pub gbytes: f64,
    /// Floating-point operations of one call.
    pub flops: u64,
    /// Bytes of one call, as the kernel counts them.
    pub bytes: u64,
    /// Tiles of one call.
    pub tiles: u64,
    /// Query-key pairs of one call.
    pub pairs: u64,
    /// Of `flops`, those that a slower path did than the instruction set asked for has.
    pub fallback: u64,
}

/// What to sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchOptions {
    /// Only operations whose name contains this.
    pub filter: Option<String>,
    /// Token counts.
    pub tokens: Vec<usize>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Head width.
    pub head_dim: usize,
    /// Instruction sets; empty = the one in force.
    pub isas: Vec<Isa>,
    /// One shape instead of several for linear layers, one density for sparse attention.
    pub brief: bool,
    /// Calls are repeated until this many seconds are spent (3 to 200 times).
    pub seconds: f64,
    /// Seed of the operands.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            filter: None,
            tokens: vec![512, 2048],
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            isas: Vec::new(),
            brief: false,
            seconds: 0.3,
            seed: 0,
        }
    }
}

/// Bytes that the operands of one sweep may take.
const MEMORY: usize = 8 << 30;

struct Bench<'a> {
    o: &'a BenchOptions,
    isa: Isa,
    rows: Vec<OpRow>,
    cancel: Option<&'a AtomicBool>,
    /// Share of the sweep that lies behind.
    done: f64,
    on_row: &'a mut dyn FnMut(f64, &OpRow),
}

impl Bench<'_> {
    /// May operations whose names begin with `group` match the filter?
    fn wanted(&self, group: &str) -> bool {
        self.o.filter.as_ref().is_none_or(|f| group.contains(f.as_str()) || f.contains(group))
    }

    fn time(&mut self, op: &str, shape: String, dtype: &str, call: &mut dyn FnMut() -> Result<Work>) -> Result<()> {
        if self.o.filter.as_ref().is_some_and(|f| !op.contains(f.as_str())) {
            return Ok(());
        }
        let stop = || stopped(self.cancel);
        stop()?;
        let work = call()?;
        let (mut t, mut spent) = (Vec::new(), 0.0);
        while t.len() < 3 || (spent < self.o.seconds && t.len() < 200) {
            stop()?;
            let begin = Instant::now();
            std::hint::black_box(call()?);
            let s = begin.elapsed().as_secs_f64();
            spent += s;
            t.push(s);
        }
        let reps = t.len();
        let mid = median(&mut t);
        let row = OpRow {
            op: op.into(),
            shape,
            dtype: dtype.into(),
            isa: self.isa.to_string(),
            threads: rayon::current_num_threads(),
            median_ms: mid * 1e3,
            min_ms: t[0] * 1e3,
            reps,
            gflops: work.flops as f64 / mid / 1e9,
            gbytes: work.bytes as f64 / mid / 1e9,
            flops: work.flops,
            bytes: work.bytes,
            tiles: work.tiles,
            pairs: work.pairs,
            fallback: work.fallback,
        };
        (self.on_row)(self.done, &row);
        self.rows.push(row);
        Ok(())
    }
}

/// The error of a run that is to stop.
pub(crate) fn stopped(cancel: Option<&AtomicBool>) -> Result<()> {
    match cancel {
        Some(c) if c.load(Ordering::Relaxed) => Err(LabError::Cancelled),
        _ => Ok(()),
    }
}

fn noise(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&v| bf16::from_f32(v)).collect()
}

/// Run the sweep; `on_row` is told of each row as it comes, after the share of the sweep (0 to 1) that was behind when its
/// operation began; `cancel` stops before the next call.
///
/// # Errors
/// Head counts that do not divide, a kernel's refusal, cancellation.
pub fn ops(o: &BenchOptions, cancel: Option<&AtomicBool>, on_row: &mut dyn FnMut(f64, &OpRow)) -> Result<Vec<OpRow>> {
    if o.head_dim == 0 {
        return Err(LabError::Setting { name: "head_dim", value: "0".into(), remedy: "use at least 1".into() });
    }
    if o.heads == 0 || o.kv_heads == 0 || !o.heads.is_multiple_of(o.kv_heads) {
        return Err(LabError::Setting {
            name: "heads",
            value: format!("{} query heads, {} key/value heads of {}", o.heads, o.kv_heads, o.head_dim),
            remedy: "use at least one of each, query heads a multiple of the key/value heads".into(),
        });
    }
    if let Some(&t) = o.tokens.iter().find(|&&t| t == 0 || t > 1 << 20) {
        return Err(LabError::Length { length: t, problem: "use 1 to 1,048,576 tokens".into() });
    }
    // q, out and a narrow q a query head; k and v in all their formats a key/value head; all in bytes.
    let longest = o.tokens.iter().copied().max().unwrap_or(0);
    let channels = o.heads.checked_mul(10).and_then(|h| h.checked_add(o.kv_heads.checked_mul(20)?));
    let bytes = channels.and_then(|c| c.checked_mul(o.head_dim)?.checked_mul(longest));
    if bytes.is_none_or(|b| b > MEMORY) {
        return Err(LabError::Setting {
            name: "tokens x heads x head_dim",
            value: format!("{longest} x ({} query, {} key/value) x {}", o.heads, o.kv_heads, o.head_dim),
            remedy: format!("the operands would take more than {} GiB; use smaller ones", MEMORY >> 30),
        });
    }
    let mut rows = Vec::new();
    let isas = if o.isas.is_empty() { vec![Isa::active()] } else { o.isas.clone() };
    let by_length = [attention, attention_backward, decoding, recurrences, features, convolutions];
    let (mut done, all) = (0, isas.len() * (o.tokens.len() * by_length.len() + 2));
    for isa in isas {
        let mut b = Bench { o, isa, rows: Vec::new(), cancel, done: 0.0, on_row };
        let mut begin = |b: &mut Bench| {
            b.done = done as f64 / all as f64;
            done += 1;
        };
        for &t in &o.tokens {
            for part in by_length {
                begin(&mut b);
                part(&mut b, t)?;
            }
        }
        for part in [linears, small] {
            begin(&mut b);
            part(&mut b)?;
        }
        rows.extend(b.rows);
    }
    Ok(rows)
}

fn attention(b: &mut Bench, t: usize) -> Result<()> {
    let (h, hkv, d) = (b.o.heads, b.o.kv_heads, b.o.head_dim);
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    let (q, k, v) = (noise(&mut rng, h * t * d), noise(&mut rng, hkv * t * d), noise(&mut rng, hkv * t * d));
    let mut out = vec![0f32; h * t * d];
    let shape = format!("1x{h}({hkv})x{t}x{d}");
    let attend = Attend::new(1.0 / (d as f32).sqrt()).isa(b.isa);
    macro_rules! run {
        ($attend:expr, $q:expr, $k:expr, $v:expr) => {
            Ok($attend.run(
                &View::contiguous("q", $q, [1, h, t, d])?,
                &View::contiguous("k", $k, [1, hkv, t, d])?,
                &View::contiguous("v", $v, [1, hkv, t, d])?,
                &mut ViewMut::contiguous("out", &mut out, [1, h, t, d])?,
                None,
            )?)
        };
    }
    if b.wanted("attend") {
        let causal = attend.clone().causal(true);
        b.time("attend full", shape.clone(), "f32", &mut || run!(attend, &q, &k, &v))?;
        b.time("attend causal", shape.clone(), "f32", &mut || run!(causal, &q, &k, &v))?;
        let (q16, k16, v16) = (narrow(&q), narrow(&k), narrow(&v));
        b.time("attend causal", shape.clone(), "bf16", &mut || run!(causal, &q16, &k16, &v16))?;
        let densities: &[f64] = if b.o.brief { &[0.25] } else { &[0.5, 0.25, 0.1] };
        for &density in densities {
            const BLOCK: usize = 64;
            let heads = (0..h)
                .map(|_| {
                    let lists = (0..t.div_ceil(BLOCK) as u32)
                        .map(|qb| (0..=qb).filter(|&kb| kb == qb || rng.random_bool(density)).collect())
                        .collect();
                    HeadTable::from_lists(BLOCK, BLOCK, lists)
                })
                .collect();
            let table = BlockTable { heads };
            let sparse = causal.clone().table(Some(&table));
            let name = format!("attend blocks {:.0}%", density * 100.0);
            b.time(&name, shape.clone(), "f32", &mut || run!(sparse, &q, &k, &v))?;
        }
    }
    if b.wanted("attend_indexed") {
        const GROUP: usize = 64;
        let shares: &[f64] = if b.o.brief { &[0.25] } else { &[0.25, 0.05] };
        for &share in shares {
            let heads = (0..h)
                .map(|_| {
                    let lists = (0..t.div_ceil(GROUP))
                        .map(|g| (0..((g + 1) * GROUP).min(t) as u32).filter(|_| rng.random_bool(share)).collect())
                        .collect();
                    HeadKeys::from_lists(GROUP, lists)
                })
                .collect();
            let lists = KeyLists { heads };
            let causal = attend.clone().causal(true);
            b.time(&format!("attend_indexed {:.0}%", share * 100.0), shape.clone(), "f32", &mut || {
                Ok(foveal_kernels::attend_indexed(
                    &causal,
                    &lists,
                    &View::contiguous("q", &q, [1, h, t, d])?,
                    &View::contiguous("k", &k, [1, hkv, t, d])?,
                    &View::contiguous("v", &v, [1, hkv, t, d])?,
                    &mut ViewMut::contiguous("out", &mut out, [1, h, t, d])?,
                    None,
                )?)
            })?;
        }
    }
    Ok(())
}

fn attention_backward(b: &mut Bench, t: usize) -> Result<()> {
    const OP: &str = "attend backward";
    if !b.wanted(OP) {
        return Ok(());
    }
    let (h, hkv, d) = (b.o.heads, b.o.kv_heads, b.o.head_dim);
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    let (q, k, v) = (noise(&mut rng, h * t * d), noise(&mut rng, hkv * t * d), noise(&mut rng, hkv * t * d));
    let dout = noise(&mut rng, h * t * d);
    let (mut out, mut lse) = (vec![0f32; h * t * d], vec![0f32; h * t]);
    let (mut dq, mut dk, mut dv) = (vec![0f32; h * t * d], vec![0f32; hkv * t * d], vec![0f32; hkv * t * d]);
    let (qs, ks) = ([1, h, t, d], [1, hkv, t, d]);
    let attend = Attend::new(1.0 / (d as f32).sqrt()).causal(true).isa(b.isa);
    macro_rules! run {
        ($dtype:expr, $q:expr, $k:expr, $v:expr) => {{
            let (q, k, v) =
                (View::contiguous("q", $q, qs)?, View::contiguous("k", $k, ks)?, View::contiguous("v", $v, ks)?);
            attend.run(&q, &k, &v, &mut ViewMut::contiguous("out", &mut out, qs)?, Some(&mut lse))?;
            b.time(OP, format!("1x{h}({hkv})x{t}x{d} causal"), $dtype, &mut || {
                let up = Upstream {
                    out: &View::contiguous("out", &out, qs)?,
                    lse: &lse,
                    dout: &View::contiguous("dout", &dout, qs)?,
                    dlse: None,
                };
                let grads = AttendGrads {
                    dq: &mut ViewMut::contiguous("dq", &mut dq, qs)?,
                    dk: &mut ViewMut::contiguous("dk", &mut dk, ks)?,
                    dv: &mut ViewMut::contiguous("dv", &mut dv, ks)?,
                    dsinks: None,
                    dbias: None,
                };
                Ok(attend.backward(&q, &k, &v, &up, grads)?)
            })?;
        }};
    }
    run!("f32", &q, &k, &v);
    let (q16, k16, v16) = (narrow(&q), narrow(&k), narrow(&v));
    run!("bf16", &q16, &k16, &v16);
    Ok(())
}

fn recurrences(b: &mut Bench, t: usize) -> Result<()> {
    if !b.wanted("recur") {
        return Ok(());
    }
    let (h, d) = (b.o.heads, b.o.head_dim);
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    // Keys of a norm under one, as delta rules have them.
    let [q, k, v] =
        [1.0, 0.2, 1.0].map(|size| noise(&mut rng, h * t * d).iter().map(|x| x * size).collect::<Vec<f32>>());
    let (q, k, v) = (narrow(&q), narrow(&k), narrow(&v));
    let g: Vec<f32> = noise(&mut rng, h * t).iter().map(|x| 0.05 * (x - 1.0)).collect();
    let beta: Vec<f32> = noise(&mut rng, h * t).iter().map(|x| 0.5 + 0.5 * x).collect();
    let dout = noise(&mut rng, h * t * d);
    let mut out = vec![0f32; h * t * d];
    let (shape, one) = ([1, h, t, d], [1, h, t, 1]);
    let words = format!("1x{h}x{t}x{d}");
    let (q, k, v) =
        (View::contiguous("q", &q, shape)?, View::contiguous("k", &k, shape)?, View::contiguous("v", &v, shape)?);
    let scalar = Gate::Scalar { g: View::contiguous("g", &g, one)? };
    for (name, gate) in
        [("recur scalar", scalar), ("recur delta", Gate::Delta { beta: View::contiguous("beta", &beta, one)? })]
    {
        let r = Recur::new(gate, 0.125).isa(b.isa);
        b.time(name, words.clone(), "bf16", &mut || {
            Ok(r.forward(&q, &k, &v, None, &mut ViewMut::contiguous("out", &mut out, shape)?, None)?)
        })?;
    }
    let r = Recur::new(scalar, 0.125).isa(b.isa);
    b.time("recur scalar backward", words, "bf16", &mut || {
        Ok(r.backward(&q, &k, &v, None, &View::contiguous("dout", &dout, shape)?, None)?.1)
    })
}

fn features(b: &mut Bench, t: usize) -> Result<()> {
    if !b.wanted("feature_attend") {
        return Ok(());
    }
    let (h, d) = (b.o.heads, b.o.head_dim);
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    let [q, k, v] = [(); 3].map(|()| noise(&mut rng, h * t * d));
    let weights = noise(&mut rng, h * (2 * t - 1));
    let mut out = vec![0f32; h * t * d];
    let shape = [1, h, t, d];
    let (q, k, v) =
        (View::contiguous("q", &q, shape)?, View::contiguous("k", &k, shape)?, View::contiguous("v", &v, shape)?);
    let isa = Some(b.isa);
    for (name, weights) in [("feature_attend causal", None), ("feature_attend weighted", Some(&weights[..]))] {
        let p = FeatureAttend { causal: true, weights, isa, ..FeatureAttend::default() };
        b.time(name, format!("1x{h}x{t}x{d}"), "f32", &mut || {
            Ok(p.run(&q, &k, &v, &mut ViewMut::contiguous("out", &mut out, shape)?, None)?)
        })?;
    }
    Ok(())
}

fn convolutions(b: &mut Bench, t: usize) -> Result<()> {
    if !b.wanted("long_conv") && !b.wanted("short_conv") {
        return Ok(());
    }
    let c = b.o.heads * b.o.head_dim;
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    let (h, u, d) = (noise(&mut rng, c * t), noise(&mut rng, c * t), noise(&mut rng, c));
    let (shape, isa) = ([1, c, t], b.isa);
    let mut y = vec![0f32; c * t];
    let signal = |x| Signal::channel_major("signal", x, shape);
    let words = format!("1x{c}x{t}");
    if b.wanted("long_conv") {
        b.time("long_conv", words.clone(), "f32", &mut || {
            let mut out = SignalMut::channel_major("y", &mut y, shape)?;
            Ok(long_conv(&signal(&h)?, &signal(&u)?, Some(&d), &mut out, Boundary::Causal, isa)?)
        })?;
        let (mut dh, mut dd) = (vec![0f32; c * t], vec![0f32; c]);
        b.time("long_conv backward", words.clone(), "f32", &mut || {
            let mut out = SignalMut::channel_major("du", &mut y, shape)?;
            let grads = LongGrads { du: Some(&mut out), dh: Some(&mut dh), dd: Some(&mut dd) };
            Ok(long_conv_backward(&signal(&h)?, &signal(&u)?, Some(&d), &signal(&u)?, grads, Boundary::Causal, isa)?)
        })?;
    }
    if b.wanted("short_conv") {
        let w = noise(&mut rng, 4 * c);
        b.time("short_conv", words, "f32", &mut || {
            let conv = ShortConv::new(&w, c, Some(&d), true, isa)?;
            let mut out = SignalMut::time_major("y", &mut y, shape)?;
            Ok(conv.forward(&Signal::time_major("x", &u, shape)?, None, None, &mut out, None)?)
        })?;
    }
    Ok(())
}

fn decoding(b: &mut Bench, t: usize) -> Result<()> {
    if !b.wanted("decode") {
        return Ok(());
    }
    let (h, hkv, d) = (b.o.heads, b.o.kv_heads, b.o.head_dim);
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    let q = noise(&mut rng, h * d);
    let k: Vec<Vec<f32>> = (0..hkv).map(|_| noise(&mut rng, t * d)).collect();
    let v: Vec<Vec<f32>> = (0..hkv).map(|_| noise(&mut rng, t * d)).collect();
    let (mut out, mut lse) = (vec![0f32; h * d], vec![0f32; h]);
    let mut decode = Decode::new(1.0 / (d as f32).sqrt());
    decode.isa = b.isa;
    let shape = format!("1x{h}({hkv})x1 over {t}x{d}");
    let segment = |k, v| vec![Segment { k, v, len: t, channels: None }];

    let wide: Vec<Vec<Segment>> = k
        .iter()
        .zip(&v)
        .map(|(k, v)| segment(Codec::F32 { data: k, stride: d }, Codec::F32 { data: v, stride: d }))
        .collect();
    b.time("decode dense", shape.clone(), "f32", &mut || {
        Ok(decode.run(&q, [h, 1, d], &wide, d, None, &mut out, &mut lse)?)
    })?;

    let (k16, v16): (Vec<_>, Vec<_>) = k.iter().zip(&v).map(|(k, v)| (narrow(k), narrow(v))).unzip();
    let half: Vec<Vec<Segment>> = k16
        .iter()
        .zip(&v16)
        .map(|(k, v)| segment(Codec::Bf16 { data: k, stride: d }, Codec::Bf16 { data: v, stride: d }))
        .collect();
    b.time("decode dense", shape.clone(), "bf16", &mut || {
        Ok(decode.run(&q, [h, 1, d], &half, d, None, &mut out, &mut lse)?)
    })?;

    let byte = |x: &[f32]| -> (Vec<i8>, Vec<f32>) {
        let q = x.iter().map(|v| (v * 127.0).round() as i8).collect();
        (q, vec![1.0 / 127.0; t])
    };
    let (k8, v8): (Vec<_>, Vec<_>) = k.iter().zip(&v).map(|(k, v)| (byte(k), byte(v))).unzip();
    let int8: Vec<Vec<Segment>> = k8
        .iter()
        .zip(&v8)
        .map(|(k, v)| {
            segment(
                Codec::Int8 { data: &k.0, stride: d, scales: &k.1 },
                Codec::Int8 { data: &v.0, stride: d, scales: &v.1 },
            )
        })
        .collect();
    b.time("decode dense", shape.clone(), "int8", &mut || {
        Ok(decode.run(&q, [h, 1, d], &int8, d, None, &mut out, &mut lse)?)
    })?;

    let shares: &[f64] = if b.o.brief { &[0.25] } else { &[0.25, 0.05] };
    for &share in shares {
        let heads = (0..h)
            .map(|_| HeadKeys::from_lists(1, vec![(0..t as u32).filter(|_| rng.random_bool(share)).collect()]))
            .collect();
        let lists = KeyLists { heads };
        b.time(&format!("decode selected {:.0}%", share * 100.0), shape.clone(), "bf16", &mut || {
            Ok(decode.run(&q, [h, 1, d], &half, d, Some(&lists), &mut out, &mut lse)?)
        })?;
    }
    Ok(())
}

fn linears(b: &mut Bench) -> Result<()> {
    if !b.wanted("linear") {
        return Ok(());
    }
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    let shapes = [(2048, 2048), (576, 576), (3072, 576), (576, 1536)];
    for (n, k) in shapes.into_iter().take(if b.o.brief { 1 } else { shapes.len() }) {
        let w = noise(&mut rng, n * k);
        for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4] {
            let name = &format.to_string();
            let packed = PackedLinear::pack(&w, n, k, format)?;
            for m in [1usize, 512] {
                let x = noise(&mut rng, m * k);
                let mut out = vec![0f32; m * n];
                let isa = b.isa;
                b.time("linear", format!("({m}, {k}) x ({n}, {k})^T"), name, &mut || {
                    Ok(packed.forward(&x, m, &mut out, isa)?)
                })?;
            }
        }
    }
    Ok(())
}

fn small(b: &mut Bench) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(b.o.seed);
    const N: usize = 1 << 16;
    let isa = b.isa;
    let (x, mut y) = (noise(&mut rng, N), vec![0f32; N]);
    if b.wanted("exp") {
        let x: Vec<f32> = x.iter().map(|v| v * 10.0 - 10.0).collect();
        b.time("exp", format!("{N}"), "f32", &mut || {
            apply_to(Fun::Exp, &x, &mut y, isa)?;
            // One exponential counts as one operation.
            Ok(Work { flops: N as u64, bytes: 8 * N as u64, ..Work::default() })
        })?;
    }
    const WIDTH: usize = 1024;
    if b.wanted("softmax") {
        b.time("softmax", format!("{}x{WIDTH}", N / WIDTH), "f32", &mut || {
            y.copy_from_slice(&x);
            Ok(softmax_rows(&mut y, WIDTH, isa)?)
        })?;
    }
    if b.wanted("rms_norm") {
        let w = noise(&mut rng, WIDTH);
        b.time("rms_norm", format!("{}x{WIDTH}", N / WIDTH), "f32", &mut || Ok(rms_norm(&x, &w, 1e-5, &mut y, isa)?))?;
    }
    if b.wanted("merge") {
        let d = b.o.head_dim;
        let rows = N / d;
        let (mut acc, o) = (noise(&mut rng, rows * d), noise(&mut rng, rows * d));
        let mut lse = vec![0f32; rows];
        b.time("merge", format!("{rows}x{d}"), "f32", &mut || {
            lse.fill(0.0);
            for ((a, l), o) in acc.chunks_exact_mut(d).zip(&mut lse).zip(o.chunks_exact(d)) {
                merge_row(a, l, o, 0.5);
            }
            // Two products and a sum an element; read both, write one.
            Ok(Work { flops: 3 * (rows * d) as u64, bytes: 12 * (rows * d) as u64, ..Work::default() })
        })?;
    }
    Ok(())
}

/// Rows as a JSON array.
///
/// # Errors
/// Never in practice: all numbers are finite.
pub fn json(rows: &[OpRow]) -> Result<String> {
    serde_json::to_string_pretty(rows)
        .map(|s| s + "\n")
        .map_err(|e| LabError::Report { what: "the rows".into(), problem: e.to_string() })
}

/// Rows as CSV with a header line.
pub fn csv(rows: &[OpRow]) -> String {
    let mut s = String::from(
        "op,shape,dtype,isa,threads,median_ms,min_ms,reps,gflops,gbytes_per_s,flops,bytes,tiles,pairs,fallback_flops\r\n",
    );
    for r in rows {
        let _ = write!(
            s,
            "{},\"{}\",{},{},{},{},{},{},{},{},{},{},{},{},{}\r\n",
            r.op,
            r.shape,
            r.dtype,
            r.isa,
            r.threads,
            r.median_ms,
            r.min_ms,
            r.reps,
            r.gflops,
            r.gbytes,
            r.flops,
            r.bytes,
            r.tiles,
            r.pairs,
            r.fallback
        );
    }
    s
}

/// Rows as a Markdown table, aligned.
pub fn markdown(rows: &[OpRow]) -> String {
    let head = ["op", "shape", "dtype", "isa", "median ms", "min ms", "reps", "GFLOP/s", "GB/s", "slower path"];
    let cells = |r: &OpRow| {
        vec![
            r.op.clone(),
            r.shape.clone(),
            r.dtype.clone(),
            r.isa.clone(),
            format!("{:.3}", r.median_ms),
            format!("{:.3}", r.min_ms),
            r.reps.to_string(),
            format!("{:.1}", r.gflops),
            format!("{:.2}", r.gbytes),
            match r.fallback {
                0 => String::new(),
                f => format!("{:.0}%", 100.0 * f as f64 / r.flops.max(1) as f64),
            },
        ]
    };
    crate::report::markdown(&head, &rows.iter().map(cells).collect::<Vec<_>>(), 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_primitive_gives_a_finite_row_in_every_format() {
        let o = BenchOptions {
            tokens: vec![128],
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            seconds: 0.0,
            ..BenchOptions::default()
        };
        let mut told = 0;
        let mut at = 0.0;
        let rows = ops(&o, None, &mut |done, _| {
            assert!((at..1.0).contains(&done));
            (at, told) = (done, told + 1);
        })
        .unwrap();
        assert_eq!(told, rows.len());
        for op in [
            "attend full",
            "attend causal",
            "attend blocks",
            "attend_indexed",
            "decode dense",
            "decode selected",
            "attend backward",
            "recur scalar",
            "recur delta",
            "recur scalar backward",
            "feature_attend causal",
            "feature_attend weighted",
            "long_conv",
            "long_conv backward",
            "short_conv",
            "linear",
            "exp",
            "softmax",
            "rms_norm",
            "merge",
        ] {
            assert!(rows.iter().any(|r| r.op.starts_with(op)), "{op}");
        }
        assert!(rows.iter().all(|r| r.reps == 3 && r.median_ms.is_finite() && r.min_ms <= r.median_ms));
        // A sparser table computes fewer pairs.
        let pairs = |op: &str| rows.iter().find(|r| r.op == op && r.dtype == "f32").unwrap().pairs;
        assert!(pairs("attend blocks 10%") <= pairs("attend blocks 50%"));
        let back: Vec<OpRow> = serde_json::from_str(&json(&rows).unwrap()).unwrap();
        assert!(crate::testing::close(&serde_json::to_value(&back).unwrap(), &serde_json::to_value(&rows).unwrap()));
        assert_eq!(csv(&rows).lines().count(), rows.len() + 1);
        assert_eq!(markdown(&rows).lines().count(), rows.len() + 2);
    }

    #[test]
    fn the_filter_and_bad_shapes() {
        let o = BenchOptions { filter: Some("merge".into()), seconds: 0.0, ..BenchOptions::default() };
        assert!(ops(&o, None, &mut |_, _| {}).unwrap().iter().all(|r| r.op == "merge"));
        assert!(ops(&BenchOptions { kv_heads: 2, ..o.clone() }, None, &mut |_, _| {}).is_err());
        assert!(ops(&BenchOptions { tokens: vec![0], ..o.clone() }, None, &mut |_, _| {}).is_err());
        for bad in [
            BenchOptions { heads: 0, ..o.clone() },
            BenchOptions { head_dim: 0, ..o.clone() },
            BenchOptions { head_dim: usize::MAX / 2, ..o.clone() },
            BenchOptions { tokens: vec![1 << 20], heads: 300, ..o.clone() },
        ] {
            assert!(matches!(ops(&bad, None, &mut |_, _| {}), Err(LabError::Setting { .. })), "{bad:?}");
        }
        let stop = AtomicBool::new(true);
        assert!(matches!(ops(&o, Some(&stop), &mut |_, _| {}), Err(LabError::Cancelled)));
    }
}
