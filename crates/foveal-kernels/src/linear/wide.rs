//! Vector kernels: weights widened to f32 in registers. One kernel for one row (decode,
//! bandwidth bound) up to blocks of 12 rows (prefill without tiles).

use super::pack::{INT4_MINIMA, INT4_SCALES, INT8_SCALES};
use super::{OutPtr, PANEL, PackedLinear, WeightFormat, grid};
use crate::dispatch::with_isa;
use crate::isa::Isa;
use crate::lanes::Lanes;
use rayon::prelude::*;

/// Rows of x that a task keeps in its second-level cache.
const ROWS: usize = 96;

/// One rectangle of the output.
#[derive(Clone, Copy)]
struct Region {
    /// Row-major x, whole blocks of 32 wide.
    x: *const f32,
    blocks: usize,
    rows: (usize, usize),
    data: *const u8,
    panel_bytes: usize,
    /// Even bounds.
    panels: (usize, usize),
    bias: *const f32,
    unit: f32,
    out: OutPtr,
    n: usize,
}

// SAFETY: pointers into slices that outlive the call; only `out` is written, disjointly.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn part(&self, rows: (usize, usize), panels: (usize, usize)) -> Self {
        Self { rows, panels, ..*self }
    }
}

pub(super) fn forward(w: &PackedLinear, x: &[f32], m: usize, out: OutPtr, isa: Isa) {
    let whole = Region {
        x: x.as_ptr(),
        blocks: w.blocks(),
        rows: (0, m),
        data: w.data.ptr(),
        panel_bytes: w.panel_bytes(),
        panels: (0, w.panels),
        bias: w.bias.ptr().cast(),
        unit: w.unit,
        out,
        n: w.n,
    };
    let units = w.panels / 2;
    let (row_step, unit_step) = grid(m, units, w.k, ROWS);
    let (row_tasks, unit_tasks) = (m.div_ceil(row_step), units.div_ceil(unit_step));
    let run = |t: usize| {
        let (r, u) = (t / unit_tasks * row_step, t % unit_tasks * unit_step);
        let region = whole.part((r, (r + row_step).min(m)), (2 * u, 2 * (u + unit_step).min(units)));
        // SAFETY: the regions of the grid are disjoint and inside x, W and out.
        unsafe {
            match w.format {
                WeightFormat::F32 => run_f32(isa, region),
                WeightFormat::Bf16 => run_bf16(isa, region),
                WeightFormat::Int8 => run_int8(isa, region),
                WeightFormat::Int4 => run_int4(isa, region),
            }
        }
    };
    match row_tasks * unit_tasks {
        1 => run(0),
        tasks => (0..tasks).into_par_iter().with_max_len(1).for_each(run),
    }
}

/// How a block becomes f32 vectors of 16 output features.
trait Format {
    const BLOCK_BYTES: usize;
    /// Scales and minima of a block.
    unsafe fn scales<L: Lanes>(block: *const u8) -> (L, L);
    /// Vectors of inputs 2s and 2s + 1.
    unsafe fn pair<L: Lanes>(block: *const u8, s: usize, scales: (L, L)) -> (L, L);
}

struct F32;
struct Bf16;
struct Int8;
struct Int4;

