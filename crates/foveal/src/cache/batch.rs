//! What the policies share: checked inputs, and many rows at once.
//!
//! A step of many rows is a small prefill. A policy whose rows choose their own keys then
//! works on a tile of scores (rows × keys) from matrix products: a key that a row does not
//! read gets the score −∞, the softmax turns it into a weight of 0, and a second product
//! gathers the values. That costs the FLOPs of dense attention (and says so in the work
//! returned) but runs at the speed of matrix products, where gathering rows one query at a
//! time would wait for memory.
//!
//! Where the machine has bf16 tiles and the store is no wider than bf16 anyway ([`on_tiles`]), all
//! of this runs on them: scores key by key, choices as one mark a key for 64 queries
//! ([`foveal_kernels::rank`]), attention under these marks. Queries that only score are split in
//! two bf16 parts, so that choices are those of f32 queries; queries and weights of the attention
//! itself are rounded to bf16, as in a prompt. Rows stored in int8 are rounded to bf16 for both, so choices
//! between near equals may differ there from one row at a time.

use super::{CacheCtx, Prompt, Step};
use crate::error::{Error, Result};
use crate::prim::gemm;
use crate::prim::kv::{KvDtype, RowStore};
use foveal_kernels::decode::Codec;
use foveal_kernels::exp::{self, Fun};
use foveal_kernels::rank::WIDTH;
use foveal_kernels::{Attend, BlockTable, Element, HeadTable, Isa, PackedLinear, View, ViewMut, Work};
use half::bf16;
use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;

/// Rows per step from which the batched path is taken.
pub(crate) const BATCH_FROM: usize = 3;

/// Floats in one tile of scores: about what the second-level cache holds.
const TILE: usize = 512 * 1024;

/// Rows (per query head) of a tile over `keys` keys for `heads` heads.
pub(crate) fn tile_rows(heads: usize, keys: usize) -> usize {
    (TILE / (heads * keys).max(1)).clamp(8, 64)
}

fn check_len(op: &'static str, tensor: &'static str, have: usize, want: [usize; 3]) -> Result<()> {
    if have == want.iter().product::<usize>() {
        return Ok(());
    }
    Err(Error::Shape { op, tensor, shape: vec![have], expected: format!("elements of a contiguous {want:?}") })
}

/// Check a prompt's slices against the layer.
pub(crate) fn check_prompt(op: &'static str, c: &CacheCtx, p: &Prompt, pre_rotation: bool) -> Result<()> {
    let kv = [c.num_kv_heads, p.len, c.head_dim];
    check_len(op, "k", p.k.len(), kv)?;
    check_len(op, "v", p.v.len(), kv)?;
    check_len(op, "q_obs", p.q_obs.len(), [c.num_heads, p.q_len, c.head_dim])?;
    if p.q_len > p.len {
        return Err(Error::Shape {
            op,
            tensor: "q_obs",
            shape: vec![c.num_heads, p.q_len, c.head_dim],
            expected: format!("at most the prompt's {} rows", p.len),
        });
    }
    if pre_rotation { check_len(op, "k_pre", p.k_pre.len(), kv) } else { Ok(()) }
}

/// Check a step's slices against the layer, and its position against the tokens stored.
pub(crate) fn check_step(
    op: &'static str,
    c: &CacheCtx,
    s: &Step,
    out: &[f32],
    stored: usize,
    pre_rotation: bool,
) -> Result<()> {
    let (q, kv) = ([c.num_heads, s.n, c.head_dim], [c.num_kv_heads, s.n, c.head_dim]);
    check_len(op, "q", s.q.len(), q)?;
    check_len(op, "out", out.len(), q)?;
    check_len(op, "k", s.k.len(), kv)?;
    check_len(op, "v", s.v.len(), kv)?;
    if pre_rotation {
        check_len(op, "k_pre", s.k_pre.len(), kv)?;
    }
    if s.pos != stored {
        return Err(Error::Param {
            system: op.into(),
            message: format!("step at position {} but {stored} tokens are stored; append tokens in order", s.pos),
        });
    }
    Ok(())
}

/// Check the layer's head counts.
pub(crate) fn check_ctx(op: &'static str, c: &CacheCtx) -> Result<()> {
    if c.num_kv_heads == 0 || c.head_dim == 0 || !c.num_heads.is_multiple_of(c.num_kv_heads) {
        return Err(Error::Param {
            system: op.into(),
            message: format!(
                "num_heads = {}, num_kv_heads = {}, head_dim = {}: query heads must be a multiple of K/V heads and no size 0",
                c.num_heads, c.num_kv_heads, c.head_dim
            ),
        });
    }
    Ok(())
}

