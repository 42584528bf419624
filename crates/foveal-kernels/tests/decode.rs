//! Decode over ragged, coded, pruned and selected stores, against the f64 twin.

use foveal_kernels::decode::{Codec, Decode, Segment, Sequence, int4_row_bytes, key_scores, pack_int4};
use foveal_kernels::{HeadKeys, Isa, KeyLists, Work, twin};
use half::bf16;

/// Deterministic values in (-1, 1).
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    F32,
    Bf16,
    Int8,
    Int4,
}

const KINDS: [Kind; 4] = [Kind::F32, Kind::Bf16, Kind::Int8, Kind::Int4];

/// Rows in a codec, `stride` apart.
struct Rows {
    kind: Kind,
    stride: usize,
    width: usize,
    f: Vec<f32>,
    b: Vec<bf16>,
    i: Vec<i8>,
    scales: Vec<f32>,
    n: Vec<u8>,
}

impl Rows {
    fn new(kind: Kind, len: usize, width: usize, seed: u64) -> Self {
        // No slack after the last row: a kernel that reads on leaves the allocation.
        let stride = width + 3;
        let size = (len * stride).saturating_sub(3);
        let f = noise(size, seed);
        let b = f.iter().map(|&x| bf16::from_f32(x)).collect();
        let i = f.iter().map(|&x| (x * 127.0) as i8).collect();
        let scales = noise(len, seed + 1).iter().map(|x| (x.abs() + 0.1) / 127.0).collect();
        let mut n = Vec::new();
        for (j, row) in f.chunks(stride).enumerate() {
            // Means away from zero, as channels of keys have.
            let row: Vec<f32> = row[..width].iter().map(|x| x + (j % 5) as f32 - 2.0).collect();
            pack_int4(&row, width, &mut n).unwrap();
            if j + 1 < len {
                n.extend([0xff; 3]);
            }
        }
        Rows { kind, stride, width, f, b, i, scales, n }
    }

    fn codec(&self) -> Codec<'_> {
        match self.kind {
            Kind::F32 => Codec::F32 { data: &self.f, stride: self.stride },
            Kind::Bf16 => Codec::Bf16 { data: &self.b, stride: self.stride },
            Kind::Int8 => Codec::Int8 { data: &self.i, stride: self.stride, scales: &self.scales },
            Kind::Int4 => Codec::Int4 { data: &self.n, stride: int4_row_bytes(self.width) + 3 },
        }
    }

    fn row(&self, j: usize) -> Vec<f32> {
        let mut r = vec![0.0; self.width];
        self.codec().row(j, &mut r);
        r
    }
}

struct Part {
    k: Rows,
    v: Rows,
    len: usize,
    channels: Option<Vec<u32>>,
}

struct Store {
    d: usize,
    dv: usize,
    heads: Vec<Vec<Part>>,
}

impl Store {
    /// One K/V head for each list of (length, key kind, value kind, pruned).
    fn new(d: usize, dv: usize, heads: &[&[(usize, Kind, Kind, bool)]]) -> Self {
        let mut seed = 100;
        let mut part = |&(len, kk, vk, pruned): &(usize, Kind, Kind, bool)| {
            seed += 10;
            let channels = pruned.then(|| (0..d as u32).filter(|c| c % 3 != 1).collect::<Vec<_>>());
            let kw = channels.as_ref().map_or(d, Vec::len);
            Part { k: Rows::new(kk, len, kw, seed), v: Rows::new(vk, len, dv, seed + 5), len, channels }
        };
        Store { d, dv, heads: heads.iter().map(|h| h.iter().map(&mut part).collect::<Vec<_>>()).collect() }
    }

