"""Golden numbers of the convolutions and of feature attention.

Every function states its operation densely in float64 PyTorch, in the words of its paper, and autograd gives the
gradients; nothing is shared with the Rust code. Inputs are rounded to float32 first, so that both sides see the same
numbers. Run from the repository root; writes goldens/conv.safetensors: `<case>.<name>` in float32, plus the loss's
output gradient `<case>.dy`.
"""

import numpy as np
import torch
from safetensors.numpy import save_file

OUT = {}


def rng(seed):
    return np.random.default_rng(seed)


def leaf(x):
    return torch.tensor(np.asarray(x, dtype=np.float32)).double().requires_grad_(True)


def keep(case, y, dy_seed, **leaves):
    """Record leaves, output, output gradient and gradients."""
    dy = torch.tensor(rng(dy_seed).standard_normal(tuple(y.shape)).astype(np.float32)).double()
    y.backward(dy)
    for name, x in leaves.items():
        OUT[f"{case}.{name}"] = x.detach().numpy().astype(np.float32)
        OUT[f"{case}.d{name}"] = x.grad.numpy().astype(np.float32)
    OUT[f"{case}.y"] = y.detach().numpy().astype(np.float32)
    OUT[f"{case}.dy"] = dy.numpy().astype(np.float32)


def long(case, b, c, t, l, circular):
    """Hyena's operator: pad, rfft, product, irfft, skip (circular: no padding)."""
    r = rng(1)
    h, u, d = leaf(r.standard_normal((c, l)) / l**0.5), leaf(r.standard_normal((b, c, t))), leaf(r.standard_normal(c))
    n = t if circular else 2 * t
    y = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(h, n=n), n=n)[..., :t] + u * d[:, None]
    keep(case, y, 2, h=h, u=u, d=d)


def short(case, b, c, t, width, silu):
    """A grouped conv1d over the state and the input, cropped; SiLU."""
    r = rng(3)
    x, w = leaf(r.standard_normal((b, c, t))), leaf(r.standard_normal((c, width)))
    bias, past = leaf(r.standard_normal(c)), leaf(r.standard_normal((b, c, width - 1)))
    y = torch.nn.functional.conv1d(torch.cat([past, x], -1), w[:, None], bias, groups=c)
    keep(case, torch.nn.functional.silu(y) if silu else y, 4, x=x, w=w, bias=bias, past=past)


def ema(case, b, c, t, n):
    """Mega's kernel form: Vandermonde powers of phi = 1 - alpha delta, then a direct causal convolution."""
    r = rng(5)
    alpha, delta = leaf(r.uniform(0.02, 0.98, (c, n))), leaf(r.uniform(0.02, 0.98, (c, n)))
    beta, eta = leaf(r.standard_normal((c, n))), leaf(r.standard_normal((c, n)))
    u = leaf(r.standard_normal((b, c, t)))
    phi = 1 - alpha * delta
    kernel = torch.einsum("cn,cnt->ct", eta * alpha * beta, phi[..., None] ** torch.arange(t))
    y = torch.stack([(kernel[:, : i + 1].flip(-1) * u[..., : i + 1]).sum(-1) for i in range(t)], -1)
    keep(case, y, 6, alpha=alpha, delta=delta, beta=beta, eta=eta, u=u)


def feature(case, b, h, hkv, tq, tk, r_, dv, causal, eps, weighted):
    """Dense kernelised attention: scores of positive features, weights of relative position, mask, division."""
    r = rng(7)
    q, k = leaf(np.exp(0.5 * r.standard_normal((b, h, tq, r_)))), leaf(np.exp(0.5 * r.standard_normal((b, hkv, tk, r_))))
    v = leaf(r.standard_normal((b, hkv, tk, dv)))
    a = q @ k.repeat_interleave(h // hkv, 1).transpose(-1, -2)
    leaves = dict(q=q, k=k, v=v)
    if weighted:
        c = leaf(np.exp(0.3 * r.standard_normal((h, 2 * tk - 1))))
        at = torch.arange(tq)[:, None] - torch.arange(tk)[None] + tk - 1
        a, leaves["c"] = a * c[:, at], c
    if causal:
        a = a.tril(tk - tq)
    y = a @ v.repeat_interleave(h // hkv, 1)
    keep(case, y if eps is None else y / (a.sum(-1, keepdim=True) + eps), 8, **leaves)


long("long.causal", 2, 3, 100, 100, False)
long("long.circular", 2, 2, 96, 96, True)
short("short.silu", 2, 5, 40, 4, True)
short("short.plain", 1, 20, 9, 3, False)
ema("ema", 2, 3, 80, 4)
feature("feature.full", 1, 4, 2, 30, 50, 6, 5, False, 0.1, False)
feature("feature.causal", 2, 2, 1, 140, 150, 4, 3, True, 1e-3, False)
feature("feature.plain", 1, 2, 2, 140, 140, 4, 3, True, None, False)
feature("feature.toeplitz", 1, 2, 1, 60, 60, 4, 3, False, 1e-3, True)
feature("feature.toeplitz-causal", 1, 2, 2, 60, 60, 4, 3, True, 1e-3, True)
save_file(OUT, "goldens/conv.safetensors")
