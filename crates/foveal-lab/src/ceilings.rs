//! What the machine can do: arithmetic in registers, matrix products, reading memory, exponentials.

use crate::bench::stopped;
use crate::error::Result;
use foveal::prim::gemm::ab;
use foveal_kernels::exp::{Fun, apply_to};
use foveal_kernels::peak::{bf16_arithmetic, f32_arithmetic};
use foveal_kernels::{Isa, PackedLinear, WeightFormat};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// One measured ceiling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceiling {
    /// What was measured.
    pub what: String,
    /// Threads.
    pub threads: usize,
    /// The fastest of the repeats, in units of 10⁹ a second.
    pub rate: f64,
    /// `GFLOP/s`, `GB/s` or `10⁹/s`.
    pub unit: String,
}

/// The ceilings of one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Multiply-adds of f32 in registers, all threads.
    pub f32_arithmetic: Ceiling,
    /// Products of bf16 tiles in their registers, all threads; the same as in f32 where there are no tiles.
    pub bf16_arithmetic: Ceiling,
    /// Product of f32 matrices by the crate `gemm`, all threads.
    pub f32_product: Ceiling,
    /// Product of bf16 matrices by [`PackedLinear`], all threads.
    pub bf16_product: Ceiling,
    /// Reading memory on one thread.
    pub read_one: Ceiling,
    /// Reading memory on all threads.
    pub read_all: Ceiling,
    /// e^x of f32 in cache on one thread.
    pub exp: Ceiling,
}

impl Ceilings {
    /// All of them.
    pub fn list(&self) -> [&Ceiling; 7] {
        let Self { f32_arithmetic, bf16_arithmetic, f32_product, bf16_product, read_one, read_all, exp } = self;
        [f32_arithmetic, bf16_arithmetic, f32_product, bf16_product, read_one, read_all, exp]
    }

    /// The most that arithmetic on a storage type was seen to reach.
    pub fn compute(&self, dtype: &str) -> f64 {
        let (arithmetic, product) = match dtype {
            "f32" => (&self.f32_arithmetic, &self.f32_product),
            _ => (&self.bf16_arithmetic, &self.bf16_product),
        };
        arithmetic.rate.max(product.rate)
    }

    /// The better of two measurements of each: other programs can only lower a rate.
    pub fn or_better(self, other: Self) -> Self {
        let better = |a: Ceiling, b: Ceiling| if b.rate > a.rate { b } else { a };
        Self {
            f32_arithmetic: better(self.f32_arithmetic, other.f32_arithmetic),
            bf16_arithmetic: better(self.bf16_arithmetic, other.bf16_arithmetic),
            f32_product: better(self.f32_product, other.f32_product),
            bf16_product: better(self.bf16_product, other.bf16_product),
            read_one: better(self.read_one, other.read_one),
            read_all: better(self.read_all, other.read_all),
            exp: better(self.exp, other.exp),
        }
    }
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CeilingOptions {
    /// Rows and columns of the products.
    pub product: usize,
    /// MiB of memory read, more than the caches hold.
    pub memory_mib: usize,
    /// Each call is repeated for about this many seconds (3 to 200 times).
    pub seconds: f64,
}

impl Default for CeilingOptions {
    fn default() -> Self {
        Self { product: 2048, memory_mib: 512, seconds: 0.5 }
    }
}

/// Measure; `on` is told what runs next and the share (0 to 1) that is behind, `cancel` stops before the next call.
///
/// # Errors
/// Cancellation.
pub fn measure(o: &CeilingOptions, cancel: Option<&AtomicBool>, on: &mut dyn FnMut(f64, &str)) -> Result<Ceilings> {
    let threads = rayon::current_num_threads();
    // 10⁹ a second of `amount` a call, after one call to warm up.
    let fastest = |amount: f64, call: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        stopped(cancel)?;
        call()?;
        let (mut best, mut spent, mut calls) = (f64::INFINITY, 0.0, 0);
        while calls < 3 || (spent < o.seconds && calls < 200) {
            stopped(cancel)?;
            let begin = Instant::now();
            call()?;
            let s = begin.elapsed().as_secs_f64();
            (best, spent, calls) = (best.min(s), spent + s, calls + 1);
        }
        Ok(amount / best / 1e9)
    };
    let ceiling =
        |what: &str, threads, rate, unit: &str| Ceiling { what: what.into(), threads, rate, unit: unit.into() };
    let values = |n: usize| (0..n).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect::<Vec<f32>>();

