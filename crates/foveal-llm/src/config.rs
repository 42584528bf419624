//! The shape of a model, read from `config.json` or from GGUF metadata into one struct.

use serde::{Deserialize, Serialize};

/// The model families that the engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 2/3.x, SmolLM2, Mistral: no projection biases by default.
    Llama,
    /// Qwen2 and Qwen2.5: biases on the query, key and value projections.
    Qwen2,
    /// Qwen3: RMS normalisation of every query and key head before rotation.
    Qwen3,
}

impl Family {
    /// The name as GGUF spells it.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }
}

/// How rotary frequencies are changed to reach past the trained length. `max` fields are in tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Frequencies θ^(−2i/d) as trained.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// The base grows with the sequence once it passes `original_max` (dynamic NTK).
    Dynamic {
        /// Growth per unit of excess length.
        factor: f32,
        /// Trained length.
        original_max: usize,
    },
    /// YaRN: interpolate low frequencies, keep high ones, ramp between, and scale the rotation's amplitude.
    Yarn {
        /// Length extension.
        factor: f32,
        /// Trained length.
        original_max: usize,
        /// Rotations over the trained length above which a frequency is kept (default 32).
        beta_fast: f32,
        /// Rotations over the trained length below which a frequency is interpolated in full (default 1).
        beta_slow: f32,
        /// Amplitude of cos and sin; `None` computes it from `factor` and the two mscales.
        attention_factor: Option<f32>,
        /// Numerator coefficient of the amplitude, where the model gives one.
        mscale: Option<f32>,
        /// Denominator coefficient of the amplitude, where the model gives one.
        mscale_all_dim: Option<f32>,
        /// Whether the ramp's ends are rounded outward to whole dimensions (default true).
        truncate: bool,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, smooth between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths longer than `original_max / low_freq_factor` are divided by `factor`.
        low_freq_factor: f32,
        /// Wavelengths shorter than `original_max / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Trained length.
        original_max: usize,
    },
    /// Each frequency i divided by `factors[i]`. GGUF files of Llama 3.x carry the `Llama3` rule in this form (tensor `rope_freqs.weight`).
    Divisors {
        /// One divisor per rotary pair, length `rope_dim / 2`.
        factors: Vec<f32>,
    },
}

/// Everything that fixes a model's shape and arithmetic apart from its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Model family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; `num_heads · head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    /// Rows of the embedding; may exceed the tokenizer's count by padding.
    pub vocab_size: usize,
    /// ε of every RMS normalisation.
    pub rms_norm_eps: f64,
    /// Rotary base θ.
    pub rope_theta: f64,
    /// Rotary scaling.
    pub rope_scaling: RopeScaling,
    /// How many leading dimensions of a head are rotated (`head_dim` unless partial).
    pub rope_dim: usize,
    /// Trained (or declared) length in tokens.
    pub max_position: usize,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub o_bias: bool,
    /// Biases on the three MLP projections.
    pub mlp_bias: bool,
    /// RMS normalisation of query and key heads (weights of length `head_dim`) before rotation.
    pub qk_norm: bool,
    /// Sliding window in keys, the query's own included; see [`ModelConfig::window`] for which layers use it.
    pub sliding_window: Option<usize>,
    /// Per layer, whether the sliding window applies; empty means every layer.
    pub sliding_layers: Vec<bool>,
    /// Beginning-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// The sliding window of `layer` in keys, the query's own included; `None` attends to everything before.
    pub fn window(&self, layer: usize) -> Option<usize> {
        match self.sliding_layers.get(layer) {
            Some(false) => None,
            _ => self.sliding_window,
        }
    }

    /// Every tensor the model needs, with its shape (rows first), in the order in which a forward pass meets them.
    /// `lm_head.weight` is listed only when it is not tied.
    pub fn tensor_shapes(&self) -> impl Iterator<Item = TensorSpec> + '_ {
        let embed = std::iter::once(TensorSpec {
            name: "model.embed_tokens.weight".into(),
            shape: vec![self.vocab_size, self.hidden_size],
            keys: "vocab_size and hidden_size",
        });
        let layers = (0..self.num_layers).flat_map(move |layer| self.layer_shapes(layer));
        let norm = TensorSpec { name: "model.norm.weight".into(), shape: vec![self.hidden_size], keys: "hidden_size" };
        let head = (!self.tie_embeddings).then(|| TensorSpec {
            name: "lm_head.weight".into(),
            shape: vec![self.vocab_size, self.hidden_size],
            keys: "vocab_size, hidden_size and tie_word_embeddings",
        });
        embed.chain(layers).chain(std::iter::once(norm)).chain(head)
    }

    fn layer_shapes(&self, layer: usize) -> Vec<TensorSpec> {
        let (h, i) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut out = Vec::with_capacity(16);
        let mut push = |name: &str, shape: Vec<usize>, keys: &'static str| {
            out.push(TensorSpec { name: format!("model.layers.{layer}.{name}"), shape, keys });
        };
        let (q_keys, kv_keys) = ("hidden_size, num_heads and head_dim", "hidden_size, num_kv_heads and head_dim");
        push("input_layernorm.weight", vec![h], "hidden_size");
        push("self_attn.q_proj.weight", vec![q, h], q_keys);
        push("self_attn.k_proj.weight", vec![kv, h], kv_keys);
        push("self_attn.v_proj.weight", vec![kv, h], kv_keys);
        if self.qkv_bias {
            push("self_attn.q_proj.bias", vec![q], q_keys);
            push("self_attn.k_proj.bias", vec![kv], kv_keys);
            push("self_attn.v_proj.bias", vec![kv], kv_keys);
        }
        if self.qk_norm {
            push("self_attn.q_norm.weight", vec![self.head_dim], "head_dim");
            push("self_attn.k_norm.weight", vec![self.head_dim], "head_dim");
        }
        push("self_attn.o_proj.weight", vec![h, q], q_keys);
        if self.o_bias {
            push("self_attn.o_proj.bias", vec![h], "hidden_size");
        }
        push("post_attention_layernorm.weight", vec![h], "hidden_size");
        push("mlp.gate_proj.weight", vec![i, h], "hidden_size and intermediate_size");
        push("mlp.up_proj.weight", vec![i, h], "hidden_size and intermediate_size");
        push("mlp.down_proj.weight", vec![h, i], "hidden_size and intermediate_size");
        if self.mlp_bias {
            push("mlp.gate_proj.bias", vec![i], "intermediate_size");
            push("mlp.up_proj.bias", vec![i], "intermediate_size");
            push("mlp.down_proj.bias", vec![h], "hidden_size");
        }
        out
    }

    /// Number of weights, the embedding counted once when tied.
    pub fn num_parameters(&self) -> u64 {
        self.tensor_shapes().map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }
}

