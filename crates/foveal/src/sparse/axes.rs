//! Patterns on token grids that are products of one pattern an axis: visited in tiles, and how many tiles those are.
//!
//! A query at (t, h, w) visits the keys whose every coordinate is one that its own coordinate on that axis visits.
//! Queries of a tile of the grid then visit a box of keys, whose side is a tile's union on that axis; which query of the
//! tile visits which key of the box is the bitwise and of three masks, one an axis. A table so made takes time linear
//! in its entries, whatever the windows are.

use super::pattern::runs_table;
use super::{Grid, HeadProblem, HeadSelection, TokenOrder};
use foveal_kernels::HeadTable;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ops::Range;

/// Most queries of a tile: a bit each in a row mask.
pub const MAX_TILE: usize = 64;

/// One axis of a pattern. Coordinates c, c + classes, c + 2·classes, … are a class of their own (dilation): they visit
/// one another only, and tiles are cut from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    classes: usize,
    /// For each coordinate, the members of its class that it visits.
    reach: Vec<Range<usize>>,
}

/// Members of one class, and which members of a tile visit them, a bit each.
type Segment = (Range<usize>, u64);

impl Axis {
    /// An axis of `n` coordinates in `classes` classes; `reach(i, len)` are the members that member `i` of a class of
    /// `len` visits.
    pub fn new(n: usize, classes: usize, reach: impl Fn(usize, usize) -> Range<usize>) -> Self {
        let classes = classes.clamp(1, n.max(1));
        let reach = (0..n).map(|x| reach(x / classes, (n - x % classes).div_ceil(classes))).collect();
        Self { classes, reach }
    }

    /// Every coordinate visits every other.
    pub fn whole(n: usize) -> Self {
        Self::new(n, 1, |_, len| 0..len)
    }

    /// Coordinates.
    pub fn len(&self) -> usize {
        self.reach.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.reach.is_empty()
    }

