//! Feature attention with weights c_(i−j) of relative position.
//!
//! By transform: for a feature r and a value channel d, Σ_j c_(i−j) k_jr v_jd is a convolution along j, and
//! o_id = Σ_r q_ir · (that). The denominator is one more value channel, of ones. The weights of both signs are
//! laid around one ring of at least 2T − 1 samples, so nothing that is read has wrapped. Directly: tile by tile.
//!
//! A transform's error follows the largest value of the whole sequence. A causal row of few keys has small sums, which
//! would drown in it, and a large factor 1 / den, which would drown the others in the way back: the first rows go
//! directly, and the transforms get zeros for their gradients.

use super::matrix::{mat, product};
use super::{CHUNK, FeatureAttend, GradRows, Sizes, ToeplitzForm, load, store};
use crate::conv::lines::Lines;
use crate::conv::ring::{Ring, sizes};
use crate::isa::Isa;
use crate::view::{Element, Rows, View};
use crate::work::Work;
use rayon::prelude::*;
use std::ops::Range;

/// Points of a ring for T tokens.
fn points(t: usize) -> usize {
    sizes().find(|&n| n >= t).unwrap_or(t)
}

/// Does this call go by transform?
pub(super) fn by_transform(p: &FeatureAttend, n: Sizes) -> bool {
    match p.form {
        ToeplitzForm::Direct => false,
        ToeplitzForm::Fourier => true,
        ToeplitzForm::Auto => {
            // Products of matrices run about four times as many operations a second as transforms.
            let m = points(n.tk) as f64;
            let transforms = (n.r * (n.dv + 1)) as f64 * 2.0 * (5.0 * m * m.log2() + 8.0 * m);
            let pairs = (n.tq * n.tk) as f64 * if p.causal { 0.5 } else { 1.0 };
            transforms * 4.0 < pairs * (2 * (n.r + n.dv) + 8) as f64
        }
    }
}

/// The columns of a (rows, width) matrix, one after the other.
fn transpose(x: &[f32], width: usize) -> Vec<f32> {
    let rows = x.len().checked_div(width).unwrap_or(0);
    (0..x.len()).map(|i| x[i % rows * width + i / rows]).collect()
}

/// All rows of a head, transposed to (width, tokens).
fn columns<T: Element>(x: &View<T>, b: usize, h: usize) -> Vec<f32> {
    let [_, _, t, d] = x.shape;
    let mut rows = vec![0.0; t * d];
    load(x, b, h, 0, t, &mut rows);
    transpose(&rows, d)
}

/// A folded sequence.
struct Folded(Lines, usize);

impl Folded {
    fn new(n: usize) -> Self {
        Self(Lines::zeroed(2 * n), n)
    }
    fn parts(&mut self) -> (&mut [f32], &mut [f32]) {
        self.0.as_mut_slice().split_at_mut(self.1)
    }
    fn get(&self) -> (&[f32], &[f32]) {
        self.0.as_slice().split_at(self.1)
    }
    /// x_t · y_t, then zeros.
    fn fill(&mut self, x: &[f32], y: &[f32]) {
        let (re, im) = self.parts();
        re.iter_mut().zip(x.iter().zip(y)).for_each(|(o, (x, y))| *o = x * y);
        re[x.len()..].fill(0.0);
        im.fill(0.0);
    }
    /// Sample at a place of the ring of 2n.
    fn at(&mut self, i: usize) -> &mut f32 {
        let n = self.1;
        let (re, im) = self.parts();
        if i < n { &mut re[i] } else { &mut im[i - n] }
    }
}

/// Everything about one (batch, head) by transform.
struct Head<'a> {
    ring: &'a Ring,
    weights: Folded,
    t: usize,
    /// Value channels, the denominator's ones last (if there is a division).
    v: Vec<f32>,
    k: Vec<f32>,
    q: Vec<f32>,
    channels: usize,
}

impl<'a> Head<'a> {
    fn new<T: Element>(
        p: &FeatureAttend,
        n: Sizes,
        c: &[f32],
        ring: &'a Ring,
        (q, k, v): (&View<T>, &View<T>, &View<T>),
        [b, h, kv]: [usize; 3],
    ) -> Self {
        let t = n.tk;
        let mut weights = Folded::new(ring.n);
        for d in 0..t {
            *weights.at(d) = c[h * (2 * t - 1) + t - 1 + d];
            if d > 0 && !p.causal {
                // x^(2n) = −1: a place before 0 is one near the end, with the sign changed.
                *weights.at(2 * ring.n - d) = -c[h * (2 * t - 1) + t - 1 - d];
            }
        }
        let (re, im) = weights.parts();
        ring.forward(re, im);
        let mut values = columns(v, b, kv);
        let norm = usize::from(p.normalise.is_some());
        values.resize(values.len() + norm * t, 1.0);
        Self { ring, weights, t, v: values, k: columns(k, b, kv), q: columns(q, b, h), channels: n.dv + norm }
    }

