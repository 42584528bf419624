"""Perplexity of the first tokens of a text under llama.cpp, to hold against `Model::nll`.

    python benches/peers/llama_ppl.py MODEL.gguf TEXT [TOKENS=2048] [repack=1]

Needs the packages of requirements.txt. The text's first TOKENS tokens run as one context (flash
attention off, f32 K/V); the perplexity is over tokens 1.. given all before. Prints one JSON line.
`repack=0` reads the weights as stored; llama.py says when that is needed.
"""

import json
import sys
import time

import numpy as np

from llama import Llama


def main(model, text, tokens=2048, repack=True):
    llama = Llama(model, flash=False, kv="f32", ubatch=512, repack=repack)
    raw = open(text, "rb").read()[: 16 * tokens]
    ids = llama.tokenize(raw.decode("utf-8", "ignore"))[:tokens]
    begin = time.perf_counter()
    nll = 0.0
    for row, target in zip(llama.all_logits(ids), ids[1:] + [None]):
        if target is None:
            break
        row = np.asarray(row, np.float64)
        top = row.max()
        nll += top + np.log(np.exp(row - top).sum()) - row[target]
    ppl = float(np.exp(nll / (len(ids) - 1)))
    seconds = time.perf_counter() - begin
    print(json.dumps({"tokens": len(ids), "perplexity": round(ppl, 4), "seconds": round(seconds, 3), "first_ids": ids[:8]}))


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if not a.startswith("repack=")]
    if len(args) not in (2, 3):
        sys.exit(__doc__)
    main(args[0], args[1], *map(int, args[2:]), repack="repack=0" not in sys.argv)
