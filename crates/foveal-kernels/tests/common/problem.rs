//! Attention problems for the tests of both passes: data, masks, tables.
#![allow(dead_code)]

use foveal_kernels::{Attend, Band, Bias, BlockTable, Element, HeadKeys, HeadTable, KeyLists, View};
use proptest::prelude::*;

/// Splitmix: a few lines, seeded, the same everywhere.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }
    /// Roughly normal.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit() - 0.5).sum::<f32>() * std::f32::consts::SQRT_2
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// A problem; `std` scales q and k.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub b: usize,
    pub h: usize,
    pub hkv: usize,
    pub tq: usize,
    pub tk: usize,
    pub d: usize,
    pub dv: usize,
    pub std: f32,
    pub seed: u64,
}

pub const BASE: Shape = Shape { b: 1, h: 2, hkv: 1, tq: 70, tk: 130, d: 64, dv: 64, std: 1.0, seed: 1 };

pub struct Data<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
}

pub fn data<T: Element>(s: Shape) -> Data<T> {
    let mut r = Rng(s.seed);
    let mut fill = |n: usize, std: f32| (0..n).map(|_| T::from_f32(r.normal() * std)).collect();
    Data {
        q: fill(s.b * s.h * s.tq * s.d, s.std),
        k: fill(s.b * s.hkv * s.tk * s.d, s.std),
        v: fill(s.b * s.hkv * s.tk * s.dv, 1.0),
    }
}

pub fn f64s<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Sequence of query `i`: its queries and keys. A call that is not ragged is one.
pub fn sequence(s: Shape, p: &Attend, i: usize) -> [std::ops::Range<usize>; 2] {
    let Some(cu) = p.cu_seqlens else { return [0..s.tq, 0..s.tk] };
    let n = cu.q.windows(2).position(|w| (w[0]..w[1]).contains(&i)).expect("a query of some sequence");
    [cu.q[n]..cu.q[n + 1], cu.k[n]..cu.k[n + 1]]
}

/// Key `j` less the position of query `i`.
pub fn distance(s: Shape, p: &Attend, i: usize, j: usize) -> i64 {
    let [q, k] = sequence(s, p, i);
    j as i64 - (k.end as i64 - (q.end as i64 - i as i64))
}

/// Where a table of `n` keeps a distance.
pub fn place(distance: i64, left: usize, n: usize) -> usize {
    (distance + left as i64).clamp(0, n as i64 - 1) as usize
}

/// The bias of `p`, as given, of keys that query `i` may see.
pub fn bias_of(s: Shape, p: &Attend, b: usize, h: usize, i: usize, j: usize) -> f32 {
    match &p.bias {
        None => 0.0,
        Some(Bias::Alibi(slopes)) => -slopes[h] * distance(s, p, i, j).abs() as f32,
        Some(Bias::Dense(x)) => x.row(b, h, i)[j - sequence(s, p, i)[1].start],
        Some(Bias::Keys(x)) => x.row(b, h, 0)[j],
        Some(Bias::Relative { table, left }) => {
            let n = table.len() / s.h;
            table[h * n + place(distance(s, p, i, j), *left, n)]
        }
        Some(Bias::Factors { q, k }) => q.row(b, h, i).iter().zip(k.row(b, h, j)).map(|(a, b)| a * b).sum(),
    }
}

/// The same in f64.
pub fn bias64_of(s: Shape, p: &Attend, b: usize, h: usize, i: usize, j: usize) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    match &p.bias {
        Some(Bias::Alibi(slopes)) => -f64::from(slopes[h]) * distance(s, p, i, j).abs() as f64,
        Some(Bias::Factors { q, k }) => dot(q.row(b, h, i), k.row(b, h, j)),
        _ => f64::from(bias_of(s, p, b, h, i, j)),
    }
}

