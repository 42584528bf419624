//! Unweighted feature attention: Σ φ(k)ᵀv carried from chunk to chunk, scores only inside a chunk.

use super::matrix::{add_rows, dot, mat, product};
use super::{CHUNK, FeatureAttend, FeatureState, GradRows, STEP, Sizes, load, store};
use crate::view::{Element, Rows, View};
use crate::work::Work;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Sums over the keys so far, (R, Dv) and (R).
struct Sums {
    kv: Vec<f32>,
    k: Vec<f32>,
}

impl Sums {
    fn zeros(n: Sizes) -> Self {
        Self { kv: vec![0.0; n.r * n.dv], k: vec![0.0; n.r] }
    }

    /// Add one chunk's keys. Returns operations.
    fn add(&mut self, n: Sizes, k: &[f32], v: &[f32], rows: usize) -> usize {
        add_rows(&mut self.k, &k[..rows * n.r]);
        product(&mut self.kv, mat(k, rows, n.r).t(), mat(v, rows, n.dv), true) + rows * n.r
    }
}

/// Pieces of `range`, `step` long.
fn chunks(range: Range<usize>, step: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let Range { start, end } = range;
    (0..(end - start).div_ceil(step)).map(move |i| start + i * step..(start + (i + 1) * step).min(end))
}

/// Queries of a chunk: where scores inside it are computed, long ones would cost more than they save.
fn step(p: &FeatureAttend) -> usize {
    if p.causal { STEP } else { CHUNK }
}

/// Buffers of one task.
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    a: Vec<f32>,
    num: Vec<f32>,
    den: Vec<f32>,
}

impl Scratch {
    fn new(n: Sizes) -> Self {
        let room = |d: usize| vec![0.0; CHUNK * d];
        Self { q: room(n.r), k: room(n.r), v: room(n.dv), a: room(STEP), num: room(n.dv), den: room(1) }
    }

    fn keys<T: Element>(&mut self, k: &View<T>, v: &View<T>, b: usize, kv: usize, at: &Range<usize>) {
        load(k, b, kv, at.start, at.len(), &mut self.k);
        load(v, b, kv, at.start, at.len(), &mut self.v);
    }

    /// Outputs of the chunk's queries (in `num`) and the factors 1 / (den + ε) (in `den`), from the sums of earlier keys
    /// and, if `inside`, the chunk's own keys. Returns operations.
    fn outputs(&mut self, p: &FeatureAttend, n: Sizes, s: &Sums, rows: usize, inside: bool) -> usize {
        let mut flops = product(&mut self.num, mat(&self.q, rows, n.r), mat(&s.kv, n.r, n.dv), false);
        let norm = p.normalise.is_some();
        for i in 0..rows {
            self.den[i] = if norm { dot(&self.q[i * n.r..(i + 1) * n.r], &s.k) } else { 0.0 };
        }
        flops += if norm { 2 * rows * n.r } else { 0 };
        if inside {
            flops += product(&mut self.a, mat(&self.q, rows, n.r), mat(&self.k, rows, n.r).t(), false);
            for i in 0..rows {
                let row = &mut self.a[i * rows..(i + 1) * rows];
                row[i + 1..].fill(0.0);
                if norm {
                    self.den[i] += row[..=i].iter().sum::<f32>();
                }
            }
            flops += product(&mut self.num, mat(&self.a, rows, rows), mat(&self.v, rows, n.dv), true);
            flops += if norm { rows * rows } else { 0 };
        }
        for i in 0..rows {
            self.den[i] = p.finish(&mut self.num[i * n.dv..(i + 1) * n.dv], self.den[i]);
        }
        flops + if norm { rows * (n.dv + 1) } else { 0 }
    }
}