impl Format for F32 {
    const BLOCK_BYTES: usize = WeightFormat::F32.block_bytes();
    #[inline(always)]
    unsafe fn scales<L: Lanes>(_: *const u8) -> (L, L) {
        // SAFETY: passed on.
        unsafe { (L::splat(1.0), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn pair<L: Lanes>(block: *const u8, s: usize, _: (L, L)) -> (L, L) {
        // SAFETY: s < 16, inside the block.
        unsafe {
            let p = block.cast::<f32>().add(2 * s * PANEL);
            (L::load(p), L::load(p.add(PANEL)))
        }
    }
}

impl Format for Bf16 {
    const BLOCK_BYTES: usize = WeightFormat::Bf16.block_bytes();
    #[inline(always)]
    unsafe fn scales<L: Lanes>(_: *const u8) -> (L, L) {
        // SAFETY: passed on.
        unsafe { (L::splat(1.0), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn pair<L: Lanes>(block: *const u8, s: usize, _: (L, L)) -> (L, L) {
        // SAFETY: s < 16, inside the block.
        unsafe { L::load_bf16_pairs(block.cast::<u16>().add(2 * s * PANEL)) }
    }
}

impl Format for Int8 {
    const BLOCK_BYTES: usize = WeightFormat::Int8.block_bytes();
    #[inline(always)]
    unsafe fn scales<L: Lanes>(block: *const u8) -> (L, L) {
        // SAFETY: the block begins with 16 scales.
        unsafe { (L::load_f16(block.cast()), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn pair<L: Lanes>(block: *const u8, s: usize, (scales, _): (L, L)) -> (L, L) {
        // SAFETY: s < 16, inside the block.
        unsafe {
            let quads = block.add(INT8_SCALES + s / 2 * 4 * PANEL).cast::<i8>();
            let (a, b) = L::load_i8_quads(quads, s % 2 == 1);
            (a.mul(scales), b.mul(scales))
        }
    }
}

impl Format for Int4 {
    const BLOCK_BYTES: usize = WeightFormat::Int4.block_bytes();
    #[inline(always)]
    unsafe fn scales<L: Lanes>(block: *const u8) -> (L, L) {
        // SAFETY: the block begins with 16 scales and 16 minima.
        unsafe { (L::load_f16(block.cast()), L::load_f16(block.add(INT4_MINIMA).cast())) }
    }
    #[inline(always)]
    unsafe fn pair<L: Lanes>(block: *const u8, s: usize, (scales, minima): (L, L)) -> (L, L) {
        // SAFETY: s < 16, inside the block: four lines of quads in low halves, then the same in high ones.
        unsafe {
            let quads = block.add(INT4_SCALES + s / 2 % 4 * 4 * PANEL);
            let (a, b) = L::load_u4_quads(quads, s >= 8, s % 2 == 1);
            (a.mul_add(scales, minima), b.mul_add(scales, minima))
        }
    }
}

/// `MR` rows × `NR` panels. `EO` splits the sum over inputs into that many chains, which hides
/// the latency of the multiply-add where there are few rows.
#[inline(always)]
unsafe fn tile<L: Lanes, F: Format, const MR: usize, const NR: usize, const EO: usize>(
    t: &Region,
    row: usize,
    panel: usize,
) {
    // SAFETY: `row + MR` and `panel + NR` are inside the region; each x row and panel holds `blocks` blocks.
    unsafe {
        let ldx = t.blocks * super::BLOCK;
        // Loops rather than closures: a closure is compiled without the caller's target feature
        // unless it happens to be inlined in time.
        let zero = L::splat(0.0);
        let mut acc = [[[zero; NR]; MR]; EO];
        let mut w = [t.data; NR];
        for j in 0..NR {
            w[j] = t.data.add((panel + j) * t.panel_bytes);
        }
        let mut x = [t.x; MR];
        for i in 0..MR {
            x[i] = t.x.add((row + i) * ldx);
        }
        for _ in 0..t.blocks {
            let mut scales = [(zero, zero); NR];
            for j in 0..NR {
                scales[j] = F::scales(w[j]);
            }
            for s in 0..16 / EO {
                for e in 0..EO {
                    let at = s * EO + e;
                    let mut pair = [(zero, zero); NR];
                    for j in 0..NR {
                        pair[j] = F::pair(w[j], at, scales[j]);
                    }
                    for i in 0..MR {
                        let b = L::splat(*x[i].add(2 * at));
                        for j in 0..NR {
                            acc[e][i][j] = b.mul_add(pair[j].0, acc[e][i][j]);
                        }
                    }
                    for i in 0..MR {
                        let b = L::splat(*x[i].add(2 * at + 1));
                        for j in 0..NR {
                            acc[e][i][j] = b.mul_add(pair[j].1, acc[e][i][j]);
                        }
                    }
                }
            }
            for w in &mut w {
                *w = w.add(F::BLOCK_BYTES);
            }
            for x in &mut x {
                *x = x.add(super::BLOCK);
            }
        }
        let unit = L::splat(t.unit);
        for i in 0..MR {
            for j in 0..NR {
                let mut sum = acc[0][i][j];
                for e in 1..EO {
                    sum = sum.add(acc[e][i][j]);
                }
                let col = (panel + j) * PANEL;
                let y = sum.mul_add(unit, L::load(t.bias.add(col)));
                let out = t.out.get().add((row + i) * t.n + col);
                if col + PANEL <= t.n {
                    y.store(out);
                } else if col < t.n {
                    let mut edge = [0f32; PANEL];
                    y.store(edge.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(edge.as_ptr(), out, t.n - col);
                }
            }
        }
    }
}

/// All rows of a region, panel by panel so that a panel is read from memory once.
#[inline(always)]
unsafe fn region<L: Lanes, F: Format>(t: Region) {
    // SAFETY: passed on; the blocks of rows and panels stay inside the region.
    unsafe {
        let mut p = t.panels.0;
        while p < t.panels.1 {
            let (mut r, end) = t.rows;
            if L::ROWS == 12 {
                while r + 12 <= end {
                    tile::<L, F, 12, 2, 1>(&t, r, p);
                    r += 12;
                }
                while r + 4 <= end {
                    tile::<L, F, 4, 2, 1>(&t, r, p);
                    r += 4;
                }
                while r + 2 <= end {
                    tile::<L, F, 2, 2, 2>(&t, r, p);
                    r += 2;
                }
                if r < end {
                    tile::<L, F, 1, 2, 2>(&t, r, p);
                }
                p += 2;
            } else {
                while r + 4 <= end {
                    tile::<L, F, 4, 1, 1>(&t, r, p);
                    r += 4;
                }
                while r < end {
                    tile::<L, F, 1, 1, 2>(&t, r, p);
                    r += 1;
                }
                p += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn body_f32<L: Lanes>(t: Region) {
    // SAFETY: passed on.
    unsafe { region::<L, F32>(t) }
}
#[inline(always)]
unsafe fn body_bf16<L: Lanes>(t: Region) {
    // SAFETY: passed on.
    unsafe { region::<L, Bf16>(t) }
}
#[inline(always)]
unsafe fn body_int8<L: Lanes>(t: Region) {
    // SAFETY: passed on.
    unsafe { region::<L, Int8>(t) }
}
#[inline(always)]
unsafe fn body_int4<L: Lanes>(t: Region) {
    // SAFETY: passed on.
    unsafe { region::<L, Int4>(t) }
}
with_isa!(lanes, unsafe fn run_f32 => body_f32(t: Region));
with_isa!(lanes, unsafe fn run_bf16 => body_bf16(t: Region));
with_isa!(lanes, unsafe fn run_int8 => body_int8(t: Region));
with_isa!(lanes, unsafe fn run_int4 => body_int4(t: Region));
