//! Times the kernels on device 0 against its ceilings, after a look at rows of each answer; a table on the terminal
//! and, with `--json FILE`, the rows. `benches/peers/gpu.py` runs PyTorch and fla on the same shapes beside it.
//!
//!     cargo run --release -p foveal-cuda --example gpu_bench -- [--json FILE] [--only PART] [--all] [--samples N]
//!
//! B = 1, 32 heads, bf16, random data; medians by device events. `--all` times every choice of tiles.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Problem, judge, normal, some_rows};
use cudarc::driver::CudaSlice;
use foveal_cuda::attend::Path;
use foveal_cuda::backward::Upstream;
use foveal_cuda::decode::Store;
use foveal_cuda::recur::{Gate, Rate, Recur};
use foveal_cuda::{Attend, Decode, Device, Result, Tensor, TensorMut, ceiling};
use foveal_kernels::{BlockTable, HeadTable};
use half::bf16;
use std::io::Write;

struct Bench {
    device: Device,
    samples: usize,
    only: Option<String>,
    all: bool,
    rows: Vec<serde_json::Value>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|o| name.contains(o.as_str()))
    }

    /// Median milliseconds.
    fn time(&self, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
        for _ in 0..3 {
            call()?;
        }
        self.device.synchronize()?;
        let mut times = Vec::new();
        for _ in 0..self.samples {
            let from = self.device.mark()?;
            call()?;
            times.push((from, self.device.mark()?));
        }
        self.device.synchronize()?;
        let mut ms: Vec<f32> = times.iter().map(|(a, b)| self.device.between(a, b)).collect::<Result<_>>()?;
        ms.sort_by(f32::total_cmp);
        Ok(ms[ms.len() / 2].into())
    }

    fn say(&mut self, name: &str, how: &str, ms: f64, rate: f64, unit: &str, note: &str) {
        println!("{name:<34} {how:<34} {ms:>9.4} ms {rate:>9.1} {unit:<8} {note}");
        let _ = std::io::stdout().flush();
        self.rows
            .push(serde_json::json!({"name": name, "how": how, "ms": ms, "rate": rate, "unit": unit, "note": note}));
    }
}

struct Data {
    p: Problem,
    q: CudaSlice<bf16>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    out: CudaSlice<bf16>,
}

/// One shape of attention, by the device's choice and, with `paths`, by others.
#[allow(clippy::too_many_arguments)]
fn attend(
    b: &mut Bench,
    data: &mut Data,
    name: &str,
    [h, hkv, t, d, dv]: [usize; 5],
    causal: bool,
    window: Option<usize>,
    table: Option<&BlockTable>,
    paths: &[Path],
) -> Result<()> {
    if !b.wants(name) {
        return Ok(());
    }
    let scale = 1.0 / (d as f32).sqrt();
    let mut choices = vec![None];
    if b.all {
        choices.extend(paths.iter().copied().map(Some));
    }
    for path in choices {
        let call = Attend::new(scale).causal(causal).window(window).table(table).path(path);
        let q = Tensor::new(&b.device, "q", &data.q, 0, [1, h, t, d], [h * t * d, t * d, d])?;
        let k = Tensor::new(&b.device, "k", &data.k, 0, [1, hkv, t, d], [hkv * t * d, t * d, d])?;
        let v = Tensor::new(&b.device, "v", &data.v, 0, [1, hkv, t, dv], [hkv * t * dv, t * dv, dv])?;
        let mut lse = b.device.zeros::<f32>(h * t)?;
        let mut out = TensorMut::new(&b.device, "out", &mut data.out, 0, [1, h, t, dv], [h * t * dv, t * dv, dv])?;
        let mut plan = call.plan(&b.device, &q, &k, &v, &out)?;
        let ms = b.time(|| plan.run(&b.device, &q, &k, &v, &mut out, Some(&mut lse)).map(|_| ()))?;
        let p = &mut data.p;
        (p.h, p.hkv, p.tq, p.tk, p.d, p.dv) = (h, hkv, t, t, d, dv);
        // Only rows that are looked at come back.
        let rows = some_rows(h * t, 48, 9);
        let got = b.device.download(&data.out)?;
        let verdict = judge(p, &got, &b.device.download(&lse)?, &rows, scale.into(), None, None, &|bh, i, j| {
            (!causal || j <= i)
                && window.is_none_or(|w| j + w > i)
                && table.is_none_or(|t| {
                    t.heads[bh].row(i / t.heads[bh].block_q).binary_search(&((j / t.heads[bh].block_k) as u32)).is_ok()
                })
        });
        let done = plan.done();
        // FLOPs as everyone counts them: half of all pairs where causal.
        let pairs = match (causal, window, table) {
            (true, None, None) => (t * t / 2) as f64 * h as f64,
            (false, None, None) => (t * t) as f64 * h as f64,
            _ => done.work.pairs as f64,
        };
        let note = if verdict.good() { "ok".to_string() } else { format!("WRONG {verdict:?}") };
        b.say(name, &format!("{:?}", done.path), ms, 2.0 * pairs * (d + dv) as f64 / ms / 1e9, "TFLOP/s", &note);
    }
    Ok(())
}