    fn column(x: &[f32], t: usize, i: usize) -> &[f32] {
        &x[i * t..(i + 1) * t]
    }

    /// Numerators (and denominators), (channels, T).
    fn numerators(&self, features: usize) -> Vec<f32> {
        let mut num = vec![0f32; self.channels * self.t];
        let mut x = Folded::new(self.ring.n);
        let scale = 1.0 / self.ring.n as f32;
        for r in 0..features {
            let (k, q) = (Self::column(&self.k, self.t, r), Self::column(&self.q, self.t, r));
            for d in 0..self.channels {
                x.fill(k, Self::column(&self.v, self.t, d));
                let (re, im) = x.parts();
                self.ring.convolve(re, im, self.weights.get());
                let num = &mut num[d * self.t..(d + 1) * self.t];
                num.iter_mut().zip(q.iter().zip(&*re)).for_each(|(o, (q, x))| *o += q * (scale * x));
            }
        }
        num
    }
}

/// Operations of `rounds` transforms (and their products) for every (feature, channel) of every head.
fn flops(n: Sizes, ring: &Ring, channels: usize, rounds: usize) -> usize {
    let each = rounds * (ring.flops() as usize + 7 * ring.n);
    n.b * n.h * (ring.flops() as usize + n.r * channels * each)
}

pub(super) fn forward<T: Element>(
    p: &FeatureAttend,
    n: Sizes,
    c: &[f32],
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    out: &Rows<f32>,
) -> Work {
    let ring = Ring::new(points(n.tk), p.isa.unwrap_or_else(Isa::active));
    let done = (0..n.b * n.h).into_par_iter().map(|task| {
        let (b, h) = (task / n.h, task % n.h);
        let head = Head::new(p, n, c, &ring, (q, k, v), [b, h, h / n.group()]);
        let mut num = head.numerators(n.r);
        let mut early = Early::new(p, n, c, (q, k, v), [b, h, h / n.group()]);
        early.numerators(p, n, &mut num);
        for i in 0..n.tq {
            // SAFETY: the head belongs to this task.
            let row = unsafe { out.row_mut(b, h, i) };
            row.iter_mut().enumerate().for_each(|(d, o)| *o = num[d * n.tk + i]);
            p.finish(row, if p.normalise.is_some() { num[n.dv * n.tk + i] } else { 0.0 });
        }
        early.done
    });
    let done: usize = done.sum();
    let channels = n.dv + usize::from(p.normalise.is_some());
    let (tiles, pairs) = early_tiles(p, n);
    n.work::<T>(flops(n, &ring, channels, 2) + done, tiles, pairs, n.b * n.h * n.tq * n.dv)
}

/// Rows that a call by transform computes directly.
fn early_rows(p: &FeatureAttend, n: Sizes) -> usize {
    if p.causal { n.tq.min(CHUNK) } else { 0 }
}

/// Tiles and scores of those rows, all heads.
fn early_tiles(p: &FeatureAttend, n: Sizes) -> (usize, usize) {
    let m = early_rows(p, n);
    (n.b * n.h * usize::from(m > 0), n.b * n.h * m * m)
}

/// The first rows of a head, and the keys they see: as many.
struct Early<'a> {
    rows: usize,
    c: &'a [f32],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    a: Vec<f32>,
    da: Vec<f32>,
    /// Row-major, from numerators to the gradients of them.
    num: Vec<f32>,
    den: Vec<f32>,
    /// Operations.
    done: usize,
}

impl<'a> Early<'a> {
    fn new<T: Element>(
        p: &FeatureAttend,
        n: Sizes,
        c: &'a [f32],
        (q, k, v): (&View<T>, &View<T>, &View<T>),
        [b, h, kv]: [usize; 3],
    ) -> Self {
        let rows = early_rows(p, n);
        let part = |x: &View<T>, h: usize| {
            let mut out = vec![0.0; rows * x.shape[3]];
            load(x, b, h, 0, rows, &mut out);
            out
        };
        let room = |d: usize| vec![0f32; rows * d];
        let c = &c[h * (2 * n.tk).saturating_sub(1)..];
        let (q, k, v) = (part(q, h), part(k, kv), part(v, kv));
        Self { rows, c, q, k, v, a: room(rows), da: room(rows), num: room(n.dv), den: room(1), done: 0 }
    }