    /// Coordinates that `x` visits, ascending.
    pub fn visited(&self, x: usize) -> impl Iterator<Item = usize> + '_ {
        let class = x % self.classes;
        self.reach[x].clone().map(move |i| class + i * self.classes)
    }

    /// Runs of coordinates that `x` visits.
    fn runs(&self, x: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let whole = (self.classes == 1).then(|| self.reach[x].clone());
        let single = if whole.is_some() { 0 } else { usize::MAX };
        whole.into_iter().chain(self.visited(x).take(single).map(|c| c..c + 1))
    }

    /// Tiles of `size` members of a class, as (class, first member, members).
    fn tiles(&self, size: usize) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        (0..self.classes.min(self.len())).flat_map(move |class| {
            let len = (self.len() - class).div_ceil(self.classes);
            (0..len).step_by(size.max(1)).map(move |i| (class, i..(i + size.max(1)).min(len)))
        })
    }

    /// What a tile visits, in ascending pieces.
    fn segments(&self, class: usize, tile: &Range<usize>) -> Vec<Segment> {
        let mut turns: Vec<(usize, u64)> = Vec::with_capacity(2 * tile.len());
        for (bit, i) in tile.clone().enumerate() {
            let r = &self.reach[class + i * self.classes];
            turns.extend([(r.start, 1 << bit), (r.end, 1 << bit)]);
        }
        turns.sort_unstable_by_key(|t| t.0);
        let (mut out, mut rows) = (Vec::new(), 0);
        for (i, &(at, bit)) in turns.iter().enumerate() {
            rows ^= bit;
            let end = turns.get(i + 1).map_or(at, |t| t.0);
            if rows != 0 && end > at {
                out.push((at..end, rows));
            }
        }
        out
    }

    /// Keys that tiles of `size` visit, in all.
    fn visits(&self, size: usize) -> usize {
        let of = |(class, tile)| self.segments(class, &tile).iter().map(|s| s.0.len()).sum::<usize>();
        self.tiles(size).map(of).sum()
    }

    /// How many (tile of queries, tile of keys) pairs hold a visited pair, both cut from classes.
    fn tile_visits(&self, q: usize, kv: usize) -> u64 {
        let kv = kv.max(1);
        let of = |(class, tile)| {
            let (mut count, mut next) = (0, 0);
            for (r, _) in self.segments(class, &tile) {
                let (from, to) = ((r.start / kv).max(next), r.end.div_ceil(kv));
                count += to.saturating_sub(from) as u64;
                next = next.max(to);
            }
            count
        };
        self.tiles(q).map(of).sum()
    }

    /// Sides of tiles worth trying: powers of two, and fair parts of a class.
    fn sides(&self) -> Vec<usize> {
        let len = self.len().div_ceil(self.classes).max(1);
        let mut all: Vec<usize> = (0..7).map(|x| 1 << x).chain((1..=8).map(|parts| len.div_ceil(parts))).collect();
        all.retain(|&s| s <= len.min(MAX_TILE));
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Rows of queries that the kernels take together.
const LANES: usize = 16;

/// The tile with which the kernels compute the fewest pairs; a key of a tile costs as much again as 16 queries do.
pub fn best_tile(axes: &[Axis; 3]) -> [usize; 3] {
    let costs = axes.each_ref().map(|a| a.sides().into_iter().map(|s| (s, a.visits(s) as f64)).collect::<Vec<_>>());
    let mut best = (f64::INFINITY, [1; 3]);
    for &(t, vt) in &costs[0] {
        for &(h, vh) in costs[1].iter().filter(|c| c.0 * t <= MAX_TILE) {
            for &(w, vw) in costs[2].iter().filter(|c| c.0 * t * h <= MAX_TILE) {
                let cost = vt * vh * vw * ((t * h * w).next_multiple_of(LANES) + LANES) as f64;
                if cost < best.0 {
                    best = (cost, [t, h, w]);
                }
            }
        }
    }
    best.1
}

/// `bits` of the members of one axis's tile as bits of the tile's rows: each stands for `inner` rows, and `outer`
/// times over.
fn spread(bits: u64, len: usize, inner: usize, outer: usize) -> u64 {
    let ones = u64::MAX >> (64 - inner);
    let once = (0..len).filter(|i| bits >> i & 1 == 1).fold(0, |m, i| m | ones << (i * inner));
    (0..outer).fold(0, |m, i| m | once << (i * len * inner))
}

/// The selection of a product pattern on the problem's grid (without one, all tokens are a line). Text around the grid
/// visits everything and is visited by all. `tile` as [`best_tile`] if not given.
pub(crate) fn select(p: &HeadProblem, axes: &[Axis; 3], tile: Option<[usize; 3]>) -> HeadSelection {
    let (tq, tk) = (p.q.rows, p.k.rows);
    let grid = grid_of(p);
    if p.causal || tq != tk {
        return HeadSelection::of_blocks(runs_table(tq, tk, |i, f| token_runs(axes, grid, tk, p.offset() + i, f)));
    }
    tiled(axes, grid, tk, tile.unwrap_or_else(|| best_tile(axes)))
}

/// The problem's grid, or its tokens as a line.
pub(crate) fn grid_of(p: &HeadProblem) -> Grid {
    p.grid.unwrap_or(Grid::new(1, 1, p.k.rows))
}

/// Report the runs of keys that one token visits.
fn token_runs(axes: &[Axis; 3], grid: Grid, tokens: usize, token: usize, f: &mut dyn FnMut(Range<usize>)) {
    let Some([t, h, w]) = grid.place(token) else { return f(0..tokens) };
    let own = grid.range();
    for text in [0..own.start, own.end..tokens] {
        if !text.is_empty() {
            f(text);
        }
    }
    for t in axes[0].visited(t) {
        for h in axes[1].visited(h) {
            let row = grid.token([t, h, 0]);
            axes[2].runs(w).for_each(|r| f(row + r.start..row + r.end));
        }
    }
}

/// [`select`] for all tokens of a problem without a direction.
fn tiled(axes: &[Axis; 3], grid: Grid, tokens: usize, tile: [usize; 3]) -> HeadSelection {
    let block: usize = tile.iter().product();
    let own = grid.range();
    let mut at: Vec<u32> = Vec::with_capacity(tokens);
    let mut table = HeadTable { block_q: block, block_k: 1, indptr: vec![0], blocks: Vec::new(), rows: None };
    let (mut marks, mut plain) = (Vec::new(), true);
    let cut: [Vec<_>; 3] = std::array::from_fn(|a| {
        axes[a].tiles(tile[a]).map(|(class, x)| (class, axes[a].segments(class, &x), x)).collect()
    });
    for (ct, st, t) in &cut[0] {
        for (ch, sh, h) in &cut[1] {
            for (cw, sw, w) in &cut[2] {
                let [lt, lh, lw] = [t, h, w].map(Range::len);
                let rows = u64::MAX >> (64 - lt * lh * lw);
                let of = |axis: usize, class: usize, i: usize| class + i * axes[axis].classes;
                // Blocks begin at multiples of their size.
                at.resize(at.len().next_multiple_of(block), TokenOrder::NONE);
                for t in t.clone() {
                    for h in h.clone() {
                        let row = grid.token([of(0, *ct, t), of(1, *ch, h), 0]);
                        at.extend(w.clone().map(|w| (row + of(2, *cw, w)) as u32));
                    }
                }
                let sw: Vec<Segment> = sw.iter().map(|(r, m)| (r.clone(), spread(*m, lw, 1, lt * lh))).collect();
                let sh: Vec<Segment> = sh.iter().map(|(r, m)| (r.clone(), spread(*m, lh, lw, lt))).collect();
                let mut name = |keys: Range<usize>, step: usize, m: u64| {
                    plain &= m == rows;
                    table.blocks.extend(keys.step_by(step).map(|j| j as u32));
                    marks.resize(table.blocks.len(), m);
                };
                name(0..own.start, 1, rows);
                for (t, mt) in st {
                    let mt = spread(*mt, lt, lh * lw, 1);
                    for t in t.clone() {
                        for (h, mh) in &sh {
                            for h in h.clone() {
                                let row = grid.token([of(0, *ct, t), of(1, *ch, h), 0]);
                                for (w, mw) in &sw {
                                    let (from, to) = (of(2, *cw, w.start), of(2, *cw, w.end - 1));
                                    name(row + from..row + to + 1, axes[2].classes, mt & mh & mw);
                                }
                            }
                        }
                    }
                }
                name(own.end..tokens, 1, rows);
                table.indptr.push(table.blocks.len());
            }
        }
    }
    let text: Vec<u32> = (0..own.start).chain(own.end..tokens).map(|i| i as u32).collect();
    for part in text.chunks(block) {
        at.resize(at.len().next_multiple_of(block), TokenOrder::NONE);
        at.extend(part);
        table.blocks.extend(0..tokens as u32);
        marks.resize(table.blocks.len(), u64::MAX);
        table.indptr.push(table.blocks.len());
    }
    table.rows = (!plain).then_some(marks);
    let in_place = at.iter().enumerate().all(|(x, &t)| x == t as usize);
    // The tiles hold each token once, so that this cannot fail.
    let order = if in_place { None } else { TokenOrder::new(at).ok() };
    HeadSelection::of_blocks(table).in_order(order, None)
}

/// What tiles of a shape cost: after the simulator of generalized neighborhood attention (Hassani et al. 2025, arXiv
/// 2504.16922).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Simulation {
    /// Frames, rows and columns of a tile of queries.
    pub q_tile: [usize; 3],
    /// The same of a tile of keys.
    pub kv_tile: [usize; 3],
    /// (Tile of queries, tile of keys) pairs that hold a visited pair.
    pub visited: u64,
    /// Such pairs of dense attention, whose tiles are runs of as many tokens.
    pub dense: u64,
    /// (Query, key) pairs that the pattern names.
    pub pairs: u64,
    /// (Query, key) pairs of dense attention.
    pub dense_pairs: u64,
}

