//! Keys-outer against queries-outer: `loop_orders [TOKENS] [TOPK] [GROUP]`.
//!
//! Times exact attention over the same lists of 64-key blocks, chosen for every query, by `fsa-nsa-kernel`'s loop over
//! key blocks and by the ordinary kernels, whose tiles of 16 queries compute the union of their lists. Medians of
//! interleaved rounds, beside dense attention.

use candle_core::{DType, Device, Tensor};
use foveal::kernel::fsa_nsa_kernel::{FsaNsaKernel, keys_outer};
use foveal::mixer::{MixInput, Mixer};
use foveal::prim::{AttendOptions, attend, attend_selected};
use foveal::sparse::HeadSelection;
use foveal_kernels::HeadTable;
use std::time::Instant;

/// Lists of single queries as tiles of 16 with one bit a query.
fn tiled(t: &HeadTable) -> HeadTable {
    let mut out = HeadTable { block_q: 16, rows: Some(Vec::new()), indptr: vec![0], blocks: Vec::new(), ..t.clone() };
    for queries in t.indptr[..t.indptr.len() - 1].chunks(16).enumerate().map(|(i, c)| i * 16..i * 16 + c.len()) {
        let mut bits = std::collections::BTreeMap::<u32, u64>::new();
        for (r, i) in queries.enumerate() {
            t.row(i).iter().for_each(|&x| *bits.entry(x).or_default() |= 1 << r);
        }
        out.blocks.extend(bits.keys());
        out.rows.get_or_insert_default().extend(bits.values());
        out.indptr.push(out.blocks.len());
    }
    out
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<usize> = std::env::args().skip(1).map(|s| s.parse()).collect::<Result<_, _>>()?;
    let at = |i: usize, or: usize| args.get(i).copied().unwrap_or(or);
    let (tokens, topk, group) = (at(0, 8192), at(1, 16), at(2, 4));
    let kv_heads = 2;
    let noise = |heads: usize| {
        let x = Tensor::randn(0f32, 1.0, (1, heads, tokens, 64), &Device::Cpu)?;
        Ok::<_, candle_core::Error>(if cfg!(target_arch = "x86_64") { x.to_dtype(DType::BF16)? } else { x })
    };
    let (q, k, v) = (noise(kv_heads * group)?, noise(kv_heads)?, noise(kv_heads)?);
    let chosen = FsaNsaKernel { topk, ..Default::default() }.mix(&MixInput::new(&q, &k, &v))?.selections;
    let lists: Vec<HeadTable> = chosen.iter().step_by(group).filter_map(|s| s.blocks.clone()).collect();
    let tables: Vec<HeadSelection> =
        chosen.iter().filter_map(|s| s.blocks.as_ref()).map(|t| HeadSelection::of_blocks(tiled(t))).collect();
    let o = AttendOptions::causal();
    let mut times = [const { Vec::new() }; 3];
    for round in 0..4 {
        let mut clock = |i: usize, run: &dyn Fn() -> foveal::Result<u64>| {
            let begin = Instant::now();
            let pairs = run()?;
            if round > 0 {
                times[i].push((begin.elapsed().as_secs_f64() * 1e3, pairs));
            }
            Ok::<_, foveal::Error>(())
        };
        clock(0, &|| Ok(attend(&q, &k, &v, &o, None)?.work.pairs))?;
        clock(1, &|| Ok(attend_selected(&q, &k, &v, &o, tables.clone())?.work.pairs))?;
        clock(2, &|| Ok(keys_outer(&q, &k, &v, &AttendOptions::default(), &lists)?.work.pairs))?;
    }
    println!("{tokens} tokens, {topk} blocks of 64 a query, {kv_heads} groups of {group} heads");
    for (name, mut t) in ["dense", "queries outer", "keys outer"].into_iter().zip(times) {
        t.sort_by(|a, b| a.0.total_cmp(&b.0));
        println!("{name:14} {:9.1} ms  {:6.1} million pairs", t[1].0, t[1].1 as f64 / 1e6);
    }
    Ok(())
}
