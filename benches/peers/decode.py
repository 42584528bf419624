"""One query over a long store of keys and values, side by side with PyTorch, in turns, beside reading as much memory.

    cargo build --release -p foveal-kernels --example peer
    python benches/peers/decode.py --json decode.json

9 query heads share 3 heads of keys and values of width 64. Each round calls every side twice and times the second call, so
that threads are awake and caches hold what they can, as in the steps of one layer's decoding: ours, reading as many
bytes as the keys and values have (by our own reader, on the same threads), and PyTorch's renditions, of which the one
with the best median stands in the table:

  gqa       scaled_dot_product_attention(enable_gqa=True)
  expanded  scaled_dot_product_attention over keys and values repeated for each query head beforehand
  bmm       softmax(q · Kᵀ) · V by hand over (heads, tokens, width)
  bmm_t     the same with keys held as (heads, width, tokens)
  parts     the same with a product for each head

PyTorch has no attention over int8 or int4 stores: those rows stand beside its best bf16 of as many keys. Our scores and
weights are exact to f32 in every type; PyTorch's bf16 renditions round them to bf16. Needs the packages of
requirements.txt.
"""

import argparse
import statistics
import time

import torch

import common
import render
from common import Partner, say

HEADS, KV_HEADS, WIDTH = 9, 3, 64
KEYS = [8192, 65536]
TYPES = ["f32", "bf16", "int8", "int4"]
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}


def renditions(keys, dtype):
    generator = torch.Generator().manual_seed(1)
    some = lambda *shape: torch.randn(shape, generator=generator).to(TORCH[dtype])
    q, k, v = some(1, HEADS, 1, WIDTH), some(1, KV_HEADS, keys, WIDTH), some(1, KV_HEADS, keys, WIDTH)
    group = HEADS // KV_HEADS
    wide = [x.repeat_interleave(group, 1).contiguous() for x in (k, v)]
    grouped, kt = q.view(KV_HEADS, group, WIDTH), k[0].transpose(1, 2).contiguous()
    attention, scale = torch.nn.functional.scaled_dot_product_attention, WIDTH**-0.5

    def by_hand(transposed):
        return torch.bmm(torch.softmax(torch.bmm(grouped, transposed) * scale, -1), v[0])

    def parts():
        return [torch.softmax(grouped[i] @ k[0, i].T * scale, -1) @ v[0, i] for i in range(KV_HEADS)]

    return {
        "gqa": lambda: attention(q, k, v, enable_gqa=True),
        "expanded": lambda: attention(q, *wide),
        "bmm": lambda: by_hand(k[0].transpose(1, 2)),
        "bmm_t": lambda: by_hand(kt),
        "parts": parts,
    }


def seconds(call):
    call()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(own, readers, repeats, turns, rows, save):
    """Appends to `rows` and calls `save` after each, so that an interrupted run keeps what it has."""
    for keys in KEYS:
        for dtype in TYPES:
            request = f"decode {HEADS} {KV_HEADS} {keys} {WIDTH} {dtype}"
            calls = renditions(keys, dtype if dtype in TORCH else "bf16")
            with turns.unit():
                size = own.ask(request)["bytes"]
                read = f"stream {size}"
                readers.ask(read)
                for call in calls.values():
                    call()
            def asked(partner, line):
                partner.ask(line)
                return 1e3 * partner.ask(line)["seconds"]

            ours, reading, theirs = [], [], {name: [] for name in calls}
            for i in range(repeats):
                with turns.unit():
                    sides = [
                        lambda: ours.append(asked(own, request)),
                        lambda: reading.append(asked(readers, read)),
                        *(lambda n=name, c=call: theirs[n].append(1e3 * seconds(c)) for name, call in calls.items()),
                    ]
                    for side in sides if i % 2 == 0 else reversed(sides):
                        side()
            best = min(theirs, key=lambda n: statistics.median(theirs[n]))
            row = {"what": f"{keys} keys", "dtype": dtype, "unit": "ms", "bytes": size, "rendition": best}
            row |= common.versus(ours, theirs[best], higher_is_better=False)
            row["read"] = common.summary(reading)
            row["others"] = {name: common.summary(times) for name, times in theirs.items()}
            rows.append(row)
            say(f"{dtype} {row['what']}: ours {common.spread(row['ours'])} ms, reading {common.spread(row['read'])} ms, "
                f"theirs {common.spread(row['theirs'])} ms ({best}), ratio {row['ratio']:.2f}")
            save()


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), repeats=25)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    turns = common.Turns(a.lock, a.hold)
    # Two processes, so that the operands of both requests stay where they are.
    peer = lambda: Partner([a.bin / "examples" / "peer"], {"RAYON_NUM_THREADS": str(a.threads)})
    own, readers = peer(), peer()
    result = {
        "machine": common.machine(a.threads),
        "ours": own.about,
        "theirs": {"version": torch.__version__.split("+")[0], "capability": torch.backends.cpu.get_cpu_capability()},
        "rows": [],
    }
    measure(own, readers, a.repeats, turns, result["rows"], lambda: common.save(a.json, result))
    turns.release()
    own.close()
    readers.close()
    print(render.decode(result))


if __name__ == "__main__":
    main()
