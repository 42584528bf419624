//! Exact attention on candle tensors: dense, over block tables, over key lists, and merged.
//!
//! q is (B, H, Tq, D), k (B, H_kv, Tk, D), v (B, H_kv, Tk, Dv), H a multiple of H_kv; strided
//! views are read in place and grouped heads are never repeated. The output is f32
//! (B, H, Tq, Dv) over memory in (B, Tq, H, Dv) order, so that a model's output projection
//! reads it without a copy.
//!
//! Where q, k or v track gradients, so do output and log-sum-exp; the backward pass recomputes weights tile
//! by tile and needs no memory of Tq × Tk. Sinks are constants here.

use crate::error::{Error, Result};
use crate::prim::conv::{WorkCell, cpu, gradient, wrap as wrap_error};
use crate::prim::tensor::{AnyView, cpu_view, rows, view};
use crate::sparse::HeadSelection;
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Shape, Tensor};
use foveal_kernels::{
    Attend, AttendGrads, BlockTable, Element, HeadKeys, HeadTable, Isa, KeyLists, Normalizer, Upstream, View, ViewMut,
    Work, attend_indexed as indexed_kernel, attend_indexed_backward as indexed_backward, merge_row,
};

/// Options of one attention call.
#[derive(Clone, Debug, Default)]
pub struct AttendOptions {
    /// Factor on q·k; `None` = 1/√D.
    pub scale: Option<f32>,
    /// Query i of n sees keys up to m − n + i.
    pub causal: bool,
    /// Keys in all that a query sees, its own included (causal only).
    pub window: Option<usize>,
    /// `cap · tanh(s / cap)` on scaled scores.
    pub softcap: Option<f32>,
    /// One logit per query head added to the denominator.
    pub sinks: Option<Vec<f32>>,
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
/// single keys in one pass. Where a head's blocks have row masks, or their queries and those of the
/// key lists are no multiples of one another, the two are computed apart and merged by log-sum-exp (without
/// gradients).
pub fn attend_selected(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttendOptions,
    selections: Vec<HeadSelection>,
) -> Result<Attended> {
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
    let joint = tables
        .iter()
        .zip(&lists)
        .all(|(t, l)| t.rows.is_none() && (t.block_q.is_multiple_of(l.group) || l.group.is_multiple_of(t.block_q)));
    let (tables, lists) = (BlockTable { heads: tables }, KeyLists { heads: lists });
    match (any_blocks, any_keys) {
        (_, false) => attend(q, k, v, options, Some(&tables)),
        (false, true) => attend_indexed(q, k, v, options, &lists),
        (true, true) if joint => run("attend_selected", q, k, v, options, What::Both(&tables, &lists)),
        (true, true) => merge(&attend(q, k, v, options, Some(&tables))?, &attend_indexed(q, k, v, options, &lists)?),
    }
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

/// The kernel's parameters for heads of `d`.
fn parameters(o: &AttendOptions, d: usize) -> Attend<'_> {
    let mut p = Attend::new(o.scale.unwrap_or(1.0 / (d.max(1) as f32).sqrt())).causal(o.causal).window(o.window);
    p.softcap = o.softcap;
    p.sinks = o.sinks.as_deref();
    p.normalizer = o.normalizer;
    if let Some(isa) = o.isa {
        p.isa = isa;
    }
    p
}

fn forward<T: Element>(
    o: &AttendOptions,
    what: What,
    [q, k, v]: [&View<T>; 3],
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<Work> {
    let p = parameters(o, q.shape[3]);
    let shape = [q.shape[0], q.shape[1], q.shape[2], v.shape[3]];
    let mut out = ViewMut::new("out", out, shape, strides(shape))?;
    let lse = if o.normalizer == Normalizer::Softmax {
        Some(lse)
    } else {
        lse.fill(f32::NAN);
        None
    };
    Ok(match what {
        What::Blocks(t) => p.table(t).run(q, k, v, &mut out, lse),
        What::Lists(l) => indexed_kernel(&p, l, q, k, v, &mut out, lse),
        What::Both(t, l) => indexed_kernel(&p.table(Some(t)), l, q, k, v, &mut out, lse),
    }?)
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
    let dv = v.dims4()?.3;
    if let Some(s) = &o.sinks
        && s.len() != h
    {
        return Err(Error::Shape { op, tensor: "sinks", shape: vec![s.len()], expected: format!("({h}) query heads") });
    }
    let n = b * h * tq * dv;
    if q.track_op() || k.track_op() || v.track_op() {
        let work = WorkCell::default();
        let visited = Visited::of(what);
        let both = q.apply_op3(&k, &v, Tracked { name: op, options: o.clone(), visited, work: work.clone() })?;
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
        alike!(op, views, [q, k, v] => forward(o, what, [&q, &k, &v], &mut out, &mut lse))?
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

/// Attention inside autograd: one flat result, the output in (B, Tq, H, Dv) memory and then the log-sum-exp,
/// which the backward pass finds there again.
struct Tracked {
    name: &'static str,
    options: AttendOptions,
    visited: Visited,
    work: WorkCell,
}

impl Tracked {
    /// Gradients of q, k and v, contiguous.
    fn backward<T: Element>(&self, [q, k, v]: [&View<T>; 3], result: &[f32], dresult: &[f32]) -> Result<[Vec<f32>; 3]> {
        let p = parameters(&self.options, q.shape[3]);
        let shape = [q.shape[0], q.shape[1], q.shape[2], v.shape[3]];
        let n = shape.iter().product();
        let softmax = self.options.normalizer == Normalizer::Softmax;
        let ((out, lse), (dout, dlse)) = (result.split_at(n), dresult.split_at(n));
        let up = Upstream {
            out: &View::new("out", out, shape, strides(shape))?,
            lse: if softmax { lse } else { &[] },
            dout: &View::new("dout", dout, shape, strides(shape))?,
            dlse: softmax.then_some(dlse),
        };
        let mut g = [q.shape, k.shape, v.shape].map(|s| vec![0f32; s.iter().product()]);
        let [dq, dk, dv] = &mut g;
        let grads = AttendGrads {
            dq: &mut ViewMut::contiguous("dq", dq, q.shape)?,
            dk: &mut ViewMut::contiguous("dk", dk, k.shape)?,
            dv: &mut ViewMut::contiguous("dv", dv, v.shape)?,
            dsinks: None,
            dbias: None,
        };
        match self.visited.what() {
            What::Blocks(t) => p.table(t).backward(q, k, v, &up, grads),
            What::Lists(l) => indexed_backward(&p, l, q, k, v, &up, grads),
            What::Both(t, l) => indexed_backward(&p.table(Some(t)), l, q, k, v, &up, grads),
        }?;
        Ok(g)
    }
}

/// An error on its way through candle.
fn through(e: Error) -> candle_core::Error {
    match e {
        Error::Kernel(e) => wrap_error(e),
        other => candle_core::Error::wrap(other),
    }
}

impl CustomOp3 for Tracked {
    fn name(&self) -> &'static str {
        self.name
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
        let mut go = || -> Result<Work> {
            let views = [cpu_view("q", q, ql)?, cpu_view("k", k, kl)?, cpu_view("v", v, vl)?];
            alike!(self.name, views, [q, k, v] => forward(&self.options, self.visited.what(), [&q, &k, &v], out, lse))
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
        let dresult = dresult.contiguous()?;
        let ((qs, ql), (ks, kl)) = (q.storage_and_layout(), k.storage_and_layout());
        let ((vs, vl), (rs, rl)) = (v.storage_and_layout(), result.storage_and_layout());
        let (gs, gl) = dresult.storage_and_layout();
        let flat = |s, l: &Layout| -> candle_core::Result<_> {
            Ok(&cpu(s)?.as_slice::<f32>()?[l.start_offset()..l.start_offset() + l.shape().elem_count()])
        };
        let (result, dresult) = (flat(&rs, rl)?, flat(&gs, gl)?);
        let go = || -> Result<[Vec<f32>; 3]> {
            let views = [view("q", &qs, ql)?, view("k", &ks, kl)?, view("v", &vs, vl)?];
            alike!(self.name, views, [q, k, v] => self.backward([&q, &k, &v], result, dresult))
        };
        let [dq, dk, dv] = go().map_err(through)?;
        Ok((gradient(dq, q)?, gradient(dk, k)?, gradient(dv, v)?))
    }
}

fn wrap(out: Vec<f32>, lse: Vec<f32>, [b, h, t, d]: [usize; 4], work: Work) -> Result<Attended> {
    let out = Tensor::from_vec(out, (b, t, h, d), &Device::Cpu)?.transpose(1, 2)?;
    let lse = Tensor::from_vec(lse, (b, h, t), &Device::Cpu)?;
    Ok(Attended { out, lse, work })
}
