//! Exact attention, dense or over a block table.

use crate::error::{KernelError, Result};
use crate::isa::Isa;
use crate::table::BlockTable;
use crate::view::{Element, View, ViewMut};
use crate::work::Work;
use rayon::prelude::*;

/// Parameters of one attention call. Build with [`Attend::new`] and the chained setters.
#[derive(Clone)]
pub struct Attend<'a> {
    /// Factor on q·k.
    pub scale: f32,
    /// Query i of n sees keys up to m − n + i (bottom-right).
    pub causal: bool,
    /// Keys in all that a query sees, its own included; needs `causal`.
    pub window: Option<usize>,
    /// `cap * tanh(s / cap)` on the scaled score.
    pub softcap: Option<f32>,
    /// One logit per query head added to the denominator only.
    pub sinks: Option<&'a [f32]>,
    /// Visit only these blocks.
    pub table: Option<&'a BlockTable>,
    /// Instruction set.
    pub isa: Isa,
}

impl<'a> Attend<'a> {
    /// Dense attention without a mask.
    pub fn new(scale: f32) -> Self {
        Self { scale, causal: false, window: None, softcap: None, sinks: None, table: None, isa: Isa::active() }
    }
    /// Set causality.
    pub fn causal(mut self, on: bool) -> Self {
        self.causal = on;
        self
    }
    /// Set the window.
    pub fn window(mut self, keys: Option<usize>) -> Self {
        self.window = keys;
        self
    }
    /// Set the block table.
    pub fn table(mut self, t: Option<&'a BlockTable>) -> Self {
        self.table = t;
        self
    }
    /// Set the instruction set.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Run: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) into out (B,H,Tq,Dv) and,
    /// if given, `lse` (B,H,Tq contiguous; natural log; −∞ for a row that sees no key).
    /// A row that sees no key is zero.
    pub fn run<T: Element>(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        out: &mut ViewMut<f32>,
        lse: Option<&mut [f32]>,
    ) -> Result<Work> {
        let [b, h, tq, d] = q.shape;
        let [_, hkv, tk, _] = k.shape;
        check_shapes("attend", q.shape, k.shape, v.shape, out.shape)?;
        if let Some(t) = self.table {
            if t.heads.len() != b * h {
                return Err(KernelError::Mismatch {
                    op: "attend",
                    dim: "batch*heads",
                    left: "block table",
                    left_len: t.heads.len(),
                    right: "q",
                    right_len: b * h,
                });
            }
            for ht in &t.heads {
                ht.check(tq, tk)?;
            }
        }
        let group = h / hkv.max(1);
        let rows = out.rows();
        let mut own_lse;
        let lse: &mut [f32] = match lse {
            Some(l) if l.len() == b * h * tq => l,
            Some(l) => {
                return Err(KernelError::Mismatch {
                    op: "attend",
                    dim: "batch*heads*tokens",
                    left: "lse",
                    left_len: l.len(),
                    right: "q",
                    right_len: b * h * tq,
                });
            }
            None => {
                own_lse = vec![0f32; b * h * tq];
                &mut own_lse
            }
        };
        if tq == 0 {
            return Ok(Work::default());
        }
        let work = lse
            .par_chunks_mut(tq)
            .enumerate()
            .map(|(bh, lse)| {
                let (bi, hi) = (bh / h, bh % h);
                let kh = hi / group;
                let mut pairs = 0u64;
                let mut tiles = 0u64;
                for i in 0..tq {
                    let hi_key = if self.causal { (tk + i + 1).saturating_sub(tq) } else { tk };
                    let lo_key = match self.window {
                        Some(w) if self.causal => hi_key.saturating_sub(w),
                        _ => 0,
                    };
                    let mut spans: Vec<(usize, usize)> = Vec::new();
                    match self.table {
                        None => {
                            spans.push((lo_key, hi_key));
                            tiles += u64::from(i % 64 == 0);
                        }
                        Some(t) => {
                            let t = &t.heads[bh];
                            let qb = i / t.block_q;
                            for (e, &kb) in t.row(qb).iter().enumerate() {
                                if i % t.block_q == 0 {
                                    tiles += 1;
                                }
                                if let Some(m) = &t.rows
                                    && m[t.indptr[qb] + e] >> (i % t.block_q) & 1 == 0
                                {
                                    continue;
                                }
                                let lo = (kb as usize * t.block_k).max(lo_key);
                                let hi = ((kb as usize + 1) * t.block_k).min(hi_key);
                                if lo < hi {
                                    spans.push((lo, hi));
                                }
                            }
                        }
                    }
                    // SAFETY: each (batch, head) is one task, each row visited once.
                    let o = unsafe { rows.row_mut(bi, hi, i) };
                    let keys = spans.into_iter().flat_map(|(a, b)| a..b);
                    pairs += row(self, q.row(bi, hi, i), bi, hi, kh, keys, k, v, o, &mut lse[i]);
                }
                Work { flops: pairs * 2 * (d + v.shape[3]) as u64, bytes: 0, tiles, pairs }
            })
            .sum();
        Ok(work)
    }
}

