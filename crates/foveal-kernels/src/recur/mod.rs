//! Linear recurrences over a matrix state, in chunks, forward and backward.
//!
//! For each (sequence, head), with a state S of shape (D, Dv):
//!
//! ```text
//! S_t = A_t S_{t−1} + k_tᵀ v_t        o_t = scale · q_t S_t
//! ```
//!
//! [`Gate`] says what A_t is: identity (linear attention), scalar decay (RetNet, Mamba-2), decay by
//! channel (GLA), delta rule (DeltaNet), both (Gated DeltaNet, Kimi Delta Attention), diagonal plus low
//! rank (RWKV-7), or one decay for every element of the state (Mamba). Log decays g ≤ 0 come in, not
//! their exponentials, and only exponentials of sums g_{j+1} + … + g_t are taken: a long or strongly
//! decaying chunk loses nothing that matters and overflows nowhere.
//!
//! [`Recur::forward`] works on chunks of 64 tokens with matrix products inside (see `chunk`) and needs
//! memory for one chunk and one state a thread, however long the sequence. [`Recur::backward`] keeps
//! besides one state a chunk of each sequence and head in work. [`Recur::step`] goes token by token and
//! updates the state in place. The token by token definition is in [`twin`].
//!
//! bf16 inputs are multiplied in bf16 on AMX tiles where the machine has them: operands of products
//! (decayed keys, scores, states) are rounded to bf16; sums, states and the triangular systems are
//! f32. Everything else is computed in f32.

mod chunk;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod fast;
mod mat;
mod rows;
mod scan;
mod step;
mod tiles;
pub mod twin;

use crate::error::{KernelError, Result, same};
use crate::isa::Isa;
use crate::view::{Element, Rows, View, ViewMut};
use crate::work::Work;
use chunk::{CHUNK, Chunk, Decay, Rule};
use mat::{Engine, Mat, Ref};
use rayon::prelude::*;
use std::any::TypeId;
use std::ops::Range;

const OP: &str = "recur";

/// Columns of the state that a task takes are a multiple of this: two tiles.
const BLOCK: usize = 32;

/// The transition A_t, and the factor on what is written. H is the number of heads of the output; every
/// operand may have any number of heads that divides H, and head h reads operand head h / (H / heads).
///
/// A column of the state is one value channel. `⊙` scales the rows of the state.
#[derive(Clone, Copy)]
pub enum Gate<'a, T> {
    /// S_t = S_{t−1} + k vᵀ (Katharopoulos et al. 2020, arXiv 2006.16236).
    Identity,
    /// S_t = e^g S_{t−1} + k vᵀ with one g a token (RetNet, arXiv 2307.08621; Lightning Attention-2, arXiv
    /// 2401.04658).
    Scalar {
        /// (B, heads, T, 1), ≤ 0.
        g: View<'a, f32>,
    },
    /// S_t = e^g ⊙ S_{t−1} + k vᵀ with g by key channel (GLA: Yang et al. 2023, arXiv 2312.06635).
    Channel {
        /// (B, heads, T, D), ≤ 0.
        g: View<'a, f32>,
    },
    /// S_t = (I − β k kᵀ) S_{t−1} + β k vᵀ (DeltaNet: Yang et al. 2024, arXiv 2406.06484).
    Delta {
        /// (B, heads, T, 1).
        beta: View<'a, f32>,
    },
    /// S_t = e^g (I − β k kᵀ) S_{t−1} + β k vᵀ (Gated DeltaNet: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464).
    GatedDelta {
        /// (B, heads, T, 1), ≤ 0.
        g: View<'a, f32>,
        /// (B, heads, T, 1).
        beta: View<'a, f32>,
    },
    /// S_t = (I − β k kᵀ) (e^g ⊙ S_{t−1}) + β k vᵀ with g by key channel (Kimi Delta Attention: Kimi Team 2025, arXiv
    /// 2510.26692).
    ChannelDelta {
        /// (B, heads, T, D), ≤ 0.
        g: View<'a, f32>,
        /// (B, heads, T, 1).
        beta: View<'a, f32>,
    },
    /// S_t = (diag(e^g) + a bᵀ) S_{t−1} + k vᵀ: b reads before the decay, a writes (RWKV-7: Peng et al. 2025, arXiv
    /// 2503.14456, with b = κ̂ and a = −κ̂ ⊙ its in-context learning rate).
    LowRank {
        /// (B, heads, T, D), ≤ 0.
        g: View<'a, f32>,
        /// (B, heads, T, D).
        a: View<'a, T>,
        /// (B, heads, T, D).
        b: View<'a, T>,
    },
    /// S_t = e^{dt·a} S_{t−1} + dt k vᵀ with a fixed a ≤ 0 by head, k = B, q = C, v = x (Mamba-2: Dao and Gu 2024, arXiv
    /// 2405.21060).
    Ssd {
        /// (B, heads, T, 1), ≥ 0.
        dt: View<'a, f32>,
        /// (H).
        a: &'a [f32],
    },
    /// `S_t[n, c] = e^{dt[c]·a[c, n]} S_{t−1}[n, c] + dt[c] k[n] v[c]` with dt by value channel, k = B, q = C, v = x (selective
    /// scan of Mamba: Gu and Dao 2023, arXiv 2312.00752).
    Selective {
        /// (B, heads, T, Dv), ≥ 0.
        dt: View<'a, f32>,
        /// (H, Dv, D), ≤ 0.
        a: &'a [f32],
    },
}

