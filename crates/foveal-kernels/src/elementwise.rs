//! The row operations between the products of a transformer: normalisation, rotary position,
//! gated activation, softmax; and the backward passes of normalisation and softmax.
//!
//! All work in f32 on rows, in parallel where there are enough elements to pay for it.

use crate::dispatch::with_isa;
use crate::error::{KernelError, Result, same};
use crate::exp::exp;
use crate::isa::Isa;
use crate::simd::Simd;
use crate::work::Work;
use rayon::prelude::*;

/// Elements below which a call stays on its thread.
const PARALLEL: usize = 1 << 15;

/// Rows of (token, head) inside a larger buffer, such as the q part of a fused q|k|v projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Element at which head 0 of token 0 begins.
    pub offset: usize,
    /// Tokens.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head's row, contiguous.
    pub head_dim: usize,
    /// Elements from token to token.
    pub token_stride: usize,
    /// Elements from head to head.
    pub head_stride: usize,
}

impl Heads {
    /// Heads side by side in each token's row of `width` elements, the first at `offset`.
    pub fn in_rows(tokens: usize, width: usize, offset: usize, heads: usize, head_dim: usize) -> Self {
        Self { offset, tokens, heads, head_dim, token_stride: width, head_stride: head_dim }
    }

    /// Contiguous (heads, tokens, head_dim).
    pub fn head_major(heads: usize, tokens: usize, head_dim: usize) -> Self {
        Self { offset: 0, tokens, heads, head_dim, token_stride: head_dim, head_stride: tokens * head_dim }
    }

    fn at(&self, token: usize, head: usize) -> usize {
        self.offset + token * self.token_stride + head * self.head_stride
    }

    /// Check that all rows lie in `len` elements and, if they are written, apart.
    fn check(&self, op: &'static str, what: &'static str, len: usize, written: bool) -> Result<()> {
        let Heads { offset, tokens, heads, head_dim, token_stride, head_stride } = *self;
        if tokens * heads == 0 {
            return Ok(());
        }
        let reach = |n: usize, stride: usize| (n - 1).checked_mul(stride);
        let need = reach(tokens, token_stride)
            .and_then(|t| t.checked_add(reach(heads, head_stride)?))
            .and_then(|n| n.checked_add(offset)?.checked_add(head_dim))
            .unwrap_or(usize::MAX);
        if need > len {
            let (shape, strides) = ([1, heads, tokens, head_dim], [0, head_stride, token_stride]);
            return Err(KernelError::View { op, what, shape, strides, need, have: len });
        }
        let mut axes = [(token_stride, tokens), (head_stride, heads)];
        axes.sort_unstable();
        let mut below = head_dim;
        for (stride, n) in axes {
            if written && n > 1 {
                if stride < below {
                    return Err(KernelError::Param {
                        op,
                        name: "strides",
                        value: format!("{token_stride} a token, {head_stride} a head for {what}"),
                        remedy: "rows overlap; use a layout in which every row has its own memory".into(),
                    });
                }
                below += (n - 1) * stride;
            }
        }
        Ok(())
    }
}

/// Which elements of a row a rotation pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// (i, i + rotary_dim/2): GPT-NeoX and the Hugging Face format of Llama.
    Halves,
    /// (2i, 2i + 1): the original format, and Llama in GGUF.
    Interleaved,
}

/// Memory that workers read and write in disjoint rows.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: the rows handed to workers are disjoint (checked by `Heads::check`).
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}
impl Shared {
    fn at(self, i: usize) -> *mut f32 {
        self.0.wrapping_add(i)
    }
}

/// Run `f` over rows `0..rows` of `width` elements, in parallel if that pays.
fn over_rows(rows: usize, width: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    if rows < 2 || threads == 1 || rows * width < PARALLEL {
        return f(0..rows);
    }
    let step = rows.div_ceil(4 * threads).max(PARALLEL / 8 / width.max(1)).max(1);
    (0..rows.div_ceil(step)).into_par_iter().for_each(|t| f(t * step..((t + 1) * step).min(rows)));
}

