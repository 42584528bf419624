//! Tile kernels: bf16 × bf16 → f32 on AMX, 32 × 32 outputs at a time.

use super::{OutPtr, PackedLinear};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn forward(_: &PackedLinear, _: &[f32], _: usize, _: OutPtr) {
    unreachable!("Isa::Amx is only detected on x86-64 Linux");
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use imp::forward;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod imp {
    use super::super::pack::{INT4_MINIMA, INT4_SCALES, INT8_SCALES, Line};
    use super::super::{BLOCK, PANEL, WeightFormat, grid};
    use super::*;
    use crate::amx::Tiles;
    use rayon::prelude::*;
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::cell::{Cell, RefCell};

    /// Bytes of a tile: 16 rows of a cache line.
    const TILE: usize = 1024;

    /// Rows of x that are converted at once, which bounds the scratch.
    const SLAB: usize = 2048;
    /// Bytes of x that a task keeps in its second-level cache.
    const NEAR: usize = 1 << 20;

    thread_local! {
        /// x in tile order; taken out meanwhile, for a thread that waits may be given another call's task.
        static ROWS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
        /// Two panels of integer weights widened to bf16. Both are kept from call to call: fresh pages for
        /// each would cost more than the conversion.
        static PANELS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }

    pub(in super::super) fn forward(w: &PackedLinear, x: &[f32], m: usize, out: OutPtr) {
        let mut tiles = ROWS.take();
        for first in (0..m).step_by(SLAB) {
            let rows = SLAB.min(m - first);
            let out = OutPtr(out.get().wrapping_add(first * w.n));
            slab(w, &x[first * w.k..(first + rows) * w.k], rows, out, &mut tiles);
        }
        ROWS.set(tiles);
    }

    fn slab(w: &PackedLinear, x: &[f32], m: usize, out: OutPtr, tiles: &mut Vec<Line>) {
        let kt = w.blocks();
        let lines = m.div_ceil(16) * 16 * kt;
        if tiles.len() < lines {
            tiles.resize(lines, Line::ZERO);
        }
        let convert = |(t, tiles): (usize, &mut [Line])| {
            let x = &x[t * 16 * w.k..];
            // SAFETY: `forward` is only reached under a detected `Isa::Amx`; `tiles` holds 16 rows of `kt` lines,
            // `x` the rows named.
            unsafe { convert_rows(x, w.k, (m - 16 * t).min(16), kt, tiles.as_mut_ptr().cast()) }
        };
        // Few rows stay on this thread: some 20 µs of work, no less than it takes to wake another.
        let alone = if lines <= 1024 { usize::MAX } else { 2 };
        tiles[..lines].par_chunks_exact_mut((16 * kt).max(1)).enumerate().with_min_len(alone).for_each(convert);
        // The more rows a task has, the fewer times weights are read, and integers widened.
        let most = (NEAR / (64 * kt).max(1)).clamp(128, 512) / 32 * 32;
        let units = w.panels / 2;
        let (row_step, unit_step) = grid(m, units, w.k, most);
        let (row_tasks, unit_tasks) = (m.div_ceil(row_step), units.div_ceil(unit_step));
        let x = &tiles[..lines];
        let run = |t: usize| {
            let (r, u) = (t / unit_tasks * row_step, t % unit_tasks * unit_step);
            PANELS.with_borrow_mut(|b| {
                // SAFETY: as above; the regions of the grid begin at whole tiles, are disjoint and inside x, W
                // and out.
                unsafe { region(w, x, (r, (r + row_step).min(m)), (u, (u + unit_step).min(units)), out, b) }
            });
        };
        match row_tasks * unit_tasks {
            1 => run(0),
            tasks => (0..tasks).into_par_iter().with_max_len(1).for_each(run),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn region(
        w: &PackedLinear,
        x: &[Line],
        rows: (usize, usize),
        units: (usize, usize),
        out: OutPtr,
        b: &mut Vec<Line>,
    ) {
        let (m, kt) = (rows.1 - rows.0, w.blocks());
        let row_tiles = m.div_ceil(16);
        if w.format.is_integer() && b.len() < 2 * kt * 16 {
            b.resize(2 * kt * 16, Line::ZERO);
        }
        let b = b.as_mut_ptr().cast::<u8>();
        // Tiles shorter than 16 rows take less time, which matters when there is only one.
        let first = m.min(16);
        let second = if m > 16 { (m - 16).min(16) } else { 16 };
        // SAFETY: `b` holds the tiles counted above and `x` those of all rows; the rest is passed on.
        unsafe {
            let a = x.as_ptr().cast::<u8>().add(rows.0 / 16 * kt * TILE);
            // Tiles 0, 1 (outputs) and 4 (x) of `first` rows, 2, 3 and 5 of `second`, 6 and 7 weights.
            let (f, s) = (first as u8, second as u8);
            let _tiles = Tiles::with_rows([f, f, s, s, f, s, 16, 16]);
            let mut edge = Edge([0.0; 32 * 32]);
            for u in units.0..units.1 {
                let panels = w.data.ptr().add(2 * u * w.panel_bytes());
                let b0 = if !w.format.is_integer() {
                    panels
                } else {
                    for j in 0..2 {
                        let (panel, b) = (panels.add(j * w.panel_bytes()), b.add(j * kt * TILE));
                        match w.format {
                            WeightFormat::Int4 => widen::<true>(panel, kt, w.unit, b),
                            _ => widen::<false>(panel, kt, w.unit, b),
                        }
                    }
                    b.cast_const()
                };
                let b1 = b0.add(kt * TILE);
                let bias = w.bias.ptr().add(2 * u * PANEL * 4);
                let col = 2 * u * PANEL;
                let cols = (w.n - col).min(32);
                let mut t = 0;
                while t < row_tiles {
                    let two = t + 1 < row_tiles;
                    let have = (m - 16 * t).min(if two { 32 } else { 16 });
                    let tiles_rows = if two { 16 + second } else { first };
                    let c = out.get().add((rows.0 + 16 * t) * w.n + col);
                    // A tile store writes whole tiles: straight into the output where they fit.
                    let direct = cols == 32 && have == tiles_rows;
                    let (dst, ld) = if direct { (c, w.n) } else { (edge.0.as_mut_ptr(), 32) };
                    let a0 = a.add(t * kt * TILE);
                    // A large output is in no cache: ask for the lines of the next square while
                    // this one is computed, or the stores wait for memory.
                    let (next_t, next_u) = if t + 2 < row_tiles { (t + 2, u) } else { (0, u + 1) };
                    if next_u < units.1 {
                        let next = out.get().wrapping_add((rows.0 + 16 * next_t) * w.n + 2 * next_u * PANEL);
                        for i in 0..(m - 16 * next_t).min(32) {
                            prefetch_for_write(next.wrapping_add(i * w.n));
                        }
                    }
                    if two {
                        product_2x2(a0, b0, b1, kt, bias, dst, ld);
                    } else {
                        product_1x2(a0, b0, b1, kt, bias, dst, ld);
                    }
                    if !direct {
                        for i in 0..have {
                            std::ptr::copy_nonoverlapping(edge.0.as_ptr().add(32 * i), c.add(i * w.n), cols);
                        }
                    }
                    t += 2;
                }
            }
        }
    }

    /// Ask for the cache lines of 32 f32 (three, if unaligned) in writable state.
    #[inline(always)]
    unsafe fn prefetch_for_write(p: *const f32) {
        // SAFETY: a prefetch of any address has no effect but on caches (asm because the
        // intrinsic becomes a prefetch for reading without a further target feature).
        unsafe {
            asm!(
                "prefetchw [{p}]",
                "prefetchw [{p} + 64]",
                "prefetchw [{p} + 127]",
                p = in(reg) p,
                options(nostack, preserves_flags, readonly)
            );
        }
    }

    #[repr(C, align(64))]
    struct Edge([f32; 32 * 32]);

    /// Up to 16 rows of x as bf16 in tile order: block of 32 inputs, then row. Rows and inputs beyond the
    /// end are zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn convert_rows(x: &[f32], k: usize, rows: usize, kt: usize, a: *mut u8) {
        for i in 0..16 {
            // SAFETY: `a` holds 16 rows of `kt` lines; reads are masked to the row.
            unsafe {
                let dst = a.add(i * 64);
                let src = if i < rows { Some(x.as_ptr().add(i * k)) } else { None };
                for t in 0..kt {
                    let line = match src {
                        None => _mm512_setzero_si512(),
                        Some(p) => {
                            let left = k - t * BLOCK;
                            let mask = |n: usize| if n >= 16 { 0xffff } else { (1u16 << n) - 1 };
                            let lo = _mm512_maskz_loadu_ps(mask(left), p.add(t * BLOCK));
                            let hi =
                                _mm512_maskz_loadu_ps(mask(left.saturating_sub(16)), p.wrapping_add(t * BLOCK + 16));
                            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(hi, lo))
                        }
                    };
                    _mm512_store_si512(dst.add(t * TILE).cast(), line);
                }
            }
        }
    }

    /// A panel of int8 or int4 blocks as bf16 tiles: minimum + scale · q rounded to bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn widen<const INT4: bool>(panel: *const u8, kt: usize, unit: f32, b: *mut u8) {
        let unit = _mm512_set1_ps(unit);
        // Alternate the 16 low and 16 high bf16: the pair order of a weight tile.
        let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + 16 * (i % 2)) as u16);
        let bytes = if INT4 { WeightFormat::Int4 } else { WeightFormat::Int8 }.block_bytes();
        // SAFETY: `panel` holds `kt` blocks and `b` `kt` tiles.
        unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            for t in 0..kt {
                let block = panel.add(t * bytes);
                let halves = |at: usize| _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(block.add(at).cast())), unit);
                let scales = halves(0);
                let minima = if INT4 { halves(INT4_MINIMA) } else { _mm512_setzero_ps() };
                let q = block.add(if INT4 { INT4_SCALES } else { INT8_SCALES });
                for s in 0..16 {
                    let mut quads = if INT4 {
                        let two = _mm512_loadu_si512(q.add(s / 2 % 4 * 64).cast());
                        let two = if s < 8 { two } else { _mm512_srli_epi16::<4>(two) };
                        _mm512_and_si512(two, _mm512_set1_epi8(15))
                    } else {
                        _mm512_loadu_si512(q.add(s / 2 * 64).cast())
                    };
                    if s % 2 == 0 {
                        quads = _mm512_slli_epi32::<16>(quads);
                    }
                    let first = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(quads));
                    let second = _mm512_srai_epi32::<24>(quads);
                    let first = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), scales, minima);
                    let second = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), scales, minima);
                    let line = _mm512_cvtne2ps_pbh(second, first);
                    let line = _mm512_permutexvar_epi16(order, std::mem::transmute::<__m512bh, __m512i>(line));
                    _mm512_store_si512(b.add(t * TILE + s * 64).cast(), line);
                }
            }
        }
    }

    /// 32 × 32 outputs (or fewer rows, by the tile configuration): c = bias + a · b.
    ///
    /// # Safety
    /// `a0` points at two row tiles of `kt` tiles each, `b0` and `b1` at `kt` tiles, `bias` at 32
    /// f32; `c` is writable for the configured rows of 32 f32 with `ld` f32 from row to row.
    #[inline(always)]
    unsafe fn product_2x2(
        a0: *const u8,
        b0: *const u8,
        b1: *const u8,
        kt: usize,
        bias: *const u8,
        c: *mut f32,
        ld: usize,
    ) {
        // SAFETY: by the contract; tiles 0 to 7 are configured and used by nobody else.
        unsafe {
            asm!(
                // A stride of zero loads the bias into every row.
                "tileloadd tmm0, [{bias} + {zero}*1]",
                "tileloadd tmm1, [{bias} + {zero}*1 + 64]",
                "tileloadd tmm2, [{bias} + {zero}*1]",
                "tileloadd tmm3, [{bias} + {zero}*1 + 64]",
                "test {kt}, {kt}",
                "jz 3f",
                "2:",
                "tileloadd tmm6, [{b0} + {line}*1]",
                "tileloadd tmm4, [{a0} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tilezero tmm4",
                "tileloadd tmm5, [{a1} + {line}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tilezero tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tilezero tmm5",
                "tilezero tmm7",
                "add {a0}, 1024",
                "add {a1}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {kt}",
                "jnz 2b",
                "3:",
                "tilestored [{c} + {ld}*1], tmm0",
                "tilestored [{c} + {ld}*1 + 64], tmm1",
                "tilestored [{c2} + {ld}*1], tmm2",
                "tilestored [{c2} + {ld}*1 + 64], tmm3",
                a0 = inout(reg) a0 => _,
                a1 = inout(reg) a0.add(kt * TILE) => _,
                b0 = inout(reg) b0 => _,
                b1 = inout(reg) b1 => _,
                kt = inout(reg) kt => _,
                bias = in(reg) bias,
                zero = in(reg) 0usize,
                line = in(reg) 64usize,
                c = in(reg) c,
                c2 = in(reg) c.wrapping_add(16 * ld),
                ld = in(reg) ld * 4,
                options(nostack),
            );
        }
    }

    /// 16 × 32 outputs; as [`product_2x2`] with one row tile.
    #[inline(always)]
    unsafe fn product_1x2(
        a0: *const u8,
        b0: *const u8,
        b1: *const u8,
        kt: usize,
        bias: *const u8,
        c: *mut f32,
        ld: usize,
    ) {
        // SAFETY: by the contract; tiles 0, 1, 4 and 6 are configured and used by nobody else.
        unsafe {
            asm!(
                "tileloadd tmm0, [{bias} + {zero}*1]",
                "tileloadd tmm1, [{bias} + {zero}*1 + 64]",
                "test {kt}, {kt}",
                "jz 3f",
                "2:",
                "tileloadd tmm6, [{b0} + {line}*1]",
                "tileloadd tmm4, [{a0} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tilezero tmm6",
                "tileloadd tmm6, [{b1} + {line}*1]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tilezero tmm4",
                "tilezero tmm6",
                "add {a0}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {kt}",
                "jnz 2b",
                "3:",
                "tilestored [{c} + {ld}*1], tmm0",
                "tilestored [{c} + {ld}*1 + 64], tmm1",
                a0 = inout(reg) a0 => _,
                b0 = inout(reg) b0 => _,
                b1 = inout(reg) b1 => _,
                kt = inout(reg) kt => _,
                bias = in(reg) bias,
                zero = in(reg) 0usize,
                line = in(reg) 64usize,
                c = in(reg) c,
                ld = in(reg) ld * 4,
                options(nostack),
            );
        }
    }
}
