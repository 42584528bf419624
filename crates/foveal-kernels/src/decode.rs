//! Few queries over a long, possibly compressed, key/value store.
//!
//! Each K/V head is a list of segments (pages, or an old part and a recent part). A segment
//! stores rows in one codec and, for keys, possibly only some channels. Work is split over
//! (K/V head, span of keys) and the parts merged by log-sum-exp; all query heads of a group
//! share each row read.

use crate::error::{KernelError, Result};
use crate::isa::Isa;
use crate::merge::merge_row;
use crate::table::KeyLists;
use crate::work::Work;
use half::bf16;

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
}

impl Codec<'_> {
    /// Bytes of one stored row of `width` elements.
    pub fn row_bytes(&self, width: usize) -> usize {
        match self {
            Codec::F32 { .. } => 4 * width,
            Codec::Bf16 { .. } => 2 * width,
            Codec::Int8 { .. } => width + 4,
        }
    }

    /// Rows that the memory can hold at this width.
    fn capacity(&self, width: usize) -> usize {
        let rows = |len: usize, stride: usize| match (len >= width, stride) {
            (false, _) => 0,
            (true, 0) => 1,
            (true, s) => (len - width) / s + 1,
        };
        match self {
            Codec::F32 { data, stride } => rows(data.len(), *stride),
            Codec::Bf16 { data, stride } => rows(data.len(), *stride),
            Codec::Int8 { data, stride, scales } => rows(data.len(), *stride).min(scales.len()),
        }
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
        }
    }
}

/// Consecutive tokens of one K/V head.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Keys, `channels.len()` (or head_dim) wide.
    pub k: Codec<'a>,
    /// Values, `v_dim` wide.
    pub v: Codec<'a>,
    /// Tokens.
    pub len: usize,
    /// The head channels that the keys hold, ascending; `None` = all.
    pub channels: Option<&'a [u32]>,
}

/// One decode call. See [`Decode::run`].
#[derive(Clone, Copy, Debug)]
pub struct Decode {
    /// Factor on q·k.
    pub scale: f32,
    /// `cap * tanh(s / cap)` on the scaled score.
    pub softcap: Option<f32>,
    /// Instruction set.
    pub isa: Isa,
}

impl Decode {
    /// Plain softmax decode.
    pub fn new(scale: f32) -> Self {
        Self { scale, softcap: None, isa: Isa::active() }
    }