    fn segments(&self) -> Vec<Vec<Segment<'_>>> {
        let one = |p| {
            let Part { k, v, len, channels }: &Part = p;
            Segment { k: k.codec(), v: v.codec(), len: *len, channels: channels.as_deref() }
        };
        self.heads.iter().map(|h| h.iter().map(&one).collect()).collect()
    }

    fn len(&self, head: usize) -> usize {
        self.heads[head].iter().map(|p| p.len).sum()
    }

    /// Decoded (k, v), zeros in pruned channels and after the end, `tk` rows a head.
    fn dense(&self, tk: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut ks, mut vs) = (vec![], vec![]);
        for h in &self.heads {
            let (mut k, mut v) = (vec![], vec![]);
            for p in h {
                for j in 0..p.len {
                    let row = p.k.row(j);
                    match &p.channels {
                        None => k.extend(row),
                        Some(c) => {
                            let mut full = vec![0.0; self.d];
                            c.iter().zip(row).for_each(|(&c, x)| full[c as usize] = x);
                            k.extend(full);
                        }
                    }
                    v.extend(p.v.row(j));
                }
            }
            k.resize(tk * self.d, 0.0);
            v.resize(tk * self.dv, 0.0);
            ks.extend(k);
            vs.extend(v);
        }
        (ks, vs)
    }
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn worst(a: &[f32], b: &[f64]) -> f64 {
    let diff = |(&a, &b): (&f32, &f64)| if f64::from(a) == b { 0.0 } else { (f64::from(a) - b).abs() };
    a.iter().zip(b).map(diff).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// Attention of one row in plain f32 loops.
fn plain(q: &[f32], k: &[f32], v: &[f32], keys: &[usize], scale: f32, cap: Option<f32>, dv: usize) -> (Vec<f32>, f32) {
    let d = q.len();
    let s: Vec<f32> = keys
        .iter()
        .map(|&j| {
            let mut x = 0f32;
            for c in 0..d {
                x += q[c] * k[j * d + c];
            }
            cap.map_or(x * scale, |cap| cap * (x * scale / cap).tanh())
        })
        .collect();
    let top = s.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut out = vec![0f32; dv];
    let mut sum = 0f32;
    for (&s, &j) in s.iter().zip(keys) {
        let p = (s - top).exp();
        sum += p;
        for c in 0..dv {
            out[c] += p * v[j * dv + c];
        }
    }
    if sum > 0.0 {
        out.iter_mut().for_each(|o| *o /= sum);
    }
    (out, top + sum.ln())
}

/// Run every instruction set on one problem; returns the work, which must not depend on it.
fn check(name: &str, store: &Store, h: usize, n: usize, cap: Option<f32>, select: Option<&KeyLists>) -> Work {
    let (d, dv, hkv) = (store.d, store.dv, store.heads.len());
    let group = h / hkv;
    let q: Vec<f32> = noise(h * n * d, 1).iter().map(|x| 3.0 * x).collect();
    let scale = 1.0 / (d as f32).sqrt();
    let tk = (0..hkv).map(|i| store.len(i)).max().unwrap_or(0);
    let (k, v) = store.dense(tk);
    let visible = |_: usize, hi: usize, i: usize, j: usize| {
        let total = store.len(hi / group);
        j < total
            && j + n < total + i + 1
            && select.is_none_or(|s| s.heads[hi].row(i / s.heads[hi].group).contains(&(j as u32)))
    };
    let shape = ([1, h, n, d], [hkv, tk, dv]);
    let (want, want_lse) = twin::attend(
        &f64s(&q),
        &f64s(&k),
        &f64s(&v),
        shape.0,
        shape.1,
        f64::from(scale),
        cap.map(f64::from),
        None,
        &visible,
    );
    let (mut same, mut same_lse) = (vec![], vec![]);
    for hi in 0..h {
        for i in 0..n {
            let keys: Vec<usize> = (0..tk).filter(|&j| visible(0, hi, i, j)).collect();
            let at = hi / group * tk;
            let (k, v) = (&k[at * d..(at + tk) * d], &v[at * dv..(at + tk) * dv]);
            let (o, l) = plain(&q[(hi * n + i) * d..][..d], k, v, &keys, scale, cap, dv);
            same.extend(o);
            same_lse.push(l);
        }
    }
    let segments = store.segments();
    let mut first = None;
    for isa in Isa::available() {
        let (mut out, mut lse) = (vec![f32::NAN; h * n * dv], vec![f32::NAN; h * n]);
        let call = Decode { scale, softcap: cap, isa };
        let work = call.run(&q, [h, n, d], &segments, dv, select, &mut out, &mut lse).unwrap();
        // One rounding of the largest output, for where the plain code happens to be exact.
        let unit = want.iter().fold(1.0f64, |m, x| m.max(x.abs())) * 1e-7;
        let (got, allowed) = (worst(&out, &want), 2.0 * worst(&same, &want) + unit);
        assert!(got <= allowed, "{name} {isa}: output off by {got:e}, allowed {allowed:e}");
        let (got, allowed) = (worst(&lse, &want_lse), 2.0 * worst(&same_lse, &want_lse) + 5e-7);
        assert!(got <= allowed, "{name} {isa}: lse off by {got:e}, allowed {allowed:e}");
        assert_eq!(*first.get_or_insert(work), work);
    }
    first.unwrap()
}

#[test]
fn plain_stores_of_every_codec_and_size() {
    for (d, dv) in [(64, 64), (128, 128), (40, 24), (5, 7), (80, 96), (1, 1), (32, 192)] {
        for kind in KINDS {
            for len in [1, 2, 17, 63, 64, 65, 200] {
                let store = Store::new(d, dv, &[&[(len, kind, kind, false)]]);
                check(&format!("{d} {dv} {len}"), &store, 3, 1, None, None);
            }
        }
    }
}

#[test]
fn every_group_size() {
    let store = Store::new(48, 32, &[&[(100, Kind::F32, Kind::Bf16, false)], &[(70, Kind::Bf16, Kind::Int8, false)]]);
    for group in [1, 2, 3, 4, 5, 7, 8, 9, 13, 17] {
        check(&format!("group {group}"), &store, 2 * group, 1, None, None);
    }
}

#[test]
fn several_queries_are_causal() {
    let store = Store::new(32, 32, &[&[(5, Kind::F32, Kind::F32, false), (90, Kind::F32, Kind::F32, false)]]);
    for n in [2, 3, 8, 64, 95] {
        check(&format!("n {n}"), &store, 2, n, None, None);
    }
    // More queries than tokens: the first see nothing.
    check("n 97", &store, 2, 97, None, None);
}

#[test]
fn pages_pruned_channels_mixed_codecs_and_ragged_heads() {
    let (f, b, i) = (Kind::F32, Kind::Bf16, Kind::Int8);
    let pages: Vec<_> = (0..30).map(|p| (16 - p % 3, f, f, false)).collect();
    let long: &[(usize, Kind, Kind, bool)] =
        &[(1500, b, b, true), (0, f, f, false), (600, f, b, false), (1, i, i, true)];
    let store = Store::new(64, 64, &[long, &[], &pages, &[(33, i, b, true)]]);
    check("mixed", &store, 12, 1, None, None);
    check("mixed, capped", &store, 4, 3, Some(5.0), None);
}

#[test]
fn long_stores_are_cut_and_merged() {
    let store = Store::new(64, 64, &[&[(5000, Kind::F32, Kind::F32, false)], &[(700, Kind::Bf16, Kind::Bf16, false)]]);
    check("long", &store, 4, 1, None, None);
    check("long", &store, 4, 4, None, None);
}

#[test]
fn empty_stores_give_zero() {
    let store = Store::new(16, 16, &[&[], &[(0, Kind::F32, Kind::F32, false)]]);
    let (mut out, mut lse) = (vec![1.0; 64], vec![1.0; 4]);
    for isa in Isa::available() {
        let call = Decode { isa, ..Decode::new(1.0) };
        let work = call.run(&[1.0; 64], [4, 1, 16], &store.segments(), 16, None, &mut out, &mut lse).unwrap();
        assert_eq!(work, Work::default());
        assert!(out.iter().all(|&o| o == 0.0));
        assert!(lse.iter().all(|&l| l == f32::NEG_INFINITY));
    }
}

fn lists(h: usize, group: usize, make: impl Fn(usize, usize) -> Vec<u32>, groups: usize) -> KeyLists {
    let head = |hi| HeadKeys::from_lists(group, (0..groups).map(|g| make(hi, g)).collect());
    KeyLists { heads: (0..h).map(head).collect() }
}

#[test]
fn selected_keys() {
    let (f, b, i) = (Kind::F32, Kind::Bf16, Kind::Int8);
    let store = Store::new(64, 64, &[&[(900, f, f, false), (100, b, i, true)], &[(300, i, b, false)]]);
    // A list of its own for each head; one list empty.
    let own = lists(4, 1, |hi, _| (0..300).filter(|j| hi != 2 && j % (hi as u32 + 2) == 0).collect(), 1);
    check("own lists", &store, 4, 1, None, Some(&own));
    let many = lists(20, 1, |hi, _| (0..300).filter(|j| j % (hi as u32 / 10 + 2) == 0).collect(), 1);
    check("lists of many heads", &store, 20, 1, None, Some(&many));
    // Heads of a group that chose together are read once.
    let shared = lists(4, 1, |hi, _| (0..300).filter(|j| j % (hi as u32 / 2 + 2) == 0).collect(), 1);
    let work = check("shared lists", &store, 4, 1, None, Some(&shared));
    assert_eq!(work.bytes, (150 * (4 * 64 + 4 * 64) + 100 * (68 + 128)) as u64);
    assert_eq!(work.pairs, 2 * (150 + 100));
    // One list for all queries, and one for each, some beyond what a query may see.
    let tail = |hi: usize, g: usize| (250 - hi as u32..300).filter(|j| j % (g as u32 + 1) == 0).collect::<Vec<u32>>();
    check("group n", &store, 4, 6, None, Some(&lists(4, 6, tail, 1)));
    check("group 1", &store, 4, 6, Some(3.0), Some(&lists(4, 1, tail, 6)));
    check("group 4", &store, 4, 6, None, Some(&lists(4, 4, tail, 2)));
}

#[test]
fn bf16_stores_are_as_exact_as_f32() {
    // Whole blocks, short blocks, gathered rows, pruned rows of 32 channels, several groups of queries.
    let b = Kind::Bf16;
    let store =
        Store::new(48, 96, &[&[(130, b, b, true), (64, b, b, true), (31, b, Kind::F32, true)], &[(100, b, b, false)]]);
    check("pruned", &store, 6, 1, None, None);
    let store = Store::new(64, 32, &[&[(640, b, b, false), (33, Kind::F32, b, false)], &[(100, b, Kind::Int8, false)]]);
    check("groups of queries", &store, 10, 3, Some(4.0), None);
    let every = lists(2, 1, |hi, _| (0..100).filter(|j| j % (hi as u32 + 2) != 0).collect(), 1);
    check("gathered", &store, 2, 1, None, Some(&every));
}

#[test]
fn work_counts_each_row_once_for_its_group() {
    let (f, b, i) = (Kind::F32, Kind::Bf16, Kind::Int8);
    let store = Store::new(48, 64, &[&[(1000, f, b, false), (24, i, i, true)], &[(10, b, f, false)]]);
    let work = check("work", &store, 6, 1, None, None);
    let bytes = 1000 * (4 * 48 + 2 * 64) + 24 * (32 + 4 + 64 + 4) + 10 * (2 * 48 + 4 * 64);
    assert_eq!(work.bytes, bytes as u64);
    assert_eq!(work.pairs, 3 * 1034);
    assert_eq!(work.flops, 2 * 3 * (1000 * (48 + 64) + 24 * (32 + 64) + 10 * (48 + 64)) as u64);
    assert_eq!(work.tiles, 3);
}

#[test]
fn raw_scores() {
    for kind in KINDS {
        for (rows, width, len) in [(1, 64, 1), (3, 64, 700), (5, 12, 130), (2, 33, 64), (1, 3, 5000)] {
            // Only a prefix of each stored row is read.
            let keys = Rows::new(kind, len, width + 5, 3);
            let q = noise(rows * width, 4);
            let (mut want, mut plain) = (vec![], vec![]);
            for q in q.chunks(width) {
                for j in 0..len {
                    let k = keys.row(j);
                    want.push(q.iter().zip(&k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>());
                    plain.push(q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>());
                }
            }
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows * len];
                let work = key_scores(&q, width, keys.codec(), len, &mut out, isa).unwrap();
                assert_eq!(work.flops, 2 * (rows * len * width) as u64);
                let (got, allowed) = (worst(&out, &want), 2.0 * worst(&plain, &want) + 1e-6);
                assert!(got <= allowed, "{isa} {rows} {width} {len}: {got:e} > {allowed:e}");
            }
        }
    }
}

