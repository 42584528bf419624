//! Sparse against dense attention: `attend_density [B H HKV T D] [f32|bf16] [KIND...] [OPTION=VALUE...]`, by default
//! 1 8 8 8192 64 in both types, blocks of 64 and of 128 at densities of 50, 25, 10 and 5 %, 9 runs.
//!
//! KIND is one of
//!
//!     blocks    random blocks for each block of queries
//!     rows      the same with row masks: half of the rows of a block attend, chosen at random
//!     keys      single keys, chosen at random for each block of queries
//!     stripes   half of the density as blocks, half as single keys, in one pass
//!
//! OPTION is one of `runs=9`, `block=64,128` (blocks of as many queries), `percent=50,25,10,5`, `causal=1` and `grad=1` (the
//! backward pass alone).
//!
//! Prints the median time, the ratio to the dense call's in the same run (both in turn, after warming up), and that ratio
//! over the density: 1 is a call that costs what it visits. The density is that of the pairs really computed.
//! `check` is the time to check tables and lists, which is part of the call.

#[path = "common/visited.rs"]
mod visited;

use foveal_kernels::{
    Attend, AttendGrads, Element, Isa, Upstream, View, ViewMut, Work, attend_indexed, attend_indexed_backward,
};
use half::bf16;
use std::time::Instant;
use visited::Visited;

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

struct Setting {
    shape: [usize; 5],
    runs: usize,
    kinds: Vec<String>,
    blocks: Vec<usize>,
    percent: Vec<f32>,
    causal: bool,
    grad: bool,
}

fn compare<T: Element>(setting: &Setting) -> Result<(), Failure> {
    let [b, h, hkv, t, d] = setting.shape;
    let mut random = noise();
    let mut some = |n: usize| (0..n).map(|_| T::from_f32((random() - 0.5) * 3.4)).collect::<Vec<T>>();
    let (qs, ks) = ([b, h, t, d], [b, hkv, t, d]);
    let (nq, nk) = (b * h * t * d, b * hkv * t * d);
    let (q, k, v) = (some(nq), some(nk), some(nk));
    let dout: Vec<f32> = if setting.grad { some(nq).into_iter().map(T::to_f32).collect() } else { Vec::new() };
    let (q, k, v) = (View::contiguous("q", &q, qs)?, View::contiguous("k", &k, ks)?, View::contiguous("v", &v, ks)?);
    let (mut out, mut lse) = (vec![0f32; nq], vec![0f32; b * h * t]);
    let (mut dq, mut dk, mut dv) = if setting.grad {
        (vec![0f32; nq], vec![0f32; nk], vec![0f32; nk])
    } else {
        (Vec::new(), Vec::new(), Vec::new())
    };
    let mut time = |visited: &Visited| -> Result<(f64, Work), Failure> {
        let p = Attend::new(1.0 / (d as f32).sqrt()).causal(setting.causal).table(visited.table.as_ref());
        let mut begin = Instant::now();
        let mut o = ViewMut::contiguous("out", &mut out, qs)?;
        let mut work = match &visited.lists {
            None => p.run(&q, &k, &v, &mut o, Some(&mut lse))?,
            Some(l) => attend_indexed(&p, l, &q, &k, &v, &mut o, Some(&mut lse))?,
        };
        if setting.grad {
            let out = View::contiguous("out", &out, qs)?;
            let dout = View::contiguous("dout", &dout, qs)?;
            let up = Upstream { out: &out, lse: &lse, dout: &dout, dlse: None };
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
        Ok((begin.elapsed().as_secs_f64(), work))
    };
    let mut random = noise();
    for kind in &setting.kinds {
        for &block in &setting.blocks {
            let choices: Vec<Visited> = setting
                .percent
                .iter()
                .map(|p| Visited::random(kind, b * h, t, block, p / 100.0, &mut random))
                .collect();
            let mut dense = Vec::new();
            let mut sparse = vec![Vec::new(); choices.len()];
            let mut pairs = vec![0; choices.len()];
            let all = time(&Visited::DENSE)?.1.pairs;
            for _ in 0..setting.runs {
                dense.push(time(&Visited::DENSE)?.0);
                for ((choice, times), pairs) in choices.iter().zip(&mut sparse).zip(&mut pairs) {
                    let (seconds, work) = time(choice)?;
                    times.push(seconds);
                    *pairs = work.pairs;
                }
            }
            let dense = median(&mut dense);
            println!("{} {} {kind} of {block}: dense {:.1} ms", Isa::active(), T::NAME, dense * 1e3);
            for ((choice, times), pairs) in choices.iter().zip(&mut sparse).zip(pairs) {
                let density = pairs as f64 / all as f64;
                let sparse = median(times);
                let begin = Instant::now();
                choice.check(t)?;
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
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let nums: Vec<usize> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let shape = match nums[..] {
        [b, h, hkv, t, d] => [b, h, hkv, t, d],
        [] => [1, 8, 8, 8192, 64],
        _ => return Err("give all of B H HKV T D, or none".into()),
    };
    let mut setting = Setting {
        shape,
        runs: 9,
        kinds: Vec::new(),
        blocks: vec![64, 128],
        percent: vec![50.0, 25.0, 10.0, 5.0],
        causal: false,
        grad: false,
    };
    let (mut f32, mut bf16) = (false, false);
    for a in args.iter().filter(|a| a.parse::<usize>().is_err()) {
        match (a.as_str(), a.split_once('=')) {
            ("f32", _) => f32 = true,
            ("bf16", _) => bf16 = true,
            ("blocks" | "rows" | "keys" | "stripes", _) => setting.kinds.push(a.clone()),
            (_, Some(("runs", x))) => setting.runs = x.parse::<usize>()?.max(1),
            (_, Some(("block", x))) => setting.blocks = x.split(',').map(str::parse).collect::<Result<_, _>>()?,
            (_, Some(("percent", x))) => setting.percent = x.split(',').map(str::parse).collect::<Result<_, _>>()?,
            (_, Some(("causal", x))) => setting.causal = x == "1",
            (_, Some(("grad", x))) => setting.grad = x == "1",
            _ => return Err(format!("{a}: arguments are B H HKV T D, f32, bf16, blocks, rows, keys, stripes, runs=, block=, percent=, causal=, grad=").into()),
        }
    }
    if setting.kinds.is_empty() {
        setting.kinds.push("blocks".into());
    }
    if f32 || !bf16 {
        compare::<f32>(&setting)?;
    }
    if bf16 || !f32 {
        compare::<bf16>(&setting)?;
    }
    Ok(())
}
