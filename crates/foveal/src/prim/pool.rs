//! Block pooling of rows, and what is read off tables of scores with a key a row and a query a
//! column (strides as of [`crate::prim::gemm::scores`]).

use crate::error::Result;
use crate::sparse::Mat;
use foveal_kernels::{Isa, scores};

/// `top[i] = max(top[i], x[j][i])` over the rows j of `x`, `top.len()` entries apart.
pub fn column_max(x: &[f32], top: &mut [f32]) {
    scores::column_max(x, top, Isa::active());
}

/// `top[i] = max(top[i], factor · x[j][i] + add[j])` over the rows j of `x`, one for each of `add`, `top.len()`
/// entries apart.
pub fn column_affine_max(x: &[f32], factor: f32, add: &[f32], top: &mut [f32]) {
    scores::column_affine_max(x, factor, add, top, Isa::active());
}

/// `out[i]` = row i of `a` · row i of `b`, rows of `width` elements, `a_stride` and `b_stride` apart: each
/// query with a key of its own, where a product of all with all would waste most of itself.
pub fn row_dots(a: &[f32], a_stride: usize, b: &[f32], b_stride: usize, width: usize, out: &mut [f32]) {
    scores::row_dots(a, b, [a_stride, b_stride], width, out, Isa::active());
}

/// `x[j][i] = e^{x[j][i] − top[i]}`, and `sum[i] += x[j][i]`: with `top` from [`column_max`], the
/// softmax over keys but for the factor `1/sum[i]`. −∞ gives 0.
pub fn column_exp(x: &mut [f32], top: &[f32], sum: &mut [f32]) {
    scores::column_exp(x, top, sum, Isa::active());
}

/// Softmax of each row of `width` entries in place; a row that is −∞ throughout becomes zero.
pub fn row_softmax(x: &mut [f32], width: usize) -> Result<()> {
    if width > 0 {
        foveal_kernels::elementwise::softmax_rows(x, width, Isa::active())?;
    }
    Ok(())
}

/// `out[g]` = the largest entry of the rows g·group..(g+1)·group of `x`, `stride` entries apart.
pub fn group_max(x: &[f32], stride: usize, group: usize, out: &mut [f32]) {
    scores::group_max(x, stride, group, out, Isa::active());
}

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
