//! Speed of the chunked recurrences, against the bf16 GEMM rate of this machine in the same run.
//!
//! `cargo run --release -p foveal-kernels --example recur_bench [gates|long|NAME OF A GATE] [TOKENS]`

use foveal_kernels::recur::{Gate, Recur};
use foveal_kernels::{Isa, PackedLinear, View, ViewMut, WeightFormat, Work};
use half::bf16;
use std::time::Instant;

fn noise(n: usize) -> impl Iterator<Item = f32> {
    (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5)
}

/// Seconds of a call.
fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// A large product in bf16 on all threads.
struct Gemm {
    x: Vec<f32>,
    w: PackedLinear,
    y: Vec<f32>,
}

impl Gemm {
    const N: usize = 2048;

    fn new() -> Self {
        let n = Self::N;
        let x: Vec<f32> = noise(n * n).collect();
        let w = PackedLinear::pack(&x, n, n, WeightFormat::Bf16).expect("shape");
        Gemm { x, w, y: vec![0.0; n * n] }
    }
    /// GFLOP/s of one call.
    fn rate(&mut self) -> f64 {
        let s = seconds(|| {
            self.w.forward(&self.x, Self::N, &mut self.y, Isa::active()).expect("shape");
        });
        2e-9 * (Self::N as f64).powi(3) / s
    }
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
    println!("{} threads, {}", rayon::current_num_threads(), Isa::active());
    if only.as_deref() != Some("long") {
        let t = std::env::args().nth(2).and_then(|t| t.parse().ok()).unwrap_or(8192);
        gates(only.as_deref(), t);
    }
    if only.as_deref().is_none_or(|o| o == "long") {
        long();
    }
}

/// Every gate, or the one named, in turns with the product that it is held against.
fn gates(only: Option<&str>, t: usize) {
    let mut gemm = Gemm::new();
    let x = Inputs::new(t);
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
    println!(
        "H {H}, D {D}, T {}, bf16: forward, then backward; percent of the bf16 product 2048^3 in turns with it",
        x.t
    );
    for (name, gate) in list {
        if only.is_some_and(|o| o != "gates" && o != name) {
            continue;
        }
        let selective = matches!(gate, Gate::Selective { .. });
        let (q, k) = if selective { (x.view(&narrow), x.view(&narrow)) } else { (x.view(&x.q), k) };
        let v = x.view(&x.v);
        let r = Recur::new(gate, 0.125);
        let mut out = vec![0f32; H * x.t * D];
        let dout: Vec<f32> = noise(out.len()).collect();
        let (mut times, mut ceilings, mut flops) = ([vec![], vec![]], vec![], [0.0; 2]);
        for round in 0..12 {
            let ceiling = gemm.rate();
            let mut work = Work::default();
            let forward = seconds(|| {
                let mut o = ViewMut::contiguous("out", &mut out, [1, H, x.t, D]).expect("shape");
                work = r.forward(&q, &k, &v, None, &mut o, None).expect("shape");
            });
            flops[0] = 1e-9 * work.flops as f64;
            let dout = x.view(&dout);
            let backward = seconds(|| work = r.backward(&q, &k, &v, None, &dout, None).expect("shape").1);
            flops[1] = 1e-9 * work.flops as f64;
            // The first round warms up.
            if round > 0 {
                ceilings.push(ceiling);
                times[0].push(forward);
                times[1].push(backward);
            }
        }
        print!("{name:16}");
        for (s, flops) in times.into_iter().zip(flops) {
            let share = median(s.iter().zip(&ceilings).map(|(s, c)| 100.0 * flops / s / c).collect());
            let s = median(s);
            print!("  {:7.2} ms {:4.0} GFLOP/s {share:3.0}%", 1e3 * s, flops / s);
        }
        println!("  product {:.0} GFLOP/s", median(ceilings));
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
        let call = |_| {
            seconds(|| {
                let mut o = ViewMut::contiguous("out", &mut out, [1, 1, t, D]).expect("shape");
                r.forward(&q, &k, &v, None, &mut o, None).expect("shape");
                top = top.max(resident());
            })
        };
        let s = median((0..5).map(call).collect());
        println!(
            "T {t:8}: {:8.2} ms, {:.1} ns a token, memory beyond inputs and output {:.1} MiB",
            1e3 * s,
            1e9 * s / t as f64,
            top - before
        );
    }
}
