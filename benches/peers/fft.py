"""Long convolution, 1,024 channels x 65,536 samples: Foveal against torch.fft, in turns.

    cargo build --release -p foveal-kernels --example conv_bench
    python benches/peers/fft.py [--case NAME] [--rounds 9] [--json FILE]

Each round times one call of either side, both warmed up, on two threads; the ratio is that of the round's two times,
and the table gives the median of the rounds. Needs PyTorch on the CPU. The Rust side is the example binary.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch

CHANNELS, TIME = 1024, 65536


def cases():
    """What a model does with torch.fft, with the same numbers of channels and samples as `conv_bench`."""
    n = 2 * TIME
    u = torch.randn(1, CHANNELS, TIME)
    h = torch.randn(CHANNELS, TIME) / TIME**0.5
    d = torch.randn(CHANNELS, 1)
    fft = torch.fft

    def forward(spectrum):
        return fft.irfft(fft.rfft(u, n=n) * spectrum, n=n)[..., :TIME] + u * d

    def circular():
        return fft.irfft(fft.rfft(u) * fft.rfft(h), n=TIME) + u * d

    def ready():
        kept = fft.rfft(h, n=n)
        return lambda: forward(kept)

    def backward():
        leaves = [x.clone().requires_grad_(True) for x in (u, h, d)]
        lu, lh, ld = leaves

        def run():
            for x in leaves:
                x.grad = None
            y = fft.irfft(fft.rfft(lu, n=n) * fft.rfft(lh, n=n), n=n)[..., :TIME] + lu * ld
            start = time.perf_counter()
            y.backward(u)
            return time.perf_counter() - start

        return run

    return {
        "long": lambda: lambda: forward(fft.rfft(h, n=n)),
        "long-ready": ready,
        "long-circular": lambda: circular,
        "long-backward": backward,
    }


def seconds(call):
    start = time.perf_counter()
    inner = call()
    return inner if isinstance(inner, float) else time.perf_counter() - start


def ours(binary, name):
    out = subprocess.run([binary, name, "1"], capture_output=True, text=True, check=True).stdout
    line = next(json.loads(x) for x in out.splitlines() if json.loads(x)["case"] == name)
    return line["seconds"][0]


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--binary", default="target/release/examples/conv_bench")
    args.add_argument("--case", choices=["long", "long-ready", "long-circular", "long-backward"])
    args.add_argument("--rounds", type=int, default=9)
    args.add_argument("--json")
    args = args.parse_args()
    torch.set_num_threads(2)
    rows = []
    for name, make in cases().items():
        if args.case not in (None, name):
            continue
        call, full = make(), f"{name}-{CHANNELS}x{TIME}"
        seconds(call)
        rounds = [(seconds(call), ours(args.binary, full)) for _ in range(args.rounds)]
        row = {
            "case": full,
            "torch": statistics.median(t for t, _ in rounds),
            "foveal": statistics.median(f for _, f in rounds),
            "ratio": statistics.median(t / f for t, f in rounds),
            "rounds": rounds,
        }
        rows.append(row)
        print(f"{full:28} torch {row['torch']:.3f} s  foveal {row['foveal']:.3f} s  {row['ratio']:.2f} times as fast")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"torch": torch.__version__, "threads": 2, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
