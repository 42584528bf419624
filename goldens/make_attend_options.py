"""Goldens of the options of exact attention: by autograd in f64 with PyTorch, from the plainest formulas.

Writes attend_options.safetensors beside this file: operands (stored as f32), and for each case the outputs and the
gradients of <out, dout> + <lse, dlse>, computed in f64 and stored as f32. A query's own position is TK - TQ + i (in a
ragged batch, that of its sequence); a band of (left, right) holds `left` keys up to it, itself included, and `right`
after it; a bias is added after the softcap; a sink is a logit in the denominator only.

    python goldens/make_attend_options.py
"""

from math import log
from pathlib import Path

import torch
from safetensors.torch import save_file

H, HKV, TQ, TK, D, DV, R = 4, 2, 13, 17, 6, 5, 3
SCALE, CAP, BAND, LEFT, DISTANCES = 0.7, 3.0, (4, 3), 5, 9
# The second sequence has no query, the third no key.
CU_Q, CU_K = [0, 5, 5, 8, 13], [0, 4, 9, 9, 17]
torch.manual_seed(20261123)
torch.set_num_threads(1)


def leaf(*shape):
    return torch.randn(shape).double().requires_grad_()


def attend(x, causal=False, band=False, softcap=False, sinks=False, bias=None, ragged=False, sigmoid=False):
    own = torch.arange(TQ) + TK - TQ
    j = torch.arange(TK)
    hidden = torch.zeros(TQ, TK, dtype=torch.bool)
    if ragged:
        for q0, q1, k0, k1 in zip(CU_Q, CU_Q[1:], CU_K, CU_K[1:]):
            own[q0:q1] = torch.arange(q1 - q0) + k1 - (q1 - q0)
            hidden[q0:q1] = (j < k0) | (j >= k1)
    distance = j - own[:, None]
    if causal:
        hidden |= distance > 0
    if band:
        hidden |= (distance <= -BAND[0]) | (distance > BAND[1])
    s = SCALE * x["q"] @ x["k"].repeat_interleave(H // HKV, 0).transpose(1, 2)
    if softcap:
        s = CAP * torch.tanh(s / CAP)
    if bias == "slopes":
        s = s - x["slopes"][:, None, None] * distance.abs()
    if bias == "keys":
        s = s + x["keys"][:, None]
    if bias == "table":
        s = s + x["table"][:, (distance + LEFT).clamp(0, DISTANCES - 1)]
    if bias == "factors":
        s = s + x["fq"] @ x["fk"].transpose(1, 2)
    v = x["v"].repeat_interleave(H // HKV, 0)
    if sigmoid:
        out = torch.where(hidden, 0, torch.sigmoid(s - log(TK))) @ v
        return out, None
    s = s.masked_fill(hidden, -torch.inf)
    full = torch.cat([s, x["sinks"][:, None, None].expand(H, TQ, 1)], 2) if sinks else s
    none = hidden.all(1) & (not sinks)
    lse = full.masked_fill(none[:, None], 0).logsumexp(2).masked_fill(none, -torch.inf)
    p = torch.where(hidden, 0, (s - lse.masked_fill(none, 0)[..., None]).exp())
    return p @ v, lse


CASES = {
    "softcap_sinks": {"causal": True, "softcap": True, "sinks": True},
    "band": {"band": True},
    "band_sinks": {"band": True, "sinks": True},
    "slopes": {"causal": True, "bias": "slopes"},
    "keys": {"causal": True, "bias": "keys"},
    "table": {"bias": "table", "softcap": True},
    "factors": {"bias": "factors", "softcap": True, "band": True},
    "ragged": {"ragged": True, "causal": True},
    "ragged_table": {"ragged": True, "band": True, "bias": "table", "sinks": True},
    "ragged_factors": {"ragged": True, "bias": "factors"},
    "sigmoid_factors": {"sigmoid": True, "causal": True, "bias": "factors"},
}


def main():
    leaves = {"q": leaf(H, TQ, D), "k": leaf(HKV, TK, D), "v": leaf(HKV, TK, DV), "sinks": leaf(H)}
    leaves |= {"slopes": leaf(H), "keys": leaf(H, TK), "table": leaf(H, DISTANCES)}
    leaves |= {"fq": leaf(H, TQ, R), "fk": leaf(H, TK, R)}
    x = leaves | {"dout": torch.randn(H, TQ, DV).double(), "dlse": torch.randn(H, TQ).double()}
    file = dict(x)
    for name, options in CASES.items():
        out, lse = attend(x, **options)
        file[f"{name}.out"] = out
        loss = (out * x["dout"]).sum()
        if lse is not None:
            file[f"{name}.lse"] = lse
            loss = loss + (lse * x["dlse"])[lse.isfinite()].sum()
        for leaf_name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)):
            if g is not None:
                file[f"{name}.d{leaf_name}"] = g
    save_file({k: v.detach().float().contiguous() for k, v in file.items()}, Path(__file__).parent / "attend_options.safetensors")


if __name__ == "__main__":
    main()
