//! Block pooling of rows.

use crate::sparse::Mat;

/// Means of consecutive blocks of `block` rows (the last may be short): (ceil(rows/block), cols).
pub fn mean_blocks(m: &Mat, block: usize) -> Vec<f32> {
    let n = m.rows.div_ceil(block);
    let mut out = vec![0f32; n * m.cols];
    for (i, o) in out.chunks_exact_mut(m.cols.max(1)).enumerate() {
        let rows = i * block..((i + 1) * block).min(m.rows);
        let inv = 1.0 / rows.len() as f32;
        for r in rows {
            for (a, b) in o.iter_mut().zip(m.row(r)) {
                *a += b;
            }
        }
        o.iter_mut().for_each(|x| *x *= inv);
    }
    out
}
