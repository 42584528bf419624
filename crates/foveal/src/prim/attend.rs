//! Exact attention on candle tensors: dense, over block tables, over key lists, and merged.
//!
//! q is (B, H, Tq, D), k (B, H_kv, Tk, D), v (B, H_kv, Tk, Dv), H a multiple of H_kv; strided
//! views are read in place and grouped heads are never repeated. The output is f32
//! (B, H, Tq, Dv) over memory in (B, Tq, H, Dv) order, so that a model's output projection
//! reads it without a copy.
//!
//! Where q, k, v, sinks or a bias track gradients, so do output and log-sum-exp; the backward pass recomputes
//! weights tile by tile and needs no memory of Tq × Tk unless a dense bias has it already.

use crate::error::{Error, Result};
use crate::prim::conv::{WorkCell, cpu, flat, gradient, through};
use crate::prim::permute::{Memory, Taken, take_rows};
use crate::prim::tensor::{AnyView, cpu_view, rows, view};
use crate::sparse::{HeadSelection, TokenOrder};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Tensor};
use foveal_kernels::{
    Attend, AttendGrads, Band, Bias, BiasGrad, BlockTable, CuSeqlens, Element, HeadKeys, HeadTable, Isa, KeyLists,
    Normalizer, Upstream, View, ViewMut, Work, attend_indexed as indexed_kernel,
    attend_indexed_backward as indexed_backward, merge_row,
};
use std::sync::{Arc, Mutex, PoisonError};

/// What is added to scaled and soft-capped scores; all f32 (or cast to it), gradients included. Distances are those
/// of [`foveal_kernels::Bias`]: key less the query's own position.
#[derive(Clone, Debug)]
pub enum AttendBias {
    /// −slope · |distance|: (H).
    Alibi(Tensor),
    /// (B, H, Tq, Tk) or what broadcasts to it; of a ragged batch (1, H, Tq, longest Tk).
    Dense(Tensor),
    /// One number a key: (B, H, Tk) or what broadcasts to it.
    Keys(Tensor),
    /// One number a distance, clipped at both ends.
    Relative {
        /// (H, n) or (1, n).
        table: Tensor,
        /// Where a table keeps distance 0.
        left: usize,
    },
    /// φ_q · φ_k, per head or shared.
    Factors {
        /// (B, H, Tq, R) or what broadcasts to it.
        q: Tensor,
        /// (B, H, Tk, R) or what broadcasts to it.
        k: Tensor,
    },
}

/// Bounds of the sequences of a ragged batch, as [`foveal_kernels::CuSeqlens`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// Of queries: from 0 to all, ascending.
    pub q: Vec<usize>,
    /// Of keys; as many.
    pub k: Vec<usize>,
}

/// Options of one attention call.
#[derive(Clone, Debug, Default)]
pub struct AttendOptions {
    /// Factor on q·k; `None` = 1/√D.
    pub scale: Option<f32>,
    /// Query i of n sees keys up to m − n + i.
    pub causal: bool,
    /// Keys in all that a query sees, its own included and none later: short for a band, so not both.
    pub window: Option<usize>,
    /// Keys near a query's own position: so many up to it, so many after it.
    pub band: Option<Band>,
    /// `cap · tanh(s / cap)` on scaled scores.
    pub softcap: Option<f32>,
    /// One logit per query head, (H), added to the denominator.
    pub sinks: Option<Tensor>,
    /// Added to scores.
    pub bias: Option<AttendBias>,
    /// Tokens of a batch of 1 as sequences, each attended by itself; tables and lists are then one a (sequence,
    /// head).
    pub cu_seqlens: Option<Sequences>,
    /// Softmax, or a sigmoid of each score (no sinks then, and no log-sum-exp: `Attended::lse` is NaN).
    pub normalizer: Normalizer,
    /// Instruction set; `None` = the best there is.
    pub isa: Option<Isa>,
}

impl AttendOptions {
    /// Causal attention with the default scale.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }
}