    /// Queries `q` (H, n, D contiguous) over `kv[kv_head]`, causal bottom-right among the n
    /// queries: row i of n sees tokens up to total − n + i. With `select` (one entry per query
    /// head, `group` 1 or n) a row sees only its listed tokens. Writes `out` (H, n, v_dim) and
    /// `lse` (H, n).
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        q: &[f32],
        [h, n, d]: [usize; 3],
        kv: &[Vec<Segment>],
        v_dim: usize,
        select: Option<&KeyLists>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<Work> {
        let hkv = kv.len();
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(KernelError::Groups { op: "decode", heads: h, kv_heads: hkv });
        }
        let need = |name: &'static str, have: usize, want: usize| {
            if have == want {
                Ok(())
            } else {
                Err(KernelError::Mismatch {
                    op: "decode",
                    dim: "elements",
                    left: name,
                    left_len: have,
                    right: "heads*queries*width",
                    right_len: want,
                })
            }
        };
        need("q", q.len(), h * n * d)?;
        need("out", out.len(), h * n * v_dim)?;
        need("lse", lse.len(), h * n)?;
        for segs in kv {
            for s in segs {
                let kw = s.channels.map_or(d, <[u32]>::len);
                if s.k.capacity(kw) < s.len || s.v.capacity(v_dim) < s.len {
                    return Err(KernelError::Param {
                        op: "decode",
                        name: "segment length",
                        value: s.len.to_string(),
                        remedy: "the stored rows are fewer; shorten the segment".into(),
                    });
                }
                if let Some(c) = s.channels
                    && c.iter().any(|&c| c as usize >= d)
                {
                    return Err(KernelError::Param {
                        op: "decode",
                        name: "channels",
                        value: format!("{c:?}"),
                        remedy: format!("channel numbers must be below head_dim {d}"),
                    });
                }
            }
        }
        let group = h / hkv;
        let mut work = Work::default();
        let mut buf = vec![0f32; d.max(v_dim)];
        for hi in 0..h {
            let segs = &kv[hi / group];
            let total: usize = segs.iter().map(|s| s.len).sum();
            if let Some(l) = select {
                l.heads[hi].check(n, total)?;
            }
            for i in 0..n {
                let r = hi * n + i;
                let qr = &q[r * d..(r + 1) * d];
                let visible = (total + i + 1).saturating_sub(n);
                let (o, l) = (&mut out[r * v_dim..(r + 1) * v_dim], &mut lse[r]);
                o.fill(0.0);
                *l = f32::NEG_INFINITY;
                let listed = select.map(|s| s.heads[hi].row(i / s.heads[hi].group));
                let mut base = 0;
                for s in segs {
                    let keys: Vec<usize> = match listed {
                        None => (0..s.len.min(visible.saturating_sub(base))).collect(),
                        Some(x) => x
                            .iter()
                            .map(|&j| j as usize)
                            .filter(|&j| j >= base && j < base + s.len && j < visible)
                            .map(|j| j - base)
                            .collect(),
                    };
                    for j in keys {
                        let mut sc = match s.channels {
                            None => {
                                s.k.row(j, &mut buf[..d]);
                                qr.iter().zip(&buf[..d]).map(|(a, b)| a * b).sum::<f32>()
                            }
                            Some(c) => {
                                s.k.row(j, &mut buf[..c.len()]);
                                c.iter().zip(&buf).map(|(&c, b)| qr[c as usize] * b).sum::<f32>()
                            }
                        } * self.scale;
                        if let Some(c) = self.softcap {
                            sc = c * (sc / c).tanh();
                        }
                        s.v.row(j, &mut buf[..v_dim]);
                        merge_row(o, l, &buf[..v_dim], sc);
                        let kw = s.channels.map_or(d, <[u32]>::len);
                        work.pairs += 1;
                        work.flops += 2 * (kw + v_dim) as u64;
                        work.bytes += (s.k.row_bytes(kw) + s.v.row_bytes(v_dim)) as u64;
                    }
                    work.tiles += 1;
                    base += s.len;
                }
            }
        }
        Ok(work)
    }
}

/// Raw scores q·k over the first `q_width` elements of each stored row: `q` (rows, q_width)
/// against `len` rows of `keys`, into `out` (rows, len). The estimators' primitive: no scale,
/// no softmax. Reading a prefix of each row is how low-rank scoring (Loki) stays cheap.
pub fn key_scores(q: &[f32], q_width: usize, keys: Codec, len: usize, out: &mut [f32], isa: Isa) -> Result<Work> {
    let _ = isa;
    let rows = q.len() / q_width.max(1);
    if out.len() != rows * len || keys.capacity(q_width) < len {
        return Err(KernelError::Mismatch {
            op: "key_scores",
            dim: "rows*len",
            left: "out",
            left_len: out.len(),
            right: "q and keys",
            right_len: rows * len,
        });
    }
    let mut buf = vec![0f32; q_width];
    for j in 0..len {
        keys.row(j, &mut buf);
        for r in 0..rows {
            out[r * len + j] = q[r * q_width..(r + 1) * q_width].iter().zip(&buf).map(|(a, b)| a * b).sum();
        }
    }
    Ok(Work {
        flops: 2 * (rows * len * q_width) as u64,
        bytes: (len * keys.row_bytes(q_width)) as u64,
        tiles: 0,
        pairs: 0,
    })
}