/// A recurrence call. Build with [`Recur::new`] and the chained setters.
///
/// ```
/// use foveal_kernels::recur::{Gate, Recur};
/// use foveal_kernels::{View, ViewMut};
/// // Two tokens, D = Dv = 1: S = 2·3, then ½·6 + 1·1.
/// let g = [0.0, 0.5f32.ln()];
/// let g = View::contiguous("g", &g, [1, 1, 2, 1])?;
/// let (q, k, v) = ([1.0f32, 1.0], [2.0f32, 1.0], [3.0f32, 1.0]);
/// let [q, k, v] = [&q, &k, &v].map(|x| View::contiguous("qkv", x, [1, 1, 2, 1]).unwrap());
/// let mut out = [0.0; 2];
/// let mut o = ViewMut::contiguous("out", &mut out, [1, 1, 2, 1])?;
/// Recur::new(Gate::Scalar { g }, 1.0).forward(&q, &k, &v, None, &mut o, None)?;
/// assert_eq!(out, [6.0, 4.0]);
/// # Ok::<(), foveal_kernels::KernelError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Recur<'a, T> {
    /// The transition.
    pub gate: Gate<'a, T>,
    /// Factor on q.
    pub scale: f32,
    /// Ragged batch: sequence i is tokens `cu_seqlens[i]..cu_seqlens[i + 1]` of a batch of 1.
    pub cu_seqlens: Option<&'a [u32]>,
    /// Instruction set.
    pub isa: Isa,
}

/// Gradients, each contiguous in the shape of its operand; empty where the gate lacks the operand.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RecurGrads {
    /// (B, heads of q, T, D).
    pub q: Vec<f32>,
    /// (B, heads of k, T, D).
    pub k: Vec<f32>,
    /// (B, heads of v, T, Dv).
    pub v: Vec<f32>,
    /// As the gate's `g`.
    pub g: Vec<f32>,
    /// As the gate's `beta`.
    pub beta: Vec<f32>,
    /// As the gate's `a`.
    pub a: Vec<f32>,
    /// As the gate's `b`.
    pub b: Vec<f32>,
    /// As the gate's `dt`.
    pub dt: Vec<f32>,
    /// (sequences, H, D, Dv).
    pub initial: Vec<f32>,
}

/// A checked call: sizes, and where each sequence lies.
struct Plan {
    /// (batch, tokens) of each sequence.
    sequences: Vec<(usize, Range<usize>)>,
    heads: usize,
    d: usize,
    dv: usize,
}

/// The operand head that output head `h` of `heads` reads.
fn shared(operand_heads: usize, heads: usize, h: usize) -> usize {
    h / (heads / operand_heads)
}

impl<'a, T: Element> Gate<'a, T> {
    /// Decay, rule and whether what is written has a factor; none for the selective scan.
    fn kind(&self) -> Option<(Decay, Rule, bool)> {
        Some(match self {
            Gate::Identity => (Decay::None, Rule::Add, false),
            Gate::Scalar { .. } => (Decay::Scalar, Rule::Add, false),
            Gate::Channel { .. } => (Decay::Channel, Rule::Add, false),
            Gate::Delta { .. } => (Decay::None, Rule::Delta, true),
            Gate::GatedDelta { .. } => (Decay::Scalar, Rule::Delta, true),
            Gate::ChannelDelta { .. } => (Decay::Channel, Rule::Delta, true),
            Gate::LowRank { .. } => (Decay::Channel, Rule::LowRank, false),
            Gate::Ssd { .. } => (Decay::Scalar, Rule::Add, true),
            Gate::Selective { .. } => return None,
        })
    }

    fn g(&self) -> Option<&View<'a, f32>> {
        match self {
            Gate::Scalar { g } | Gate::Channel { g } | Gate::LowRank { g, .. } => Some(g),
            Gate::GatedDelta { g, .. } | Gate::ChannelDelta { g, .. } => Some(g),
            _ => None,
        }
    }

    fn beta(&self) -> Option<&View<'a, f32>> {
        match self {
            Gate::Delta { beta } | Gate::GatedDelta { beta, .. } | Gate::ChannelDelta { beta, .. } => Some(beta),
            _ => None,
        }
    }

    fn dt(&self) -> Option<&View<'a, f32>> {
        match self {
            Gate::Ssd { dt, .. } | Gate::Selective { dt, .. } => Some(dt),
            _ => None,
        }
    }

    /// f32 of the gate that one token of one head reads.
    fn width(&self, d: usize, dv: usize) -> usize {
        match self {
            Gate::Identity => 0,
            Gate::Scalar { .. } | Gate::Delta { .. } | Gate::Ssd { .. } => 1,
            Gate::GatedDelta { .. } => 2,
            Gate::Channel { .. } | Gate::LowRank { .. } => d,
            Gate::ChannelDelta { .. } => d + 1,
            Gate::Selective { .. } => dv,
        }
    }

    fn check(&self, [b, h, t, d, dv]: [usize; 5]) -> Result<()> {
        let by_channel = matches!(self, Gate::Channel { .. } | Gate::ChannelDelta { .. } | Gate::LowRank { .. });
        let view = |what, shape: [usize; 4], width| check_operand(what, shape, [b, h, t, width]);
        if let Some(g) = self.g() {
            view("g", g.shape, if by_channel { d } else { 1 })?;
        }
        if let Some(beta) = self.beta() {
            view("beta", beta.shape, 1)?;
        }
        match self {
            Gate::LowRank { a, b, .. } => {
                view("a", a.shape, d)?;
                view("b", b.shape, d)
            }
            Gate::Ssd { dt, a } => {
                view("dt", dt.shape, 1)?;
                same(OP, "heads", "a", a.len(), "out", h)
            }
            Gate::Selective { dt, a } => {
                view("dt", dt.shape, dv)?;
                same(OP, "heads*value_dim*key_dim", "a", a.len(), "out, v and k", h * dv * d)
            }
            _ => Ok(()),
        }
    }
}

