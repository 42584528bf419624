//! PAROAttention: re-order the axes of the grid so that attention falls into blocks, then visit a static choice of blocks
//! (Zhao et al. 2025, arXiv 2506.16054).
//!
//! Tokens of the grid are put in the order of one of the six permutations of (t, h, w), a head's own, in which its
//! attention map is most block-like. In that order the map P = softmax(scale·Q·Kᵀ) is summed over blocks; the blocks of
//! largest sum are visited, `density` of all of them, and at least the best one for each block of queries. Order and mask
//! are found once, on recorded q and k, and then given as parameters. Where no mask is given it is computed from some
//! queries of each block and the k at hand.
//!
//! Cost: density·T² pairs; 2·T²·D·samples/block_size flops more without a mask.

use super::axes::grid_of;
use super::estimate::{SOFTMAX_FLOPS, bytes};
use super::{Domain, Grid, HeadProblem, HeadSelection, Selector, TokenOrder};
use crate::error::{Error, Result};
use crate::prim::gemm;
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, Spec, System, configure, params_of};
use foveal_kernels::{HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParoAttention {
    /// Axes from slowest to fastest.
    pub order: String,
    /// Queries and keys per block.
    pub block_size: usize,
    /// Share of the blocks that is visited.
    pub density: f64,
    /// Queries of each block of which the map is made.
    pub samples: usize,
    /// The static mask, as [`ParoAttention::calibrated`] writes it.
    pub mask: String,
}

impl Default for ParoAttention {
    fn default() -> Self {
        Self { order: "thw".into(), block_size: 64, density: 0.25, samples: 8, mask: String::new() }
    }
}

/// The orders of the axes that the search tries.
pub const ORDERS: [&str; 6] = ["thw", "twh", "htw", "hwt", "wth", "wht"];

impl Config for ParoAttention {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("order", "axes from slowest to fastest, the head's own: thw, twh, htw, hwt, wth or wht"),
        ("block_size", "queries and keys per block"),
        ("density", "share of the blocks that is visited, where no mask is given"),
        (
            "samples",
            "queries of each block, evenly spaced, of which the attention map is made where no mask is given; 0 for all",
        ),
        (
            "mask",
            "the static mask of blocks found offline, as the search writes it; empty: found from the q and k at hand",
        ),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if !ORDERS.contains(&self.order.as_str()) {
            return Err(format!("order = {:?}: use one of {}", self.order, ORDERS.join(", ")));
        }
        if self.block_size == 0 || !(0.0..=1.0).contains(&self.density) {
            return Err(format!(
                "block_size = {}, density = {}: use at least 1 and a share from 0 to 1",
                self.block_size, self.density
            ));
        }
        if !self.mask.is_empty() {
            parse(&self.mask)?;
        }
        Ok(())
    }
}

/// Marks a mask, so that one of digits alone is not read as a number.
const MARK: char = 'm';

/// Blocks of each row, from `m` and rows of hexadecimal digits with dots between; a digit holds four blocks, lowest bit
/// first.
fn parse(mask: &str) -> std::result::Result<Vec<Vec<u32>>, String> {
    let bad = |what: String| format!("mask = {what}: take a mask as the search writes it, or leave it out");
    let rows = mask.strip_prefix(MARK).ok_or_else(|| bad(format!("{:.20}…", mask)))?;
    rows.split('.')
        .map(|row| {
            let mut blocks = Vec::new();
            for (i, c) in row.chars().enumerate() {
                let bits = c.to_digit(16).ok_or_else(|| bad(format!("…{c}…")))?;
                blocks.extend((0..4).filter(|b| bits >> b & 1 == 1).map(|b| 4 * i as u32 + b));
            }
            Ok(blocks)
        })
        .collect()
}

/// The inverse of [`parse`].
fn write(rows: &[Vec<u32>]) -> String {
    let row = |blocks: &Vec<u32>| {
        let mut digits = vec![0u32; blocks.last().map_or(0, |b| *b as usize / 4 + 1)];
        blocks.iter().for_each(|&b| digits[b as usize / 4] |= 1 << (b % 4));
        digits.iter().filter_map(|&d| char::from_digit(d, 16)).collect::<String>()
    };
    format!("{MARK}{}", rows.iter().map(row).collect::<Vec<_>>().join("."))
}

