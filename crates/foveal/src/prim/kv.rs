//! Growable rows in one codec: what every cache policy stores its keys and values in.

use foveal_kernels::decode::{Codec, int4_row_bytes, pack_int4};
use half::bf16;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Storage type of a K/V store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 4 bytes an element.
    F32,
    /// 2 bytes an element.
    #[default]
    Bf16,
    /// 1 byte an element and a f32 scale a row.
    Int8,
    /// Half a byte an element, and a scale and a minimum in f16 for each 32 elements of a row, the last of which may
    /// be fewer: 5 bits an element where the width is a multiple of 32.
    Int4,
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
            KvDtype::Int4 => "int4",
        })
    }
}

impl FromStr for KvDtype {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(KvDtype::F32),
            "bf16" => Ok(KvDtype::Bf16),
            "int8" => Ok(KvDtype::Int8),
            "int4" => Ok(KvDtype::Int4),
            _ => Err(format!("KV dtype {s:?}: use f32, bf16, int8 or int4")),
        }
    }
}

impl KvDtype {
    /// Bytes of `rows` rows of `width` elements.
    pub fn bytes(self, rows: usize, width: usize) -> usize {
        match self {
            KvDtype::F32 => rows * width * 4,
            KvDtype::Bf16 => rows * width * 2,
            KvDtype::Int8 => rows * (width + 4),
            KvDtype::Int4 => rows * int4_row_bytes(width),
        }
    }
}

/// Rows of `width` elements in one codec.
#[derive(Debug)]
pub struct RowStore {
    width: usize,
    len: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Int8(Vec<i8>, Vec<f32>),
    Int4(Vec<u8>),
}

/// Rows for which a copy has room before it must move: a forked session is stepped next.
const SLACK: usize = 64;

/// Room for `n` more elements, `width` a row: an eighth at a time, where doubling would take twice
/// the store's memory for one token.
fn reserve<T>(d: &mut Vec<T>, n: usize, width: usize) {
    if d.capacity() - d.len() < n {
        d.reserve_exact(n.max(d.len() / 8).max(SLACK * width));
    }
}

impl Clone for RowStore {
    fn clone(&self) -> Self {
        fn copy<T: Copy>(d: &[T], slack: usize) -> Vec<T> {
            let mut out = Vec::with_capacity(d.len() + slack);
            out.extend_from_slice(d);
            out
        }
        let slack = SLACK * self.width;
        let data = match &self.data {
            Data::F32(d) => Data::F32(copy(d, slack)),
            Data::Bf16(d) => Data::Bf16(copy(d, slack)),
            Data::Int8(d, s) => Data::Int8(copy(d, slack), copy(s, SLACK)),
            Data::Int4(d) => Data::Int4(copy(d, SLACK * int4_row_bytes(self.width))),
        };
        Self { width: self.width, len: self.len, data }
    }
}

impl RowStore {
    /// An empty store.
    pub fn new(dtype: KvDtype, width: usize) -> Self {
        let data = match dtype {
            KvDtype::F32 => Data::F32(Vec::new()),
            KvDtype::Bf16 => Data::Bf16(Vec::new()),
            KvDtype::Int8 => Data::Int8(Vec::new(), Vec::new()),
            KvDtype::Int4 => Data::Int4(Vec::new()),
        };
        Self { width, len: 0, data }
    }

    /// Elements a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Append rows given as f32, `rows.len()` a multiple of the width.
    pub fn push(&mut self, rows: &[f32]) {
        debug_assert!(self.width > 0 && rows.len().is_multiple_of(self.width));
        let (new, w) = (rows.len() / self.width.max(1), self.width);
        self.len += new;
        match &mut self.data {
            Data::F32(d) => {
                reserve(d, rows.len(), w);
                d.extend_from_slice(rows);
            }
            Data::Bf16(d) => {
                reserve(d, rows.len(), w);
                d.extend(rows.iter().map(|&x| bf16::from_f32(x)));
            }
            Data::Int8(d, s) => {
                reserve(d, rows.len(), w);
                reserve(s, new, 1);
                for row in rows.chunks_exact(self.width) {
                    let top = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                    let scale = top / 127.0;
                    let inv = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    d.extend(row.iter().map(|x| (x * inv).round_ties_even() as i8));
                    s.push(scale);
                }
            }
            Data::Int4(d) => {
                let bytes = int4_row_bytes(w);
                reserve(d, new * bytes, bytes);
                let packed = pack_int4(&rows[..new * w], w.max(1), d);
                debug_assert!(packed.is_ok(), "whole rows were cut off");
            }
        }
    }

