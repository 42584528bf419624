//! Pictures of attention, downsampled.

use crate::results::Map;
use foveal::sparse::{HeadSelection, mask};

/// Cells to a side.
pub const GRID: usize = 128;
/// Queries looked at; of a longer prompt every n-th.
const SAMPLES: usize = 1024;

fn rows(tq: usize) -> impl Iterator<Item = usize> {
    let step = tq.div_ceil(SAMPLES).max(1);
    (0..tq).step_by(step)
}

/// The exact causal attention map of one head: q (tq, d), k (tk, d), bottom-right aligned. Every
/// grid row is scaled to its own peak and drawn as a square root, so that faint attention shows.
pub fn exact(system: usize, q: &[f32], k: &[f32], tq: usize, tk: usize, d: usize, scale: f32) -> Map {
    let (gr, gc) = (GRID.min(tq), GRID.min(tk));
    let mut sum = vec![0f64; gr * gc];
    let mut w = Vec::new();
    for i in rows(tq) {
        let visible = tk - tq + i + 1;
        let qi = &q[i * d..(i + 1) * d];
        w.clear();
        w.extend((0..visible).map(|j| {
            let kj = &k[j * d..(j + 1) * d];
            qi.iter().zip(kj).map(|(a, b)| a * b).sum::<f32>() * scale
        }));
        let top = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        w.iter_mut().for_each(|x| *x = (*x - top).exp());
        let total: f32 = w.iter().sum();
        let row = i * gr / tq * gc;
        for (j, x) in w.iter().enumerate() {
            sum[row + j * gc / tk] += f64::from(x / total);
        }
    }
    let mut cells = Vec::with_capacity(gr * gc);
    for row in sum.chunks(gc) {
        let top = row.iter().copied().fold(0.0, f64::max);
        cells.extend(row.iter().map(|x| if top > 0.0 { ((x / top).sqrt() * 255.0).round() as u8 } else { 0 }));
    }
    Map { system, caption: "exact attention".into(), rows: gr, cols: gc, cells }
}

/// The share of each cell's causal pairs that a selection visits.
pub fn selection(system: usize, s: &HeadSelection, tq: usize, tk: usize) -> Map {
    let (gr, gc) = (GRID.min(tq), GRID.min(tk));
    let mut seen = vec![0u64; gr * gc];
    let mut all = vec![0u64; gr * gc];
    let mut hit = vec![0u8; tk];
    for i in rows(tq) {
        let visible = tk - tq + i + 1;
        mask::mask_row(s, i, tq, true, &mut hit);
        let row = i * gr / tq * gc;
        for (j, h) in hit[..visible].iter().enumerate() {
            let c = row + j * gc / tk;
            all[c] += 1;
            seen[c] += u64::from(*h);
        }
    }
    let cells = seen.iter().zip(&all).map(|(s, a)| if *a == 0 { 0 } else { share(*s, *a) }).collect();
    Map { system, caption: "keys visited by the prompt's queries".into(), rows: gr, cols: gc, cells }
}

/// One row per decoded query: the share of each cell's keys that it visited, of `total` keys.
pub fn strip(system: usize, visited: &[Vec<u32>], total: usize) -> Map {
    let gc = GRID.min(total.max(1));
    let mut cells = vec![0u8; visited.len() * gc];
    let mut all = vec![0u64; gc];
    (0..total).for_each(|j| all[j * gc / total] += 1);
    for (row, keys) in cells.chunks_mut(gc).zip(visited) {
        let mut seen = vec![0u64; gc];
        for &j in keys.iter().filter(|&&j| (j as usize) < total) {
            seen[j as usize * gc / total] += 1;
        }
        for ((c, s), a) in row.iter_mut().zip(&seen).zip(&all) {
            *c = if *s == 0 { 0 } else { share(*s, *a) };
        }
    }
    Map { system, caption: "keys visited by the last decoded queries".into(), rows: visited.len(), cols: gc, cells }
}

/// A share as a byte; anything visited at all stays visible.
fn share(seen: u64, all: u64) -> u8 {
    if seen == 0 { 0 } else { ((seen as f64 / all as f64).sqrt() * 255.0).round().clamp(24.0, 255.0) as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foveal_kernels::{HeadKeys, HeadTable};

    #[test]
    fn the_exact_map_of_a_known_head() {
        // Query i equals 10·e_i and keys are unit vectors: each query looks at its own position.
        let n = 4;
        let eye = |s: f32| (0..n * n).map(|x| if x / n == x % n { s } else { 0.0 }).collect::<Vec<f32>>();
        let m = exact(0, &eye(40.0), &eye(1.0), n, n, n, 1.0);
        for i in 0..n {
            for j in 0..n {
                let c = m.cells[i * n + j];
                assert!(if i == j { c == 255 } else { c <= 1 }, "{i},{j}: {c}");
            }
        }
    }

    #[test]
    fn selections_are_causal_and_join_blocks_with_keys() {
        let t = HeadTable::from_lists(2, 2, vec![vec![0], vec![1]]);
        let k = HeadKeys::from_lists(4, vec![vec![0]]);
        let m = selection(1, &HeadSelection::of_both(t, k), 4, 4);
        assert_eq!(m.cells, [255, 0, 0, 0, 255, 255, 0, 0, 255, 0, 255, 0, 255, 0, 255, 255]);
    }

    #[test]
    fn row_masks_count() {
        let mut t = HeadTable::from_lists(2, 2, vec![vec![0], vec![0, 1]]);
        t.rows = Some(vec![0b11, 0b10, 0b11]);
        let m = selection(1, &HeadSelection::of_blocks(t), 4, 4);
        assert_eq!(m.cells[8..], [0, 0, 255, 0, 255, 255, 255, 255]);
    }

    #[test]
    fn strips_keep_rare_visits_visible() {
        let m = strip(1, &[vec![0, 1, 2, 999], vec![500]], 1000);
        assert_eq!((m.rows, m.cols), (2, 128));
        assert!(m.cells[0] > 100 && m.cells[127] >= 24 && m.cells[64] == 0);
        assert_eq!(m.cells[128..].iter().filter(|c| **c > 0).count(), 1);
        assert_eq!(strip(1, &[vec![]], 0).cells.len(), 1);
    }
}
