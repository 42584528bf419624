//! How rows of keys and values are stored.

use crate::error::{KernelError, Result};
use half::{bf16, f16};

/// Channels that share a scale and a minimum in [`Codec::Int4`].
pub const INT4_GROUP: usize = 32;
/// Bytes of such a group: scale, minimum, and two channels a byte.
pub const INT4_GROUP_BYTES: usize = 4 + INT4_GROUP / 2;

/// Rows of one K/V head in one codec. `width` elements a row, `stride` elements from row to row.
#[derive(Clone, Copy, Debug)]
pub enum Codec<'a> {
    /// f32 rows.
    F32 {
        /// Elements.
        data: &'a [f32],
        /// Elements from row to row.
        stride: usize,
    },
    /// bf16 rows.
    Bf16 {
        /// Elements.
        data: &'a [bf16],
        /// Elements from row to row.
        stride: usize,
    },
    /// int8 rows with one f32 scale a row: x ≈ scale · q.
    Int8 {
        /// Elements.
        data: &'a [i8],
        /// Elements from row to row.
        stride: usize,
        /// One scale a row.
        scales: &'a [f32],
    },
    /// 4-bit rows in groups of 32 channels: x ≈ minimum + scale · q, q from 0 to 15.
    ///
    /// A group is 20 bytes: the scale and the minimum in f16 (little-endian), then 16 bytes of which byte i
    /// holds channel i in its low half and channel 16 + i in its high one. A row is its groups one after
    /// another and needs nothing beside it, so that pages, key lists and stores move it as one piece and one
    /// pointer reaches all of it; 16 bytes widen to 16 channels in order, whose values are looked up in a
    /// register that holds all 16 of the group. f16 and not bf16: scale · q is then exact in f32, and
    /// a minimum far from zero (keys often have channels with a large mean) keeps 11 bits.
    /// A width that is no multiple of 32 leaves the end of the last group unused. [`pack_int4`] makes such rows.
    Int4 {
        /// Groups.
        data: &'a [u8],
        /// Bytes from row to row.
        stride: usize,
    },
}

/// What [`Codec`] is, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    Bf16,
    Int8,
    Int4,
}

impl Kind {
    /// Bytes of a row without what lies beside it.
    pub(super) fn bytes(self, width: usize) -> usize {
        match self {
            Kind::F32 => 4 * width,
            Kind::Bf16 => 2 * width,
            Kind::Int8 => width,
            Kind::Int4 => int4_row_bytes(width),
        }
    }
}

/// Where rows lie: the first, the bytes from row to row, and one scale a row (int8).
#[derive(Clone, Copy)]
pub(super) struct Raw {
    pub(super) kind: Kind,
    pub(super) base: *const u8,
    pub(super) step: usize,
    pub(super) scales: *const f32,
}

impl Codec<'_> {
    /// Bytes of one stored row of `width` elements, its scales among them.
    pub fn row_bytes(&self, width: usize) -> usize {
        let kind = self.raw().kind;
        kind.bytes(width) + if kind == Kind::Int8 { 4 } else { 0 }
    }

    pub(super) fn raw(&self) -> Raw {
        let none = std::ptr::null();
        match *self {
            Codec::F32 { data, stride } => {
                Raw { kind: Kind::F32, base: data.as_ptr().cast(), step: 4 * stride, scales: none }
            }
            Codec::Bf16 { data, stride } => {
                Raw { kind: Kind::Bf16, base: data.as_ptr().cast(), step: 2 * stride, scales: none }
            }
            Codec::Int8 { data, stride, scales } => {
                Raw { kind: Kind::Int8, base: data.as_ptr().cast(), step: stride, scales: scales.as_ptr() }
            }
            Codec::Int4 { data, stride } => Raw { kind: Kind::Int4, base: data.as_ptr(), step: stride, scales: none },
        }
    }

    /// Whether these are the very rows of `other`, or begin as they do.
    pub(super) fn is(&self, other: &Self) -> bool {
        let (a, b) = (self.raw(), other.raw());
        a.kind == b.kind && a.base == b.base && a.step == b.step && a.scales == b.scales
    }

    /// Whether the memory holds `rows` rows of `width` elements.
    pub(super) fn holds(&self, rows: usize, width: usize) -> bool {
        let kind = self.raw().kind;
        let (size, stride) = match self {
            Codec::F32 { data, stride } => (data.len(), *stride),
            Codec::Bf16 { data, stride } => (data.len(), *stride),
            Codec::Int8 { data, stride, scales } => (if scales.len() >= rows { data.len() } else { 0 }, *stride),
            Codec::Int4 { data, stride } => (data.len(), *stride),
        };
        let width = if kind == Kind::Int4 { int4_row_bytes(width) } else { width };
        rows == 0 || (rows - 1).checked_mul(stride).and_then(|x| x.checked_add(width)).is_some_and(|need| need <= size)
    }

    /// Decode row `j` into `out`.
    #[inline]
    pub fn row(&self, j: usize, out: &mut [f32]) {
        let w = out.len();
        match self {
            Codec::F32 { data, stride } => out.copy_from_slice(&data[j * stride..j * stride + w]),
            Codec::Bf16 { data, stride } => {
                for (o, x) in out.iter_mut().zip(&data[j * stride..j * stride + w]) {
                    *o = x.to_f32();
                }
            }
            Codec::Int8 { data, stride, scales } => {
                for (o, x) in out.iter_mut().zip(&data[j * stride..j * stride + w]) {
                    *o = f32::from(*x) * scales[j];
                }
            }
            Codec::Int4 { data, stride } => {
                let row = &data[j * stride..j * stride + int4_row_bytes(w)];
                for (o, group) in out.chunks_mut(INT4_GROUP).zip(row.chunks_exact(INT4_GROUP_BYTES)) {
                    let scale = f16::from_le_bytes([group[0], group[1]]).to_f32();
                    let min = f16::from_le_bytes([group[2], group[3]]).to_f32();
                    for (c, o) in o.iter_mut().enumerate() {
                        let q = group[4 + c % 16] >> (c / 16 * 4) & 15;
                        *o = min + scale * f32::from(q);
                    }
                }
            }
        }
    }
}

