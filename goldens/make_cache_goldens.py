"""Goldens of the KV cache policies: slow NumPy renditions of each paper's definition.

Writes cache.safetensors beside this file: one layer's inputs (queries, keys before and after
rotation, values, projection weights, moments) and, per policy, the outputs of all tokens decoded
after the prompt, one at a time. Everything is computed in f64 from f32 inputs.

    python goldens/make_cache_goldens.py
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

T, PROMPT, D, H, HKV, HIDDEN = 72, 24, 8, 4, 2, 20
GROUP, SCALE = H // HKV, D**-0.5
rng = np.random.default_rng(20261122)


def f32(a):
    return a.astype(np.float32).astype(np.float64)


def rotate(x):
    """Rotary embedding of (heads, T, D), pairs (c, c + D/2)."""
    freq = 10000.0 ** (-2.0 * np.arange(D // 2) / D)
    a = np.arange(T)[:, None] * freq
    lo, hi = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([lo * np.cos(a) - hi * np.sin(a), hi * np.cos(a) + lo * np.sin(a)], -1)


def heads(x):
    return x.reshape(T, -1, D).transpose(1, 0, 2)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


# Inputs that drift, so that neighbouring queries resemble each other.
x = np.zeros((T, HIDDEN))
x[0] = rng.normal(size=HIDDEN)
for t in range(1, T):
    x[t] = 0.97 * x[t - 1] + np.sqrt(1 - 0.97**2) * rng.normal(size=HIDDEN)
x = f32(x * rng.uniform(0.3, 1.7, HIDDEN))
wq = rng.normal(size=(H * D, HIDDEN)) * 3 / np.sqrt(HIDDEN)
wk = f32(rng.normal(size=(HKV * D, HIDDEN)) * 2 / np.sqrt(HIDDEN))
wv = f32(rng.normal(size=(HKV * D, HIDDEN)) / np.sqrt(HIDDEN))
bk, bv = f32(0.3 * rng.normal(size=HKV * D)), f32(0.3 * rng.normal(size=HKV * D))
k_pre, v = f32(heads(x @ wk.T + bk)), f32(heads(x @ wv.T + bv))
q, k = f32(rotate(heads(x @ wq.T))), f32(rotate(k_pre))
key_moment = np.einsum("hti,htj->hij", k, k)
key_pre_moment = np.einsum("hti,htj->hij", k_pre, k_pre)
input_moment = x.T @ x


def think(ratio, recent, obs):
    out = np.zeros((T - PROMPT, H, D))
    block = max(recent, 32)
    kept = []
    for g in range(HKV):
        qs = q[g * GROUP : (g + 1) * GROUP, PROMPT - obs : PROMPT]
        # Frobenius norm of the logit contribution of channel c, all observed rows of the group.
        score = [np.linalg.norm(np.outer(qs[:, :, c].ravel(), k[g, :PROMPT, c])) for c in range(D)]
        drop = np.argsort(score)[: int(ratio * D)]
        kept.append(np.setdiff1d(np.arange(D), drop))
    pruned = PROMPT - recent
    for t in range(PROMPT, T):
        for h in range(H):
            g, c = h // GROUP, kept[h // GROUP]
            old = k[g, :pruned][:, c] @ q[h, t, c]
            new = k[g, pruned : t + 1] @ q[h, t]
            out[t - PROMPT, h] = softmax(SCALE * np.concatenate([old, new])) @ v[g, : t + 1]
        if t + 1 - pruned >= recent + block:
            pruned += block
    assert pruned > PROMPT
    return out


def loki(rank, topk):
    out = np.zeros((T - PROMPT, H, D))
    for h in range(H):
        g = h // GROUP
        values, p = np.linalg.eigh(key_moment[g])
        p = p[:, np.argsort(-values)]
        for t in range(PROMPT, T):
            keys, qp = k[g, : t + 1] @ p, q[h, t] @ p
            d = round(rank * D)
            approx = keys[:, :d] @ qp[:d]
            best = np.argsort(-approx, kind="stable")[: int(topk * (t + 1))]
            out[t - PROMPT, h] = softmax(SCALE * (keys[best] @ qp)) @ v[g, best]
    return out


def tokenselect(topk, sinks, local, threshold):
    out = np.zeros((T - PROMPT, H, D))
    cached_query = cached = None
    fresh = reused = 0
    for t in range(PROMPT, T):
        n = t + 1
        flat = q[:, t].ravel()
        if sinks + topk + local >= n:
            read = np.arange(n)
        else:
            cos = -2 if cached is None else flat @ cached_query / np.linalg.norm(flat) / np.linalg.norm(cached_query)
            if cos < threshold:
                vote = sum(softmax(k[h // GROUP, sinks : n - local] @ q[h, t]) for h in range(H))
                cached, cached_query = np.argsort(-vote, kind="stable")[:topk] + sinks, flat
                fresh += 1
            else:
                reused += 1
            read = np.concatenate([np.arange(sinks), np.sort(cached), np.arange(n - local, n)])
        for h in range(H):
            g = h // GROUP
            out[t - PROMPT, h] = softmax(SCALE * (k[g, read] @ q[h, t])) @ v[g, read]
    assert fresh > 3 and reused > 3, (fresh, reused)
    return out


def alisa(ratio, steps):
    out = np.zeros((T - PROMPT, H, D))
    weights = np.zeros((T, T))  # summed over heads
    for t in range(PROMPT):
        for h in range(H):
            weights[t, : t + 1] += softmax(SCALE * (k[h // GROUP, : t + 1] @ q[h, t]))
    for t in range(PROMPT, T):
        n = t + 1
        half = max(1, int(np.floor(n * ratio / 2 + 0.5)))
        last = steps if steps else half
        s = weights[max(0, t - last) : t, : n - half].sum(0)
        chosen = [j for j in np.argsort(-s, kind="stable")[:half] if s[j] > 0]
        read = np.concatenate([np.sort(chosen).astype(int), np.arange(n - half, n)])
        for h in range(H):
            g = h // GROUP
            p = softmax(SCALE * (k[g, read] @ q[h, t]))
            weights[t, read] += p
            out[t - PROMPT, h] = p @ v[g, read]
    return out


def palu(rank_ratio, group, whiten, value_weight, sinks=0):
    total = round(2 * rank_ratio * group * D)
    rv = min(group * D, total - 1, max(total - group * D, round(total * value_weight / (1 + value_weight))))

    def low_rank(w, r):
        """The rank-r replacement of W, applied to the layer's inputs."""
        parts = []
        for rows in w.reshape(HKV // group, group * D, HIDDEN):
            s = np.linalg.cholesky(input_moment) if whiten else np.eye(HIDDEN)
            u, sigma, vt = np.linalg.svd(rows @ s, full_matrices=False)
            a = np.diag(np.sqrt(sigma[:r])) @ vt[:r] @ np.linalg.inv(s)
            b = u[:, :r] @ np.diag(np.sqrt(sigma[:r]))
            parts.append((x @ a.T) @ b.T)  # latents, then rebuilt
        return np.concatenate(parts, 1)

    kr, vr = rotate(heads(low_rank(wk, total - rv) + bk)), heads(low_rank(wv, rv) + bv)
    kr[:, :sinks], vr[:, :sinks] = k[:, :sinks], v[:, :sinks]
    out = np.zeros((T - PROMPT, H, D))
    for t in range(PROMPT, T):
        for h in range(H):
            g = h // GROUP
            out[t - PROMPT, h] = softmax(SCALE * (kr[g, : t + 1] @ q[h, t])) @ vr[g, : t + 1]
    return out


tensors = {
    "q": q,
    "k_pre": k_pre,
    "k": k,
    "v": v,
    "wk": wk,
    "wv": wv,
    "bk": bk,
    "bv": bv,
    "key_moment": key_moment,
    "key_pre_moment": key_pre_moment,
    "input_moment": input_moment,
    "think:ratio=0.5,recent=4,obs=16": think(0.5, 4, 16),
    "loki:rank=0.25,topk=0.25": loki(0.25, 0.25),
    "tokenselect:topk=6,sinks=2,local=4,threshold=0.8": tokenselect(6, 2, 4, 0.8),
    "alisa:ratio=0.4,steps=3": alisa(0.4, 3),
    "alisa:ratio=0.3,steps=0": alisa(0.3, 0),
    "palu:rank_ratio=0.5,group=2": palu(0.5, 2, True, 2.0),
    "palu:rank_ratio=0.8,group=2,value_weight=1.5": palu(0.8, 2, True, 1.5),
    "palu:rank_ratio=0.25,group=1,whiten=false,value_weight=1,sinks=3": palu(0.25, 1, False, 1.0, 3),
}
keep_f64 = {"key_moment", "key_pre_moment", "input_moment"}
save_file(
    {n: np.ascontiguousarray(a if n in keep_f64 else a.astype(np.float32)) for n, a in tensors.items()},
    str(Path(__file__).parent / "cache.safetensors"),
)
