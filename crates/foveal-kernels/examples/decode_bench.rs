//! Speed of decode over long stores, beside a plain read of as much memory in the same run.
//!
//! `cargo run --release -p foveal-kernels --example decode_bench`

use foveal_kernels::decode::{Codec, Decode, Segment, key_scores};
use foveal_kernels::{HeadKeys, Isa, KeyLists};
use half::bf16;
use rayon::prelude::*;
use std::time::Instant;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const D: usize = 64;

/// Best seconds of one call among repeats of at least 0.2 s in all.
fn best(mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed().as_secs_f64() < 0.2 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

/// Rows of one K/V head and codec.
struct Rows {
    f: Vec<f32>,
    b: Vec<bf16>,
    i: Vec<i8>,
    scales: Vec<f32>,
}

impl Rows {
    fn codec(&self, kind: &str) -> Codec<'_> {
        match kind {
            "f32" => Codec::F32 { data: &self.f, stride: D },
            "bf16" => Codec::Bf16 { data: &self.b, stride: D },
            _ => Codec::Int8 { data: &self.i, stride: D, scales: &self.scales },
        }
    }
}

fn main() {
    let q: Vec<f32> = (0..HEADS * D).map(|i| ((i * 37) % 100) as f32 / 50.0 - 1.0).collect();
    for keys in [8192, 65536] {
        for kind in ["f32", "bf16", "int8"] {
            let x = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
            let n = if kind == "f32" { keys * D } else { 0 };
            let b = if kind == "bf16" { keys * D } else { 0 };
            let i = if kind == "int8" { keys * D } else { 0 };
            let rows: Vec<Rows> = (0..2 * KV_HEADS)
                .map(|_| Rows {
                    f: (0..n).map(x).collect(),
                    b: (0..b).map(|i| bf16::from_f32(x(i))).collect(),
                    i: (0..i).map(|i| (x(i) * 127.0) as i8).collect(),
                    scales: vec![1.0 / 127.0; if kind == "int8" { keys } else { 0 }],
                })
                .collect();
            let kv: Vec<Vec<Segment>> = rows
                .chunks(2)
                .map(|r| vec![Segment { k: r[0].codec(kind), v: r[1].codec(kind), len: keys, channels: None }])
                .collect();
            let (mut out, mut lse) = (vec![0.0; HEADS * D], vec![0.0; HEADS]);
            let bytes = 2 * KV_HEADS * keys * kv[0][0].k.row_bytes(D);
            let memory = vec![1u64; bytes / 8];
            let read = best(|| {
                let sum = |c: &[u64]| c.iter().fold(0u64, |a, b| a.wrapping_add(*b));
                std::hint::black_box(memory.par_chunks(1 << 14).map(sum).reduce(|| 0, u64::wrapping_add));
            });
            print!("{keys:6} keys {kind:4}: plain read {:5.1} GB/s", 1e-9 * bytes as f64 / read);
            for isa in Isa::available() {
                if isa == Isa::Amx {
                    continue;
                }
                let call = Decode { isa, ..Decode::new(0.125) };
                let mut work = Default::default();
                let s = best(|| {
                    work = call.run(&q, [HEADS, 1, D], &kv, D, None, &mut out, &mut lse).expect("shapes");
                });
                assert_eq!(work.bytes, bytes as u64);
                print!("  {isa} {:5.1} GB/s ({:.2} ms)", 1e-9 * bytes as f64 / s, 1e3 * s);
            }
            // A sixteenth of the keys, and the scores alone.
            let call = Decode::new(0.125);
            let list: Vec<u32> = (0..keys as u32).filter(|j| j.wrapping_mul(2_654_435_761) >> 28 == 0).collect();
            let heads = (0..HEADS).map(|_| HeadKeys::from_lists(1, vec![list.clone()])).collect();
            let select = KeyLists { heads };
            let s = best(|| {
                call.run(&q, [HEADS, 1, D], &kv, D, Some(&select), &mut out, &mut lse).expect("shapes");
            });
            print!("  selected 1/16 {:.2} ms", 1e3 * s);
            let mut scores = vec![0.0; 3 * keys];
            let s = best(|| {
                key_scores(&q[..3 * D], D, kv[0][0].k, keys, &mut scores, Isa::active()).expect("shapes");
            });
            println!("  key_scores {:.1} GB/s", 1e-9 * (bytes / 6) as f64 / s);
        }
    }
}
