//! Block-sparse against dense attention: `attend_density [B H HKV T D] [f32|bf16] [runs=9]`, by default 1 8 8 8192 64
//! in both types.
//!
//! For random tables of blocks of 64 and 128 at densities of 50, 25, 10 and 5 % prints the median time, the ratio to the
//! dense call's in the same run (both in turn, after warming up), and that ratio over the density: 1 is a call that
//! costs what it visits. The density is that of the pairs really computed. `check` is the time to check the table,
//! which is part of the call.

use foveal_kernels::{Attend, BlockTable, Element, HeadTable, Isa, View, ViewMut};
use half::bf16;
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

fn noise() -> impl FnMut() -> f32 {
    let mut seed = 1u64;
    move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 24) as f32
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn compare<T: Element>([b, h, hkv, t, d]: [usize; 5], runs: usize) -> Result<(), Failure> {
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| T::from_f32((random() - 0.5) * 3.4)).collect::<Vec<T>>();
    let (qs, ks) = ([b, h, t, d], [b, hkv, t, d]);
    let (q, k, v) = (some(b * h * t * d), some(b * hkv * t * d), some(b * hkv * t * d));
    let (q, k, v) = (View::contiguous("q", &q, qs)?, View::contiguous("k", &k, ks)?, View::contiguous("v", &v, ks)?);
    let mut out = vec![0f32; b * h * t * d];
    let mut time = |table: Option<&BlockTable>| -> Result<(f64, u64), Failure> {
        let mut out = ViewMut::contiguous("out", &mut out, qs)?;
        let begin = Instant::now();
        let work = Attend::new(1.0 / (d as f32).sqrt()).table(table).run(&q, &k, &v, &mut out, None)?;
        Ok((begin.elapsed().as_secs_f64(), work.pairs))
    };
    let mut random = noise();
    for block in [64, 128] {
        let n = t.div_ceil(block);
        let tables: Vec<BlockTable> = [0.5, 0.25, 0.1, 0.05]
            .iter()
            .map(|&density| {
                let mut list = |_| (0..n as u32).filter(|_| random() < density).collect();
                let heads =
                    (0..b * h).map(|_| HeadTable::from_lists(block, block, (0..n).map(&mut list).collect())).collect();
                BlockTable { heads }
            })
            .collect();
        let mut dense = Vec::new();
        let mut sparse = vec![Vec::new(); tables.len()];
        let mut pairs = vec![0; tables.len()];
        time(None)?;
        for _ in 0..runs {
            dense.push(time(None)?.0);
            for ((table, times), pairs) in tables.iter().zip(&mut sparse).zip(&mut pairs) {
                let (seconds, visited) = time(Some(table))?;
                times.push(seconds);
                *pairs = visited;
            }
        }
        let dense = median(&mut dense);
        println!("{} {} blocks of {block}: dense {:.1} ms", Isa::active(), T::NAME, dense * 1e3);
        for ((table, times), pairs) in tables.iter().zip(&mut sparse).zip(pairs) {
            let density = pairs as f64 / (b * h * t * t) as f64;
            let sparse = median(times);
            let begin = Instant::now();
            table.heads.iter().try_for_each(|x| x.check(t, t))?;
            let check = begin.elapsed().as_secs_f64();
            println!(
                "  density {density:.4}: {:8.2} ms = {:.4} of dense, {:.3} of its share; check {:.3} ms",
                sparse * 1e3,
                sparse / dense,
                sparse / dense / density,
                check * 1e3
            );
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let nums: Vec<usize> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let shape = match nums[..] {
        [b, h, hkv, t, d] => [b, h, hkv, t, d],
        [] => [1, 8, 8, 8192, 64],
        _ => return Err("usage: attend_density [B H HKV T D] [f32|bf16] [runs=9]".into()),
    };
    let has = |s: &str| args.iter().any(|a| a == s);
    let runs = args.iter().find_map(|a| a.strip_prefix("runs=")?.parse().ok()).unwrap_or(9).max(1);
    if !has("bf16") {
        compare::<f32>(shape, runs)?;
    }
    if !has("f32") {
        compare::<bf16>(shape, runs)?;
    }
    Ok(())
}
