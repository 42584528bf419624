"""PyTorch's attention (flash and cuDNN back ends, FlexAttention) and fla on the shapes of our GPU benchmark.

    cargo run --release -p foveal-cuda --example gpu_bench -- --json ours.json
    python benches/peers/gpu.py --ours ours.json --json peers.json

B = 1, 32 heads, D = 128, bf16, random data; medians by device events. With --ours it ends with a table of ratios.
Run both on one device, one after the other: a time is only a ratio. fla is timed where it can be imported
(wheels flash-linear-attention and fla-core).
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

rows = []


def timed(call, samples):
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    marks = []
    for _ in range(samples):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        marks.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks)


def say(name, peer, call, work, unit, samples=20):
    """`work` is FLOPs or bytes of a call."""
    try:
        ms = timed(call, samples)
    except Exception as e:  # a back end that refuses the shape is a row, too
        print(f"{name:<34} {peer:<20} refused: {str(e).strip().splitlines()[0][:90]}", flush=True)
        return
    rate = work / ms / (1e9 if unit == "TFLOP/s" else 1e6)
    print(f"{name:<34} {peer:<20} {ms:>9.4f} ms {rate:>9.1f} {unit}", flush=True)
    rows.append({"name": name, "peer": peer, "ms": ms, "rate": rate, "unit": unit})


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def attention(name, h, hkv, t, d, dv, causal, samples=20):
    q, k, v = random(1, h, t, d), random(1, hkv, t, d), random(1, hkv, t, dv)
    work = 2 * h * t * t * (d + dv) / (2 if causal else 1)
    for peer, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]:
        with sdpa_kernel(backend):
            call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=hkv != h)
            say(name, peer, call, work, "TFLOP/s", samples)


def training(name, h, t, d, causal, samples=10):
    q, k, v = (random(1, h, t, d).requires_grad_() for _ in range(3))
    dout = random(1, h, t, d)
    work = 7 * 2 * h * t * t * d / (2 if causal else 1)

    def call():
        q.grad = k.grad = v.grad = None
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).backward(dout)

    for peer, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]:
        with sdpa_kernel(backend):
            say(name, peer, call, work, "TFLOP/s", samples)


def flex(name, t, mask, samples=20, block=128):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = random(1, 32, t, 128), random(1, 32, t, 128), random(1, 32, t, 128)
    blocks = create_block_mask(mask, None, None, t, t, device="cuda", BLOCK_SIZE=block, _compile=True)
    compiled = torch.compile(flex_attention)
    work = 4 * 32 * t * t * 128 * (100 - blocks.sparsity()) / 100
    say(name, "FlexAttention", lambda: compiled(q, k, v, block_mask=blocks), work, "TFLOP/s", samples)


def recurrences():
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla
    from fla.ops.retention import chunk_retention

    t, h, d = 32768, 32, 128
    q, k, v = random(1, t, h, d), random(1, t, h, d), random(1, t, h, d)
    g = -torch.rand(1, t, h, device="cuda") * 0.01
    work = 4 * t * h * d * 2
    say("recur linear 32k", "fla", lambda: chunk_linear_attn(q, k, v, normalize=False), work, "GB/s")
    say("recur scalar 32k", "fla", lambda: chunk_simple_gla(q, k, v, g), work, "GB/s")
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    beta = torch.rand(1, t, h, device="cuda", dtype=torch.bfloat16)
    unit = F.normalize(k, dim=-1)
    say("recur delta 32k", "fla", lambda: chunk_delta_rule(q, unit, v, beta), work, "GB/s")
    say("recur gated delta 32k", "fla", lambda: chunk_gated_delta_rule(q, unit, v, g, beta), work, "GB/s")
    say("recur scalar 32k", "fla retention", lambda: chunk_retention(q, k, v), work, "GB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours")
    parser.add_argument("--json")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    wants = lambda name: args.only in name
    torch.manual_seed(0)
    print(torch.__version__, torch.cuda.get_device_name(), "cuDNN", torch.backends.cudnn.version())

    if wants("ceiling"):
        a, b = random(1 << 30), random(1 << 30)
        say("ceiling copy", "PyTorch", lambda: b.copy_(a), 4 << 30, "GB/s")
        del a, b
        x, y = random(8192, 8192), random(8192, 8192)
        say("ceiling products", "PyTorch matmul", lambda: x @ y, 2 * 8192**3, "TFLOP/s")
    for name, h, hkv, t, d, dv, causal, samples in [
        ("dense 8k", 32, 32, 8192, 128, 128, False, 20),
        ("causal 8k", 32, 32, 8192, 128, 128, True, 20),
        ("causal 8k GQA 32/8", 32, 8, 8192, 128, 128, True, 20),
        ("dense 8k D 64", 32, 32, 8192, 64, 64, False, 20),
        ("dense 8k D 96", 32, 32, 8192, 96, 96, False, 20),
        ("dense 8k D 192/128", 32, 32, 8192, 192, 128, False, 20),
        ("dense 8k D 256", 16, 16, 8192, 256, 256, False, 20),
        ("dense 32k", 32, 32, 32768, 128, 128, False, 6),
        ("causal 32k", 32, 32, 32768, 128, 128, True, 6),
    ]:
        if wants(name):
            attention(name, h, hkv, t, d, dv, causal, samples)
    for name, d, causal in [("train 8k", 128, False), ("train causal 8k", 128, True), ("train 8k D 64", 64, False)]:
        if wants(name):
            training(name, 32, 8192, d, causal)
    if wants("window"):
        try:
            flex("window 1024 32k", 32768, lambda b, h, q, k: (q >= k) & (q - k < 1024))
        except Exception as e:
            print("FlexAttention:", str(e).splitlines()[0])
    if wants("decode"):
        t = 65536
        q, k, v = random(8, 32, 1, 128), random(8, 8, t, 128), random(8, 8, t, 128)
        work = 2 * 2 * 8 * 8 * t * 128
        for peer, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]:
            with sdpa_kernel(backend):
                call = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                say("decode 8 x 64k GQA 32/8", peer, call, work, "GB/s")
        del q, k, v
    if wants("recur"):
        try:
            recurrences()
        except Exception as e:
            print("fla:", str(e).splitlines()[0])
    if args.ours:
        with open(args.ours) as f:
            ours = json.load(f)["rows"]
        print("\nours against each peer (above 1: ours is faster)")
        for mine in ours:
            for peer in rows:
                if peer["name"] == mine["name"]:
                    ratio = peer["ms"] / mine["ms"]
                    print(f"{mine['name']:<34} {mine['how']:<40} {peer['peer']:<16} {ratio:6.2f}  {mine['note']}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
