"""Golden masks and outputs of the dynamic selectors for visual attention: svg2, vmoba.

Each function states one method directly on dense matrices in float64 on a token grid (t, h, w); nothing is shared with
the Rust code. Run from the repository root; writes goldens/sparse_visual.safetensors in the format of
goldens/sparse.safetensors, with "causal" and "grid" (first token, t, h, w) per case. Cases whose decisions float32 could
turn are refused, and the next seed is tried.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file

MARGIN = 2e-5


def apart(v):
    assert v > MARGIN, f"margin {v}: choose another seed"


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kmeans(x, n, rounds):
    """Lloyd's iterations from evenly spaced tokens; (labels under the last centres that were used, those centres)."""
    n = min(n, len(x))
    c = x[np.arange(n) * len(x) // n].copy()
    for i in range(max(rounds, 1)):
        d = ((x[:, None] - c[None]) ** 2).sum(-1)
        label = d.argmin(1)
        if n > 1:
            two = np.sort(d, 1)[:, :2]
            apart((two[:, 1] - two[:, 0]).min())
        for j in range(n):
            if (label == j).any():
                c[j] = x[label == j].mean(0)
    return label, c


def svg2(q, k, scale, grid, n_q, n_k, rounds, top_p, least):
    ql, qc = kmeans(q, n_q, rounds)
    kl, kc = kmeans(k, n_k, rounds)
    size = np.bincount(kl, minlength=len(kc))
    s = scale * qc @ kc.T
    p = size * np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    keep = np.zeros(p.shape, bool)
    for i, row in enumerate(p):
        order = np.argsort(-row, kind="stable")
        held, n = 0.0, 0
        while n < len(order) and held < top_p:
            held += row[order[n]]
            apart(abs(held - top_p))
            n += 1
        n = max(n, int(least * len(kc)))
        if n < len(order):
            apart((row[order[n - 1]] - row[order[n]]) * len(kc))
        keep[i, order[:n]] = True
    return keep[ql][:, kl]


def boxes(grid, size):
    """The box of every token of the grid, boxes numbered in raster order; sizes in tokens along t, h, w."""
    first, t, h, w = grid
    a, b, c = size
    nh, nw = -(-h // b), -(-w // c)
    z, y, x = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    return ((z // a * nh + y // b) * nw + x // c).reshape(-1)


def vmoba(q, k, scale, grid, size, threshold):
    first, t, h, w = grid
    n = t * h * w
    box = boxes(grid, size)
    nb = box.max() + 1
    mean = np.stack([k[first : first + n][box == b].mean(0) for b in range(nb)])
    gate = q[first : first + n] @ mean.T
    gate = (gate - gate.min()) / (gate.max() - gate.min())
    own = box[:, None] == np.arange(nb)[None]
    total = gate.sum()
    need = threshold - gate[own].sum() / total
    keep = own.copy()
    values = np.where(own, -1.0, gate).reshape(-1)
    order = np.argsort(-values, kind="stable")[: (~own).sum()]
    held, taken = 0.0, 0
    apart(abs(need) * len(order) if len(order) else 1)
    while taken < len(order) and held < need:
        held += values[order[taken]] / total
        apart(abs(held - need) * len(order))
        taken += 1
    if 0 < taken < len(order):
        apart(values[order[taken - 1]] - values[order[taken]])
    keep.reshape(-1)[order[:taken]] = True
    mask = np.ones((len(q), len(k)), bool)
    mask[first : first + n, first : first + n] = keep[:, box]
    return mask


CASES = [
    ("svg2", dict(q_clusters=9, k_clusters=24, iterations=3, top_p=0.7, min_kc_ratio=0.1), svg2,
     dict(n_q=9, n_k=24, rounds=3, top_p=0.7, least=0.1)),
    ("svg2", dict(q_clusters=5, k_clusters=40, iterations=1, top_p=0.5, min_kc_ratio=0.3, group=8), svg2,
     dict(n_q=5, n_k=40, rounds=1, top_p=0.5, least=0.3)),
    ("vmoba", dict(partition="time", frames=1, threshold=0.35), vmoba, dict(size=(1, 0, 0), threshold=0.35)),
    ("vmoba", dict(partition="space", space_h=2, space_w=3, threshold=0.3), vmoba,
     dict(size=(0, 2, 3), threshold=0.3)),
    ("vmoba", dict(partition="cube", cube_t=2, cube_h=3, cube_w=2, threshold=0.25), vmoba,
     dict(size=(2, 3, 2), threshold=0.25)),
    ("vmoba", dict(partition="cycle", cube_t=2, cube_h=2, cube_w=4, threshold=0.02, layer=5), vmoba,
     dict(size=(2, 2, 4), threshold=0.02)),
]


def problem(rng, n, grid, d):
    """Smooth in space and time, with a few objects that return in every frame."""
    first, t, h, w = grid
    q, k, v = (rng.standard_normal((n, d)) for _ in range(3))
    z, y, x = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    object_ = ((y // 3 * 3 + x // 3 + z // 3) % 5).reshape(-1)
    code = rng.standard_normal((5, d)) * 1.5
    k[first : first + t * h * w] += code[object_]
    q[first : first + t * h * w] += code[object_]
    return tuple(a.astype(np.float32) for a in (q, k, v))


def make(seed, n, grid, d):
    rng = np.random.default_rng(seed)
    q32, k32, v32 = problem(rng, n, grid, d)
    q, k, v = (x.astype(np.float64) for x in (q32, k32, v32))
    scale = 1 / math.sqrt(d)
    out, about = {"q": q32, "k": k32, "v": v32}, []
    _, t, h, w = grid
    for system, params, f, args in CASES:
        args = dict(args)
        if "size" in args:
            # 0: the whole axis.
            args["size"] = tuple(a or b for a, b in zip(args["size"], (t, h, w)))
        name = f"{system}.{sum(a['system'] == system for a in about)}"
        try:
            mask = f(q, k, scale, grid, **args)
        except AssertionError as e:
            print(f"seed {seed} {name}: {e}")
            return None
        s = scale * q @ k.T
        s[~mask] = -np.inf
        out[f"{name}.mask"] = np.ascontiguousarray(np.packbits(mask, axis=1))
        out[f"{name}.out"] = (softmax(s[-8:]) @ v).astype(np.float32)
        case = dict(system=system, name=name, causal=False, grid=list(grid))
        case["params"] = {k: v for k, v in params.items() if k != "layer"}
        if "layer" in params:
            case["layer"] = params["layer"]
        about.append(case)
        print(f"seed {seed} {name}: density {mask.mean():.3f}")
    return out, about


def main():
    tensors, meta = {}, []
    # A video, one with text before and behind and sides that no box divides, an image.
    shapes = [(1, 192, (0, 4, 6, 8), 12), (3001, 190, (5, 5, 7, 5), 8), (6001, 143, (0, 1, 13, 11), 8)]
    for i, (seed, n, grid, d) in enumerate(shapes):
        while (made := make(seed, n, grid, d)) is None:
            seed += 1
        out, about = made
        for name, x in out.items():
            tensors[f"{i}.{name}"] = x
        meta += [dict(problem=i, tq=n, tk=n, d=d, **a) for a in about]
    save_file(tensors, "goldens/sparse_visual.safetensors", {"cases": json.dumps(meta)})


if __name__ == "__main__":
    main()
