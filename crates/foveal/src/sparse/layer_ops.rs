//! Small candle operations that several layers share, all with gradients.

use crate::error::Result;
use candle_core::{D, Tensor};

/// All elements in order, without a gradient.
pub(crate) fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.detach().flatten_all()?.to_vec1()?)
}

/// (B, H_kv, …) to (B, H, …): what a group of query heads shares, once for each. For small things: keys and values
/// themselves are shared in place by the primitives.
pub(crate) fn for_each_query_head(x: &Tensor, heads: usize) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let group = heads / dims[1].max(1);
    if group == 1 {
        return Ok(x.clone());
    }
    let mut wide = dims.clone();
    wide.insert(2, group);
    let mut out = dims;
    out[1] = heads;
    Ok(x.unsqueeze(2)?.broadcast_as(wide)?.reshape(out)?)
}

/// Layer normalisation along the last dimension (candle's own drops gradients).
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const EPS: f64 = 1e-5;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let size = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    Ok(x.broadcast_div(&size)?.broadcast_mul(weight)?.broadcast_add(bias)?)
}

/// x (…, n) times weightᵀ (m, n), plus bias (m).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(&weight.t()?)?;
    Ok(match bias {
        Some(b) => y.broadcast_add(b)?,
        None => y,
    })
}