/// What an attention call returns.
#[derive(Clone, Debug)]
pub struct Attended {
    /// f32 (B, H, Tq, Dv), in (B, Tq, H, Dv) memory.
    pub out: Tensor,
    /// f32 (B, H, Tq), natural log; −∞ for rows that see no key, NaN under a sigmoid.
    pub lse: Tensor,
    /// Work done.
    pub work: Work,
}

/// Exact attention, over `table` if given.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttendOptions,
    table: Option<&BlockTable>,
) -> Result<Attended> {
    run("attend", q, k, v, options, What::Blocks(table))
}

/// Exact attention of each query group over its own keys.
pub fn attend_indexed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttendOptions,
    lists: &KeyLists,
) -> Result<Attended> {
    run("attend_indexed", q, k, v, options, What::Lists(lists))
}

/// Exact attention over what a selector chose, one [`HeadSelection`] per (batch, head): blocks and
/// single keys in one pass. A key inside a visited block is visited once, by all queries of its group whatever row
/// masks say. Rows of heads with a token order are put in it before and back after.
pub fn attend_selected(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttendOptions,
    selections: Vec<HeadSelection>,
) -> Result<Attended> {
    if selections.iter().any(HeadSelection::is_ordered) {
        return attend_ordered(q, k, v, options, selections);
    }
    let tq = q.dims().get(2).copied().unwrap_or(0);
    let any_keys = selections.iter().any(|s| s.keys.as_ref().is_some_and(|k| !k.keys.is_empty()));
    let any_blocks = selections.iter().any(|s| s.blocks.as_ref().is_some_and(|b| !b.blocks.is_empty()));
    let mut tables = Vec::with_capacity(selections.len());
    let mut lists = Vec::with_capacity(selections.len());
    for s in selections {
        // What a head lacks is empty, in the groups of what it has.
        let group = s.blocks.as_ref().map(|b| b.block_q).or(s.keys.as_ref().map(|k| k.group)).unwrap_or(128).max(1);
        tables
            .push(s.blocks.unwrap_or_else(|| HeadTable::from_lists(group, 128, vec![Vec::new(); tq.div_ceil(group)])));
        lists.push(s.keys.unwrap_or_else(|| HeadKeys::from_lists(group, vec![Vec::new(); tq.div_ceil(group)])));
    }
    for (t, l) in tables.iter().zip(&mut lists) {
        let apart = !t.block_q.is_multiple_of(l.group) && !l.group.is_multiple_of(t.block_q);
        if any_keys && any_blocks && apart && l.group > 0 {
            *l = regrouped(l, t.block_q, tq);
        }
    }
    let (tables, lists) = (BlockTable { heads: tables }, KeyLists { heads: lists });
    match (any_blocks, any_keys) {
        (_, false) => attend(q, k, v, options, Some(&tables)),
        (false, true) => attend_indexed(q, k, v, options, &lists),
        (true, true) => run("attend_selected", q, k, v, options, What::Both(&tables, &lists)),
    }
}