/// Work of an operation of `flops` operations an element, `moved` f32 read or written in all.
fn work(elements: usize, flops: usize, moved: usize) -> Work {
    Work { flops: (elements * flops) as u64, bytes: 4 * moved as u64, ..Work::default() }
}

/// Whole rows of `width` in `len` elements.
fn rows_of(op: &'static str, len: usize, width: usize) -> Result<usize> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(KernelError::Param {
            op,
            name: "row width",
            value: width.to_string(),
            remedy: format!("{len} elements must be whole rows"),
        });
    }
    Ok(len / width)
}

/// out = x / √(mean(x²) + eps) · weight, for each row of `weight.len()` elements (Zhang and
/// Sennrich 2019, arXiv 1910.07467).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], isa: Isa) -> Result<Work> {
    let d = weight.len();
    let rows = rows_of("rms_norm", x.len(), d)?;
    same("rms_norm", "elements", "out", out.len(), "x", x.len())?;
    let isa = isa.min(Isa::detect());
    let dst = Shared(out.as_mut_ptr());
    over_rows(rows, d, |range| {
        for r in range {
            // SAFETY: rows of `d` elements inside both slices; workers have rows of their own.
            unsafe { norm_row(isa, x.as_ptr().wrapping_add(r * d), dst.at(r * d), weight, eps) };
        }
    });
    Ok(work(x.len(), 4, 2 * x.len()))
}

/// [`rms_norm`] of each head's row in place (the q and k normalisation of Qwen3).
pub fn rms_norm_heads(x: &mut [f32], heads: Heads, weight: &[f32], eps: f32, isa: Isa) -> Result<Work> {
    same("rms_norm_heads", "head_dim", "weight", weight.len(), "heads", heads.head_dim)?;
    heads.check("rms_norm_heads", "x", x.len(), true)?;
    let isa = isa.min(Isa::detect());
    let dst = Shared(x.as_mut_ptr());
    let d = heads.head_dim;
    over_rows(heads.tokens, heads.heads * d, |range| {
        for t in range {
            for h in 0..heads.heads {
                let row = dst.at(heads.at(t, h));
                // SAFETY: rows were checked to be inside `x` and disjoint; each goes to one worker.
                unsafe { norm_row(isa, row, row, weight, eps) };
            }
        }
    });
    let n = heads.tokens * heads.heads * d;
    Ok(work(n, 4, 2 * n))
}

/// x += delta, then out = [`rms_norm`] of the new x: the end of one block and the start of the next
/// in one pass.
pub fn add_rms_norm(x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32], isa: Isa) -> Result<Work> {
    let d = weight.len();
    let rows = rows_of("add_rms_norm", x.len(), d)?;
    same("add_rms_norm", "elements", "delta", delta.len(), "x", x.len())?;
    same("add_rms_norm", "elements", "out", out.len(), "x", x.len())?;
    let isa = isa.min(Isa::detect());
    let (x_ptr, dst) = (Shared(x.as_mut_ptr()), Shared(out.as_mut_ptr()));
    over_rows(rows, d, |range| {
        for r in range {
            let row = x_ptr.at(r * d);
            // SAFETY: rows of `d` elements inside all slices; workers have rows of their own.
            unsafe {
                add_row(isa, row, delta.as_ptr().wrapping_add(r * d), d);
                norm_row(isa, row, dst.at(r * d), weight, eps);
            }
        }
    });
    Ok(work(x.len(), 5, 4 * x.len()))
}

/// x += delta.
pub fn add(x: &mut [f32], delta: &[f32], isa: Isa) -> Result<Work> {
    same("add", "elements", "delta", delta.len(), "x", x.len())?;
    let isa = isa.min(Isa::detect());
    let n = x.len();
    let dst = Shared(x.as_mut_ptr());
    over_rows(n.div_ceil(1024), 1024, |range| {
        let (a, b) = (range.start * 1024, (range.end * 1024).min(n));
        // SAFETY: `a..b` is inside both slices and of this worker alone.
        unsafe { add_row(isa, dst.at(a), delta.as_ptr().wrapping_add(a), b - a) };
    });
    Ok(work(n, 1, 3 * n))
}

