"""Exact attention side by side with PyTorch's scaled_dot_product_attention, in turns.

    cargo build --release -p foveal-kernels --example peer
    python benches/peers/sdpa.py --json sdpa.json

Each row warms both sides up, then goes in turns for --repeats rounds of one call each. FLOPs are 4 B H T² D,
half of that under a causal mask; our output is f32 in both types, PyTorch's that of its input. With --backward
a call is the forward pass and the gradients in q, k and v (14 B H T² D), ours in f32. Needs the packages of
requirements.txt.
"""

import argparse
import time

import torch

import common
import render
from common import Partner, say

SHAPES = [(1, 8, 2048, 64), (1, 8, 8192, 64), (1, 8, 8192, 128)]
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def peer(shape, dtype, causal, backward):
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(TYPES[dtype]) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(backward)

    def call():
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)
        return time.perf_counter() - begin

    return call


def measure(own, repeats, turns, types, rows, save, backward=False):
    """Appends to `rows` and calls `save` after each, so that an interrupted run keeps what it has."""
    for dtype in types:
        for shape in SHAPES[:1] if backward else SHAPES:
            for causal in (False, True):
                b, h, t, d = shape
                mask = "causal" if causal else "full"
                request = f"{'attend_grad' if backward else 'attend'} {b} {h} {h} {t} {d} {dtype} {mask}"
                with turns.unit():
                    theirs = peer(shape, dtype, causal, backward)
                    theirs()
                    own.ask(request)
                ours_ms, theirs_ms = common.rounds(own, request, theirs, turns, repeats)
                flops = (14 if backward else 4) * b * h * t * t * d / (2 if causal else 1)
                what = f"({b}, {h}, {t}, {d}) {mask}{', forward and backward' if backward else ''}"
                row = {"what": what, "dtype": dtype, "unit": "ms", "flops": flops}
                row |= common.versus(ours_ms, theirs_ms, higher_is_better=False)
                rows.append(row)
                say(f"{dtype} {row['what']}: ours {common.spread(row['ours'])} ms, "
                    f"theirs {common.spread(row['theirs'])} ms, ratio {row['ratio']:.2f}")
                save()


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), repeats=9)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--types", type=lambda s: s.split(","), default=list(TYPES))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    turns = common.Turns(a.lock, a.hold)
    own = Partner([a.bin / "examples" / "peer"], {"RAYON_NUM_THREADS": str(a.threads)})
    result = {
        "machine": common.machine(a.threads),
        "ours": own.about,
        "theirs": {"version": torch.__version__.split("+")[0], "capability": torch.backends.cpu.get_cpu_capability()},
        "rows": [],
    }
    measure(own, a.repeats, turns, a.types, result["rows"], lambda: common.save(a.json, result), a.backward)
    turns.release()
    own.close()
    print(render.sdpa(result))


if __name__ == "__main__":
    main()
