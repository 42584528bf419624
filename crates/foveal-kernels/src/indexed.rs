//! Exact attention over per-query-group key lists.

use crate::attend::{Attend, check_shapes};
use crate::error::Result;
use crate::table::{BlockTable, HeadTable, KeyLists};
use crate::view::{Element, View, ViewMut};
use crate::work::Work;

/// Attend every query group to its own keys; parameters and outputs as in [`Attend::run`]
/// (`params.table` must be `None`).
pub fn attend_indexed<T: Element>(
    params: &Attend,
    lists: &KeyLists,
    q: &View<T>,
    k: &View<T>,
    v: &View<T>,
    out: &mut ViewMut<f32>,
    lse: Option<&mut [f32]>,
) -> Result<Work> {
    check_shapes("attend_indexed", q.shape, k.shape, v.shape, out.shape)?;
    let heads = lists
        .heads
        .iter()
        .map(|l| HeadTable {
            block_q: l.group,
            block_k: 1,
            indptr: l.indptr.clone(),
            blocks: l.keys.clone(),
            rows: None,
        })
        .collect();
    let table = BlockTable { heads };
    params.clone().table(Some(&table)).run(q, k, v, out, lse)
}
