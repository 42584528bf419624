"""Perplexity of the first tokens of a text under llama.cpp, to hold against `Model::nll`.

    python benches/peers/llama_ppl.py MODEL.gguf TEXT [TOKENS=2048]

Needs the package `llama-cpp-python`. The text's first TOKENS tokens run as one context (flash
attention off, f32 K/V); the perplexity is over tokens 1.. given all before. Prints one JSON line.
"""

import json
import sys
import time

import llama_cpp
import numpy as np


def without_repacking():
    """Weights as stored: the AMX path of release 0.3.36 executes tile loads on threads whose tiles
    it has not configured, and dies with an illegal instruction."""
    defaults = llama_cpp.llama_model_default_params

    def params():
        p = defaults()
        p.use_extra_bufts = False
        return p

    llama_cpp.llama_cpp.llama_model_default_params = params
    llama_cpp.llama_model_default_params = params


def main(model, text, tokens=2048):
    without_repacking()
    llama = llama_cpp.Llama(
        model,
        n_ctx=tokens,
        n_batch=512,
        n_threads=2,
        n_threads_batch=2,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    raw = open(text, "rb").read()[: 16 * tokens]
    ids = llama.tokenize(raw.decode("utf-8", "ignore").encode(), add_bos=False, special=False)[:tokens]
    begin = time.perf_counter()
    llama.eval(ids)
    seconds = time.perf_counter() - begin
    nll = 0.0
    for i in range(len(ids) - 1):
        row = np.asarray(llama.scores[i], np.float64)
        top = row.max()
        nll += top + np.log(np.exp(row - top).sum()) - row[ids[i + 1]]
    ppl = float(np.exp(nll / (len(ids) - 1)))
    print(json.dumps({"tokens": len(ids), "perplexity": round(ppl, 4), "seconds": round(seconds, 3), "first_ids": ids[:8]}))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