/// [`attend_selected`] where some head counts places of an order. What depends on positions cannot be served then.
fn attend_ordered(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &AttendOptions,
    mut selections: Vec<HeadSelection>,
) -> Result<Attended> {
    const OP: &str = "attend_selected";
    let positional = [
        ("causal", o.causal),
        ("window", o.window.is_some()),
        ("band", o.band.is_some()),
        ("bias", o.bias.is_some()),
        ("cu_seqlens", o.cu_seqlens.is_some()),
    ];
    if let Some((name, _)) = positional.iter().find(|p| p.1) {
        return Err(Error::Kernel(foveal_kernels::KernelError::Param {
            op: OP,
            name,
            value: "given for heads whose tokens are put in another order".into(),
            remedy: "leave it out, or use a selection without an order".into(),
        }));
    }
    let ((b, h, tq, d), (_, hkv, tk, dv)) = (q.dims4()?, v.dims4()?);
    if selections.len() != b * h {
        let expected = format!("as many batches and heads as the {} selections", selections.len());
        return Err(Error::Shape { op: OP, tensor: "q", shape: q.dims().to_vec(), expected });
    }
    if hkv == 0 || h % hkv != 0 {
        return Err(foveal_kernels::KernelError::Groups { op: OP, heads: h, kv_heads: hkv }.into());
    }
    selections.iter().try_for_each(|s| s.check(tq, tk))?;
    let orders: Vec<_> = selections.iter_mut().map(|s| (s.q_order.take(), s.k_order.take())).collect();
    // One call has as many queries in all heads: shorter ones end with blocks that visit nothing.
    let places = orders.iter().map(|o| o.0.as_ref().map_or(tq, TokenOrder::places)).max().unwrap_or(tq);
    for s in &mut selections {
        if let Some(t) = &mut s.blocks {
            t.indptr.resize(places.div_ceil(t.block_q) + 1, t.blocks.len());
        }
        if let Some(k) = &mut s.keys {
            k.indptr.resize(places.div_ceil(k.group) + 1, k.keys.len());
        }
    }
    let at = |o: &Option<TokenOrder>| o.as_ref().map(|o| o.at().clone());
    let queries = orders.iter().enumerate().map(|(head, o)| Taken { head, rows: at(&o.0) }).collect();
    let back: Vec<_> = orders
        .iter()
        .enumerate()
        .map(|(head, o)| Taken { head, rows: o.0.as_ref().map(|o| o.place().clone()) })
        .collect();
    let mut moved = b * h * (places * d + tq * dv);
    let (mut k, mut v) = (k.clone(), v.clone());
    if orders.iter().any(|o| o.1.is_some()) {
        // Heads of a group share its keys if they share their order; else each gets keys of its own.
        let group = h / hkv;
        let alike = orders.chunks(group).all(|g| g.iter().all(|o| o.1 == g[0].1));
        let keys: Vec<_> = orders
            .iter()
            .enumerate()
            .step_by(if alike { group } else { 1 })
            .map(|(bh, o)| Taken { head: bh / group, rows: at(&o.1) })
            .collect();
        moved += keys.len() * tk * (d + dv);
        k = take_rows(OP, "k", &k, keys.clone(), tk, Memory::HeadsFirst)?;
        v = take_rows(OP, "v", &v, keys, tk, Memory::HeadsFirst)?;
    }
    let size = q.dtype().size_in_bytes();
    let q = take_rows(OP, "q", q, queries, places, Memory::HeadsFirst)?;
    let Attended { out, lse, mut work } = attend_selected(&q, &k, &v, o, selections)?;
    let lse = take_rows(OP, "lse", &lse.unsqueeze(3)?, back.clone(), tq, Memory::HeadsFirst)?.squeeze(3)?;
    let out = take_rows(OP, "out", &out, back, tq, Memory::TokensFirst)?;
    work.bytes += (2 * moved * size) as u64;
    Ok(Attended { out, lse, work })
}

/// The same lists for smaller groups, of which `block` queries are some.
fn regrouped(l: &HeadKeys, block: usize, tq: usize) -> HeadKeys {
    let (mut group, mut rest) = (l.group, block);
    while rest > 0 {
        (group, rest) = (rest, group % rest);
    }
    let lists = (0..tq.div_ceil(group)).map(|g| l.row(g * group / l.group).to_vec());
    HeadKeys::from_lists(group, lists.collect())
}