fn check_operand(what: &'static str, shape: [usize; 4], [b, h, t, width]: [usize; 4]) -> Result<()> {
    same(OP, "batch", what, shape[0], "out", b)?;
    same(OP, "tokens", what, shape[2], "out", t)?;
    same(OP, "width", what, shape[3], "its gate or partner", width)?;
    if shape[1] == 0 || !h.is_multiple_of(shape[1]) {
        return Err(KernelError::Groups { op: OP, heads: h, kv_heads: shape[1] });
    }
    Ok(())
}

impl<'a, T: Element> Recur<'a, T> {
    /// A recurrence with factor `scale` on q (1/√D is usual), on the active instruction set.
    pub fn new(gate: Gate<'a, T>, scale: f32) -> Self {
        Recur { gate, scale, cu_seqlens: None, isa: Isa::active() }
    }

    /// Set the bounds of a ragged batch: 0, rising, and last the number of tokens.
    pub fn cu_seqlens(mut self, bounds: Option<&'a [u32]>) -> Self {
        self.cu_seqlens = bounds;
        self
    }

    /// Set the instruction set.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    fn plan(&self, q: [usize; 4], k: [usize; 4], v: [usize; 4], out: [usize; 4]) -> Result<Plan> {
        let [b, h, t, dv] = out;
        let d = q[3];
        check_operand("q", q, [b, h, t, d])?;
        check_operand("k", k, [b, h, t, d])?;
        check_operand("v", v, [b, h, t, dv])?;
        self.gate.check([b, h, t, d, dv])?;
        if !self.scale.is_finite() {
            return Err(KernelError::Param {
                op: OP,
                name: "scale",
                value: self.scale.to_string(),
                remedy: "use a finite factor, such as 1/sqrt(D)".into(),
            });
        }
        let sequences = match self.cu_seqlens {
            None => (0..b).map(|b| (b, 0..t)).collect(),
            Some(cu) => {
                let good = cu.first() == Some(&0)
                    && cu.last().is_some_and(|&last| last as usize == t)
                    && cu.is_sorted()
                    && b == 1;
                if !good {
                    return Err(KernelError::Param {
                        op: OP,
                        name: "cu_seqlens",
                        value: format!("{} bounds ending in {:?} for batch {b}, {t} tokens", cu.len(), cu.last()),
                        remedy: "use batch 1 and bounds that start at 0, never fall and end at the number of tokens"
                            .into(),
                    });
                }
                cu.windows(2).map(|w| (0, w[0] as usize..w[1] as usize)).collect()
            }
        };
        Ok(Plan { sequences, heads: h, d, dv })
    }

    /// q (B, Hq, T, D), k (B, Hk, T, D), v (B, Hv, T, Dv) into `out` (B, H, T, Dv). Head counts divide H. States are
    /// contiguous (sequences, H, D, Dv): `initial` is the state before the first token (zero if none), `last` receives
    /// the one after the last; sequences are the batch, or those of `cu_seqlens`. A sequence without tokens hands its
    /// state through.
    ///
    /// Errors: shapes that do not fit together; nothing is written then.
    pub fn forward(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        initial: Option<&[f32]>,
        out: &mut ViewMut<f32>,
        last: Option<&mut [f32]>,
    ) -> Result<Work> {
        let p = self.plan(q.shape, k.shape, v.shape, out.shape)?;
        let size = p.d * p.dv;
        check_state("initial", initial.map(<[f32]>::len), &p)?;
        check_state("last", last.as_deref().map(<[f32]>::len), &p)?;
        let last = last.map(Shared::new);
        let x = Inputs::new(self, &p, q, k, v);
        let out = out.rows();
        if self.gate.kind().is_none() {
            return Ok(scan::forward(&x, initial, &out, last.as_ref()));
        }
        let tasks = p.sequences.len() * p.heads;
        // Columns of the state know nothing of each other: where heads are fewer than threads, a task is a block
        // of them, computed as in the whole (scores are computed again). Each column's sums stay as they are, so
        // that threads do not change the result.
        let blocks = match rayon::current_num_threads().div_ceil(tasks.max(1)) {
            0 | 1 => 1,
            want => want.min(p.dv.div_ceil(BLOCK)),
        };
        let width = p.dv.div_ceil(blocks.max(1)).next_multiple_of(BLOCK);
        let run = |task: usize| {
            let (task, block) = (task / blocks, task % blocks);
            let cols = (block * width).min(p.dv)..((block + 1) * width).min(p.dv);
            if block > 0 && cols.is_empty() {
                return Work::default();
            }
            let (i, h) = (task / p.heads, task % p.heads);
            let state = initial.map(|s| &s[task * size..][..size]);
            let x = Inputs { cols: cols.clone(), ..x };
            // SAFETY: one task for each (sequence, head) and columns: its part of rows and state is nobody else's.
            let work = unsafe {
                let last =
                    |row: usize| last.as_ref().map(|s| s.part(task * size + row * p.dv + cols.start, cols.len()));
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                if x.suits_fast() {
                    x.forward_fast(i, h, state, &out, last)
                } else {
                    x.forward(i, h, state, Some(&out), last, None)
                }
                #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
                x.forward(i, h, state, Some(&out), last, None)
            };
            // Work does not depend on threads: the first block tells that of the head.
            if block == 0 { work } else { Work::default() }
        };
        Ok((0..tasks * blocks).into_par_iter().with_max_len(1).map(run).sum())
    }

    /// Gradients of all inputs for `dout` (B, H, T, Dv) and `dlast`, the gradient of the final state (sequences, H, D, Dv;
    /// zero if none). Inputs as in [`Recur::forward`]. Keeps one state a chunk of 64 tokens for each sequence and head in
    /// work, and, for an operand whose heads are shared, its gradient by output head.
    ///
    /// Errors: shapes that do not fit together.
    pub fn backward(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        initial: Option<&[f32]>,
        dout: &View<f32>,
        dlast: Option<&[f32]>,
    ) -> Result<(RecurGrads, Work)> {
        let p = self.plan(q.shape, k.shape, v.shape, dout.shape)?;
        check_state("initial", initial.map(<[f32]>::len), &p)?;
        check_state("dlast", dlast.map(<[f32]>::len), &p)?;
        let x = Inputs::new(self, &p, q, k, v);
        if self.gate.kind().is_none() {
            return Ok(scan::backward(&x, initial, dout, dlast));
        }
        let (size, [b, h, t, dv], d) = (p.d * p.dv, dout.shape, p.d);
        let second = matches!(self.gate, Gate::LowRank { .. });
        let ssd = matches!(self.gate, Gate::Ssd { .. });
        let room = |width: usize| vec![0f32; b * h * t * width];
        let some = |on: bool, width: usize| if on { (room(width), width) } else { (Vec::new(), 0) };
        let (mut dq, mut dk, mut dvs) = (room(d), room(d), room(dv));
        let (mut da, a_width) = some(second, d);
        let (mut db, _) = some(second, d);
        let (mut dg, g_width) = some(self.gate.g().is_some(), self.gate.g().map_or(0, |g| g.shape[3]));
        let (mut dbeta, beta_width) = some(self.gate.beta().is_some(), 1);
        let (mut ddt, dt_width) = some(ssd, 1);
        let mut dinitial = vec![0f32; p.sequences.len() * h * size];
        // Of Ssd's a: one sum a (sequence, head).
        let mut da_sums = vec![0f32; p.sequences.len() * h];
        let work = {
            let to = Outputs {
                q: Shared::new_rows(&mut dq, t, d),
                k: Shared::new_rows(&mut dk, t, d),
                v: Shared::new_rows(&mut dvs, t, dv),
                a: Shared::new_rows(&mut da, t, a_width),
                b: Shared::new_rows(&mut db, t, a_width),
                g: Shared::new_rows(&mut dg, t, g_width),
                beta: Shared::new_rows(&mut dbeta, t, beta_width),
                dt: Shared::new_rows(&mut ddt, t, dt_width),
            };
            let (states, sums) = (Shared::new(&mut dinitial), Shared::new(&mut da_sums));
            let run = |task: usize| {
                let (i, hi) = (task / h, task % h);
                let at = task * size;
                let initial = initial.map(|s| &s[at..at + size]);
                let dlast = dlast.map(|s| &s[at..at + size]);
                // SAFETY: one task a (sequence, head): its rows and its state are nobody else's.
                unsafe { x.backward(i, hi, initial, dout, dlast, &to, states.part(at, size), sums.part(task, 1)) }
            };
            (0..p.sequences.len() * h).into_par_iter().with_max_len(1).map(run).sum()
        };
        let fold = |full: Vec<f32>, heads: usize| fold_heads(full, b, h, heads);
        let mut r = RecurGrads {
            q: fold(dq, q.shape[1]),
            k: fold(dk, k.shape[1]),
            v: fold(dvs, v.shape[1]),
            initial: dinitial,
            ..RecurGrads::default()
        };
        if let Some(g) = self.gate.g() {
            r.g = fold(dg, g.shape[1]);
        }
        if let Some(beta) = self.gate.beta() {
            r.beta = fold(dbeta, beta.shape[1]);
        }
        match &self.gate {
            Gate::LowRank { a, b, .. } => (r.a, r.b) = (fold(da, a.shape[1]), fold(db, b.shape[1])),
            Gate::Ssd { dt, .. } => {
                r.dt = fold(ddt, dt.shape[1]);
                r.a = (0..h).map(|hi| da_sums.iter().skip(hi).step_by(h).sum()).collect();
            }
            _ => {}
        }
        Ok((r, work))
    }

    /// Token by token, for decoding: `out` as in [`Recur::forward`], and `state` (sequences, H, D, Dv) is moved on in
    /// place. In f32 whatever the inputs.
    ///
    /// Errors: shapes that do not fit together; nothing is written then.
    pub fn step(
        &self,
        q: &View<T>,
        k: &View<T>,
        v: &View<T>,
        state: &mut [f32],
        out: &mut ViewMut<f32>,
    ) -> Result<Work> {
        let p = self.plan(q.shape, k.shape, v.shape, out.shape)?;
        check_state("state", Some(state.len()), &p)?;
        let x = Inputs::new(self, &p, q, k, v);
        let out = out.rows();
        let size = p.d * p.dv;
        let isa = self.isa.min(Isa::detect());
        let states = Shared::new(state);
        let run = |task: usize| {
            let (i, h) = (task / p.heads, task % p.heads);
            // SAFETY: one task a (sequence, head): its rows and its state are nobody else's.
            unsafe { step::run(&x, isa, i, h, states.part(task * size, size), &out) }
        };
        let tasks = p.sequences.len() * p.heads;
        // Below this, waking a thread costs more than the work.
        if q.shape[2].saturating_mul(tasks).saturating_mul(size) < 1 << 16 {
            return Ok((0..tasks).map(run).sum());
        }
        Ok((0..tasks).into_par_iter().map(run).sum())
    }
}