/// First key that a query seeing `visible` keys may read under the model's own window.
pub(crate) fn window_from(c: &CacheCtx, visible: usize) -> usize {
    c.window.map_or(0, |w| visible.saturating_sub(w))
}

/// Rows `rows` of the `group` query heads of K/V head `g`, stacked as (group·rows, D).
pub(crate) fn stack_rows(x: &[f32], g: usize, group: usize, n: usize, d: usize, rows: Range<usize>) -> Vec<f32> {
    let mut out = Vec::with_capacity(group * rows.len() * d);
    for h in g * group..(g + 1) * group {
        out.extend_from_slice(&x[(h * n + rows.start) * d..(h * n + rows.end) * d]);
    }
    out
}

/// The inverse of [`stack_rows`]: write a stacked tile into `out` (heads, n, d).
pub(crate) fn unstack_rows(
    tile: &[f32],
    out: &mut [f32],
    g: usize,
    group: usize,
    n: usize,
    d: usize,
    rows: Range<usize>,
) {
    let w = rows.len() * d;
    for a in 0..group {
        let h = g * group + a;
        out[(h * n + rows.start) * d..(h * n + rows.end) * d].copy_from_slice(&tile[a * w..(a + 1) * w]);
    }
}

/// What one task gives: a K/V head's output rows, stacked, and the work.
pub(crate) struct Tiled {
    /// As [`stack_rows`] orders them.
    pub out: Vec<f32>,
    /// Work done.
    pub work: Work,
}

/// e^x of every element.
pub(crate) fn exp_all(x: &mut [f32]) {
    exp::apply(Fun::Exp, x, Isa::active());
}

/// Replace raw scores by e^{scale·(x − max x)} and return their sum; −∞ becomes 0, a row of
/// only −∞ becomes all 0 with sum 0. `scale` must be positive.
pub(crate) fn exp_row(x: &mut [f32], scale: f32) -> f32 {
    let m = max_of(x);
    if m == f32::NEG_INFINITY {
        x.fill(0.0);
        return 0.0;
    }
    for v in x.iter_mut() {
        *v = (*v - m) * scale;
    }
    exp_all(x);
    sum_of(x)
}

