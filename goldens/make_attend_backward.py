"""Goldens of the backward pass of attention: by autograd in f64 with PyTorch, from the plainest formulas.

Writes attend_backward.safetensors beside this file: operands (stored as f32), and for each case the outputs
and the gradients of <out, dout> + <lse, dlse>, computed in f64 and stored as f32. The causal mask is aligned
bottom-right; a window counts the query's own key; a sink is a logit in the denominator only; the sigmoid
normaliser has no denominator, and no log-sum-exp.

    python goldens/make_attend_backward.py
"""

from math import log
from pathlib import Path

import torch
from safetensors.torch import save_file

H, HKV, TQ, TK, D, DV = 4, 2, 13, 17, 6, 5
SCALE, CAP, WINDOW = 0.7, 3.0, 6
torch.manual_seed(20261122)
torch.set_num_threads(1)


def leaf(*shape):
    return torch.randn(shape).double().requires_grad_()


def scores(x, causal, window, softcap, bias):
    k = x["k"].repeat_interleave(H // HKV, 0)
    s = SCALE * x["q"] @ k.transpose(1, 2)
    if softcap:
        s = CAP * torch.tanh(s / CAP)
    if bias:
        s = s + x["bias"]
    i, j = torch.arange(TQ)[:, None] + TK - TQ, torch.arange(TK)
    hidden = torch.zeros(TQ, TK, dtype=torch.bool)
    if causal:
        hidden |= j > i
    if window:
        hidden |= j <= i - WINDOW
    return s.masked_fill(hidden, -torch.inf)


def softmax(x, sinks=False, **mask):
    s = scores(x, **mask)
    full = torch.cat([s, x["sinks"][:, None, None].expand(H, TQ, 1)], 2) if sinks else s
    lse = full.logsumexp(2)
    v = x["v"].repeat_interleave(H // HKV, 0)
    out = (s - lse[..., None]).exp() @ v
    return out, (out * x["dout"]).sum() + (lse * x["dlse"]).sum(), lse


def sigmoid(x, **mask):
    out = torch.sigmoid(scores(x, **mask) - log(TK)) @ x["v"].repeat_interleave(H // HKV, 0)
    return out, (out * x["dout"]).sum(), None


PLAIN = {"causal": False, "window": False, "softcap": False, "bias": False}
CASES = {
    "full": (softmax, PLAIN),
    "causal": (softmax, PLAIN | {"causal": True}),
    "window": (softmax, PLAIN | {"causal": True, "window": True}),
    "softcap": (softmax, PLAIN | {"causal": True, "softcap": True}),
    "sinks": (softmax, PLAIN | {"causal": True, "sinks": True}),
    "all": (softmax, {"causal": True, "window": True, "softcap": True, "bias": True, "sinks": True}),
    "sigmoid": (sigmoid, PLAIN),
    "sigmoid_all": (sigmoid, {"causal": True, "window": True, "softcap": True, "bias": True}),
}


def main():
    x = {"q": leaf(H, TQ, D), "k": leaf(HKV, TK, D), "v": leaf(HKV, TK, DV), "bias": leaf(H, TQ, TK), "sinks": leaf(H)}
    leaves = dict(x)
    x |= {"dout": torch.randn(H, TQ, DV).double(), "dlse": torch.randn(H, TQ).double()}
    file = dict(x)
    for name, (f, options) in CASES.items():
        out, loss, lse = f(x, **options)
        file[f"{name}.out"] = out
        if lse is not None:
            file[f"{name}.lse"] = lse
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        file |= {f"{name}.d{k}": g for k, g in zip(leaves, grads) if g is not None}
    save_file({k: v.detach().float().contiguous() for k, v in file.items()}, Path(__file__).with_name("attend_backward.safetensors"))


main()