fn check_state(what: &'static str, len: Option<usize>, p: &Plan) -> Result<()> {
    let want = p.sequences.len() * p.heads * p.d * p.dv;
    match len {
        None => Ok(()),
        Some(len) => same(OP, "sequences*heads*key_dim*value_dim", what, len, "q, v and out", want),
    }
}

/// (B, H, …) summed over the heads that share one of `heads`.
fn fold_heads(full: Vec<f32>, b: usize, h: usize, heads: usize) -> Vec<f32> {
    if h == heads || full.is_empty() {
        return full;
    }
    let (group, len) = (h / heads, full.len() / (b * h));
    let mut r = vec![0f32; b * heads * len];
    if len > 0 {
        r.par_chunks_exact_mut(len).enumerate().for_each(|(i, to)| {
            for x in full[i * group * len..(i + 1) * group * len].chunks_exact(len) {
                to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
            }
        });
    }
    r
}

/// A slice that tasks write disjoint parts of.
struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    /// Tokens of a head and elements of a token, for [`Shared::token`].
    t: usize,
    width: usize,
    _life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: parts are only handed out through methods whose callers promise that they are disjoint.
unsafe impl Sync for Shared<'_> {}
// SAFETY: a pointer into a uniquely borrowed slice.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(x: &'a mut [f32]) -> Self {
        Self::new_rows(x, 0, 0)
    }
    /// (heads, t, width) memory.
    fn new_rows(x: &'a mut [f32], t: usize, width: usize) -> Self {
        Shared { ptr: x.as_mut_ptr(), len: x.len(), t, width, _life: std::marker::PhantomData }
    }
    /// # Safety
    /// No other reference to these elements may be alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, at: usize, n: usize) -> &mut [f32] {
        assert!(at <= self.len && n <= self.len - at);
        // SAFETY: in bounds; unique by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), n) }
    }
    /// Token `t` of head `bh`, counted over the batch.
    ///
    /// # Safety
    /// As [`Shared::part`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn token(&self, bh: usize, t: usize) -> &mut [f32] {
        // SAFETY: passed on.
        unsafe { self.part((bh * self.t + t) * self.width, self.width) }
    }
}

