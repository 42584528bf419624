//! Combiner: full attention at sparse cost, by a factorised distribution (Ren et al. 2021, arXiv 2107.05768).
//!
//! Tokens form segments. Token i attends directly to its own segment, and to every other segment R through a summary:
//!
//! p(j | i) = e^{s·q_i·k_j} / Z_i for j in i's segment, and e^{s·q_i·k_R} / Z_i · softmax_{j ∈ R}(s·q_R·k_j) for j in R,
//!
//! with Z_i the sum over direct keys and segments, and q_R, k_R pooled over R. In causal attention R runs over earlier
//! segments. q (B, H, T, D) → (B, H, T, Dv). Cost: T·(segment + T/segment) pairs; O(T·√T) at segment ~ √T.

use super::Domain;
use super::pattern::table;
use crate::error::Result;
use crate::mixer::{MixInput, Mixed, Mixer, MixerDims, MixerSystem};
use crate::prim::{AttendOptions, Attended, attend, attend_indexed};
use crate::system::{Card, Config, Family, Growth, Law, Params, Slot, System, configure, params_of};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use foveal_kernels::{BlockTable, HeadKeys, HeadTable, KeyLists, Work};
use serde::{Deserialize, Serialize};

/// How a segment's queries and keys become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// The largest of each channel.
    Max,
    /// The mean.
    Mean,
}

/// Parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Combiner {
    /// Tokens per segment.
    pub segment: usize,
    /// How queries and keys of a segment are pooled.
    pub pool: Pool,
}

impl Default for Combiner {
    fn default() -> Self {
        Self { segment: 64, pool: Pool::Max }
    }
}

impl Config for Combiner {
    const DOCS: &'static [(&'static str, &'static str)] = &[
        ("segment", "tokens per segment, the root of the length for the least cost; 1 or the whole length is exact"),
        ("pool", "how queries and keys of a segment become its summary's: max or mean"),
    ];
    fn validate(&self) -> std::result::Result<(), String> {
        if self.segment == 0 {
            return Err("segment = 0: use at least 1 token".into());
        }
        Ok(())
    }
}

impl MixerSystem for Combiner {
    fn layer(&self, dims: &MixerDims, _: VarBuilder) -> Result<Box<dyn Mixer>> {
        Ok(Box::new(Layer { combiner: self.clone(), causal: dims.causal }))
    }

    fn domain(&self) -> Domain {
        Domain::ANY
    }
}

struct Layer {
    combiner: Combiner,
    causal: bool,
}

impl Layer {
    /// x (B, H, T, D) pooled over segments: (B, H, segments, D).
    fn pooled(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, t, d) = x.dims4()?;
        let seg = self.combiner.segment;
        let one = |x: Tensor, dim: usize| match self.combiner.pool {
            Pool::Max => x.max(dim),
            Pool::Mean => x.mean(dim),
        };
        let whole = t / seg;
        let mut parts = Vec::with_capacity(2);
        if whole > 0 {
            parts.push(one(x.narrow(2, 0, whole * seg)?.contiguous()?.reshape((b, h, whole, seg, d))?, 3)?);
        }
        if !t.is_multiple_of(seg) {
            let rest = x.narrow(2, whole * seg, t - whole * seg)?.contiguous()?;
            parts.push(one(rest, 2)?.unsqueeze(2)?);
        }
        Ok(Tensor::cat(&parts, 2)?)
    }
}

/// Two results over disjoint keys as one, with gradients.
fn joined(a: Attended, b: Attended) -> Result<Tensor> {
    let top = a.lse.maximum(&b.lse)?.detach();
    let weigh = |x: &Attended| (&x.lse - &top)?.exp()?.unsqueeze(3);
    let (wa, wb) = (weigh(&a)?, weigh(&b)?);
    let sum = (&wa + &wb)?;
    Ok((a.out.broadcast_mul(&wa)? + b.out.broadcast_mul(&wb)?)?.broadcast_div(&sum)?)
}