    on(0.0, "arithmetic in registers");
    const ROUNDS: usize = 1 << 18;
    let per_thread = |work: &(dyn Fn() -> u64 + Sync)| {
        let flops = work() * threads as u64;
        fastest(flops as f64, &mut || {
            std::thread::scope(|s| (0..threads).for_each(|_| drop(s.spawn(work))));
            Ok(())
        })
    };
    let isa = Isa::active();
    let rate = per_thread(&|| f32_arithmetic(isa, ROUNDS).flops)?;
    let f32_arithmetic = ceiling("f32 arithmetic", threads, rate, "GFLOP/s");
    let tiles = match bf16_arithmetic(isa, 1) {
        Some(_) => per_thread(&|| bf16_arithmetic(isa, ROUNDS / 4).map_or(0, |w| w.flops))?,
        None => rate,
    };
    let bf16_arithmetic = ceiling("bf16 arithmetic", threads, tiles, "GFLOP/s");

    on(0.2, "product of f32 matrices");
    let n = o.product;
    let (a, mut c) = (values(n * n), vec![0f32; n * n]);
    let operations = 2.0 * (n as f64).powi(3);
    let rows = n.div_ceil(threads);
    let rate = fastest(operations, &mut || {
        c.par_chunks_mut(rows * n).zip(a.par_chunks(rows * n)).for_each(|(c, part)| {
            ab(part.len() / n, n, n, part, &a, c);
        });
        std::hint::black_box(&c);
        Ok(())
    })?;
    let f32_product = ceiling("f32 product", threads, rate, "GFLOP/s");

    on(0.4, "product of bf16 matrices");
    let packed = PackedLinear::pack(&a, n, n, WeightFormat::Bf16)?;
    let mut best = 0f64;
    // Fewer rows stay in the caches.
    for rows in [n.div_ceil(4), n] {
        let rate = fastest(operations / n as f64 * rows as f64, &mut || {
            packed.forward(&a[..rows * n], rows, &mut c[..rows * n], isa)?;
            std::hint::black_box(&c);
            Ok(())
        })?;
        best = best.max(rate);
    }
    let bf16_product = ceiling("bf16 product", threads, best, "GFLOP/s");
    drop((a, c, packed));

    let data: Vec<u32> = (0..o.memory_mib << 18).map(|i| i as u32).collect();
    let read = |threads: usize| {
        fastest(4.0 * data.len() as f64, &mut || {
            std::thread::scope(|s| {
                for part in data.chunks(data.len().div_ceil(threads).max(1)) {
                    s.spawn(move || std::hint::black_box(sum(part)));
                }
            });
            Ok(())
        })
    };
    on(0.6, "reading memory on one thread");
    let read_one = ceiling("memory read", 1, read(1)?, "GB/s");
    on(0.75, "reading memory on all threads");
    let read_all = ceiling("memory read", threads, read(threads)?, "GB/s");
    drop(data);

    on(0.9, "exponentials");
    const EXP: usize = 16_384;
    const CALLS: usize = 20;
    let x: Vec<f32> = values(EXP).iter().map(|x| x * 17.0 - 10.0).collect();
    let mut y = vec![0f32; EXP];
    let rate = fastest((EXP * CALLS) as f64, &mut || {
        for _ in 0..CALLS {
            apply_to(Fun::Exp, &x, &mut y, Isa::active())?;
            std::hint::black_box(&y);
        }
        Ok(())
    })?;
    let exp = ceiling("exponentials in cache", 1, rate, "10⁹/s");
    Ok(Ceilings { f32_arithmetic, bf16_arithmetic, f32_product, bf16_product, read_one, read_all, exp })
}

/// Sum in 32 independent lanes, which compilers turn into vector code that waits for memory only.
fn sum(x: &[u32]) -> u32 {
    let mut lanes = [0u32; 32];
    for c in x.chunks_exact(32) {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l = l.wrapping_add(*v);
        }
    }
    lanes.iter().fold(0, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn every_ceiling_is_finite_and_the_run_can_be_stopped() {
        let o = CeilingOptions { product: 64, memory_mib: 1, seconds: 0.0 };
        let mut last = -1.0;
        let c = measure(&o, None, &mut |at, _| {
            assert!(at > last && at < 1.0);
            last = at;
        })
        .unwrap();
        assert!(c.list().iter().all(|c| c.rate.is_finite() && c.rate > 0.0 && c.threads > 0));
        let stop = AtomicBool::new(true);
        assert!(matches!(measure(&o, Some(&stop), &mut |_, _| {}), Err(crate::LabError::Cancelled)));
    }

    #[test]
    fn the_better_of_two_runs_counts() {
        let mut a = crate::roofline::tests::sample().ceilings;
        let mut b = a.clone();
        (a.read_all.rate, b.exp.rate) = (50.0, 9.0);
        let c = a.clone().or_better(b.clone());
        assert_eq!((c.read_all.rate, c.exp.rate, c.f32_product.rate), (50.0, 9.0, a.f32_product.rate));
    }
}
