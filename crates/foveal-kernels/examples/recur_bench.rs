//! Speed of the chunked recurrences, against the bf16 GEMM rate of this machine in the same run.
//!
//! `cargo run --release -p foveal-kernels --example recur_bench [gates|long]`

use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{Isa, PackedLinear, View, ViewMut, WeightFormat, Work};
use half::bf16;
use std::time::Instant;

fn noise(n: usize) -> impl Iterator<Item = f32> {
    (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5)
}

/// Median seconds of `runs` calls after one to warm up.
fn median(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut s: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    s.sort_by(f64::total_cmp);
    s[runs / 2]
}

/// GFLOP/s of a large product in bf16 on all threads.
fn gemm_rate() -> f64 {
    let n = 2048;
    let x: Vec<f32> = noise(n * n).collect();
    let w = PackedLinear::pack(&x, n, n, WeightFormat::Bf16).expect("shape");
    let mut y = vec![0.0; n * n];
    let s = median(9, || {
        w.forward(&x, n, &mut y, Isa::active()).expect("shape");
    });
    2e-9 * (n * n * n) as f64 / s
}

const H: usize = 8;
const D: usize = 64;

struct Inputs {
    t: usize,
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    g: Vec<f32>,
    beta: Vec<f32>,
    channel: Vec<f32>,
}

impl Inputs {
    fn new(t: usize) -> Self {
        let rows = |f: f32| noise(H * t * D).map(|x| bf16::from_f32(x * f)).collect::<Vec<_>>();
        Inputs {
            t,
            q: rows(1.0),
            // Rows of norm under one, as delta rules have them.
            k: rows(0.4),
            v: rows(1.0),
            g: noise(H * t).map(|x| 0.05 * (x - 0.5)).collect(),
            beta: noise(H * t).map(|x| x + 0.5).collect(),
            channel: noise(H * t * D).map(|x| 0.05 * (x - 0.5)).collect(),
        }
    }
    fn view<'a, E: Copy>(&self, x: &'a [E]) -> View<'a, E> {
        View::contiguous("operand", x, [1, H, self.t, x.len() / (H * self.t)]).expect("shape")
    }
}

fn main() {
    let only = std::env::args().nth(1);
    let wanted = |part: &str| only.as_deref().is_none_or(|o| o == part);
    let ceiling = gemm_rate();
    println!("{} threads, {}: bf16 GEMM 2048^3 {ceiling:.0} GFLOP/s", rayon::current_num_threads(), Isa::active());
    if wanted("gates") {
        gates(ceiling);
    }
    if wanted("long") {
        long();
    }
}

fn gates(ceiling: f64) {
    let x = Inputs::new(8192);
    let fixed_ssd = vec![-1.0f32; H];
    let fixed: Vec<f32> = (0..H * D * 16).map(|i| -(1.0 + (i % 16) as f32)).collect();
    let dt: Vec<f32> = x.channel.iter().map(|g| -g).collect();
    let dt_one: Vec<f32> = x.g.iter().map(|g| -g).collect();
    // The selective scan of Mamba has 16 states a channel.
    let narrow: Vec<bf16> = x.k.iter().copied().take(H * x.t * 16).collect();
    let (g, beta, channel, k) = (x.view(&x.g), x.view(&x.beta), x.view(&x.channel), x.view(&x.k));
    let list: [(&str, Gate<bf16>); 9] = [
        ("identity", Gate::Identity),
        ("scalar", Gate::Scalar { g }),
        ("channel", Gate::Channel { g: channel }),
        ("delta", Gate::Delta { beta }),
        ("gated delta", Gate::GatedDelta { g, beta }),
        ("channel delta", Gate::ChannelDelta { g: channel, beta }),
        ("low rank", Gate::LowRank { g: channel, a: x.view(&x.v), b: k }),
        ("ssd", Gate::Ssd { dt: x.view(&dt_one), a: &fixed_ssd }),
        ("selective, D 16", Gate::Selective { dt: x.view(&dt), a: &fixed }),
    ];
    println!("H {H}, D {D}, T {}, bf16: forward, then backward", x.t);
    for (name, gate) in list {
        let selective = matches!(gate, Gate::Selective { .. });
        let (q, k) = if selective { (x.view(&narrow), x.view(&narrow)) } else { (x.view(&x.q), k) };
        let v = x.view(&x.v);
        let r = Recur::new(gate, 0.125);
        let mut out = vec![0f32; H * x.t * D];
        let mut work = Work::default();
        let s = median(9, || {
            let mut o = ViewMut::contiguous("out", &mut out, [1, H, x.t, D]).expect("shape");
            work = r.forward(&q, &k, &v, None, &mut o, None).expect("shape");
        });
        let rate = 1e-9 * work.flops as f64 / s;
        print!("{name:16} {:7.2} ms {rate:6.0} GFLOP/s {:3.0}% of GEMM", 1e3 * s, 100.0 * rate / ceiling);
        let dout = x.view(&out);
        let s = median(5, || work = r.backward(&q, &k, &v, None, &dout, None).expect("shape").1);
        let rate = 1e-9 * work.flops as f64 / s;
        println!("  {:7.2} ms {rate:6.0} GFLOP/s {:3.0}%", 1e3 * s, 100.0 * rate / ceiling);
    }
}

/// Resident memory in MiB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 = status.split_whitespace().nth(1).and_then(|x| x.parse().ok()).unwrap_or(0.0);
    pages * 4096.0 / (1 << 20) as f64
}

/// Scalar decay of one head (so on one thread) at rising lengths, up to 1M tokens in one call.
fn long() {
    println!("scalar decay, one head, whole sequence in one call");
    for t in [8192usize, 65_536, 1 << 20] {
        let rows = || noise(t * D).map(bf16::from_f32).collect::<Vec<_>>();
        let (q, k, v) = (rows(), rows(), rows());
        let g: Vec<f32> = noise(t).map(|x| 0.05 * (x - 0.5)).collect();
        let view = |x| View::contiguous("operand", x, [1, 1, t, D]).expect("shape");
        let (q, k, v) = (view(&q), view(&k), view(&v));
        let gate = Gate::Scalar { g: View::contiguous("g", &g, [1, 1, t, 1]).expect("shape") };
        let mut out = vec![0f32; t * D];
        let r = Recur::new(gate, 0.125);
        out.fill(1.0);
        let before = resident();
        let mut top = before;
        let s = median(3, || {
            let mut o = ViewMut::contiguous("out", &mut out, [1, 1, t, D]).expect("shape");
            r.forward(&q, &k, &v, None, &mut o, None).expect("shape");
            top = top.max(resident());
        });
        println!(
            "T {t:8}: {:8.2} ms, {:.1} ns a token, memory beyond inputs and output {:.1} MiB",
            1e3 * s,
            1e9 * s / t as f64,
            top - before
        );
    }
}