pub(super) fn forward<T: Element>(
    p: &FeatureAttend,
    n: Sizes,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    out: &Rows<f32>,
    state: Option<&mut FeatureState>,
) -> Work {
    let flops = AtomicUsize::new(0);
    let size = (n.r * n.dv, n.r);
    let states: Vec<_> = match state {
        Some(s) if size.1 * size.0 > 0 => {
            s.kv.chunks_exact_mut(size.0).zip(s.k.chunks_exact_mut(size.1)).map(Some).collect()
        }
        _ => (0..n.b * n.hkv).map(|_| None).collect(),
    };
    states.into_par_iter().enumerate().for_each(|(task, mut state)| {
        let (b, kv) = (task / n.hkv, task % n.hkv);
        let (mut s, mut sums, mut done) = (Scratch::new(n), Sums::zeros(n), 0);
        if let Some((kv, k)) = &state {
            sums = Sums { kv: kv.to_vec(), k: k.to_vec() };
        }
        // Keys that every query sees.
        for at in chunks(0..if p.causal { n.tk - n.tq } else { n.tk }, CHUNK) {
            s.keys(k, v, b, kv, &at);
            done += sums.add(n, &s.k, &s.v, at.len());
        }
        for at in chunks(0..n.tq, step(p)) {
            if p.causal {
                s.keys(k, v, b, kv, &(n.tk - n.tq + at.start..n.tk - n.tq + at.end));
            }
            for h in kv * n.group()..(kv + 1) * n.group() {
                load(q, b, h, at.start, at.len(), &mut s.q);
                done += s.outputs(p, n, &sums, at.len(), p.causal);
                // SAFETY: the heads of a group belong to this task.
                unsafe { store(&s.num[..at.len() * n.dv], n.dv, out, b, h, at.start) };
            }
            if p.causal {
                done += sums.add(n, &s.k, &s.v, at.len());
            }
        }
        if let Some((kv, k)) = &mut state {
            kv.copy_from_slice(&sums.kv);
            k.copy_from_slice(&sums.k);
        }
        flops.fetch_add(done, Relaxed);
    });
    work::<T>(p, n, flops.into_inner(), n.b * n.h * n.tq * n.dv)
}

fn work<T>(p: &FeatureAttend, n: Sizes, flops: usize, written: usize) -> Work {
    let inside: usize = if p.causal { chunks(0..n.tq, step(p)).map(|c| c.len() * c.len()).sum() } else { 0 };
    let tiles = if p.causal { n.b * n.h * n.tq.div_ceil(step(p)) } else { 0 };
    n.work::<T>(flops, tiles, n.b * n.h * inside, written)
}