    /// Put their numerators (and denominators) in the place of those by transform, (channels, T).
    fn numerators(&mut self, p: &FeatureAttend, n: Sizes, num: &mut [f32]) {
        if self.rows == 0 {
            return;
        }
        let qkv = (&self.q[..], &self.k[..], &self.v[..]);
        self.done += direct_rows(p, n, self.c, &(0..self.rows), qkv, &mut self.a, &mut self.num, &mut self.den);
        for i in 0..self.rows {
            (0..n.dv).for_each(|d| num[d * n.tk + i] = self.num[i * n.dv + d]);
            if p.normalise.is_some() {
                num[n.dv * n.tk + i] = self.den[i];
            }
        }
    }

    /// Take the gradients of the numerators (and denominators) out of `dnum`, (channels, T), leaving zeros.
    fn take(&mut self, p: &FeatureAttend, n: Sizes, dnum: &mut [f32]) {
        for i in 0..self.rows {
            (0..n.dv).for_each(|d| self.num[i * n.dv + d] = std::mem::take(&mut dnum[d * n.tk + i]));
            self.den[i] = if p.normalise.is_some() { std::mem::take(&mut dnum[n.dv * n.tk + i]) } else { 0.0 };
        }
    }

    /// Add what the gradients taken give to dq, dk and dv, (width, T), and the weights.
    fn backward(&mut self, p: &FeatureAttend, n: Sizes, [dq, dk, dv]: [&mut [f32]; 3], dc: Option<&mut [f32]>) {
        if self.rows == 0 {
            return;
        }
        let m = self.rows;
        let (mut q, mut k, mut v) = (vec![0f32; m * n.r], vec![0f32; m * n.r], vec![0f32; m * n.dv]);
        let (qkv, squares) = ((&self.q[..], &self.k[..], &self.v[..]), [&mut self.a[..], &mut self.da[..]]);
        let grads = [&mut q[..], &mut k[..], &mut v[..]];
        self.done += direct_back(p, n, self.c, &(0..m), qkv, [&self.num, &self.den], squares, grads, dc);
        for (out, rows, width) in [(dq, &q, n.r), (dk, &k, n.r), (dv, &v, n.dv)] {
            for (i, row) in rows.chunks_exact(width.max(1)).enumerate() {
                row.iter().enumerate().for_each(|(c, x)| out[c * n.tk + i] += x);
            }
        }
    }
}

