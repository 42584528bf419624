"""What the machine can do: matrix products, reading memory, exponentials.

    cargo build --release -p foveal-kernels --example peer
    python benches/peers/ceilings.py --json ceilings.json

Matrix products are PyTorch's of 4096 x 4096 matrices. Memory is read by summing 1 GiB, here and by PyTorch. The
exponential runs on one thread over numbers that stay in cache, both sides from one buffer into another that is
there already. Needs the packages of requirements.txt.
"""

import argparse
import time

import torch

import common
import render
from common import Partner, say

MIB = 1024
EXP = 16384
CALLS = 200


def timed(call, calls=1):
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def products(threads, repeats, turns):
    rows = []
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for n in sorted({1, threads}):
            torch.set_num_threads(n)
            a, b = (torch.randn(4096, 4096).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            with turns.unit():
                torch.matmul(a, b, out=out)
            rates = []
            for _ in range(repeats):
                with turns.unit():
                    rates.append(2 * 4096**3 / timed(lambda: torch.matmul(a, b, out=out)) / 1e9)
            rows.append({"what": f"{name} product", "threads": n, "unit": "GFLOP/s", "rate": common.summary(rates)})
            say(f"{name} product, {n} threads: {common.spread(rows[-1]['rate'])} GFLOP/s")
    return rows


def memory(own, threads, repeats, turns):
    rows = []
    data = torch.ones(MIB << 18)
    for n in sorted({1, threads}):
        torch.set_num_threads(n)
        request = f"read {MIB} {n}"
        with turns.unit():
            own.ask(request)
            data.sum()
        ours, theirs = [], []
        for _ in range(repeats):
            with turns.unit():
                ours.append((MIB << 20) / own.ask(request)["seconds"] / 1e9)
                theirs.append((MIB << 20) / timed(data.sum) / 1e9)
        for what, rates in (("memory read", ours), ("memory read by torch.sum", theirs)):
            rows.append({"what": what, "threads": n, "unit": "GB/s", "rate": common.summary(rates)})
            say(f"{what}, {n} threads: {common.spread(rows[-1]['rate'])} GB/s")
    return rows


def exponential(own, repeats, turns):
    torch.set_num_threads(1)
    x = torch.rand(EXP) * 17 - 18.5
    y = torch.empty_like(x)
    request = f"exp {EXP} {CALLS}"
    call = lambda: torch.exp(x, out=y)
    with turns.unit():
        own.ask(request)
        timed(call, CALLS)
    ours, theirs = [], []
    for _ in range(repeats):
        with turns.unit():
            ours.append(EXP / own.ask(request)["seconds"] / 1e9)
            theirs.append(EXP / timed(call, CALLS) / 1e9)
    row = {"what": f"exp of {EXP} f32 in cache", "unit": "10⁹/s", "threads": 1}
    row |= common.versus(ours, theirs, higher_is_better=True)
    say(f"exp: ours {common.spread(row['ours'])}, torch {common.spread(row['theirs'])}, ratio {row['ratio']:.2f}")
    return row


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), repeats=9)
    a = parser.parse_args()
    torch.set_grad_enabled(False)
    turns = common.Turns(a.lock, a.hold)
    own = Partner([a.bin / "examples" / "peer"], {"RAYON_NUM_THREADS": str(a.threads)})
    rows = products(a.threads, a.repeats, turns) + memory(own, a.threads, a.repeats, turns)
    result = {
        "machine": common.machine(a.threads),
        "ours": own.about,
        "theirs": {"version": torch.__version__.split("+")[0]},
        "rows": rows,
        "exp": exponential(own, a.repeats, turns),
    }
    turns.release()
    own.close()
    print(render.ceilings(result))
    common.save(a.json, result)


if __name__ == "__main__":
    main()
