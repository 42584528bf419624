//! The transform behind long convolutions: products of real polynomials modulo x²ⁿ + 1.
//!
//! A real sequence of 2n samples is folded into n complex ones, z_k = x_k + i·x_(k+n). Since
//! (xⁿ)² = −1 reads xⁿ = i, the product of two folded sequences modulo xⁿ − i is the folded
//! product modulo x²ⁿ + 1: a real convolution at half length with no step that takes conjugate
//! pairs apart, which wraps around with a changed sign and is linear where nothing wraps.
//!
//! xⁿ − c splits into r factors x^(n/r) − ζ·e^(2πiq/r), ζ = c^(1/r), and so on down to degree one.
//! Reducing modulo the factors is a butterfly whose twiddle factors ζ, ζ², ζ³ are three numbers a
//! block instead of three vectors, and the factors come in an order of their own, which a pointwise
//! product does not mind: no pass permutes. The walk is depth first, so that one pass over the block
//! that fits a cache serves all passes below it, the product and the way back.
//!
//! When a factor's degree reaches the number of vector lanes, as many blocks are transposed, and the
//! last passes run across vectors.

// The vector code is one contract, that of `crate::simd`; a block per operation would only repeat it.
#![allow(unsafe_op_in_unsafe_fn)]

use super::lines::Lines;
use crate::dispatch::with_isa;
use crate::isa::Isa;
use crate::simd::{Portable, Simd};
use std::f64::consts::TAU;

/// Smallest number of complex points, whatever the instruction set (work must not depend on it).
const LEAST: usize = 256;

/// A vector set that can transpose a square of its registers.
pub(crate) trait Turn: Simd {
    /// Transpose the LANES × LANES matrix at `p`.
    ///
    /// # Safety
    /// As in [`crate::simd`]; `p` reaches LANES² elements.
    unsafe fn transpose(p: *mut f32);
}