/// What the search tries for a head: all orders at this density, their masks calibrated on the head.
pub fn candidates(p: &HeadProblem, density: f64, block_size: usize) -> Result<Vec<Spec>> {
    let base = ParoAttention { block_size, density, samples: 0, ..ParoAttention::default() };
    let one = |order: &str| {
        let c = ParoAttention { order: order.into(), ..base.clone() }.calibrated(p)?;
        let spec = Spec::new(CARD.id).with("order", order).with("block_size", &block_size.to_string());
        Ok(spec.with("mask", &c.mask))
    };
    ORDERS.iter().map(|o| one(o)).collect()
}

impl ParoAttention {
    /// The same with the mask of this head written down.
    pub fn calibrated(&self, p: &HeadProblem) -> Result<Self> {
        let (lists, _) = self.calibrate(p, &self.tokens(grid_of(p), p.k.rows));
        Ok(Self { mask: write(&lists), ..self.clone() })
    }

    /// Tokens in order: text keeps its place before and after the grid.
    fn tokens(&self, grid: Grid, n: usize) -> Vec<u32> {
        let sides = [grid.t, grid.h, grid.w];
        let axes: Vec<usize> = self.order.chars().filter_map(|c| "thw".find(c)).collect();
        let own = grid.range();
        let mut at: Vec<u32> = (0..own.start as u32).collect();
        for a in 0..sides[axes[0]] {
            for b in 0..sides[axes[1]] {
                for c in 0..sides[axes[2]] {
                    let mut place = [0; 3];
                    [place[axes[0]], place[axes[1]], place[axes[2]]] = [a, b, c];
                    at.push(grid.token(place) as u32);
                }
            }
        }
        at.extend(own.end as u32..n as u32);
        at
    }

    /// Blocks that each block of queries visits, by the sums of the attention map over blocks.
    fn calibrate(&self, p: &HeadProblem, at: &[u32]) -> (Vec<Vec<u32>>, Work) {
        let (n, d, b) = (at.len(), p.k.cols, self.block_size);
        let blocks = n.div_ceil(b);
        let gather = |m: &super::Mat, at: &[u32]| -> Vec<f32> {
            at.iter().flat_map(|&i| m.row(i as usize).iter().copied()).collect()
        };
        let keys = gather(&p.k, at);
        let mut scores = vec![0f32; b.min(n) * n];
        let mut mass = vec![0f64; blocks * blocks];
        let mut work = Work::default();
        for (rows, mass) in at.chunks(b).zip(mass.chunks_exact_mut(blocks)) {
            let every = if self.samples == 0 { 1 } else { rows.len().div_ceil(self.samples) };
            let rows: Vec<u32> = rows.iter().copied().step_by(every).collect();
            let q = gather(&p.q, &rows);
            let scores = &mut scores[..rows.len() * n];
            work.flops += gemm::abt(rows.len(), n, d, p.scale, &q, d, &keys, d, scores);
            work.bytes += bytes(rows.len() + n, d);
            for row in scores.chunks_exact_mut(n) {
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter_mut().for_each(|x| *x = (*x - top).exp());
                let scale = 1.0 / row.iter().map(|&x| f64::from(x)).sum::<f64>();
                work.flops += (SOFTMAX_FLOPS * n) as u64;
                for (m, part) in mass.iter_mut().zip(row.chunks(b)) {
                    *m += scale * f64::from(part.iter().sum::<f32>());
                }
            }
        }
        // The best block of each row, then the heaviest of all others.
        let best = |row: &[f64]| (0..blocks).max_by(|&x, &y| row[x].total_cmp(&row[y]).then(y.cmp(&x))).unwrap_or(0);
        let first: Vec<usize> = mass.chunks_exact(blocks).map(best).collect();
        let mut rest: Vec<usize> = (0..blocks * blocks).filter(|x| first[x / blocks] != x % blocks).collect();
        let room = ((self.density * (blocks * blocks) as f64).ceil() as usize).saturating_sub(blocks).min(rest.len());
        rest.sort_by(|&x, &y| mass[y].total_cmp(&mass[x]));
        let mut lists: Vec<Vec<u32>> = first.iter().map(|&x| vec![x as u32]).collect();
        rest[..room].iter().for_each(|x| lists[x / blocks].push((x % blocks) as u32));
        lists.iter_mut().for_each(|l| l.sort_unstable());
        (lists, work)
    }
}

