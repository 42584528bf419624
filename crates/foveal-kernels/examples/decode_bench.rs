//! Speed of decode over long stores, beside a plain read of as much memory in the same rounds.
//!
//! `cargo run --release -p foveal-kernels --example decode_bench [-- near|codecs|paged|ragged|latent]...`
//!
//! Times are medians of rounds in which all variants of a line take turns. Calls come from a thread of the pool,
//! as a decoding model's do.

use foveal_kernels::decode::{Codec, Decode, Segment, Sequence, int4_row_bytes, key_scores, pack_int4};
use foveal_kernels::{HeadKeys, Isa, KeyLists};
use half::bf16;
use rayon::prelude::*;
use std::time::Instant;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const D: usize = 64;

/// Median seconds of each call, in turns for at least 0.6 s and 9 rounds in all.
fn medians(calls: &mut [Box<dyn FnMut() + '_>]) -> Vec<f64> {
    calls.iter_mut().for_each(|c| c());
    let start = Instant::now();
    let mut times = vec![Vec::new(); calls.len()];
    while times[0].len() < 9 || start.elapsed().as_secs_f64() < 0.6 {
        for (c, times) in calls.iter_mut().zip(&mut times) {
            let t = Instant::now();
            c();
            times.push(t.elapsed().as_secs_f64());
        }
    }
    let middle = |t: &mut Vec<f64>| {
        t.sort_by(f64::total_cmp);
        t[t.len() / 2]
    };
    times.iter_mut().map(middle).collect()
}

/// Sum in lanes that wait for memory only.
fn sum(x: &[u32]) -> u32 {
    let mut lanes = [0u32; 64];
    for c in x.chunks_exact(64) {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l = l.wrapping_add(*v);
        }
    }
    lanes.iter().fold(0, |a, &b| a.wrapping_add(b))
}

/// Reads all of `x` on both threads, in parts as decode has them.
fn read(x: &[u32]) {
    std::hint::black_box(x.par_chunks((x.len() / 64).max(1 << 15)).map(sum).reduce(|| 0, u32::wrapping_add));
}

/// Elements that begin at a cache line, as a store's do.
struct Aligned<T>(Vec<T>, usize);

impl<T: Copy> Aligned<T> {
    fn new(x: Vec<T>) -> Self {
        let Some(&fill) = x.first() else { return Aligned(x, 0) };
        let mut held: Vec<T> = Vec::with_capacity(x.len() + 64);
        let at = held.as_ptr().align_offset(64).min(64);
        held.resize(at, fill);
        held.extend(x);
        Aligned(held, at)
    }

    fn from(&self, first: usize) -> &[T] {
        &self.0[self.1 + first..]
    }
}

/// Rows of one K/V head in one codec.
enum Rows {
    F(Aligned<f32>, usize),
    B(Aligned<bf16>, usize),
    I(Aligned<i8>, Vec<f32>, usize),
    N(Aligned<u8>, usize),
}

impl Rows {
    fn new(kind: &str, rows: usize, width: usize) -> Self {
        let x = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let n = rows * width;
        match kind {
            "f32" => Rows::F(Aligned::new((0..n).map(x).collect()), width),
            "bf16" => Rows::B(Aligned::new((0..n).map(|i| bf16::from_f32(x(i))).collect()), width),
            "int8" => {
                Rows::I(Aligned::new((0..n).map(|i| (x(i) * 127.0) as i8).collect()), vec![1.0 / 127.0; rows], width)
            }
            _ => {
                let mut out = Vec::new();
                pack_int4(&(0..n).map(x).collect::<Vec<f32>>(), width, &mut out).expect("whole rows");
                Rows::N(Aligned::new(out), int4_row_bytes(width))
            }
        }
    }

    /// Rows from `first` on.
    fn from(&self, first: usize) -> Codec<'_> {
        match self {
            Rows::F(d, s) => Codec::F32 { data: d.from(first * s), stride: *s },
            Rows::B(d, s) => Codec::Bf16 { data: d.from(first * s), stride: *s },
            Rows::I(d, f, s) => Codec::Int8 { data: d.from(first * s), stride: *s, scales: &f[first..] },
            Rows::N(d, s) => Codec::Int4 { data: d.from(first * s), stride: *s },
        }
    }
}

/// Keys and values of each K/V head.
struct Store(Vec<(Rows, Rows)>, usize);

impl Store {
    fn new(kind: &str, keys: usize) -> Self {
        Store((0..KV_HEADS).map(|_| (Rows::new(kind, keys, D), Rows::new(kind, keys, D))).collect(), keys)
    }

