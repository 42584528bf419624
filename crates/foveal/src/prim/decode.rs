//! Few queries over long keys and values held in candle tensors.

use crate::error::{Error, Result};
use crate::prim::tensor::{AnyView, rows_contiguous, view};
use candle_core::{Device, Tensor};
use foveal_kernels::decode::{Codec, Decode, Segment, Sequence};
use foveal_kernels::{Isa, Work};

/// Options of one decode call.
#[derive(Clone, Debug, Default)]
pub struct DecodeOptions {
    /// Factor on q·k; `None` = 1/√D.
    pub scale: Option<f32>,
    /// `cap · tanh(s / cap)` on scaled scores.
    pub softcap: Option<f32>,
    /// Tokens of each sequence of the batch, of the Tk that k and v have room for; `None` = all.
    pub lengths: Option<Vec<usize>>,
    /// Instruction set; `None` = the best there is.
    pub isa: Option<Isa>,
}

/// What a decode call returns.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// f32 (B, H, n, Dv).
    pub out: Tensor,
    /// f32 (B, H, n), natural log; −∞ for queries that see no key.
    pub lse: Tensor,
    /// Work done.
    pub work: Work,
}

/// The last n queries q (B, H, n, D) of each sequence over its keys k (B, H_kv, Tk, D) and values v (B, H_kv, Tk, Dv),
/// causal bottom-right: query i of n sees the first length − n + i + 1 tokens. The sequences' lengths may differ; the
/// work of all is cut into equal parts over threads.
///
/// q, k and v are f32 or bf16, each of its own; k and v are read in place where the last dimension is contiguous, so
/// that a preallocated store is a fine operand. For many queries [`attend`](crate::prim::attend()) is faster; stores
/// in int8, int4, of fewer channels or of latent rows go through [`foveal_kernels::decode`].
///
/// There is no gradient: a step of decoding needs none. Errors: tensors that track gradients (use `attend`), shapes that
/// do not fit, lengths beyond Tk, other dtypes or devices.
pub fn decode(q: &Tensor, k: &Tensor, v: &Tensor, options: &DecodeOptions) -> Result<Decoded> {
    const OP: &str = "decode";
    let (q, k, v) = (rows_contiguous(OP, "q", q)?, rows_contiguous(OP, "k", k)?, rows_contiguous(OP, "v", v)?);
    let ((b, h, n, d), (kb, hkv, tk, kd), (vb, vh, vt, dv)) = (q.dims4()?, k.dims4()?, v.dims4()?);
    let shape = |tensor, x: &Tensor, expected| Error::Shape { op: OP, tensor, shape: x.dims().to_vec(), expected };
    if (kb, kd) != (b, d) {
        return Err(shape("k", &k, format!("({b}, kv heads, tokens, {d}) beside q {:?}", q.dims())));
    }
    if (vb, vh, vt) != (kb, hkv, tk) {
        return Err(shape("v", &v, format!("({kb}, {hkv}, {tk}, v_dim) beside k {:?}", k.dims())));
    }
    let lengths = options.lengths.clone().unwrap_or_else(|| vec![tk; b]);
    if lengths.len() != b || lengths.iter().any(|&l| l > tk) {
        return Err(Error::Param {
            system: OP.into(),
            message: format!("lengths = {lengths:?}: give {b}, each at most the {tk} tokens of k"),
        });
    }
    let q: Vec<f32> = q.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
    let ((ks, kl), (vs, vl)) = (k.storage_and_layout(), v.storage_and_layout());
    let (kview, vview) = (view("k", &ks, kl)?, view("v", &vs, vl)?);
    let kv: Vec<Vec<Vec<Segment>>> = lengths
        .iter()
        .enumerate()
        .map(|(bi, &len)| {
            let head = |hi| {
                let (k, v) = (rows_of(&kview, bi, hi), rows_of(&vview, bi, hi));
                vec![Segment { k, v, len, channels: None }]
            };
            (0..hkv).map(head).collect()
        })
        .collect();
    let (mut out, mut lse) = (vec![0f32; b * h * n * dv], vec![0f32; b * h * n]);
    let mut call = Decode::new(options.scale.unwrap_or_else(|| 1.0 / (d as f32).sqrt()));
    call.softcap = options.softcap;
    if let Some(isa) = options.isa {
        call.isa = isa;
    }
    let (mut outs, mut lses) = (&mut out[..], &mut lse[..]);
    let mut sequences = Vec::with_capacity(b);
    for (bi, kv) in kv.iter().enumerate() {
        let (out, lse);
        (out, outs) = std::mem::take(&mut outs).split_at_mut(h * n * dv);
        (lse, lses) = std::mem::take(&mut lses).split_at_mut(h * n);
        sequences.push(Sequence { q: &q[bi * h * n * d..(bi + 1) * h * n * d], n, kv, select: None, out, lse });
    }
    let work = call.run_batch(&mut sequences, [h, d, dv])?;
    let out = Tensor::from_vec(out, (b, h, n, dv), &Device::Cpu)?;
    let lse = Tensor::from_vec(lse, (b, h, n), &Device::Cpu)?;
    Ok(Decoded { out, lse, work })
}

/// Rows of one head.
fn rows_of<'a>(x: &AnyView<'a>, b: usize, h: usize) -> Codec<'a> {
    match x {
        AnyView::F32(x) => Codec::F32 { data: x.head(b, h), stride: x.strides[2] },
        AnyView::Bf16(x) => Codec::Bf16 { data: x.head(b, h), stride: x.strides[2] },
    }
}
