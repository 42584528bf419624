//! Run selectors over all heads of a problem, then attend over what they chose.

use super::{Grid, HeadProblem, HeadSelection, Mat, Selector};
use crate::error::{Error, Result};
use crate::prim::{AttendOptions, Attended, attend, attend_selected};
use candle_core::Tensor;
use foveal_kernels::Work;
use rayon::prelude::*;
use std::time::{Duration, Instant};

/// The layer number of tensors that belong to no model: past every layer that a system treats apart.
pub const NO_LAYER: usize = usize::MAX;

/// Where attention takes place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Layer number, handed to the selectors.
    pub layer: usize,
    /// The token grid among the keys, if there is one.
    pub grid: Option<Grid>,
}

impl At {
    /// In no model, on no grid.
    pub const NOWHERE: Self = Self { layer: NO_LAYER, grid: None };
}

/// Attention under a prefill system.
pub struct Prefilled {
    /// Output, log-sum-exp and the work of the exact part.
    pub attended: Attended,
    /// Work of the estimators.
    pub select: Work,
    /// Time of the estimators, within the caller's own measurement.
    pub select_time: Duration,
    /// What each (batch, query head) visited, batch major; empty when every head was dense.
    pub selections: Vec<HeadSelection>,
}

/// Attention of q (B, H, Tq, D) over k, v (B, H_kv, Tk, D): each query head by the selector
/// that `system` names for it, `None` meaning exact attention. q and k are f32, and so are estimates. Gradients
/// flow through the attention, not through the choice.
///
/// Errors: shapes that do not fit, a problem outside of a selector's [`super::Domain`].
pub fn prefill<'s>(
    system: impl Fn(usize) -> Option<&'s dyn Selector> + Sync,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttendOptions,
    at: At,
) -> Result<Prefilled> {
    let (b, h, tq, d) = q.dims4()?;
    let (_, hkv, tk, _) = k.dims4()?;
    if (0..h).all(|x| system(x).is_none()) || tq == 0 {
        let attended = attend(q, k, v, options, None)?;
        return Ok(Prefilled {
            attended,
            select: Work::default(),
            select_time: Duration::ZERO,
            selections: Vec::new(),
        });
    }
    if hkv == 0 || !h.is_multiple_of(hkv) {
        return Err(foveal_kernels::KernelError::Groups { op: "prefill", heads: h, kv_heads: hkv }.into());
    }
    for s in (0..h).filter_map(&system) {
        s.domain().check("prefill", options.causal, at.grid, tk)?;
    }
    if tk < tq {
        return Err(Error::Shape {
            op: "prefill",
            tensor: "k",
            shape: k.dims().to_vec(),
            expected: format!("at least as many tokens as q's {tq}"),
        });
    }
    let scale = options.scale.unwrap_or(1.0 / (d.max(1) as f32).sqrt());
    let start = Instant::now();
    let chosen: Vec<(HeadSelection, Work)> = with_rows("q", q, |q, qs| {
        with_rows("k", k, |k, ks| {
            (0..b * h)
                .into_par_iter()
                .map(|bh| {
                    let (bi, hi) = (bh / h, bh % h);
                    let kh = hi / (h / hkv);
                    let problem = HeadProblem {
                        layer: at.layer,
                        head: hi,
                        causal: options.causal,
                        grid: at.grid,
                        ..HeadProblem::new(
                            Mat::new(&q[bi * qs[0] + hi * qs[1]..], tq, d, qs[2]),
                            Mat::new(&k[bi * ks[0] + kh * ks[1]..], tk, d, ks[2]),
                            scale,
                        )
                    };
                    match system(hi) {
                        Some(s) => s.select(&problem),
                        None => Ok((HeadSelection::dense(&problem), Work::default())),
                    }
                })
                .collect::<Result<Vec<_>>>()
        })
    })???;
    let select_time = start.elapsed();
    let select = chosen.iter().map(|c| c.1).sum();
    let selections: Vec<HeadSelection> = chosen.into_iter().map(|c| c.0).collect();
    let attended = attend_selected(q, k, v, options, selections.clone())?;
    Ok(Prefilled { attended, select, select_time, selections })
}

/// Hand the f32 memory of a (B, H, T, D) tensor with contiguous rows, and its strides, to `f`.
pub(super) fn with_rows<R>(name: &'static str, t: &Tensor, f: impl FnOnce(&[f32], [usize; 3]) -> R) -> Result<R> {
    let t = crate::prim::tensor::rows_contiguous("prefill", name, &t.detach())?;
    let (storage, layout) = t.storage_and_layout();
    let s = layout.stride();
    match &*storage {
        candle_core::Storage::Cpu(candle_core::CpuStorage::F32(x)) => {
            Ok(f(&x[layout.start_offset()..], [s[0], s[1], s[2]]))
        }
        _ => Err(Error::Dtype {
            op: "prefill",
            tensor: name,
            dtype: format!("{:?}", t.dtype()),
            expected: "f32 (selectors estimate in f32)",
        }),
    }
}
