"""llama.cpp through the low-level functions of `llama-cpp-python`, for the other scripts of this folder.

    python benches/peers/llama.py MODEL.gguf [flash=0] [kv=f16] [ubatch=512] [threads=2] [repack=1]

As a program it answers the requests of `foveal bench model --serve` in the same words, on the same
made-up tokens.

`repack=1` lets llama.cpp repack weights for the instruction set, which is its fast path with AMX. Built
by GCC 12 that path dies with an illegal instruction, because the compiler drops most of the stores to
the tile configuration; built with `-fno-tree-dse -fno-dse` it works, see README.md in this folder.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as low

TYPES = {"f32": 0, "f16": 1, "bf16": 30}
# More tokens than any request of a decode benchmark adds after its prompt.
ROOM = 512
WARM_STEPS = 2
BATCH = 2048


@low.llama_log_callback
def silent(_level, _text, _data):
    pass


def token(position, vocab):
    """As in crates/foveal-lab/src/model_bench.rs."""
    base = 16 if vocab > 32 else 0
    return base + position * 7919 % (vocab - base)


class Llama:
    """A model and as many contexts as are asked for."""

    def __init__(self, path, flash=False, kv="f16", ubatch=512, threads=2, repack=True):
        low.llama_log_set(silent, ctypes.c_void_p(0))
        low.llama_backend_init()
        params = low.llama_model_default_params()
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        self.model = low.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self.vocab = low.llama_model_get_vocab(self.model)
        self.vocab_size = low.llama_vocab_n_tokens(self.vocab)
        self.flash, self.kv, self.ubatch, self.threads = flash, kv, ubatch, threads
        self.at_depth = {}

    def context(self, n):
        p = low.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = n, BATCH, self.ubatch
        p.n_threads = p.n_threads_batch = self.threads
        p.type_k = p.type_v = TYPES[self.kv]
        p.flash_attn_type = int(self.flash)
        context = low.llama_init_from_model(self.model, p)
        if not context:
            raise RuntimeError(f"llama.cpp refused a context of {n} tokens")
        return context

    def tokenize(self, text):
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        n = low.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), False, False)
        return list(ids[: max(n, 0)])

    def decode(self, context, ids):
        """Append tokens; logits of the last one are ready afterwards."""
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            # The batch only points at the ids, so they need a name until it has run.
            held = (ctypes.c_int32 * len(part))(*part)
            status = low.llama_decode(context, low.llama_batch_get_one(held, len(part)))
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
        low.llama_synchronize(context)

    def all_logits(self, ids):
        """Rows of logits of a text read as one context, one batch of rows at a time."""
        context = self.context(len(ids))
        batch = low.llama_batch_init(self.ubatch, 0, 1)
        for begin in range(0, len(ids), self.ubatch):
            part = ids[begin : begin + self.ubatch]
            batch.n_tokens = len(part)
            for i, t in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = t, begin + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if low.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            for i in range(len(part)):
                row = low.llama_get_logits_ith(context, i)
                yield np.ctypeslib.as_array(row, shape=(self.vocab_size,))
        low.llama_batch_free(batch)
        low.llama_free(context)

    def prompt(self, n):
        return [token(i, self.vocab_size) for i in range(n)]

    def time(self, request):
        if "prefill" in request:
            return self.time_prefill(request["prefill"]["tokens"])
        return self.time_decode(request["decode"]["depth"], request["decode"]["steps"])

    def time_prefill(self, n):
        ids = self.prompt(n)
        # Making the context is not timed; making the stores is on our side's bill.
        context = self.context(n)
        begin = time.perf_counter()
        self.decode(context, ids)
        seconds = time.perf_counter() - begin
        low.llama_free(context)
        return {"tokens": n, "seconds": seconds, "tokens_per_second": n / seconds}

    def time_decode(self, depth, steps):
        depth = max(depth, 1)
        if steps + WARM_STEPS > ROOM:
            raise RuntimeError(f"{steps} steps: at most {ROOM - WARM_STEPS}")
        if depth not in self.at_depth:
            self.at_depth[depth] = self.context(depth + ROOM)
            self.decode(self.at_depth[depth], self.prompt(depth))
        context = self.at_depth[depth]
        low.llama_memory_seq_rm(low.llama_get_memory(context), 0, depth, -1)
        begin = 0.0
        for i in range(WARM_STEPS + steps):
            if i == WARM_STEPS:
                begin = time.perf_counter()
            self.decode(context, [token(depth + i, self.vocab_size)])
            low.llama_get_logits_ith(context, -1)
        seconds = time.perf_counter() - begin
        return {"tokens": steps, "seconds": seconds, "tokens_per_second": steps / seconds}


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    options = dict(a.split("=", 1) for a in sys.argv[2:])
    llama = Llama(
        sys.argv[1],
        flash=options.get("flash", "0") == "1",
        kv=options.get("kv", "f16"),
        ubatch=int(options.get("ubatch", 512)),
        threads=int(options.get("threads", 2)),
        repack=options.get("repack", "1") == "1",
    )
    # A first batch here, so that a build that cannot run says so before anything is timed.
    llama.time_prefill(64)
    about = {"version": llama_cpp.__version__, "system": low.llama_print_system_info().decode().strip(" |")}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        try:
            answer = llama.time(json.loads(line))
        except (RuntimeError, KeyError, ValueError) as e:
            answer = {"error": str(e)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