/// Combine two attention results of the same queries over disjoint keys. Refused where a part tracks
/// gradients.
pub fn merge(a: &Attended, b: &Attended) -> Result<Attended> {
    for (tensor, x) in [("first part", &a.out), ("second part", &b.out)] {
        if x.track_op() {
            return Err(Error::NoBackward { op: "merge", tensor });
        }
    }
    let dims = a.out.dims4()?;
    if b.out.dims4()? != dims {
        return Err(Error::Shape {
            op: "merge",
            tensor: "second part",
            shape: b.out.dims().to_vec(),
            expected: format!("the first part's {dims:?}"),
        });
    }
    let (bs, h, t, d) = dims;
    let rows = |x: &Attended| -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((x.out.transpose(1, 2)?.flatten_all()?.to_vec1()?, x.lse.flatten_all()?.to_vec1()?))
    };
    let (mut o, mut lse) = rows(a)?;
    let (o2, lse2) = rows(b)?;
    for (r, row) in o.chunks_exact_mut(d.max(1)).enumerate() {
        // Memory order is (batch, token, head); lse is (batch, head, token).
        let (bi, ti, hi) = (r / (t * h), r / h % t, r % h);
        let l = (bi * h + hi) * t + ti;
        merge_row(row, &mut lse[l], &o2[r * d..(r + 1) * d], lse2[l]);
    }
    wrap(o, lse, [bs, h, t, d], a.work + b.work)
}

#[derive(Clone, Copy)]
enum What<'a> {
    Blocks(Option<&'a BlockTable>),
    Lists(&'a KeyLists),
    Both(&'a BlockTable, &'a KeyLists),
}

/// (B, H, Tq, Dv) over (B, Tq, H, Dv) memory.
fn strides([_, h, t, d]: [usize; 4]) -> [usize; 3] {
    [t * h * d, d, h * d]
}

/// `$body` with the three views as one type.
macro_rules! alike {
    ($op:expr, $views:expr, [$q:ident, $k:ident, $v:ident] => $body:expr) => {
        match $views {
            [AnyView::F32($q), AnyView::F32($k), AnyView::F32($v)] => $body,
            [AnyView::Bf16($q), AnyView::Bf16($k), AnyView::Bf16($v)] => $body,
            _ => Err(Error::Dtype { op: $op, tensor: "k or v", dtype: "mixed".into(), expected: "the dtype of q" }),
        }
    };
}

/// A bias as the kernel reads it: numbers, or tensors of full shape with rows in place.
enum Ready {
    Alibi(Vec<f32>),
    Relative(Vec<f32>, usize),
    Dense(Tensor),
    Keys(Tensor),
    Factors(Tensor, Tensor),
}

/// Which of the smaller operands a gradient is of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Sinks,
    Bias,
    KeyFactors,
}

/// The options of a call with their tensors read.
struct Setting {
    options: AttendOptions,
    bias: Option<Ready>,
    sinks: Option<Vec<f32>>,
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// f32 rows of a bias, broadcast to `shape`.
fn spread(op: &'static str, name: &'static str, x: &Tensor, shape: [usize; 4]) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?.broadcast_as(&shape);
    let x = wide.map_err(|_| Error::Shape {
        op,
        tensor: name,
        shape: x.dims().to_vec(),
        expected: format!("{shape:?} or what broadcasts to it"),
    })?;
    rows(op, name, &x)
}