#[test]
fn every_codec_pruned_listed_and_not() {
    for kk in KINDS {
        for vk in KINDS {
            for pruned in [false, true] {
                let store =
                    Store::new(64, 40, &[&[(150, kk, vk, pruned), (70, vk, kk, !pruned)], &[(133, kk, vk, pruned)]]);
                let every = lists(6, 1, |hi, _| (0..133).filter(|j| j % (hi as u32 / 2 + 2) != 0).collect(), 1);
                for select in [None, Some(&every)] {
                    let work = check("matrix", &store, 6, 1, None, select);
                    assert_eq!(work.fallback, 0);
                }
                // Enough queries for tiles.
                let work = check("matrix, tiles", &store, 6, 3, None, None);
                assert_eq!(work.fallback, 0);
                check("matrix, queries", &store, 2, 5, Some(6.0), None);
            }
        }
    }
}

#[test]
fn int4_rows_are_near_their_source_and_self_contained() {
    for width in [1, 16, 31, 32, 33, 64, 100] {
        let rows: Vec<f32> =
            noise(7 * width, 5).iter().enumerate().map(|(i, x)| x * 3.0 + (i % 11) as f32 - 7.0).collect();
        let mut packed = Vec::new();
        pack_int4(&rows, width, &mut packed).unwrap();
        assert_eq!(packed.len(), 7 * int4_row_bytes(width));
        assert_eq!(int4_row_bytes(width), 20 * width.div_ceil(32));
        let codec = Codec::Int4 { data: &packed, stride: int4_row_bytes(width) };
        assert_eq!(codec.row_bytes(width), int4_row_bytes(width));
        for (j, row) in rows.chunks(width).enumerate() {
            let mut got = vec![f32::NAN; width];
            codec.row(j, &mut got);
            for (row, got) in row.chunks(32).zip(got.chunks(32)) {
                let top = row.iter().fold(f32::MIN, |m, &x| m.max(x));
                let low = row.iter().fold(f32::MAX, |m, &x| m.min(x));
                // Half a step, and what rounding the ends to f16 widens it by.
                let step = (top - low) / 15.0 * 1.002 + top.abs().max(low.abs()) / 15000.0;
                for (a, b) in row.iter().zip(got) {
                    assert!((a - b).abs() <= 0.5 * step + 1e-7, "{width}: {a} {b} step {step}");
                }
            }
        }
    }
    // Constants are exact where f16 is; numbers beyond f16 are clamped; a NaN shows in its group alone.
    let mut packed = Vec::new();
    let mut row = [1.5f32; 96];
    row[32] = 1e9;
    row[64] = f32::NAN;
    pack_int4(&row, 96, &mut packed).unwrap();
    let mut got = [0f32; 96];
    Codec::Int4 { data: &packed, stride: 60 }.row(0, &mut got);
    assert!(got[..32].iter().all(|&x| x == 1.5));
    assert!((got[32] - 65504.0).abs() < 40.0 && got[33..64].iter().all(|x| (x - 1.5).abs() < 1.0));
    assert!(got[64..].iter().all(|x| x.is_nan()));
    assert!(pack_int4(&row, 7, &mut packed).unwrap_err().to_string().contains("whole rows of 7"));
    assert!(pack_int4(&row, 0, &mut packed).is_err());
}

