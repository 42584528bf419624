"""Small seed files for the fuzz targets, made from the repository's own golden files.

    python fuzz/make_corpus.py

Writes fuzz/corpus/{gguf,safetensors_folder,plan}, which git ignores. Needs only the standard library.
"""

import json
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


def gguf(values):
    """A header without tensors: keys with their type codes and packed values."""
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    for key, (code, packed) in values.items():
        out += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", code) + packed
    return out


def text(s):
    return 8, struct.pack("<Q", len(s)) + s.encode()


GGUF = {
    "empty": gguf({}),
    "keys": gguf(
        {
            "general.architecture": text("llama"),
            "general.alignment": (4, struct.pack("<I", 32)),
            "llama.block_count": (4, struct.pack("<I", 2)),
            "llama.rope.freq_base": (6, struct.pack("<f", 1e4)),
            "flag": (7, b"\1"),
            "numbers": (9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
            "nested": (9, struct.pack("<IQIQB", 9, 1, 0, 1, 7)),
        }
    ),
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
        "safetensors_folder": dict(SAFETENSORS) | {"cache": (GOLDENS / "cache.safetensors").read_bytes()},
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
