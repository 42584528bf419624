//! Exact attention over per-query-group key lists.

use crate::attend::{Attend, Source, check_heads, check_shapes, drive};
use crate::error::{KernelError, Result};
use crate::table::KeyLists;
use crate::view::{Element, View, ViewMut};
use crate::work::Work;

/// Attend every query group to its own keys; parameters and outputs as in [`Attend::run`]
/// (`params.table` must be `None`).
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
    if params.table.is_some() {
        return Err(KernelError::Param {
            op: OP,
            name: "table",
            value: "a block table".into(),
            remedy: "give either key lists or a block table; for both, intersect them first".into(),
        });
    }
    let [b, h, tq, _] = q.shape;
    check_heads(OP, "key lists", lists.heads.len(), b * h)?;
    for l in &lists.heads {
        l.check(tq, k.shape[2])?;
    }
    drive::run(OP, params, Source::Keys(&lists.heads), q, k, v, out, lse)
}
