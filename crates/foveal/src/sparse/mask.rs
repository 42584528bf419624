//! What a selection really visits: as a picture, and as a share of the causal pairs.

use super::HeadSelection;
use foveal_kernels::HeadTable;

/// The parts of a selection as block tables; key lists are tables of one-key blocks.
fn tables(selection: &HeadSelection) -> impl Iterator<Item = HeadTable> + '_ {
    let keys = selection.keys.iter().map(|k| HeadTable {
        block_q: k.group,
        block_k: 1,
        indptr: k.indptr.clone(),
        blocks: k.keys.clone(),
        rows: None,
    });
    selection.blocks.iter().cloned().chain(keys)
}

/// Call `f(query, first key, end of keys)` for every run of causally visible keys that one query
/// visits. A pair named twice is reported twice.
fn runs(selection: &HeadSelection, tq: usize, tk: usize, mut f: impl FnMut(usize, usize, usize)) {
    let off = tk - tq;
    for t in tables(selection) {
        for qb in 0..t.indptr.len().saturating_sub(1) {
            for e in t.indptr[qb]..t.indptr[qb + 1] {
                let lo = t.blocks[e] as usize * t.block_k;
                let hi = (lo + t.block_k).min(tk);
                for (bit, i) in (qb * t.block_q..((qb + 1) * t.block_q).min(tq)).enumerate() {
                    let on = t.rows.as_ref().is_none_or(|r| r[e] >> bit & 1 == 1);
                    let hi = hi.min(off + i + 1);
                    if on && lo < hi {
                        f(i, lo, hi);
                    }
                }
            }
        }
    }
}

/// What the selection visits of a causal, bottom-right aligned problem as a (tq, tk) picture of 0
/// and 1. The only thing here that takes O(tq·tk) memory; for `apply --mask`, plots and tests.
pub fn dense_mask(selection: &HeadSelection, tq: usize, tk: usize) -> Vec<u8> {
    let mut out = vec![0u8; tq * tk];
    runs(selection, tq, tk, |i, lo, hi| out[i * tk + lo..i * tk + hi].fill(1));
    out
}

/// Causally visible (query, key) pairs that the selection names.
pub fn pairs(selection: &HeadSelection, tq: usize, tk: usize) -> u64 {
    let mut n = 0;
    runs(selection, tq, tk, |_, lo, hi| n += (hi - lo) as u64);
    n
}

/// Pairs visited over causally visible pairs, 0 to 1; 1 for an empty problem. Masked pairs inside
/// a visited tile do not count: see [`tile_pairs`] for what a kernel computes.
pub fn density(selection: &HeadSelection, tq: usize, tk: usize) -> f64 {
    let all = tq as u64 * (tk - tq) as u64 + tq as u64 * (tq as u64 + 1) / 2;
    if all == 0 { 1.0 } else { pairs(selection, tq, tk) as f64 / all as f64 }
}

/// Pairs inside visited tiles, masked ones included, for the block part and the single-key part.
pub fn tile_pairs(selection: &HeadSelection, tq: usize, tk: usize) -> (u64, u64) {
    let area = |t: HeadTable| -> u64 {
        (0..t.indptr.len().saturating_sub(1))
            .map(|qb| {
                let rows = ((qb + 1) * t.block_q).min(tq) - (qb * t.block_q).min(tq);
                let cols: usize =
                    t.row(qb).iter().map(|&x| t.block_k.min(tk.saturating_sub(x as usize * t.block_k))).sum();
                (rows * cols) as u64
            })
            .sum()
    };
    let blocks = selection.blocks.clone().map_or(0, area);
    let keys = tables(&HeadSelection { blocks: None, keys: selection.keys.clone() }).map(area).sum();
    (blocks, keys)
}

/// Whether no (query, key) pair is named twice, which is what merging the block part and the
/// single-key part by log-sum-exp needs.
pub fn is_disjoint(selection: &HeadSelection, tq: usize, tk: usize) -> bool {
    let mut seen = vec![false; tq * tk];
    let mut twice = false;
    runs(selection, tq, tk, |i, lo, hi| {
        for x in &mut seen[i * tk + lo..i * tk + hi] {
            twice |= std::mem::replace(x, true);
        }
    });
    !twice
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal_kernels::HeadKeys;

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
        };
        let want = [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1];
        assert_eq!(dense_mask(&s, 3, 5), want);
        assert_eq!(pairs(&s, 3, 5), 8 + 1);
        assert!(!is_disjoint(&s, 3, 5));
        assert_eq!(tile_pairs(&s, 3, 5), (6 + 3 + 2, 3));
        let all = HeadSelection { blocks: Some(HeadTable::dense_causal(2, 2, 3, 5)), keys: None };
        assert_eq!(density(&all, 3, 5), 1.0);
        assert!(is_disjoint(&all, 3, 5));
        assert_eq!(density(&HeadSelection::default(), 0, 0), 1.0);
    }
}