pub(super) fn backward<T: Element>(
    p: &FeatureAttend,
    n: Sizes,
    c: &[f32],
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    dout: &View<f32>,
    grads: &GradRows,
    dweights: Option<&mut [f32]>,
) -> Work {
    let ring = Ring::new(points(n.tk), p.isa.unwrap_or_else(Isa::active));
    let (t, scale, width) = (n.tk, 1.0 / ring.n as f32, (2 * n.tk).saturating_sub(1));
    let total = std::sync::atomic::AtomicUsize::new(0);
    let mut dc = vec![0f32; if dweights.is_some() { n.b * n.h * width } else { 0 }];
    each_group(&mut dc, n, width, |task, mut dc| {
        let (b, kv) = (task / n.hkv, task % n.hkv);
        let (mut dk, mut dv) = (vec![0f32; n.r * t], vec![0f32; (n.dv + 1) * t]);
        let (mut x, mut y, mut sum) = (Folded::new(ring.n), Folded::new(ring.n), Folded::new(ring.n));
        for g in 0..n.group() {
            let h = kv * n.group() + g;
            let head = Head::new(p, n, c, &ring, (q, k, v), [b, h, kv]);
            let mut num = head.numerators(n.r);
            let mut early = Early::new(p, n, c, (q, k, v), [b, h, kv]);
            early.numerators(p, n, &mut num);
            let mut dq = vec![0f32; n.r * t];
            for i in 0..t {
                let mut o: Vec<f32> = (0..n.dv).map(|d| num[d * t + i]).collect();
                let mut go = dout.row(b, h, i).to_vec();
                let inverse = p.finish(&mut o, if p.normalise.is_some() { num[n.dv * t + i] } else { 0.0 });
                let dden = p.unfinish(&o, &mut go, inverse);
                // From here on `num` holds its own gradient.
                go.iter().enumerate().for_each(|(d, g)| num[d * t + i] = *g);
                if p.normalise.is_some() {
                    num[n.dv * t + i] = dden;
                }
            }
            early.take(p, n, &mut num);
            let (re, im) = sum.parts();
            re.fill(0.0);
            im.fill(0.0);
            for r in 0..n.r {
                let (kr, qr) = (Head::column(&head.k, t, r), Head::column(&head.q, t, r));
                for d in 0..head.channels {
                    let (vd, gd) = (Head::column(&head.v, t, d), Head::column(&num, t, d));
                    x.fill(kr, vd);
                    y.fill(qr, gd);
                    let ((xr, xi), (yr, yi)) = (x.parts(), y.parts());
                    ring.forward(xr, xi);
                    ring.forward(yr, yi);
                    if dc.is_some() {
                        ring.correlate((yr, yi), (xr, xi), sum.parts());
                    }
                    ring.convolve_back(xr, xi, head.weights.get());
                    ring.correlate_back(yr, yi, head.weights.get());
                    let add = |out: &mut [f32], a: &[f32], b: &[f32]| {
                        out.iter_mut().zip(a.iter().zip(b)).for_each(|(o, (a, b))| *o += a * (scale * b));
                    };
                    add(&mut dq[r * t..(r + 1) * t], gd, xr);
                    add(&mut dk[r * t..(r + 1) * t], vd, yr);
                    add(&mut dv[d * t..(d + 1) * t], kr, yr);
                }
            }
            let mut dc = dc.as_deref_mut().map(|dc| &mut dc[g * width..(g + 1) * width]);
            if let Some(dc) = &mut dc {
                let (re, im) = sum.parts();
                ring.inverse(re, im);
                for d in 0..t {
                    dc[t - 1 + d] = scale * *sum.at(d);
                    if d > 0 && !p.causal {
                        dc[t - 1 - d] = -scale * *sum.at(2 * ring.n - d);
                    }
                }
            }
            early.backward(p, n, [&mut dq, &mut dk, &mut dv], dc);
            total.fetch_add(early.done, std::sync::atomic::Ordering::Relaxed);
            // SAFETY: the heads of a group belong to this task.
            unsafe { store(&transpose(&dq, t), n.r, &grads.dq, b, h, 0) };
        }
        // SAFETY: the key head belongs to this task.
        unsafe {
            store(&transpose(&dk, t), n.r, &grads.dk, b, kv, 0);
            store(&transpose(&dv[..n.dv * t], t), n.dv, &grads.dv, b, kv, 0);
        }
    });
    sum_batch(dweights, &dc);
    let channels = n.dv + usize::from(p.normalise.is_some());
    let (tiles, pairs) = early_tiles(p, n);
    n.work::<T>(flops(n, &ring, channels, 6) + total.into_inner(), tiles, pairs, written(n))
}

/// Elements of dq, dk and dv.
fn written(n: Sizes) -> usize {
    n.b * (n.h * n.tq * n.r + n.hkv * n.tk * (n.r + n.dv))
}

/// Run `f` on every (batch, key head), with its heads' part of `dc` if there is one.
fn each_group(dc: &mut [f32], n: Sizes, width: usize, f: impl Fn(usize, Option<&mut [f32]>) + Sync) {
    let part = n.group() * width;
    if dc.is_empty() {
        return (0..n.b * n.hkv).into_par_iter().for_each(|task| f(task, None));
    }
    dc.par_chunks_exact_mut(part).enumerate().for_each(|(task, dc)| f(task, Some(dc)));
}

/// Weights are shared by the batch.
fn sum_batch(out: Option<&mut [f32]>, dc: &[f32]) {
    if let Some(out) = out {
        out.fill(0.0);
        for dc in dc.chunks_exact(out.len().max(1)) {
            out.iter_mut().zip(dc).for_each(|(o, x)| *o += x);
        }
    }
}

/// Pieces of `0..t`.
fn chunks(t: usize) -> impl Iterator<Item = Range<usize>> {
    (0..t).step_by(CHUNK).map(move |i| i..(i + CHUNK).min(t))
}

/// Key tiles that queries `qs` see.
fn seen(p: &FeatureAttend, t: usize, qs: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let (causal, end) = (p.causal, qs.end);
    chunks(t).filter(move |ks| !causal || ks.start < end)
}

