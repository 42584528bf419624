//! The true attention map of one head, pooled over blocks: what a block gate is trained towards and
//! judged by. The map itself is never held, only the scores of one block of queries.

use super::HeadProblem;
use super::estimate::{SOFTMAX_FLOPS, bytes, hide};
use crate::prim::gemm::{Columns, Precision, Rows, scores};
use crate::prim::pool::{column_exp, column_max};
use foveal_kernels::Work;

/// Exact causal attention pooled over blocks of `block` queries and keys.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockMap {
    /// Blocks of queries, counted from the first query.
    pub rows: usize,
    /// Blocks of keys.
    pub cols: usize,
    /// (rows, cols): the largest weight of any query of the block on any key of the block.
    pub max: Vec<f32>,
    /// (rows, cols): the weight of the block's queries on the block's keys; a row sums to its number of queries.
    pub mass: Vec<f32>,
}

impl BlockMap {
    /// Exact attention of `p`, pooled. Time of dense attention's scores, memory block · (Tk + Tq/block · Tk/block).
    pub fn of(p: &HeadProblem, block: usize) -> (Self, Work) {
        let (tq, tk, d, off) = (p.q.rows, p.k.rows, p.q.cols, p.offset());
        let (rows, cols) = (tq.div_ceil(block), tk.div_ceil(block));
        let mut map = Self { rows, cols, max: vec![0.0; rows * cols], mass: vec![0.0; rows * cols] };
        let mut work = Work::default();
        let keys = Rows::of(&p.k, 1, Precision::F32);
        let mut columns = Columns::new(block, 1, d, p.scale, Precision::F32);
        let mut table = Vec::new();
        let (mut top, mut sum) = (Vec::new(), Vec::new());
        for (i, r0) in (0..tq).step_by(block).enumerate() {
            let m = block.min(tq - r0);
            columns.fill(m, |c, _| Some(p.q.row(r0 + c)));
            let n = off + r0 + m;
            work.flops += scores(&keys, 0..n, &columns, &mut table) + (SOFTMAX_FLOPS * n * m) as u64;
            work.bytes += bytes(m + n, d);
            let stride = columns.stride();
            let table = &mut table[..n * stride];
            hide(table, stride, m, |c| off + r0 + c + 1);
            top.clear();
            top.resize(stride, f32::NEG_INFINITY);
            column_max(table, &mut top);
            sum.clear();
            sum.resize(stride, 0.0);
            column_exp(table, &top, &mut sum);
            // Columns past the queries are there for the kernel's sake; they weigh nothing.
            for (c, s) in sum.iter_mut().enumerate() {
                *s = if c < m { 1.0 / *s } else { 0.0 };
            }
            for (j, x) in table.chunks(block * stride).enumerate() {
                let (mut most, mut mass) = (0f32, 0f32);
                for row in x.chunks_exact(stride) {
                    for (x, inv) in row.iter().zip(&sum) {
                        let w = x * inv;
                        most = most.max(w);
                        mass += w;
                    }
                }
                map.max[i * cols + j] = most;
                map.mass[i * cols + j] = mass;
            }
        }
        (map, work)
    }

    /// `max` with each row divided by its sum: the distribution that a gate is taught.
    pub fn target(&self) -> Vec<f32> {
        let mut out = self.max.clone();
        for row in out.chunks_exact_mut(self.cols.max(1)) {
            let total: f32 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= total.max(f32::MIN_POSITIVE));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::Mat;

    #[test]
    fn agrees_with_the_map_itself() {
        let (tq, tk, d, block) = (37, 50, 8, 8);
        let wave = |n: usize, s: usize| -> Vec<f32> {
            (0..n).map(|i| (((i * 7919 + s * 104_729) % 1009) as f32 * 0.037).sin()).collect()
        };
        let (q, k) = (wave(tq * d, 1), wave(tk * d, 2));
        let p = HeadProblem::new(Mat::new(&q, tq, d, d), Mat::new(&k, tk, d, d), 0.7);
        let (map, _) = BlockMap::of(&p, block);
        let (mut max, mut mass) = (vec![0f64; map.rows * map.cols], vec![0f64; map.rows * map.cols]);
        for i in 0..tq {
            let s: Vec<f64> = (0..=tk - tq + i)
                .map(|j| {
                    (0..d).map(|c| f64::from(q[i * d + c]) * f64::from(k[j * d + c])).sum::<f64>() * f64::from(0.7f32)
                })
                .collect();
            let top = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = s.iter().map(|x| (x - top).exp()).sum();
            for (j, x) in s.iter().enumerate() {
                let at = i / block * map.cols + j / block;
                let w = (x - top).exp() / total;
                max[at] = max[at].max(w);
                mass[at] += w;
            }
        }
        for (got, want) in map.max.iter().zip(&max).chain(map.mass.iter().zip(&mass)) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} for {want}");
        }
    }
}
