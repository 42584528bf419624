//! What a selection really visits: as a picture, and as a share of the causal pairs.

use super::{HeadSelection, TokenOrder};

/// One part of a selection as a block table; key lists are tables of one-key blocks.
struct Part<'a> {
    block_q: usize,
    block_k: usize,
    indptr: &'a [usize],
    blocks: &'a [u32],
    rows: Option<&'a [u64]>,
}

impl Part<'_> {
    /// Entries of the query block `qb`; none past the last.
    fn entries(&self, qb: usize) -> std::ops::Range<usize> {
        self.indptr.get(qb..qb + 2).map_or(0..0, |p| p[0]..p[1])
    }

    /// Keys of entry `e` among `tk`.
    fn keys(&self, e: usize, tk: usize) -> std::ops::Range<usize> {
        let lo = (self.blocks[e] as usize * self.block_k).min(tk);
        lo..(lo + self.block_k).min(tk)
    }
}

/// The block part.
fn block_part(s: &HeadSelection) -> Option<Part<'_>> {
    let t = s.blocks.as_ref()?;
    let rows = t.rows.as_deref();
    Some(Part { block_q: t.block_q, block_k: t.block_k, indptr: &t.indptr, blocks: &t.blocks, rows })
}

/// The single-key part.
fn key_part(s: &HeadSelection) -> Option<Part<'_>> {
    let k = s.keys.as_ref()?;
    Some(Part { block_q: k.group, block_k: 1, indptr: &k.indptr, blocks: &k.keys, rows: None })
}

/// Keys that query `i` of `tq` may see of `tk`.
fn visible(i: usize, tq: usize, tk: usize, causal: bool) -> usize {
    if causal { tk - tq + i + 1 } else { tk }
}

/// Call `f(first key, end of keys)` for every run of visible keys that query `i` of `tq`
/// visits. A pair named twice is reported twice.
fn runs_of(selection: &HeadSelection, i: usize, [tq, tk]: [usize; 2], causal: bool, mut f: impl FnMut(usize, usize)) {
    let visible = visible(i, tq, tk, causal);
    let place = selection.q_order.as_ref().map_or(i, |o| o.place()[i] as usize);
    let key_at = selection.k_order.as_ref().map(TokenOrder::at);
    for part in block_part(selection).into_iter().chain(key_part(selection)) {
        let (qb, bit) = (place / part.block_q, place % part.block_q);
        for e in part.entries(qb) {
            if part.rows.is_some_and(|r| r[e] >> bit & 1 == 0) {
                continue;
            }
            if let Some(at) = key_at {
                let keys = at[part.keys(e, tk)].iter().map(|&j| j as usize);
                keys.filter(|&j| j < visible).for_each(|j| f(j, j + 1));
                continue;
            }
            let keys = part.keys(e, visible);
            if !keys.is_empty() {
                f(keys.start, keys.end);
            }
        }
    }
}

/// [`runs_of`] every query, as `f(query, first key, end of keys)`.
fn runs(selection: &HeadSelection, [tq, tk]: [usize; 2], causal: bool, mut f: impl FnMut(usize, usize, usize)) {
    for i in 0..tq {
        runs_of(selection, i, [tq, tk], causal, |lo, hi| f(i, lo, hi));
    }
}

/// Write 1 to `row`, one element a key, where query `i` of `tq` attends to a key that it may see,
/// and 0 elsewhere.
pub fn mask_row(selection: &HeadSelection, i: usize, tq: usize, causal: bool, row: &mut [u8]) {
    row.fill(0);
    runs_of(selection, i, [tq, row.len()], causal, |lo, hi| row[lo..hi].fill(1));
}

/// What the selection visits of a problem (bottom-right aligned if causal) as a (tq, tk) picture of 0
/// and 1. The only thing here that takes O(tq·tk) memory; for `apply --mask`, plots and tests.
pub fn dense_mask(selection: &HeadSelection, tq: usize, tk: usize, causal: bool) -> Vec<u8> {
    let mut out = vec![0u8; tq * tk];
    runs(selection, [tq, tk], causal, |i, lo, hi| out[i * tk + lo..i * tk + hi].fill(1));
    out
}

/// Visible (query, key) pairs that the selection names.
pub fn pairs(selection: &HeadSelection, tq: usize, tk: usize, causal: bool) -> u64 {
    let mut n = 0;
    runs(selection, [tq, tk], causal, |_, lo, hi| n += (hi - lo) as u64);
    n
}