/// Row i of a tile's weights, as c_(i−j) for j rising; keys past the query (causal) are the caller's to skip.
fn row_weights(c: &[f32], t: usize, i: usize, ks: &Range<usize>) -> impl Iterator<Item = f32> {
    let first = i + t - 1 - ks.start;
    c[first + 1 - ks.len()..=first].iter().rev().copied()
}

/// Keys of the tile that query i sees.
fn visible(p: &FeatureAttend, i: usize, ks: &Range<usize>) -> usize {
    if p.causal { (i + 1).saturating_sub(ks.start).min(ks.len()) } else { ks.len() }
}

/// All rows of a head.
fn rows<T: Element>(x: &View<T>, b: usize, h: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.shape[2] * x.shape[3]];
    load(x, b, h, 0, x.shape[2], &mut out);
    out
}

/// Numerators (in `num`) and denominators of one tile of queries, over all keys they see. Returns operations.
fn direct_rows(
    p: &FeatureAttend,
    n: Sizes,
    c: &[f32],
    qs: &Range<usize>,
    (q, k, v): (&[f32], &[f32], &[f32]),
    a: &mut [f32],
    num: &mut [f32],
    den: &mut [f32],
) -> usize {
    let mut done = 0;
    num.fill(0.0);
    den.fill(0.0);
    for ks in seen(p, n.tk, qs) {
        done +=
            product(a, mat(&q[qs.start * n.r..], qs.len(), n.r), mat(&k[ks.start * n.r..], ks.len(), n.r).t(), false);
        for (i, row) in a[..qs.len() * ks.len()].chunks_exact_mut(ks.len()).enumerate() {
            let sees = visible(p, qs.start + i, &ks);
            row.iter_mut().zip(row_weights(c, n.tk, qs.start + i, &ks)).for_each(|(a, c)| *a *= c);
            row[sees..].fill(0.0);
            den[i] += row[..sees].iter().sum::<f32>();
        }
        done += 2 * qs.len() * ks.len();
        done += product(num, mat(a, qs.len(), ks.len()), mat(&v[ks.start * n.dv..], ks.len(), n.dv), true);
    }
    done
}

/// Tiles visited, and scores in them, of one head.
fn tiles(p: &FeatureAttend, n: Sizes) -> (usize, usize) {
    let all = chunks(n.tq).flat_map(|qs| seen(p, n.tk, &qs).map(move |ks| qs.len() * ks.len()));
    all.fold((0, 0), |(tiles, pairs), x| (tiles + 1, pairs + x))
}

pub(super) fn forward_direct<T: Element>(
    p: &FeatureAttend,
    n: Sizes,
    c: &[f32],
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    out: &Rows<f32>,
) -> Work {
    let done = (0..n.b * n.h).into_par_iter().map(|task| {
        let (b, h) = (task / n.h, task % n.h);
        let (q, k, v) = (rows(q, b, h), rows(k, b, h / n.group()), rows(v, b, h / n.group()));
        let c = &c[h * (2 * n.tk).saturating_sub(1)..];
        let (mut a, mut den, mut done) = (vec![0f32; CHUNK * CHUNK], vec![0f32; CHUNK], 0);
        let mut num = vec![0f32; CHUNK * n.dv];
        for qs in chunks(n.tq) {
            let num = &mut num[..qs.len() * n.dv];
            done += direct_rows(p, n, c, &qs, (&q, &k, &v), &mut a, num, &mut den);
            for i in 0..qs.len() {
                p.finish(&mut num[i * n.dv..(i + 1) * n.dv], den[i]);
            }
            // SAFETY: the head belongs to this task.
            unsafe { store(num, n.dv, out, b, h, qs.start) };
        }
        done
    });
    let flops = done.sum();
    let (tiles, pairs) = tiles(p, n);
    n.work::<T>(flops, n.b * n.h * tiles, n.b * n.h * pairs, n.b * n.h * n.tq * n.dv)
}

