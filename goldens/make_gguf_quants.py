"""Writes gguf_quants.gguf: for every tensor type that the loader reads, one tensor of random blocks and, as F32 under
`NAME.expected`, the values that the `gguf` package decodes from those very bytes.

    python goldens/make_gguf_quants.py
"""
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T, GGUFWriter
from gguf.quants import dequantize

ROWS, COLS = 3, 256
HERE = Path(__file__).parent
# Byte offsets of the half-precision scales within one block; the rest of a block may hold any bytes.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
          T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}

rng = np.random.default_rng(7)
writer = GGUFWriter(HERE / "gguf_quants.gguf", "llama")
for kind, scales in SCALES.items():
    block, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * COLS // block, size), dtype=np.uint8)
    for at in scales:
        half = rng.normal(0, 0.02, len(blocks)).astype(np.float16)
        blocks[:, at:at + 2] = half.view(np.uint8).reshape(-1, 2)
    raw = blocks.reshape(ROWS, -1)
    name = kind.name.lower()
    writer.add_tensor(name, raw, raw_dtype=kind)
    writer.add_tensor(f"{name}.expected", dequantize(raw, kind).astype(np.float32))
values = rng.normal(0, 1, (ROWS, COLS)).astype(np.float32)
writer.add_tensor("f16", values.astype(np.float16))
writer.add_tensor("f16.expected", values.astype(np.float16).astype(np.float32))
bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
writer.add_tensor("bf16", bf16.view(np.uint8).reshape(ROWS, -1), raw_dtype=T.BF16)
writer.add_tensor("bf16.expected", (bf16.astype(np.uint32) << 16).view(np.float32))
writer.add_tensor("f32", values)
writer.add_tensor("f32.expected", values)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