/// Forward and backward of one shape, one after the other.
fn both(b: &mut Bench, data: &mut Data, name: &str, [h, hkv, t, d]: [usize; 4], causal: bool) -> Result<()> {
    if !b.wants(name) || !b.device.facts().hopper() {
        return Ok(());
    }
    let call = Attend::new(1.0 / (d as f32).sqrt()).causal(causal);
    let shapes = [[1, h, t, d], [1, hkv, t, d]];
    let zeros = |s: [usize; 4]| b.device.zeros::<bf16>(s.iter().product());
    let (mut o, mut gq, mut gk, mut gv) = (zeros(shapes[0])?, zeros(shapes[0])?, zeros(shapes[1])?, zeros(shapes[1])?);
    let mut lse = b.device.zeros::<f32>(h * t)?;
    let view = |name, x, s: [usize; 4]| Tensor::new(&b.device, name, x, 0, s, [s[1] * t * d, t * d, d]);
    let (q, k, v) = (view("q", &data.q, shapes[0])?, view("k", &data.k, shapes[1])?, view("v", &data.v, shapes[1])?);
    let dout = Tensor::new(&b.device, "dout", &data.q, data.p.q.len() / 2, shapes[0], [h * t * d, t * d, d])?;
    let mut forward = {
        let out = TensorMut::contiguous(&b.device, "out", &mut o, shapes[0])?;
        call.plan(&b.device, &q, &k, &v, &out)?
    };
    let mut times = Vec::new();
    let mut backward = None;
    // The gradients alone, then both.
    for alone in [true, false] {
        let ms = b.time(|| {
            if !alone || backward.is_none() {
                let mut out = TensorMut::contiguous(&b.device, "out", &mut o, shapes[0])?;
                forward.run(&b.device, &q, &k, &v, &mut out, Some(&mut lse))?;
            }
            let out = Tensor::contiguous(&b.device, "out", &o, shapes[0])?;
            let up = Upstream { q, k, v, out, lse: &lse, dout, dlse: None };
            let plan = match &mut backward {
                Some(plan) => plan,
                none => none.insert(call.plan_backward(&b.device, &up)?),
            };
            let (mut gq, mut gk, mut gv) = (
                TensorMut::contiguous(&b.device, "dq", &mut gq, shapes[0])?,
                TensorMut::contiguous(&b.device, "dk", &mut gk, shapes[1])?,
                TensorMut::contiguous(&b.device, "dv", &mut gv, shapes[1])?,
            );
            plan.run(&b.device, &up, &mut gq, &mut gk, &mut gv).map(|_| ())
        })?;
        times.push(ms);
    }
    let pairs = (t * t / if causal { 2 } else { 1 } * h) as f64;
    let rate = |n: f64, ms: f64| n * 2.0 * pairs * d as f64 / ms / 1e9;
    b.say(&format!("{name} backward alone"), "", times[0], rate(5.0, times[0]), "TFLOP/s", "");
    b.say(name, "", times[1], rate(7.0, times[1]), "TFLOP/s", "");
    Ok(())
}