/// What one tile of queries, with the gradients of its numerators and denominators, adds to `dq` (of the tile's rows), dk and
/// dv (of all) and the weights. Returns operations.
fn direct_back(
    p: &FeatureAttend,
    n: Sizes,
    c: &[f32],
    qs: &Range<usize>,
    (q, k, v): (&[f32], &[f32], &[f32]),
    [dnum, dden]: [&[f32]; 2],
    [a, da]: [&mut [f32]; 2],
    [dq, dk, dv]: [&mut [f32]; 3],
    mut dc: Option<&mut [f32]>,
) -> usize {
    let (m, t, mut done) = (qs.len(), n.tk, 0);
    let q = mat(&q[qs.start * n.r..], m, n.r);
    for ks in seen(p, t, qs) {
        let (kt, vt) = (mat(&k[ks.start * n.r..], ks.len(), n.r), mat(&v[ks.start * n.dv..], ks.len(), n.dv));
        done += product(a, q, kt.t(), false);
        done += product(da, mat(dnum, m, n.dv), vt.t(), false);
        for i in 0..m {
            let at = i * ks.len()..(i + 1) * ks.len();
            let sees = visible(p, qs.start + i, &ks);
            let (a, da) = (&mut a[at.clone()], &mut da[at]);
            a[sees..].fill(0.0);
            da[sees..].fill(0.0);
            da[..sees].iter_mut().for_each(|x| *x += dden[i]);
            if let Some(dc) = &mut dc {
                let first = qs.start + i + t - 1 - ks.start;
                (0..sees).for_each(|j| dc[first - j] += a[j] * da[j]);
            }
            for ((a, da), c) in a.iter_mut().zip(da).zip(row_weights(c, t, qs.start + i, &ks)) {
                (*a, *da) = (*a * c, *da * c);
            }
        }
        done += 5 * m * ks.len();
        let (a, da) = (mat(a, m, ks.len()), mat(da, m, ks.len()));
        done += product(dq, da, kt, true);
        done += product(&mut dk[ks.start * n.r..ks.end * n.r], da.t(), q, true);
        done += product(&mut dv[ks.start * n.dv..ks.end * n.dv], a.t(), mat(dnum, m, n.dv), true);
    }
    done
}

pub(super) fn backward_direct<T: Element>(
    p: &FeatureAttend,
    n: Sizes,
    c: &[f32],
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    dout: &View<f32>,
    grads: &GradRows,
    dweights: Option<&mut [f32]>,
) -> Work {
    let (t, width) = (n.tk, (2 * n.tk).saturating_sub(1));
    let mut dc = vec![0f32; if dweights.is_some() { n.b * n.h * width } else { 0 }];
    let total = std::sync::atomic::AtomicUsize::new(0);
    each_group(&mut dc, n, width, |task, mut dc| {
        let (b, kv) = (task / n.hkv, task % n.hkv);
        let (k, v) = (rows(k, b, kv), rows(v, b, kv));
        let (mut dk, mut dv) = (vec![0f32; t * n.r], vec![0f32; t * n.dv]);
        let square = || vec![0f32; CHUNK * CHUNK];
        let (mut a, mut da, mut den, mut done) = (square(), square(), vec![0f32; CHUNK], 0);
        let (mut num, mut dq) = (vec![0f32; CHUNK * n.dv], vec![0f32; CHUNK * n.r]);
        for g in 0..n.group() {
            let h = kv * n.group() + g;
            let (q, mut dnum, c) = (rows(q, b, h), rows(dout, b, h), &c[h * width..]);
            for qs in chunks(t) {
                let m = qs.len();
                let (num, dq) = (&mut num[..m * n.dv], &mut dq[..m * n.r]);
                done += direct_rows(p, n, c, &qs, (&q, &k, &v), &mut a, num, &mut den);
                let dnum = &mut dnum[qs.start * n.dv..qs.end * n.dv];
                for i in 0..m {
                    let row = i * n.dv..(i + 1) * n.dv;
                    let inverse = p.finish(&mut num[row.clone()], den[i]);
                    den[i] = p.unfinish(&num[row.clone()], &mut dnum[row], inverse);
                }
                dq.fill(0.0);
                let dc = dc.as_deref_mut().map(|dc| &mut dc[g * width..(g + 1) * width]);
                let (squares, out) = ([&mut a[..], &mut da[..]], [&mut *dq, &mut dk[..], &mut dv[..]]);
                done += direct_back(p, n, c, &qs, (&q, &k, &v), [dnum, &den], squares, out, dc);
                // SAFETY: the heads of a group belong to this task.
                unsafe { store(dq, n.r, &grads.dq, b, h, qs.start) };
            }
        }
        // SAFETY: the key head belongs to this task.
        unsafe {
            store(&dk, n.r, &grads.dk, b, kv, 0);
            store(&dv, n.dv, &grads.dv, b, kv, 0);
        }
        total.fetch_add(done, std::sync::atomic::Ordering::Relaxed);
    });
    sum_batch(dweights, &dc);
    let (tiles, pairs) = tiles(p, n);
    n.work::<T>(total.into_inner(), n.b * n.h * tiles, n.b * n.h * pairs, written(n))
}