/// Pairs visited over visible pairs, 0 to 1; 1 for an empty problem. Masked pairs inside
/// a visited tile do not count: see [`tile_pairs`] for what a kernel computes.
pub fn density(selection: &HeadSelection, tq: usize, tk: usize, causal: bool) -> f64 {
    let all: u64 = (0..tq).map(|i| visible(i, tq, tk, causal) as u64).sum();
    if all == 0 { 1.0 } else { pairs(selection, tq, tk, causal) as f64 / all as f64 }
}

/// Pairs inside visited tiles, masked ones included, for the block part and the single-key part.
pub fn tile_pairs(selection: &HeadSelection, tq: usize, tk: usize) -> (u64, u64) {
    let tq = selection.places(tq);
    let area = |t: Part| -> u64 {
        (0..t.indptr.len().saturating_sub(1))
            .map(|qb| {
                let rows = ((qb + 1) * t.block_q).min(tq) - (qb * t.block_q).min(tq);
                let cols: usize = t.entries(qb).map(|e| t.keys(e, tk).len()).sum();
                (rows * cols) as u64
            })
            .sum()
    };
    (block_part(selection).map_or(0, area), key_part(selection).map_or(0, area))
}

/// Whether no (query, key) pair is named twice, which is what merging the block part and the
/// single-key part by log-sum-exp needs.
pub fn is_disjoint(selection: &HeadSelection, tq: usize, tk: usize, causal: bool) -> bool {
    let mut seen = vec![false; tq * tk];
    let mut twice = false;
    runs(selection, [tq, tk], causal, |i, lo, hi| {
        for x in &mut seen[i * tk + lo..i * tk + hi] {
            twice |= std::mem::replace(x, true);
        }
    });
    !twice
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal_kernels::{HeadKeys, HeadTable};

    #[test]
    fn pictures_and_shares_agree() {
        let s = HeadSelection {
            blocks: Some(HeadTable {
                block_q: 2,
                block_k: 3,
                indptr: vec![0, 1, 3],
                blocks: vec![0, 0, 1],
                rows: Some(vec![0b11, 0b10, 0b01]),
            }),
            keys: Some(HeadKeys { group: 3, indptr: vec![0, 1], keys: vec![4] }),
            ..HeadSelection::default()
        };
        let want = [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1];
        assert_eq!(dense_mask(&s, 3, 5, true), want);
        let mut row = [9; 5];
        mask_row(&s, 2, 3, true, &mut row);
        assert_eq!(row, want[10..]);
        assert_eq!(pairs(&s, 3, 5, true), 8 + 1);
        // Without a direction the keys of the last block count for every query that its bits name.
        assert_eq!(dense_mask(&s, 3, 5, false), [1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1]);
        assert!(!is_disjoint(&s, 3, 5, true));
        assert_eq!(tile_pairs(&s, 3, 5), (6 + 3 + 2, 3));
        let all = HeadSelection::of_blocks(HeadTable::dense_causal(2, 2, 3, 5));
        assert_eq!(density(&all, 3, 5, true), 1.0);
        assert!(is_disjoint(&all, 3, 5, true));
        assert_eq!(density(&HeadSelection::default(), 0, 0, true), 1.0);
    }

    #[test]
    fn orders_are_undone() {
        // Queries 2, -, 0, 1 in blocks of two; keys 3, 1, 0, 2 in blocks of two: block 0 sees keys {3, 1}, 1 {0, 2}.
        let order = |at: &[u32]| Some(TokenOrder::new(at.to_vec()).unwrap());
        let s = HeadSelection::of_blocks(HeadTable::from_lists(2, 2, vec![vec![0], vec![1]]))
            .in_order(order(&[2, TokenOrder::NONE, 0, 1]), order(&[3, 1, 0, 2]));
        s.check(3, 4).unwrap();
        assert_eq!(dense_mask(&s, 3, 4, false), [1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]);
        assert_eq!((pairs(&s, 3, 4, false), tile_pairs(&s, 3, 4)), (6, (8, 0)));
        assert!(is_disjoint(&s, 3, 4, false));
        assert!(s.check(4, 4).is_err() && s.check(3, 5).is_err());
    }
}