impl Setting {
    /// The setting, and the operands of which gradients are wanted, in full shape.
    fn of(op: &'static str, o: &AttendOptions, [b, h, tq, tk]: [usize; 4]) -> Result<(Self, Vec<(Part, Tensor)>)> {
        let mut parts = Vec::new();
        let mut part = |part, x: &Tensor| {
            if x.track_op() {
                parts.push((part, x.clone()));
            }
        };
        let vector = |name, x: &Tensor, n: usize, expected: &str| {
            if x.elem_count() != n {
                let expected = format!("({expected}) of {n} in all");
                return Err(Error::Shape { op, tensor: name, shape: x.dims().to_vec(), expected });
            }
            Ok(x.to_dtype(DType::F32)?)
        };
        if o.window.is_some() && o.band.is_some() {
            return Err(Error::Kernel(foveal_kernels::KernelError::Param {
                op,
                name: "window",
                value: "given beside a band".into(),
                remedy: "a window is a band; give one of them".into(),
            }));
        }
        let mut sinks = None;
        if let Some(x) = &o.sinks {
            let x = vector("sinks", x, h, "query heads")?;
            sinks = Some(numbers(&x)?);
            part(Part::Sinks, &x);
        }
        let bias = match &o.bias {
            None => None,
            Some(AttendBias::Alibi(x)) => {
                let x = vector("slopes", x, h, "query heads")?;
                part(Part::Bias, &x);
                Some(Ready::Alibi(numbers(&x)?))
            }
            Some(AttendBias::Relative { table, left }) => {
                let (rows, n) = table.dims2()?;
                let x = if rows == 1 { table.broadcast_as((h, n))? } else { table.clone() };
                let x = vector("table", &x, h * n, "query heads, distances")?;
                part(Part::Bias, &x);
                Some(Ready::Relative(numbers(&x)?, *left))
            }
            Some(AttendBias::Dense(x)) => {
                let k =
                    o.cu_seqlens.as_ref().map(|s| s.k.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0));
                let x = spread(op, "bias", x, [b, h, tq, k.unwrap_or(tk)])?;
                part(Part::Bias, &x);
                Some(Ready::Dense(x.detach()))
            }
            Some(AttendBias::Keys(x)) => {
                let keys = x.rank().checked_sub(1).map_or(Ok(x.clone()), |at| x.unsqueeze(at))?;
                let x = spread(op, "bias of keys", &keys, [b, h, 1, tk])?;
                part(Part::Bias, &x);
                Some(Ready::Keys(x.detach()))
            }
            Some(AttendBias::Factors { q, k }) => {
                let r = q.dims().last().copied().unwrap_or(0);
                let q = spread(op, "query factors", q, [b, h, tq, r])?;
                let k = spread(op, "key factors", k, [b, h, tk, r])?;
                part(Part::Bias, &q);
                part(Part::KeyFactors, &k);
                Some(Ready::Factors(q.detach(), k.detach()))
            }
        };
        // What was read is not kept twice.
        let options = AttendOptions { sinks: None, bias: None, ..o.clone() };
        Ok((Self { options, bias, sinks }, parts))
    }

    /// The kernel's parameters for heads of `d`.
    fn with<R>(&self, d: usize, f: impl FnOnce(Attend) -> Result<R>) -> Result<R> {
        let o = &self.options;
        let mut p = Attend::new(o.scale.unwrap_or(1.0 / (d.max(1) as f32).sqrt())).causal(o.causal);
        p.band = o.band.or(o.window.map(Band::window));
        p.softcap = o.softcap;
        p.sinks = self.sinks.as_deref();
        p.normalizer = o.normalizer;
        p.cu_seqlens = o.cu_seqlens.as_ref().map(|s| CuSeqlens { q: &s.q, k: &s.k });
        if let Some(isa) = o.isa {
            p.isa = isa;
        }
        let wrong = || Error::Dtype { op: "attend", tensor: "bias", dtype: "other".into(), expected: "f32" };
        match &self.bias {
            None => f(p),
            Some(Ready::Alibi(x)) => f(p.bias(Some(Bias::Alibi(x)))),
            Some(Ready::Relative(table, left)) => f(p.bias(Some(Bias::Relative { table, left: *left }))),
            Some(Ready::Dense(x)) => {
                let (s, l) = x.storage_and_layout();
                let AnyView::F32(x) = view("bias", &s, l)? else { return Err(wrong()) };
                f(p.bias(Some(Bias::Dense(x))))
            }
            Some(Ready::Keys(x)) => {
                let (s, l) = x.storage_and_layout();
                let AnyView::F32(x) = view("bias", &s, l)? else { return Err(wrong()) };
                f(p.bias(Some(Bias::Keys(x))))
            }
            Some(Ready::Factors(q, k)) => {
                let ((qs, ql), (ks, kl)) = (q.storage_and_layout(), k.storage_and_layout());
                let (AnyView::F32(q), AnyView::F32(k)) = (view("factors", &qs, ql)?, view("factors", &ks, kl)?) else {
                    return Err(wrong());
                };
                f(p.bias(Some(Bias::Factors { q, k })))
            }
        }
    }
}

