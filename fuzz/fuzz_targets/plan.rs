//! A plan file, and its systems built for a small model. Run with `cargo fuzz run plan`.
#![no_main]

use foveal_llm::{Family, ModelConfig, Plan, RopeScaling};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(plan) = Plan::parse(text) else { return };
    let again = Plan::parse(&plan.to_toml()).expect("a plan that was read can be read again");
    assert_eq!(again, plan);
    let _ = plan.check(&ModelConfig {
        family: Family::Llama,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 3,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        vocab_size: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::Default,
        rope_dim: 8,
        max_position: 64,
        tie_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        sliding_layers: Vec::new(),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    });
});
