"""Reference logits of tiny models from the `transformers` package, and GGUF files of three of them.

    python goldens/make_llm_goldens.py        # writes goldens/llm/

Weights are not stored: `weight` below makes every one from its tensor's name, and the Rust test
makes the same. They are small multiples of a power of two, exact in f32, f16 and bf16 alike.
Stored are config.json as transformers writes it, the input ids, and logits of some positions: of
the whole sequence at once, and of a continuation token by token after the first PROMPT tokens.
"""

import json
import pathlib

import gguf
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).parent / "llm"
TOKENS, PROMPT = 48, 32
FULL = [0, 1, 7, 15, 30, 31, 39, 47]
STEPS = [32, 33, 40, 47]


def weight(name, shape):
    """Weight of flat index i: splitmix64 of (FNV-1a of the name + i)."""
    h = 0xCBF29CE484222325
    for b in name.encode():
        h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    n = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(h) + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    k = (z >> np.uint64(40)).astype(np.int64)
    if "norm" in name:  # gains around 1
        x = 1.0 + (k % 33 - 16) / 64.0
    elif name.endswith("bias"):
        x = (k % 65 - 32) / 64.0
    else:
        x = (k % 255 - 127) / 512.0
    return x.astype(np.float32).reshape(shape)


def ids(vocab):
    return (weight("input", [TOKENS]) * 512 + 127).astype(np.int64) % vocab


BASE = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def llama(rope=None, **over):
    rope = {"rope_type": "default", "rope_theta": 10000.0} | (rope or {})
    return transformers.LlamaConfig(**(BASE | dict(rope_parameters=rope) | over))


MODELS = {
    "llama": llama(),
    "llama_tied": llama(tie_word_embeddings=True, num_hidden_layers=3),
    "llama_bias": llama(attention_bias=True, mlp_bias=True),
    "llama_linear": llama({"rope_type": "linear", "factor": 2.5}),
    "llama_dynamic": llama({"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=24),
    "llama_yarn": llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "llama_yarn_mscale": llama(
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        }
    ),
    "llama3": llama(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mistral": transformers.MistralConfig(**(BASE | dict(sliding_window=12, head_dim=16))),
    "qwen2": transformers.Qwen2Config(**(BASE | dict(tie_word_embeddings=True))),
    "qwen3": transformers.Qwen3Config(**(BASE | dict(head_dim=24, num_hidden_layers=3))),
}
SMALL = dict(hidden_size=32, intermediate_size=48, vocab_size=96, num_attention_heads=2, num_key_value_heads=1)
GGUF = {
    "gguf_llama": llama(tie_word_embeddings=True, **SMALL),
    "gguf_qwen2": transformers.Qwen2Config(**(BASE | SMALL | dict(tie_word_embeddings=True))),
    "gguf_qwen3": transformers.Qwen3Config(**(BASE | SMALL | dict(head_dim=24, tie_word_embeddings=True))),
}


def build(config):
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weight(name, list(p.shape))))
    return model


def reference(config):
    x = torch.from_numpy(ids(config.vocab_size))[None]
    with torch.no_grad():
        full = build(config)(x, use_cache=False).logits[0].numpy()
        # A fresh model: the dynamic rotation remembers the longest sequence it has seen.
        model = build(config)
        state = model(x[:, :PROMPT], use_cache=True)
        past, rows = state.past_key_values, {}
        for t in range(PROMPT, TOKENS):
            state = model(x[:, t : t + 1], past_key_values=past, use_cache=True)
            past = state.past_key_values
            rows[t] = state.logits[0, 0].numpy()
    return full[FULL], np.stack([rows[t] for t in STEPS])


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(w, heads):
    """Rows of each head from halves (i, i + d/2) to neighbours (2i, 2i + 1), as Llama-arch GGUF has them."""
    d = w.shape[0] // heads
    return w.reshape(heads, 2, d // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, model):
    c = model.config
    arch = c.model_type
    w = gguf.GGUFWriter(path, arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    for name, p in model.named_parameters():
        x = p.detach().numpy()
        if name == "model.embed_tokens.weight":
            to = "token_embd.weight"
        elif name == "model.norm.weight":
            to = "output_norm.weight"
        elif name == "lm_head.weight":
            to = "output.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            part, suffix = rest.rsplit(".", 1)
            to = f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
            if arch == "llama" and part.endswith("q_proj"):
                x = interleave(x, c.num_attention_heads)
            if arch == "llama" and part.endswith("k_proj"):
                x = interleave(x, c.num_key_value_heads)
        # One-dimensional tensors stay f32 in GGUF.
        w.add_tensor(to, x.astype(np.float16) if x.ndim > 1 else x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    OUT.mkdir(exist_ok=True)
    tensors = {"full_positions": np.array(FULL, np.uint32), "step_positions": np.array(STEPS, np.uint32)}
    for name, config in (MODELS | GGUF).items():
        model = build(config)
        full, steps = reference(config)
        tensors |= {f"{name}.ids": ids(config.vocab_size).astype(np.uint32), f"{name}.full": full, f"{name}.steps": steps}
        if name in GGUF:
            write_gguf(str(OUT / f"{name}.gguf"), model)
        else:
            config.architectures = [type(model).__name__]
            text = json.loads(config.to_json_string(use_diff=False))
            text.pop("transformers_version", None)
            (OUT / f"{name}.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
        print(name, "spread of logits", float(full.std()), "full vs steps", float(abs(full[-1] - steps[-1]).max()))
    save_file(tensors, str(OUT / "reference.safetensors"))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