fn forward<T: Element>(
    setting: &Setting,
    what: What,
    [q, k, v]: [&View<T>; 3],
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<Work> {
    let shape = [q.shape[0], q.shape[1], q.shape[2], v.shape[3]];
    let mut out = ViewMut::new("out", out, shape, strides(shape))?;
    let lse = if setting.options.normalizer == Normalizer::Softmax {
        Some(lse)
    } else {
        lse.fill(f32::NAN);
        None
    };
    setting.with(q.shape[3], |p| {
        Ok(match what {
            What::Blocks(t) => p.table(t).run(q, k, v, &mut out, lse),
            What::Lists(l) => indexed_kernel(&p, l, q, k, v, &mut out, lse),
            What::Both(t, l) => indexed_kernel(&p.table(Some(t)), l, q, k, v, &mut out, lse),
        }?)
    })
}

fn run(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor, o: &AttendOptions, what: What) -> Result<Attended> {
    let (q, k, v) = (rows(op, "q", q)?, rows(op, "k", k)?, rows(op, "v", v)?);
    for (name, t) in [("k", &k), ("v", &v)] {
        if t.dtype() != q.dtype() {
            return Err(Error::Dtype {
                op,
                tensor: name,
                dtype: format!("{:?}", t.dtype()),
                expected: "the dtype of q",
            });
        }
    }
    let (b, h, tq, _) = q.dims4()?;
    let (_, _, tk, dv) = v.dims4()?;
    let (setting, parts) = Setting::of(op, o, [b, h, tq, tk])?;
    let n = b * h * tq * dv;
    if q.track_op() || k.track_op() || v.track_op() || !parts.is_empty() {
        let work = WorkCell::default();
        let operands = [&q, &k, &v].map(Tensor::detach);
        let wanted = parts.iter().map(|x| x.0).collect();
        let call =
            Arc::new(Call { name: op, setting, visited: Visited::of(what), operands, wanted, kept: Mutex::default() });
        let mut both = q.apply_op3(&k, &v, Tracked { call: call.clone(), work: work.clone() })?;
        let last = parts.len().saturating_sub(1);
        for (i, (part, x)) in parts.into_iter().enumerate() {
            both = both.apply_op2(&x, Beside { call: call.clone(), part, first: i == last })?;
        }
        let out = both.narrow(0, 0, n)?.reshape((b, tq, h, dv))?.transpose(1, 2)?;
        let lse = both.narrow(0, n, b * h * tq)?.reshape((b, h, tq))?;
        return Ok(Attended { out, lse, work: work.get() });
    }
    let mut out = vec![0f32; n];
    let mut lse = vec![0f32; b * h * tq];
    let work = {
        let ((qs, ql), (ks, kl)) = (q.storage_and_layout(), k.storage_and_layout());
        let (vs, vl) = v.storage_and_layout();
        let views = [view("q", &qs, ql)?, view("k", &ks, kl)?, view("v", &vs, vl)?];
        alike!(op, views, [q, k, v] => forward(&setting, what, [&q, &k, &v], &mut out, &mut lse))?
    };
    wrap(out, lse, [b, h, tq, dv], work)
}

/// What a call visits, kept for its backward pass.
enum Visited {
    Blocks(Option<BlockTable>),
    Lists(KeyLists),
    Both(BlockTable, KeyLists),
}

impl Visited {
    fn of(what: What) -> Self {
        match what {
            What::Blocks(t) => Visited::Blocks(t.cloned()),
            What::Lists(l) => Visited::Lists(l.clone()),
            What::Both(t, l) => Visited::Both(t.clone(), l.clone()),
        }
    }

    fn what(&self) -> What<'_> {
        match self {
            Visited::Blocks(t) => What::Blocks(t.as_ref()),
            Visited::Lists(l) => What::Lists(l),
            Visited::Both(t, l) => What::Both(t, l),
        }
    }
}

/// Gradients of one backward pass.
#[derive(Default)]
struct Gradients {
    operands: Option<[Vec<f32>; 3]>,
    parts: Vec<(Part, Vec<f32>)>,
}

