//! k-means of rows.

use crate::prim::gemm::abt;
use crate::sparse::Mat;

/// Rows by their nearest centre.
#[derive(Debug, Clone, PartialEq)]
pub struct Clusters {
    /// (n, cols); a centre without rows stays where it was.
    pub centres: Vec<f32>,
    /// The cluster of each row.
    pub labels: Vec<u32>,
    /// Rows of each cluster.
    pub sizes: Vec<u32>,
    /// FLOPs done.
    pub flops: u64,
    /// Rounds done.
    pub rounds: usize,
}

impl Clusters {
    /// Number of clusters.
    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    /// Rows cluster by cluster, ascending within each.
    pub fn members(&self) -> Vec<Vec<u32>> {
        let mut out: Vec<Vec<u32>> = self.sizes.iter().map(|&n| Vec::with_capacity(n as usize)).collect();
        for (row, &c) in (0..).zip(&self.labels) {
            out[c as usize].push(row);
        }
        out
    }
}

/// Rows of one product.
const ROWS: usize = 128;

/// `n` rows of `x`, evenly spaced: centres to start from that are the same on every machine.
pub fn spread_centres(x: &Mat, n: usize) -> Vec<f32> {
    let n = n.min(x.rows);
    (0..n).flat_map(|c| x.row(c * x.rows / n).iter().copied()).collect()
}

/// Lloyd's iterations from `centres` (n, cols): each row goes to the centre of least Euclidean distance (ties to the
/// first), each centre to the mean of its rows. Ends after `rounds` (at least 1), or once no row changes its centre.
/// Takes 2·rows·n·cols FLOPs a round and memory for 128 rows of distances.
pub fn kmeans(x: &Mat, mut centres: Vec<f32>, rounds: usize) -> Clusters {
    let (d, n) = (x.cols, centres.len() / x.cols.max(1));
    let mut labels = vec![0u32; x.rows];
    let mut sizes = vec![0u32; n];
    let mut sums = vec![0f32; n * d];
    let mut near = vec![0f32; ROWS * n];
    let (mut flops, mut done) = (0u64, 0);
    if n == 0 || x.rows == 0 {
        return Clusters { centres, labels, sizes, flops, rounds: 0 };
    }
    for round in 0..rounds.max(1) {
        // |x − c|² is least where x·c − |c|²/2 is largest.
        let half: Vec<f32> = centres.chunks_exact(d).map(|c| 0.5 * c.iter().map(|x| x * x).sum::<f32>()).collect();
        sums.fill(0.0);
        sizes.fill(0);
        let mut moved = false;
        for r0 in (0..x.rows).step_by(ROWS) {
            let r1 = (r0 + ROWS).min(x.rows);
            let near = &mut near[..(r1 - r0) * n];
            flops += abt(r1 - r0, n, d, 1.0, &x.data()[r0 * x.stride..], x.stride, &centres, d, near);
            for (r, row) in (r0..).zip(near.chunks_exact_mut(n)) {
                let mut top = f32::NEG_INFINITY;
                for (x, h) in row.iter_mut().zip(&half) {
                    *x -= h;
                    top = top.max(*x);
                }
                let c = row.iter().position(|&x| x >= top).unwrap_or(0);
                moved |= labels[r] != c as u32;
                labels[r] = c as u32;
                sizes[c] += 1;
                sums[c * d..(c + 1) * d].iter_mut().zip(x.row(r)).for_each(|(s, x)| *s += x);
            }
        }
        flops += (2 * n * d + x.rows * n + x.rows * d + n * d) as u64;
        done = round + 1;
        for ((c, s), &size) in centres.chunks_exact_mut(d).zip(sums.chunks_exact(d)).zip(&sizes) {
            if size > 0 {
                c.iter_mut().zip(s).for_each(|(c, s)| *c = s / size as f32);
            }
        }
        if round > 0 && !moved {
            break;
        }
    }
    Clusters { centres, labels, sizes, flops, rounds: done }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separated_groups_are_found_and_empty_centres_stay() {
        let data: Vec<f32> = (0..60).flat_map(|i| [(i % 3) as f32 * 10.0, (i / 3) as f32 * 0.01]).collect();
        let x = Mat::new(&data, 60, 2, 2);
        let start = [vec![0.0, 0.0, 10.0, 0.0, 20.0, 0.0], vec![1e6, 1e6]].concat();
        let c = kmeans(&x, start, 20);
        assert_eq!(c.sizes, [20, 20, 20, 0]);
        assert_eq!(&c.centres[6..], [1e6, 1e6]);
        assert!(c.rounds == 2 && c.labels.iter().enumerate().all(|(i, &l)| l as usize == i % 3));
        assert_eq!(c.members()[1][..3], [1, 4, 7]);
        assert_eq!(spread_centres(&x, 100).len(), 120);
        assert!(kmeans(&Mat::new(&[], 0, 2, 2), Vec::new(), 3).is_empty());
    }
}