pub fn worst(a: impl Iterator<Item = f64>, b: &[f64]) -> f64 {
    a.zip(b)
        .map(|(a, b)| if a == *b { 0.0 } else { (a - b).abs() })
        .fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

pub fn views<'a, T: Element>(s: Shape, x: &'a Data<T>) -> [View<'a, T>; 3] {
    [
        View::contiguous("q", &x.q, [s.b, s.h, s.tq, s.d]).unwrap(),
        View::contiguous("k", &x.k, [s.b, s.hkv, s.tk, s.d]).unwrap(),
        View::contiguous("v", &x.v, [s.b, s.hkv, s.tk, s.dv]).unwrap(),
    ]
}

/// Does (i, j) pass the causal and band rules of `p`, in one sequence?
pub fn allowed(s: Shape, p: &Attend, i: usize, j: usize) -> bool {
    let ahead = distance(s, p, i, j);
    let far = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    sequence(s, p, i)[1].contains(&j)
        && (!p.causal || ahead <= 0)
        && p.band.is_none_or(|w| -ahead < far(w.left) && ahead <= far(w.right))
}

pub fn all(_: usize, _: usize, _: usize, _: usize) -> bool {
    true
}

pub fn scaled(s: Shape) -> Attend<'static> {
    Attend::new(1.0 / (s.d.max(1) as f32).sqrt())
}

pub fn random_table(s: Shape, r: &mut Rng, bq: usize, bk: usize, density: f32, marks: bool) -> BlockTable {
    let heads = (0..s.b * s.h)
        .map(|_| {
            let lists = (0..s.tq.div_ceil(bq))
                .map(|_| (0..s.tk.div_ceil(bk) as u32).filter(|_| r.unit() < density).collect())
                .collect();
            let mut t = HeadTable::from_lists(bq, bk, lists);
            if marks {
                t.rows = Some(t.blocks.iter().map(|_| r.next() & r.next()).collect());
            }
            t
        })
        .collect();
    BlockTable { heads }
}

pub fn in_table(s: Shape, t: &BlockTable, b: usize, h: usize, i: usize, j: usize) -> bool {
    let t = &t.heads[b * s.h + h];
    let qb = i / t.block_q;
    let Some(e) = t.row(qb).iter().position(|&x| x as usize == j / t.block_k) else { return false };
    t.rows.as_ref().is_none_or(|m| m[t.indptr[qb] + e] >> (i % t.block_q) & 1 == 1)
}

/// Up to `most` random keys for each group of queries.
pub fn random_lists(s: Shape, r: &mut Rng, group: usize, most: usize) -> KeyLists {
    let mut keys = |_| (0..r.below(most)).map(|_| r.below(s.tk) as u32).collect();
    let heads = (0..s.b * s.h)
        .map(|_| HeadKeys::from_lists(group, (0..s.tq.div_ceil(group)).map(&mut keys).collect()))
        .collect();
    KeyLists { heads }
}

pub fn in_lists(s: Shape, l: &KeyLists, b: usize, h: usize, i: usize, j: usize) -> bool {
    let l = &l.heads[b * s.h + h];
    l.row(i / l.group).binary_search(&(j as u32)).is_ok()
}

/// Block sizes of tables: odd ones, those of published systems, and some larger than a problem.
pub const BLOCKS: [(usize, usize); 10] =
    [(1, 1), (3, 5), (16, 16), (64, 64), (64, 1), (48, 32), (100, 64), (128, 128), (512, 512), (7, 200)];

/// Head widths, of q and k and of v.
pub const WIDTHS: [(usize, usize); 13] = [
    (1, 1),
    (5, 3),
    (16, 70),
    (70, 16),
    (7, 64),
    (64, 64),
    (80, 80),
    (96, 32),
    (128, 128),
    (256, 256),
    (33, 65),
    (17, 255),
    (255, 16),
];

/// (B, T, H, D) memory with gaps of `pad`, filled with NaN, for rows that lie plainly; and its strides.
pub fn spread(x: &[f32], [b, h, t, d]: [usize; 4], pad: usize) -> (Vec<f32>, [usize; 3]) {
    let strides = [t * h * (d + pad), d + pad, h * (d + pad)];
    let mut y = vec![f32::NAN; b * strides[0]];
    for i in 0..b * h * t {
        let (bi, hi, ti) = (i / (h * t), i / t % h, i % t);
        let at = bi * strides[0] + hi * strides[1] + ti * strides[2];
        y[at..at + d].copy_from_slice(&x[i * d..(i + 1) * d]);
    }
    (y, strides)
}