/// One tensor that a configuration calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Hugging Face name.
    pub name: String,
    /// Shape, rows first.
    pub shape: Vec<usize>,
    /// The configuration keys that imply the shape, for messages.
    pub keys: &'static str,
}

/// Upper bound of any single dimension; far above every real model, and small enough that products of two never overflow.
const MAX_DIM: usize = 1 << 28;

impl ModelConfig {
    /// Checks the numbers against each other. On failure returns the key, its value and what is needed.
    pub fn validate(&self) -> Result<(), (&'static str, String, String)> {
        let dims = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position),
        ];
        for (key, value) in dims {
            if value == 0 || value > MAX_DIM {
                return Err((key, value.to_string(), format!("needs a number from 1 to {MAX_DIM}")));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let need = format!("needs a divisor of num_attention_heads = {}", self.num_heads);
            return Err(("num_key_value_heads", self.num_kv_heads.to_string(), need));
        }
        if self.rope_dim == 0 || !self.rope_dim.is_multiple_of(2) || self.rope_dim > self.head_dim {
            let need = format!("needs an even number from 2 to head_dim = {}", self.head_dim);
            return Err(("rotary dimension", self.rope_dim.to_string(), need));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(("rms_norm_eps", self.rms_norm_eps.to_string(), "needs a number between 0 and 1".into()));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return Err(("rope_theta", self.rope_theta.to_string(), "needs a finite number above 1".into()));
        }
        if self.sliding_window == Some(0) {
            return Err(("sliding_window", "0".into(), "needs at least 1 key, or null".into()));
        }
        let positive = |key: &'static str, value: f32| {
            if value > 0.0 && value.is_finite() {
                Ok(())
            } else {
                Err((key, value.to_string(), "needs a positive finite number".to_string()))
            }
        };
        let length = |value: usize| {
            if value == 0 || value > MAX_DIM {
                let need = format!("needs a number from 1 to {MAX_DIM}");
                Err(("original_max_position_embeddings", value.to_string(), need))
            } else {
                Ok(())
            }
        };
        match &self.rope_scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => positive("rope factor", *factor)?,
            RopeScaling::Dynamic { factor, original_max } => {
                positive("rope factor", *factor)?;
                length(*original_max)?;
            }
            RopeScaling::Yarn {
                factor,
                original_max,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                ..
            } => {
                positive("rope factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                if let Some(value) = attention_factor {
                    positive("attention_factor", *value)?;
                }
                for (key, value) in [("mscale", mscale), ("mscale_all_dim", mscale_all_dim)] {
                    if let Some(value) = value
                        && !(*value >= 0.0 && value.is_finite())
                    {
                        return Err((key, value.to_string(), "needs a finite number of at least 0".into()));
                    }
                }
                length(*original_max)?;
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
                positive("rope factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let need = format!("needs more than low_freq_factor = {low_freq_factor}");
                    return Err(("high_freq_factor", high_freq_factor.to_string(), need));
                }
                length(*original_max)?;
            }
            RopeScaling::Divisors { factors } => {
                if factors.len() != self.rope_dim / 2 {
                    let need = format!("needs {} divisors, half the rotary dimension", self.rope_dim / 2);
                    return Err(("rope_freqs.weight", format!("{} divisors", factors.len()), need));
                }
                for &factor in factors {
                    positive("rope_freqs.weight", factor)?;
                }
            }
        }
        Ok(())
    }
}