impl Turn for Portable {
    #[inline(always)]
    unsafe fn transpose(p: *mut f32) {
        for i in 0..4 {
            for j in 0..i {
                std::ptr::swap(p.add(4 * i + j), p.add(4 * j + i));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Turn;
    use crate::simd::{Avx2, Avx512, Simd, transpose};
    use std::arch::x86_64::*;

    impl Turn for Avx2 {
        #[inline(always)]
        unsafe fn transpose(p: *mut f32) {
            let mut x = [_mm256_setzero_ps(); 8];
            for i in 0..8 {
                x[i] = Avx2::load(p.add(8 * i));
            }
            let mut a = x;
            for i in 0..4 {
                a[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
                a[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
            }
            let mut b = a;
            for i in 0..2 {
                b[4 * i] = _mm256_shuffle_ps::<0x44>(a[4 * i], a[4 * i + 2]);
                b[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a[4 * i], a[4 * i + 2]);
                b[4 * i + 2] = _mm256_shuffle_ps::<0x44>(a[4 * i + 1], a[4 * i + 3]);
                b[4 * i + 3] = _mm256_shuffle_ps::<0xee>(a[4 * i + 1], a[4 * i + 3]);
            }
            for i in 0..4 {
                Avx2::store(p.add(8 * i), _mm256_permute2f128_ps::<0x20>(b[i], b[i + 4]));
                Avx2::store(p.add(8 * (i + 4)), _mm256_permute2f128_ps::<0x31>(b[i], b[i + 4]));
            }
        }
    }

    impl Turn for Avx512 {
        #[inline(always)]
        unsafe fn transpose(p: *mut f32) {
            let mut x = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                x[i] = _mm512_castps_si512(Avx512::load(p.add(16 * i)));
            }
            let y = transpose(x);
            for i in 0..16 {
                Avx512::store(p.add(16 * i), _mm512_castsi512_ps(y[i]));
            }
        }
    }
}

/// One pass of the walk above the lanes.
struct Level {
    radix: usize,
    /// Degree of the blocks that it splits.
    len: usize,
    /// Real and imaginary parts of ζ, ζ², … for each block.
    twiddles: Vec<[f32; 6]>,
}

/// The transform for 2n real samples.
pub(crate) struct Ring {
    /// Complex points.
    pub(crate) n: usize,
    isa: Isa,
    levels: Vec<Level>,
    /// Levels whose blocks are longer than a leaf of `lanes²` points.
    outer: usize,
    /// For each leaf the twiddle vectors of the passes across vectors.
    across: Lines,
}

/// What a walk does at the leaves.
#[derive(Clone, Copy)]
struct Job {
    /// From samples to spectrum.
    down: bool,
    /// Times this spectrum, or its conjugate.
    times: Option<([*const f32; 2], bool)>,
    /// From spectrum to samples.
    up: bool,
}

/// Radices of the passes across vectors.
fn across(lanes: usize) -> (usize, usize) {
    match lanes {
        16 => (4, 4),
        8 => (4, 2),
        _ => (4, 1),
    }
}

/// The numbers of points a [`Ring`] can have, rising: 256, 512, 768, 1024, 1536, 2048, 3072, …
pub(crate) fn sizes() -> impl Iterator<Item = usize> {
    (0..usize::BITS - 12).flat_map(|k| [LEAST << k, (LEAST << k) / 2 * 3]).filter(|n| n.is_multiple_of(LEAST))
}

impl Ring {
    /// For `n` of [`sizes`].
    pub(crate) fn new(n: usize, isa: Isa) -> Self {
        let isa = isa.min(Isa::detect());
        let lanes = match isa {
            Isa::Portable => 4,
            Isa::Avx2 => 8,
            Isa::Avx512 | Isa::Amx => 16,
        };
        let leaf = lanes * lanes;
        let mut rest = n / leaf;
        assert!(rest > 0 && n.is_multiple_of(leaf), "no transform of {n} points");
        let mut radices = Vec::new();
        if rest.is_multiple_of(3) {
            radices.push(3);
            rest /= 3;
        }
        assert!(rest.is_power_of_two(), "no transform of {n} points");
        if rest.trailing_zeros() % 2 == 1 {
            radices.push(2);
            rest /= 2;
        }
        radices.extend(std::iter::repeat_n(4, rest.trailing_zeros() as usize / 2));
        let outer = radices.len();
        match lanes {
            16 => radices.extend([4, 4]),
            8 => radices.extend([4, 2]),
            _ => radices.push(4),
        }
        // The modulus of a block is x^len − e^(2πi·turn); at first i.
        let mut turns = vec![0.25f64];
        let mut len = n;
        let mut levels = Vec::new();
        for radix in radices {
            let r = radix as f64;
            let mut twiddles = Vec::with_capacity(turns.len());
            for turn in &turns {
                let mut w = [0f32; 6];
                for p in 1..radix {
                    let (sin, cos) = (TAU * turn / r * p as f64).sin_cos();
                    (w[2 * p - 2], w[2 * p - 1]) = (cos as f32, sin as f32);
                }
                twiddles.push(w);
            }
            levels.push(Level { radix, len, twiddles });
            turns = turns.iter().flat_map(|t| (0..radix).map(move |q| (t + q as f64) / r)).collect();
            len /= radix;
        }
        let (first, second) = across(lanes);
        let mut vectors = Vec::new();
        for leaf in turns.chunks(lanes) {
            let mut power = |radix: usize, child: usize, of: usize| {
                for p in 1..radix {
                    let angles = leaf.iter().map(|t| {
                        let turn = if of == 1 { *t } else { (t + child as f64) / of as f64 };
                        TAU * turn / radix as f64 * p as f64
                    });
                    vectors.extend(angles.clone().map(|a| a.cos() as f32));
                    vectors.extend(angles.map(|a| a.sin() as f32));
                }
            };
            power(first, 0, 1);
            for child in 0..first {
                power(second, child, first);
            }
        }
        let across = Lines::from(&vectors);
        Self { n, isa, levels, outer, across }
    }

    /// Floating-point operations of one transform, by the usual count 5·n·log₂ n.
    pub(crate) fn flops(&self) -> u64 {
        (5.0 * self.n as f64 * (self.n as f64).log2()) as u64
    }

    fn check(&self, re: &[f32], im: &[f32]) {
        assert!(re.len() == self.n && im.len() == self.n, "buffers of {} points", self.n);
    }

    fn run(&self, re: &mut [f32], im: &mut [f32], down: bool, times: Option<(&[f32], &[f32])>, conj: bool, up: bool) {
        self.check(re, im);
        let times = times.map(|(hr, hi)| {
            self.check(hr, hi);
            ([hr.as_ptr(), hi.as_ptr()], conj)
        });
        // SAFETY: all buffers have n points, and `isa` is at most what the machine has.
        unsafe { walk(self.isa, self, re.as_mut_ptr(), im.as_mut_ptr(), Job { down, times, up }) }
    }

    /// Folded samples to their spectrum, in the walk's own order.
    pub(crate) fn forward(&self, re: &mut [f32], im: &mut [f32]) {
        self.run(re, im, true, None, false, false);
    }

    /// Spectrum to folded samples, times n.
    pub(crate) fn inverse(&self, re: &mut [f32], im: &mut [f32]) {
        self.run(re, im, false, None, false, true);
    }

    /// Folded samples convolved with the sequence of the spectrum `h`, times n.
    pub(crate) fn convolve(&self, re: &mut [f32], im: &mut [f32], h: (&[f32], &[f32])) {
        self.run(re, im, true, Some(h), false, true);
    }

    /// From a spectrum, the samples convolved with the sequence of the spectrum `h`, times n.
    pub(crate) fn convolve_back(&self, re: &mut [f32], im: &mut [f32], h: (&[f32], &[f32])) {
        self.run(re, im, false, Some(h), false, true);
    }

    /// From a spectrum, the samples correlated with the sequence of the spectrum `h`, times n.
    pub(crate) fn correlate_back(&self, re: &mut [f32], im: &mut [f32], h: (&[f32], &[f32])) {
        self.run(re, im, false, Some(h), true, true);
    }

    /// acc += a · conj(b) on spectra.
    pub(crate) fn correlate(&self, a: (&[f32], &[f32]), b: (&[f32], &[f32]), acc: (&mut [f32], &mut [f32])) {
        self.check(a.0, a.1);
        self.check(b.0, b.1);
        self.check(acc.0, acc.1);
        let parts = [a.0.as_ptr(), a.1.as_ptr(), b.0.as_ptr(), b.1.as_ptr()];
        // SAFETY: six buffers of n points; `isa` as in `forward`.
        unsafe { add_product(self.isa, parts, [acc.0.as_mut_ptr(), acc.1.as_mut_ptr()], self.n) }
    }
}

with_isa!(simd, unsafe fn walk => walk_on(ring: &Ring, re: *mut f32, im: *mut f32, job: Job));
with_isa!(simd, unsafe fn add_product => add_product_on(x: [*const f32; 4], acc: [*mut f32; 2], n: usize));

#[inline(always)]
unsafe fn add_product_on<S: Turn>(x: [*const f32; 4], acc: [*mut f32; 2], n: usize) {
    for j in (0..n).step_by(S::LANES) {
        let (ar, ai) = (S::load(x[0].add(j)), S::load(x[1].add(j)));
        let (br, bi) = (S::load(x[2].add(j)), S::load(x[3].add(j)));
        let re = S::fma(ar, br, S::fma(ai, bi, S::load(acc[0].add(j))));
        let im = S::fma(ai, br, S::sub(S::load(acc[1].add(j)), S::mul(ar, bi)));
        S::store(acc[0].add(j), re);
        S::store(acc[1].add(j), im);
    }
}

/// The walk over all leaves; see the module.
#[inline(always)]
unsafe fn walk_on<S: Turn>(ring: &Ring, re: *mut f32, im: *mut f32, job: Job) {
    let leaf = S::LANES * S::LANES;
    let Job { down, times, up } = job;
    let (outer, inner) = ring.levels.split_at(ring.outer);
    let vectors = ring.across.as_slice().as_ptr();
    let per_leaf = ring.across.as_slice().len() / (ring.n / leaf);
    for i in 0..ring.n / leaf {
        let start = i * leaf;
        if down {
            // Blocks that begin here, from the largest.
            for level in outer {
                if start % level.len == 0 {
                    split::<S>(level, start, re, im);
                }
            }
            for level in inner {
                for at in (start..start + leaf).step_by(level.len) {
                    split::<S>(level, at, re, im);
                }
            }
            S::transpose(re.add(start));
            S::transpose(im.add(start));
            cross_down::<S>(vectors.add(i * per_leaf), re.add(start), im.add(start));
        }
        if let Some(([hr, hi], conj)) = times {
            multiply::<S>(re.add(start), im.add(start), hr.add(start), hi.add(start), leaf, conj);
        }
        if up {
            cross_up::<S>(vectors.add(i * per_leaf), re.add(start), im.add(start));
            S::transpose(re.add(start));
            S::transpose(im.add(start));
            for level in inner.iter().rev() {
                for at in (start..start + leaf).step_by(level.len) {
                    join::<S>(level, at, re, im);
                }
            }
            // Blocks that end here, from the smallest.
            for level in outer.iter().rev() {
                if (start + leaf) % level.len == 0 {
                    join::<S>(level, start + leaf - level.len, re, im);
                }
            }
        }
    }
}

/// Twiddle vectors of one block.
#[inline(always)]
unsafe fn spread<S: Turn>(level: &Level, at: usize) -> [S::V; 6] {
    let w = level.twiddles.get_unchecked(at / level.len);
    [S::splat(w[0]), S::splat(w[1]), S::splat(w[2]), S::splat(w[3]), S::splat(w[4]), S::splat(w[5])]
}

/// The block at `at` into its factors.
#[inline(always)]
unsafe fn split<S: Turn>(level: &Level, at: usize, re: *mut f32, im: *mut f32) {
    let w = spread::<S>(level, at);
    let (re, im) = (re.add(at), im.add(at));
    match level.radix {
        4 => split4::<S>(re, im, level.len / 4, w),
        2 => split2::<S>(re, im, level.len / 2, [w[0], w[1]]),
        _ => split3::<S>(re, im, level.len / 3, [w[0], w[1], w[2], w[3]]),
    }
}

/// Back from the factors, times the radix.
#[inline(always)]
unsafe fn join<S: Turn>(level: &Level, at: usize, re: *mut f32, im: *mut f32) {
    let w = spread::<S>(level, at);
    let (re, im) = (re.add(at), im.add(at));
    match level.radix {
        4 => join4::<S>(re, im, level.len / 4, w),
        2 => join2::<S>(re, im, level.len / 2, [w[0], w[1]]),
        _ => join3::<S>(re, im, level.len / 3, [w[0], w[1], w[2], w[3]]),
    }
}

/// `N` vectors at `p`.
#[inline(always)]
unsafe fn vectors<S: Turn, const N: usize>(p: *const f32) -> [S::V; N] {
    let mut w = [S::splat(0.0); N];
    for (i, w) in w.iter_mut().enumerate() {
        *w = S::load(p.add(i * S::LANES));
    }
    w
}

#[inline(always)]
unsafe fn cross_down<S: Turn>(w: *const f32, re: *mut f32, im: *mut f32) {
    let child = S::LANES * S::LANES / 4;
    split4::<S>(re, im, child, vectors::<S, 6>(w));
    let w = w.add(6 * S::LANES);
    for q in 0..4 {
        let (re, im) = (re.add(q * child), im.add(q * child));
        match S::LANES {
            16 => split4::<S>(re, im, child / 4, vectors::<S, 6>(w.add(q * 6 * S::LANES))),
            8 => split2::<S>(re, im, child / 2, vectors::<S, 2>(w.add(q * 2 * S::LANES))),
            _ => {}
        }
    }
}

#[inline(always)]
unsafe fn cross_up<S: Turn>(w: *const f32, re: *mut f32, im: *mut f32) {
    let child = S::LANES * S::LANES / 4;
    let inner = w.add(6 * S::LANES);
    for q in 0..4 {
        let (re, im) = (re.add(q * child), im.add(q * child));
        match S::LANES {
            16 => join4::<S>(re, im, child / 4, vectors::<S, 6>(inner.add(q * 6 * S::LANES))),
            8 => join2::<S>(re, im, child / 2, vectors::<S, 2>(inner.add(q * 2 * S::LANES))),
            _ => {}
        }
    }
    join4::<S>(re, im, child, vectors::<S, 6>(w));
}

/// A complex vector.
type C<S> = (<S as Simd>::V, <S as Simd>::V);

#[inline(always)]
unsafe fn times<S: Turn>(a: C<S>, wr: S::V, wi: S::V) -> C<S> {
    // −0 − x is a plain negation, which folds into the fused operation.
    let nwi = S::sub(S::splat(-0.0), wi);
    (S::fma(a.1, nwi, S::mul(a.0, wr)), S::fma(a.1, wr, S::mul(a.0, wi)))
}

#[inline(always)]
unsafe fn times_conj<S: Turn>(a: C<S>, wr: S::V, wi: S::V) -> C<S> {
    let nwi = S::sub(S::splat(-0.0), wi);
    (S::fma(a.1, wi, S::mul(a.0, wr)), S::fma(a.0, nwi, S::mul(a.1, wr)))
}

#[inline(always)]
unsafe fn plus<S: Turn>(a: C<S>, b: C<S>) -> C<S> {
    (S::add(a.0, b.0), S::add(a.1, b.1))
}

#[inline(always)]
unsafe fn minus<S: Turn>(a: C<S>, b: C<S>) -> C<S> {
    (S::sub(a.0, b.0), S::sub(a.1, b.1))
}

/// a + i·b
#[inline(always)]
unsafe fn plus_i<S: Turn>(a: C<S>, b: C<S>) -> C<S> {
    (S::sub(a.0, b.1), S::add(a.1, b.0))
}

/// a − i·b
#[inline(always)]
unsafe fn minus_i<S: Turn>(a: C<S>, b: C<S>) -> C<S> {
    (S::add(a.0, b.1), S::sub(a.1, b.0))
}

#[inline(always)]
unsafe fn get<S: Turn>(re: *const f32, im: *const f32, at: usize) -> C<S> {
    (S::load(re.add(at)), S::load(im.add(at)))
}

#[inline(always)]
unsafe fn put<S: Turn>(re: *mut f32, im: *mut f32, at: usize, x: C<S>) {
    S::store(re.add(at), x.0);
    S::store(im.add(at), x.1);
}

#[inline(always)]
unsafe fn split4<S: Turn>(re: *mut f32, im: *mut f32, q: usize, w: [S::V; 6]) {
    for j in (0..q).step_by(S::LANES) {
        let b0 = get::<S>(re, im, j);
        let b1 = times::<S>(get::<S>(re, im, j + q), w[0], w[1]);
        let b2 = times::<S>(get::<S>(re, im, j + 2 * q), w[2], w[3]);
        let b3 = times::<S>(get::<S>(re, im, j + 3 * q), w[4], w[5]);
        let (s, d) = (plus::<S>(b0, b2), minus::<S>(b0, b2));
        let (t, e) = (plus::<S>(b1, b3), minus::<S>(b1, b3));
        put::<S>(re, im, j, plus::<S>(s, t));
        put::<S>(re, im, j + q, plus_i::<S>(d, e));
        put::<S>(re, im, j + 2 * q, minus::<S>(s, t));
        put::<S>(re, im, j + 3 * q, minus_i::<S>(d, e));
    }
}

#[inline(always)]
unsafe fn join4<S: Turn>(re: *mut f32, im: *mut f32, q: usize, w: [S::V; 6]) {
    for j in (0..q).step_by(S::LANES) {
        let c0 = get::<S>(re, im, j);
        let c1 = get::<S>(re, im, j + q);
        let c2 = get::<S>(re, im, j + 2 * q);
        let c3 = get::<S>(re, im, j + 3 * q);
        let (s, d) = (plus::<S>(c0, c2), minus::<S>(c0, c2));
        let (t, e) = (plus::<S>(c1, c3), minus::<S>(c1, c3));
        put::<S>(re, im, j, plus::<S>(s, t));
        put::<S>(re, im, j + q, times_conj::<S>(minus_i::<S>(d, e), w[0], w[1]));
        put::<S>(re, im, j + 2 * q, times_conj::<S>(minus::<S>(s, t), w[2], w[3]));
        put::<S>(re, im, j + 3 * q, times_conj::<S>(plus_i::<S>(d, e), w[4], w[5]));
    }
}

#[inline(always)]
unsafe fn split2<S: Turn>(re: *mut f32, im: *mut f32, q: usize, w: [S::V; 2]) {
    for j in (0..q).step_by(S::LANES) {
        let b0 = get::<S>(re, im, j);
        let b1 = times::<S>(get::<S>(re, im, j + q), w[0], w[1]);
        put::<S>(re, im, j, plus::<S>(b0, b1));
        put::<S>(re, im, j + q, minus::<S>(b0, b1));
    }
}

#[inline(always)]
unsafe fn join2<S: Turn>(re: *mut f32, im: *mut f32, q: usize, w: [S::V; 2]) {
    for j in (0..q).step_by(S::LANES) {
        let (c0, c1) = (get::<S>(re, im, j), get::<S>(re, im, j + q));
        put::<S>(re, im, j, plus::<S>(c0, c1));
        put::<S>(re, im, j + q, times_conj::<S>(minus::<S>(c0, c1), w[0], w[1]));
    }
}

/// sin 60°.
const SIN_60: f32 = 0.866_025_4;

#[inline(always)]
unsafe fn split3<S: Turn>(re: *mut f32, im: *mut f32, q: usize, w: [S::V; 4]) {
    let (half, sin) = (S::splat(-0.5), S::splat(SIN_60));
    for j in (0..q).step_by(S::LANES) {
        let b0 = get::<S>(re, im, j);
        let b1 = times::<S>(get::<S>(re, im, j + q), w[0], w[1]);
        let b2 = times::<S>(get::<S>(re, im, j + 2 * q), w[2], w[3]);
        let (s, d) = (plus::<S>(b1, b2), minus::<S>(b1, b2));
        let m = (S::fma(s.0, half, b0.0), S::fma(s.1, half, b0.1));
        let d = (S::mul(d.0, sin), S::mul(d.1, sin));
        put::<S>(re, im, j, plus::<S>(b0, s));
        put::<S>(re, im, j + q, plus_i::<S>(m, d));
        put::<S>(re, im, j + 2 * q, minus_i::<S>(m, d));
    }
}

#[inline(always)]
unsafe fn join3<S: Turn>(re: *mut f32, im: *mut f32, q: usize, w: [S::V; 4]) {
    let (half, sin) = (S::splat(-0.5), S::splat(SIN_60));
    for j in (0..q).step_by(S::LANES) {
        let c0 = get::<S>(re, im, j);
        let (c1, c2) = (get::<S>(re, im, j + q), get::<S>(re, im, j + 2 * q));
        let (s, d) = (plus::<S>(c1, c2), minus::<S>(c1, c2));
        let m = (S::fma(s.0, half, c0.0), S::fma(s.1, half, c0.1));
        let d = (S::mul(d.0, sin), S::mul(d.1, sin));
        put::<S>(re, im, j, plus::<S>(c0, s));
        put::<S>(re, im, j + q, times_conj::<S>(minus_i::<S>(m, d), w[0], w[1]));
        put::<S>(re, im, j + 2 * q, times_conj::<S>(plus_i::<S>(m, d), w[2], w[3]));
    }
}

#[inline(always)]
unsafe fn multiply<S: Turn>(re: *mut f32, im: *mut f32, hr: *const f32, hi: *const f32, n: usize, conj: bool) {
    for j in (0..n).step_by(S::LANES) {
        let (wr, wi) = (S::load(hr.add(j)), S::load(hi.add(j)));
        let x = get::<S>(re, im, j);
        let y = if conj { times_conj::<S>(x, wr, wi) } else { times::<S>(x, wr, wi) };
        put::<S>(re, im, j, y);
    }
}