impl Simulation {
    /// Tiles of dense attention over tiles visited: what a kernel of these tiles can reach.
    pub fn speedup(&self) -> f64 {
        self.dense as f64 / self.visited.max(1) as f64
    }

    /// Pairs of dense attention over pairs named: the bound that counting operations gives.
    pub fn bound(&self) -> f64 {
        self.dense_pairs as f64 / self.pairs.max(1) as f64
    }

    /// Whether every visited tile is visited whole, so that no mask is needed.
    pub fn is_block_sparse(&self) -> bool {
        let area = |t: [usize; 3]| t.iter().product::<usize>() as u64;
        self.visited * area(self.q_tile) * area(self.kv_tile) == self.pairs
    }
}

/// Count the tiles that a product pattern visits. Tiles of a dilated axis are cut from its classes.
pub fn simulate(axes: &[Axis; 3], q_tile: [usize; 3], kv_tile: [usize; 3]) -> Simulation {
    let product = |f: &dyn Fn(usize) -> u64| (0..3).map(f).product::<u64>();
    let tokens = product(&|a| axes[a].len() as u64);
    let tiles = |t: [usize; 3]| tokens.div_ceil(t.iter().product::<usize>().max(1) as u64);
    Simulation {
        q_tile,
        kv_tile,
        visited: product(&|a| axes[a].tile_visits(q_tile[a], kv_tile[a])),
        dense: tiles(q_tile) * tiles(kv_tile),
        pairs: product(&|a| axes[a].reach.iter().map(|r| r.len() as u64).sum()),
        dense_pairs: tokens * tokens,
    }
}

