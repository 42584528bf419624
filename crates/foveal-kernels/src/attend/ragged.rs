//! Ragged batches: sequences of different lengths one after the other, without padding.

use crate::error::{KernelError, Result, same};
use std::ops::Range;

/// Bounds of the sequences of a ragged batch: sequence s has the queries `q[s]..q[s + 1]` and the keys
/// `k[s]..k[s + 1]`. Each is attended as a call of its own would attend it, with its own alignment.
#[derive(Clone, Copy, Debug)]
pub struct CuSeqlens<'a> {
    /// From 0 to all queries, ascending.
    pub q: &'a [usize],
    /// From 0 to all keys, ascending; as many as of queries.
    pub k: &'a [usize],
}

/// Tokens of one sequence.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) q: Range<usize>,
    pub(super) k: Range<usize>,
}

/// The sequences of a call: those that `bounds` name, or everything as one.
pub(super) fn pieces(
    op: &'static str,
    bounds: Option<CuSeqlens>,
    [b, _, tq, _]: [usize; 4],
    tk: usize,
) -> Result<Vec<Piece>> {
    let Some(CuSeqlens { q, k }) = bounds else { return Ok(vec![Piece { q: 0..tq, k: 0..tk }]) };
    same(op, "batch", "q", b, "a ragged batch", 1)?;
    same(op, "bounds", "cu_seqlens.q", q.len(), "cu_seqlens.k", k.len())?;
    for (name, bounds, end) in [("cu_seqlens.q", q, tq), ("cu_seqlens.k", k, tk)] {
        if bounds.first() != Some(&0) || bounds.last() != Some(&end) || bounds.windows(2).any(|w| w[0] > w[1]) {
            return Err(KernelError::Param {
                op,
                name,
                value: format!("{:?}", &bounds[..bounds.len().min(8)]),
                remedy: format!("give ascending bounds from 0 to the {end} tokens there are"),
            });
        }
    }
    let range = |x: &[usize]| x[0]..x[1];
    Ok(q.windows(2).zip(k.windows(2)).map(|(q, k)| Piece { q: range(q), k: range(k) }).collect())
}