    /// In pages of `page` tokens; with `shuffle`, pages that follow one another lie far apart.
    fn pages(&self, page: usize, shuffle: bool) -> Vec<Vec<Segment<'_>>> {
        let count = self.1.div_ceil(page);
        let place = |i: usize| if shuffle { i * 37 % count } else { i };
        self.0
            .iter()
            .map(|(k, v)| {
                let at = |i| place(i) * page;
                let len = |i| page.min(self.1 - at(i));
                (0..count)
                    .map(|i| Segment { k: k.from(at(i)), v: v.from(at(i)), len: len(i), channels: None })
                    .collect()
            })
            .collect()
    }
}

fn queries(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37) % 100) as f32 / 50.0 - 1.0).collect()
}

/// Nanoseconds a key of one head where it lies in a near cache: what is left of a key's time is memory's.
fn near() {
    let q = queries(HEADS * D);
    for kind in ["f32", "bf16", "int8", "int4"] {
        let store = Store::new(kind, 480);
        let kv = store.pages(480, false);
        let call = |isa| {
            let (mut out, mut lse) = ([0.0; HEADS * D], [0.0; HEADS]);
            let call = Decode { isa, ..Decode::new(0.125) };
            for _ in 0..8 {
                call.run(&q, [HEADS, 1, D], &kv, D, None, &mut out, &mut lse).expect("shapes");
            }
        };
        let call = &call;
        let mut calls: Vec<Box<dyn FnMut()>> = Vec::new();
        for isa in Isa::available() {
            calls.push(Box::new(move || call(isa)));
        }
        print!("{kind:4}: ns a key in cache, one thread:");
        for (isa, s) in Isa::available().into_iter().zip(medians(&mut calls)) {
            print!("  {isa} {:.2}", 1e9 * s / (8 * 480 * KV_HEADS) as f64);
        }
        println!();
    }
}

fn codecs() {
    let q = queries(HEADS * D);
    for keys in [8192, 65536] {
        for kind in ["f32", "bf16", "int8", "int4"] {
            let store = Store::new(kind, keys);
            let kv = store.pages(keys, false);
            let bytes = 2 * KV_HEADS * keys * kv[0][0].k.row_bytes(D);
            let memory = vec![1u32; bytes / 4];
            // A sixteenth of the keys, and the scores alone.
            let list: Vec<u32> = (0..keys as u32).filter(|j| j.wrapping_mul(2_654_435_761) >> 28 == 0).collect();
            let select = KeyLists { heads: (0..HEADS).map(|_| HeadKeys::from_lists(1, vec![list.clone()])).collect() };
            let isas: Vec<Isa> = Isa::available().into_iter().filter(|i| *i > Isa::Portable).collect();
            let call = |isa, select: Option<&KeyLists>| {
                let (mut out, mut lse) = ([0.0; HEADS * D], [0.0; HEADS]);
                let call = Decode { isa, ..Decode::new(0.125) };
                call.run(&q, [HEADS, 1, D], &kv, D, select, &mut out, &mut lse).expect("shapes")
            };
            assert_eq!(call(Isa::active(), None).bytes, bytes as u64);
            let mut scores = vec![0.0; 3 * keys];
            let mut calls: Vec<Box<dyn FnMut()>> = vec![Box::new(|| read(&memory))];
            for &isa in &isas {
                calls.push(Box::new(move || _ = call(isa, None)));
            }
            calls.push(Box::new(|| _ = call(Isa::active(), Some(&select))));
            calls.push(Box::new(|| {
                key_scores(&q[..3 * D], D, kv[0][0].k, keys, &mut scores, Isa::active()).expect("shapes");
            }));
            let times = medians(&mut calls);
            let rate = |s: f64| 1e-9 * bytes as f64 / s;
            print!("{keys:6} keys {kind:4}: read {:5.1} GB/s", rate(times[0]));
            for (isa, &s) in isas.iter().zip(&times[1..]) {
                print!("  {isa} {:5.1} ({:.0}%, {:.3} ms)", rate(s), 100.0 * times[0] / s, 1e3 * s);
            }
            let [chosen, scores] = times[times.len() - 2..] else { unreachable!("two calls were added") };
            println!("  selected 1/16 {:.3} ms  key_scores {:.1} GB/s", 1e3 * chosen, rate(scores) / 6.0);
        }
    }
}