/// Where the gradients by output head go.
struct Outputs<'a> {
    q: Shared<'a>,
    k: Shared<'a>,
    v: Shared<'a>,
    a: Shared<'a>,
    b: Shared<'a>,
    g: Shared<'a>,
    beta: Shared<'a>,
    dt: Shared<'a>,
}

/// A checked call with its operands, and the value columns of a task.
struct Inputs<'a, T> {
    call: &'a Recur<'a, T>,
    plan: &'a Plan,
    q: &'a View<'a, T>,
    k: &'a View<'a, T>,
    v: &'a View<'a, T>,
    cols: Range<usize>,
}

impl<'a, T: Element> Inputs<'a, T> {
    /// With all columns.
    fn new(call: &'a Recur<'a, T>, plan: &'a Plan, q: &'a View<'a, T>, k: &'a View<'a, T>, v: &'a View<'a, T>) -> Self {
        Inputs { call, plan, q, k, v, cols: 0..plan.dv }
    }

    /// Row of token `t` for output head `h`.
    fn row<'v, E: Copy>(&self, x: &View<'v, E>, b: usize, h: usize, t: usize) -> &'v [E] {
        x.row(b, shared(x.shape[1], self.plan.heads, h), t)
    }

    fn engine(&self) -> Engine {
        let mut eng = Engine::new(self.call.isa, TypeId::of::<T>() == TypeId::of::<half::bf16>());
        // What b reads is written again by a: rounding errors go round.
        eng.split = matches!(self.call.gate, Gate::LowRank { .. });
        eng
    }

    fn room(&self, len: usize, back: bool) -> Chunk {
        let Some((decay, rule, strength)) = self.call.gate.kind() else {
            unreachable!("the selective scan has its own kernel")
        };
        Chunk::new(decay, rule, strength, self.plan.d, self.cols.len(), len, back)
    }

    /// Read a chunk's tokens, and ask for those of the chunk that comes next, from token `next` on.
    fn load(&self, isa: Isa, c: &mut Chunk, b: usize, h: usize, tokens: Range<usize>, next: Option<usize>) {
        let (n, np) = (tokens.len(), tokens.len().next_multiple_of(mat::PAD));
        let part = |to: &mut Mat, x: &View<T>, cols: Range<usize>, f: f32| {
            let (head, line) = (x.head(b, shared(x.shape[1], self.plan.heads, h)), x.strides[2]);
            let row = |t: usize| &head[t * line + cols.start..t * line + cols.end];
            for t in 0..n {
                rows::widen(isa, to.row_mut(t), row(tokens.start + t), f);
                if let Some(next) = next.filter(|next| next + t < x.shape[2]) {
                    rows::ask(row(next + t));
                }
            }
            for t in n..np {
                to.row_mut(t).fill(0.0);
            }
        };
        let d = self.plan.d;
        let fill = |to: &mut Mat, x: &View<T>, f: f32| part(to, x, 0..d, f);
        fill(&mut c.readers[0], self.q, self.call.scale);
        fill(&mut c.writers[0], self.k, 1.0);
        part(&mut c.v, self.v, self.cols.clone(), 1.0);
        match &self.call.gate {
            Gate::LowRank { a, b, .. } => {
                fill(&mut c.writers[1], a, 1.0);
                fill(&mut c.readers[1], b, 1.0);
            }
            Gate::Delta { .. } | Gate::GatedDelta { .. } | Gate::ChannelDelta { .. } => {
                let (k, second) = (&c.writers[0], &mut c.readers[1]);
                second.all_mut()[..np * k.cols].copy_from_slice(&k.all()[..np * k.cols]);
            }
            _ => {}
        }
        let one = |x: &View<f32>, t: usize| self.row(x, b, h, tokens.start + t)[0];
        if let Some(g) = self.call.gate.g() {
            for t in 0..np {
                if c.decay == Decay::Scalar {
                    c.g_row[t] = if t < n { one(g, t) } else { 0.0 };
                } else if t < n {
                    rows::widen(isa, c.g.row_mut(t), self.row(g, b, h, tokens.start + t), 1.0);
                } else {
                    c.g.row_mut(t).fill(0.0);
                }
            }
        }
        if let Some(beta) = self.call.gate.beta() {
            for t in 0..np {
                c.beta[t] = if t < n { one(beta, t) } else { 0.0 };
            }
        }
        if let Gate::Ssd { dt, a } = &self.call.gate {
            for t in 0..np {
                c.beta[t] = if t < n { one(dt, t) } else { 0.0 };
                c.g_row[t] = c.beta[t] * a[h];
            }
        }
    }

    /// One head of one sequence. `last` has the rows of the final state, `kept` receives the state before each chunk
    /// and the last one, padded.
    ///
    /// # Safety
    /// Nobody else holds the columns of the head's rows of `out`.
    unsafe fn forward<'l>(
        &self,
        i: usize,
        h: usize,
        initial: Option<&[f32]>,
        out: Option<&Rows<f32>>,
        last: impl Fn(usize) -> Option<&'l mut [f32]>,
        mut kept: Option<&mut Vec<f32>>,
    ) -> Work {
        let (b, tokens) = &self.plan.sequences[i];
        let (d, dv) = (self.plan.d, self.cols.len());
        let mut eng = self.engine();
        let mut c = self.room(tokens.len(), false);
        let mut s = Mat::new(d, dv);
        self.put_state(initial, |i, row| s.row_mut(i)[..dv].copy_from_slice(row));
        let mut work = Work::default();
        for from in tokens.clone().step_by(CHUNK) {
            let part = from..(from + CHUNK).min(tokens.end);
            self.load(eng.isa, &mut c, *b, h, part.clone(), Some(part.end));
            c.begin(&mut eng, part.len());
            c.values(&mut eng, s.top(s.rows));
            if let Some(out) = out {
                c.output(&mut eng, s.top(s.rows));
                for t in part.clone() {
                    // SAFETY: by this function's contract.
                    unsafe { out.part_mut(*b, h, t, self.cols.clone()) }
                        .copy_from_slice(&c.out.row(t - part.start)[..dv]);
                }
            }
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(s.all());
            }
            c.advance(&mut eng, &mut s, kept.is_some() && c.decay != Decay::None);
            work += self.chunk_work(part.len(), out.is_some());
        }
        if let Some(kept) = kept {
            kept.extend_from_slice(s.all());
        }
        for i in 0..d {
            if let Some(last) = last(i) {
                last.copy_from_slice(&s.row(i)[..dv]);
            }
        }
        work.bytes += 4 * (d * self.plan.dv) as u64 * (u64::from(initial.is_some()) + 1);
        work
    }

    /// Hand each row of a state, the task's columns of it, to `put`.
    fn put_state(&self, state: Option<&[f32]>, mut put: impl FnMut(usize, &[f32])) {
        for (i, row) in state.unwrap_or(&[]).chunks_exact(self.plan.dv.max(1)).enumerate() {
            put(i, &row[self.cols.clone()]);
        }
    }

    /// Whether the kernel for identity and scalar decay in bf16 serves the call.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn suits_fast(&self) -> bool {
        let add = matches!(self.call.gate.kind(), Some((Decay::None | Decay::Scalar, Rule::Add, _)));
        add && TypeId::of::<T>() == TypeId::of::<half::bf16>() && self.call.isa.min(Isa::detect()) == Isa::Amx
    }

    /// [`Inputs::forward`] by that kernel.
    ///
    /// # Safety
    /// Nobody else holds the columns of the head's rows of `out`; [`Inputs::suits_fast`].
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    unsafe fn forward_fast<'l>(
        &self,
        i: usize,
        h: usize,
        initial: Option<&[f32]>,
        out: &Rows<f32>,
        last: impl Fn(usize) -> Option<&'l mut [f32]>,
    ) -> Work {
        let (b, tokens) = &self.plan.sequences[i];
        let d = self.plan.d;
        // SAFETY: the machine has AMX, and the value stays in this function.
        let mut kernel = unsafe { fast::Fast::new(d, self.cols.len()) };
        self.put_state(initial, |i, row| kernel.state_row(i).copy_from_slice(row));
        let mut work = Work::default();
        for from in tokens.clone().step_by(CHUNK) {
            let n = (tokens.end - from).min(CHUNK);
            let rows = |x: &View<T>, col: usize| fast::RowsOf {
                first: self.row(x, *b, h, from)[col..].as_ptr().cast::<u8>(),
                line: std::mem::size_of::<T>() * x.strides[2],
            };
            let each = |x: &View<f32>| -> [f32; CHUNK] {
                let head = x.head(*b, shared(x.shape[1], self.plan.heads, h));
                let mut r = [0.0; CHUNK];
                for (to, x) in r.iter_mut().zip(head[from * x.strides[2]..].iter().step_by(x.strides[2].max(1)).take(n))
                {
                    *to = *x;
                }
                r
            };
            let mut chunk = fast::Input {
                q: rows(self.q, 0),
                k: rows(self.k, 0),
                v: rows(self.v, self.cols.start),
                out: fast::RowsOf {
                    first: out.row_ptr(*b, h, from).wrapping_add(self.cols.start).cast(),
                    line: 4 * out.token_stride(),
                },
                tokens: n,
                coming: (tokens.end - from - n).min(CHUNK),
                scale: self.call.scale,
                g: self.call.gate.g().map(each),
                strength: None,
            };
            if let Gate::Ssd { dt, a } = &self.call.gate {
                let dt = each(dt);
                chunk.g = Some(dt.map(|dt| dt * a[h]));
                chunk.strength = Some(dt);
            }
            // SAFETY: `rows` are of bf16 (`suits_fast`) and of the widths of the plan; out rows are
            // this task's by the contract.
            unsafe { kernel.chunk(&chunk) };
            work += self.chunk_work(n, true);
        }
        for i in 0..d {
            if let Some(last) = last(i) {
                last.copy_from_slice(kernel.state_row(i));
            }
        }
        work.bytes += 4 * (d * self.plan.dv) as u64 * (u64::from(initial.is_some()) + 1);
        work
    }

    /// # Safety
    /// Nobody else holds the head's rows of `to`.
    unsafe fn backward(
        &self,
        i: usize,
        h: usize,
        initial: Option<&[f32]>,
        dout: &View<f32>,
        dlast: Option<&[f32]>,
        to: &Outputs,
        dinitial: &mut [f32],
        a_sum: &mut [f32],
    ) -> Work {
        let (b, tokens) = &self.plan.sequences[i];
        let (d, dv) = (self.plan.d, self.plan.dv);
        let mut kept = Vec::new();
        // SAFETY: writes nothing but `kept`.
        let mut work = unsafe { self.forward(i, h, initial, None, |_| None, Some(&mut kept)) };
        let mut eng = self.engine();
        // The gradient of a decay is a small difference of sums over the chunk; a system multiplies errors.
        eng.split = self.call.gate.kind().is_some_and(|(decay, rule, _)| decay != Decay::None || rule != Rule::Add);
        let mut c = self.room(tokens.len(), true);
        let mut ds = Mat::new(d, dv);
        self.put_state(dlast, |i, row| ds.row_mut(i)[..dv].copy_from_slice(row));
        let size = ds.rows * ds.cols;
        let state = |j: usize| Ref { data: &kept[j * size..(j + 1) * size], ld: ds.cols, rows: ds.rows, cols: ds.cols };
        let states: Vec<Ref> = (0..kept.len() / size.max(1)).map(state).collect();
        let bh = b * self.plan.heads + h;
        for (j, from) in tokens.clone().step_by(CHUNK).enumerate().collect::<Vec<_>>().into_iter().rev() {
            let part = from..(from + CHUNK).min(tokens.end);
            let n = part.len();
            let next = from.checked_sub(CHUNK).filter(|next| *next >= tokens.start);
            self.load(eng.isa, &mut c, *b, h, part.clone(), next);
            for t in 0..n.next_multiple_of(mat::PAD) {
                if t < n {
                    rows::widen(eng.isa, c.out.row_mut(t), dout.row(*b, h, from + t), 1.0);
                    if let Some(next) = next {
                        rows::ask(dout.row(*b, h, next + t));
                    }
                } else {
                    c.out.row_mut(t).fill(0.0);
                }
            }
            c.begin(&mut eng, n);
            c.backward(&mut eng, states[j], states[j + 1], &mut ds);
            let g = c.gradients();
            for t in 0..n {
                // SAFETY: rows of this (sequence, head), by this function's contract.
                unsafe {
                    rows::widen(eng.isa, to.q.token(bh, from + t), &g.q.row(t)[..d], self.call.scale);
                    to.v.token(bh, from + t).copy_from_slice(&g.v.row(t)[..dv]);
                    let k = to.k.token(bh, from + t);
                    k.copy_from_slice(&g.k.row(t)[..d]);
                    match &self.call.gate {
                        Gate::LowRank { .. } => {
                            to.a.token(bh, from + t).copy_from_slice(&g.a.row(t)[..d]);
                            to.b.token(bh, from + t).copy_from_slice(&g.second.row(t)[..d]);
                        }
                        Gate::Delta { .. } | Gate::GatedDelta { .. } | Gate::ChannelDelta { .. } => {
                            rows::add(eng.isa, k, &g.second.row(t)[..d]);
                            to.beta.token(bh, from + t)[0] = g.beta[t];
                        }
                        Gate::Ssd { a, .. } => {
                            to.dt.token(bh, from + t)[0] = a[h] * g.g_row[t] + g.beta[t];
                            a_sum[0] += c.beta[t] * g.g_row[t];
                        }
                        _ => {}
                    }
                    if self.call.gate.g().is_some() {
                        let to = to.g.token(bh, from + t);
                        match c.decay {
                            Decay::Scalar => to[0] = g.g_row[t],
                            _ => to.copy_from_slice(&g.g.row(t)[..d]),
                        }
                    }
                }
            }
            work += self.chunk_work_back(n);
        }
        for (i, row) in dinitial.chunks_exact_mut(dv.max(1)).enumerate() {
            row.copy_from_slice(&ds.row(i)[..dv]);
        }
        work.bytes += 4 * (d * dv) as u64 * (u64::from(dlast.is_some()) + 1);
        work
    }

    /// Pairs of a chunk with and without the diagonal, and whether there is a second reader, a second writer.
    fn scores_flops(&self, n: u64) -> (u64, u64, bool, bool) {
        let rule = self.call.gate.kind().map_or(Rule::Add, |k| k.1);
        let (pairs, strict) = (n * (n + 1) / 2, n * n.saturating_sub(1) / 2);
        (pairs, strict, rule != Rule::Add, rule == Rule::LowRank)
    }

    /// Work of a forward chunk: the products that the algorithm needs, pairs of the triangle alone.
    fn chunk_work(&self, n: usize, output: bool) -> Work {
        let (d, dv, n) = (self.plan.d as u64, self.plan.dv as u64, n as u64);
        let (pairs, strict, second, low_rank) = self.scores_flops(n);
        let writers = 1 + u64::from(low_rank);
        let scores = writers * (pairs + if second { strict } else { 0 });
        let mut flops = 2 * d * scores + writers * 2 * n * d * dv;
        if second {
            // What the second reader sees, and the system.
            flops += 2 * n * d * dv + 2 * strict * dv * writers;
        }
        if output {
            flops += 2 * n * d * dv + 2 * writers * pairs * dv;
        }
        let element = std::mem::size_of::<T>() as u64;
        let vectors = 2 * d + dv + if low_rank { 2 * d } else { 0 };
        let gate = self.call.gate.width(self.plan.d, self.plan.dv) as u64;
        let bytes = n * (element * vectors + 4 * gate + if output { 4 * dv } else { 0 });
        Work { flops, bytes, tiles: 1, pairs: scores, fallback: 0 }
    }

    /// Work of a backward chunk besides the forward pass that keeps the states.
    fn chunk_work_back(&self, n: usize) -> Work {
        let mut work = self.chunk_work(n, false);
        let (d, dv, n) = (self.plan.d as u64, self.plan.dv as u64, n as u64);
        let (pairs, strict, second, low_rank) = self.scores_flops(n);
        let (readers, writers) = (1 + u64::from(second), 1 + u64::from(low_rank));
        let scores = writers * (pairs + if second { strict } else { 0 });
        // The state is not moved on again.
        work.flops -= writers * 2 * n * d * dv;
        work.flops += writers * (2 * n * d * dv + 2 * pairs * dv);
        if second {
            work.flops += 4 * strict * dv;
        }
        work.flops += (2 * readers + writers) * 2 * n * d * dv + scores * (2 * dv + 4 * d);
        // Gradients in and out, the kept states written and read.
        let vectors = 2 * d + 2 * dv + if low_rank { 2 * d } else { 0 };
        work.bytes += 4 * n * (vectors + self.call.gate.width(self.plan.d, self.plan.dv) as u64) + 8 * d * dv;
        work
    }
}
