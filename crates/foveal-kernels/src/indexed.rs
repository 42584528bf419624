//! Exact attention over per-query-group key lists.

use crate::attend::{Attend, AttendGrads, Source, Upstream, backward, check_shapes, drive};
use crate::error::{KernelError, Result};
use crate::table::KeyLists;
use crate::view::{Element, View, ViewMut};
use crate::work::Work;

/// Attend every query group to its own keys; parameters and outputs as in [`Attend::run`].
///
/// With a block table in `params` the keys come on top of its blocks, in one pass over both; a key
/// inside a visited block is visited once, by all queries of its group whatever row masks say. Then, for each
/// head, the queries of a block or of a group must be a multiple of the other's.
///
/// Rows of K and V are read in place through pointers, so a list costs what as many consecutive
/// keys cost. Groups of 16 queries or more fill the vectors; smaller ones work too.
pub fn attend_indexed<T: Element>(
    params: &Attend,
    lists: &KeyLists,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    out: &mut ViewMut<f32>,
    lse: Option<&mut [f32]>,
) -> Result<Work> {
    const OP: &str = "attend_indexed";
    check_shapes(OP, q.shape, k.shape, v.shape, out.shape)?;
    let source = source(OP, params, lists)?;
    drive::run(OP, params, source, q, k, v, out, lse)
}

/// Gradients of [`attend_indexed`]; as [`Attend::backward`].
pub fn attend_indexed_backward<T: Element>(
    params: &Attend,
    lists: &KeyLists,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    up: &Upstream,
    grads: AttendGrads,
) -> Result<Work> {
    const OP: &str = "attend_indexed_backward";
    check_shapes(OP, q.shape, k.shape, v.shape, up.out.shape)?;
    let source = source(OP, params, lists)?;
    backward::run(OP, params, source, [q, k, v], up, grads)
}

/// The lists, and the table beside them if the two go together.
fn source<'a>(op: &'static str, params: &'a Attend, lists: &'a KeyLists) -> Result<Source<'a>> {
    let Some(t) = params.table else { return Ok(Source::Keys(&lists.heads)) };
    for (t, l) in t.heads.iter().zip(&lists.heads) {
        // Groups and blocks of no queries are refused where tables and lists are checked.
        if l.group > 0 && t.block_q > 0 && !t.block_q.is_multiple_of(l.group) && !l.group.is_multiple_of(t.block_q) {
            return Err(KernelError::Param {
                op,
                name: "group",
                value: format!("{} queries beside blocks of {}", l.group, t.block_q),
                remedy: "let one be a multiple of the other (lists may be given twice, for smaller groups)".into(),
            });
        }
    }
    Ok(Source::Both(&t.heads, &lists.heads))
}
