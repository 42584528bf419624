"""Long convolution, 1,024 channels x 65,536 samples: Foveal against torch.fft, in turns.

    cargo build --release -p foveal-kernels --example peer
    python benches/peers/fft.py --json fft.json

What a model does with torch.fft (rfft, product, irfft of twice the length, and the skip), with the filter's spectrum made
in the call or kept from before, around a ring of the length itself, and the backward pass alone for the gradients
of input, filter and skip. Both sides f32, warmed up, in turns. Needs the packages of requirements.txt.
"""

import argparse
import time

import torch

import common
import render
from common import Partner, say

CHANNELS, TIME = 1024, 65536


def forms():
    """Name, the request of our side, and a function that makes the call of the other."""
    n = 2 * TIME
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(1, CHANNELS, TIME, generator=generator)
    h = torch.randn(CHANNELS, TIME, generator=generator) / TIME**0.5
    d = torch.randn(CHANNELS, 1, generator=generator)
    fft = torch.fft

    def causal(u, h, d):
        return fft.irfft(fft.rfft(u, n=n) * fft.rfft(h, n=n), n=n)[..., :TIME] + u * d

    def timed(call):
        def run():
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        return run

    def kept():
        spectrum = fft.rfft(h, n=n)
        return timed(lambda: fft.irfft(fft.rfft(u, n=n) * spectrum, n=n)[..., :TIME] + u * d)

    def backward():
        leaves = [x.clone().requires_grad_(True) for x in (u, h, d)]

        def run():
            with torch.enable_grad():
                y = causal(*leaves)
            begin = time.perf_counter()
            torch.autograd.grad(y, leaves, u)
            return time.perf_counter() - begin

        return run

    return [
        ("causal", "causal", lambda: timed(lambda: causal(u, h, d))),
        ("causal, spectra kept", "ready", kept),
        ("circular", "circular", lambda: timed(lambda: fft.irfft(fft.rfft(u) * fft.rfft(h), n=TIME) + u * d)),
        ("causal, backward", "backward", backward),
    ]


def measure(own, repeats, turns, rows, save):
    for name, form, make in forms():
        request = f"long_conv {CHANNELS} {TIME} {form}"
        with turns.unit():
            theirs = make()
            theirs()
            own.ask(request)
        ours_ms, theirs_ms = common.rounds(own, request, theirs, turns, repeats)
        row = {"what": name, "channels": CHANNELS, "samples": TIME, "unit": "ms"}
        row |= common.versus(ours_ms, theirs_ms, higher_is_better=False)
        rows.append(row)
        say(f"{name}: ours {common.spread(row['ours'])} ms, theirs {common.spread(row['theirs'])} ms, ratio {row['ratio']:.2f}")
        save()


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), repeats=9)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    turns = common.Turns(a.lock, a.hold)
    own = Partner([a.bin / "examples" / "peer"], {"RAYON_NUM_THREADS": str(a.threads)})
    result = {
        "machine": common.machine(a.threads),
        "ours": own.about,
        "theirs": {"version": torch.__version__.split("+")[0]},
        "rows": [],
    }
    measure(own, a.repeats, turns, result["rows"], lambda: common.save(a.json, result))
    turns.release()
    own.close()
    print(render.fft(result))


if __name__ == "__main__":
    main()