/// Largest element, in 16 independent lanes so that it vectorises.
fn max_of(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for c in chunks {
        for (m, &v) in lanes.iter_mut().zip(c) {
            *m = if v > *m { v } else { *m };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Sum in 16 lanes: vectorises, and is closer than a running sum.
fn sum_of(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for c in chunks {
        for (m, &v) in lanes.iter_mut().zip(c) {
            *m += v;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// The k-th largest element (k from 1; NaN counts as −∞).
///
/// A sorted sample brackets it, one pass keeps what lies within the bracket, and only that
/// is partitioned; when the bracket missed, everything is.
fn kth_largest(x: &[f32], k: usize, scratch: &mut Vec<f32>) -> f32 {
    const SAMPLE: usize = 256;
    let down = |a: &f32, b: &f32| b.total_cmp(a);
    let clean = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    scratch.clear();
    if x.len() >= 8 * SAMPLE {
        let mut s = [0f32; SAMPLE];
        for (i, v) in s.iter_mut().enumerate() {
            // An odd multiplier spreads the sample without a period of its own.
            *v = clean(x[(i * x.len() + (i * 97) % x.len()) / SAMPLE]);
        }
        s.sort_unstable_by(down);
        let at = k as f32 / x.len() as f32 * SAMPLE as f32;
        let margin = 2.5 * (at * (1.0 - at / SAMPLE as f32)).max(1.0).sqrt() + 2.0;
        let hi = if at > margin { s[(at - margin) as usize] } else { f32::INFINITY };
        let lo = if at + margin < SAMPLE as f32 { s[(at + margin) as usize] } else { f32::NEG_INFINITY };
        // Branch-free: every element is written, the cursor moves only past those within.
        scratch.resize(x.len() + 1, 0.0);
        let (mut above, mut n) = (0usize, 0usize);
        for &v in x {
            scratch[n] = v;
            above += usize::from(v > hi);
            n += usize::from(v <= hi && v >= lo);
        }
        if above < k && k <= above + n {
            let mid = &mut scratch[..n];
            return *mid.select_nth_unstable_by(k - above - 1, down).1;
        }
        scratch.clear();
    }
    scratch.extend(x.iter().map(|&v| clean(v)));
    *scratch.select_nth_unstable_by(k - 1, down).1
}

/// Set all but the `k` largest scores to −∞; of equal ones the first stay. NaN is never kept
/// before a number.
pub(crate) fn keep_top(x: &mut [f32], k: usize, scratch: &mut Vec<f32>) {
    if k >= x.len() {
        return;
    }
    if k == 0 {
        x.fill(f32::NEG_INFINITY);
        return;
    }
    let t = kth_largest(x, k, scratch);
    let mut kept = 0usize;
    for v in x.iter_mut() {
        let keep = *v >= t;
        kept += usize::from(keep);
        *v = if keep { *v } else { f32::NEG_INFINITY };
    }
    // Ties at the threshold: the last ones go.
    for v in x.iter_mut().rev() {
        if kept <= k {
            break;
        }
        if *v == t {
            *v = f32::NEG_INFINITY;
            kept -= 1;
        }
    }
}

/// Positions that [`keep_top`] kept, `base` added.
pub(crate) fn kept(x: &[f32], base: usize) -> Vec<u32> {
    (0..x.len()).filter(|&j| x[j] > f32::NEG_INFINITY).map(|j| (base + j) as u32).collect()
}

/// Unnormalised weights (rows, keys) times values (keys, dv), each row divided by its sum.
pub(crate) fn gather_values(weights: &[f32], sums: &[f32], v: &[f32], keys: usize, dv: usize) -> (Vec<f32>, u64) {
    let rows = sums.len();
    let mut out = vec![0f32; rows * dv];
    let flops = gemm::ab(rows, dv, keys, weights, v, &mut out);
    for (row, &sum) in out.chunks_exact_mut(dv).zip(sums) {
        let inv = if sum > 0.0 { 1.0 / sum } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= inv);
    }
    (out, flops)
}

/// Whether many rows of a layer are attended to on bf16 tiles.
pub(crate) fn on_tiles(c: &CacheCtx) -> bool {
    Isa::active() == Isa::Amx && c.dtype != KvDtype::F32 && c.scale > 0.0
}

/// All rows of a store as bf16, in place if they are.
pub(crate) fn bf16_rows(s: &RowStore) -> Cow<'_, [bf16]> {
    match s.codec() {
        Codec::Bf16 { data, .. } => Cow::Borrowed(data),
        _ => Cow::Owned(to_bf16(&s.to_f32())),
    }
}

/// All rows of a store as f32, in place if they are.
pub(crate) fn f32_rows(s: &RowStore) -> Cow<'_, [f32]> {
    match s.codec() {
        Codec::F32 { data, .. } => Cow::Borrowed(data),
        _ => Cow::Owned(s.to_f32()),
    }
}

/// Rounded to bf16.
pub(crate) fn to_bf16(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// The first `width` elements of rows `stride` apart, each row twice: what meets [`ScoreTile`].
pub(crate) fn doubled(k: &[bf16], stride: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(k.len() / stride.max(1) * 2 * width);
    for row in k.chunks_exact(stride) {
        for _ in 0..2 {
            out.extend(row[..width].iter().map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)));
        }
    }
    out
}

/// Up to 64 queries, packed to score keys: each is split into what bf16 holds of it and the rest.
pub(crate) struct ScoreTile(PackedLinear);

impl ScoreTile {
    /// `rows` are queries of `width` elements.
    pub(crate) fn new<'a>(rows: impl Iterator<Item = &'a [f32]>, width: usize) -> Result<Self> {
        let mut w = vec![0f32; WIDTH * 2 * width];
        for (w, q) in w.chunks_exact_mut((2 * width).max(1)).zip(rows) {
            let (high, low) = w.split_at_mut(width);
            for ((h, l), &x) in high.iter_mut().zip(low).zip(q) {
                *h = bf16::from_f32(x).to_f32();
                *l = x - *h;
            }
        }
        Ok(Self(PackedLinear::pack_bf16(&w, WIDTH, 2 * width)?))
    }

    /// Scores (keys, 64) of [`doubled`] rows; the FLOPs spent.
    pub(crate) fn scores(&self, keys: &[f32], out: &mut [f32]) -> Result<u64> {
        let n = keys.len() / self.0.k().max(1);
        Ok(self.0.forward(keys, n, &mut out[..n * WIDTH], Isa::active())?.flops)
    }
}

thread_local! {
    /// Tiles of scores are megabytes: fresh memory each time would cost as much as filling it.
    static TILES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Run `f` on `n` floats of this thread's scratch, of any content. Taken out meanwhile: a thread that
/// waits inside `f` may be given another task.
pub(crate) fn with_tile<R>(n: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut tile = TILES.take();
    if tile.len() < n {
        tile.resize(n, 0.0);
    }
    let r = f(&mut tile[..n]);
    TILES.set(tile);
    r
}

/// Marks of consecutive blocks of 64 rows as a table of single keys.
pub(crate) fn marked<'a>(blocks: impl Iterator<Item = &'a [u64]>) -> HeadTable {
    let (mut indptr, mut keys, mut rows) = (vec![0], Vec::new(), Vec::new());
    for marks in blocks {
        for (j, &m) in marks.iter().enumerate().filter(|(_, m)| **m != 0) {
            keys.push(j as u32);
            rows.push(m);
        }
        indptr.push(keys.len());
    }
    HeadTable { block_q: WIDTH, block_k: 1, indptr, blocks: keys, rows: Some(rows) }
}

/// Attention of some query heads of one K/V head.
pub(crate) struct Rows<'a, T> {
    pub scale: f32,
    pub causal: bool,
    pub window: Option<usize>,
    /// Query heads, rows of each, their width, the values' width.
    pub shape: [usize; 4],
    pub k: &'a [T],
    pub v: &'a [T],
}