/// Rotate `x` in place by its tokens' positions (Su et al. 2021, arXiv 2104.09864).
///
/// `cos` and `sin` are (positions, rotary_dim/2) tables; token t uses row `positions[t]`. The
/// first `rotary_dim` elements of each row turn, the rest stay.
pub fn rope(
    x: &mut [f32],
    heads: Heads,
    cos: &[f32],
    sin: &[f32],
    rotary_dim: usize,
    positions: &[u32],
    layout: RopeLayout,
    isa: Isa,
) -> Result<Work> {
    heads.check("rope", "x", x.len(), true)?;
    let p = Shared(x.as_mut_ptr());
    rope_rows(p, heads, p, heads, [cos, sin], rotary_dim, positions, layout, isa)
}

/// [`rope`] from `src` into `dst`, which may be laid out otherwise.
pub fn rope_into(
    src: &[f32],
    from: Heads,
    dst: &mut [f32],
    to: Heads,
    cos: &[f32],
    sin: &[f32],
    rotary_dim: usize,
    positions: &[u32],
    layout: RopeLayout,
    isa: Isa,
) -> Result<Work> {
    from.check("rope", "src", src.len(), false)?;
    to.check("rope", "dst", dst.len(), true)?;
    for (dim, a, b) in
        [("tokens", from.tokens, to.tokens), ("heads", from.heads, to.heads), ("head_dim", from.head_dim, to.head_dim)]
    {
        same("rope", dim, "src", a, "dst", b)?;
    }
    // The source is only read through this pointer.
    let src = Shared(src.as_ptr().cast_mut());
    rope_rows(src, from, Shared(dst.as_mut_ptr()), to, [cos, sin], rotary_dim, positions, layout, isa)
}

fn rope_rows(
    src: Shared,
    from: Heads,
    dst: Shared,
    to: Heads,
    [cos, sin]: [&[f32]; 2],
    rotary_dim: usize,
    positions: &[u32],
    layout: RopeLayout,
    isa: Isa,
) -> Result<Work> {
    let d = from.head_dim;
    if rotary_dim > d || !rotary_dim.is_multiple_of(2) {
        return Err(KernelError::Param {
            op: "rope",
            name: "rotary_dim",
            value: rotary_dim.to_string(),
            remedy: format!("use an even number up to head_dim {d}"),
        });
    }
    same("rope", "tokens", "positions", positions.len(), "x", from.tokens)?;
    same("rope", "elements", "sin", sin.len(), "cos", cos.len())?;
    let half = rotary_dim / 2;
    let table = cos.len().checked_div(half).unwrap_or(usize::MAX);
    if let Some(&p) = positions.iter().find(|&&p| p as usize >= table) {
        return Err(KernelError::Param {
            op: "rope",
            name: "position",
            value: p.to_string(),
            remedy: format!("the cos and sin tables hold {table} positions; extend them"),
        });
    }
    let isa = isa.min(Isa::detect());
    over_rows(from.tokens, from.heads * d, |range| {
        for t in range {
            let at = positions[t] as usize * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            for h in 0..from.heads {
                let (a, b) = (src.at(from.at(t, h)).cast_const(), dst.at(to.at(t, h)));
                // SAFETY: the callers checked that all rows are inside their slices and that written
                // rows are disjoint; `a` is `b` or memory that nobody writes.
                unsafe {
                    match layout {
                        RopeLayout::Halves => rotate_halves(isa, a, b, cos, sin),
                        RopeLayout::Interleaved => rotate_pairs(isa, a, b, cos, sin),
                    }
                    if !std::ptr::eq(a, b) {
                        std::ptr::copy_nonoverlapping(a.add(rotary_dim), b.add(rotary_dim), d - rotary_dim);
                    }
                }
            }
        }
    });
    let n = from.tokens * from.heads;
    Ok(work(n * half, 6, 2 * n * d))
}