#[test]
fn pages_of_any_length_answer_as_one_piece() {
    // One store seen as one piece, as pages in order of memory, and as pages that lie anywhere.
    for kind in KINDS {
        let (d, len) = (64, 1000);
        let (k, v) = (Rows::new(kind, len, d, 3), Rows::new(kind, len, d, 4));
        let from = |r: &'static Rows, at: usize| match r.codec() {
            Codec::F32 { data, stride } => Codec::F32 { data: &data[at * stride..], stride },
            Codec::Bf16 { data, stride } => Codec::Bf16 { data: &data[at * stride..], stride },
            Codec::Int8 { data, stride, scales } => {
                Codec::Int8 { data: &data[at * stride..], stride, scales: &scales[at..] }
            }
            Codec::Int4 { data, stride } => Codec::Int4 { data: &data[at * stride..], stride },
        };
        let (k, v): (&'static Rows, &'static Rows) = (Box::leak(Box::new(k)), Box::leak(Box::new(v)));
        let q = noise(12 * d, 9);
        let run = |kv: &[Vec<Segment>], isa| {
            let (mut out, mut lse) = (vec![0.0; 12 * d], vec![0.0; 12]);
            let work = Decode { isa, ..Decode::new(0.3) }.run(&q, [12, 1, d], kv, d, None, &mut out, &mut lse).unwrap();
            (out, lse, work)
        };
        for isa in Isa::available() {
            let whole = run(&[vec![Segment { k: k.codec(), v: v.codec(), len, channels: None }]], isa);
            for page in [1, 7, 16, 128, 200] {
                let pages = (0..len).step_by(page).map(|at| Segment {
                    k: from(k, at),
                    v: from(v, at),
                    len: page.min(len - at),
                    channels: None,
                });
                let paged = run(&[pages.collect()], isa);
                assert_eq!((&paged.0, &paged.1), (&whole.0, &whole.1), "{isa}, pages of {page}");
                assert_eq!(paged.2.tiles, len.div_ceil(page) as u64);
                assert_eq!(Work { tiles: 1, ..paged.2 }, whole.2);
            }
        }
    }
}