/// Operands of every kind of bias for a problem; one that is small enough not to drown the scores.
pub struct Biases {
    pub slopes: Vec<f32>,
    pub keys: Vec<f32>,
    pub table: Vec<f32>,
    pub factors: [Vec<f32>; 2],
    pub rank: usize,
}

impl Biases {
    pub fn of(s: Shape, distances: usize, rank: usize) -> Self {
        let mut r = Rng(s.seed + 5);
        let mut fill = |n: usize| (0..n).map(|_| r.normal()).collect::<Vec<f32>>();
        let mut keys = fill(s.b * s.h * s.tk);
        keys.iter_mut().step_by(11).for_each(|x| *x = f32::NEG_INFINITY);
        Self {
            slopes: (0..s.h).map(|h| 0.5f32.powi(3 + 3 * h as i32)).collect(),
            keys,
            table: fill(s.h * distances),
            factors: [fill(s.b * s.h * s.tq * rank), fill(s.b * s.h * s.tk * rank)],
            rank,
        }
    }

    /// Slopes, keys, distances, factors; and factors and keys that heads share.
    pub fn all(&self, s: Shape, left: usize) -> Vec<Bias<'_>> {
        let (b, h, tq, tk, r) = (s.b, s.h, s.tq, s.tk, self.rank);
        let plain = |x, n: usize, d: usize| View::contiguous("bias", x, [b, h, n, d]).unwrap();
        let shared = |x, n: usize, d: usize| View::new("bias", x, [b, h, n, d], [0, 0, d]).unwrap();
        vec![
            Bias::Alibi(&self.slopes),
            Bias::Keys(plain(&self.keys, 1, tk)),
            Bias::Relative { table: &self.table, left },
            Bias::Factors { q: plain(&self.factors[0], tq, r), k: plain(&self.factors[1], tk, r) },
            Bias::Keys(shared(&self.keys, 1, tk)),
            Bias::Factors { q: shared(&self.factors[0], tq, r), k: shared(&self.factors[1], tk, r) },
        ]
    }
}

/// Any shape, mask and table.
#[derive(Clone, Debug)]
pub struct Any {
    pub s: Shape,
    pub causal: bool,
    pub band: Option<(usize, usize)>,
    pub blocks: Option<(usize, usize, f32, bool)>,
}

pub fn problems(tq: usize, tk: usize) -> impl Strategy<Value = Any> {
    let shape = (0u64..1000, (1usize..3, 1usize..4, 1usize..3), (1..tq, 0..tk), (1usize..90, 1usize..90));
    let band = proptest::option::of((0usize..200, 0usize..100));
    let blocks = proptest::option::of((1usize..90, 1usize..150, 0f32..1.0, any::<bool>()));
    (shape, any::<bool>(), band, blocks).prop_map(|(shape, causal, band, blocks)| {
        let (seed, (b, group, hkv), (tq, tk), (d, dv)) = shape;
        Any { s: Shape { b, h: group * hkv, hkv, tq, tk, d, dv, std: 1.0, seed }, causal, band, blocks }
    })
}

impl Any {
    /// Without its table.
    pub fn params(&self) -> Attend<'static> {
        scaled(self.s).causal(self.causal).band(self.band.map(|(left, right)| Band { left, right }))
    }

    pub fn table(&self) -> Option<BlockTable> {
        self.blocks.map(|(bq, bk, density, marks)| {
            random_table(self.s, &mut Rng(self.s.seed), bq, bk, density, marks && bq <= 64)
        })
    }
}

/// Bounds of sequences of these lengths.
pub fn bounds(lengths: &[usize]) -> Vec<usize> {
    let mut at = 0;
    std::iter::once(0)
        .chain(lengths.iter().map(|n| {
            at += n;
            at
        }))
        .collect()
}