/// out = silu(gate) · up with silu(g) = g / (1 + e^−g), for rows gate | up of 2 · `width` elements
/// (Shazeer 2020, arXiv 2002.05202).
pub fn swiglu(gate_up: &[f32], width: usize, out: &mut [f32], isa: Isa) -> Result<Work> {
    let rows = rows_of("swiglu", gate_up.len(), 2 * width)?;
    same("swiglu", "elements", "out", out.len(), "rows*width", rows * width)?;
    let isa = isa.min(Isa::detect());
    let dst = Shared(out.as_mut_ptr());
    over_rows(rows, 2 * width, |range| {
        for r in range {
            let g = gate_up.as_ptr().wrapping_add(2 * r * width);
            // SAFETY: rows inside both slices; workers have rows of their own.
            unsafe { swiglu_row(isa, g, g.wrapping_add(width), dst.at(r * width), width) };
        }
    });
    Ok(work(rows * width, 4, 3 * rows * width))
}

/// Softmax of each row of `width` elements, in place: e^(x − max) / Σ. A row that is −∞
/// throughout becomes zero.
pub fn softmax_rows(x: &mut [f32], width: usize, isa: Isa) -> Result<Work> {
    let rows = rows_of("softmax_rows", x.len(), width)?;
    let isa = isa.min(Isa::detect());
    let n = x.len();
    let dst = Shared(x.as_mut_ptr());
    over_rows(rows, width, |range| {
        for r in range {
            // SAFETY: a row inside the slice, of this worker alone.
            unsafe { softmax_row(isa, dst.at(r * width), width) };
        }
    });
    Ok(work(n, 4, 2 * n))
}

/// Gradient of [`softmax_rows`] from its result `y` and the gradient `dy` of that result, row by row:
/// dx = y · (dy − Σ y·dy). A row of zeros gives zeros.
pub fn softmax_rows_backward(y: &[f32], dy: &[f32], width: usize, dx: &mut [f32], isa: Isa) -> Result<Work> {
    const OP: &str = "softmax_rows backward";
    let rows = rows_of(OP, y.len(), width)?;
    same(OP, "elements", "dy", dy.len(), "y", y.len())?;
    same(OP, "elements", "dx", dx.len(), "y", y.len())?;
    let isa = isa.min(Isa::detect());
    let dst = Shared(dx.as_mut_ptr());
    over_rows(rows, width, |range| {
        for r in range {
            let row = r * width..(r + 1) * width;
            // SAFETY: a row of `width` elements inside each slice; workers have rows of their own.
            unsafe { softmax_row_back(isa, &y[row.clone()], &dy[row], dst.at(r * width)) };
        }
    });
    Ok(work(y.len(), 4, 3 * y.len()))
}

/// Rows whose share of a weight's gradient is summed in f32 before the sum over all of them, in f64: the same
/// for any number of threads.
const GRAD_ROWS: usize = 32;

/// Gradients of [`rms_norm`] for the gradient `dy` of its result. With f = 1 / √(mean(x²) + eps) of a row of d
/// elements and s = Σ x·weight·dy: dx = f·weight·dy − f³/d·s·x, and `dweight` (if asked for) is the sum
/// over rows of f·x·dy. Both are overwritten.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    isa: Isa,
) -> Result<Work> {
    const OP: &str = "rms_norm backward";
    let d = weight.len();
    let rows = rows_of(OP, x.len(), d)?;
    same(OP, "elements", "dy", dy.len(), "x", x.len())?;
    same(OP, "elements", "dx", dx.len(), "x", x.len())?;
    if let Some(dw) = &dweight {
        same(OP, "elements", "dweight", dw.len(), "weight", d)?;
    }
    let isa = isa.min(Isa::detect());
    let blocks = rows.div_ceil(GRAD_ROWS);
    let mut sums = vec![0f32; if dweight.is_some() { blocks * d } else { 0 }];
    let (dst, part) = (Shared(dx.as_mut_ptr()), Shared(sums.as_mut_ptr()));
    let wanted = dweight.is_some();
    over_rows(blocks, GRAD_ROWS * d, |range| {
        for b in range {
            let sum = if wanted { part.at(b * d) } else { std::ptr::null_mut() };
            for r in b * GRAD_ROWS..((b + 1) * GRAD_ROWS).min(rows) {
                let row = r * d..(r + 1) * d;
                // SAFETY: rows of `d` elements inside the slices; workers have blocks of their own, and `sum` is null
                // or the block's `d` elements of `sums`.
                unsafe { norm_row_back(isa, &x[row.clone()], weight, eps, &dy[row], dst.at(r * d), sum) };
            }
        }
    });
    if let Some(dw) = dweight {
        let mut total = vec![0f64; d];
        for sums in sums.chunks_exact(d) {
            total.iter_mut().zip(sums).for_each(|(t, s)| *t += f64::from(*s));
        }
        dw.iter_mut().zip(total).for_each(|(o, t)| *o = t as f32);
    }
    Ok(work(x.len(), if wanted { 11 } else { 8 }, 3 * x.len()))
}

