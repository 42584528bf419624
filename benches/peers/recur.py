"""Linear recurrences side by side with the same mathematics in PyTorch, in turns with a matrix product.

    cargo build --release -p foveal-kernels --example peer
    python benches/peers/recur.py --json recur.json

The PyTorch side is the textbook chunked form (chunks of 64, products in bf16, sums and states in f32), all chunks
of a step in one batched product. Each row warms both sides up, then goes in turns for --repeats rounds of one
call each, with the bf16 product of 2048 x 2048 matrices by both libraries in every round: the faster one is the
ceiling that our rate is held against. FLOPs are those that our kernel counts. With `forward and backward` a call
is the forward pass and the gradients of all inputs, theirs through autograd. Needs the packages of
requirements.txt.
"""

import argparse
import time

import torch

import common
import render
from common import Partner, say

CHUNK = 64
SIZE = 2048
SHAPE = (1, 8, 8192, 64)
GATES = ["identity", "scalar", "ssd", "delta", "gated_delta"]


def narrow(x):
    return x.to(torch.bfloat16)


def chunked(q, k, v, g, beta, delta, scale):
    """(B, H, T, D) bf16; g and beta (B, H, T) f32 or None. Output f32."""
    b, h, t, d = q.shape
    n = t // CHUNK
    q, k, v = (x.reshape(b, h, n, CHUNK, -1) for x in (q, k, v))
    g = torch.zeros(b, h, n, CHUNK) if g is None else g.reshape(b, h, n, CHUNK).cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    between = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    total = g[..., -1].exp()[..., None, None]
    scores = narrow((q @ k.transpose(-1, -2)).float() * between * scale)
    from_start = narrow(q.float() * (g.exp() * scale)[..., None])
    to_end = narrow(k.float() * (g[..., -1:] - g).exp()[..., None]).transpose(-1, -2)
    state = torch.zeros(b, h, d, v.shape[-1])
    if delta:
        # The system (I + beta k k^T) u = beta (v - what k reads), solved for v and for the readers at once.
        beta = beta.reshape(b, h, n, CHUNK, 1)
        system = (k @ k.transpose(-1, -2)).float() * between.tril(-1) * beta
        sides = torch.cat([v.float() * beta, k.float() * g.exp()[..., None] * beta], -1)
        system = system + torch.eye(CHUNK)
        u, w = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split([v.shape[-1], d], -1)
        w, out = narrow(w), []
        for i in range(n):
            s = narrow(state)
            written = narrow(u[:, :, i] - (w[:, :, i] @ s).float())
            out.append((from_start[:, :, i] @ s).float() + (scores[:, :, i] @ written).float())
            state = state * total[:, :, i] + (to_end[:, :, i] @ written).float()
        return torch.stack(out, 2).reshape(b, h, t, -1)
    if beta is not None:
        v = narrow(v.float() * beta.reshape(b, h, n, CHUNK, 1))
    added = (to_end @ v).float()
    states = []
    for i in range(n):
        states.append(state)
        state = state * total[:, :, i] + added[:, :, i]
    out = (scores @ v).float() + (from_start @ narrow(torch.stack(states, 2))).float()
    return out.reshape(b, h, t, -1)


def definition(q, k, v, g, beta, delta, scale):
    """Token by token in f64, which the chunked form is checked against."""
    q, k, v = (x.double() for x in (q, k, v))
    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float64)
    out = []
    for t in range(q.shape[2]):
        qt, kt, vt = (x[:, :, t, :, None] for x in (q, k, v))
        if g is not None:
            state = state * g[:, :, t, None, None].double().exp()
        write = vt.transpose(-1, -2)
        if delta:
            write = write - kt.transpose(-1, -2) @ state
        if beta is not None:
            write = write * beta[:, :, t, None, None].double()
        state = state + kt @ write
        out.append((qt.transpose(-1, -2) @ state)[:, :, 0] * scale)
    return torch.stack(out, 2)