    /// Drop the first `n` rows.
    pub fn drop_front(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        match &mut self.data {
            Data::F32(d) => drop(d.drain(..n * self.width)),
            Data::Bf16(d) => drop(d.drain(..n * self.width)),
            Data::Int8(d, s) => {
                d.drain(..n * self.width);
                s.drain(..n);
            }
            Data::Int4(d) => drop(d.drain(..n * int4_row_bytes(self.width))),
        }
    }

    /// Keep only the rows whose number `keep` names (ascending).
    pub fn retain(&mut self, keep: &[u32]) {
        let w = self.width;
        fn pick<T: Copy>(d: &mut Vec<T>, keep: &[u32], w: usize) {
            for (to, &from) in keep.iter().enumerate() {
                d.copy_within(from as usize * w..(from as usize + 1) * w, to * w);
            }
            d.truncate(keep.len() * w);
            d.shrink_to_fit();
        }
        match &mut self.data {
            Data::F32(d) => pick(d, keep, w),
            Data::Bf16(d) => pick(d, keep, w),
            Data::Int8(d, s) => {
                pick(d, keep, w);
                pick(s, keep, 1);
            }
            Data::Int4(d) => pick(d, keep, int4_row_bytes(w)),
        }
        self.len = keep.len();
    }

    /// The rows as the decode kernel reads them.
    pub fn codec(&self) -> Codec<'_> {
        self.codec_from(0)
    }

    /// The rows from row `first` on, as the decode kernel reads them.
    pub fn codec_from(&self, first: usize) -> Codec<'_> {
        let (first, stride) = (first.min(self.len), self.width);
        let at = first * stride;
        match &self.data {
            Data::F32(data) => Codec::F32 { data: &data[at..], stride },
            Data::Bf16(data) => Codec::Bf16 { data: &data[at..], stride },
            Data::Int8(data, scales) => Codec::Int8 { data: &data[at..], stride, scales: &scales[first..] },
            Data::Int4(data) => {
                let stride = int4_row_bytes(self.width);
                Codec::Int4 { data: &data[first * stride..], stride }
            }
        }
    }

    /// Rows `first..first + n` as f32, appended to `out`.
    pub fn extend_f32(&self, first: usize, n: usize, out: &mut Vec<f32>) {
        let span = first * self.width..(first + n) * self.width;
        match &self.data {
            Data::F32(d) => out.extend_from_slice(&d[span]),
            Data::Bf16(d) => out.extend(d[span].iter().map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))),
            Data::Int8(d, s) => {
                for (row, scale) in d[span].chunks_exact(self.width.max(1)).zip(&s[first..first + n]) {
                    out.extend(row.iter().map(|&x| f32::from(x) * scale));
                }
            }
            Data::Int4(_) => {
                let at = out.len();
                out.resize(at + n * self.width, 0.0);
                let codec = self.codec();
                for (i, row) in out[at..].chunks_exact_mut(self.width.max(1)).enumerate() {
                    codec.row(first + i, row);
                }
            }
        }
    }

    /// Decode row `i` into `out` (`width` elements).
    pub fn read(&self, i: usize, out: &mut [f32]) {
        self.codec().row(i, out);
    }

    /// All rows as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.len * self.width);
        self.extend_f32(0, self.len, &mut out);
        out
    }

    /// Bytes of the rows held.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(d) => size_of_val(d.as_slice()),
            Data::Bf16(d) => size_of_val(d.as_slice()),
            Data::Int8(d, s) => size_of_val(d.as_slice()) + size_of_val(s.as_slice()),
            Data::Int4(d) => d.len(),
        }
    }
}