#[test]
fn ragged_batches_answer_as_their_sequences() {
    let (f, b, i, n) = (Kind::F32, Kind::Bf16, Kind::Int8, Kind::Int4);
    let stores = [
        Store::new(64, 64, &[&[(9000, b, b, false)], &[(9000, i, b, false)]]),
        Store::new(64, 64, &[&[(3, f, f, false)], &[]]),
        Store::new(64, 64, &[&[(700, n, i, true), (40, f, f, false)], &[(1, b, n, false)]]),
        Store::new(64, 64, &[&[(0, f, f, false)], &[(2000, i, i, false)]]),
    ];
    let segments: Vec<_> = stores.iter().map(Store::segments).collect();
    let counts = [1, 3, 2, 1];
    let qs: Vec<Vec<f32>> = counts.iter().map(|n| noise(4 * n * 64, *n as u64)).collect();
    let chosen = lists(4, 1, |hi, _| if hi < 2 { vec![] } else { (0..2000).filter(|j| j % 3 == 0).collect() }, 1);
    let select = [None, None, None, Some(&chosen)];
    for isa in Isa::available() {
        let call = Decode { isa, ..Decode::new(0.2) };
        let batch = || {
            let mut outs: Vec<_> = counts.iter().map(|n| (vec![f32::NAN; 4 * n * 64], vec![f32::NAN; 4 * n])).collect();
            let mut all: Vec<Sequence> = outs
                .iter_mut()
                .enumerate()
                .map(|(s, (out, lse))| Sequence {
                    q: &qs[s],
                    n: counts[s],
                    kv: &segments[s],
                    select: select[s],
                    out,
                    lse,
                })
                .collect();
            let work = call.run_batch(&mut all, [4, 64, 64]).unwrap();
            (outs, work)
        };
        let (outs, work) = batch();
        let mut sum = Work::default();
        for (s, (out, lse)) in outs.iter().enumerate() {
            let (mut o, mut l) = (vec![f32::NAN; out.len()], vec![f32::NAN; lse.len()]);
            sum += call.run(&qs[s], [4, counts[s], 64], &segments[s], 64, select[s], &mut o, &mut l).unwrap();
            // Parts end elsewhere, so sums are rounded elsewhere.
            let off = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }).fold(0.0, f32::max)
            };
            assert!(off(out, &o) < 1e-5, "{isa}, sequence {s}: {}", off(out, &o));
            assert!(off(lse, &l) < 1e-5, "{isa}, sequence {s}");
        }
        assert_eq!(work, sum);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(batch), (outs.clone(), work), "{isa}: {threads} threads");
        }
    }
}

