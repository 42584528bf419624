//! Static patterns: tables of blocks that depend on positions alone.

use foveal_kernels::HeadTable;

/// Most queries of a tile with row masks.
const TILE: usize = 64;

/// The table of `tq` queries, the first of which stands at position `offset`, in which a query at position p
/// visits the key blocks `visited(p / block)`, ascending and up to its own. Takes time linear in its entries.
///
/// Where queries do not start at a block of positions (a later chunk of a prompt), tiles of queries reach over
/// the ends of blocks; a bit a query then says whose blocks are whose.
pub(crate) fn table<I: IntoIterator<Item = u32>>(
    block: usize,
    tq: usize,
    offset: usize,
    visited: impl Fn(usize) -> I,
) -> HeadTable {
    let last = (offset + tq).saturating_sub(1) / block;
    if offset.is_multiple_of(block) {
        let lists = (offset / block..).take(tq.div_ceil(block)).map(|b| visited(b).into_iter().collect()).collect();
        return HeadTable::from_lists(block, block, lists);
    }
    let mut out =
        HeadTable { block_q: TILE, block_k: block, indptr: vec![0], blocks: Vec::new(), rows: Some(Vec::new()) };
    let mut bits = vec![0u64; last + 1];
    let mut named = Vec::new();
    for r0 in (0..tq).step_by(TILE) {
        let r1 = (r0 + TILE).min(tq);
        for b in (offset + r0) / block..=(offset + r1 - 1) / block {
            // Queries of the tile that stand in block b.
            let from = (b * block).saturating_sub(offset).max(r0) - r0;
            let to = ((b + 1) * block - offset).min(r1) - r0;
            let rows = (u64::MAX >> (TILE - (to - from))) << from;
            for x in visited(b) {
                if bits[x as usize] == 0 {
                    named.push(x);
                }
                bits[x as usize] |= rows;
            }
        }
        named.sort_unstable();
        for x in named.drain(..) {
            out.blocks.push(x);
            out.rows.get_or_insert_default().push(std::mem::take(&mut bits[x as usize]));
        }
        out.indptr.push(out.blocks.len());
    }
    out
}
