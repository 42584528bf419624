//! Products in bf16 on AMX tiles: f32 operands are rounded while they are packed.
//!
//! Where more is needed, operands are split into two bf16, x = high + low to 2⁻¹⁷, and the product is
//! high·high + high·low + low·high; terms with a low part that is zero throughout are left out.

#![allow(unsafe_op_in_unsafe_fn)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod imp {
    use super::super::mat::{Mut, Op, Ref, Tri};

    /// Nothing: `Isa::Amx` is only detected on x86-64 Linux.
    pub(in super::super) struct Pack;

    impl Pack {
        pub(in super::super) fn new(_: bool) -> Self {
            Pack
        }
        pub(in super::super) fn mm(&mut self, _: Op, _: Tri, _: f32, _: Ref, _: Ref, _: Mut, _: bool, _: bool) {
            unreachable!("Isa::Amx is only detected on x86-64 Linux");
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod imp {
    use super::super::mat::{Mut, Op, PAD, Ref, Tri, bounds, check};
    use crate::amx::Tiles;
    use crate::simd::transpose;
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Bytes of a row, and of a tile of 16 rows.
    pub(in super::super) const LINE: usize = 64;
    pub(in super::super) const TILE: usize = 1024;

    #[derive(Clone, Copy)]
    #[repr(C, align(64))]
    struct Bytes([u8; LINE]);

    /// Room for packed operands, and the configured tiles of this thread.
    pub(in super::super) struct Pack {
        a: Vec<Bytes>,
        b: Vec<Bytes>,
        tiles: Option<Tiles>,
    }

    impl Pack {
        /// With `tiles` only if `Isa::Amx` was detected.
        pub(in super::super) fn new(tiles: bool) -> Self {
            // SAFETY: the caller detected AMX, which includes the system's leave to use it.
            Pack { a: Vec::new(), b: Vec::new(), tiles: tiles.then(|| unsafe { Tiles::new() }) }
        }

        /// C = alpha · op(A, B), or += it, operands rounded to bf16 or (`split`) to two.
        pub(in super::super) fn mm(
            &mut self,
            op: Op,
            tri: Tri,
            alpha: f32,
            a: Ref,
            b: Ref,
            mut c: Mut,
            add: bool,
            split: bool,
        ) {
            assert!(self.tiles.is_some());
            let [m, n, k] = check(op, a, b, &c);
            if m == 0 || n == 0 || k == 0 {
                if !add {
                    for r in 0..m {
                        c.data[r * c.ld..][..n].fill(0.0);
                    }
                }
                return;
            }
            let steps = k.div_ceil(32);
            let reserve = |v: &mut Vec<Bytes>, tiles: usize| {
                // Low parts follow the high ones.
                if v.len() < 2 * tiles * 16 {
                    v.resize(2 * tiles * 16, Bytes([0; LINE]));
                }
            };
            reserve(&mut self.a, m / 16 * steps);
            reserve(&mut self.b, n / 16 * steps);
            // SAFETY: an engine with tiles is only made under a detected `Isa::Amx`; `check` bounds
            // the operands, and the packed ones were given room above.
            unsafe {
                if split {
                    product::<true>(op, tri, alpha, [m, n, k], a, b, &mut c, add, self)
                } else {
                    product::<false>(op, tri, alpha, [m, n, k], a, b, &mut c, add, self)
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn product<const SPLIT: bool>(
        op: Op,
        tri: Tri,
        alpha: f32,
        [m, n, k]: [usize; 3],
        a: Ref,
        b: Ref,
        c: &mut Mut,
        add: bool,
        pack: &mut Pack,
    ) {
        let steps = k.div_ceil(32);
        let (pa, pb): (*mut u8, *mut u8) = (pack.a.as_mut_ptr().cast(), pack.b.as_mut_ptr().cast());
        let (low_a, low_b) = (m / 16 * steps * TILE, n / 16 * steps * TILE);
        // A: tile (row tile i, step s) at i·steps + s. B: (step s, column tile j) at j·steps + s.
        let more_a = if op == Op::Tn {
            turned_pairs::<SPLIT>(a, alpha, [m, k], pa, low_a)
        } else {
            lines::<SPLIT>(a, alpha, [m, k], pa, low_a)
        };
        let more_b = if op == Op::Nt {
            turned_lines::<SPLIT>(b, [n, k], pb, low_b)
        } else {
            whole_pairs::<SPLIT>(b, [n, k], pb, low_b)
        };
        let c_line = c.ld * 4;
        let c: *mut u8 = c.data.as_mut_ptr().cast();
        for i in (0..m / 16).step_by(2) {
            let two_rows = i + 1 < m / 16;
            let (cols, inner) = bounds(op, tri, i * PAD, (i + 1 + usize::from(two_rows)) * PAD, n, k);
            let (from, to) = (inner.start / 32, inner.end.div_ceil(32));
            for j in (0..cols / 16).step_by(2) {
                let (a, b) = (pa.add((i * steps + from) * TILE), pb.add((j * steps + from) * TILE));
                let term = Term::tiles(a, b, steps, to - from);
                // high·high, high·low, low·high.
                let mut terms = [term; 3];
                let mut count = 1;
                if more_b {
                    terms[count].b = b.add(low_b);
                    count += 1;
                }
                if more_a {
                    terms[count].a = a.add(low_a);
                    count += 1;
                }
                let c = Square { c: c.add(i * 16 * c_line + j * LINE), c_line, add };
                match (two_rows, j + 1 < cols / 16) {
                    (true, true) => square::<true, true>(&c, &terms[..count]),
                    (true, false) => square::<true, false>(&c, &terms[..count]),
                    (false, true) => square::<false, true>(&c, &terms[..count]),
                    (false, false) => square::<false, false>(&c, &terms[..count]),
                }
            }
        }
    }

    /// Up to 2 × 2 tiles of C; distances in bytes.
    pub(in super::super) struct Square {
        pub(in super::super) c: *mut u8,
        pub(in super::super) c_line: usize,
        pub(in super::super) add: bool,
    }

    /// A product to be summed into a square; distances in bytes.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Term {
        pub(in super::super) a: *const u8,
        /// From row to row, inner step to inner step and to the second row tile of A.
        pub(in super::super) a_line: usize,
        pub(in super::super) a_step: usize,
        pub(in super::super) a_next: usize,
        /// Packed tiles, those of successive steps after each other.
        pub(in super::super) b: *const u8,
        /// To the second column tile of B.
        pub(in super::super) b_next: usize,
        /// Inner steps of 32.
        pub(in super::super) count: usize,
    }

    impl Term {
        /// Both operands packed, with `steps` tiles for a row tile of A or column tile of B.
        #[inline(always)]
        pub(in super::super) fn tiles(a: *const u8, b: *const u8, steps: usize, count: usize) -> Self {
            let next = steps * TILE;
            Term { a, a_line: LINE, a_step: TILE, a_next: next, b, b_next: next, count }
        }
    }

    /// C = [C +] Σ A·B for one or two row tiles (`A2`) and column tiles (`B2`), over all `terms`.
    #[inline(always)]
    pub(in super::super) unsafe fn square<const A2: bool, const B2: bool>(p: &Square, terms: &[Term]) {
        // Tiles 0..=3 are C, 4 and 5 A, 6 and 7 B; nobody else uses any between these statements.
        macro_rules! tile {
            ($op:literal, $p:expr, $line:expr) => {
                asm!($op, p = in(reg) $p, l = in(reg) $line, options(nostack, preserves_flags))
            };
        }
        let low = p.c.wrapping_add(16 * p.c_line);
        if p.add {
            tile!("tileloadd tmm0, [{p} + {l}*1]", p.c, p.c_line);
            if B2 {
                tile!("tileloadd tmm1, [{p} + {l}*1 + 64]", p.c, p.c_line);
            }
            if A2 {
                tile!("tileloadd tmm2, [{p} + {l}*1]", low, p.c_line);
            }
            if A2 && B2 {
                tile!("tileloadd tmm3, [{p} + {l}*1 + 64]", low, p.c_line);
            }
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
            asm!("tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        }
        for term in terms {
            let (mut a, mut b) = (term.a, term.b);
            for _ in 0..term.count {
                tile!("tileloadd tmm6, [{p} + {l}*1]", b, LINE);
                tile!("tileloadd tmm4, [{p} + {l}*1]", a, term.a_line);
                asm!("tdpbf16ps tmm0, tmm4, tmm6", options(nostack, preserves_flags));
                if B2 {
                    tile!("tileloadd tmm7, [{p} + {l}*1]", b.wrapping_add(term.b_next), LINE);
                    asm!("tdpbf16ps tmm1, tmm4, tmm7", options(nostack, preserves_flags));
                }
                // Tiles are given back as soon as they are used: see `crate::amx`.
                asm!("tilezero tmm4", options(nostack, preserves_flags));
                if A2 {
                    tile!("tileloadd tmm5, [{p} + {l}*1]", a.wrapping_add(term.a_next), term.a_line);
                    asm!("tdpbf16ps tmm2, tmm5, tmm6", options(nostack, preserves_flags));
                }
                asm!("tilezero tmm6", options(nostack, preserves_flags));
                if A2 && B2 {
                    asm!("tdpbf16ps tmm3, tmm5, tmm7", options(nostack, preserves_flags));
                }
                asm!("tilezero tmm5", "tilezero tmm7", options(nostack, preserves_flags));
                a = a.wrapping_add(term.a_step);
                b = b.wrapping_add(TILE);
            }
        }
        tile!("tilestored [{p} + {l}*1], tmm0", p.c, p.c_line);
        if B2 {
            tile!("tilestored [{p} + {l}*1 + 64], tmm1", p.c, p.c_line);
        }
        if A2 {
            tile!("tilestored [{p} + {l}*1], tmm2", low, p.c_line);
        }
        if A2 && B2 {
            tile!("tilestored [{p} + {l}*1 + 64], tmm3", low, p.c_line);
        }
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
        asm!("tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
    }

    /// Two vectors of f32 as one of bf16.
    #[inline(always)]
    pub(in super::super) unsafe fn narrow(hi: __m512, lo: __m512) -> __m512i {
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(hi, lo))
    }

    /// 16 bf16, the lower or upper half of a vector, widened.
    #[inline(always)]
    unsafe fn widen_half<const UPPER: i32>(x: __m512i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<UPPER>(x))))
    }

    /// x in the low and y in the high half of the result, as bf16, and what the rounding left.
    #[inline(always)]
    unsafe fn round<const SPLIT: bool>(x: __m512, y: __m512) -> (__m512i, __m512i) {
        let high = narrow(y, x);
        if !SPLIT {
            return (high, _mm512_setzero_si512());
        }
        (high, narrow(_mm512_sub_ps(y, widen_half::<1>(high)), _mm512_sub_ps(x, widen_half::<0>(high))))
    }

    /// 32 consecutive elements of a row, of which `k` exist.
    #[inline(always)]
    unsafe fn line<const SPLIT: bool>(p: *const f32, k: usize, alpha: __m512) -> (__m512i, __m512i) {
        let lo = _mm512_mul_ps(_mm512_loadu_ps(p), alpha);
        let hi = if k > 16 { _mm512_mul_ps(_mm512_loadu_ps(p.add(16)), alpha) } else { _mm512_setzero_ps() };
        round::<SPLIT>(lo, hi)
    }

    /// Alternates the low and the high 16 elements: the pair order of a right operand.
    #[inline(always)]
    pub(in super::super) unsafe fn interleave(x: __m512i) -> __m512i {
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = (i / 2 + 16 * (i % 2)) as u16;
                i += 1;
            }
            order
        };
        _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), x)
    }

    /// Elements 0..16 of two rows, side by side: (x₀, y₀), (x₁, y₁), …
    #[inline(always)]
    unsafe fn pairs<const SPLIT: bool>(x: *const f32, y: *const f32, alpha: __m512) -> (__m512i, __m512i) {
        let (high, low) =
            round::<SPLIT>(_mm512_mul_ps(_mm512_loadu_ps(x), alpha), _mm512_mul_ps(_mm512_loadu_ps(y), alpha));
        (interleave(high), if SPLIT { interleave(low) } else { low })
    }

    /// Whether any element differs from ±0.
    #[inline(always)]
    unsafe fn some(seen: __m512i) -> bool {
        _mm512_test_epi16_mask(seen, _mm512_set1_epi16(0x7fff)) != 0
    }

    // The four packings below write high parts from `to` on and (`SPLIT`) low parts `low` bytes on,
    // and return whether any low part is not zero.

    /// A as it lies: row tile after row tile, 32 columns to a tile.
    #[inline(always)]
    unsafe fn lines<const SPLIT: bool>(a: Ref, alpha: f32, [m, k]: [usize; 2], to: *mut u8, low: usize) -> bool {
        let (alpha, steps) = (_mm512_set1_ps(alpha), k.div_ceil(32));
        let mut seen = _mm512_setzero_si512();
        for i in 0..m {
            let (row, to) = (a.data.as_ptr().add(i * a.ld), to.add(i / 16 * steps * TILE + i % 16 * LINE));
            for s in 0..steps {
                let (x, rest) = line::<SPLIT>(row.add(s * 32), k - s * 32, alpha);
                _mm512_store_si512(to.add(s * TILE).cast(), x);
                if SPLIT {
                    _mm512_store_si512(to.add(low + s * TILE).cast(), rest);
                    seen = _mm512_or_si512(seen, rest);
                }
            }
        }
        SPLIT && some(seen)
    }

    /// Bᵀ for B (n, k): tiles of 16 pairs of columns of B by 16 rows of B.
    #[inline(always)]
    unsafe fn turned_lines<const SPLIT: bool>(b: Ref, [n, k]: [usize; 2], to: *mut u8, low: usize) -> bool {
        let (one, steps, zero) = (_mm512_set1_ps(1.0), k.div_ceil(32), _mm512_setzero_si512());
        let mut seen = zero;
        for j in 0..n / 16 {
            for s in 0..steps {
                let (mut x, mut rest) = ([zero; 16], [zero; 16]);
                for r in 0..16 {
                    (x[r], rest[r]) = line::<SPLIT>(b.data.as_ptr().add((j * 16 + r) * b.ld + s * 32), k - s * 32, one);
                }
                let to = to.add((j * steps + s) * TILE);
                store_turned(x, to);
                if SPLIT {
                    for x in rest {
                        seen = _mm512_or_si512(seen, x);
                    }
                    store_turned(rest, to.add(low));
                }
            }
        }
        SPLIT && some(seen)
    }

    #[inline(always)]
    unsafe fn store_turned(x: [__m512i; 16], to: *mut u8) {
        let y = transpose(x);
        for r in 0..16 {
            _mm512_store_si512(to.add(r * LINE).cast(), y[r]);
        }
    }

    /// B (k, n) as it lies: tiles of 16 pairs of rows by 16 columns.
    #[inline(always)]
    unsafe fn whole_pairs<const SPLIT: bool>(b: Ref, [n, k]: [usize; 2], to: *mut u8, low: usize) -> bool {
        let (one, steps, zero) = (_mm512_set1_ps(1.0), k.div_ceil(32), _mm512_setzero_si512());
        let mut seen = zero;
        for row in (0..steps * 32).step_by(2) {
            let x = b.data.as_ptr().wrapping_add(row * b.ld);
            for j in 0..n / 16 {
                let to = to.add((j * steps + row / 32) * TILE + row % 32 / 2 * LINE);
                let (p, rest) =
                    if row < k { pairs::<SPLIT>(x.add(j * 16), x.add(b.ld + j * 16), one) } else { (zero, zero) };
                _mm512_store_si512(to.cast(), p);
                if SPLIT {
                    _mm512_store_si512(to.add(low).cast(), rest);
                    seen = _mm512_or_si512(seen, rest);
                }
            }
        }
        SPLIT && some(seen)
    }

    /// Aᵀ for A (k, m): tiles of 16 columns of A by 16 pairs of rows of A.
    #[inline(always)]
    unsafe fn turned_pairs<const SPLIT: bool>(a: Ref, alpha: f32, [m, k]: [usize; 2], to: *mut u8, low: usize) -> bool {
        let (alpha, steps, zero) = (_mm512_set1_ps(alpha), k.div_ceil(32), _mm512_setzero_si512());
        let mut seen = zero;
        for s in 0..steps {
            for i in 0..m / 16 {
                let (mut x, mut rest) = ([zero; 16], [zero; 16]);
                for r in 0..16 {
                    let row = s * 32 + 2 * r;
                    if row < k {
                        let p = a.data.as_ptr().add(row * a.ld + i * 16);
                        (x[r], rest[r]) = pairs::<SPLIT>(p, p.add(a.ld), alpha);
                    }
                }
                let to = to.add((i * steps + s) * TILE);
                store_turned(x, to);
                if SPLIT {
                    for x in rest {
                        seen = _mm512_or_si512(seen, x);
                    }
                    store_turned(rest, to.add(low));
                }
            }
        }
        SPLIT && some(seen)
    }
}

pub(super) use imp::Pack;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use imp::{LINE, Square, TILE, Term, interleave, narrow, square};