#[test]
fn latent_rows_serve_keys_and_values_and_are_read_once() {
    // Ten heads of 24 + 8 over latents of 40: absorbed attention is the attention it came from.
    let (heads, nope, rope, latent, v_dim, len) = (10, 24, 8, 40, 16, 333);
    let width = latent + rope;
    let up_k: Vec<f64> = f64s(&noise(heads * nope * latent, 31));
    let up_v: Vec<f64> = f64s(&noise(heads * v_dim * latent, 32));
    let q = f64s(&noise(heads * (nope + rope), 33));
    let scale = 1.0 / ((nope + rope) as f64).sqrt();
    let absorbed: Vec<f32> = (0..heads)
        .flat_map(|h| {
            let q = &q[h * (nope + rope)..(h + 1) * (nope + rope)];
            let up = &up_k[h * nope * latent..(h + 1) * nope * latent];
            let c = |c: usize| (0..nope).map(|i| q[i] * up[i * latent + c]).sum::<f64>() as f32;
            (0..latent).map(c).chain(q[nope..].iter().map(|&x| x as f32)).collect::<Vec<_>>()
        })
        .collect();
    for kind in KINDS {
        let rows = Rows::new(kind, len, width, 30);
        let stored: Vec<f64> = (0..len).flat_map(|j| f64s(&rows.row(j))).collect();
        // Keys and values of each head, written out.
        let (mut k, mut v) = (vec![], vec![]);
        for h in 0..heads {
            for c in stored.chunks(width) {
                let up = |m: &[f64], i: usize| (0..latent).map(|x| m[i * latent + x] * c[x]).sum::<f64>();
                k.extend((0..nope).map(|i| up(&up_k, h * nope + i)).chain(c[latent..].iter().copied()));
                v.extend((0..v_dim).map(|i| up(&up_v, h * v_dim + i)));
            }
        }
        let shape = ([1, heads, 1, nope + rope], [heads, len, v_dim]);
        let (want, want_lse) = twin::attend(&q, &k, &v, shape.0, shape.1, scale, None, None, &|_, _, _, _| true);
        for isa in Isa::available() {
            let call = Decode { isa, ..Decode::new(scale as f32) };
            let run = |segment| {
                let (mut out, mut lse) = (vec![f32::NAN; heads * latent], vec![f32::NAN; heads]);
                let kv = [vec![segment]];
                let work = call.run(&absorbed, [heads, 1, width], &kv, latent, None, &mut out, &mut lse).unwrap();
                (out, lse, work)
            };
            let shared = Segment::latent(rows.codec(), len);
            let (out, lse, work) = run(shared);
            let got: Vec<f32> = (0..heads * v_dim)
                .map(|r| {
                    let u = &out[r / v_dim * latent..];
                    (0..latent).map(|c| up_v[r * latent + c] * f64::from(u[c])).sum::<f64>() as f32
                })
                .collect();
            assert!(worst(&got, &want) < 3e-5, "{isa}: {}", worst(&got, &want));
            assert!(worst(&lse, &want_lse) < 3e-5, "{isa}: {}", worst(&lse, &want_lse));
            assert_eq!(work.bytes, (len * rows.codec().row_bytes(width)) as u64);
            // The same rows elsewhere in memory: the same answer, more bytes.
            let copy = Rows::new(kind, len, width, 30);
            let apart = run(Segment { v: copy.codec(), ..shared });
            assert_eq!((&apart.0, &apart.1), (&out, &lse));
            assert_eq!(apart.2.bytes, work.bytes + (len * rows.codec().row_bytes(latent)) as u64);
        }
    }
}