/// Lanes of a partial sum: enough chains to hide the latency of the additions.
const CHAINS: usize = 4;

#[inline(always)]
unsafe fn norm_row_on<S: Simd>(x: *const f32, out: *mut f32, weight: &[f32], eps: f32) {
    // SAFETY: x, weight and out have `d` elements; vector loops stay below `d`.
    unsafe {
        let d = weight.len();
        let mut sums = [S::splat(0.0); CHAINS];
        let mut i = 0;
        while i + CHAINS * S::LANES <= d {
            for c in 0..CHAINS {
                let v = S::load(x.add(i + c * S::LANES));
                sums[c] = S::fma(v, v, sums[c]);
            }
            i += CHAINS * S::LANES;
        }
        let mut lanes = [0f32; 16];
        S::store(lanes.as_mut_ptr(), S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        let mut sum: f32 = lanes.iter().sum();
        for j in i..d {
            sum += *x.add(j) * *x.add(j);
        }
        let factor = 1.0 / (sum / d as f32 + eps).sqrt();
        let f = S::splat(factor);
        let mut i = 0;
        while i + S::LANES <= d {
            S::store(out.add(i), S::mul(S::mul(S::load(x.add(i)), f), S::load(weight.as_ptr().add(i))));
            i += S::LANES;
        }
        for j in i..d {
            *out.add(j) = *x.add(j) * factor * weight[j];
        }
    }
}

#[inline(always)]
unsafe fn add_row_on<S: Simd>(x: *mut f32, delta: *const f32, n: usize) {
    // SAFETY: both have `n` elements.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(x.add(i), S::add(S::load(x.add(i)), S::load(delta.add(i))));
            i += S::LANES;
        }
        for j in i..n {
            *x.add(j) += *delta.add(j);
        }
    }
}

#[inline(always)]
unsafe fn rotate_halves_on<S: Simd>(x: *const f32, out: *mut f32, cos: &[f32], sin: &[f32]) {
    // SAFETY: x and out have 2 · half elements; both of a pair are read before either is written, so
    // they may be the same memory.
    unsafe {
        let half = cos.len();
        let mut i = 0;
        while i + S::LANES <= half {
            let (a, b) = (S::load(x.add(i)), S::load(x.add(i + half)));
            let (c, s) = (S::load(cos.as_ptr().add(i)), S::load(sin.as_ptr().add(i)));
            S::store(out.add(i), S::sub(S::mul(a, c), S::mul(b, s)));
            S::store(out.add(i + half), S::fma(b, c, S::mul(a, s)));
            i += S::LANES;
        }
        for j in i..half {
            let (a, b) = (*x.add(j), *x.add(j + half));
            *out.add(j) = a * cos[j] - b * sin[j];
            *out.add(j + half) = b * cos[j] + a * sin[j];
        }
    }
}