/// One call inside autograd. candle's operations take three tensors at most, so that of q, k and v is followed by one
/// for each further operand whose gradient is wanted; these pass the result on. On the way back the one that comes
/// first computes all gradients, and each hands over its own.
struct Call {
    name: &'static str,
    setting: Setting,
    visited: Visited,
    operands: [Tensor; 3],
    wanted: Vec<Part>,
    kept: Mutex<Gradients>,
}

impl Call {
    fn kept(&self) -> std::sync::MutexGuard<'_, Gradients> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compute all gradients and keep them.
    fn compute(&self, result: &Tensor, dresult: &Tensor) -> candle_core::Result<()> {
        let dresult = dresult.contiguous()?;
        let [q, k, v] = &self.operands;
        let ((qs, ql), (ks, kl)) = (q.storage_and_layout(), k.storage_and_layout());
        let ((vs, vl), (rs, rl)) = (v.storage_and_layout(), result.storage_and_layout());
        let (gs, gl) = dresult.storage_and_layout();
        let (result, dresult) = (flat(cpu(&rs)?, rl)?, flat(cpu(&gs)?, gl)?);
        let go = || -> Result<Gradients> {
            let views = [view("q", &qs, ql)?, view("k", &ks, kl)?, view("v", &vs, vl)?];
            alike!(self.name, views, [q, k, v] => self.backward([&q, &k, &v], result, dresult))
        };
        *self.kept() = go().map_err(through)?;
        Ok(())
    }

    fn backward<T: Element>(&self, [q, k, v]: [&View<T>; 3], result: &[f32], dresult: &[f32]) -> Result<Gradients> {
        let shape = [q.shape[0], q.shape[1], q.shape[2], v.shape[3]];
        let softmax = self.setting.options.normalizer == Normalizer::Softmax;
        let ((out, lse), (dout, dlse)) =
            (result.split_at(shape.iter().product()), dresult.split_at(shape.iter().product()));
        let up = Upstream {
            out: &View::new("out", out, shape, strides(shape))?,
            lse: if softmax { lse } else { &[] },
            dout: &View::new("dout", dout, shape, strides(shape))?,
            dlse: softmax.then_some(dlse),
        };
        let wants = |part| self.wanted.contains(&part);
        let factors =
            matches!(self.setting.bias, Some(Ready::Factors(..))) && (wants(Part::Bias) || wants(Part::KeyFactors));
        let bias = self.setting.bias.as_ref().filter(|_| wants(Part::Bias) || factors);
        let of = |x: &Tensor| x.dims4().map(|(b, h, t, d)| [b, h, t, d]);
        // Numbers of small tables, then rows of whole tensors.
        let (n, first, second) = match bias {
            None => (0, [0; 4], [0; 4]),
            Some(Ready::Alibi(x) | Ready::Relative(x, _)) => (x.len(), [0; 4], [0; 4]),
            Some(Ready::Dense(x) | Ready::Keys(x)) => (0, of(x)?, [0; 4]),
            Some(Ready::Factors(q, k)) => (0, of(q)?, of(k)?),
        };
        let zeros = |shape: [usize; 4]| vec![0f32; shape.iter().product()];
        let mut g = [q.shape, k.shape, v.shape].map(zeros);
        let (mut few, mut whole, mut keys) = (vec![0f32; n], zeros(first), zeros(second));
        let mut dsinks = vec![0f32; if wants(Part::Sinks) { q.shape[1] } else { 0 }];
        let mut first = ViewMut::contiguous("dbias", &mut whole, first)?;
        let mut second = ViewMut::contiguous("dbias", &mut keys, second)?;
        let [dq, dk, dv] = &mut g;
        let grads = AttendGrads {
            dq: &mut ViewMut::contiguous("dq", dq, q.shape)?,
            dk: &mut ViewMut::contiguous("dk", dk, k.shape)?,
            dv: &mut ViewMut::contiguous("dv", dv, v.shape)?,
            dsinks: wants(Part::Sinks).then_some(dsinks.as_mut_slice()),
            dbias: bias.map(|bias| match bias {
                Ready::Alibi(_) => BiasGrad::Slopes(&mut few),
                Ready::Relative(..) => BiasGrad::Relative(&mut few),
                Ready::Dense(_) => BiasGrad::Dense(&mut first),
                Ready::Keys(_) => BiasGrad::Keys(&mut first),
                Ready::Factors(..) => BiasGrad::Factors { q: &mut first, k: &mut second },
            }),
        };
        self.setting.with(q.shape[3], |p| {
            Ok(match self.visited.what() {
                What::Blocks(t) => p.table(t).backward(q, k, v, &up, grads),
                What::Lists(l) => indexed_backward(&p, l, q, k, v, &up, grads),
                What::Both(t, l) => indexed_backward(&p.table(Some(t)), l, q, k, v, &up, grads),
            }?)
        })?;
        let bias = if n > 0 { few } else { whole };
        Ok(Gradients {
            operands: Some(g),
            parts: vec![(Part::Sinks, dsinks), (Part::Bias, bias), (Part::KeyFactors, keys)],
        })
    }
}

