"""Golden outputs of trained sparse layers, most of them of language models.

Each function states one paper's layer directly on dense (tokens, tokens) matrices in float64; nothing is shared
with the Rust code. Run from the repository root; writes goldens/mixers_lm.safetensors with <case>.q, .k, .v, .out
(float32), .q0 and .k0 (before rotation) where a layer reads them, parameters <case>.w.<name>, and <case>.loss where a
layer has an auxiliary loss. A case is kept only if its decisions have a margin, so that float32 rounding cannot turn
them.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

MARGIN = 1e-5
torch.set_default_dtype(torch.float64)


def apart(gap):
    """Refuse decisions that float32 could turn: distances between kept and dropped scores."""
    assert gap > MARGIN, f"margin {gap}: choose another seed"


def best(x, n):
    """Indices of the n largest entries, decided by a margin."""
    order = torch.argsort(x, descending=True)
    if 0 < n < len(x):
        apart((x[order[n - 1]] - x[order[n]]).item())
    return order[:n].tolist()


def causal(t):
    return torch.arange(t)[None, :] <= torch.arange(t)[:, None]


def masked_softmax(s, mask):
    return torch.softmax(s.masked_fill(~mask, -torch.inf), -1)


def by_head(f):
    """f(head, q, k, v) -> (T, Dv) or (that, loss) over all batches and query heads; losses are averaged."""

    def run(q, k, v, *before):
        b, h, t, _ = q.shape
        group = h // k.shape[1]
        out, losses = torch.zeros(b, h, t, v.shape[-1]), []
        for i in range(b):
            for j in range(h):
                rest = [x[i, j if x.shape[1] == h else j // group] for x in before]
                y = f(j, q[i, j], k[i, j // group], v[i, j // group], *rest)
                if isinstance(y, tuple):
                    y, loss = y
                    losses.append(loss)
                out[i, j] = y
        return out, (sum(losses) / len(losses) if losses else None)

    return run


def rope(x, positions, base):
    """Rotate pairs (c, c + D/2) of the rows of x by position * base^(-2c/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-2 * torch.arange(half) / x.shape[-1])
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def seerattention(q, k, v, w, c, before):
    """AttnGate of microsoft/SeerAttention (Q averaged, K max, min and average), own blocks always visited."""
    h, t, d = q.shape[1:]
    hkv, block = k.shape[1], c["block_size"]
    blocks = [slice(i, min(i + block, t)) for i in range(0, t, block)]
    n = len(blocks)
    first = torch.arange(n) * block
    below = torch.arange(n)[None, :] <= torch.arange(n)[:, None]

    def one(head, q, k, v, q0, k0):
        qp = torch.stack([q0[b].mean(0) for b in blocks]) @ w["gate.q"][head]
        kp = torch.stack([torch.cat([k0[b].amax(0), k0[b].amin(0), k0[b].mean(0)]) for b in blocks])
        kp = kp @ w["gate.k"][head // (h // hkv)]
        gate = rope(qp, first, c["rope_base"]) @ rope(kp, first, c["rope_base"]).T / math.sqrt(qp.shape[-1])
        gate = gate.masked_fill(~below, -torch.inf)
        p = torch.softmax(gate, -1)
        mask = torch.zeros(t, t, dtype=torch.bool)
        for i, rows in enumerate(blocks):
            if c["topk"]:
                kept = best(gate[i, :i], min(c["topk"] - 1, i)) if i and c["topk"] > 1 else []
            else:
                for x in p[i, :i]:
                    apart(abs(x.item() - c["threshold"]))
                kept = torch.nonzero(p[i, :i] >= c["threshold"])[:, 0].tolist()
            for j in kept + [i]:
                mask[rows, blocks[j]] = True
        s = q @ k.T / math.sqrt(d)
        out = masked_softmax(s, mask & causal(t)) @ v
        # Block maxima of the true map, each row of blocks normalised; the first quarter of the rows is left out.
        true = masked_softmax(s, causal(t))
        target = torch.stack([torch.stack([true[a][:, b].max() for b in blocks]) for a in blocks])
        target = target / target.sum(-1, keepdim=True)
        kl = torch.where(below, torch.special.xlogy(target, target) - target * torch.where(below, p, 1.0).log(), 0.0)
        return out, kl.sum(-1)[n // 4 :].mean()

    return by_head(one)(q, k, v, *before)


def dynamic_mask(q, k, v, w, c, before):
    """Doge's attention: delta = exp(A * softplus(V W)), the keep_window largest visible deltas stay, as a bias."""
    t, d = q.shape[2:]
    flat = v.transpose(1, 2).flatten(2)
    delta = torch.exp(w["a"][:, None] * F.softplus(flat @ w["dt_proj.weight"].T).transpose(1, 2))
    b, h = q.shape[:2]
    group = h // k.shape[1]
    out = torch.zeros(b, h, t, v.shape[-1])
    for i in range(b):
        for j in range(h):
            bias = delta[i, j // group]
            mask = torch.zeros(t, t, dtype=torch.bool)
            for r in range(t):
                mask[r, best(bias[: r + 1], c["keep_window"])] = True
            s = q[i, j] @ k[i, j // group].T / math.sqrt(d) + bias
            out[i, j] = masked_softmax(s, mask) @ v[i, j // group]
    return out, None


def landmark(q, k, v, w, c, before):
    """Grouped softmax of epfml/landmark-attention; the last token of every block is its landmark."""
    block, topk = c["block_size"], c["topk"]

    def one(head, q, k, v):
        t, d = q.shape
        s = q @ k.T / math.sqrt(d)
        out = torch.zeros(t, v.shape[-1])
        for i in range(t):
            own = i // block
            tokens = [j for j in range(own * block, i + 1) if (j + 1) % block]
            marks = [(b + 1) * block - 1 for b in range(own)]
            if topk and topk < own:
                marks = [marks[x] for x in best(s[i, marks], topk)]
            first = torch.softmax(s[i, tokens + marks], -1)
            out[i] = first[: len(tokens)] @ v[tokens]
            for p, mark in zip(first[len(tokens) :], marks):
                inside = slice(mark - block + 1, mark)
                out[i] += p * (torch.softmax(s[i, inside], -1) @ v[inside])
        return out

    return by_head(one)(q, k, v)


def ssa(q, k, v, w, c, before):
    """Both attentions and their smooth L1 distance (that without stopped gradients pulls both); blocks by mean keys."""
    block, topk = c["block_size"], c["topk"]
    distance = lambda a, b: F.smooth_l1_loss(a, b)

    def one(head, q, k, v):
        t, d = q.shape
        s = q @ k.T / math.sqrt(d)
        mask = torch.zeros(t, t, dtype=torch.bool)
        for i in range(t):
            own = i // block
            mask[i, own * block :] = True
            if own and topk > 1:
                gate = torch.stack([q[i] @ k[b * block : (b + 1) * block].mean(0) for b in range(own)])
                for b in best(gate, min(topk - 1, own)):
                    mask[i, b * block : (b + 1) * block] = True
        sparse, full = masked_softmax(s, mask & causal(t)) @ v, masked_softmax(s, causal(t)) @ v
        return (full if c["mode"] == "full" else sparse), distance(sparse, full)

    return by_head(one)(q, k, v)


def core_context(q, k, v, w, c, before):
    """CCA: groups weighted by their last query (the mean one of a K/V group) into core tokens; near tokens exact."""
    g, window = c["group_size"], c["window"]
    h, t, d = q.shape[1:]
    hkv = k.shape[1]
    mean_q = q.unflatten(1, (hkv, h // hkv)).mean(2)

    def one(head, q, k, v, pool):
        groups = [slice(i, i + g) for i in range(0, t - g + 1, g)]
        weights = [torch.softmax(k[b] @ pool[b.stop - 1] / math.sqrt(d), -1) for b in groups]
        ck = torch.stack([p @ k[b] for p, b in zip(weights, groups)])
        cv = torch.stack([p @ v[b] for p, b in zip(weights, groups)])
        out = torch.zeros(t, v.shape[-1])
        for i in range(t):
            n = max(0, i // g - window // g)
            keys, values = torch.cat([ck[:n], k[n * g : i + 1]]), torch.cat([cv[:n], v[n * g : i + 1]])
            out[i] = torch.softmax(keys @ q[i] / math.sqrt(d), -1) @ values
        return out

    b = q.shape[0]
    out = torch.zeros(b, h, t, v.shape[-1])
    for i in range(b):
        for j in range(h):
            kv = j // (h // hkv)
            out[i, j] = one(j, q[i, j], k[i, kv], v[i, kv], mean_q[i, kv])
    return out, None


def sea(q, k, v, w, c, before):
    """Performer context -> encoder -> rows of a compressed map -> causal convolutions -> softmax -> top cells."""
    b, h, t, d = q.shape
    group = h // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    width, keys, channels = c["width"], c["keys"], c["channels"]
    # Generalised (ReLU) kernel features of performer-pytorch.
    feature = lambda x: F.relu(x * d**-0.25 @ w["performer.projection"].T) + 1e-3
    angle = torch.arange(t)[:, None] * 10000.0 ** (-2 * torch.arange(d // 2) / d)
    position = torch.cat([angle.sin(), angle.cos()], -1).expand(b, h, t, d)
    a = (feature(q) @ feature(k).transpose(-1, -2)).masked_fill(~causal(t), 0.0)
    context = a / a.sum(-1, keepdim=True) @ torch.cat([position, v], -1)
    x = torch.cat([context, v], -1) @ w["encoder.weight"].T + w["encoder.bias"]
    x = F.gelu(F.layer_norm(x, x.shape[-1:], w["encoder.norm.weight"], w["encoder.norm.bias"], 1e-5))
    m = x @ w["decoder.weight"].T + w["decoder.bias"]
    m = m.view(b, h, t, channels, width // 4).permute(0, 1, 3, 2, 4).reshape(b, h * channels, t, width // 4)
    # Two rows of the past, none of the future.
    m = F.relu(F.conv2d(F.pad(m, (1, 1, 2, 0)), w["conv1.weight"], w["conv1.bias"]))
    m = m.repeat_interleave(4, -1)
    m = F.conv2d(m, w["conv2.weight"])
    m = F.layer_norm(m, (width,), w["map.norm.weight"], w["map.norm.bias"], 1e-5)
    p = torch.softmax(m, -1)
    scale = torch.sigmoid(x @ w["scale.weight"].T + w["scale.bias"])
    mean = v.cumsum(2) / torch.arange(1, t + 1)[:, None]
    s = q @ k.transpose(-1, -2) / math.sqrt(d)
    true = masked_softmax(s, causal(t))
    out, losses = torch.zeros(b, h, t, v.shape[-1]), []
    for i in range(b):
        for j in range(h):
            for r in range(t):
                n = r + 1
                cell = torch.arange(n) * width // n
                occupied = sorted(set(cell.tolist()))
                z = max(1, math.floor(keys * min(width, n) / n + 0.5))
                kept = [occupied[x] for x in best(p[i, j, r, occupied], z)]
                seen = torch.isin(cell, torch.tensor(kept))
                y = masked_softmax(s[i, j, r, :n], seen) @ v[i, j, :n]
                f = scale[i, j, r]
                out[i, j, r] = f[1] * f[0] * y + (1 - f[1]) * mean[i, j, r]
                mass = torch.zeros(width).index_add(0, cell, true[i, j, r, :n])
                q_ = p[i, j, r] / p[i, j, r, occupied].sum()
                losses.append(torch.special.xlogy(mass, mass).sum() - torch.special.xlogy(mass, q_).sum())
    return out, sum(losses) / len(losses)


def sparsifiner(q, k, v, w, c, before):
    """MaskPredictor of lim142857/Sparsifiner: a few coefficients of a thresholded basis, the best keys of each row."""
    h, t, d = q.shape[1:]
    hkv, (_, first, frames, rows, cols) = k.shape[1], c["grid"]
    tokens = first + frames * rows * cols
    assert tokens == t
    keep = math.ceil(c["keep_rate"] * t)

    def one(head, q, k, v):
        qn = q @ w["proj_q.weight"].T + w["proj_q.bias"]
        kn = k @ w["proj_k.weight"].T + w["proj_k.bias"]
        coefficients = torch.softmax(qn @ (kn.T @ w["proj_n"]) / math.sqrt(h), -1)
        basis = w["proj_back_n"].T
        for x in basis.flatten():
            apart(abs(abs(x.item()) - c["basis_threshold"]))
        sharp = torch.where(basis.abs() > c["basis_threshold"], basis.abs(), 0.0)
        mask = torch.ones(t, t, dtype=torch.bool)
        for i in range(first, t):
            few = best(coefficients[i], c["coefficients"])
            mask[i] = False
            mask[i, best(coefficients[i, few] @ sharp[few], keep)] = True
        s = q @ k.T / math.sqrt(d)
        loss = (coefficients @ basis - torch.softmax(s, -1)).square().sum(-1)[first:].mean()
        return masked_softmax(s, mask) @ v, loss

    return by_head(one)(q, k, v)


def vsa(q, k, v, w, c, before):
    """VSAWindowAttention of ViTAE-Transformer/ViTAE-VSA on one frame, after its projection to q, k and v."""
    ws, (x, _, frames, rows, cols) = c["window"], c["grid"]
    b, h, t, d = q.shape
    assert frames == 1
    down, across = -(-rows // ws), -(-cols // ws)
    height, width = down * ws, across * ws
    group = h // k.shape[1]
    fill = (0, width - cols, 0, height - rows)
    picture = lambda y: F.pad(y.transpose(-1, -2).reshape(-1, y.shape[-1], rows, cols), fill)
    mean = F.leaky_relu(F.avg_pool2d(picture(x), ws))
    predict = lambda name: F.conv2d(mean, w[f"{name}.weight"][..., None, None], w[f"{name}.bias"])
    offset, scale = (predict(f"sampling_{x}").reshape(b * h, 2, down, across) for x in ("offsets", "scales"))
    offset = offset / torch.tensor([cols // ws, rows // ws]).view(1, 2, 1, 1)
    line = lambda n: torch.linspace(-1, 1, n)
    pixel = torch.stack(torch.meshgrid(line(height), line(width), indexing="ij")[::-1])
    centre = F.avg_pool2d(pixel[None], ws).view(1, 2, down, 1, across, 1)
    near = lambda n: (torch.arange(ws) - (ws - 1) / 2) * 2 / (n - 1)
    around = torch.stack(torch.meshgrid(near(height), near(width), indexing="ij")[::-1]).view(1, 2, 1, ws, 1, ws)
    stretch, move = scale.view(-1, 2, down, 1, across, 1), offset.view(-1, 2, down, 1, across, 1)
    where = (centre + around * (1 + stretch) + move).expand(-1, -1, -1, ws, -1, ws)
    where = where.permute(0, 2, 3, 4, 5, 1).reshape(b * h, height, width, 2)
    heads = lambda y: picture(y.repeat_interleave(group, 1).flatten(0, 1))
    sample = lambda y: F.grid_sample(heads(y), where, padding_mode="zeros", align_corners=True)
    split = lambda y: y.reshape(b, h, -1, down, ws, across, ws).permute(0, 3, 5, 1, 4, 6, 2)
    windows = lambda y: split(y).reshape(b * down * across, h, ws * ws, -1)
    place = torch.stack(torch.meshgrid(torch.arange(ws), torch.arange(ws), indexing="ij")).flatten(1)
    apart_by = (place[:, :, None] - place[:, None, :]) + ws - 1
    bias = w["relative_position_bias_table"][apart_by[0] * (2 * ws - 1) + apart_by[1]].permute(2, 0, 1)
    qw, kw, vw = windows(picture(q.flatten(0, 1))), windows(sample(k)), windows(sample(v))
    out = torch.softmax(qw @ kw.transpose(-1, -2) / math.sqrt(d) + bias, -1) @ vw
    out = out.view(b, down, across, h, ws, ws, d).permute(0, 3, 6, 1, 4, 2, 5).reshape(b, h, d, height, width)
    return out[..., :rows, :cols].flatten(3).transpose(-1, -2), None


def weights_of(rng, shapes):
    return {name: torch.tensor(rng.standard_normal(shape) * size) for name, (shape, size) in shapes.items()}


def sea_shapes(h, hkv, d, hidden, c):
    e, n = 2 * d, c["channels"]
    return {
        "performer.projection": ((c["features"], d), 1.0),
        "encoder.weight": ((e, 3 * d), 0.3),
        "encoder.bias": ((e,), 0.1),
        "encoder.norm.weight": ((e,), 1.0),
        "encoder.norm.bias": ((e,), 0.1),
        "decoder.weight": ((n * c["width"] // 4, e), 0.3),
        "decoder.bias": ((n * c["width"] // 4,), 0.1),
        "conv1.weight": ((n * h, n * h, 3, 3), 0.2),
        "conv1.bias": ((n * h,), 0.1),
        "conv2.weight": ((h, n * h, 1, 1), 0.3),
        "map.norm.weight": ((c["width"],), 1.0),
        "map.norm.bias": ((c["width"],), 0.1),
        "scale.weight": ((2, e), 0.3),
        "scale.bias": ((2,), 0.3),
    }


NONE = lambda h, hkv, d, hidden, c: {}
GATE = lambda h, hkv, d, hidden, c: {
    "gate.q": ((h, d, c["gate_dim"]), 0.5),
    "gate.k": ((hkv, 3 * d, c["gate_dim"]), 0.5),
}
DELTA = lambda h, hkv, d, hidden, c: {"dt_proj.weight": ((hkv, hkv * d), 0.5), "a": ((hkv,), 1.0)}

def predictor(h, hkv, d, hidden, c):
    tokens = c["grid"][0] + math.prod(c["grid"][1:])
    narrow, basis = d // c["reduce_channels"], (tokens, tokens // c["reduce_tokens"])
    return {
        "proj_q.weight": ((narrow, d), 0.5),
        "proj_q.bias": ((narrow,), 0.3),
        "proj_k.weight": ((narrow, d), 0.5),
        "proj_k.bias": ((narrow,), 0.3),
        "proj_n": (basis, 0.3),
        "proj_back_n": (basis, 0.3),
    }


WINDOWS = lambda h, hkv, d, hidden, c: {
    "sampling_offsets.weight": ((2 * h, hidden), 0.3),
    "sampling_offsets.bias": ((2 * h,), 0.3),
    "sampling_scales.weight": ((2 * h, hidden), 0.3),
    "sampling_scales.bias": ((2 * h,), 0.3),
    "relative_position_bias_table": (((2 * c["window"] - 1) ** 2, h), 0.5),
}

# system, f, parameter shapes, (B, H, Hkv, T, D), parameters
CASES = [
    ("seerattention", seerattention, GATE, (1, 4, 2, 70, 8),
     dict(learn=True, block_size=8, topk=3, threshold=0.0, gate_dim=6, rope_base=100.0)),
    ("seerattention", seerattention, GATE, (2, 2, 1, 72, 8),
     dict(learn=True, block_size=16, topk=0, threshold=0.1, gate_dim=8, rope_base=10000.0)),
    ("dynamic-mask-attention", dynamic_mask, DELTA, (1, 4, 2, 70, 8),
     dict(keep_window=12)),
    ("landmark-attention", landmark, NONE, (1, 4, 2, 40, 8),
     dict(block_size=7, topk=0)),
    ("landmark-attention", landmark, NONE, (2, 2, 1, 45, 8),
     dict(block_size=6, topk=2)),
    ("ssa", ssa, NONE, (2, 2, 1, 45, 8),
     dict(block_size=6, topk=3, mode="sparse")),
    ("ssa", ssa, NONE, (1, 2, 2, 45, 8),
     dict(block_size=6, topk=3, mode="full")),
    ("core-context-attention", core_context, NONE, (1, 4, 2, 45, 8),
     dict(group_size=4, window=8)),
    ("core-context-attention", core_context, NONE, (1, 2, 2, 33, 8),
     dict(group_size=3, window=6)),
    ("sea-estimated-mask", sea, sea_shapes, (2, 2, 1, 34, 8),
     dict(width=8, keys=5, features=12, channels=2, distil=True)),
    ("sparsifiner", sparsifiner, predictor, (1, 4, 2, 31, 8),
     dict(keep_rate=0.25, reduce_tokens=4, reduce_channels=2, coefficients=3, basis_threshold=0.02, distil=True,
          grid=[1, 1, 5, 6])),
    ("vsa-window", vsa, WINDOWS, (2, 2, 1, 54, 6),
     dict(window=3, grid=[0, 1, 6, 9])),
    ("vsa-window", vsa, WINDOWS, (1, 2, 2, 70, 6),
     dict(window=4, grid=[0, 1, 7, 10])),
]


def make(index, seed):
    system, f, shapes, (b, h, hkv, t, d), params = CASES[index]
    rng = np.random.default_rng(seed)
    hidden = h * d
    single = lambda x: torch.tensor(x.astype(np.float32)).double()
    q, k, v, q0, k0 = (single(rng.standard_normal((b, n, t, d))) for n in (h, hkv, hkv, h, hkv))
    w = {n: y.float().double() for n, y in weights_of(rng, shapes(h, hkv, d, hidden, params)).items()}
    grid = params.get("grid")
    x = single(rng.standard_normal((b, t, hidden)))
    out, loss = f(q, k, v, w, params | dict(grid=(x, *grid)) if grid else params, (q0, k0))
    name = f"{system}.{index}"
    tensors = {f"{name}.{n}": y for n, y in dict(q=q, k=k, v=v, out=out).items()}
    if f is vsa:
        tensors[f"{name}.x"] = x
    if f is seerattention:
        tensors |= {f"{name}.q0": q0, f"{name}.k0": k0}
    tensors |= {f"{name}.w.{n}": y for n, y in w.items()}
    if loss is not None:
        tensors[f"{name}.loss"] = loss
    given = {n: y for n, y in params.items() if n != "grid"}
    about = dict(name=name, system=system, params=given, heads=h, kv_heads=hkv, head_dim=d, hidden=hidden,
                 causal=grid is None, grid=grid, tolerance=2e-5)
    return {n: y.float().contiguous().numpy() for n, y in tensors.items()}, about


def main():
    tensors, meta = {}, []
    for i in range(len(CASES)):
        seed = 100 * i
        while True:
            try:
                made, about = make(i, seed)
                break
            except AssertionError as e:
                print(f"{CASES[i][0]} seed {seed}: {e}")
                seed += 1
        print(f"{about['name']}: seed {seed}")
        tensors |= made
        meta.append(about)
    save_file(tensors, "goldens/mixers_lm.safetensors", {"cases": json.dumps(meta)})


if __name__ == "__main__":
    main()
