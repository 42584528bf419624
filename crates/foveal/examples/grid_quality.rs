//! How much of the exact attention each system for attention without a direction keeps, on a made video.
//!
//!     cargo run --release -p foveal --example grid_quality [TxHxW] [spec …]
//!
//! q and k are made, not recorded: every token has a place (random Fourier features, so that similarity falls with
//! distance in space and time) and an object (one of twelve that drift from frame to frame), and four heads weigh the two
//! differently; a fifth of each row is noise. Columns: share of the pairs visited, share of the exact weights on them (recall), the
//! same for as many keys a query chosen by the exact weights (best), pairs that the kernel computed and operations of
//! the estimator, both as shares of dense, the relative error of the output, and the time, estimator included, over that of
//! exact attention in the same run (the least of three each).

use candle_core::{Device, Tensor};
use foveal::apply::{ApplyOptions, apply_prefill};
use foveal::prim::{AttendOptions, attend};
use foveal::sparse::{Grid, mask};
use foveal::{Slot, Spec, registry};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::error::Error;
use std::time::Instant;

const D: usize = 64;
const HALF: usize = D / 2;
/// Logits between equal places and between equal objects, a head.
const HEADS: [[f32; 2]; 4] = [[9.0, 2.0], [2.0, 8.0], [6.0, 5.0], [2.0, 2.0]];
const OBJECTS: usize = 12;

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

/// q, k and v of all heads, (1, 4, T, D) each.
fn video(grid: Grid, seed: u64) -> [Vec<f32>; 3] {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Lengths over which similarity falls: frames, rows, columns.
    let waves: Vec<[f32; 4]> = (0..HALF)
        .map(|_| {
            let turn = rng.random_range(0.0..std::f32::consts::TAU);
            [normal(&mut rng) / 2.0, normal(&mut rng) / 3.0, normal(&mut rng) / 3.0, turn]
        })
        .collect();
    let codes: Vec<f32> = (0..OBJECTS * HALF).map(|_| normal(&mut rng) / (HALF as f32).sqrt()).collect();
    let objects: Vec<[f32; 4]> = (0..OBJECTS)
        .map(|_| {
            let side = [grid.h as f32, grid.w as f32];
            let place = side.map(|s| rng.random_range(0.0..s));
            [place[0], place[1], normal(&mut rng), normal(&mut rng)]
        })
        .collect();
    let mut base = Vec::with_capacity(grid.tokens() * D);
    for i in grid.range() {
        let [t, y, x] = grid.place(i).unwrap_or_default().map(|x| x as f32);
        base.extend(waves.iter().map(|w| (2.0 / HALF as f32).sqrt() * (w[0] * t + w[1] * y + w[2] * x + w[3]).cos()));
        let far = |o: &[f32; 4]| (o[0] + o[2] * t - y).powi(2) + (o[1] + o[3] * t - x).powi(2);
        let nearest = (0..OBJECTS).min_by(|&a, &b| far(&objects[a]).total_cmp(&far(&objects[b]))).unwrap_or(0);
        base.extend_from_slice(&codes[nearest * HALF..(nearest + 1) * HALF]);
    }
    let mut out = [Vec::new(), Vec::new(), Vec::new()];
    for gains in HEADS {
        for out in &mut out[..2] {
            for row in base.chunks_exact(D) {
                for (c, x) in row.iter().enumerate() {
                    // The square of a gain is a logit: both sides carry its root, and √D against the scale.
                    let gain = (gains[c / HALF] * (D as f32).sqrt()).sqrt();
                    out.push(gain * (x + 0.2 * normal(&mut rng) * (2.0 / D as f32).sqrt()));
                }
            }
        }
        out[2].extend(base.iter().map(|x| x + 0.3 * normal(&mut rng)));
    }
    out
}