/// One query row over an iterator of keys, online softmax.
#[allow(clippy::too_many_arguments)]
fn row<T: Element>(
    p: &Attend,
    q: &[T],
    b: usize,
    h: usize,
    kh: usize,
    keys: impl Iterator<Item = usize>,
    k: &View<T>,
    v: &View<T>,
    o: &mut [f32],
    lse: &mut f32,
) -> u64 {
    let (mut m, mut l, mut n) = (f32::NEG_INFINITY, 0f32, 0u64);
    o.fill(0.0);
    for j in keys {
        n += 1;
        let mut s: f32 = q.iter().zip(k.row(b, kh, j)).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
        s *= p.scale;
        if let Some(c) = p.softcap {
            s = c * (s / c).tanh();
        }
        if s > m {
            let f = (m - s).exp();
            l *= f;
            o.iter_mut().for_each(|x| *x *= f);
            m = s;
        }
        let w = if m == f32::NEG_INFINITY { 0.0 } else { (s - m).exp() };
        l += w;
        for (x, y) in o.iter_mut().zip(v.row(b, kh, j)) {
            *x += w * y.to_f32();
        }
    }
    if let Some(s) = p.sinks {
        let top = m.max(s[h]);
        let f = (m - top).exp();
        l = l * f + (s[h] - top).exp();
        o.iter_mut().for_each(|x| *x *= f);
        m = top;
    }
    if l > 0.0 {
        o.iter_mut().for_each(|x| *x /= l);
        *lse = m + l.ln();
    } else {
        *lse = f32::NEG_INFINITY;
    }
    n
}

/// Shape rules shared by the attention kernels.
pub(crate) fn check_shapes(
    op: &'static str,
    q: [usize; 4],
    k: [usize; 4],
    v: [usize; 4],
    out: [usize; 4],
) -> Result<()> {
    let eq = |dim, left, l: usize, right, r: usize| {
        if l == r { Ok(()) } else { Err(KernelError::Mismatch { op, dim, left, left_len: l, right, right_len: r }) }
    };
    eq("batch", "q", q[0], "k", k[0])?;
    eq("batch", "k", k[0], "v", v[0])?;
    eq("head_dim", "q", q[3], "k", k[3])?;
    eq("heads", "k", k[1], "v", v[1])?;
    eq("tokens", "k", k[2], "v", v[2])?;
    eq("batch", "q", q[0], "out", out[0])?;
    eq("heads", "q", q[1], "out", out[1])?;
    eq("tokens", "q", q[2], "out", out[2])?;
    eq("head_dim", "v", v[3], "out", out[3])?;
    if k[1] == 0 || !q[1].is_multiple_of(k[1]) {
        return Err(KernelError::Groups { op, heads: q[1], kv_heads: k[1] });
    }
    Ok(())
}