/// Attention of q, k and v inside autograd: one flat result, the output in (B, Tq, H, Dv) memory and then the
/// log-sum-exp, which the backward pass finds there again.
struct Tracked {
    call: Arc<Call>,
    work: WorkCell,
}

impl CustomOp3 for Tracked {
    fn name(&self) -> &'static str {
        self.call.name
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (qd, vd) = (ql.dims(), vl.dims());
        let rows = qd[0] * qd[1] * qd[2];
        let mut both = vec![0f32; rows * (vd[3] + 1)];
        let (out, lse) = both.split_at_mut(rows * vd[3]);
        let call = &self.call;
        let mut go = || -> Result<Work> {
            let views = [cpu_view("q", q, ql)?, cpu_view("k", k, kl)?, cpu_view("v", v, vl)?];
            alike!(call.name, views, [q, k, v] => {
                forward(&call.setting, call.visited.what(), [&q, &k, &v], out, lse)
            })
        };
        self.work.set(go().map_err(through)?);
        let n = both.len();
        Ok((CpuStorage::F32(both), Shape::from(n)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        result: &Tensor,
        dresult: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let kept = if self.call.wanted.is_empty() { None } else { self.call.kept().operands.take() };
        let grads = match kept {
            Some(g) => Some(g),
            None => {
                self.call.compute(result, dresult)?;
                self.call.kept().operands.take()
            }
        };
        let Some([dq, dk, dv]) = grads else { candle_core::bail!("gradients of {} were lost", self.call.name) };
        Ok((gradient(dq, q)?, gradient(dk, k)?, gradient(dv, v)?))
    }
}

/// What hands the gradient of one further operand over.
struct Beside {
    call: Arc<Call>,
    part: Part,
    /// Whether it is the first on the way back.
    first: bool,
}

impl CustomOp2 for Beside {
    fn name(&self) -> &'static str {
        self.call.name
    }

    fn cpu_fwd(
        &self,
        result: &CpuStorage,
        l: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(flat(result, l)?.to_vec()), l.shape().clone()))
    }

    fn bwd(
        &self,
        before: &Tensor,
        x: &Tensor,
        result: &Tensor,
        dresult: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        if self.first {
            self.call.compute(result, dresult)?;
        }
        let part = self.call.kept().parts.iter_mut().find(|p| p.0 == self.part).map(|p| std::mem::take(&mut p.1));
        let Some(part) = part else { candle_core::bail!("gradients of {} were lost", self.call.name) };
        Ok((before.track_op().then(|| dresult.clone()), gradient(part, x)?))
    }
}

fn wrap(out: Vec<f32>, lse: Vec<f32>, [b, h, t, d]: [usize; 4], work: Work) -> Result<Attended> {
    let out = Tensor::from_vec(out, (b, t, h, d), &Device::Cpu)?.transpose(1, 2)?;
    let lse = Tensor::from_vec(lse, (b, h, t), &Device::Cpu)?;
    Ok(Attended { out, lse, work })
}