/// Bytes of a row of `width` elements in [`Codec::Int4`].
pub fn int4_row_bytes(width: usize) -> usize {
    width.div_ceil(INT4_GROUP) * INT4_GROUP_BYTES
}

/// Append `rows` (whole rows of `width` elements) to `out` as [`Codec::Int4`] stores them.
///
/// Each group spans its own range: the minimum is rounded down and the scale up to f16, then each element to
/// the nearest step, so that the error is at most half a step of about a fifteenth of the range. Magnitudes
/// beyond 65,504 are clamped to it; a group with a NaN decodes to NaN.
///
/// Errors: `rows` is no multiple of `width`.
pub fn pack_int4(rows: &[f32], width: usize, out: &mut Vec<u8>) -> Result<()> {
    if width == 0 || !rows.len().is_multiple_of(width) {
        return Err(KernelError::Param {
            op: "pack_int4",
            name: "elements",
            value: rows.len().to_string(),
            remedy: format!("give whole rows of {width} elements, at least one a row"),
        });
    }
    out.reserve(rows.len() / width * int4_row_bytes(width));
    for group in rows.chunks_exact(width).flat_map(|row| row.chunks(INT4_GROUP)) {
        const MOST: f32 = 65504.0;
        let (mut low, mut high, mut nan) = (MOST, -MOST, false);
        for &x in group {
            nan |= x.is_nan();
            (low, high) = (low.min(x), high.max(x));
        }
        let (low, high) = (low.clamp(-MOST, MOST), high.clamp(-MOST, MOST));
        let min = toward(low, false);
        // Half of the largest step is representable, twice it would not be: a range of at most 131,008.
        let scale = toward((high - min.to_f32()) / 15.0, true);
        let scale = if nan { f16::NAN } else { scale };
        let (m, s) = (min.to_f32(), scale.to_f32());
        let inv = if s > 0.0 { 1.0 / s } else { 0.0 };
        out.extend(scale.to_le_bytes());
        out.extend(min.to_le_bytes());
        let q = |c: usize| group.get(c).map_or(0, |x| ((x - m) * inv).round_ties_even().clamp(0.0, 15.0) as u8);
        out.extend((0..16).map(|c| q(c) | q(16 + c) << 4));
    }
    Ok(())
}

/// The f16 nearest to `x` on one side of it: at least `x` (`up`), or at most. |x| ≤ 65,504.
fn toward(x: f32, up: bool) -> f16 {
    let near = f16::from_f32(x);
    let y = near.to_f32();
    let (short, away) = if up { (y < x, x > 0.0) } else { (y > x, x < 0.0) };
    if !short {
        return near;
    }
    // One step: away from zero adds to the bits of the magnitude, else takes from them. A magnitude of
    // zero is short only of what lies away from it, and has to take that side's sign.
    let bits = near.to_bits();
    match (away, bits & 0x7fff) {
        (true, 0) => f16::from_bits(if up { 1 } else { 0x8001 }),
        (true, _) => f16::from_bits(bits + 1),
        (false, _) => f16::from_bits(bits - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_on_either_side() {
        for x in [0.0, 1.0, -1.0, 0.1, -0.1, 1e-9, -1e-9, 65503.9, -65503.9, 3.3333, -4097.3, 6e-8, -6e-8] {
            let (a, b) = (toward(x, false).to_f32(), toward(x, true).to_f32());
            assert!(a <= x && x <= b, "{a} {x} {b}");
            assert!(b - a <= x.abs() / 1024.0 + 6e-8, "{a} {x} {b}");
        }
    }
}
