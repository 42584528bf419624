//! Rows of heads taken in another order, with gradients: what lets tables of blocks serve tokens that are not
//! neighbours in memory.

use crate::error::Result;
use crate::prim::conv::{cpu, flat, gradient, through};
use crate::prim::tensor::{AnyView, cpu_view, rows};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};
use foveal_kernels::View;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// Where the rows of one head of the result come from.
#[derive(Clone)]
pub(crate) struct Taken {
    /// Which head of x, batch major.
    pub(crate) head: usize,
    /// Which row of it for each row of the result; past its end, or where there is no such row, zeros. `None` for
    /// rows in their own order.
    pub(crate) rows: Option<Arc<[u32]>>,
}

impl Taken {
    /// The row of x (which has `t`) that row `i` of the result comes from.
    fn row(&self, i: usize, t: usize) -> Option<usize> {
        let row = match &self.rows {
            None => i,
            Some(rows) => *rows.get(i)? as usize,
        };
        (row < t).then_some(row)
    }
}

/// Memory of a result.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Memory {
    /// (B, H, T, D).
    HeadsFirst,
    /// (B, T, H, D), which an output projection reads without a copy.
    TokensFirst,
}

/// Rows of x (B, H, T, D) as (B, H', `tokens`, D), `taken` naming the source of each of the B·H' heads.
pub(crate) fn take_rows(
    op: &'static str,
    name: &'static str,
    x: &Tensor,
    taken: Vec<Taken>,
    tokens: usize,
    memory: Memory,
) -> Result<Tensor> {
    let x = rows(op, name, x)?;
    let (b, _, _, d) = x.dims4()?;
    let heads = taken.len() / b.max(1);
    let out = x.apply_op1(Take { taken, tokens, memory })?;
    Ok(match memory {
        Memory::HeadsFirst => out.reshape((b, heads, tokens, d))?,
        Memory::TokensFirst => out.reshape((b, tokens, heads, d))?.transpose(1, 2)?,
    })
}

/// Rows copied at once by a thread.
const ROWS: usize = 256;

struct Take {
    taken: Vec<Taken>,
    tokens: usize,
    memory: Memory,
}

impl Take {
    fn copy<T: Copy + Default + Send + Sync>(&self, x: &View<T>) -> Vec<T> {
        let [b, h, t, d] = x.shape;
        let heads = self.taken.len() / b.max(1);
        let mut out = vec![T::default(); self.taken.len() * self.tokens * d];
        out.par_chunks_mut((ROWS * d).max(1)).enumerate().for_each(|(chunk, out)| {
            for (r, out) in out.chunks_exact_mut(d).enumerate() {
                let r = chunk * ROWS + r;
                let (head, i) = match self.memory {
                    Memory::HeadsFirst => (r / self.tokens, r % self.tokens),
                    Memory::TokensFirst => (r / (self.tokens * heads) * heads + r % heads, r / heads % self.tokens),
                };
                let from = &self.taken[head];
                if let Some(i) = from.row(i, t) {
                    out.copy_from_slice(x.row(from.head / h, from.head % h, i));
                }
            }
        });
        out
    }
}

impl CustomOp1 for Take {
    fn name(&self) -> &'static str {
        "take_rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match cpu_view("x", x, layout).map_err(through)? {
            AnyView::F32(x) => CpuStorage::F32(self.copy::<f32>(&x)),
            AnyView::Bf16(x) => CpuStorage::BF16(self.copy::<bf16>(&x)),
        };
        let n = self.taken.len() * self.tokens * layout.dims()[3];
        Ok((out, Shape::from(n)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (b, _, t, d) = x.dims4()?;
        let heads = self.taken.len() / b.max(1);
        let dy = match self.memory {
            Memory::HeadsFirst => dy.clone(),
            Memory::TokensFirst => dy.reshape((b, self.tokens, heads, d))?.transpose(1, 2)?,
        };
        let dy = dy.to_dtype(DType::F32)?.contiguous()?;
        let (storage, layout) = dy.storage_and_layout();
        let dy = flat(cpu(&storage)?, layout)?;
        let mut dx = vec![0f32; x.elem_count()];
        // A head of x may be the source of several; each is summed by one thread, in one order.
        dx.par_chunks_mut((t * d).max(1)).enumerate().for_each(|(source, dx)| {
            for (head, from) in self.taken.iter().enumerate().filter(|(_, f)| f.head == source) {
                let dy = &dy[head * self.tokens * d..(head + 1) * self.tokens * d];
                for (i, dy) in dy.chunks_exact(d.max(1)).enumerate() {
                    if let Some(row) = from.row(i, t) {
                        dx[row * d..(row + 1) * d].iter_mut().zip(dy).for_each(|(x, y)| *x += y);
                    }
                }
            }
        });
        gradient(dx, x)
    }
}
