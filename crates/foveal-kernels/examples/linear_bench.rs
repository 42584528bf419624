//! Speed of packed linear layers: GFLOP/s of prefill, GB/s of decode.
//!
//! `cargo run --release -p foveal-kernels --example linear_bench [prefill|decode]`

use foveal_kernels::{Isa, PackedLinear, WeightFormat};
use std::sync::OnceLock;
use std::time::Instant;

/// Seconds by the wall clock, or of processor time with `FOVEAL_BENCH_CPU=1` (for one thread on
/// a busy machine).
fn now() -> f64 {
    static CPU: OnceLock<bool> = OnceLock::new();
    static START: OnceLock<Instant> = OnceLock::new();
    if *CPU.get_or_init(|| std::env::var_os("FOVEAL_BENCH_CPU").is_some()) {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
        return t.tv_sec as f64 + 1e-9 * t.tv_nsec as f64;
    }
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Best seconds of one call among repeats of at least 0.2 s in all.
fn best(mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed().as_secs_f64() < 0.2 {
        let t = now();
        f();
        best = best.min(now() - t);
    }
    best
}

fn main() {
    let noise = |n: usize| -> Vec<f32> { (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5).collect() };
    let only = std::env::args().nth(1);
    let wanted = |part: &str| only.as_deref().is_none_or(|o| o == part);
    if wanted("prefill") {
        prefill(noise);
    }
    if wanted("decode") {
        decode(noise);
    }
}

fn prefill(noise: impl Fn(usize) -> Vec<f32>) {
    println!("prefill, GFLOP/s");
    for (m, n, k) in [(2048, 1536, 576), (2048, 576, 1536), (2048, 3072, 576), (2048, 960, 576), (64, 1536, 576)] {
        let (x, w) = (noise(m * k), noise(n * k));
        let mut out = vec![0.0; m * n];
        print!("m {m:5} n {n:5} k {k:5}:");
        for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4] {
            let layer = PackedLinear::pack(&w, n, k, format).expect("shape");
            for isa in Isa::available().into_iter().rev() {
                if isa == Isa::Portable || (isa == Isa::Amx && format == WeightFormat::F32) {
                    continue;
                }
                let s = best(|| {
                    layer.forward(&x, m, &mut out, isa).expect("shape");
                });
                print!("  {format}/{isa} {:.0}", 2e-9 * (m * n * k) as f64 / s);
            }
        }
        println!();
    }
}

fn decode(noise: impl Fn(usize) -> Vec<f32>) {
    println!("decode over 30 layers of a 135M model (weights beyond the cache), GB/s and ms a token");
    let shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4] {
        let layers: Vec<Vec<PackedLinear>> = (0..30)
            .map(|_| {
                shapes.iter().map(|&(n, k)| PackedLinear::pack(&noise(n * k), n, k, format).expect("shape")).collect()
            })
            .collect();
        let head = PackedLinear::pack(&noise(49152 * 576), 49152, 576, format).expect("shape");
        let bytes: usize = layers.iter().flatten().chain([&head]).map(PackedLinear::bytes).sum();
        for isa in Isa::available() {
            for m in [1, 2, 4, 8, 16] {
                if isa == Isa::Portable && m > 1 {
                    continue;
                }
                let x = noise(m * 1536);
                let mut out = vec![0.0; m * 49152];
                let s = best(|| {
                    rayon::in_place_scope(|_| {
                        for l in layers.iter().flatten().chain([&head]) {
                            l.forward(&x[..m * l.k()], m, &mut out[..m * l.n()], isa).expect("shape");
                        }
                    });
                });
                print!("{format}/{isa} m {m}: {:.1} GB/s {:.2} ms   ", 1e-9 * bytes as f64 / s, 1e3 * s);
            }
            println!();
        }
    }
}
