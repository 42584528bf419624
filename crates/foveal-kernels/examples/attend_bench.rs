//! Time of exact attention: `attend_bench B H HKV TQ TK D [causal] [bf16] [density=0.25] [block=64] [group=1]`.
//!
//! Prints the best and median of several runs in ms, GFLOP/s of the work really done, and the same
//! per second of processor time, which other programs on the machine disturb less.

use foveal_kernels::{
    Attend, BlockTable, Element, HeadKeys, HeadTable, Isa, KeyLists, View, ViewMut, Work, attend_indexed,
};
use half::bf16;
use std::time::Instant;

fn run<T: Element>(
    call: &Attend,
    lists: Option<&KeyLists>,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    o: &mut ViewMut<f32>,
) -> foveal_kernels::Result<Work> {
    match lists {
        None => call.run(q, k, v, o, None),
        Some(l) => attend_indexed(call, l, q, k, v, o, None),
    }
}

/// Processor time of this process (all threads), from `/proc`; NaN elsewhere.
fn cpu_seconds() -> f64 {
    // Fields 14 and 15 after the command's closing parenthesis, in hundredths of a second.
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
        Some(fields.next()?.parse::<f64>().ok()? + fields.next()?.parse::<f64>().ok()?)
    };
    ticks().map_or(f64::NAN, |t| t / 100.0)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let nums: Vec<usize> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let [b, h, hkv, tq, tk, d] = nums[..] else {
        eprintln!("usage: attend_bench B H HKV TQ TK D [causal] [bf16] [density=0.25] [block=64] [group=1]");
        std::process::exit(2);
    };
    let has = |s: &str| args.iter().any(|a| a == s);
    let value = |s: &str| args.iter().find_map(|a| a.strip_prefix(s)?.parse::<f64>().ok());
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((seed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 3.4
    };
    let q: Vec<f32> = (0..b * h * tq * d).map(|_| random()).collect();
    let k: Vec<f32> = (0..b * hkv * tk * d).map(|_| random()).collect();
    let v: Vec<f32> = (0..b * hkv * tk * d).map(|_| random()).collect();
    let table = value("density=").map(|density| {
        let block = value("block=").unwrap_or(64.0) as usize;
        let nk = tk.div_ceil(block);
        let heads = (0..b * h)
            .map(|_| {
                let lists = (0..tq.div_ceil(block))
                    .map(|_| (0..nk as u32).filter(|_| f64::from(random() / 3.4 + 0.5) < density).collect())
                    .collect();
                HeadTable::from_lists(block, block, lists)
            })
            .collect();
        BlockTable { heads }
    });
    // With a group: key lists of that density instead of blocks.
    let group = value("group=").map(|g| g as usize);
    let lists = group.map(|group| {
        let density = value("density=").unwrap_or(1.0);
        let heads = (0..b * h)
            .map(|_| {
                let list = |_| (0..tk as u32).filter(|_| f64::from(random() / 3.4 + 0.5) < density).collect();
                HeadKeys::from_lists(group, (0..tq.div_ceil(group)).map(list).collect())
            })
            .collect();
        KeyLists { heads }
    });
    let table = if lists.is_some() { None } else { table };
    let call = Attend::new(1.0 / (d as f32).sqrt()).causal(has("causal")).table(table.as_ref()).isa(Isa::active());
    let mut out = vec![0f32; b * h * tq * d];
    let narrow = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let (qh, kh, vh) = (narrow(&q), narrow(&k), narrow(&v));
    let (qs, ks) = ([b, h, tq, d], [b, hkv, tk, d]);
    let mut times = Vec::new();
    let cpu = cpu_seconds();
    let start = Instant::now();
    let mut work = Default::default();
    while times.len() < 5 || (start.elapsed().as_secs_f64() < 1.5 && times.len() < 200) {
        let mut o = ViewMut::contiguous("out", &mut out, qs).expect("shape");
        let t = Instant::now();
        work = if has("bf16") {
            let view = |x, s| View::contiguous("bf16", x, s).expect("shape");
            run(&call, lists.as_ref(), &view(&qh, qs), &view(&kh, ks), &view(&vh, ks), &mut o)
        } else {
            let view = |x, s| View::contiguous("f32", x, s).expect("shape");
            run(&call, lists.as_ref(), &view(&q, qs), &view(&k, ks), &view(&v, ks), &mut o)
        }
        .expect("run");
        times.push(t.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    println!(
        "{} best {best:.3} ms, median {median:.3} ms, {:.1} GFLOP/s ({:.1} a core), pairs {:.4} of all",
        Isa::active(),
        work.flops as f64 / best / 1e6,
        work.flops as f64 * times.len() as f64 / (cpu_seconds() - cpu) / 1e9,
        work.pairs as f64 / (b * h * tq * tk) as f64
    );
}