impl Selector for ParoAttention {
    fn select(&self, p: &HeadProblem) -> Result<(HeadSelection, Work)> {
        let (tq, tk, b) = (p.q.rows, p.k.rows, self.block_size);
        let bad = |message: String| Error::Param { system: CARD.id.into(), message };
        if tq != tk {
            return Err(bad(format!(
                "{tq} queries of {tk} tokens: give all queries at once, as blocks hold tokens in another order"
            )));
        }
        let at = self.tokens(grid_of(p), tk);
        let (lists, work) = if self.mask.is_empty() {
            self.calibrate(p, &at)
        } else {
            let lists = parse(&self.mask).map_err(bad)?;
            let blocks = tk.div_ceil(b);
            if lists.len() != blocks || lists.iter().flatten().any(|&x| x as usize >= blocks) {
                return Err(bad(format!(
                    "mask has {} rows but {tk} tokens make {blocks} blocks of {b}: search again at this grid",
                    lists.len()
                )));
            }
            (lists, Work::default())
        };
        let in_place = at.iter().enumerate().all(|(x, &t)| x == t as usize);
        let order = if in_place { None } else { Some(TokenOrder::new(at)?) };
        let selection = HeadSelection::of_blocks(HeadTable::from_lists(b, b, lists));
        Ok((selection.in_order(order.clone(), order), work))
    }

    fn domain(&self) -> Domain {
        Domain::GRID
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "paroattention",
    title: "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation Models",
    authors: "Zhao et al., 2025",
    arxiv: "2506.16054",
    family: Family::Sparse,
    slots: &[Slot::Prefill],
    laws: &[
        Law::ExactAt(&[("density", "1")]),
        Law::ExactAt(&[("density", "1"), ("order", "wht")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Monotone { param: "density", values: &["0", "0.1", "0.25", "0.5", "1"] },
    ],
    equation: "order tokens by a permutation of (t, h, w);  mass(A, B) = sum of softmax(scale·Q·K^T) over queries of block A and keys of \
               block B\n\
               visit the best B of each A and the heaviest (A, B) of all, density of them in number",
    cost: "density·T² pairs; with a mask given no estimate, without one 2·T²·D·samples/block_size flops for the map it is taken from",
    choices: &[
        "No code is public. The paper chooses the order and the blocks offline from attention maps; here the search tries all six \
         orders and takes the one whose output errs least, and blocks are ranked by their sum over the whole map.",
        "samples = 8 is ours, for use without a mask: an eighth of the map's cost. The search makes masks from all queries.",
        "density = 0.25 is within the 20 to 30 % of the abstract. Every block of queries keeps at least its best block, so that no query is \
         left without a key.",
        "The quantised half (INT8 and INT4 products block by block) is not built: there is no integer attention kernel here, and rounding \
         operands without one would be no faster. The order makes blocks alike, which is what such a kernel would need.",
        "Text tokens keep their places before and after the grid and fall into blocks like all others.",
        "A mask belongs to one grid: at another the system says so instead of guessing.",
    ],
    params: params_of::<ParoAttention>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Selector(Box::new(configure::<ParoAttention>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::Mat;

    #[test]
    fn masks_are_written_and_read_back() {
        let rows = vec![vec![0, 3, 4, 17], vec![], vec![1]];
        assert_eq!(write(&rows), "m91002..2");
        assert_eq!(parse(&write(&rows)).unwrap(), rows);
        assert!(parse("91").is_err() && parse("m9g").is_err());
        let x: Vec<f32> = (0..60 * 4).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) * 2.0).collect();
        let m = Mat::new(&x, 60, 4, 4);
        let p = HeadProblem { causal: false, grid: Some(Grid::new(3, 4, 5)), ..HeadProblem::new(m, m, 0.5) };
        let c = ParoAttention { order: "wth".into(), block_size: 7, density: 0.4, ..ParoAttention::default() };
        let fixed = c.calibrated(&p).unwrap();
        assert_eq!(fixed.select(&p).unwrap().0, c.select(&p).unwrap().0);
        assert_eq!(fixed.select(&p).unwrap().1, Work::default());
        let other =
            HeadProblem { grid: Some(Grid::new(3, 4, 4)), k: Mat::new(&x, 48, 4, 4), q: Mat::new(&x, 48, 4, 4), ..p };
        let e = ParoAttention { block_size: 4, ..fixed }.select(&other).unwrap_err().to_string();
        assert!(e.contains("search again"), "{e}");
    }
}
