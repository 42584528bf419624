//! The dense store: every key and value kept, every one read. The baseline of all policies and
//! the cache slot of `flashattention-2`.

use super::batch::{Rows, bf16_rows, f32_rows, on_tiles, to_bf16};
use super::{CacheCtx, CachePolicy, LayerCache, Prompt, Resident, Step};
use crate::error::Result;
use crate::prim::kv::RowStore;
use foveal_kernels::Work;
use foveal_kernels::decode::{Decode, Segment};
use rayon::prelude::*;

/// Keeps everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct DenseCache;

impl CachePolicy for DenseCache {
    fn layer(&self, ctx: &CacheCtx) -> Result<Box<dyn LayerCache>> {
        Ok(Box::new(DenseLayer::new(ctx)))
    }

    fn declared_bytes(&self, ctx: &CacheCtx, tokens: usize) -> usize {
        dense_bytes(ctx, tokens)
    }
}

/// Bytes of a dense K and V store of `tokens` tokens.
pub fn dense_bytes(ctx: &CacheCtx, tokens: usize) -> usize {
    2 * ctx.num_kv_heads * ctx.dtype.bytes(tokens, ctx.head_dim)
}

/// One layer's dense store; also the building block of policies that keep all tokens.
#[derive(Clone)]
pub struct DenseLayer {
    ctx: CacheCtx,
    /// Keys per K/V head.
    pub k: Vec<RowStore>,
    /// Values per K/V head.
    pub v: Vec<RowStore>,
}

impl DenseLayer {
    /// An empty store.
    pub fn new(ctx: &CacheCtx) -> Self {
        let head = || RowStore::new(ctx.dtype, ctx.head_dim);
        let heads = |n| (0..n).map(|_| head()).collect();
        Self { ctx: ctx.clone(), k: heads(ctx.num_kv_heads), v: heads(ctx.num_kv_heads) }
    }

    /// Append (num_kv_heads, n, head_dim) keys and values.
    pub fn push(&mut self, k: &[f32], v: &[f32], n: usize) {
        let w = n * self.ctx.head_dim;
        for h in 0..self.ctx.num_kv_heads {
            self.k[h].push(&k[h * w..(h + 1) * w]);
            self.v[h].push(&v[h * w..(h + 1) * w]);
        }
    }

    /// Segments as the decode kernel reads them.
    pub fn segments(&self) -> Vec<Vec<Segment<'_>>> {
        self.k
            .iter()
            .zip(&self.v)
            .map(|(k, v)| vec![Segment { k: k.codec(), v: v.codec(), len: k.len(), channels: None }])
            .collect()
    }

    /// Causal attention of the last n tokens' queries over everything stored.
    pub fn attend(&self, q: &[f32], n: usize, out: &mut [f32]) -> Result<Work> {
        let c = &self.ctx;
        let (h, d, total) = (c.num_heads, c.head_dim, self.len());
        // Many rows at once are a small prefill: the tiled kernel reuses each key for all of them.
        if n > 8 || c.window.is_some_and(|w| w < total) {
            let group = h / c.num_kv_heads;
            let heads = q.par_chunks_exact(group * n * d).zip(out.par_chunks_exact_mut(group * n * d));
            return heads
                .zip(self.k.par_iter().zip(&self.v))
                .with_max_len(1)
                .map(|((q, out), (k, v))| {
                    let lse = &mut vec![0f32; group * n];
                    let (scale, window, shape) = (c.scale, c.window, [group, n, d, d]);
                    if on_tiles(c) {
                        let (k, v) = (&*bf16_rows(k), &*bf16_rows(v));
                        Rows { scale, causal: true, window, shape, k, v }.attend(&to_bf16(q), None, out, lse)
                    } else {
                        let (k, v) = (&*f32_rows(k), &*f32_rows(v));
                        Rows { scale, causal: true, window, shape, k, v }.attend(q, None, out, lse)
                    }
                })
                .try_reduce(Work::default, |a, b| Ok(a + b));
        }
        let mut lse = vec![0f32; h * n];
        Ok(Decode::new(c.scale).run(q, [h, n, d], &self.segments(), d, None, out, &mut lse)?)
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.k.first().map_or(0, RowStore::len)
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of keys and values.
    pub fn resident(&self) -> Resident {
        Resident {
            keys: self.k.iter().map(RowStore::bytes).sum(),
            values: self.v.iter().map(RowStore::bytes).sum(),
            aux: 0,
        }
    }
}

impl LayerCache for DenseLayer {
    fn fill(&mut self, p: &Prompt) -> Result<()> {
        self.push(p.k, p.v, p.len);
        Ok(())
    }

    fn step(&mut self, s: &Step, out: &mut [f32]) -> Result<Work> {
        self.push(s.k, s.v, s.n);
        self.attend(s.q, s.n, out)
    }

    fn len(&self) -> usize {
        DenseLayer::len(self)
    }

    fn resident(&self) -> Resident {
        DenseLayer::resident(self)
    }

    fn fork(&self) -> Box<dyn LayerCache> {
        Box::new(self.clone())
    }
}