/// Plain code: the compiler turns it into shuffles of the instruction set it is inlined into.
#[inline(always)]
unsafe fn rotate_pairs_on<S: Simd>(x: *const f32, out: *mut f32, cos: &[f32], sin: &[f32]) {
    const STEP: usize = 16;
    let half = cos.len();
    let mut i = 0;
    // SAFETY: x and out have 2 · half elements; a block is read whole before it is written, so they
    // may be the same memory.
    unsafe {
        while i + STEP <= half {
            let v = x.add(2 * i).cast::<[[f32; 2]; STEP]>().read_unaligned();
            let mut y = [[0f32; 2]; STEP];
            for j in 0..STEP {
                let (c, s) = (cos[i + j], sin[i + j]);
                y[j] = [v[j][0] * c - v[j][1] * s, v[j][1] * c + v[j][0] * s];
            }
            out.add(2 * i).cast::<[[f32; 2]; STEP]>().write_unaligned(y);
            i += STEP;
        }
        for j in i..half {
            let (a, b) = (*x.add(2 * j), *x.add(2 * j + 1));
            *out.add(2 * j) = a * cos[j] - b * sin[j];
            *out.add(2 * j + 1) = b * cos[j] + a * sin[j];
        }
    }
}

#[inline(always)]
unsafe fn silu_times<S: Simd>(g: S::V, u: S::V) -> S::V {
    // SAFETY: passed on. e^88 is finite; g stands second in `max`, which hands a NaN through.
    unsafe {
        let e = exp::<S>(S::sub(S::splat(0.0), S::max(S::splat(-88.0), g)));
        S::mul(S::div(g, S::add(S::splat(1.0), e)), u)
    }
}

#[inline(always)]
unsafe fn swiglu_row_on<S: Simd>(g: *const f32, u: *const f32, out: *mut f32, n: usize) {
    // SAFETY: all have `n` elements; the tail goes through buffers of a full vector.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(out.add(i), silu_times::<S>(S::load(g.add(i)), S::load(u.add(i))));
            i += S::LANES;
        }
        if i < n {
            let (mut a, mut b) = ([0f32; 16], [0f32; 16]);
            std::ptr::copy_nonoverlapping(g.add(i), a.as_mut_ptr(), n - i);
            std::ptr::copy_nonoverlapping(u.add(i), b.as_mut_ptr(), n - i);
            let y = silu_times::<S>(S::load(a.as_ptr()), S::load(b.as_ptr()));
            S::store(a.as_mut_ptr(), y);
            std::ptr::copy_nonoverlapping(a.as_ptr(), out.add(i), n - i);
        }
    }
}

#[inline(always)]
unsafe fn softmax_row_on<S: Simd>(x: *mut f32, n: usize) {
    // SAFETY: `x` has `n` elements; the tail goes through a buffer of a full vector.
    unsafe {
        let mut top = S::splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i + S::LANES <= n {
            top = S::max(S::load(x.add(i)), top);
            i += S::LANES;
        }
        let whole = i;
        let mut tail = [f32::NEG_INFINITY; 16];
        std::ptr::copy_nonoverlapping(x.add(whole), tail.as_mut_ptr(), n - whole);
        let mut lanes = [f32::NEG_INFINITY; 16];
        S::store(lanes.as_mut_ptr(), top);
        let top = lanes.iter().chain(&tail).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        if top == f32::NEG_INFINITY && !(0..n).any(|i| (*x.add(i)).is_nan()) {
            return std::slice::from_raw_parts_mut(x, n).fill(0.0);
        }
        let shift = S::splat(top);
        let mut sums = S::splat(0.0);
        let mut i = 0;
        while i < whole {
            let e = exp::<S>(S::sub(S::load(x.add(i)), shift));
            S::store(x.add(i), e);
            sums = S::add(sums, e);
            i += S::LANES;
        }
        let e = exp::<S>(S::sub(S::load(tail.as_ptr()), shift));
        sums = S::add(sums, e);
        S::store(tail.as_mut_ptr(), e);
        std::ptr::copy_nonoverlapping(tail.as_ptr(), x.add(whole), n - whole);
        let mut lanes = [0f32; 16];
        S::store(lanes.as_mut_ptr(), sums);
        let inv = 1.0 / lanes.iter().sum::<f32>();
        let f = S::splat(inv);
        let mut i = 0;
        while i < whole {
            S::store(x.add(i), S::mul(S::load(x.add(i)), f));
            i += S::LANES;
        }
        for j in whole..n {
            *x.add(j) *= inv;
        }
    }
}

