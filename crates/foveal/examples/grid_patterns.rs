//! Static patterns on token grids: measured speed-up over our own dense kernel beside the simulator's prediction.
//!
//!     cargo run --release -p foveal --example grid_patterns [rounds] [f32 or bf16] [GRID …]
//!
//! One batch of 8 heads of 64 channels, no direction. Rounds interleave dense attention and every pattern, pattern times include
//! making the selection and putting tokens in order, and medians are compared.

use candle_core::{DType, Device, Tensor};
use foveal::prim::{AttendOptions, attend, attend_selected};
use foveal::sparse::axes::{best_tile, simulate};
use foveal::sparse::run::{At, prefill};
use foveal::sparse::{Grid, HeadProblem, Mat};
use foveal::{Slot, Spec, System, registry};
use std::time::Instant;

const HEADS: usize = 8;
const WIDTH: usize = 64;

/// Patterns whose frames, rows and columns fit the grids.
const SYSTEMS: [&str; 12] = [
    "generalized-neighborhood-attention:window=8;16;16",
    "generalized-neighborhood-attention:window=8;16;16,stride=4;8;8",
    "generalized-neighborhood-attention:window=8;16;16,stride=8;16;16",
    "generalized-neighborhood-attention:window=4;8;8",
    "generalized-neighborhood-attention:window=4;8;8,stride=4;8;8",
    "fused-neighborhood-attention:window=7",
    "dilated-neighborhood-attention:window=7",
    "halonet",
    "lrgt:groups=4",
    "radial-attention",
    "radial-attention:decay=0.25",
    "sparse-vdit:width=0.0625",
];

fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rounds: usize = args.first().map_or(Ok(5), |s| s.parse())?;
    let dtype = match args.get(1).map_or("f32", String::as_str) {
        "bf16" => DType::BF16,
        _ => DType::F32,
    };
    let mut grids: Vec<Grid> = args.iter().skip(2).map(|g| g.parse()).collect::<Result<_, _>>()?;
    if grids.is_empty() {
        grids = vec![Grid::new(1, 64, 64), Grid::new(16, 16, 32)];
    }
    for grid in grids {
        let n = grid.tokens();
        let random = || Tensor::randn(0f32, 1.0, (1, HEADS, n, WIDTH), &Device::Cpu);
        let (q, k, v) = (random()?, random()?, random()?);
        let low = |x: &Tensor| x.to_dtype(dtype);
        let (ql, kl, vl) = (low(&q)?, low(&k)?, low(&v)?);
        let options = AttendOptions::default();
        let at = At { grid: Some(grid), ..At::NOWHERE };
        let mut systems = Vec::new();
        for id in SYSTEMS {
            let spec: Spec = id.parse()?;
            if let System::Selector(s) = registry::build(&spec, Slot::Prefill)? {
                systems.push((id, s));
            }
        }
        let mut dense = Vec::new();
        let mut times = vec![(Vec::new(), Vec::new()); systems.len()];
        let mut pairs = vec![0u64; systems.len()];
        let rows = vec![0f32; n];
        for round in 0..rounds + 1 {
            let start = Instant::now();
            let exact = attend(&ql, &kl, &vl, &options, None)?;
            let took = start.elapsed().as_secs_f64();
            if round > 0 {
                dense.push(took);
            }
            for (((_, s), (all, select)), pairs) in systems.iter().zip(&mut times).zip(&mut pairs) {
                let start = Instant::now();
                let (work, chosen) = if dtype == DType::F32 {
                    let p = prefill(|_| Some(s.as_ref()), &q, &k, &v, &options, at)?;
                    (p.attended.work, p.select_time.as_secs_f64())
                } else {
                    // As a model does: one selection a head, attention in bf16.
                    let m = Mat::new(&rows, n, 1, 1);
                    let p = HeadProblem { causal: false, grid: Some(grid), ..HeadProblem::new(m, m, 0.125) };
                    let all = (0..HEADS).map(|_| Ok(s.select(&p)?.0)).collect::<foveal::Result<Vec<_>>>()?;
                    let chosen = start.elapsed().as_secs_f64();
                    (attend_selected(&ql, &kl, &vl, &options, all)?.work, chosen)
                };
                let took = start.elapsed().as_secs_f64();
                *pairs = work.pairs;
                if round > 0 {
                    all.push(took);
                    select.push(chosen);
                }
            }
            drop(exact);
        }
        let base = median(&mut dense);
        println!(
            "\n{grid}: {n} tokens, {HEADS} heads of {WIDTH}, {dtype:?}, dense {:.1} ms, {rounds} rounds",
            base * 1e3
        );
        println!(
            "{:>9} {:>9} {:>9} {:>9} {:>8}  pattern (tile of queries)",
            "bound", "predicted", "measured", "of pred.", "select"
        );
        for ((id, s), ((all, select), pairs)) in systems.iter().zip(times.iter_mut().zip(&pairs)) {
            let counted = (HEADS * n * n) as f64 / *pairs as f64;
            let (bound, predicted, tile) = match s.axes(grid) {
                Some(axes) => {
                    let tile = best_tile(&axes);
                    let sim = simulate(&axes, tile, [1; 3]);
                    (sim.bound(), sim.speedup(), format!("{}x{}x{}", tile[0], tile[1], tile[2]))
                }
                // Of no product the kernel's own count of pairs in tiles is the prediction.
                None => (f64::NAN, counted, "runs of 64".into()),
            };
            let (time, choose) = (median(all), median(select));
            let measured = base / time;
            println!(
                "{bound:>9.2} {predicted:>9.2} {measured:>9.2} {:>8.0}% {:>7.0}%  {id} ({tile})",
                100.0 * measured / predicted,
                100.0 * choose / time
            );
        }
    }
    Ok(())
}
