//! CATANet: content-aware token aggregation (Liu et al. 2025, arXiv 2503.06896).
//!
//! M token centres μ, shared over the whole training set, sort the tokens: token i belongs to the centre of largest
//! cos(x_i, μ_m). In the order of their centres tokens are cut into groups of `group_size`. Group g's queries attend to
//! the keys of groups g and g + 1 (the last: to those before and its own), and every query attends to the centres:
//!
//! O = softmax(QKᵀ/√D) V within groups + softmax(Q K_μᵀ/√D) V_μ, K_μ = μ W_K, V_μ = μ W_V.
//!
//! q (B, H, T, D), x (B, T, C) → (B, H, T, D). Cost: 2·C·T·M flops to sort, T·(2·group_size + M) pairs: linear in T.

use super::Domain;
use crate::error::{Error, Result};
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::gemm::abt;
use crate::prim::{AttendOptions, attend};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder, init::DEFAULT_KAIMING_UNIFORM};
use foveal_kernels::{BlockTable, HeadTable, Work};
use serde::{Deserialize, Serialize};

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Catanet {
    /// Token centres.
    pub centers: usize,
    /// Tokens per group.
    pub group_size: usize,
}

impl Default for Catanet {
    fn default() -> Self {
        Self { centers: 64, group_size: 128 }
    }
}

impl Config for Catanet {
    const DOCS: &'static [(&'static str, &'static str)] =
        &[("centers", "token centres"), ("group_size", "tokens per group; each attends to two groups of keys")];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.centers == 0 || self.group_size == 0 {
            return Err(format!("centers = {}, group_size = {}: use at least 1", self.centers, self.group_size));
        }
        Ok(())
    }
}

/// Rows of length 1, and their number.
fn unit_rows(x: &Tensor) -> Result<Vec<f32>> {
    let width = x.dims().last().copied().unwrap_or(0);
    let mut rows: Vec<f32> = x.detach().flatten_all()?.to_vec1()?;
    for row in rows.chunks_exact_mut(width.max(1)) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        row.iter_mut().for_each(|x| *x /= norm);
    }
    Ok(rows)
}

/// The centre of largest cosine for each row of x (n, c) among `means` (m, c), both of length 1; and the flops.
fn nearest(x: &[f32], means: &[f32], c: usize) -> (Vec<u32>, u64) {
    let m = means.len() / c;
    let mut score = vec![0f32; 256 * m];
    let (mut out, mut flops) = (Vec::with_capacity(x.len() / c), 0);
    for rows in x.chunks(256 * c) {
        let n = rows.len() / c;
        flops += abt(n, m, c, 1.0, rows, c, means, c, &mut score[..n * m]);
        out.extend(score[..n * m].chunks_exact(m).map(|s| {
            let top = s.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            s.iter().position(|&x| x >= top).unwrap_or(0) as u32
        }));
    }
    (out, flops)
}

/// Centres moved by one training step on tokens `x` (…, C), what keeps them apart from the loss: `rounds` times, each
/// becomes the direction of its tokens' sum (those without a token stay), and the result is mixed into `means` (M, C) at
/// 1 − `decay`. The paper takes 5 rounds and a decay of 0.999, and frozen centres in use.
pub fn moved_centers(x: &Tensor, means: &Tensor, rounds: usize, decay: f64) -> Result<Tensor> {
    let (m, c) = means.dims2()?;
    if x.dims().last() != Some(&c) {
        let expected = format!("(…, {c}) as the centres");
        return Err(Error::Shape { op: "catanet", tensor: "x", shape: x.dims().to_vec(), expected });
    }
    let rows = unit_rows(x)?;
    let mut new = unit_rows(means)?;
    for _ in 0..rounds {
        let (of, _) = nearest(&rows, &new, c);
        let mut sums = vec![0f32; m * c];
        for (row, of) in rows.chunks_exact(c).zip(of) {
            sums[of as usize * c..][..c].iter_mut().zip(row).for_each(|(s, x)| *s += x);
        }
        for (new, sum) in new.chunks_exact_mut(c).zip(sums.chunks_exact(c)) {
            let norm = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
            if norm > 0.0 {
                new.iter_mut().zip(sum).for_each(|(n, s)| *n = s / norm);
            }
        }
    }
    let new = Tensor::from_vec(new, (m, c), &Device::Cpu)?;
    Ok(((means.detach() * decay)? + (new * (1.0 - decay))?)?)
}

impl MixerSystem for Catanet {
    fn layer(&self, dims: &MixerDims, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
        let channels = dims.heads * dims.head_dim;
        let linear = |name| vb.pp(name).get_with_hints((channels, dims.hidden), "weight", DEFAULT_KAIMING_UNIFORM);
        Ok(Box::new(Layer {
            group_size: self.group_size,
            means: vb.get_with_hints((self.centers, dims.hidden), "means", Init::Randn { mean: 0.0, stdev: 1.0 })?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
        }))
    }

    fn domain(&self) -> Domain {
        Domain::FULL
    }
}

struct Layer {
    group_size: usize,
    means: Tensor,
    to_k: Tensor,
    to_v: Tensor,
}

