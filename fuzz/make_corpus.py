"""Small seed files for the fuzz targets, made from the repository's own golden files.

    python fuzz/make_corpus.py

Writes fuzz/corpus/{gguf,safetensors_folder,plan}, which git ignores. Needs only the standard library.
"""

import json
import math
import pathlib
import struct

HERE = pathlib.Path(__file__).resolve().parent
GOLDENS = HERE.parent / "goldens"


def safetensors(tensors, metadata=None):
    """A file of zeros: name, type, shape and bytes of each tensor."""
    header, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def model(config):
    """A configuration, a byte 0, and a file of zeros with every tensor that it calls for."""
    # Smaller than the goldens' models: what is worth changing is the configuration.
    c = json.loads(config) | SMALL
    if c.get("layer_types"):
        c["layer_types"] = c["layer_types"][: c["num_hidden_layers"]]
    h, inter, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    d = c.get("head_dim") or h // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    shapes = {"model.embed_tokens.weight": [vocab, h], "model.norm.weight": [h]}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [vocab, h]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        rows = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": h}
        rows |= {"mlp.gate_proj": inter, "mlp.up_proj": inter, "mlp.down_proj": h}
        for name, n in rows.items():
            columns = {"self_attn.o_proj": q, "mlp.down_proj": inter}.get(name, h)
            shapes[f"{at}{name}.weight"] = [n, columns]
            attention = c.get("attention_bias") or (c["model_type"] == "qwen2" and not name.endswith("o_proj"))
            if c.get("mlp_bias") if name.startswith("mlp") else attention:
                shapes[f"{at}{name}.bias"] = [n]
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            shapes[f"{at}{norm}.weight"] = [h]
        if c["model_type"] == "qwen3":
            shapes |= {f"{at}self_attn.{x}_norm.weight": [d] for x in "qk"}
    tensors = [(name, "F16", shape, 2 * math.prod(shape)) for name, shape in sorted(shapes.items())]
    return json.dumps(c, separators=(",", ":")).encode() + b"\0" + safetensors(tensors)


def gguf(values, tensors=()):
    """Keys with their type codes and packed values; names and shapes (rows first) of tensors, all F32 zeros."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, (code, packed) in values.items():
        out += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", code) + packed
    at = 0
    for name, shape in tensors:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", 0, at)
        at += -(-4 * math.prod(shape) // 32) * 32
    return out + bytes(-len(out) % 32 + at)


def tiny(architecture, tokenizer):
    """A model of one layer that carries a tokenizer."""
    h, inter, vocab = 8, 8, len(tokenizer["tokens"])
    a = architecture
    values = {
        "general.architecture": text(a),
        f"{a}.block_count": u32(1),
        f"{a}.context_length": u32(32),
        f"{a}.embedding_length": u32(h),
        f"{a}.feed_forward_length": u32(inter),
        f"{a}.attention.head_count": u32(2),
        f"{a}.attention.head_count_kv": u32(1),
        f"{a}.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-5)),
    }
    for key, value in tokenizer.items():
        if isinstance(value, list):
            strings = isinstance(value[0], str)
            items = b"".join(text(x)[1] if strings else struct.pack("<i", x) for x in value)
            value = 9, struct.pack("<IQ", 8 if strings else 5, len(value)) + items
        elif isinstance(value, str):
            value = text(value)
        else:
            value = u32(value)
        values[f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"] = value
    tensors = [("token_embd.weight", [vocab, h]), ("output_norm.weight", [h])]
    rows = {"attn_q": h, "attn_k": h // 2, "attn_v": h // 2, "attn_output": h}
    rows |= {"ffn_gate": inter, "ffn_up": inter, "ffn_down": h}
    tensors += [(f"blk.0.{name}.weight", [n, h]) for name, n in rows.items()]
    tensors += [(f"blk.0.{name}.weight", [h]) for name in ["attn_norm", "ffn_norm"]]
    if a == "qwen2":
        tensors += [(f"blk.0.{name}.bias", [rows[name]]) for name in ["attn_q", "attn_k", "attn_v"]]
    return gguf(values, tensors)


def u32(x):
    return 4, struct.pack("<I", x)


def text(s):
    return 8, struct.pack("<Q", len(s.encode())) + s.encode()


TEMPLATE = "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] | trim }}{% endfor %}{{ eos_token }}"
SCORED = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "t", "e", "x", "te", "xt", "text", "\u2581text", "A"],
    "scores": [0, 0, 0, 0, -9, -8, -7, -6, -5, -4, -3, -2, -1],
    "token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1, 4],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "chat_template": TEMPLATE,
}
MERGED = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": ["<|endoftext|>", "<|im_end|>", "\u0120", "t", "e", "x", "te", "xt", "text", "\u0120text", "A", "1", "2", ","],
    "token_type": [3, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "merges": ["t e", "x t", "te xt", "\u0120 text"],
    "eos_token_id": 1,
    "chat_template": TEMPLATE,
}
GGUF = {
    "scored": tiny("llama", SCORED),
    "merged": tiny("qwen2", MERGED),
    "empty": gguf({}),
    "keys": gguf(
        {
            "general.architecture": text("llama"),
            "general.alignment": u32(32),
            "llama.block_count": u32(2),
            "llama.rope.freq_base": (6, struct.pack("<f", 1e4)),
            "flag": (7, b"\1"),
            "numbers": (9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
            "nested": (9, struct.pack("<IQIQB", 9, 1, 0, 1, 7)),
        }
    ),
}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "vocab_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "head_dim": 8,
}
SAFETENSORS = {
    "none": safetensors([]),
    "two": safetensors([("a", "F32", [2, 3], 24), ("b.weight", "BF16", [4], 8)], {"format": "pt"}),
    "scalar": safetensors([("s", "I64", [], 8), ("empty", "F16", [0, 7], 0)]),
}
PLANS = [
    'version = 1\nname = "dense"\nprefill = "flashattention-2"\ncache = "flashattention-2"\nkv_dtype = "bf16"\n',
    'version = 1\nname = "x"\nprefill = "xattention:threshold=0.9,stride=8"\ncache = "think:ratio=0.5"\nkv_dtype = "int8"\n'
    '\n[[rule]]\nlayers = [0, 1]\nheads = [0, 3]\nprefill = "minference:pattern=a-shape,sink=64"\n'
    '\n[[rule]]\nlayers = [2]\ncache = "loki"\n',
    'version = 1\nprefill = "hip-attention"\ncache = "palu:rank=0.5"\nkv_dtype = "f32"\n',
]


def main():
    seeds = {
        "gguf": dict(GGUF) | {f.stem: f.read_bytes() for f in sorted(GOLDENS.rglob("*.gguf"))},
        "safetensors_folder": dict(SAFETENSORS)
        | {"cache": (GOLDENS / "cache.safetensors").read_bytes()}
        | {f.stem: model(f.read_bytes()) for f in sorted((GOLDENS / "llm").glob("*.json"))},
        "plan": {f"plan{i}": p.encode() for i, p in enumerate(PLANS)},
    }
    for target, files in seeds.items():
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        print(f"{target}: {len(files)} files, {sum(map(len, files.values()))} bytes")


if __name__ == "__main__":
    main()