fn random_blocks(heads: usize, t: usize, block: usize, density: f64) -> BlockTable {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let n = t / block;
    let head = |_| {
        let lists =
            (0..n).map(|i| (0..=i as u32).filter(|&j| j == i as u32 || rng.random::<f64>() < density).collect());
        HeadTable::from_lists(block, block, lists.collect())
    };
    BlockTable { heads: (0..heads).map(head).collect() }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (mut json, mut only, mut samples, mut all) = (None, None, 20, false);
    while let Some(a) = args.next() {
        match a.as_str() {
            "--json" => json = args.next(),
            "--only" => only = args.next(),
            "--all" => all = true,
            "--samples" => samples = args.next().and_then(|s| s.parse().ok()).unwrap_or(20),
            other => {
                return Err(format!("{other}: the options are --json FILE, --only PART, --samples N, --all").into());
            }
        }
    }
    let device = match Device::open(0) {
        Ok(d) => d,
        Err(e) => {
            eprintln!("{e}");
            return Ok(());
        }
    };
    println!("{:?}", device.facts());
    let mut b = Bench { device, samples, only, all, rows: Vec::new() };

    if b.wants("ceiling") {
        let n = 1usize << 30;
        let from = b.device.zeros::<u16>(n)?;
        let mut to = b.device.zeros::<u16>(n)?;
        let ms = b.time(|| ceiling::copy(&b.device, &from, &mut to))?;
        b.say("ceiling copy", "", ms, 4.0 * n as f64 / ms / 1e6, "GB/s", "read and written");
        let ms = b.time(|| ceiling::read(&b.device, &from, &mut to))?;
        b.say("ceiling read", "", ms, 2.0 * n as f64 / ms / 1e6, "GB/s", "");
        let data: Vec<u16> = normal(1, 24576).iter().map(|x| x.to_bits()).collect();
        let data = b.device.upload(&data)?;
        let mut sums = b.device.zeros::<f32>(256 * 256)?;
        let mut flops = 0.0;
        let ms = b.time(|| {
            flops = ceiling::products(&b.device, &data, &mut sums)?;
            Ok(())
        })?;
        b.say("ceiling products", "", ms, flops / ms / 1e9, "TFLOP/s", "bf16, from shared memory");
    }

    let most = 32 * 32768 * 128;
    let mut data = {
        let p = Problem {
            q: normal(1, most),
            k: normal(2, most),
            v: normal(3, most),
            b: 1,
            h: 0,
            hkv: 0,
            tq: 0,
            tk: 0,
            d: 0,
            dv: 0,
        };
        let (q, k, v) = (b.device.upload(&p.q)?, b.device.upload(&p.k)?, b.device.upload(&p.v)?);
        Data { p, q, k, v, out: b.device.zeros(most)? }
    };
    let hopper = |keys, turns| Path::Hopper { keys, turns };
    let wide = [hopper(176, true), hopper(128, false), hopper(144, false), Path::Warps];
    attend(&mut b, &mut data, "dense 8k", [32, 32, 8192, 128, 128], false, None, None, &wide)?;
    let narrow = [hopper(176, false), hopper(128, true), Path::Warps];
    attend(&mut b, &mut data, "causal 8k", [32, 32, 8192, 128, 128], true, None, None, &narrow)?;
    attend(&mut b, &mut data, "causal 8k GQA 32/8", [32, 8, 8192, 128, 128], true, None, None, &[])?;
    attend(&mut b, &mut data, "window 1024 32k", [32, 32, 32768, 128, 128], true, Some(1024), None, &narrow)?;
    for density in [0.10, 0.05] {
        let name = format!("blocks {:.0}% 32k", density * 100.0);
        if b.wants(&name) {
            let table = random_blocks(32, 32768, 128, density);
            let paths = [hopper(64, true), hopper(128, false)];
            attend(&mut b, &mut data, &name, [32, 32, 32768, 128, 128], true, None, Some(&table), &paths)?;
        }
    }
    attend(
        &mut b,
        &mut data,
        "dense 8k D 64",
        [32, 32, 8192, 64, 64],
        false,
        None,
        None,
        &[hopper(192, true), hopper(128, false)],
    )?;
    attend(&mut b, &mut data, "dense 8k D 96", [32, 32, 8192, 96, 96], false, None, None, &[hopper(128, true)])?;
    attend(
        &mut b,
        &mut data,
        "dense 8k D 192/128",
        [32, 32, 8192, 192, 128],
        false,
        None,
        None,
        &[hopper(112, false), hopper(128, true)],
    )?;
    attend(
        &mut b,
        &mut data,
        "dense 8k D 256",
        [16, 16, 8192, 256, 256],
        false,
        None,
        None,
        &[hopper(64, false), hopper(80, true)],
    )?;
    let (samples, long) = (b.samples, b.samples.min(6));
    b.samples = long;
    attend(&mut b, &mut data, "dense 32k", [32, 32, 32768, 128, 128], false, None, None, &[hopper(128, true)])?;
    attend(&mut b, &mut data, "causal 32k", [32, 32, 32768, 128, 128], true, None, None, &[hopper(176, true)])?;
    b.samples = samples;

    both(&mut b, &mut data, "train 8k", [32, 32, 8192, 128], false)?;
    both(&mut b, &mut data, "train causal 8k", [32, 32, 8192, 128], true)?;
    both(&mut b, &mut data, "train 8k D 64", [32, 32, 8192, 64], false)?;

    // Eight sequences of 65,536 keys, 32 query and 8 key heads.
    let (n, hkv, t, d) = (8usize, 8usize, 65536usize, 128usize);
    if b.wants("decode") {
        let elements = n * hkv * t * d;
        let twice = |x: &[bf16]| {
            let mut y = x.to_vec();
            y.extend_from_slice(x);
            y.extend_from_slice(x);
            y.extend_from_slice(x);
            y.truncate(elements);
            y
        };
        let (k, v) = (b.device.upload(&twice(&data.p.k))?, b.device.upload(&twice(&data.p.v))?);
        let store = Store::Half {
            k: Tensor::contiguous(&b.device, "k", &k, [n, hkv, t, d])?,
            v: Tensor::contiguous(&b.device, "v", &v, [n, hkv, t, d])?,
        };
        let q = Tensor::new(&b.device, "q", &data.q, 0, [n, 32, 1, d], [32 * d, d, d])?;
        let mut o = b.device.zeros::<bf16>(n * 32 * d)?;
        let mut out = TensorMut::contiguous(&b.device, "out", &mut o, [n, 32, 1, d])?;
        let call = Decode::new(1.0 / (d as f32).sqrt());
        let mut plan = call.plan(&b.device, &q, &store, &[t; 8])?;
        let mut bytes = 0;
        let ms = b.time(|| {
            bytes = plan.run(&b.device, &q, &store, &mut out, None)?.bytes;
            Ok(())
        })?;
        b.say("decode 8 x 64k GQA 32/8", "bf16", ms, bytes as f64 / ms / 1e6, "GB/s", "");
        drop((k, v));
        let codes: Vec<i8> = data.p.k.iter().map(|x| (x.to_f32() * 30.0) as i8).collect();
        let mut wide = codes.clone();
        for _ in 0..3 {
            wide.extend_from_slice(&codes);
        }
        let (ck, cv) = (b.device.upload(&wide[..elements])?, b.device.upload(&wide[..elements])?);
        let scales = b.device.upload(&vec![1f32 / 30.0; n * hkv * t])?;
        let store = Store::Int8 { k: &ck, v: &cv, k_scales: &scales, v_scales: &scales, shape: [n, hkv, t, d], dv: d };
        let mut plan = call.plan(&b.device, &q, &store, &[t; 8])?;
        let ms = b.time(|| {
            bytes = plan.run(&b.device, &q, &store, &mut out, None)?.bytes;
            Ok(())
        })?;
        b.say("decode 8 x 64k GQA 32/8 int8", "int8", ms, bytes as f64 / ms / 1e6, "GB/s", "");
    }

    if b.wants("recur") && b.device.facts().hopper() {
        let (h, t, d) = (32, 32768, 128);
        let g: Vec<f32> = (0..h * t).map(|i| -0.001 * (1 + i % 7) as f32).collect();
        let g = b.device.upload(&g)?;
        let shape = [1, h, t, d];
        let q = Tensor::contiguous(&b.device, "q", &data.q, shape)?;
        let (k, v) =
            (Tensor::contiguous(&b.device, "k", &data.k, shape)?, Tensor::contiguous(&b.device, "v", &data.v, shape)?);
        let mut out = TensorMut::contiguous(&b.device, "out", &mut data.out, shape)?;
        let beta: Vec<f32> = (0..h * t).map(|i| 0.1 + 0.1 * (i % 9) as f32).collect();
        let beta = b.device.upload(&beta)?;
        // Keys of length one for the delta rule.
        let unit: Vec<bf16> = data.p.k.iter().map(|x| bf16::from_f32(x.to_f32() / 11.3)).collect();
        let unit = b.device.upload(&unit)?;
        let unit = Tensor::contiguous(&b.device, "k", &unit, shape)?;
        let (g, beta) = (Rate { data: &g, heads: h }, Rate { data: &beta, heads: h });
        for (name, gate, k) in [
            ("recur linear 32k", Gate::Identity, k),
            ("recur scalar 32k", Gate::Scalar { g }, k),
            ("recur delta 32k", Gate::Delta { beta }, unit),
            ("recur gated delta 32k", Gate::GatedDelta { g, beta }, unit),
        ] {
            let choices = if b.all { vec![None, Some(1), Some(2)] } else { vec![None] };
            for cluster in choices {
                let mut call = Recur::new(gate, 1.0 / (d as f32).sqrt());
                call.cluster = cluster;
                let mut bytes = 0;
                let ms = b.time(|| {
                    bytes = call.forward(&b.device, &q, &k, &v, None, &mut out, None)?.bytes;
                    Ok(())
                })?;
                b.say(name, &format!("cluster {cluster:?}"), ms, bytes as f64 / ms / 1e6, "GB/s", "");
            }
        }
    }
    if let Some(file) = json {
        let facts = b.device.facts();
        let all = serde_json::json!({"device": facts.name, "driver": facts.driver, "rows": b.rows});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}
