"""Golden masks and outputs of the sparse prefill systems.

Each function states one paper's method directly on dense (Tq, Tk) matrices in float64; nothing is
shared with the Rust code. Run from the repository root; writes goldens/sparse.safetensors with
<i>.q, <i>.k, <i>.v (float32) and, per case, the mask (bits packed along the keys) and the last output rows.
A case is kept only if its decisions have a margin, so that float32 rounding cannot change the mask.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file

MARGIN = 1e-5


def causal(tq, tk):
    return np.arange(tk)[None, :] <= np.arange(tq)[:, None] + tk - tq


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def apart(*values):
    """Refuse decisions that float32 could turn: distances between kept and dropped scores."""
    for v in values:
        assert v > MARGIN, f"margin {v}: choose another seed"


def top(x, n):
    order = np.argsort(-x, kind="stable")
    if 0 < n < len(x) and np.isfinite(x[order[n - 1]]):
        apart(x[order[n - 1]] - x[order[n]])
    return order[:n]


def minference_vertical_slash(q, k, scale, vertical, slash, last_q, sinks, recent, block):
    tq, tk = len(q), len(k)
    off = tk - tq
    m = min(last_q, tq)
    s = scale * q[-m:] @ k.T
    s[~causal(m, tk)] = -np.inf
    p = softmax(s)
    col = p.sum(0)
    diag = np.zeros(tk)
    for i in range(m):
        for j in range(tk - m + i + 1):
            diag[tk - m + i - j] += p[i, j]
    col[:sinks] = np.inf
    diag[:recent] = np.inf
    cols, diags = top(col, max(vertical, sinks)), top(diag, max(slash, recent))
    mask = np.zeros((tq, tk), bool)
    mask[:, cols] = True
    for r0 in range(0, tq, block):
        rows = range(r0, min(r0 + block, tq))
        for d in diags:
            for i in rows:
                j = off + i - d
                if j >= 0:
                    b = j // block * block
                    mask[rows.start : rows.stop, b : b + block] = True
    return mask & causal(tq, tk)


def minference_a_shape(q, k, init, local, block):
    tq, tk = len(q), len(k)
    off = tk - tq
    mask = np.zeros((tq, tk), bool)
    for r0 in range(0, tq, block):
        r1 = min(r0 + block, tq)
        mask[r0:r1, : math.ceil(init / block) * block] = True
        mask[r0:r1, max(off + r0 + 1 - local, 0) // block * block :] = True
    return mask & causal(tq, tk)


def minference_block_sparse(q, k, n, block):
    tq, tk = len(q), len(k)
    off = tk - tq
    kb = np.stack([k[j : j + block].mean(0) for j in range(0, tk, block)])
    mask = np.zeros((tq, tk), bool)
    for r0 in range(0, tq, block):
        r1 = min(r0 + block, tq)
        s = kb @ q[r0:r1].mean(0)
        own, end = (off + r0) // block, (off + r1 - 1) // block + 1
        s[own:end] = np.inf
        for b in top(s[:end], max(n, end - own)):
            mask[r0:r1, b * block : (b + 1) * block] = True
    return mask & causal(tq, tk)


def xattention(q, k, scale, stride, block, threshold):
    tq, tk = len(q), len(k)
    off = tk - tq
    pad = lambda x: np.concatenate([x, np.zeros((-len(x) % stride, x.shape[1]))])
    qp, kp = pad(q), pad(k)
    nq, nk = len(qp) // stride, len(kp) // stride
    full = qp @ kp.T
    a = np.full((nq, nk), -np.inf)
    for i in range(nq):
        for j in range(nk):
            if j <= (off + i * stride) // stride:
                a[i, j] = sum(full[i * stride + stride - 1 - t, j * stride + t] for t in range(stride))
    p = softmax(a * scale / stride)
    mask = np.zeros((tq, tk), bool)
    g = block // stride
    for r0 in range(0, tq, block):
        r1 = min(r0 + block, tq)
        rows = p[r0 // stride : math.ceil(r1 / stride)]
        w = np.array([rows[:, j : j + g].sum() for j in range(0, nk, g)])
        own, end = (off + r0) // block, (off + r1 - 1) // block + 1
        w = w[:end]
        keep = {0, *range(own, end)}
        others = [b for b in np.argsort(-w, kind="stable") if b not in keep]
        for a_, b_ in zip(others, others[1:]):
            apart(w[a_] - w[b_])
        need = threshold * w.sum()
        for b in others:
            held = sum(w[x] for x in keep)
            apart(abs(held - need))
            if held >= need:
                break
            keep.add(b)
        for b in keep:
            mask[r0:r1, b * block : (b + 1) * block] = True
    return mask & causal(tq, tk)


def hip(q, k, scale, n_keys, bq, stride_q, bk, window, sinks):
    tq, tk = len(q), len(k)
    off = tk - tq
    mask = np.zeros((tq, tk), bool)
    for r0 in range(0, tq, bq):
        r1 = min(r0 + bq, tq)
        near = max(off + r0 + 1 - window, 0)
        far = min(sinks, near)
        mask[r0:r1, :far] = True
        mask[r0:r1, near:] = True
        if near - far <= n_keys:
            mask[r0:r1, far:near] = True
            continue
        qs = q[r0:r1][::-1][::stride_q]
        n = n_keys // bk
        leaves = [list(range(j, min(j + bk, near))) for j in range(far, near, bk)]
        edges = [len(leaves) * i // n for i in range(n + 1)]
        nodes = [leaves[a:b] for a, b in zip(edges, edges[1:])]
        while any(len(x) > 1 for x in nodes):
            halves = [h for x in nodes for h in (x[: len(x) // 2], x[len(x) // 2 :]) if h]
            s = np.array([(scale * qs @ k[h[len(h) // 2]].T).max() for h in halves])
            nodes = [halves[i] for i in sorted(top(s, n))]
        for (leaf,) in nodes:
            mask[r0:r1, leaf] = True
    return mask & causal(tq, tk)


def moba(q, k, block, topk):
    tq, tk = len(q), len(k)
    off = tk - tq
    mask = np.zeros((tq, tk), bool)
    for i in range(tq):
        own = (off + i) // block
        mask[i, own * block :] = True
        if own == 0:
            continue
        gate = np.array([q[i] @ k[b * block : (b + 1) * block].mean(0) for b in range(own)])
        for b in top(gate, min(topk - 1, own)) if topk > 1 else []:
            mask[i, b * block : (b + 1) * block] = True
    return mask & causal(tq, tk)


def anchor(q, k, scale, block, step, theta, init_blocks):
    tq, tk = len(q), len(k)
    off = tk - tq
    s = scale * q @ k.T
    s[~causal(tq, tk)] = -np.inf
    mask = np.zeros((tq, tk), bool)
    for g0 in range(0, tq, block * step):
        g1 = min(g0 + block * step, tq)
        local = (off + g0) // block * block
        init = min(init_blocks * block, local)
        mask[g0:g1, :init] = True
        mask[g0:g1, local:] = True
        seen = np.r_[0:init, local:tk]
        for r0 in range(g0, g1, block):
            r1 = min(r0 + block, g1)
            x = s[r0:r1][:, seen].max(1).mean()
            for j in range(init, local):
                gap = theta - (x - scale * q[r0:r1].mean(0) @ k[j])
                apart(abs(gap))
                if gap >= 0:
                    mask[g0:g1, j] = True
    return mask & causal(tq, tk)


def problem(rng, tq, tk, d):
    """Queries and keys with sinks, a slowly drifting topic, and a few keys all queries like."""
    q, k, v = (rng.standard_normal((n, d)) for n in (tq, tk, tk))
    sink = rng.standard_normal(d)
    topic = np.repeat(rng.standard_normal((tk // 24 + 1, d)), 24, 0)[:tk]
    k += 1.2 * topic
    q += 0.5 * sink + 1.2 * topic[np.maximum(np.arange(tk - tq, tk) - 90, 0)]
    k[:4] += 2.0 * sink
    k[rng.choice(tk, 6, replace=False)] += 1.5 * sink
    return tuple(x.astype(np.float32) for x in (q, k, v))


def s2(q, k, block, local, stride, sinks):
    """Head 0: Kronecker product of the pattern of position blocks with full blocks, last rows, causal."""
    tq, tk = len(q), len(k)
    n = -(-tk // block)
    a, b = np.arange(n)[:, None], np.arange(n)[None, :]
    pattern = (a >= b) & ((a - b < local) | ((b + 1) % stride == 0) | (b < sinks))
    return np.kron(pattern, np.ones((block, block), bool))[:tk, :tk][-tq:] & causal(tq, tk)


CASES = {
    "minference": [
        (dict(vertical_size=24, slash_size=30, max_share=1.0, last_q=32, sinks=4, recent=8, block_size=16),
         minference_vertical_slash,
         lambda c: dict(vertical=c["vertical_size"], slash=c["slash_size"], last_q=c["last_q"], sinks=c["sinks"],
                        recent=c["recent"], block=c["block_size"])),
        (dict(pattern="a-shape", init=20, local=50, block_size=16), minference_a_shape,
         lambda c: dict(init=c["init"], local=c["local"], block=c["block_size"])),
        (dict(pattern="block-sparse", blocks=4, max_share=1.0, block_size=16), minference_block_sparse,
         lambda c: dict(n=c["blocks"], block=c["block_size"])),
    ],
    "xattention": [
        (dict(block_size=32, stride=8, threshold=0.8), xattention,
         lambda c: dict(stride=c["stride"], block=c["block_size"], threshold=c["threshold"])),
        (dict(block_size=16, stride=4, threshold=0.6), xattention,
         lambda c: dict(stride=c["stride"], block=c["block_size"], threshold=c["threshold"])),
    ],
    "hip-attention": [
        (dict(k=32, block_size_q=16, block_stride_q=2, block_size_k=2, window=24, sinks=4), hip,
         lambda c: dict(n_keys=c["k"], bq=c["block_size_q"], stride_q=c["block_stride_q"], bk=c["block_size_k"],
                        window=c["window"], sinks=c["sinks"])),
        (dict(k=24, block_size_q=32, block_stride_q=3, block_size_k=4, window=10, sinks=3), hip,
         lambda c: dict(n_keys=c["k"], bq=c["block_size_q"], stride_q=c["block_stride_q"], bk=c["block_size_k"],
                        window=c["window"], sinks=c["sinks"])),
        (dict(k=4, block_size_q=32, block_stride_q=2, block_size_k=2, window=10, sinks=3), hip,
         lambda c: dict(n_keys=c["k"], bq=c["block_size_q"], stride_q=c["block_stride_q"], bk=c["block_size_k"],
                        window=c["window"], sinks=c["sinks"])),
    ],
    "moba": [
        (dict(block_size=32, topk=3), moba, lambda c: dict(block=c["block_size"], topk=c["topk"])),
        (dict(block_size=24, topk=4, block_q=64), moba, lambda c: dict(block=c["block_size"], topk=c["topk"])),
        (dict(block_size=24, topk=1, block_q=7), moba, lambda c: dict(block=c["block_size"], topk=c["topk"])),
    ],
    "anchorattention": [
        (dict(block_size=16, step=4, theta=2.5, init_blocks=1), anchor,
         lambda c: dict(block=c["block_size"], step=c["step"], theta=c["theta"], init_blocks=c["init_blocks"])),
        (dict(block_size=24, step=2, theta=3.25, init_blocks=2), anchor,
         lambda c: dict(block=c["block_size"], step=c["step"], theta=c["theta"], init_blocks=c["init_blocks"])),
    ],
    "s2-attention": [
        (dict(block_size=16, local_blocks=3, vert_stride=4), s2,
         lambda c: dict(block=c["block_size"], local=c["local_blocks"], stride=c["vert_stride"], sinks=0)),
        (dict(block_size=20, local_blocks=1, vert_stride=5, sink_blocks=1), s2,
         lambda c: dict(block=c["block_size"], local=c["local_blocks"], stride=c["vert_stride"], sinks=c["sink_blocks"])),
    ],
}


def make(seed, tq, tk, d):
    """Tensors of one problem under every case, or None where a decision is too close to call."""
    rng = np.random.default_rng(seed)
    q32, k32, v32 = problem(rng, tq, tk, d)
    q, k, v = (x.astype(np.float64) for x in (q32, k32, v32))
    scale = 1 / math.sqrt(d)
    out, about = {"q": q32, "k": k32, "v": v32}, []
    for system, cases in CASES.items():
        for config, f, args in cases:
            kw = args(config)
            if "scale" in f.__code__.co_varnames:
                kw["scale"] = scale
            name = f"{system}.{sum(a['system'] == system for a in about)}"
            try:
                mask = f(q, k, **kw)
            except AssertionError as e:
                print(f"seed {seed} {name}: {e}")
                return None
            s = scale * q @ k.T
            s[~mask] = -np.inf
            out[f"{name}.mask"] = np.packbits(mask, axis=1)
            out[f"{name}.out"] = (softmax(s[-8:]) @ v).astype(np.float32)
            about.append(dict(system=system, name=name, params=config))
            print(f"seed {seed} {name}: density {mask.sum() / causal(tq, tk).sum():.3f}")
    return out, about


def main():
    tensors, meta = {}, []
    # Whole prompt of a length that no block divides; a later chunk; one query.
    for i, (seed, tq, tk, d) in enumerate([(1, 300, 300, 16), (1001, 75, 251, 12), (2001, 1, 130, 8)]):
        while (made := make(seed, tq, tk, d)) is None:
            seed += 1
        out, about = made
        for name, x in out.items():
            tensors[f"{i}.{name}"] = x
        meta += [dict(problem=i, tq=tq, tk=tk, d=d, **a) for a in about]
    save_file(tensors, "goldens/sparse.safetensors", {"cases": json.dumps(meta)})


if __name__ == "__main__":
    main()
