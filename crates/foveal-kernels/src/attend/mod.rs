//! Exact attention, dense or over a block table.
//!
//! [`Attend::run`] checks the call and hands it to `drive`, which cuts it into tasks (one tile of
//! queries of one head), lists the keys each task visits (`scope`), and feeds them in tiles to the
//! microkernels in `strip`. [`Attend::backward`] does the same in `backward` and `grad`. A ragged batch is as
//! many calls as it has sequences, whose tasks are done together.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_sigmoid;
pub(crate) mod backward;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod backward_amx;
mod bias;
mod bias_sums;
pub(crate) mod drive;
mod grad;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod packed;
mod ragged;
mod scope;
mod strip;

use crate::error::{KernelError, Result};
use crate::isa::Isa;
use crate::table::BlockTable;
use crate::view::{Element, View, ViewMut};
use crate::work::Work;
pub use backward::{AttendGrads, Upstream};
pub use bias::Bias;
pub use bias_sums::BiasGrad;
pub use ragged::CuSeqlens;
pub(crate) use scope::Source;

/// Keys near a query: with the query's own position p = m − n + i (query i of n, m keys), the `left` keys up to p,
/// p included, and the `right` keys after it. flash-attention's `window_size = (l, r)` is a band of l + 1 and r.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// Keys at the query's own position and before it; `usize::MAX` for all.
    pub left: usize,
    /// Keys after it; `usize::MAX` for all.
    pub right: usize,
}

impl Band {
    /// `keys` in all, the query's own included and none after it.
    pub fn window(keys: usize) -> Self {
        Self { left: keys, right: 0 }
    }
}

/// How scores become weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Normalizer {
    /// e^s over its sum.
    #[default]
    Softmax,
    /// 1 / (1 + e^−(s + bias)), each key by itself, of which there is no sum, hence no log-sum-exp and no
    /// sinks (sigmoid attention: Ramapuram et al. 2024, arXiv 2409.04431; bias is −ln of the number of keys there).
    Sigmoid {
        /// Added to each score.
        bias: f32,
    },
}

impl Normalizer {
    /// The bias of the sigmoid, if it is one.
    pub(crate) fn sigmoid(self) -> Option<f32> {
        match self {
            Normalizer::Softmax => None,
            Normalizer::Sigmoid { bias } => Some(bias),
        }
    }
}

/// Parameters of one attention call. Build with [`Attend::new`] and the chained setters.
#[derive(Clone)]
pub struct Attend<'a> {
    /// Factor on q·k.
    pub scale: f32,
    /// Query i of n sees keys up to m − n + i (bottom-right).
    pub causal: bool,
    /// Only keys near the query; with `causal` those of them that are not later.
    pub band: Option<Band>,
    /// `cap * tanh(s / cap)` on the scaled score.
    pub softcap: Option<f32>,
    /// One logit per query head added to the denominator only.
    pub sinks: Option<&'a [f32]>,
    /// Added to scores.
    pub bias: Option<Bias<'a>>,
    /// Factor β > 1 (2 to 8) that keeps weights before their division from being exactly 1 where a row's maximum is
    /// repeated: the reference it is measured against becomes β times it, or 0 if it is negative. Sums of values
    /// with weights of 1, rounded to bf16, err to one side (Qiu and Yao 2025, arXiv 2510.04212; β is 2 in their
    /// code, which also calls scores within 1e-3 of the maximum repeated). Here only weights are bf16 and sums are
    /// f32, so there is no such error to mend; where weights are f32, too, this does nothing. Shifts of over 8 are
    /// taken into 4..8, where the source would underflow.
    pub repeated_max: Option<f32>,
    /// How scores become weights.
    pub normalizer: Normalizer,
    /// Visit only these blocks; one table a (batch, query head), in a ragged batch a (sequence, query head), whose
    /// blocks count from the first query and key of the sequence.
    pub table: Option<&'a BlockTable>,
    /// Sequences of a ragged batch, for operands of batch 1.
    pub cu_seqlens: Option<CuSeqlens<'a>>,
    /// Instruction set.
    pub isa: Isa,
}

impl<'a> Attend<'a> {
    /// Dense attention without a mask.
    pub fn new(scale: f32) -> Self {
        Self {
            scale,
            causal: false,
            band: None,
            softcap: None,
            sinks: None,
            bias: None,
            repeated_max: None,
            normalizer: Normalizer::Softmax,
            table: None,
            cu_seqlens: None,
            isa: Isa::active(),
        }
    }
    /// Set causality.
    pub fn causal(mut self, on: bool) -> Self {
        self.causal = on;
        self
    }
    /// Set the band.
    pub fn band(mut self, band: Option<Band>) -> Self {
        self.band = band;
        self
    }
    /// Set the band to a window of so many keys in all, the query's own included.
    pub fn window(self, keys: Option<usize>) -> Self {
        self.band(keys.map(Band::window))
    }
    /// Set the sequences of a ragged batch.
    pub fn cu_seqlens(mut self, bounds: Option<CuSeqlens<'a>>) -> Self {
        self.cu_seqlens = bounds;
        self
    }
    /// Set the block table.
    pub fn table(mut self, t: Option<&'a BlockTable>) -> Self {
        self.table = t;
        self
    }
    /// Set the bias.
    pub fn bias(mut self, bias: Option<Bias<'a>>) -> Self {
        self.bias = bias;
        self
    }
    /// Set how scores become weights.
    pub fn normalizer(mut self, normalizer: Normalizer) -> Self {
        self.normalizer = normalizer;
        self
    }
    /// Set the instruction set.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Run: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) into out (B,H,Tq,Dv) and,
    /// if given, `lse` (B,H,Tq contiguous; natural log; −∞ for a row that sees no key;
    /// of the weights as they are used: on AMX tiles they are rounded to bf16).
    /// A row that sees no key is zero. With a sigmoid there is no log-sum-exp: asking for it is an error.
    pub fn run<T: Element>(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        out: &mut ViewMut<f32>,
        lse: Option<&mut [f32]>,
    ) -> Result<Work> {
        check_shapes("attend", q.shape, k.shape, v.shape, out.shape)?;
        drive::run("attend", self, self.source(), q, k, v, out, lse)
    }

    /// Gradients of [`Attend::run`] with the same parameters and operands, from what it returned and the
    /// gradients of a loss in that: exact, in memory linear in tokens, the same whatever the threads.
    ///
    /// Sums are f32. Of bf16 operands on AMX tiles, what enters a product is rounded to bf16: `dout`, weights, and
    /// gradients of scores; elsewhere they are widened. A row that sees no key (log-sum-exp −∞) gives and
    /// gets zero. Work counts five products a visited pair.
    pub fn backward<T: Element>(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        up: &Upstream,
        grads: AttendGrads,
    ) -> Result<Work> {
        const OP: &str = "attend_backward";
        check_shapes(OP, q.shape, k.shape, v.shape, up.out.shape)?;
        backward::run(OP, self, self.source(), [q, k, v], up, grads)
    }

    /// All keys, or those of the table.
    fn source(&self) -> Source<'_> {
        self.table.map_or(Source::Dense, |t| Source::Table(&t.heads))
    }
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
