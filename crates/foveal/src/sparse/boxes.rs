//! A token grid cut into boxes, and selections that name boxes.

use super::{Grid, HeadSelection, Mat, TokenOrder};
use crate::error::Result;
use foveal_kernels::{HeadKeys, HeadTable};

/// The boxes of a grid in raster order; those at the far ends may be smaller.
pub(crate) struct Boxes {
    /// Tokens of the grid, box by box.
    order: Vec<u32>,
    /// Where each box begins in the order, and the end of the last.
    starts: Vec<usize>,
    /// Tokens outside of the grid.
    text: Vec<u32>,
}

impl Boxes {
    /// Boxes of `size` tokens along frames, rows and columns (0 or too much: all of them) among `tokens` tokens.
    pub fn new(grid: Grid, size: [usize; 3], tokens: usize) -> Self {
        let sides = [grid.t, grid.h, grid.w];
        let [a, b, c] = [0, 1, 2].map(|i| if size[i] == 0 { sides[i] } else { size[i].min(sides[i]) });
        let mut order = Vec::with_capacity(grid.tokens());
        let mut starts = vec![0];
        for t in (0..grid.t).step_by(a) {
            for h in (0..grid.h).step_by(b) {
                for w in (0..grid.w).step_by(c) {
                    for t in t..(t + a).min(grid.t) {
                        for h in h..(h + b).min(grid.h) {
                            let row = grid.token([t, h, w]) as u32;
                            order.extend(row..row + c.min(grid.w - w) as u32);
                        }
                    }
                    starts.push(order.len());
                }
            }
        }
        let text = (0..tokens as u32).filter(|&x| !grid.range().contains(&(x as usize))).collect();
        Self { order, starts, text }
    }

    /// Number of boxes.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Tokens of the grid.
    pub fn tokens(&self) -> usize {
        self.order.len()
    }

    /// Tokens of box `b`.
    pub fn members(&self, b: usize) -> &[u32] {
        &self.order[self.starts[b]..self.starts[b + 1]]
    }

    /// Most tokens of a box.
    pub fn largest(&self) -> usize {
        self.starts.windows(2).map(|s| s[1] - s[0]).max().unwrap_or(0)
    }

    /// Mean of the rows of each box, (boxes, cols), and the flops.
    pub fn means(&self, m: &Mat) -> (Vec<f32>, u64) {
        let mut out = vec![0f32; self.len() * m.cols];
        for (b, o) in out.chunks_exact_mut(m.cols.max(1)).enumerate() {
            let rows = self.members(b);
            for &r in rows {
                o.iter_mut().zip(m.row(r as usize)).for_each(|(o, x)| *o += x);
            }
            let inv = 1.0 / rows.len() as f32;
            o.iter_mut().for_each(|x| *x *= inv);
        }
        (out, ((self.tokens() + self.len()) * m.cols) as u64)
    }

    /// The selection in which queries of the grid visit boxes and all text, and text visits everything. Queries are
    /// taken box by box, in tiles of up to `block_q` (at most 64); `chosen(box, queries, bits)` sets bit r of
    /// `bits[b]` where the r-th of these queries visits box b. With `alike` all queries of a tile are known to
    /// choose the same, and no bits are kept.
    ///
    /// Key blocks have as many tokens as divide all boxes. Text is a part of the table if they divide it, else it is
    /// visited as single keys.
    pub fn selection(
        &self,
        block_q: usize,
        alike: bool,
        mut chosen: impl FnMut(usize, &[u32], &mut [u64]),
    ) -> Result<HeadSelection> {
        let gcd = |mut a: usize, mut b: usize| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        let tile = self.starts.windows(2).fold(0, |x, s| gcd(x, s[1] - s[0])).max(1);
        let block_q = block_q.min(self.largest()).clamp(1, 64);
        let tiled = self.text.len().is_multiple_of(tile);
        let text = self.tokens() / tile..(self.tokens() + self.text.len()) / tile;
        let mut table = HeadTable { block_q, block_k: tile, indptr: vec![0], blocks: Vec::new(), rows: None };
        let mut rows = Vec::new();
        let mut at = Vec::with_capacity(self.tokens() + self.text.len() + self.len() * block_q);
        let mut bits = vec![0u64; self.len()];
        for (b, queries) in (0..self.len()).flat_map(|b| self.members(b).chunks(block_q).map(move |q| (b, q))) {
            bits.fill(0);
            chosen(b, queries, &mut bits);
            for (b, &bits) in bits.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                let blocks = (self.starts[b] / tile) as u32..(self.starts[b + 1] / tile) as u32;
                rows.extend(blocks.clone().map(|_| bits));
                table.blocks.extend(blocks);
            }
            if tiled {
                rows.extend(text.clone().map(|_| u64::MAX));
                table.blocks.extend(text.clone().map(|x| x as u32));
            }
            table.indptr.push(table.blocks.len());
            at.extend_from_slice(queries);
            at.resize(at.len().next_multiple_of(block_q), TokenOrder::NONE);
        }
        for queries in self.text.chunks(block_q) {
            let end = if tiled { text.end } else { text.start };
            rows.extend((0..end).map(|_| u64::MAX));
            table.blocks.extend(0..end as u32);
            table.indptr.push(table.blocks.len());
            at.extend_from_slice(queries);
        }
        if !alike {
            table.rows = Some(rows);
        }
        let keys = (!tiled).then(|| {
            let n = table.indptr.len() - 1;
            let places = self.tokens() as u32..(self.tokens() + self.text.len()) as u32;
            let indptr = (0..=n).map(|i| i * places.len()).collect();
            HeadKeys { group: block_q, indptr, keys: (0..n).flat_map(|_| places.clone()).collect() }
        });
        let order = TokenOrder::new(self.order.iter().chain(&self.text).copied().collect())?;
        let selection = HeadSelection { keys, ..HeadSelection::of_blocks(table) };
        Ok(selection.in_order(Some(TokenOrder::new(at)?), Some(order)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::mask::{dense_mask, is_disjoint};

    #[test]
    fn boxes_cover_the_grid_and_text_sees_and_is_seen() {
        for (grid, size, tokens) in [
            (Grid { first: 3, t: 2, h: 4, w: 6 }, [1, 2, 3], 55),
            (Grid { first: 0, t: 3, h: 5, w: 7 }, [2, 2, 4], 105),
            (Grid { first: 6, t: 1, h: 4, w: 4 }, [0, 2, 2], 24),
        ] {
            let boxes = Boxes::new(grid, size, tokens);
            let mut all = boxes.order.clone();
            all.sort_unstable();
            assert!(all.iter().map(|&x| x as usize).eq(grid.range()));
            for alike in [true, false] {
                let s = boxes.selection(5, alike, |own, q, bits| bits[own] = (1 << q.len()) - 1).unwrap();
                s.check(tokens, tokens).unwrap();
                assert!(is_disjoint(&s, tokens, tokens, false));
                let side = [grid.t, grid.h, grid.w];
                let cell = |x: usize| {
                    grid.place(x).map(|p| [0, 1, 2].map(|i| p[i] / if size[i] == 0 { side[i] } else { size[i] }))
                };
                let mask = dense_mask(&s, tokens, tokens, false);
                for (i, row) in mask.chunks_exact(tokens).enumerate() {
                    for (j, &x) in row.iter().enumerate() {
                        let want = cell(i).is_none() || cell(j).is_none() || cell(i) == cell(j);
                        assert_eq!(x, u8::from(want), "{grid} query {i} key {j}");
                    }
                }
            }
        }
    }
}
