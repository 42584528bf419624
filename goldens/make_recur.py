"""Goldens of the linear recurrences: token by token in f64 with PyTorch, gradients by autograd.

Writes recur.safetensors beside this file: for each gate the inputs (f32), the outputs and final state,
and the gradients of <out, dout> + <last, dlast>, all computed in f64 and stored as f32. Each gate is written as its paper states it, in
the paper's own orientation of the state where that differs from (key, value).

    python goldens/make_recur.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

H, T, D, DV = 2, 67, 8, 6
SCALE = D**-0.5
torch.manual_seed(20261122)
torch.set_num_threads(1)


def f32(x):
    return x.float().double()


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def leaf(x):
    return f32(x).detach().requires_grad_()


def read(q, state):
    """state (key, value)."""
    return SCALE * q @ state


def identity(x, t, h, s):
    return s + torch.outer(x["k"][h, t], x["v"][h, t])


def scalar(x, t, h, s):
    return x["g"][h, t].exp() * s + torch.outer(x["k"][h, t], x["v"][h, t])


def channel(x, t, h, s):
    return torch.diag(x["g"][h, t].exp()) @ s + torch.outer(x["k"][h, t], x["v"][h, t])


def delta(x, t, h, s):
    # DeltaNet, state (value, key): S = S (I - beta k k^T) + beta v k^T.
    k, beta = x["k"][h, t], x["beta"][h, t, 0]
    s = s.T @ (torch.eye(D, dtype=torch.float64) - beta * torch.outer(k, k))
    return (s + beta * torch.outer(x["v"][h, t], k)).T


def gated_delta(x, t, h, s):
    # Gated DeltaNet, state (value, key): S = S (alpha (I - beta k k^T)) + beta v k^T.
    k, beta, alpha = x["k"][h, t], x["beta"][h, t, 0], x["g"][h, t, 0].exp()
    s = s.T @ (alpha * (torch.eye(D, dtype=torch.float64) - beta * torch.outer(k, k)))
    return (s + beta * torch.outer(x["v"][h, t], k)).T


def channel_delta(x, t, h, s):
    # Kimi Delta Attention: S = (I - beta k k^T) Diag(alpha) S + beta k v^T.
    k, beta = x["k"][h, t], x["beta"][h, t, 0]
    s = (torch.eye(D, dtype=torch.float64) - beta * torch.outer(k, k)) @ torch.diag(x["g"][h, t].exp()) @ s
    return s + beta * torch.outer(k, x["v"][h, t])


def low_rank(x, t, h, s):
    # RWKV-7, state (value, key): S = S (diag(w) + b^T a) + v^T k with rows as vectors.
    s = s.T @ (torch.diag(x["g"][h, t].exp()) + torch.outer(x["b"][h, t], x["a"][h, t]))
    return (s + torch.outer(x["v"][h, t], x["k"][h, t])).T


def ssd(x, t, h, s):
    # Mamba-2: h = exp(dt A) h + dt B x.
    dt = x["dt"][h, t, 0]
    return (dt * x["fixed"][h]).exp() * s + torch.outer(dt * x["k"][h, t], x["v"][h, t])


def selective(x, t, h, s):
    # Mamba, state (channel, state): h = exp(dt A) h + (dt B) x.
    dt = x["dt"][h, t]
    s = (dt[:, None] * x["fixed"][h]).exp() * s.T + dt[:, None] * x["k"][h, t][None] * x["v"][h, t][:, None]
    return s.T


def inputs(name):
    x = {"q": leaf(torch.randn(H, T, D)), "k": torch.randn(H, T, D), "v": leaf(torch.randn(H, T, DV))}
    if name in ("delta", "gated_delta", "channel_delta"):
        x["k"] = unit(x["k"])
        x["beta"] = leaf(torch.rand(H, T, 1))
    x["k"] = leaf(x["k"])
    if name in ("scalar", "gated_delta"):
        x["g"] = leaf(-0.3 * torch.rand(H, T, 1) ** 2)
    if name in ("channel", "channel_delta", "low_rank"):
        x["g"] = leaf(-0.3 * torch.rand(H, T, D) ** 2)
    if name == "low_rank":
        b = unit(torch.randn(H, T, D))
        x["a"], x["b"] = leaf(-b * torch.rand(H, T, D)), leaf(b)
    if name == "ssd":
        x["dt"], x["fixed"] = leaf(0.2 * torch.rand(H, T, 1)), leaf(-2 * torch.rand(H))
    if name == "selective":
        x["dt"], x["fixed"] = leaf(0.2 * torch.rand(H, T, DV)), leaf(-(1 + torch.rand(H, DV, D) * D))
    x["initial"] = leaf(torch.randn(H, D, DV))
    return x


saved = {}
for rule in (identity, scalar, channel, delta, gated_delta, channel_delta, low_rank, ssd, selective):
    name = rule.__name__
    x = inputs(name)
    outs, lasts = [], []
    for h in range(H):
        s = x["initial"][h]
        rows = []
        for t in range(T):
            s = rule(x, t, h, s)
            rows.append(read(x["q"][h, t], s))
        outs.append(torch.stack(rows))
        lasts.append(s)
    out, last = torch.stack(outs), torch.stack(lasts)
    dout, dlast = f32(torch.randn(H, T, DV)), f32(torch.randn(H, D, DV))
    ((out * dout).sum() + (last * dlast).sum()).backward()
    for key, value in x.items():
        saved[f"{name}.{key}"] = value.detach().float()
        saved[f"{name}.grad.{key}"] = value.grad.clone()
    saved[f"{name}.dout"], saved[f"{name}.dlast"] = dout, dlast
    saved[f"{name}.out"], saved[f"{name}.last"] = out.detach(), last.detach()

save_file({k: v.float().contiguous() for k, v in saved.items()}, Path(__file__).with_name("recur.safetensors"))