/// Σ x·y, or Σ x·y·z with a `z`, of rows of `n` elements.
#[inline(always)]
unsafe fn sum_of_products<S: Simd>(x: *const f32, y: *const f32, z: Option<*const f32>, n: usize) -> f32 {
    // SAFETY: all rows have `n` elements.
    unsafe {
        let mut sums = [S::splat(0.0); CHAINS];
        let mut i = 0;
        while i + CHAINS * S::LANES <= n {
            for c in 0..CHAINS {
                let at = i + c * S::LANES;
                let mut v = S::load(x.add(at));
                if let Some(z) = z {
                    v = S::mul(v, S::load(z.add(at)));
                }
                sums[c] = S::fma(v, S::load(y.add(at)), sums[c]);
            }
            i += CHAINS * S::LANES;
        }
        let mut sum = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        for j in i..n {
            sum += *x.add(j) * z.map_or(1.0, |z| *z.add(j)) * *y.add(j);
        }
        sum
    }
}

#[inline(always)]
unsafe fn softmax_row_back_on<S: Simd>(y: &[f32], dy: &[f32], dx: *mut f32) {
    // SAFETY: all rows have as many elements as `y`; vector loops stay below that.
    unsafe {
        let n = y.len();
        let (y, dy) = (y.as_ptr(), dy.as_ptr());
        let sum = sum_of_products::<S>(y, dy, None, n);
        let s = S::splat(sum);
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(dx.add(i), S::mul(S::load(y.add(i)), S::sub(S::load(dy.add(i)), s)));
            i += S::LANES;
        }
        for j in i..n {
            *dx.add(j) = *y.add(j) * (*dy.add(j) - sum);
        }
    }
}

/// `sum` is null or takes f·x·dy.
#[inline(always)]
unsafe fn norm_row_back_on<S: Simd>(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: *mut f32, sum: *mut f32) {
    // SAFETY: all rows have as many elements as `x`; vector loops stay below that.
    unsafe {
        let n = x.len();
        let (x, w, dy) = (x.as_ptr(), weight.as_ptr(), dy.as_ptr());
        let factor = 1.0 / (sum_of_products::<S>(x, x, None, n) / n as f32 + eps).sqrt();
        let lean = -factor * factor * factor / n as f32 * sum_of_products::<S>(x, dy, Some(w), n);
        let (f, l) = (S::splat(factor), S::splat(lean));
        let mut i = 0;
        while i + S::LANES <= n {
            let (xv, g) = (S::load(x.add(i)), S::mul(S::load(dy.add(i)), f));
            S::store(dx.add(i), S::fma(xv, l, S::mul(g, S::load(w.add(i)))));
            if !sum.is_null() {
                S::store(sum.add(i), S::fma(xv, g, S::load(sum.add(i))));
            }
            i += S::LANES;
        }
        for j in i..n {
            let g = *dy.add(j) * factor;
            *dx.add(j) = *x.add(j) * lean + g * *w.add(j);
            if !sum.is_null() {
                *sum.add(j) += *x.add(j) * g;
            }
        }
    }
}

with_isa!(simd, unsafe fn norm_row => norm_row_on(x: *const f32, out: *mut f32, weight: &[f32], eps: f32));
with_isa!(simd, unsafe fn add_row => add_row_on(x: *mut f32, delta: *const f32, n: usize));
with_isa!(simd, unsafe fn rotate_halves => rotate_halves_on(x: *const f32, out: *mut f32, cos: &[f32], sin: &[f32]));
with_isa!(simd, unsafe fn rotate_pairs => rotate_pairs_on(x: *const f32, out: *mut f32, cos: &[f32], sin: &[f32]));
with_isa!(simd, unsafe fn swiglu_row => swiglu_row_on(g: *const f32, u: *const f32, out: *mut f32, n: usize));
with_isa!(simd, unsafe fn softmax_row => softmax_row_on(x: *mut f32, n: usize));
with_isa!(simd, unsafe fn softmax_row_back => softmax_row_back_on(y: &[f32], dy: &[f32], dx: *mut f32));
with_isa!(simd, unsafe fn norm_row_back => norm_row_back_on(
    x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: *mut f32, sum: *mut f32,
));
