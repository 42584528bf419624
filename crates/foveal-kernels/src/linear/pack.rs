//! Weight formats and packing.

use super::{BLOCK, PANEL, PackedLinear};
use crate::error::{KernelError, Result, same};
use crate::view::Element;
use half::{bf16, f16};
use rayon::prelude::*;

/// How a [`PackedLinear`] stores its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// f32, exact.
    F32,
    /// bf16, rounded to nearest even. 16 bits a weight.
    Bf16,
    /// int8, symmetric, with one f16 scale for each 32 inputs of an output feature:
    /// w ≈ scale · q, scale = max|w| / 127. 8.5 bits a weight. Weights that come from a GGUF
    /// Q8_0 tensor are kept without loss.
    Int8,
    /// 4 bits with one f16 scale and one f16 minimum for each 32 inputs of an output feature:
    /// w ≈ minimum + scale · q, q from 0 to 15. 5 bits a weight. Of the range's ends and a scale around
    /// zero, the choice that is nearer to the weights is held, so that weights that come from a
    /// GGUF Q4_1 or Q4_0 tensor are kept without loss.
    Int4,
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WeightFormat::F32 => "f32",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Int8 => "int8",
            WeightFormat::Int4 => "int4",
        })
    }
}

impl WeightFormat {
    /// Integers with a scale for each 32 inputs, not floating point?
    pub const fn is_integer(self) -> bool {
        matches!(self, WeightFormat::Int8 | WeightFormat::Int4)
    }

    /// Bytes of a block of 32 inputs × 16 output features.
    pub(super) const fn block_bytes(self) -> usize {
        match self {
            WeightFormat::F32 => 4 * BLOCK * PANEL,
            WeightFormat::Bf16 => 2 * BLOCK * PANEL,
            WeightFormat::Int8 => INT8_SCALES + BLOCK * PANEL,
            WeightFormat::Int4 => INT4_SCALES + BLOCK * PANEL / 2,
        }
    }
}

/// Bytes of the 16 scales at the head of an int8 block.
pub(super) const INT8_SCALES: usize = 2 * PANEL;
/// Where the 16 minima of an int4 block begin, after its 16 scales.
pub(super) const INT4_MINIMA: usize = 2 * PANEL;
/// Bytes of the scales and minima at the head of an int4 block. Then come four lines of quads of inputs:
/// line s holds quad s in the low halves of its bytes and quad s + 4 in the high ones.
pub(super) const INT4_SCALES: usize = 4 * PANEL;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

impl Line {
    pub(super) const ZERO: Line = Line([0; 64]);
}

/// Zeroed memory in whole cache lines.
pub(super) struct Lines {
    lines: Vec<Line>,
    len: usize,
}

impl Lines {
    pub(super) fn zeroed(bytes: usize) -> Self {
        let lines = vec![Line([0; 64]); bytes.div_ceil(64)];
        #[cfg(target_os = "linux")]
        if bytes >= 4 << 20 {
            // Huge pages: a sweep over the weights of a model touches far more pages than the TLB holds.
            const PAGE: usize = 4096;
            let at = (lines.as_ptr() as usize).next_multiple_of(PAGE);
            let end = lines.as_ptr() as usize + lines.len() * 64;
            // SAFETY: the range lies in memory we own; the advice changes no content.
            unsafe { libc::madvise(at as *mut libc::c_void, (end - at) & !(PAGE - 1), libc::MADV_HUGEPAGE) };
        }
        Self { lines, len: bytes }
    }

    pub(super) fn bytes(&self) -> usize {
        self.lines.len() * 64
    }

    pub(super) fn ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: lines are plain bytes, at least `len` of them.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }

    pub(super) fn as_ref(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(super) fn f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: every bit pattern is an f32 and lines are aligned beyond f32.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len / 4) }
    }
}

impl PackedLinear {
    /// Pack `w` (n, k) row-major as exact f32.
    pub fn pack_f32(w: &[f32], n: usize, k: usize) -> Result<Self> {
        Self::pack(w, n, k, WeightFormat::F32)
    }

    /// Pack `w` (n, k) row-major as bf16.
    pub fn pack_bf16(w: &[f32], n: usize, k: usize) -> Result<Self> {
        Self::pack(w, n, k, WeightFormat::Bf16)
    }

