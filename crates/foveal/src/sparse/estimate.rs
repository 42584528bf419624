//! What the estimators of this family share: the rule by which their work is counted, and causality
//! in tables of scores.
//!
//! Counting: a product costs 2·m·n·k, an addition, multiplication or exponential one flop;
//! comparisons, selection and index arithmetic are free. Bytes are the f32 rows of q and k that
//! each product, pooling or gather reads, whatever precision they are taken to.

/// Flops of one softmax entry: difference, exponential, sum.
pub(crate) const SOFTMAX_FLOPS: usize = 3;

/// Bytes of `rows` f32 rows of `cols`.
pub(crate) fn bytes(rows: usize, cols: usize) -> u64 {
    (rows * cols * size_of::<f32>()) as u64
}

/// Hide from each column what it may not see: in scores with a key a row (`stride` entries apart),
/// the rows from `seen(i)` on of column i become −∞. `seen` must not fall.
pub(crate) fn hide(x: &mut [f32], stride: usize, columns: usize, seen: impl Fn(usize) -> usize) {
    let rows = x.len() / stride.max(1);
    let mut first = 0;
    for (j, row) in x.chunks_exact_mut(stride.max(1)).enumerate().skip(seen(0).min(rows)) {
        while first < columns && seen(first) <= j {
            first += 1;
        }
        row[..first].fill(f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hiding_leaves_what_may_be_seen() {
        let (rows, stride, columns) = (9, 6, 5);
        let seen = |i: usize| 3 + i / 2 * 2;
        let mut x = vec![1f32; rows * stride];
        hide(&mut x, stride, columns, seen);
        for j in 0..rows {
            for i in 0..stride {
                let hidden = i < columns && j >= seen(i);
                assert_eq!(x[j * stride + i] == f32::NEG_INFINITY, hidden, "key {j}, query {i}");
            }
        }
    }
}