/// A result and the least time of three runs, in seconds.
fn least<R>(mut f: impl FnMut() -> Result<R, Box<dyn Error>>) -> Result<(R, f64), Box<dyn Error>> {
    let mut best = f64::INFINITY;
    let mut timed = || -> Result<R, Box<dyn Error>> {
        let start = Instant::now();
        let r = f()?;
        best = best.min(start.elapsed().as_secs_f64());
        Ok(r)
    };
    timed()?;
    timed()?;
    let r = timed()?;
    Ok((r, best))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let grid: Grid = args.next().unwrap_or_else(|| "4x24x24".into()).parse()?;
    let mut specs: Vec<Spec> = args.map(|s| s.parse()).collect::<Result<_, _>>()?;
    if specs.is_empty() {
        for card in registry::cards().iter().filter(|c| c.has_slot(Slot::Prefill)) {
            let system = registry::build(&Spec::new(card.id), Slot::Prefill)?;
            if system.domain().full {
                specs.push(Spec::new(card.id));
            }
        }
        for other in [
            "svg2:q_clusters=24,k_clusters=100,top_p=0.9",
            "svg2:q_clusters=24,k_clusters=100,top_p=0.7",
            "vmoba:partition=space,threshold=0.25",
            "vmoba:partition=cube,cube_t=2,cube_h=4,cube_w=4,threshold=0.15",
            "vmoba:partition=cube,cube_t=2,cube_h=4,cube_w=4,threshold=0.3",
            "biformer-bra:side=6,topk=8",
            "biformer-bra:side=6,topk=24",
            "llsa:topk=16",
            "llsa:topk=16,disjoint=true",
        ] {
            specs.push(other.parse()?);
        }
    }
    let (t, h) = (grid.tokens(), HEADS.len());
    let [q, k, v] = video(grid, 1).map(|x| Tensor::from_vec(x, (1, h, t, D), &Device::Cpu));
    let (q, k, v) = (q?, k?, v?);
    let flat = |x: &Tensor| -> candle_core::Result<Vec<f32>> { x.flatten_all()?.to_vec1() };
    let (exact, dense_time) = least(|| Ok(attend(&q, &k, &v, &AttendOptions::default(), None)?))?;
    let dense = flat(&exact.out)?;
    // Exact weights of some 250 queries.
    let rows: Vec<u32> = (0..t as u32).step_by(t.div_ceil(250)).collect();
    let some = q.index_select(&Tensor::new(&rows[..], &Device::Cpu)?, 2)?;
    let scores = (some.matmul(&k.transpose(2, 3)?)? / (D as f64).sqrt())?;
    let weights = flat(&foveal::prim::softmax(&scores)?.0)?;
    println!("{grid}, {h} heads of {D}; made data, see the head of this file");
    println!(
        "{:<72} {:>7} {:>7} {:>7} {:>7} {:>8} {:>7} {:>6}",
        "system", "visited", "recall", "best", "pairs", "estimate", "error", "time"
    );
    for spec in specs {
        let options = ApplyOptions { scale: None, causal: false, grid: Some(grid) };
        let (a, time) =
            least(|| Ok(apply_prefill(&spec.id, registry::build(&spec, Slot::Prefill)?, &q, &k, &v, options)?))?;
        let (mut recall, mut best, mut seen) = (0f64, 0f64, vec![0u8; t]);
        let mut sorted = Vec::new();
        for (r, p) in weights.chunks_exact(t).enumerate().take(if a.selections.is_empty() { 0 } else { usize::MAX }) {
            mask::mask_row(&a.selections[r / rows.len()], rows[r % rows.len()] as usize, t, false, &mut seen);
            recall += p.iter().zip(&seen).filter(|(_, s)| **s == 1).map(|(p, _)| f64::from(*p)).sum::<f64>();
            let n = seen.iter().filter(|s| **s == 1).count();
            sorted.clear();
            sorted.extend_from_slice(p);
            if n > 0 && n < t {
                sorted.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
            }
            best += sorted[..n].iter().map(|&p| f64::from(p)).sum::<f64>();
        }
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let out = flat(&a.out)?;
        let error = norm(&mut out.iter().zip(&dense).map(|(a, b)| a - b)) / norm(&mut dense.iter().copied());
        let percent = |x: f64| format!("{:.1}%", 100.0 * x);
        // Without a selection of tokens there is no recall to tell.
        let of_rows = |x: f64| if a.selections.is_empty() { "-".into() } else { percent(x / (h * rows.len()) as f64) };
        println!(
            "{:<72} {:>7} {:>7} {:>7} {:>7} {:>8} {:>7.4} {:>6.2}",
            spec.to_string(),
            if a.selections.is_empty() {
                "-".into()
            } else {
                percent(a.visited_pairs() as f64 / a.dense_pairs() as f64)
            },
            of_rows(recall),
            of_rows(best),
            percent(a.work.pairs as f64 / exact.work.pairs as f64),
            percent(a.select.flops as f64 / exact.work.flops as f64),
            error,
            time / dense_time
        );
    }
    Ok(())
}
