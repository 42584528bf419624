"""Golden masks and outputs of the training-free sparse systems for causal language models.

As make_sparse_goldens.py, whose problems and helpers are used: each function states one paper's method on dense
matrices in float64, and a case is kept only if its decisions have a margin. Run from the repository root; writes
goldens/sparse_lm.safetensors.
"""

import json
import math

import numpy as np
from make_sparse_goldens import apart, causal, problem, softmax, top
from safetensors.numpy import save_file


def dhsa(q, k, topk, block, local, first, dense_last, least, most, window):
    tq, tk = len(q), len(k)
    off = tk - tq
    # Boundaries: where the mean directions on both sides differ most.
    cos = np.ones(tk)
    for t in range(1, tk):
        a, b = k[max(t - window, 0) : t].sum(0), k[t : t + window].sum(0)
        cos[t] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    edges = [0]
    while tk - edges[-1] > most:
        b = edges[-1]
        places = np.arange(b + least, b + most + 1)
        order = places[np.argsort(cos[places], kind="stable")]
        if len(order) > 1:
            apart(cos[order[1]] - cos[order[0]])
        edges.append(int(order[0]))
    edges.append(tk)
    chunk = np.concatenate([np.full(b - a, c) for c, (a, b) in enumerate(zip(edges, edges[1:]))])
    kc = np.stack([k[a:b].mean(0) * math.sqrt(b - a) for a, b in zip(edges, edges[1:])])
    mask = np.zeros((tq, tk), bool)
    for r0 in range(0, tq, block):
        r1 = min(r0 + block, tq)
        end = off + r1
        near = max(end - local, 0)
        far = min(first, near)
        budget = max(topk - local, 0)
        if near - far <= budget or r1 > tq - dense_last:
            mask[r0:r1, :end] = True
            continue
        s = kc @ (q[r0:r1].mean(0) * math.sqrt(r1 - r0))
        # Token scores: those of their chunk; equal ones in order of position.
        tokens = np.arange(far, near)
        present = np.unique(chunk[tokens])
        gaps = np.sort(s[present])
        if len(gaps) > 1:
            apart(np.diff(gaps).min())
        best = tokens[np.argsort(-s[chunk[tokens]], kind="stable")[:budget]]
        mask[r0:r1, best] = True
        mask[r0:r1, :far] = True
        mask[r0:r1, near:end] = True
    return mask & causal(tq, tk)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def routing(q, k, clusters, iterations, local, sinks, block):
    tq, tk = len(q), len(k)
    off = tk - tq
    keys, queries = unit(k - k.mean(0)), unit(q)
    means = keys[[(2 * c + 1) * tk // (2 * clusters) for c in range(clusters)]]
    for _ in range(iterations):
        s = keys @ means.T
        ranked = np.sort(s, 1)
        apart((ranked[:, -1] - ranked[:, -2]).min())
        nearest = s.argmax(1)
        for c in range(clusters):
            if (nearest == c).any():
                means[c] = unit(keys[nearest == c].sum(0)[None])[0]
    mask = np.zeros((tq, tk), bool)
    for c in range(clusters):
        in_q = top(queries @ means[c], math.ceil(tq / clusters))
        in_k = top(keys @ means[c], math.ceil(tk / clusters))
        mask[np.ix_(in_q, in_k)] = True
    for i in range(tq):
        r0 = i // block * block
        mask[i, max(off + r0 + 1 - local, 0) : off + min(r0 + block, tq)] = True
    mask[:, :sinks] = True
    return mask & causal(tq, tk)


def four_bits(x):
    unit_of = np.abs(x).max() / 7
    y = x / unit_of
    apart(np.abs(np.abs(y - np.floor(y)) - 0.5).min())
    return np.rint(y), unit_of


def sale(q, k, scale, threshold, block_q, block_k, sinks, local):
    tq, tk = len(q), len(k)
    off = tk - tq
    centred = k - k.mean(0)
    low = np.concatenate([np.multiply(*four_bits(centred[j : j + block_k])) for j in range(0, tk, block_k)])
    sees = causal(tq, tk)
    mask = np.zeros((tq, tk), bool)
    for r0 in range(0, tq, block_q):
        r1 = min(r0 + block_q, tq)
        near = max(off + r0 + 1 - local, 0) // block_k * block_k
        far = min(math.ceil(sinks / block_k) * block_k, near)
        region = np.r_[0:far, near : off + r1]
        mask[r0:r1, region] = True
        if far >= near:
            continue
        mean = q[r0:r1].mean(0)
        low_q = np.multiply(*four_bits(q[r0:r1] - mean))
        s = scale * (low_q @ low.T + mean @ k.T)
        held = np.where(sees[r0:r1][:, region], np.exp(s[:, region]), 0).sum(1, keepdims=True)
        r = np.exp(s) / held
        for j in range(far, near, block_k):
            m = r[:, j : j + block_k].max()
            apart(abs(m / threshold - 1))
            if m >= threshold:
                mask[r0:r1, j : j + block_k] = True
    return mask & sees


def superlinear(q, k, spans, backward, forward, window_index, sinks, block_k):
    tq, tk = len(q), len(k)
    off = tk - tq
    mask = np.zeros((tq, tk), bool)
    for i in range(tq):
        p = off + i
        chosen = [(p + 2 - (window_index + 1) ** 2, p)]
        anchors = [p + 1 - n * n for n in range(window_index + 1, math.isqrt(p + 1) + 1)]
        if anchors:
            root = math.sqrt(p + 1)
            for x in top(k[anchors] @ q[i], min(spans, len(anchors))):
                chosen.append((anchors[x] - math.ceil(backward * root), anchors[x] + math.ceil(forward * root)))
        for a, b in chosen + [(0, sinks - 1)] * (sinks > 0):
            a, b = max(a, 0) // block_k, min(b, p) // block_k
            mask[i, a * block_k : (b + 1) * block_k] = True
    return mask & causal(tq, tk)


def first_of(x, n):
    """As top, where nothing is left to weigh the first ones."""
    order = np.argsort(-x, kind="stable")
    return order[:n] if n < len(x) and x[order[n - 1]] == x[order[n]] == 0 else top(x, n)


def last_rows(q, k, scale, end, off, n):
    """Softmax rows of the n queries before position `end`, over the keys before it."""
    s = scale * q[end - n - off : end - off] @ k[:end].T
    s[~causal(n, end)] = -np.inf
    return softmax(s)


def mm_grid(q, k, scale, grid, stride, local, last_q, block):
    tq, tk = len(q), len(k)
    off = tk - tq
    first, t, h, w = grid
    after = first + t * h * w
    end = min(after, tk)
    n = min(last_q, end - max(off, first))
    s = scale * q[end - n - off : end - off] @ k[first:end].T
    s[~causal(n, end - first)] = -np.inf
    held = np.array([softmax(s)[:, x::stride].sum() for x in range(stride)])
    phase = top(held, 1)[0]
    mask = np.zeros((tq, tk), bool)
    for r0 in range(0, tq, block):
        a, b = off + r0, off + min(r0 + block, tq)
        rows = slice(r0, b - off)
        if a < first or b > after:
            mask[rows] = True
            continue
        mask[rows, : math.ceil(first / block) * block] = True
        mask[rows, max(a + 1 - local, 0) // block * block :] = True
        mask[rows, first + phase : after : stride] = True
    return mask & causal(tq, tk)


def mm_boundary(q, k, scale, grid, two_d, vertical, slash, last_q, sinks, recent, block):
    tq, tk = len(q), len(k)
    off = tk - tq
    first, t, h, w = grid
    after = first + t * h * w
    spans = [(0, first), (first, after), (after, tk)]
    mask = np.zeros((tq, tk), bool)

    def lines(span):
        """(columns, diagonals, keys) for each range of keys."""
        a, end = max(span[0], off), span[1]
        p = last_rows(q, k, scale, end, off, min(last_q, end - a))
        out = []
        for x, y in [(a, min(b, end)) for a, b in spans if a < b] if two_d else [(0, end)]:
            if x >= y:
                continue
            col = np.full(end, -np.inf)
            col[x:y] = p[:, x:y].sum(0)
            diag = np.zeros(end)
            for i in range(len(p)):
                for j in range(x, min(y, end - len(p) + i + 1)):
                    diag[end - len(p) + i - j] += p[i, j]
            col[x : max(min(sinks, y), x)] = np.inf
            diag[:recent] = np.inf
            out.append((top(col, min(vertical, y - x)), first_of(diag, min(max(slash, recent), end)), (x, y)))
        return out

    seen = lambda span: span[1] > max(span[0], off)
    text = lines(spans[2] if seen(spans[2]) else spans[0])
    vision = lines(spans[1]) if seen(spans[1]) else []
    for r0 in range(0, tq, block):
        a, b = off + r0, off + min(r0 + block, tq)
        rows = slice(r0, b - off)
        use = (text if a < first or b > after else []) + (vision if a < after and b > first else [])
        for columns, diagonals, (x, y) in use:
            mask[rows, columns] = True
            for d in diagonals:
                for i in range(a, b):
                    j = i - d
                    if j >= 0 and x // block <= j // block <= (y - 1) // block:
                        mask[rows, j // block * block : (j // block + 1) * block] = True
    return mask & causal(tq, tk)


# Text, four frames of four by six tokens, text.
GRID = [20, 4, 4, 6]

CASES = [
    ("dhsa", dhsa,
     dict(topk=64, block_size=16, local=24, dense_last=20, min_chunk=4, max_chunk=12, window=5, **{"global": 8}),
     lambda c: dict(topk=c["topk"], block=c["block_size"], local=c["local"], first=c["global"], dense_last=c["dense_last"],
                    least=c["min_chunk"], most=c["max_chunk"], window=c["window"])),
    ("dhsa", dhsa,
     dict(topk=40, block_size=20, local=20, dense_last=0, min_chunk=1, max_chunk=7, window=3, **{"global": 0}),
     lambda c: dict(topk=c["topk"], block=c["block_size"], local=c["local"], first=c["global"], dense_last=c["dense_last"],
                    least=c["min_chunk"], most=c["max_chunk"], window=c["window"])),
    ("routing-transformer", routing, dict(clusters=6, iterations=3, local=20, sinks=0, block_q=16),
     lambda c: dict(clusters=c["clusters"], iterations=c["iterations"], local=c["local"], sinks=c["sinks"], block=c["block_q"])),
    ("routing-transformer", routing, dict(clusters=11, iterations=0, local=1, sinks=3, block_q=8),
     lambda c: dict(clusters=c["clusters"], iterations=c["iterations"], local=c["local"], sinks=c["sinks"], block=c["block_q"])),
    ("sale", sale, dict(threshold=0.5, block_q=16, block_k=8, sinks=8, local=20), lambda c: c),
    ("sale", sale, dict(threshold=2.0, block_q=24, block_k=8, sinks=0, local=9), lambda c: c),
    ("superlinear", superlinear, dict(spans=2, backward=2.0, forward=1.0, window_index=2, sinks=0, block_k=4), lambda c: c),
    ("mminference", mm_grid, dict(pattern="grid", local=12, last_q=12, block_size=8),
     lambda c: dict(grid=GRID, stride=GRID[2] * GRID[3], local=c["local"], last_q=c["last_q"], block=c["block_size"])),
    ("mminference", mm_boundary,
     dict(pattern="q-boundary", vertical_size=9, slash_size=16, max_share=1.0, last_q=16, sinks=3, recent=9, block_size=8),
     lambda c: dict(grid=GRID, two_d=False, vertical=c["vertical_size"], slash=c["slash_size"], last_q=c["last_q"],
                    sinks=c["sinks"], recent=c["recent"], block=c["block_size"])),
    ("mminference", mm_boundary,
     dict(pattern="two-d-boundary", vertical_size=5, slash_size=13, max_share=1.0, last_q=16, sinks=3, recent=9, block_size=8),
     lambda c: dict(grid=GRID, two_d=True, vertical=c["vertical_size"], slash=c["slash_size"], last_q=c["last_q"],
                    sinks=c["sinks"], recent=c["recent"], block=c["block_size"])),
    ("superlinear", superlinear, dict(spans=3, backward=1.5, forward=0.0, window_index=4, sinks=5, block_k=1), lambda c: c),
]


def make(seed, tq, tk, d, system, f, config, args):
    """Tensors of one case, or None where a decision is too close to call."""
    rng = np.random.default_rng(seed)
    q32, k32, v32 = problem(rng, tq, tk, d)
    q, k, v = (x.astype(np.float64) for x in (q32, k32, v32))
    kw = dict(args(config))
    scale = 1 / math.sqrt(d)
    if "scale" in f.__code__.co_varnames:
        kw["scale"] = scale
    try:
        mask = f(q, k, **kw)
    except AssertionError as e:
        print(f"seed {seed} {system}: {e}")
        return None
    s = scale * q @ k.T
    s[~mask] = -np.inf
    print(f"seed {seed} {system}: density {mask.sum() / causal(tq, tk).sum():.3f}")
    out = dict(q=q32, k=k32, v=v32)
    return out, np.packbits(mask, axis=1), (softmax(s[-8:]) @ v).astype(np.float32)


def main():
    tensors, meta = {}, []
    # Whole prompt of a length that no block divides; a later chunk. Each case has a problem of its own, as margins
    # seldom hold for all at once.
    for shape, (tq, tk, d) in enumerate([(140, 140, 6), (53, 141, 8)]):
        for n, (system, f, config, args) in enumerate(CASES):
            seed = 5000 + 1000 * shape + 100 * n
            while (made := make(seed, tq, tk, d, system, f, config, args)) is None:
                seed += 1
            out, mask, last = made
            i, name = len(meta), f"{system}.{n}"
            tensors |= {f"{i}.{key}": x for key, x in out.items()}
            tensors |= {f"{i}.{name}.mask": mask, f"{i}.{name}.out": last}
            grid = dict(grid=GRID) if system == "mminference" else {}
            meta.append(dict(problem=i, tq=tq, tk=tk, d=d, system=system, name=name, params=config, **grid))
    save_file(tensors, "goldens/sparse_lm.safetensors", {"cases": json.dumps(meta)})


if __name__ == "__main__":
    main()