impl Mixer for Layer {
    fn mix(&self, i: &MixInput) -> Result<Mixed> {
        let ((b, h, tq, d), (_, hkv, tk, dv)) = (i.q.dims4()?, i.v.dims4()?);
        if hkv == 0 || !h.is_multiple_of(hkv) {
            return Err(foveal_kernels::KernelError::Groups { op: "combiner", heads: h, kv_heads: hkv }.into());
        }
        let expected = |why: &str| crate::Error::Shape {
            op: "combiner",
            tensor: "q",
            shape: i.q.dims().to_vec(),
            expected: why.into(),
        };
        if tq > tk {
            return Err(expected("at most as many tokens as k"));
        }
        let seg = self.combiner.segment;
        let offset = tk - tq;
        let n = tk.div_ceil(seg);
        let options = AttendOptions { scale: i.scale, causal: self.causal, ..AttendOptions::default() };
        // One table for all heads.
        let heads = |t: HeadTable| BlockTable { heads: vec![t; b * h] };
        let own = table(seg.min(tk.max(1)), tq, offset, |s| std::iter::once(s as u32));
        let local = attend(i.q, i.k, i.v, &options, Some(&heads(own)))?;
        // Segments that some query reaches through their summaries.
        let far = if self.causal {
            n.saturating_sub(1)
        } else if n > 1 {
            n
        } else {
            0
        };
        if far == 0 {
            return Ok(Mixed {
                out: local.out,
                work: local.work,
                select: Work::default(),
                loss: None,
                selections: vec![],
            });
        }
        if offset > 0 {
            return Err(expected(&format!(
                "as many tokens as k's {tk}: summaries of segments take their queries, which a chunk of a prompt has not"
            )));
        }
        let end = (far * seg).min(tk);
        let [q, k, v] = [i.q, i.k, i.v].map(|x| x.narrow(2, 0, end));
        let (q, k, v) = (q?, k?, v?);
        let plain = AttendOptions { causal: false, ..options };
        let inner = HeadTable::from_lists(1, seg.min(end), (0..far as u32).map(|r| vec![r]).collect());
        let summaries = attend(&self.pooled(&q)?, &k, &v, &plain, Some(&heads(inner)))?;
        let kr = self.pooled(&k)?;
        // Keys of a K/V head serve its group; summaries of values are each query head's own.
        let kr = if hkv == h {
            kr
        } else {
            kr.unsqueeze(2)?.broadcast_as((b, hkv, h / hkv, far, d))?.contiguous()?.reshape((b, h, far, d))?
        };
        let lists = (0..n as u32)
            .map(|s| (0..far as u32).filter(|&r| if self.causal { r < s } else { r != s }).collect())
            .collect();
        let lists = KeyLists { heads: vec![HeadKeys::from_lists(seg, lists); b * h] };
        let remote = attend_indexed(i.q, &kr, &summaries.out.contiguous()?, &plain, &lists)?;
        let mut work = local.work + summaries.work + remote.work;
        work.flops += (b * (h + hkv) * end * d + 3 * b * h * tq * dv) as u64;
        Ok(Mixed { out: joined(local, remote)?, work, select: Work::default(), loss: None, selections: Vec::new() })
    }
}

/// Card.
pub const CARD: Card = Card {
    id: "combiner",
    title: "Combiner: Full Attention Transformer with Sparse Computation Cost",
    authors: "Ren et al., 2021",
    arxiv: "2107.05768",
    family: Family::Sparse,
    slots: &[Slot::Mixer],
    laws: &[
        Law::Causal,
        Law::ExactAt(&[("segment", "1")]),
        Law::ExactAt(&[("segment", "1000000")]),
        Law::Work { pairs: Growth::Quadratic, flops: Growth::Quadratic },
        Law::Gradients,
    ],
    equation: "j in i's segment: p(j|i) = e^(s·q_i·k_j) / Z_i\n\
               j in another segment R: p(j|i) = e^(s·q_i·k_R) / Z_i · softmax over R of (s·q_R·k_j);  q_R, k_R pooled over R",
    cost: "T·(segment + T/segment) pairs, O(T·√T) at segment ~ √T; every token has weight",
    choices: &[
        "The paper has three patterns; this is the fixed one. Regions of the other two overlap in part or need several summaries \
         a token, at the same idea.",
        "segment is 64 whatever the length, so that a longer prompt changes nothing earlier; the paper takes the root of the length. At \
         64 the cost is T²/64 in the end.",
        "Pooling is max over each channel as in the paper; its code can also take means. Pooled queries and keys are scaled like others.",
        "In its code for attention without a direction a token's own segment counts twice, directly and through its summary. The paper's \
         regions are disjoint; so they are here, and segments of one token or of all tokens are exact.",
        "A chunk of a prompt cannot be served: earlier segments' summaries take their queries. Hence no prefill slot.",
    ],
    params: params_of::<Combiner>,
    build,
};

fn build(params: &Params) -> Result<System> {
    Ok(System::Mixer(Box::new(configure::<Combiner>(CARD.id, params)?)))
}