pub(super) fn backward<T: Element>(
    p: &FeatureAttend,
    n: Sizes,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    dout: &View<f32>,
    grads: &GradRows,
) -> Work {
    let flops = AtomicUsize::new(0);
    let shared = if p.causal { n.tk - n.tq } else { n.tk };
    (0..n.b * n.hkv).into_par_iter().for_each(|task| {
        let (b, kv) = (task / n.hkv, task % n.hkv);
        let heads = kv * n.group()..(kv + 1) * n.group();
        let (mut s, mut sums, mut done) = (Scratch::new(n), Sums::zeros(n), 0);
        // Gradients of numerators and denominators of all rows of the group.
        let mut dnum = vec![0f32; n.group() * n.tq * n.dv];
        let mut dden = vec![0f32; n.group() * n.tq];
        let (mut dq, mut da) = (vec![0f32; CHUNK * n.r], vec![0f32; STEP * STEP]);
        for at in chunks(0..shared, CHUNK) {
            s.keys(k, v, b, kv, &at);
            done += sums.add(n, &s.k, &s.v, at.len());
        }
        for at in chunks(0..n.tq, step(p)) {
            let rows = at.len();
            if p.causal {
                s.keys(k, v, b, kv, &(shared + at.start..shared + at.end));
            }
            for (g, h) in heads.clone().enumerate() {
                load(q, b, h, at.start, rows, &mut s.q);
                done += s.outputs(p, n, &sums, rows, p.causal);
                let first = g * n.tq + at.start;
                let dnum = &mut dnum[first * n.dv..(first + rows) * n.dv];
                let dden = &mut dden[first..first + rows];
                load(dout, b, h, at.start, rows, dnum);
                for i in 0..rows {
                    let row = i * n.dv..(i + 1) * n.dv;
                    dden[i] = p.unfinish(&s.num[row.clone()], &mut dnum[row], s.den[i]);
                }
                // dq = dnum·Sᵀ + dden·z, and the same over the chunk's own keys.
                done += product(&mut dq, mat(dnum, rows, n.dv), mat(&sums.kv, n.r, n.dv).t(), false);
                for i in 0..rows {
                    dq[i * n.r..(i + 1) * n.r].iter_mut().zip(&sums.k).for_each(|(g, z)| *g += dden[i] * z);
                }
                if p.causal {
                    done += score_grads(&mut da, dnum, dden, &s.v, n, rows);
                    done += product(&mut dq, mat(&da, rows, rows), mat(&s.k, rows, n.r), true);
                }
                done += 3 * rows * n.dv + 2 * rows * n.r;
                // SAFETY: the heads of a group belong to this task.
                unsafe { store(&dq[..rows * n.r], n.r, &grads.dq, b, h, at.start) };
            }
            if p.causal {
                done += sums.add(n, &s.k, &s.v, rows);
            }
        }
        // Backwards, `later` sums qᵀ·dnum and qᵀ·dden of the queries that see all of a chunk's keys.
        let mut later = Sums::zeros(n);
        let mut dk = vec![0f32; CHUNK * n.r];
        let query_sums = |s: &mut Scratch, later: &mut Sums, at: &Range<usize>, g: usize| {
            let first = g * n.tq + at.start;
            load(q, b, heads.start + g, at.start, at.len(), &mut s.q);
            for i in 0..at.len() {
                let (d, q) = (dden[first + i], &s.q[i * n.r..(i + 1) * n.r]);
                later.k.iter_mut().zip(q).for_each(|(z, q)| *z += d * q);
            }
            let g = mat(&dnum[first * n.dv..], at.len(), n.dv);
            2 * at.len() * n.r + product(&mut later.kv, mat(&s.q, at.len(), n.r).t(), g, true)
        };
        // dk = v·laterᵀ + later z, dv = k·later.
        let from_later = |s: &mut Scratch, dk: &mut [f32], later: &Sums, rows: usize| {
            let mut done = product(dk, mat(&s.v, rows, n.dv), mat(&later.kv, n.r, n.dv).t(), false);
            for row in dk[..rows * n.r].chunks_exact_mut(n.r.max(1)) {
                row.iter_mut().zip(&later.k).for_each(|(g, z)| *g += z);
            }
            done += product(&mut s.num, mat(&s.k, rows, n.r), mat(&later.kv, n.r, n.dv), false);
            done + rows * n.r
        };
        for at in chunks(0..n.tq, step(p)).rev() {
            let (rows, keys) = (at.len(), shared + at.start..shared + at.end);
            if p.causal {
                s.keys(k, v, b, kv, &keys);
                done += from_later(&mut s, &mut dk, &later, rows);
                for g in 0..n.group() {
                    let first = g * n.tq + at.start;
                    let dnum = &dnum[first * n.dv..(first + rows) * n.dv];
                    load(q, b, heads.start + g, at.start, rows, &mut s.q);
                    done += product(&mut s.a, mat(&s.q, rows, n.r), mat(&s.k, rows, n.r).t(), false);
                    for i in 0..rows {
                        s.a[i * rows + i + 1..(i + 1) * rows].fill(0.0);
                    }
                    done += product(&mut s.num, mat(&s.a, rows, rows).t(), mat(dnum, rows, n.dv), true);
                    done += score_grads(&mut da, dnum, &dden[first..first + rows], &s.v, n, rows);
                    done += product(&mut dk, mat(&da, rows, rows).t(), mat(&s.q, rows, n.r), true);
                }
                // SAFETY: the key head belongs to this task.
                unsafe {
                    store(&dk[..rows * n.r], n.r, &grads.dk, b, kv, keys.start);
                    store(&s.num[..rows * n.dv], n.dv, &grads.dv, b, kv, keys.start);
                }
            }
            for g in 0..n.group() {
                done += query_sums(&mut s, &mut later, &at, g);
            }
        }
        for at in chunks(0..shared, CHUNK) {
            s.keys(k, v, b, kv, &at);
            done += from_later(&mut s, &mut dk, &later, at.len());
            // SAFETY: as above.
            unsafe {
                store(&dk[..at.len() * n.r], n.r, &grads.dk, b, kv, at.start);
                store(&s.num[..at.len() * n.dv], n.dv, &grads.dv, b, kv, at.start);
            }
        }
        flops.fetch_add(done, Relaxed);
    });
    work::<T>(p, n, flops.into_inner(), n.b * (n.h * n.tq * n.r + n.hkv * n.tk * (n.r + n.dv)))
}

/// da_ij = dnum_i·v_j + dden_i for j ≤ i, zero elsewhere. Returns operations.
fn score_grads(da: &mut [f32], dnum: &[f32], dden: &[f32], v: &[f32], n: Sizes, rows: usize) -> usize {
    let done = product(da, mat(dnum, rows, n.dv), mat(v, rows, n.dv).t(), false);
    for i in 0..rows {
        let row = &mut da[i * rows..(i + 1) * rows];
        row[..=i].iter_mut().for_each(|x| *x += dden[i]);
        row[i + 1..].fill(0.0);
    }
    done + rows * rows
}