impl<T: Element> Rows<'_, T> {
    /// `q` (heads, rows, width) to `out` (heads, rows, value width) and `lse` (heads, rows).
    pub(crate) fn attend(
        &self,
        q: &[T],
        tables: Option<Vec<HeadTable>>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<Work> {
        let [heads, rows, d, dv] = self.shape;
        let keys = self.k.len() / d.max(1);
        let table = tables.map(|heads| BlockTable { heads });
        let call = Attend::new(self.scale).causal(self.causal).window(self.window).table(table.as_ref());
        Ok(call.run(
            &View::contiguous("q", q, [1, heads, rows, d])?,
            &View::contiguous("k", self.k, [1, 1, keys, d])?,
            &View::contiguous("v", self.v, [1, 1, keys, dv])?,
            &mut ViewMut::contiguous("out", out, [1, heads, rows, dv])?,
            Some(lse),
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prim::select::topk;
    use rand::{Rng, SeedableRng};

    #[test]
    fn keep_top_agrees_with_topk() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut scratch = Vec::new();
        for n in [1usize, 2, 17, 500, 2048, 5000, 9001] {
            for k in [0, 1, n / 10, n / 4, n / 2, n - 1, n, n + 3] {
                for kind in 0..4 {
                    let x: Vec<f32> = (0..n)
                        .map(|i| match kind {
                            0 => rng.random::<f32>() - 0.5,
                            1 => (rng.random::<u32>() % 7) as f32,
                            2 => 3.0,
                            _ => {
                                if i % 5 == 0 {
                                    f32::NAN
                                } else {
                                    -(i as f32)
                                }
                            }
                        })
                        .collect();
                    let mut y = x.clone();
                    keep_top(&mut y, k, &mut scratch);
                    let numbers = x.iter().filter(|v| !v.is_nan()).count();
                    if kind == 3 && k > numbers {
                        continue; // NaN has no place among kept scores
                    }
                    assert_eq!(kept(&y, 0), topk(&x, k), "n {n}, k {k}, kind {kind}");
                }
            }
        }
    }

    #[test]
    fn exp_row_is_the_softmax_numerator() {
        let mut x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
        x[3] = f32::NEG_INFINITY;
        let want: Vec<f64> = x.iter().map(|&v| (f64::from(v) * 0.5).exp()).collect();
        let total: f64 = want.iter().sum();
        let sum = exp_row(&mut x, 0.5);
        assert_eq!(x[3], 0.0);
        for (a, w) in x.iter().zip(&want) {
            assert!((f64::from(a / sum) - w / total).abs() < 1e-6);
        }
        let mut none = [f32::NEG_INFINITY; 20];
        assert_eq!(exp_row(&mut none, 1.0), 0.0);
        assert!(none.iter().all(|&v| v == 0.0));
    }
}