/// One number an axis, written `7` (all axes), `7;9` (rows and columns) or `3;7;9` (frames, rows and columns).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Sides(Vec<usize>);

impl Sides {
    /// The same on every axis.
    pub fn every(n: usize) -> Self {
        Self(vec![n])
    }

    /// Frames, rows and columns; where an axis is not given it has the first number.
    pub fn three(&self) -> [usize; 3] {
        let n = self.0.len();
        std::array::from_fn(|a| self.0[(a + n).saturating_sub(3)])
    }

    /// Frames, rows and columns of a box; where a side is not given it is 1.
    pub fn shape(&self) -> [usize; 3] {
        let n = self.0.len();
        std::array::from_fn(|a| (a + n).checked_sub(3).map_or(1, |i| self.0[i]))
    }
}

impl TryFrom<Value> for Sides {
    type Error = String;
    fn try_from(v: Value) -> std::result::Result<Self, String> {
        let number = |v: &Value| v.as_u64().and_then(|x| usize::try_from(x).ok());
        let all = match &v {
            Value::Array(a) => a.iter().map(number).collect(),
            v => number(v).map(|x| vec![x]),
        };
        match all {
            Some(s) if (1..=3).contains(&s.len()) => Ok(Self(s)),
            _ => Err("expected one whole number, or two or three separated by semicolons".into()),
        }
    }
}

impl From<Sides> for Value {
    fn from(s: Sides) -> Value {
        if let [n] = s.0[..] { n.into() } else { s.0.into() }
    }
}

impl std::fmt::Display for Sides {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&all.join(";"))
    }
}

/// Tile of queries from a parameter in which 0 stands for the best one; clipped to the grid.
pub(crate) fn tile_of(tile: &Sides, axes: &[Axis; 3]) -> Option<[usize; 3]> {
    let t = tile.shape();
    (!t.contains(&0)).then(|| std::array::from_fn(|a| t[a].min(axes[a].len().max(1))))
}