    /// Pack `w` (n, k) row-major as int8 with a scale for each 32 inputs.
    pub fn pack_int8(w: &[f32], n: usize, k: usize) -> Result<Self> {
        Self::pack(w, n, k, WeightFormat::Int8)
    }

    /// Pack `w` (n, k) row-major as 4 bits with a scale and a minimum for each 32 inputs.
    pub fn pack_int4(w: &[f32], n: usize, k: usize) -> Result<Self> {
        Self::pack(w, n, k, WeightFormat::Int4)
    }

    /// Pack `w` (n, k) row-major, f32 or bf16, in any format.
    pub fn pack<T: Element>(w: &[T], n: usize, k: usize, format: WeightFormat) -> Result<Self> {
        let size = n.saturating_mul(k);
        same("linear", "n*k", "weight", w.len(), "shape", size)?;
        let panels = n.div_ceil(2 * PANEL) * 2;
        let mut unit = 1.0;
        if format.is_integer() {
            let top =
                w.par_iter().map(|x| x.to_f32().abs()).reduce(|| 0.0, |a, b| if b > a || b.is_nan() { b } else { a });
            if !top.is_finite() {
                return Err(KernelError::Param {
                    op: "linear",
                    name: "weight",
                    value: top.to_string(),
                    remedy: format!("{format} needs finite weights; repair the checkpoint"),
                });
            }
            unit = scale_unit(if format == WeightFormat::Int8 { top / 127.0 } else { top });
        }
        let mut this = Self {
            format,
            n,
            k,
            panels,
            data: Lines::zeroed(panels * k.div_ceil(BLOCK) * format.block_bytes()),
            unit,
            bias: Lines::zeroed(panels * PANEL * 4),
            has_bias: false,
        };
        let panel_bytes = this.panel_bytes();
        if panel_bytes == 0 {
            return Ok(this);
        }
        this.data.as_mut().par_chunks_exact_mut(panel_bytes).enumerate().for_each(|(p, panel)| {
            for (b, block) in panel.chunks_exact_mut(format.block_bytes()).enumerate() {
                let width = BLOCK.min(k - b * BLOCK);
                for lane in 0..PANEL.min(n.saturating_sub(p * PANEL)) {
                    let at = (p * PANEL + lane) * k + b * BLOCK;
                    pack_row(format, &w[at..at + width], lane, unit, block);
                }
            }
        });
        Ok(this)
    }

    /// Weights of output feature `i` as the kernels see them, into `out` (k). For a tied
    /// embedding this is the token's row.
    pub fn row(&self, i: usize, out: &mut [f32]) -> Result<()> {
        same("linear row", "k", "out", out.len(), "weight", self.k)?;
        if i >= self.n {
            return Err(KernelError::Param {
                op: "linear row",
                name: "row",
                value: i.to_string(),
                remedy: format!("rows are below {}", self.n),
            });
        }
        let (bytes, lane) = (self.format.block_bytes(), i % PANEL);
        let panel = &self.data.as_ref()[i / PANEL * self.panel_bytes()..];
        for (out, block) in out.chunks_mut(BLOCK).zip(panel.chunks_exact(bytes)) {
            let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32() * self.unit;
            let out = out.iter_mut().enumerate();
            match self.format {
                WeightFormat::F32 => out.for_each(|(c, o)| {
                    let at = 4 * (c * PANEL + lane);
                    *o = f32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
                }),
                WeightFormat::Bf16 => out.for_each(|(c, o)| {
                    let at = 4 * (c / 2 * PANEL + lane) + 2 * (c % 2);
                    *o = bf16::from_le_bytes([block[at], block[at + 1]]).to_f32();
                }),
                WeightFormat::Int8 => {
                    let scale = half(2 * lane);
                    out.for_each(|(c, o)| {
                        *o = f32::from(block[INT8_SCALES + 4 * (c / 4 * PANEL + lane) + c % 4] as i8) * scale;
                    });
                }
                WeightFormat::Int4 => {
                    let (scale, minimum) = (half(2 * lane), half(INT4_MINIMA + 2 * lane));
                    out.for_each(|(c, o)| {
                        let byte = block[INT4_SCALES + 4 * (c / 4 % 4 * PANEL + lane) + c % 4];
                        *o = f32::from(byte >> (c / 16 * 4) & 15).mul_add(scale, minimum);
                    });
                }
            }
        }
        Ok(())
    }
}

