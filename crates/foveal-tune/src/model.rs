//! A small transformer with any attention layer: embedding, pre-norm blocks (attention, then a gated MLP), norm, head.

use crate::baseline::random_at_budget;
use crate::error::{Result, setting};
use candle_core::{D, Device, Tensor};
use candle_nn::{Init, Linear, Module, VarBuilder};
use foveal::mixer::{self, MixInput, Mixer, MixerDims};
use foveal::prim::rms_norm;
use foveal::prim::rope::Rope;
use foveal::sparse::{Grid, mask};
use foveal::{Slot, Spec, Work, registry};
use serde::{Deserialize, Serialize};

/// What a model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    /// Token ids below the size of the vocabulary.
    Tokens(usize),
    /// Vectors of so many numbers.
    Vectors(usize),
}

/// What a model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Output {
    /// Logits of so many tokens at every position.
    Tokens(usize),
    /// Logits of so many classes for the whole sequence, from the mean of its positions.
    Classes(usize),
}

/// Shape of a model. Plain data, so that a checkpoint can hold it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetConfig {
    /// What it reads.
    pub input: Input,
    /// What it answers.
    pub output: Output,
    /// Tokens a sequence.
    pub tokens: usize,
    /// Channels.
    pub hidden: usize,
    /// Query heads; hidden is a multiple.
    pub heads: usize,
    /// K/V heads.
    pub kv_heads: usize,
    /// One attention system a block, written as on the command line.
    pub layers: Vec<String>,
    /// Whether tokens see no later ones.
    pub causal: bool,
    /// The grid that the tokens form, if any: positions are then learned vectors, else a rotation of q and k.
    pub grid: Option<Grid>,
    /// Whether each layer's choice of keys is replaced by a random one of the same size.
    pub random: bool,
}

impl NetConfig {
    fn check(&self) -> Result<()> {
        let Self { hidden, heads, kv_heads, .. } = self;
        if *heads == 0 || !hidden.is_multiple_of(*heads) || !(hidden / heads).is_multiple_of(2) {
            return Err(setting(
                "heads",
                heads,
                format!("use a number that divides hidden = {hidden} into even parts"),
            ));
        }
        if *kv_heads == 0 || !heads.is_multiple_of(*kv_heads) {
            return Err(setting("kv_heads", kv_heads, format!("use a divisor of heads = {heads}")));
        }
        if self.layers.is_empty() {
            return Err(setting("layers", "[]", "name at least one attention system"));
        }
        if let Some(grid) = self.grid {
            grid.check(self.tokens)?;
        }
        Ok(())
    }
}

/// A model with its parameters.
pub struct Net {
    config: NetConfig,
    embed: Tensor,
    positions: Option<Tensor>,
    rotation: Option<(Tensor, Tensor)>,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
}

struct Block {
    dims: MixerDims,
    norm: Tensor,
    qkv: Linear,
    mixer: Box<dyn Mixer>,
    out: Linear,
    mlp_norm: Tensor,
    up: Linear,
    down: Linear,
}

/// What a pass gave.
pub struct Passed {
    /// (B, T, vocabulary) or (B, classes).
    pub logits: Tensor,
    /// Sum of the layers' own losses.
    pub loss: Option<Tensor>,
    /// Work of all attention layers, choices included.
    pub work: Work,
    /// (query, key) pairs that the layers attended to: exact where they report their choice, else what their tiles hold.
    pub pairs: u64,
    /// (query, key) pairs that exact attention of the layers would visit.
    pub dense_pairs: u64,
}

fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let init = Init::Randn { mean: 0.0, stdev: 1.0 / (inputs as f64).sqrt() };
    Ok(Linear::new(vb.get_with_hints((outputs, inputs), "weight", init)?, None))
}

impl Net {
    /// A model whose parameters come from `vb`.
    pub fn new(config: NetConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let (hidden, heads) = (config.hidden, config.heads);
        let d = hidden / heads;
        let small = Init::Randn { mean: 0.0, stdev: 0.02 };
        let one = Init::Const(1.0);
        let embed = match config.input {
            Input::Tokens(n) => {
                vb.get_with_hints((n, hidden), "embed.weight", Init::Randn { mean: 0.0, stdev: 1.0 })?
            }
            Input::Vectors(n) => {
                let init = Init::Randn { mean: 0.0, stdev: 1.0 / (n as f64).sqrt() };
                vb.get_with_hints((hidden, n), "embed.weight", init)?
            }
        };
        let positions = match config.grid {
            Some(_) => Some(vb.get_with_hints((config.tokens, hidden), "positions", small)?),
            None => None,
        };
        let rotation = match config.grid {
            Some(_) => None,
            None => {
                let (cos, sin) = Rope::new(d, 10_000.0).tables(0, config.tokens);
                let t = |x| Tensor::from_vec(x, (config.tokens, d / 2), &Device::Cpu);
                Some((t(cos)?, t(sin)?))
            }
        };
        let mut blocks = Vec::with_capacity(config.layers.len());
        for (i, spec) in config.layers.iter().enumerate() {
            let vb = vb.pp(format!("blocks.{i}"));
            let spec: Spec = spec.parse()?;
            let dims = MixerDims {
                hidden,
                heads,
                kv_heads: config.kv_heads,
                head_dim: d,
                causal: config.causal,
                grid: config.grid,
                layer: i,
            };
            let system = registry::build(&spec, layer_slot(&spec)?)?;
            let mixer = mixer::layer(&spec.id, system, &dims, vb.pp("mixer"))?;
            blocks.push(Block {
                dims,
                norm: vb.get_with_hints(hidden, "norm.weight", one)?,
                qkv: linear(hidden, (heads + 2 * config.kv_heads) * d, vb.pp("qkv"))?,
                mixer: if config.random { random_at_budget(mixer, config.causal, i as u64) } else { mixer },
                out: linear(hidden, hidden, vb.pp("out"))?,
                mlp_norm: vb.get_with_hints(hidden, "mlp_norm.weight", one)?,
                up: linear(hidden, 4 * hidden, vb.pp("up"))?,
                down: linear(2 * hidden, hidden, vb.pp("down"))?,
            });
        }
        let classes = match config.output {
            Output::Tokens(n) | Output::Classes(n) => n,
        };
        let norm = vb.get_with_hints(hidden, "norm.weight", one)?;
        let head = linear(hidden, classes, vb.pp("head"))?;
        Ok(Self { config, embed, positions, rotation, blocks, norm, head })
    }

