//! Products of real sequences modulo xᵀ − 1: circular convolution without doubling the length.
//!
//! x²ᵐ − 1 = (xᵐ − 1)(xᵐ + 1). The second factor is a [`Ring`] of m/2 points; the first is split again, until it is so
//! short that it is convolved linearly, in a ring for twice its samples, and folded. All rings together have half the
//! points of the one for 2T samples.

use super::ring::{Ring, sizes};
use crate::dispatch::with_isa;
use crate::isa::Isa;
use crate::simd::Simd;
use std::ops::Range;

/// The transform for T samples in a circle.
pub(crate) struct Cyclic {
    t: usize,
    isa: Isa,
    /// For xᵐ + 1, shortest first.
    rings: Vec<Ring>,
    /// For the samples that are left.
    last: Ring,
    /// How many those are.
    least: usize,
}

impl Cyclic {
    /// `None` where T cannot be halved into the lengths that a [`Ring`] has.
    pub(crate) fn new(t: usize, isa: Isa) -> Option<Self> {
        let (mut rings, mut least) = (Vec::new(), t);
        while least.is_multiple_of(4) && sizes().take_while(|&n| n <= least / 4).any(|n| n == least / 4) {
            rings.push(Ring::new(least / 4, isa));
            least /= 2;
        }
        if rings.is_empty() {
            return None;
        }
        rings.reverse();
        let last = Ring::new(sizes().find(|&n| n >= least)?, isa);
        Some(Self { t, isa: isa.min(Isa::detect()), rings, last, least })
    }

    /// f32 of a sequence or its spectrum: the last ring's samples, then the others', shortest first.
    pub(crate) fn len(&self) -> usize {
        self.first() + self.t
    }

    /// Where the T samples lie in it before and after.
    pub(crate) fn first(&self) -> usize {
        2 * self.last.n - self.least
    }

    /// Complex points of all rings.
    pub(crate) fn points(&self) -> usize {
        self.last.n + self.rings.iter().map(|r| r.n).sum::<usize>()
    }

    /// Operations of one transform: those of the rings, and two for each pair that is split or joined.
    pub(crate) fn flops(&self) -> u64 {
        let pairs = self.rings.iter().map(|r| 4 * r.n as u64).sum::<u64>();
        self.last.flops() + self.rings.iter().map(Ring::flops).sum::<u64>() + pairs
    }

    /// `f` on each ring, its part of a sequence as (re, im), and where that part lies.
    fn parts(&self, x: &mut [f32], mut f: impl FnMut(&Ring, &mut [f32], &mut [f32], Range<usize>)) {
        let mut at = 0;
        for ring in std::iter::once(&self.last).chain(&self.rings) {
            let part = at..at + 2 * ring.n;
            let (re, im) = x[part.clone()].split_at_mut(ring.n);
            at = part.end;
            f(ring, re, im, part);
        }
    }

    /// Samples to the residues modulo each ring's factor.
    fn split(&self, x: &mut [f32]) {
        let first = self.first();
        let mut m = self.t;
        while m > self.least {
            m /= 2;
            self.pairs(&mut x[first..first + 2 * m], 1.0, 1.0);
        }
        x.copy_within(first..first + self.least, 0);
        x[self.least..2 * self.last.n].fill(0.0);
    }

    /// Back from the residues, each still times its ring's number of points.
    fn join(&self, x: &mut [f32], correlated: bool) {
        let (first, scale) = (self.first(), 1.0 / self.last.n as f32);
        // What ran past the end of a convolution, or before the start of a correlation, where the ring has turned its sign.
        let (from, sign) = if correlated { (first, -scale) } else { (self.least, scale) };
        let (low, high) = x.split_at_mut(self.least);
        low.iter_mut().zip(&high[from - self.least..]).for_each(|(a, b)| *a = *a * scale + *b * sign);
        x.copy_within(0..self.least, first);
        let mut m = self.least;
        for ring in &self.rings {
            self.pairs(&mut x[first..first + 2 * m], 0.5, 0.5 / ring.n as f32);
            m *= 2;
        }
    }

    /// For the halves a and b of `x`: (p·a + q·b, p·a − q·b).
    fn pairs(&self, x: &mut [f32], p: f32, q: f32) {
        let (a, b) = x.split_at_mut(x.len() / 2);
        // SAFETY: two slices of one length; `isa` is at most what the machine has.
        unsafe { butterflies(self.isa, a.as_mut_ptr(), b.as_mut_ptr(), a.len(), p, q) }
    }

    /// Samples to spectrum.
    pub(crate) fn forward(&self, x: &mut [f32]) {
        self.split(x);
        self.parts(x, |ring, re, im, _| ring.forward(re, im));
    }

    /// Samples from a sum of [`Cyclic::correlate`].
    pub(crate) fn inverse(&self, x: &mut [f32]) {
        self.parts(x, |ring, re, im, _| ring.inverse(re, im));
        self.join(x, true);
    }

    /// Samples convolved with those of the spectrum `h`.
    pub(crate) fn convolve(&self, x: &mut [f32], h: &[f32]) {
        self.split(x);
        self.parts(x, |ring, re, im, part| ring.convolve(re, im, h[part].split_at(ring.n)));
        self.join(x, false);
    }

    /// From a spectrum, the samples correlated with those of the spectrum `h`.
    pub(crate) fn correlate_back(&self, x: &mut [f32], h: &[f32]) {
        self.parts(x, |ring, re, im, part| ring.correlate_back(re, im, h[part].split_at(ring.n)));
        self.join(x, true);
    }

    /// acc += a · conj(b) on spectra.
    pub(crate) fn correlate(&self, a: &[f32], b: &[f32], acc: &mut [f32]) {
        self.parts(acc, |ring, re, im, part| {
            ring.correlate(a[part.clone()].split_at(ring.n), b[part].split_at(ring.n), (re, im));
        });
    }
}

/// (a, b) becomes (p·a + q·b, p·a − q·b).
#[inline(always)]
unsafe fn butterflies_on<S: Simd>(a: *mut f32, b: *mut f32, n: usize, p: f32, q: f32) {
    // SAFETY: both have `n` elements; vectors stay below that.
    unsafe {
        let (pv, qv) = (S::splat(p), S::splat(q));
        let mut i = 0;
        while i + S::LANES <= n {
            let (x, y) = (S::mul(S::load(a.add(i)), pv), S::mul(S::load(b.add(i)), qv));
            S::store(a.add(i), S::add(x, y));
            S::store(b.add(i), S::sub(x, y));
            i += S::LANES;
        }
        for j in i..n {
            let (x, y) = (*a.add(j) * p, *b.add(j) * q);
            (*a.add(j), *b.add(j)) = (x + y, x - y);
        }
    }
}

with_isa!(simd, unsafe fn butterflies => butterflies_on(a: *mut f32, b: *mut f32, n: usize, p: f32, q: f32));