def operands(gate, shape, grad):
    generator = torch.Generator().manual_seed(1)
    b, h, t, d = shape
    draw = lambda *s: torch.randn(s, generator=generator)
    q, k, v, dout = draw(*shape), draw(*shape) / d**0.5, draw(*shape), draw(*shape)
    g = -0.2 * torch.rand((b, h, t), generator=generator)
    beta = torch.rand((b, h, t), generator=generator)
    if gate == "ssd":
        g = -0.5 * beta
    q, k, v = (narrow(x).requires_grad_(grad) for x in (q, k, v))
    g = g.requires_grad_(grad) if gate in ("scalar", "ssd", "gated_delta") else None
    beta = beta.requires_grad_(grad) if gate in ("ssd", "delta", "gated_delta") else None
    return (q, k, v, g, beta, "delta" in gate, d**-0.5), dout


def check(gate):
    """A peer that computes something else would be no peer."""
    args, _ = operands(gate, (1, 2, 2 * CHUNK, 64), False)
    want = definition(*args)
    worst = ((chunked(*args) - want).abs().max() / want.abs().max()).item()
    assert worst < 0.02, f"{gate}: the chunked form is off by {worst}"


def peer(gate, grad):
    args, dout = operands(gate, SHAPE, grad)
    inputs = [x for x in args[:5] if x is not None]

    def call():
        begin = time.perf_counter()
        with torch.set_grad_enabled(grad):
            out = chunked(*args)
        if grad:
            torch.autograd.grad(out, inputs, dout)
        return time.perf_counter() - begin

    return call


def measure(own, product, repeats, turns, gates, rows, save):
    """Appends to `rows` and calls `save` after each, so that an interrupted run keeps what it has."""
    a, b = (torch.randn(SIZE, SIZE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    request = f"linear {SIZE} {SIZE} {SIZE} bf16"

    def products():
        begin = time.perf_counter()
        with torch.no_grad():
            torch.matmul(a, b, out=out)
        return max(2 * SIZE**3 / s / 1e9 for s in (time.perf_counter() - begin, product.ask(request)["seconds"]))

    for gate in gates:
        check(gate)
        for grad in (False, True):
            mine = f"{'recur_grad' if grad else 'recur'} {' '.join(map(str, SHAPE))} bf16 {gate}"
            with turns.unit():
                theirs = peer(gate, grad)
                theirs()
                flops = own.ask(mine)["flops"]
                products()
            ceiling = []
            ours_ms, theirs_ms = common.rounds(own, mine, theirs, turns, repeats, lambda: ceiling.append(products()))
            what = f"{gate}{', forward and backward' if grad else ''}"
            row = {"what": what, "gate": gate, "dtype": "bf16", "unit": "ms", "flops": flops, "product": common.summary(ceiling)}
            row |= common.versus(ours_ms, theirs_ms, higher_is_better=False)
            rows.append(row)
            say(f"{what}: ours {common.spread(row['ours'])} ms, theirs {common.spread(row['theirs'])} ms, ratio {row['ratio']:.2f}")
            save()


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), repeats=9)
    parser.add_argument("--gates", type=lambda s: s.split(","), default=GATES)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    turns = common.Turns(a.lock, a.hold)
    threads = {"RAYON_NUM_THREADS": str(a.threads)}
    own, product = (Partner([a.bin / "examples" / "peer"], threads) for _ in range(2))
    result = {
        "machine": common.machine(a.threads),
        "ours": own.about,
        "theirs": {"version": torch.__version__.split("+")[0], "capability": torch.backends.cpu.get_cpu_capability()},
        "shape": SHAPE,
        "rows": [],
    }
    measure(own, product, a.repeats, turns, a.gates, result["rows"], lambda: common.save(a.json, result))
    turns.release()
    for child in (own, product):
        child.close()
    print(render.recur(result))


if __name__ == "__main__":
    main()
