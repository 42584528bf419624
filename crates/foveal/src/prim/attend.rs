//! Exact attention on candle tensors: dense, over block tables, over key lists, and merged.
//!
//! q is (B, H, Tq, D), k (B, H_kv, Tk, D), v (B, H_kv, Tk, Dv), H a multiple of H_kv; strided
//! views are read in place and grouped heads are never repeated. The output is f32
//! (B, H, Tq, Dv) over memory in (B, Tq, H, Dv) order, so that a model's output projection
//! reads it without a copy.

use crate::error::{Error, Result};
use crate::prim::tensor::{AnyView, rows_contiguous, view};
use crate::sparse::HeadSelection;
use candle_core::{Device, Tensor};
use foveal_kernels::{
    Attend, BlockTable, HeadKeys, HeadTable, Isa, KeyLists, ViewMut, Work, attend_indexed as indexed_kernel, merge_row,
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
    /// f32 (B, H, Tq), natural log; −∞ for rows that see no key.
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
/// key lists are no multiples of one another, the two are computed apart and merged by log-sum-exp.
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

/// Combine two attention results of the same queries over disjoint keys.
pub fn merge(a: &Attended, b: &Attended) -> Result<Attended> {
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

enum What<'a> {
    Blocks(Option<&'a BlockTable>),
    Lists(&'a KeyLists),
    Both(&'a BlockTable, &'a KeyLists),
}

fn run(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor, o: &AttendOptions, what: What) -> Result<Attended> {
    let (q, k, v) = (rows_contiguous(op, "q", q)?, rows_contiguous(op, "k", k)?, rows_contiguous(op, "v", v)?);
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
    let (b, h, tq, d) = q.dims4()?;
    let dv = v.dims4()?.3;
    let mut p = Attend::new(o.scale.unwrap_or(1.0 / (d.max(1) as f32).sqrt())).causal(o.causal).window(o.window);
    p.softcap = o.softcap;
    if let Some(s) = &o.sinks
        && s.len() != h
    {
        return Err(Error::Shape { op, tensor: "sinks", shape: vec![s.len()], expected: format!("({h}) query heads") });
    }
    p.sinks = o.sinks.as_deref();
    if let Some(isa) = o.isa {
        p.isa = isa;
    }
    let mut out = vec![0f32; b * h * tq * dv];
    let mut lse = vec![0f32; b * h * tq];
    let work = {
        let mut ov = ViewMut::new("out", &mut out, [b, h, tq, dv], [tq * h * dv, dv, h * dv])?;
        let (qs, ql) = q.storage_and_layout();
        let (ks, kl) = k.storage_and_layout();
        let (vs, vl) = v.storage_and_layout();
        macro_rules! go {
            ($q:expr, $k:expr, $v:expr) => {
                match what {
                    What::Blocks(t) => p.clone().table(t).run($q, $k, $v, &mut ov, Some(&mut lse))?,
                    What::Lists(l) => indexed_kernel(&p, l, $q, $k, $v, &mut ov, Some(&mut lse))?,
                    What::Both(t, l) => {
                        indexed_kernel(&p.clone().table(Some(t)), l, $q, $k, $v, &mut ov, Some(&mut lse))?
                    }
                }
            };
        }
        match (view("q", &qs, ql)?, view("k", &ks, kl)?, view("v", &vs, vl)?) {
            (AnyView::F32(q), AnyView::F32(k), AnyView::F32(v)) => go!(&q, &k, &v),
            (AnyView::Bf16(q), AnyView::Bf16(k), AnyView::Bf16(v)) => go!(&q, &k, &v),
            _ => return Err(Error::Dtype { op, tensor: "k or v", dtype: "mixed".into(), expected: "the dtype of q" }),
        }
    };
    wrap(out, lse, [b, h, tq, dv], work)
}

fn wrap(out: Vec<f32>, lse: Vec<f32>, [b, h, t, d]: [usize; 4], work: Work) -> Result<Attended> {
    let out = Tensor::from_vec(out, (b, t, h, d), &Device::Cpu)?.transpose(1, 2)?;
    let lse = Tensor::from_vec(lse, (b, h, t), &Device::Cpu)?;
    Ok(Attended { out, lse, work })
}