/// Rows of each batch of x (B, H, T, D) in its order.
fn ordered(x: &Tensor, orders: &[Tensor]) -> Result<Tensor> {
    let parts = orders.iter().enumerate().map(|(b, o)| x.narrow(0, b, 1)?.contiguous()?.index_select(o, 2));
    Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let x = i.x("catanet")?;
        let ((b, h, t, d), (_, _, tk, dv)) = (i.q.dims4()?, i.v.dims4()?);
        let (m, c) = self.means.dims2()?;
        let wrong = |tensor, t: &Tensor, expected: String| {
            Err(Error::Shape { op: "catanet", tensor, shape: t.dims().to_vec(), expected })
        };
        if t != tk || dv != d {
            return wrong("v", i.v, format!("{t} tokens of {d} channels as q"));
        }
        if x.dims() != [b, t, c] {
            return wrong("x", x, format!("({b}, {t}, {c}) as q's tokens and the centres' channels"));
        }
        // Sorted by centre, neighbours in place within one.
        let (of, flops) = nearest(&unit_rows(x)?, &unit_rows(&self.means)?, c);
        let (mut orders, mut backs) = (Vec::with_capacity(b), Vec::with_capacity(b));
        for of in of.chunks_exact(t.max(1)) {
            let mut order: Vec<u32> = (0..t as u32).collect();
            order.sort_by_key(|&i| of[i as usize]);
            let mut back = vec![0u32; t];
            (0..).zip(&order).for_each(|(place, &i)| back[i as usize] = place);
            orders.push(Tensor::from_vec(order, t, &Device::Cpu)?);
            backs.push(Tensor::from_vec(back, t, &Device::Cpu)?);
        }
        let [q, k, v] = [i.q, i.k, i.v].map(|x| ordered(x, &orders));
        let (q, k, v) = (q?, k?, v?);
        let g = self.group_size.min(t.max(1));
        let groups = t.div_ceil(g);
        let lists = (0..groups as u32).map(|x| {
            let from = x.min((groups as u32).saturating_sub(2));
            (from..groups as u32).take(2).collect()
        });
        let table = BlockTable { heads: vec![HeadTable::from_lists(g, g, lists.collect()); b * h] };
        let options = AttendOptions { scale: i.scale, ..AttendOptions::default() };
        let inner = attend(&q, &k, &v, &options, Some(&table))?;
        let project = |w: &Tensor| -> Result<Tensor> {
            let y = self.means.matmul(&w.t()?)?.reshape((m, h, d))?.transpose(0, 1)?.contiguous()?;
            Ok(y.unsqueeze(0)?.broadcast_as((b, h, m, d))?.contiguous()?)
        };
        let cross = attend(&q, &project(&self.to_k)?, &project(&self.to_v)?, &options, None)?;
        let out = ordered(&(inner.out + cross.out)?, &backs)?;
        let mut work = inner.work + cross.work;
        work.flops += (4 * m * c * h * d + b * h * t * d) as u64;
        let select = Work {
            flops: flops + (3 * (b * t + m) * c) as u64,
            bytes: super::estimate::bytes(b * t + m, c),
            ..Work::default()
        };
        Ok(Mixed { out, work, select, loss: None, selections: Vec::new() })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "catanet",
    title: "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
    authors: "Liu et al., 2025",
    arxiv: "2503.06896",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[Law::Work { pairs: Growth::Linear, flops: Growth::Linear }, Law::Gradients],
    equation: "tokens sorted by argmax_m cos(x_i, mu_m), cut into groups; group g attends to groups g and g+1\n\
               O = Attention(Q, K, V in groups) + Attention(Q, mu W_K, mu W_V)",
    cost: "2·C·T·M flops to sort, T·(2·group_size + M) pairs: linear",
    choices: &[
        "As in the published code groups look at the next group too, scores take 1/√D, and the centres have projections of their own. \
         There the last group's keys are filled up with mirrored tokens, which then count twice, and lengths just above a group fail; \
         here the last group attends to the one before and its own, each key once.",
        "The published code gives centres no gradient and moves them by a running average in training, which `moved_centers` does for \
         a training loop. Here they are a parameter, `means`: a loop that does not exclude it trains it through the centres' keys and \
         values. The sorting has no gradient.",
        "64 centres and groups of 128; the published networks take 16 to 128 and 256 to 32 from block to block.",
        "The output projection and the 1x1 convolution behind it belong to the model.",
    ],
    params: params_of::<Catanet>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Catanet>(CARD.id, params)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn centres_move_to_their_tokens_at_the_pace_of_the_decay() {
        let x = Tensor::new(&[[3f32, 0.1], [2.0, -0.1], [0.1, 1.0], [-0.1, 4.0]], &Device::Cpu).unwrap();
        let means = Tensor::new(&[[1f32, 0.5], [0.4, 1.0], [-5.0, -5.0]], &Device::Cpu).unwrap();
        let get = |decay| moved_centers(&x, &means, 5, decay).unwrap().to_vec2::<f32>().unwrap();
        let far = get(0.0);
        assert!((far[0][0] - 1.0).abs() < 0.01 && far[0][1].abs() < 0.02 && (far[1][1] - 1.0).abs() < 0.01);
        assert!((far[2][0] + 0.5f32.sqrt()).abs() < 1e-6, "a centre without tokens keeps its direction");
        let near = get(0.999);
        assert!((near[0][1] - 0.5).abs() < 0.001 && near[0][1] < 0.5);
        assert!(moved_centers(&x, &means.narrow(1, 0, 1).unwrap(), 1, 0.5).is_err());
    }
}
