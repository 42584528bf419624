//! Static patterns: tables of blocks that depend on positions alone.

use foveal_kernels::HeadTable;
use std::ops::Range;

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

/// The table of `tq` queries, of which query i visits the runs of keys that `runs(i, f)` hands to f: disjoint and not
/// empty, in any order. Tiles of queries carry a bit a query for each key, unless no tile needs it. Takes time linear in
/// runs and entries, but for a sort of the ends of a tile's runs.
pub(crate) fn runs_table(tq: usize, tk: usize, runs: impl Fn(usize, &mut dyn FnMut(Range<usize>))) -> HeadTable {
    let mut out = HeadTable { block_q: TILE, block_k: 1, indptr: vec![0], blocks: Vec::new(), rows: None };
    let (mut marks, mut plain) = (Vec::new(), true);
    // Bits of the queries whose run starts or ends at a key.
    let mut turns = vec![0u64; tk + 1];
    let mut at: Vec<usize> = Vec::new();
    for r0 in (0..tq).step_by(TILE) {
        let n = TILE.min(tq - r0);
        for r in 0..n {
            runs(r0 + r, &mut |run| {
                for x in [run.start, run.end] {
                    if turns[x] == 0 {
                        at.push(x);
                    }
                    turns[x] ^= 1 << r;
                }
            });
        }
        at.sort_unstable();
        at.dedup();
        let mut rows = 0;
        for (i, &x) in at.iter().enumerate() {
            rows ^= std::mem::take(&mut turns[x]);
            if rows != 0 {
                out.blocks.extend(x as u32..at[i + 1] as u32);
                marks.resize(out.blocks.len(), rows);
                plain &= rows == u64::MAX >> (TILE - n);
            }
        }
        at.clear();
        out.indptr.push(out.blocks.len());
    }
    out.rows = (!plain).then_some(marks);
    out
}