/// Write up to 32 weights of one output feature into its block.
fn pack_row<T: Element>(format: WeightFormat, w: &[T], lane: usize, unit: f32, block: &mut [u8]) {
    match format {
        WeightFormat::F32 => {
            for (c, w) in w.iter().enumerate() {
                let at = 4 * (c * PANEL + lane);
                block[at..at + 4].copy_from_slice(&w.to_f32().to_le_bytes());
            }
        }
        WeightFormat::Bf16 => {
            for (c, w) in w.iter().enumerate() {
                let at = 4 * (c / 2 * PANEL + lane) + 2 * (c % 2);
                block[at..at + 2].copy_from_slice(&bf16::from_f32(w.to_f32()).to_le_bytes());
            }
        }
        WeightFormat::Int8 => {
            let top = w.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
            let scale = f16::from_f32(top / 127.0 / unit);
            block[2 * lane..2 * lane + 2].copy_from_slice(&scale.to_le_bytes());
            let scale = scale.to_f32() * unit;
            let inv = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            for (c, w) in w.iter().enumerate() {
                let q = (w.to_f32() * inv).round_ties_even().clamp(-127.0, 127.0);
                block[INT8_SCALES + 4 * (c / 4 * PANEL + lane) + c % 4] = q as i8 as u8;
            }
        }
        WeightFormat::Int4 => {
            let mut values = [0f32; BLOCK];
            values.iter_mut().zip(w).for_each(|(v, w)| *v = w.to_f32() / unit);
            let fit = Int4::fit(&values[..w.len()]);
            block[2 * lane..2 * lane + 2].copy_from_slice(&f16::from_f32(fit.scale).to_le_bytes());
            let at = INT4_MINIMA + 2 * lane;
            block[at..at + 2].copy_from_slice(&f16::from_f32(fit.minimum).to_le_bytes());
            for (c, &v) in values[..w.len()].iter().enumerate() {
                let q = fit.code(v) as u8;
                block[INT4_SCALES + 4 * (c / 4 % 4 * PANEL + lane) + c % 4] |= q << (c / 16 * 4);
            }
        }
    }
}

/// Scale and minimum of a group of int4 weights, as f16 holds them.
#[derive(Clone, Copy)]
struct Int4 {
    scale: f32,
    minimum: f32,
    /// 1 / scale, or 0: division is what would make packing slow.
    inverse: f32,
}

impl Int4 {
    fn new(scale: f32, minimum: f32) -> Self {
        let (scale, minimum) = (f16::from_f32(scale).to_f32(), f16::from_f32(minimum).to_f32());
        Self { scale, minimum, inverse: if scale == 0.0 { 0.0 } else { 1.0 / scale } }
    }

    /// For `w`: from end to end of their range, as Q4_1 has them, or 8 steps below zero and 7 above (the
    /// largest magnitude being 8 steps), as Q4_0; whichever is nearer to them.
    fn fit(w: &[f32]) -> Self {
        let (low, high) = w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
        let largest = if -low > high { low } else { high };
        let range = Self::new((high - low) / 15.0, low);
        let step = f16::from_f32(largest / -8.0).to_f32();
        let around = Self::new(step, step * -8.0);
        let error = |f: &Self| -> f32 { w.iter().map(|&x| (f.value(f.code(x)) - x).powi(2)).sum() };
        // An end that f16 cannot hold makes no candidate.
        if !around.minimum.is_finite() || error(&range) <= error(&around) { range } else { around }
    }

    fn code(&self, x: f32) -> f32 {
        ((x - self.minimum) * self.inverse).round_ties_even().clamp(0.0, 15.0)
    }

    fn value(&self, code: f32) -> f32 {
        code * self.scale + self.minimum
    }
}

/// 1 where the largest scale is at home in f16, else the power of two that brings it near 1.
fn scale_unit(largest: f32) -> f32 {
    if largest == 0.0 || (2f32.powi(-8)..2f32.powi(15)).contains(&largest) || (1e-4..1e-2).contains(&largest) {
        return 1.0;
    }
    // Powers of two beyond f32's normal range cannot occur: 2^-126 is the least.
    2f32.powi(largest.log2().floor().clamp(-120.0, 120.0) as i32)
}