    /// Shape.
    pub fn config(&self) -> &NetConfig {
        &self.config
    }

    /// Logits of a batch: u32 token ids (B, T) or f32 vectors (B, T, n).
    pub fn pass(&self, input: &Tensor) -> Result<Passed> {
        let (b, t) = (input.dim(0)?, input.dim(1)?);
        let mut x = match self.config.input {
            Input::Tokens(_) => self.embed.index_select(&input.flatten_all()?, 0)?.reshape((b, t, ()))?,
            Input::Vectors(_) => input.broadcast_matmul(&self.embed.t()?)?,
        };
        if let Some(p) = &self.positions {
            x = x.broadcast_add(&p.narrow(0, 0, t)?)?;
        }
        let (mut work, mut pairs, mut dense_pairs) = (Work::default(), 0, 0);
        let mut loss: Option<Tensor> = None;
        for block in &self.blocks {
            let m = self.attend(block, &normed(&x, &block.norm)?)?;
            x = (x + m.0)?;
            work += m.1.work + m.1.select;
            let causal = block.dims.causal;
            let all = (b * block.dims.heads * if causal { t * (t + 1) / 2 } else { t * t }) as u64;
            pairs += match &m.1.selections[..] {
                [] => m.1.work.pairs.min(all),
                chosen => chosen.iter().map(|s| mask::pairs(s, t, t, causal)).sum(),
            };
            dense_pairs += all;
            if let Some(own) = m.1.loss {
                loss = Some(match loss {
                    Some(sum) => (sum + own)?,
                    None => own,
                });
            }
            let y = block.up.forward(&normed(&x, &block.mlp_norm)?)?;
            let half = y.dim(D::Minus1)? / 2;
            let gated = (y.narrow(D::Minus1, 0, half)?.silu()? * y.narrow(D::Minus1, half, half)?)?;
            x = (x + block.down.forward(&gated)?)?;
        }
        let x = normed(&x, &self.norm)?;
        let x = match self.config.output {
            Output::Tokens(_) => x,
            Output::Classes(_) => x.mean(1)?,
        };
        Ok(Passed { logits: self.head.forward(&x)?, loss, work, pairs, dense_pairs })
    }

    /// The attention of one block on its normed input (B, T, hidden), projected back.
    fn attend(&self, block: &Block, x: &Tensor) -> Result<(Tensor, mixer::Mixed)> {
        let (b, t, hidden) = x.dims3()?;
        let MixerDims { heads, kv_heads, head_dim: d, .. } = block.dims;
        let qkv = block.qkv.forward(x)?.reshape((b, t, heads + 2 * kv_heads, d))?.transpose(1, 2)?;
        let part = |from, n| qkv.narrow(1, from, n)?.contiguous();
        let (q0, k0, v) = (part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?);
        let (q, k) = (self.rotate(&q0)?, self.rotate(&k0)?);
        let input = MixInput { x: Some(x), before_rotation: Some((&q0, &k0)), ..MixInput::new(&q, &k, &v) };
        let m = block.mixer.mix(&input)?;
        let y = m.out.transpose(1, 2)?.contiguous()?.reshape((b, t, hidden))?;
        Ok((block.out.forward(&y)?, m))
    }

    /// Rotation of (B, H, T, D) by position; candle's own has no gradient.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let Some((cos, sin)) = &self.rotation else { return Ok(x.clone()) };
        let (t, half) = (x.dim(2)?, x.dim(3)? / 2);
        let (cos, sin) = (cos.narrow(0, 0, t)?, sin.narrow(0, 0, t)?);
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[&first, &second], 3)?)
    }
}

fn normed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(rms_norm(x, weight, 1e-6)?.0)
}

/// The slot under which a system makes layers: a trainable layer, or a prefill system used as one.
fn layer_slot(spec: &Spec) -> Result<Slot> {
    let card = registry::find(&spec.id)?;
    Ok(if card.has_slot(Slot::Mixer) { Slot::Mixer } else { Slot::Prefill })
}