/// Complaint about a tile of more queries than [`MAX_TILE`].
pub(crate) fn check_tile(tile: &Sides) -> std::result::Result<(), String> {
    let t = tile.shape();
    if t.contains(&0) && *tile != Sides::every(0) {
        return Err(format!("tile = {tile}: give every side at least 1, or 0 alone for the best tile"));
    }
    if t.iter().try_fold(1usize, |n, &x| n.checked_mul(x)).is_none_or(|n| n > MAX_TILE) {
        return Err(format!("tile = {tile}: {MAX_TILE} queries at most, such as 8;8 or 4;4;4; 0 takes the best"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::mask::dense_mask;
    use super::*;
    use crate::sparse::Mat;
    use std::collections::BTreeSet;

    /// Windows with clamped ends in two classes on the last axis, a whole axis, and what is blocked.
    fn patterns(g: Grid) -> Vec<[Axis; 3]> {
        let near = |w: usize| move |i: usize, len: usize| i.saturating_sub(w / 2)..(i + w / 2 + 1).min(len);
        vec![
            [Axis::new(g.t, 1, near(3)), Axis::new(g.h, 1, near(5)), Axis::new(g.w, 1, near(4))],
            [Axis::whole(g.t), Axis::new(g.h, 2, near(3)), Axis::new(g.w, 3, near(2))],
            [
                Axis::new(g.t, 1, |i, _| i..i + 1),
                Axis::whole(g.h),
                Axis::new(g.w, 1, |i, n| i / 4 * 4..(i / 4 * 4 + 4).min(n)),
            ],
        ]
    }

    #[test]
    fn every_tile_shape_visits_the_product_of_the_axes() {
        for (g, n) in [(Grid { first: 3, t: 3, h: 5, w: 7 }, 112), (Grid::new(1, 8, 8), 64), (Grid::new(1, 1, 33), 33)]
        {
            let x = vec![0f32; n];
            let m = Mat::new(&x, n, 1, 1);
            let full = HeadProblem { causal: false, grid: Some(g), ..HeadProblem::new(m, m, 1.0) };
            for axes in patterns(g) {
                let sees = |a: usize, b: usize| match (g.place(a), g.place(b)) {
                    (Some(p), Some(r)) => (0..3).all(|x| axes[x].visited(p[x]).any(|c| c == r[x])),
                    _ => true,
                };
                let want: Vec<u8> = (0..n * n).map(|x| u8::from(sees(x / n, x % n))).collect();
                let tiles =
                    [None, Some([1, 1, 1]), Some([1, 4, 4]), Some([3, 2, 7]), Some([1, 8, 8]), Some([1, 1, 64])];
                for tile in tiles {
                    let tile = tile.map(|t: [usize; 3]| [t[0].min(g.t), t[1].min(g.h), t[2].min(g.w)]);
                    let s = select(&full, &axes, tile);
                    s.check(n, n).unwrap();
                    assert_eq!(dense_mask(&s, n, n, false), want, "{g}, tile {tile:?}");
                }
                // A later chunk of queries keeps the pattern, in token order.
                let late = HeadProblem { q: Mat::new(&x, n - 20, 1, 1), ..full };
                let s = select(&late, &axes, None);
                assert_eq!(dense_mask(&s, n - 20, n, false), want[20 * n..], "{g}");
                assert!(!s.is_ordered());
            }
        }
    }

    #[test]
    fn simulated_tiles_are_those_that_hold_a_pair() {
        let g = Grid::new(3, 5, 8);
        for axes in patterns(g).into_iter().filter(|a| a.iter().all(|a| a.classes == 1)) {
            for (q, kv) in
                [([1, 2, 4], [1, 3, 3]), ([2, 2, 2], [1, 1, 1]), ([1, 1, 1], [3, 5, 8]), ([3, 5, 8], [1, 5, 4])]
            {
                let tile = |x: usize, t: [usize; 3]| -> [usize; 3] {
                    let p = g.place(x).unwrap();
                    std::array::from_fn(|a| p[a] / t[a])
                };
                let (mut tiles, mut pairs) = (BTreeSet::new(), 0);
                for (a, b) in (0..120).flat_map(|a| (0..120).map(move |b| (a, b))) {
                    let (p, r) = (g.place(a).unwrap(), g.place(b).unwrap());
                    if (0..3).all(|x| axes[x].visited(p[x]).any(|c| c == r[x])) {
                        tiles.insert((tile(a, q), tile(b, kv)));
                        pairs += 1;
                    }
                }
                let s = simulate(&axes, q, kv);
                assert_eq!((s.visited, s.pairs), (tiles.len() as u64, pairs), "{q:?} {kv:?}");
            }
        }
    }

    #[test]
    fn blocked_attention_needs_no_mask_and_reaches_its_bound() {
        let axes = [16, 32, 32].map(|n| Axis::new(n, 1, |i, _| i / 4 * 4..i / 4 * 4 + 4));
        let s = simulate(&axes, [4; 3], [4, 4, 2]);
        assert!(s.is_block_sparse());
        assert_eq!((s.speedup(), s.bound()), (256.0, 256.0));
        assert_eq!(best_tile(&axes), [4; 3]);
        let g = Grid::new(16, 32, 32);
        let t = tiled(&axes, g, g.tokens(), [4; 3]);
        assert!(t.is_ordered() && t.blocks.unwrap().rows.is_none());
        // A sliding window over the same tiles visits more than it names.
        let axes = [16, 32, 32].map(|n| {
            Axis::new(n, 1, |i, len: usize| {
                let f = i.saturating_sub(2).min(len - 4);
                f..f + 4
            })
        });
        let s = simulate(&axes, [4; 3], [4, 4, 2]);
        assert!(!s.is_block_sparse() && s.speedup() < s.bound() / 4.0);
    }
}
