//! Attention problems for the tests of both passes: data, masks, tables.
#![allow(dead_code)]

use foveal_kernels::{Attend, Bias, BlockTable, Element, HeadTable, View};

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

/// The bias of `p`, as given.
pub fn bias_of(s: Shape, p: &Attend, b: usize, h: usize, i: usize, j: usize) -> f32 {
    match &p.bias {
        None => 0.0,
        Some(Bias::Alibi(slopes)) => -slopes[h] * ((i + s.tk) as f32 - (j + s.tq) as f32).abs(),
        Some(Bias::Dense(x)) => x.row(b, h, i)[j],
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

/// Does (b, h, i, j) pass the causal and window rules of `p`?
pub fn allowed(s: Shape, p: &Attend, i: usize, j: usize) -> bool {
    let (i, j, off) = (i as isize, j as isize, s.tk as isize - s.tq as isize);
    !p.causal || (j <= i + off && p.window.is_none_or(|w| j > i + off - w as isize))
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