fn paged() {
    let (q, keys) = (queries(HEADS * D), 65536);
    for kind in ["f32", "bf16", "int8", "int4"] {
        let store = Store::new(kind, keys);
        let stores: Vec<_> =
            [(keys, false), (256, true), (64, true), (16, true), (16, false)].map(|(p, s)| store.pages(p, s)).into();
        let call = |kv: &[Vec<Segment>]| {
            let (mut out, mut lse) = ([0.0; HEADS * D], [0.0; HEADS]);
            Decode::new(0.125).run(&q, [HEADS, 1, D], kv, D, None, &mut out, &mut lse).expect("shapes");
        };
        let call = &call;
        let mut calls: Vec<Box<dyn FnMut()>> = Vec::new();
        for kv in &stores {
            calls.push(Box::new(move || call(kv)));
        }
        let t = medians(&mut calls);
        println!(
            "{keys} keys {kind:4}: one piece {:.3} ms; pages over it: 256 {:.2}, 64 {:.2}, 16 {:.2}, 16 in order {:.2}",
            1e3 * t[0],
            t[1] / t[0],
            t[2] / t[0],
            t[3] / t[0],
            t[4] / t[0]
        );
    }
}

fn ragged() {
    // One long sequence among short ones, lengths that double, and equal ones.
    let cases: [(&str, Vec<usize>); 3] = [
        ("1 of 32768 and 31 of 256", std::iter::once(32768).chain([256; 31]).collect()),
        ("256 to 32768, doubling", (8..16).map(|i| 1 << i).collect()),
        ("8 of 8192", vec![8192; 8]),
    ];
    let q = queries(HEADS * D);
    for (name, lengths) in cases {
        for kind in ["f32", "bf16", "int8"] {
            let stores: Vec<Store> = lengths.iter().map(|&n| Store::new(kind, n)).collect();
            let kv: Vec<_> = stores.iter().map(|s| s.pages(s.1, false)).collect();
            let batch = || {
                let mut outs: Vec<_> = kv.iter().map(|_| ([0.0; HEADS * D], [0.0; HEADS])).collect();
                let mut sequences: Vec<Sequence> = kv
                    .iter()
                    .zip(&mut outs)
                    .map(|(kv, (out, lse))| Sequence { q: &q, n: 1, kv, select: None, out, lse })
                    .collect();
                Decode::new(0.125).run_batch(&mut sequences, [HEADS, D, D]).expect("shapes");
            };
            let each = || {
                for kv in &kv {
                    let (mut out, mut lse) = ([0.0; HEADS * D], [0.0; HEADS]);
                    Decode::new(0.125).run(&q, [HEADS, 1, D], kv, D, None, &mut out, &mut lse).expect("shapes");
                }
            };
            // One sequence a thread, as they come.
            let whole = || {
                kv.par_iter().with_max_len(1).for_each(|kv| {
                    let (mut out, mut lse) = ([0.0; HEADS * D], [0.0; HEADS]);
                    Decode::new(0.125).run(&q, [HEADS, 1, D], kv, D, None, &mut out, &mut lse).expect("shapes");
                });
            };
            let t = medians(&mut [Box::new(batch), Box::new(each), Box::new(whole)]);
            println!(
                "{name} {kind:4}: one call {:.3} ms, a call for each {:.3} ({:.2}), in parallel {:.3} ({:.2})",
                1e3 * t[0],
                1e3 * t[1],
                t[1] / t[0],
                1e3 * t[2],
                t[2] / t[0]
            );
        }
    }
}

fn latent() {
    // The shape of DeepSeek-V2-Lite: 16 heads, a latent of 512 and a rotated key of 64.
    let (heads, width, latent, keys) = (16, 576, 512, 8192);
    let q = queries(heads * width);
    for kind in ["f32", "bf16", "int8", "int4"] {
        let rows = Rows::new(kind, keys, width);
        let copy = Rows::new(kind, keys, latent);
        let call = |segment: Segment| {
            let (mut out, mut lse) = (vec![0.0; heads * latent], vec![0.0; heads]);
            let call = Decode::new(0.07);
            call.run(&q, [heads, 1, width], &[vec![segment]], latent, None, &mut out, &mut lse).expect("shapes")
        };
        let shared = Segment::latent(rows.from(0), keys);
        let apart = Segment { v: copy.from(0), ..shared };
        let work = call(shared);
        let t = medians(&mut [Box::new(|| _ = call(shared)), Box::new(|| _ = call(apart))]);
        println!(
            "latent {keys} keys {kind:4}: {:.3} ms, {:.1} GB/s, {:.0} GFLOP/s; values of their own {:.2} times that",
            1e3 * t[0],
            1e-9 * work.bytes as f64 / t[0],
            1e-9 * work.flops as f64 / t[0],
            t[1] / t[0]
        );
    }
}

fn main() {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|n| n == name);
    let parts: [(&str, fn()); 5] =
        [("near", near), ("codecs", codecs), ("paged", paged), ("ragged", ragged), ("latent", latent)];
    rayon::scope(|_| parts.into_iter().filter(|(name, _)| wanted(name)).for_each(|(_, part)| part()));
}