#[test]
fn what_tiles_cannot_do_is_counted() {
    let store = Store::new(64, 64, &[&[(300, Kind::Int8, Kind::Int8, false), (40, Kind::Bf16, Kind::F32, false)]]);
    for isa in Isa::available() {
        let call = Decode { isa, ..Decode::new(0.1) };
        let run = |x: f32| {
            let mut q = noise(64 * 9, 3);
            q[70] = x;
            let (mut out, mut lse) = ([0.0; 64 * 9], [0.0; 9]);
            call.run(&q, [9, 1, 64], &store.segments(), 64, None, &mut out, &mut lse).unwrap()
        };
        assert_eq!(run(0.5).fallback, 0, "{isa}");
        // Keys of both segments, and the values whose weights are not finite.
        let work = run(f32::INFINITY);
        let want = if isa == Isa::Amx { 2 * 64 * 9 * (340 + 300) } else { 0 };
        assert_eq!(work.fallback, want, "{isa}");
    }
}

#[test]
fn refusals() {
    let store = Store::new(16, 16, &[&[(10, Kind::F32, Kind::F32, false)]]);
    let mut segments = store.segments();
    let call = Decode::new(1.0);
    let run = |segments: &[Vec<Segment>], h, select: Option<&KeyLists>| {
        let (mut out, mut lse) = (vec![0.0; 16 * h], vec![0.0; h]);
        call.run(&vec![0.0; 16 * h], [h, 1, 16], segments, 16, select, &mut out, &mut lse).unwrap_err().to_string()
    };
    let few = lists(1, 1, |_, _| vec![0], 1);
    assert!(run(&segments, 2, Some(&few)).contains("key lists"));
    let far = lists(2, 1, |_, _| vec![10], 1);
    assert!(run(&segments, 2, Some(&far)).contains("below 10"));
    assert!(run(&[], 2, None).contains("multiple"));
    segments[0][0].len = 11;
    assert!(run(&segments, 1, None).contains("shorten the segment"));
    let channels = [3, 16];
    segments[0][0] = Segment { len: 10, channels: Some(&channels), ..segments[0][0] };
    assert!(run(&segments, 1, None).contains("below head_dim 16"));
    let int4 = Codec::Int4 { data: &[0; 60], stride: 20 };
    segments[0][0] = Segment { k: int4, len: 2, channels: None, ..segments[0][0] };
    let wide = |len| {
        let kv = [vec![Segment { len, ..segments[0][0] }]];
        let (mut out, mut lse) = ([0.0; 16], [0.0]);
        call.run(&[0.0; 33], [1, 1, 33], &kv, 16, None, &mut out, &mut lse)
    };
    // 33 channels take two groups a row.
    assert!(wide(1).is_ok());
    assert!(wide(2).is_ok());
    assert!(wide(3).unwrap_err().to_string().contains("keys 33 wide"));
    let scales = [1.0; 9];
    let short = Codec::Int8 { data: &[0; 160], stride: 16, scales: &scales };
    segments[0][0] = Segment { v: short, k: store.heads[0][0].k.codec(), len: 10, channels: None };
    assert!(run(&segments, 1, None).contains("values 16 wide (or their scales)"));
    let (mut out, mut lse) = (vec![0.0; 15], vec![0.0]);
    let e = call.run(&[0.0; 16], [1, 1, 16], &store.segments(), 16, None, &mut out, &mut lse).unwrap_err().to_string();
    assert!(e.contains("out has elements = 15"), "{e}");
    let keys = store.heads[0][0].k.codec();
    assert!(key_scores(&[0.0; 16], 16, keys, 11, &mut [0.0; 11], Isa::active()).is_err());
    assert!(key_scores(&[0.0; 16], 16, keys, 10, &mut [0.0; 9], Isa::active()).is_err());
}

#[test]
fn extreme_scores_stay_finite_and_a_nan_shows() {
    let keys = vec![1e4f32; 300 * 16];
    let values = noise(300 * 16, 2);
    let seg = |k| {
        let (k, v) = (Codec::F32 { data: k, stride: 16 }, Codec::F32 { data: &values, stride: 16 });
        vec![vec![Segment { k, v, len: 300, channels: None }]]
    };
    let mut bad = keys.clone();
    bad[7 * 16] = f32::NAN;
    for isa in Isa::available() {
        let call = Decode { isa, ..Decode::new(1.0) };
        for q in [1e4, -1e4] {
            let (mut out, mut lse) = ([0.0; 16], [0.0]);
            call.run(&[q; 16], [1, 1, 16], &seg(&keys), 16, None, &mut out, &mut lse).unwrap();
            assert!(out.iter().all(|o| o.abs() <= 1.0) && lse[0].is_finite());
            call.run(&[q; 16], [1, 1, 16], &seg(&bad), 16, None, &mut out, &mut lse).unwrap();
            assert!(out.iter().all(|o| o.is_nan()), "{isa}");
        }
    }
}
