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

/// One head's queries and keys.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// (tq, d).
    pub q: &'a [f32],
    /// (tk, d).
    pub k: &'a [f32],
    /// Queries.
    pub tq: usize,
    /// Keys.
    pub tk: usize,
    /// Channels.
    pub d: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// Whether queries see no later keys (bottom-right aligned).
    pub causal: bool,
}

impl Head<'_> {
    fn visible(&self, i: usize) -> usize {
        if self.causal { self.tk - self.tq + i + 1 } else { self.tk }
    }

    fn cells(&self) -> (usize, usize) {
        (GRID.min(self.tq), GRID.min(self.tk))
    }

    /// The exact weights of query `i` over the keys that it may see, into `w`.
    fn weights(&self, i: usize, w: &mut Vec<f32>) {
        let d = self.d;
        let qi = &self.q[i * d..(i + 1) * d];
        w.clear();
        w.extend(
            self.k
                .chunks_exact(d)
                .take(self.visible(i))
                .map(|kj| qi.iter().zip(kj).map(|(a, b)| a * b).sum::<f32>() * self.scale),
        );
        let top = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        w.iter_mut().for_each(|x| *x = (*x - top).exp());
        let total: f32 = w.iter().sum();
        w.iter_mut().for_each(|x| *x /= total);
    }

    /// Exact weights summed by cell; of the keys that `unvisited` marks by 0 alone, if given.
    fn masses(&self, visited: Option<&HeadSelection>) -> Vec<f64> {
        let (gr, gc) = self.cells();
        let mut sum = vec![0f64; gr * gc];
        let (mut w, mut hit) = (Vec::new(), vec![0u8; self.tk]);
        for i in rows(self.tq) {
            self.weights(i, &mut w);
            if let Some(s) = visited {
                mask::mask_row(s, i, self.tq, self.causal, &mut hit);
            }
            let row = i * gr / self.tq * gc;
            for (j, x) in w.iter().enumerate().filter(|(j, _)| hit[*j] == 0) {
                sum[row + j * gc / self.tk] += f64::from(*x);
            }
        }
        sum
    }

    fn map(&self, system: usize, caption: &str, cells: Vec<u8>) -> Map {
        let (rows, cols) = self.cells();
        Map { system, caption: caption.into(), rows, cols, cells }
    }
}

/// Masses as bytes: each row of cells scaled to the peak that `of` has there and drawn as a square root, so that faint
/// attention shows.
fn shade(x: &[f64], of: &[f64], cols: usize) -> Vec<u8> {
    let mut cells = Vec::with_capacity(x.len());
    for (row, of) in x.chunks(cols.max(1)).zip(of.chunks(cols.max(1))) {
        let top = of.iter().copied().fold(0.0, f64::max);
        cells.extend(row.iter().map(|x| if top > 0.0 { ((x / top).sqrt() * 255.0).round() as u8 } else { 0 }));
    }
    cells
}

/// The exact attention map of one head, each row of cells scaled to its own peak.
pub fn exact(system: usize, head: &Head) -> Map {
    let mass = head.masses(None);
    head.map(system, "exact attention", shade(&mass, &mass, head.cells().1))
}

/// What a selection misses of one head's exact map, on the scale of that map, and the share of the weights that it
/// keeps (of the queries looked at).
pub fn missed(system: usize, head: &Head, s: &HeadSelection) -> (Map, f64) {
    let (all, lost) = (head.masses(None), head.masses(Some(s)));
    let share = lost.iter().sum::<f64>() / all.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    (head.map(system, "exact attention that is not visited", shade(&lost, &all, head.cells().1)), 1.0 - share)
}

/// The share of each cell's visible pairs that a selection visits.
pub fn selection(system: usize, s: &HeadSelection, tq: usize, tk: usize, causal: bool) -> Map {
    let head = Head { q: &[], k: &[], tq, tk, d: 0, scale: 1.0, causal };
    let (gr, gc) = head.cells();
    let mut seen = vec![0u64; gr * gc];
    let mut all = vec![0u64; gr * gc];
    let mut hit = vec![0u8; tk];
    for i in rows(tq) {
        mask::mask_row(s, i, tq, causal, &mut hit);
        let row = i * gr / tq * gc;
        for (j, h) in hit[..head.visible(i)].iter().enumerate() {
            let c = row + j * gc / tk;
            all[c] += 1;
            seen[c] += u64::from(*h);
        }
    }
    let cells = seen.iter().zip(&all).map(|(s, a)| if *a == 0 { 0 } else { share(*s, *a) }).collect();
    head.map(system, "keys visited by the prompt's queries", cells)
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
        let m = exact(0, &Head { q: &eye(40.0), k: &eye(1.0), tq: n, tk: n, d: n, scale: 1.0, causal: true });
        for i in 0..n {
            for j in 0..n {
                let c = m.cells[i * n + j];
                assert!(if i == j { c == 255 } else { c <= 1 }, "{i},{j}: {c}");
            }
        }
    }

    #[test]
    fn what_is_missed_is_what_is_not_visited() {
        // Equal weights: query i spreads 1/(i + 1) over its keys; only block 0 is visited.
        let zero = vec![0f32; 4];
        let head = Head { q: &zero, k: &zero, tq: 4, tk: 4, d: 1, scale: 1.0, causal: true };
        let s = HeadSelection::of_blocks(HeadTable::from_lists(4, 2, vec![vec![0]]));
        let (map, kept) = missed(1, &head, &s);
        assert_eq!(map.cells, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 255, 255]);
        assert!((kept - (1.0 + 1.0 + 2.0 / 3.0 + 0.5) / 4.0).abs() < 1e-6, "{kept}");
        // Without a direction every query sees all four.
        let (_, kept) = missed(1, &Head { causal: false, ..head }, &s);
        assert!((kept - 0.5).abs() < 1e-6, "{kept}");
    }

    #[test]
    fn selections_are_causal_and_join_blocks_with_keys() {
        let t = HeadTable::from_lists(2, 2, vec![vec![0], vec![1]]);
        let k = HeadKeys::from_lists(4, vec![vec![0]]);
        let m = selection(1, &HeadSelection::of_both(t, k), 4, 4, true);
        assert_eq!(m.cells, [255, 0, 0, 0, 255, 255, 0, 0, 255, 0, 255, 0, 255, 0, 255, 255]);
    }

    #[test]
    fn row_masks_count() {
        let mut t = HeadTable::from_lists(2, 2, vec![vec![0], vec![0, 1]]);
        t.rows = Some(vec![0b11, 0b10, 0b11]);
        let m = selection(1, &HeadSelection::of_blocks(t), 4, 4, true);
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
