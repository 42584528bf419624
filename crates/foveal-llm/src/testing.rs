//! Shapes for unit tests.

use crate::config::{Family, ModelConfig, RopeScaling};

/// A small Llama of `layers` layers and `heads` query heads of 16.
pub(crate) fn config(layers: usize, heads: usize) -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden_size: heads * 16,
        intermediate_size: 64,
        num_layers: layers,
        num_heads: heads,
        num_kv_heads: heads / 2,
        head_dim: 16,
        vocab_size: 256,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::Default,
        rope_dim: 16,
        max_position: 2048,
        tie_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        sliding_layers: Vec::new(),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}
