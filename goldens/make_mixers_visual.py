"""Golden outputs of the visual mixers: sla, llsa, combiner, catanet, biformer-bra, and a run of re-ttention.

Each function states one method on dense float64 tensors; nothing is shared with the Rust code. Run from the repository
root; writes goldens/mixers_visual.safetensors (`<case>.q|k|v|x|out` and weights `<case>.w.<name>`, metadata "cases")
and goldens/re_ttention.safetensors (`<step>.q|k|v|out`). Cases whose decisions float32 could turn are refused, and the
next seed is tried.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

MARGIN = 2e-5


def apart(v):
    assert v > MARGIN, f"margin {v}: choose another seed"


def best(x, n):
    """The n largest of a vector, with a margin to the rest."""
    order = torch.argsort(x, descending=True)
    if 0 < n < len(x):
        apart((x[order[n - 1]] - x[order[n]]).item())
    return order[:n]


def heads(x, h):
    return x.repeat_interleave(h // x.shape[1], 1)


def pool(x, block):
    return torch.stack([c.mean(-2) for c in x.split(block, -2)], -2)


def attention(q, k, v, mask=None, bias=None):
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        s = s + bias
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    return torch.softmax(s, -1) @ v


def sla(t, p, w):
    q, k, v = t["q"], heads(t["k"], t["q"].shape[1]), heads(t["v"], t["q"].shape[1])
    bq, bk = p["block_q"], p["block_k"]
    phi = {"softmax": lambda x: torch.softmax(x, -1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}[p["feature_map"]]
    score = pool(q, bq) @ pool(k, bk).transpose(-1, -2)
    n = score.shape[-1]
    high, low = max(1, int(p["critical"] * n)), int(p["negligible"] * n)
    kind = torch.zeros(score.shape, dtype=torch.int8)
    for row, out in zip(score.reshape(-1, n), kind.view(-1, n)):
        out[best(row, high)] = 1
        out[best(-row, low)] = -1
    wide = kind.repeat_interleave(bq, -2)[..., : q.shape[2], :].repeat_interleave(bk, -1)[..., : k.shape[2]]
    o_s = attention(q, k, v, wide == 1)
    a = (phi(q) @ phi(k).transpose(-1, -2)) * (wide == 0)
    o_l = (a @ v) / (a.sum(-1, keepdim=True) + 1e-5)
    return o_s + o_l @ w["proj.weight"].T + w["proj.bias"]


def nested(grid, side, levels):
    """Token numbers of a (1, h, w) grid in the order of nested squares of side, side², …"""
    _, _, h, w = grid
    key = lambda y, x: [v // side**i % side if i < levels else v // side**i for i in range(levels, -1, -1) for v in (y, x)]
    return torch.tensor(sorted(range(h * w), key=lambda i: key(i // w, i % w)))


def llsa(t, p, w):
    q, k, v = t["q"], heads(t["k"], t["q"].shape[1]), heads(t["v"], t["q"].shape[1])
    b, levels, topk = p["block_size"], p["levels"], p["topk"]
    order = nested(t["grid"], math.isqrt(b), levels) if t["grid"] else torch.arange(q.shape[2])
    q, k, v = (x[:, :, order] for x in (q, k, v))
    pyramid = [(q, k, v, torch.ones(q.shape[2], dtype=q.dtype))]
    for _ in range(levels):
        # Means of all tokens below, whatever the sizes of the pieces.
        span = b ** len(pyramid)
        size = torch.tensor([len(c) for c in torch.arange(q.shape[2]).split(span)], dtype=q.dtype)
        pyramid.append(tuple(pool(x, span) for x in (q, k, v)) + (size,))
    out = torch.zeros_like(q)
    for bi in range(q.shape[0]):
        for h in range(q.shape[1]):
            # chosen[l][i]: tokens of level l that token i of level l's queries chose.
            chosen = {}
            for l in range(levels, 0, -1):
                pq, pk = pyramid[l][0][bi, h], pyramid[l][1][bi, h]
                for i in range(len(pq)):
                    if l == levels:
                        among = torch.arange(len(pk))
                    else:
                        up = chosen[l + 1, i // b]
                        among = torch.cat([torch.arange(c * b, min((c + 1) * b, len(pk))) for c in sorted(up.tolist())])
                    chosen[l, i] = among[best(pk[among] @ pq[i], topk)]
            for i in range(len(pyramid[1][0][bi, h])):
                rows = slice(i * b, min((i + 1) * b, q.shape[2]))
                keys, values, weight = [], [], []
                for l in range(levels + 1):
                    _, pk, pv, size = (x[bi, h] if x.dim() > 1 else x for x in pyramid[l])
                    if l == levels:
                        among = torch.arange(len(pk))
                    else:
                        up = chosen[l + 1, i // b**l]
                        among = torch.cat([torch.arange(c * b, min((c + 1) * b, len(pk))) for c in sorted(up.tolist())])
                    if p["disjoint"] and l > 0:
                        gone = set(chosen[l, i // b ** (l - 1)].tolist())
                        among = torch.tensor([j for j in among.tolist() if j not in gone], dtype=torch.long)
                    keys.append(pk[among])
                    values.append(pv[among])
                    weight.append(size[among])
                out[bi, h, rows] = attention(q[bi, h, rows], torch.cat(keys), torch.cat(values),
                                             bias=torch.cat(weight).log())
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return out[:, :, back]


def combiner(t, p, w):
    q, k, v = t["q"], heads(t["k"], t["q"].shape[1]), heads(t["v"], t["q"].shape[1])
    n, seg = q.shape[2], p["segment"]
    scale = 1 / math.sqrt(q.shape[-1])
    some = (lambda x: x.amax(-2)) if p["pool"] == "max" else (lambda x: x.mean(-2))
    spans = torch.arange(n).split(seg)
    out = torch.zeros_like(q)
    for i in range(n):
        own = i // seg
        direct = [j for j in spans[own].tolist() if j <= i or not t["causal"]]
        regions = [r for r in range(len(spans)) if r < own or (r > own and not t["causal"])]
        # p(j | i) in full: direct keys, then p(region | i) · p(j | region).
        s = [scale * (q[:, :, i, None] * k[:, :, direct]).sum(-1)]
        s += [scale * (q[:, :, i] * some(k[:, :, spans[r]])).sum(-1, keepdim=True) for r in regions]
        top = torch.softmax(torch.cat(s, -1), -1)
        full = torch.zeros(*q.shape[:2], n, dtype=q.dtype)
        full[:, :, direct] = top[..., : len(direct)]
        for c, r in enumerate(regions):
            inner = torch.softmax(scale * (some(q[:, :, spans[r]])[:, :, None] * k[:, :, spans[r]]).sum(-1), -1)
            full[:, :, spans[r]] = top[..., len(direct) + c, None] * inner
        assert torch.allclose(full.sum(-1), torch.ones((), dtype=q.dtype))
        out[:, :, i] = (full[..., None] * v).sum(2)
    return out


def catanet(t, p, w):
    q, k, v, x = t["q"], heads(t["k"], t["q"].shape[1]), heads(t["v"], t["q"].shape[1]), t["x"]
    b, h, n, d = q.shape
    g = min(n, p["group_size"])
    means = w["means"]
    kg, vg = (F.linear(means, w[f"{s}.weight"]).view(-1, h, d).transpose(0, 1) for s in ("to_k", "to_v"))
    score = F.normalize(x, dim=-1) @ F.normalize(means, dim=-1).T
    two = score.topk(2, -1).values
    apart((two[..., 0] - two[..., 1]).min().item())
    out = torch.zeros_like(q)
    for bi in range(b):
        order = torch.argsort(score[bi].argmax(-1), stable=True)
        groups = order.split(g)
        for i, rows in enumerate(groups):
            keys = torch.cat(groups[max(min(i, len(groups) - 2), 0) :][:2])
            out[bi][:, rows] = attention(q[bi][:, rows], k[bi][:, keys], v[bi][:, keys]) + attention(q[bi][:, rows], kg, vg)
    return out


def biformer(t, p, w):
    q, k, v = t["q"], heads(t["k"], t["q"].shape[1]), heads(t["v"], t["q"].shape[1])
    b, hd, n, d = q.shape
    first, f, h, wd = t["grid"]
    side, m = p["side"], f * h * wd
    i = torch.arange(m)
    ry, rx = max(h // side, 1), max(wd // side, 1)
    region = (i // (h * wd) * -(-h // ry) + i // wd % h // ry) * -(-wd // rx) + i % wd // rx
    nr = int(region.max()) + 1
    inside = slice(first, first + m)
    qr, kr = (torch.stack([x[:, :, inside][:, :, region == r].mean(2) for r in range(nr)], 2) for x in (q, k))
    score = torch.einsum("bhrd,bhsd->brs", qr, kr)
    mask = torch.ones(b, 1, n, n, dtype=torch.bool)
    for bi in range(b):
        keep = torch.zeros(nr, nr, dtype=torch.bool)
        for r in range(nr):
            keep[r, best(score[bi, r], p["topk"])] = True
        mask[bi, 0, inside, inside] = keep[region][:, region]
    out = attention(q, k, v, mask)
    if p["lce"] == 0:
        return out
    image = v[:, :, inside].reshape(b, hd, f, h, wd, d).permute(0, 2, 1, 5, 3, 4).reshape(b * f, hd * d, h, wd)
    local = F.conv2d(image, w["lce.weight"], w["lce.bias"], padding=p["lce"] // 2, groups=hd * d)
    out[:, :, inside] += local.view(b, f, hd, d, h, wd).permute(0, 2, 1, 4, 5, 3).reshape(b, hd, m, d)
    return out


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64).float().double()


def case(name, system, f, params, seed, b, h, hkv, n, d, hidden=0, causal=False, grid=None, weights=()):
    while True:
        g = torch.Generator().manual_seed(seed)
        drift = normal(g, b, 1, n // 10 + 1, d).repeat_interleave(10, 2)[:, :, :n].float().double()
        t = dict(q=normal(g, b, h, n, d) + drift, k=normal(g, b, hkv, n, d) + drift, v=normal(g, b, hkv, n, d))
        t = {k: v.float().double() for k, v in t.items()}
        if hidden:
            t["x"] = normal(g, b, n, hidden)
        w = {k: (normal(g, *s) * a).float().double() for k, s, a in weights}
        try:
            out = f(dict(t, causal=causal, grid=grid), params, w)
        except AssertionError as e:
            print(f"{name} seed {seed}: {e}")
            seed += 1
            continue
        assert out.isfinite().all()
        break
    tensors = {f"{name}.{k}": x.float().contiguous() for k, x in dict(t, out=out).items()}
    tensors |= {f"{name}.w.{k}": x.float().contiguous() for k, x in w.items()}
    about = dict(name=name, system=system, params=params, heads=h, kv_heads=hkv, head_dim=d, hidden=hidden or h * d,
                 causal=causal, grid=grid, tolerance=3e-5)
    return tensors, about


def re_ttention(seed=5, n=96, h=2, d=8, grid=(4, 2, 5, 9), share=0.2, group=8, add=0.04):
    """Seven denoising steps under warmup=1, period=3: dense, cached dense, 2 sparse, cached dense, 2 sparse."""
    g = torch.Generator().manual_seed(seed)
    first, f, hh, ww = grid
    m = hh * ww
    half = int(m * share) // 2
    mask = torch.ones(n, n, dtype=torch.bool)
    place = lambda i: (i - first) % m if first <= i < first + f * m else None
    for g0 in range(0, n, group):
        rows = range(g0, min(g0 + group, n))
        if any(place(i) is None for i in rows):
            continue
        for j in range(n):
            mask[g0 : g0 + group, j] = place(j) is None or any(abs(place(i) - place(j)) <= half for i in rows)
    print(f"re-ttention: density {mask.float().mean():.3f}")
    base = [normal(g, 1, h, n, d) for _ in range(3)]
    tensors, ratio, residual = {}, None, None
    for step in range(7):
        q, k, v = (x + 0.1 * step * normal(g, 1, h, n, d) for x in base)
        q, k, v = (x.float().double() for x in (q, k, v))
        s = q @ k.transpose(-1, -2) / math.sqrt(d)
        sparse = s.masked_fill(~mask, -math.inf)
        full = torch.softmax(s, -1) @ v
        if step < 1:
            out = full
        elif (step - 1) % 3 == 0:
            out = full
            ratio = (sparse.logsumexp(-1, keepdim=True) - s.logsumexp(-1, keepdim=True)).exp()
            residual = full - ratio * (torch.softmax(sparse, -1) @ v)
        else:
            out = ratio * (torch.softmax(sparse, -1) @ v) + residual
            ratio = (ratio + add).clamp(max=1.0)
        for name, x in dict(q=q, k=k, v=v, out=out).items():
            tensors[f"{step}.{name}"] = x.float().contiguous()
    save_file(tensors, "goldens/re_ttention.safetensors")


def main():
    linear = [("proj.weight", (8, 8), 0.3), ("proj.bias", (8,), 0.3)]
    s = dict(block_q=16, block_k=16, critical=0.2, negligible=0.2)
    bra = lambda c: [("lce.weight", (c, 1, 5, 5), 0.1), ("lce.bias", (c,), 0.1)]
    cat = [("means", (5, 24), 1.0), ("to_k.weight", (24, 24), 0.2), ("to_v.weight", (24, 24), 0.2)]
    made = [
        case("sla.0", "sla", sla, s | dict(feature_map="softmax"), 1, 1, 4, 2, 70, 8, weights=linear),
        case("sla.1", "sla", sla, s | dict(block_q=8, block_k=24, feature_map="elu"), 2, 1, 2, 2, 77, 8, weights=linear),
        case("llsa.0", "llsa", llsa, dict(block_size=8, levels=1, topk=3, disjoint=False), 3, 1, 2, 1, 110, 8),
        case("llsa.1", "llsa", llsa, dict(block_size=4, levels=2, topk=3, disjoint=False), 4, 2, 1, 1, 107, 8),
        case("llsa.2", "llsa", llsa, dict(block_size=4, levels=2, topk=2, disjoint=True), 5, 1, 1, 1, 99, 8,
             grid=[0, 1, 9, 11]),
        case("combiner.0", "combiner", combiner, dict(segment=16, pool="max"), 6, 1, 2, 1, 75, 8, causal=True),
        case("combiner.1", "combiner", combiner, dict(segment=12, pool="mean"), 7, 1, 1, 1, 70, 8),
        case("catanet.0", "catanet", catanet, dict(centers=5, group_size=16), 8, 2, 3, 3, 70, 8, hidden=24, weights=cat),
        case("catanet.1", "catanet", catanet, dict(centers=5, group_size=64), 9, 1, 3, 1, 50, 8, hidden=24, weights=cat),
        case("biformer-bra.0", "biformer-bra", biformer, dict(side=3, topk=2, lce=5), 10, 1, 2, 2, 63, 8,
             grid=[0, 1, 7, 9], weights=bra(16)),
        case("biformer-bra.2", "biformer-bra", biformer, dict(side=4, topk=5, lce=0), 12, 1, 2, 1, 90, 8, grid=[2, 1, 8, 10]),
        case("biformer-bra.1", "biformer-bra", biformer, dict(side=2, topk=3, lce=5), 11, 1, 2, 1, 110, 8,
             grid=[4, 2, 6, 8], weights=bra(16)),
    ]
    tensors = {k: v for t, _ in made for k, v in t.items()}
    save_file(tensors, "goldens/mixers_visual.safetensors", {"cases": json.dumps([a for _, a in made])})
    re_ttention()


if __name__ == "__main__":
    main()
