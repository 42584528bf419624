"""Golden masks and outputs of the static patterns on token grids.

Each function says for one (query, key) pair, or one query, what the paper or its public code says; masks are filled pair by
pair on dense (T, T) matrices. Nothing is shared with the Rust code. Run from the repository root; writes
goldens/sparse_grid.safetensors with <problem>.q, .k, .v (float32) and, per case, the mask (bits packed along the
keys) and the last output rows. Grids are [first, t, h, w]; tokens outside are text.
"""

import itertools
import json
import math

import numpy as np
from safetensors.numpy import save_file

MARGIN = 1e-5


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def places(grid):
    first, t, h, w = grid
    return {first + i: p for i, p in enumerate(itertools.product(range(t), range(h), range(w)))}


def fill(n, grid, visits):
    """Mask in which grid tokens at places p, r see each other if visits(p, r); text sees and is seen by all."""
    at = places(grid)
    return np.array([[a not in at or b not in at or visits(at[a], at[b]) for b in range(n)] for a in range(n)])


def three(x):
    x = list(x) if isinstance(x, (list, tuple)) else [x]
    return [x[0]] * (3 - len(x)) + x


def window(i, n, w, s, causal):
    """Start and end of NATTEN's window of one axis without dilation."""
    left, right = w // 2, w // 2 + w % 2 - 1
    if causal:
        lead = min(i // s * s + s - 1, n - 1)
        return max(lead - left - right, 0), min(i + 1, n)
    lead = min(i // s * s + s // 2, n - 1)
    start = max(lead - left, 0)
    if lead + right >= n:
        start += n - right - lead - 1
    return start, start + w


def neighborhood(n, grid, w, s=1, d=1, causal=""):
    sides, w, s, d = grid[1:], three(w), three(s), three(d)

    def one(a, i, j):
        if i % d[a] != j % d[a]:
            return False
        members = len(range(i % d[a], sides[a], d[a]))
        size = members if w[a] == 0 else min(w[a], members)
        lo, hi = window(i // d[a], members, size, min(s[a], size), "thw"[a] in causal)
        return lo <= j // d[a] < hi

    return fill(n, grid, lambda p, r: all(one(a, p[a], r[a]) for a in range(3)))


def dina(n, grid, w, d, layer=None):
    w3, d3 = three(w), three(d)
    d3 = [x or max(side // y, 1) for x, side, y in zip(d3, grid[1:], w3)]
    return neighborhood(n, grid, w, 1, [1, 1, 1] if layer is not None and layer % 2 == 0 else d3)


def halo(n, grid, block, reach):
    """Each block gathers a (block + 2·reach)² window; what lies outside of the image is masked."""

    def visits(p, r):
        corner = [x // block * block for x in p[1:]]
        return p[0] == r[0] and all(c - reach <= y < c + block + reach for c, y in zip(corner, r[1:]))

    return fill(n, grid, visits)


def lrgt(n, grid, groups, layer=None):
    """Regroup as the authors' code does, '(t1 s1 t2 s2) -> (s1 s2) (t1 t2 v)': equal s1 and s2 attend to one another."""
    if layer is not None and layer % 2 == 0:
        return fill(n, grid, lambda p, r: p[0] == r[0])
    return fill(n, grid, lambda p, r: p[1] % groups == r[1] % groups and p[2] % groups == r[2] % groups)


def radial(n, grid, decay):
    w = grid[3]
    s = grid[2] * w

    def visits(p, r):
        i, j, k, l = p[0], r[0], p[1] * w + p[2], r[1] * w + r[2]
        if j == 0:
            return True
        b = 2 ** int(math.floor(math.log2(max(abs(i - j), 1))))
        if b <= s * decay and abs(k - l) + 1 <= s * decay / b:
            return True
        return abs(i - j) % math.ceil(b / (s * decay)) == 0 and k == l

    return fill(n, grid, visits)


def vdit(n, grid, pattern, width=0.125, stripe_frames=1):
    w = grid[3]
    s = grid[2] * w
    flat = lambda p: p[0] * s + p[1] * w + p[2]
    reach = math.floor(width * s)
    return fill(n, grid, {
        "full": lambda p, r: True,
        "diagonal": lambda p, r: abs(flat(p) - flat(r)) <= reach,
        "multi-diagonal": lambda p, r: abs(flat(p) % s - flat(r) % s) <= reach,
        "stripe": lambda p, r: r[0] < stripe_frames,
    }[pattern])


def paro(q, k, scale, grid, order, block, density):
    """Reorder the axes, sum the attention map over blocks, keep the heaviest ones and the best of each row."""
    n = len(q)
    first, t, h, w = grid
    at = places(grid)
    axes = ["thw".index(a) for a in order]
    inside = sorted(at, key=lambda x: [at[x][a] for a in axes])
    seq = np.array([*range(first), *inside, *range(first + t * h * w, n)])
    p = softmax(scale * q[seq] @ k[seq].T)
    nb = -(-n // block)
    mass = np.array([[p[a * block:(a + 1) * block, b * block:(b + 1) * block].sum() for b in range(nb)] for a in range(nb)])
    keep = {(a, int(mass[a].argmax())) for a in range(nb)}
    for a in range(nb):
        top = np.sort(mass[a])[::-1]
        assert nb == 1 or top[0] - top[1] > MARGIN, "margin: choose another seed"
    budget = max(math.ceil(density * nb * nb), nb)
    rest = sorted((x for x in itertools.product(range(nb), range(nb)) if x not in keep), key=lambda x: -mass[x])
    room = budget - len(keep)
    if 0 < room < len(rest):
        assert mass[rest[room - 1]] - mass[rest[room]] > MARGIN, "margin: choose another seed"
    keep |= set(rest[:room])
    mask = np.zeros((n, n), bool)
    for a, b in keep:
        mask[np.ix_(seq[a * block:(a + 1) * block], seq[b * block:(b + 1) * block])] = True
    return mask


def butterfly(n, block, blocks, strides, sinks, causal):
    """The union of block-butterfly factors: the factor of stride x joins blocks of one group of 2x that are equal mod x."""
    nb = -(-n // block)
    pattern = np.eye(nb, dtype=bool)
    pattern[:, :sinks] = True
    if not causal:
        pattern[:sinks] = True
    for level in range(strides):
        x = 2 ** level
        for group in range(0, blocks, 2 * x):
            for i, j, m in itertools.product(range(2), range(2), range(x)):
                a, b = group + i * x + m, group + j * x + m
                if a < nb and b < nb:
                    pattern[a, b] = True
    mask = np.kron(pattern, np.ones((block, block), bool))[:n, :n]
    return mask & np.tri(n, dtype=bool) if causal else mask


def moa(tq, tk, alpha, beta, sinks, block):
    """The authors' layout: a band of int(alpha // block + beta · blocks) block diagonals and global first blocks."""
    nb = -(-tk // block)
    band = max(int(alpha // block + beta * nb), 1)
    a, b = np.arange(nb)[:, None], np.arange(nb)[None, :]
    pattern = (b <= a) & ((a - b < band) | (b < -(-sinks // block)))
    mask = np.kron(pattern, np.ones((block, block), bool))[:tk, :tk]
    return (mask & np.tri(tk, dtype=bool))[tk - tq:]


NA, FNA = "generalized-neighborhood-attention", "fused-neighborhood-attention"
IMAGE, VIDEO, LONG = [0, 1, 9, 11], [5, 4, 6, 7], [0, 12, 3, 4]


def problems():
    """(tq, tk, d, grid, causal, cases); a case is (system, params, mask function of q, k, scale, further fields)."""
    n = 99
    g = IMAGE
    image = [
        (NA, dict(window=5), lambda *_: neighborhood(n, g, 5), {}),
        (NA, dict(window=6, tile=[4, 4]), lambda *_: neighborhood(n, g, 6), {}),
        (NA, dict(window=[4, 6], stride=[2, 4]), lambda *_: neighborhood(n, g, [4, 6], [2, 4]), {}),
        (NA, dict(window=4, stride=4, tile=[4, 4]), lambda *_: neighborhood(n, g, 4, 4), {}),
        (NA, dict(window=3, dilation=[2, 3]), lambda *_: neighborhood(n, g, 3, 1, [2, 3]), {}),
        (NA, dict(window=[0, 3], causal_axes="h"), lambda *_: neighborhood(n, g, [0, 3], 1, 1, "h"), {}),
        (NA, dict(window=5, stride=2, dilation=2, causal_axes="hw"),
         lambda *_: neighborhood(n, g, 5, 2, 2, "hw"), {}),
        (FNA, dict(window=[7, 4], tile=[3, 5]), lambda *_: neighborhood(n, g, [7, 4]), {}),
        ("dilated-neighborhood-attention", dict(window=3), lambda *_: dina(n, g, 3, 0), {}),
        ("dilated-neighborhood-attention", dict(window=3, dilation=2), lambda *_: dina(n, g, 3, 2, 4), dict(layer=4)),
        ("halonet", dict(block_size=4, halo=1), lambda *_: halo(n, g, 4, 1), {}),
        ("halonet", dict(block_size=3, halo=2, tile=[2, 7]), lambda *_: halo(n, g, 3, 2), {}),
    ]
    m = 5 + 4 * 6 * 7 + 3
    v = VIDEO
    video = [
        (NA, dict(window=[2, 3, 4]), lambda *_: neighborhood(m, v, [2, 3, 4]), {}),
        (NA, dict(window=[3, 4, 4], stride=[1, 2, 3], causal_axes="t"),
         lambda *_: neighborhood(m, v, [3, 4, 4], [1, 2, 3], 1, "t"), {}),
        (FNA, dict(window=3, dilation=[1, 2, 2]), lambda *_: neighborhood(m, v, 3, 1, [1, 2, 2]), {}),
        ("dilated-neighborhood-attention", dict(window=[2, 3, 3]), lambda *_: dina(m, v, [2, 3, 3], 0, 3), dict(layer=3)),
        ("halonet", dict(block_size=2, halo=1), lambda *_: halo(m, v, 2, 1), {}),
        ("lrgt", dict(groups=3), lambda *_: lrgt(m, v, 3), {}),
        ("lrgt", dict(groups=3), lambda *_: lrgt(m, v, 3, 2), dict(layer=2)),
        ("radial-attention", {}, lambda *_: radial(m, v, 1), {}),
        ("sparse-vdit", dict(pattern="diagonal"), lambda *_: vdit(m, v, "diagonal"), {}),
        ("sparse-vdit", dict(pattern="multi-diagonal", width=0.1), lambda *_: vdit(m, v, "multi-diagonal", 0.1), {}),
        ("sparse-vdit", dict(pattern="stripe", stripe_frames=2), lambda *_: vdit(m, v, "stripe", stripe_frames=2), {}),
        ("sparse-vdit", dict(pattern="full"), lambda *_: vdit(m, v, "full"), {}),
        ("paroattention", dict(order="hwt", block_size=16, density=0.3, samples=0), lambda q, k, s: paro(q, k, s, v, "hwt", 16, 0.3), {}),
        ("paroattention", dict(order="wth", block_size=20, density=0.5, samples=0), lambda q, k, s: paro(q, k, s, v, "wth", 20, 0.5), {}),
    ]
    long = [
        ("radial-attention", {}, lambda *_: radial(144, LONG, 1), {}),
        ("radial-attention", dict(decay=0.25), lambda *_: radial(144, LONG, 0.25), {}),
        ("radial-attention", dict(decay=2.5), lambda *_: radial(144, LONG, 2.5), {}),
    ]
    line = [0, 1, 1, 150]
    causal = np.tri(150, dtype=bool)
    text = [
        (NA, dict(window=20), lambda *_: neighborhood(150, line, 20, causal="w"), {}),
        (NA, dict(window=24, stride=8), lambda *_: neighborhood(150, line, 24, 8, causal="w"), {}),
        (FNA, dict(window=9, dilation=4), lambda *_: neighborhood(150, line, 9, 1, 4, "w"), {}),
        ("pixelfly", dict(block_size=8), lambda *_: butterfly(150, 8, 32, 5, 1, True), {}),
        ("pixelfly", dict(block_size=8, butterfly=2, global_blocks=0), lambda *_: butterfly(150, 8, 32, 2, 0, True), {}),
        ("moa-sparse", dict(alpha=16, beta=0.2, sinks=4, block_size=8), lambda *_: moa(150, 150, 16, 0.2, 4, 8), {}),
        ("moa-sparse", dict(alpha=-8, beta=0.35, sinks=12, block_size=8), lambda *_: moa(150, 150, -8, 0.35, 12, 8), {}),
    ]
    pixels = [
        (NA, dict(window=[3, 4]), lambda *_: neighborhood(96, [0, 1, 8, 12], [3, 4], causal="h") & np.tri(96, dtype=bool), {}),
    ]
    full = [
        (NA, dict(window=11, stride=4), lambda *_: neighborhood(130, [0, 1, 1, 130], 11, 4), {}),
        ("pixelfly", dict(block_size=8, global_blocks=2), lambda *_: butterfly(130, 8, 32, 5, 2, False), {}),
    ]
    chunk = [
        (NA, dict(window=20), lambda *_: neighborhood(150, line, 20, causal="w")[-37:], {}),
        ("pixelfly", dict(block_size=8), lambda *_: butterfly(150, 8, 32, 5, 1, True)[-37:], {}),
        ("moa-sparse", dict(alpha=16, beta=0.2, sinks=4, block_size=8), lambda *_: moa(37, 150, 16, 0.2, 4, 8), {}),
    ]
    assert causal.shape == (150, 150)
    return [
        (99, 99, 8, IMAGE, False, image),
        (m, m, 8, VIDEO, False, video),
        (144, 144, 4, LONG, False, long),
        (150, 150, 8, None, True, text),
        (96, 96, 4, [0, 1, 8, 12], True, pixels),
        (130, 130, 4, None, False, full),
        (37, 150, 8, None, True, chunk),
    ]


def main():
    tensors, about = {}, []
    for i, (tq, tk, d, grid, causal, cases) in enumerate(problems()):
        rng = np.random.default_rng(11 + i)
        q32, k32, v32 = (rng.standard_normal((n, d)).astype(np.float32) for n in (tq, tk, tk))
        tensors |= {f"{i}.q": q32, f"{i}.k": k32, f"{i}.v": v32}
        q, k, v = (x.astype(np.float64) for x in (q32, k32, v32))
        scale = 1 / math.sqrt(d)
        for system, params, mask_of, more in cases:
            name = f"{system}.{sum(a['system'] == system and a['problem'] == i for a in about)}"
            mask = mask_of(q, k, scale)
            assert mask.shape == (tq, tk) and mask.any(1).all()
            s = np.where(mask, scale * q @ k.T, -np.inf)
            tensors[f"{i}.{name}.mask"] = np.packbits(mask, axis=1)
            tensors[f"{i}.{name}.out"] = (softmax(s[-8:]) @ v).astype(np.float32)
            case = dict(problem=i, tq=tq, tk=tk, d=d, system=system, name=name, params=params, causal=causal, **more)
            about.append(case if grid is None else case | dict(grid=grid))
            print(f"problem {i} {name} {params}: density {mask.mean():.3f}")
    save_file(tensors, "goldens/sparse_grid.safetensors", {"cases": json.dumps(about)})


if __name__ == "__main__":
    main()
