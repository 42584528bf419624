"""A whole model side by side with llama.cpp: same file, same threads, same tokens, in turns.

    cargo build --release --workspace
    python benches/peers/llama_speed.py MODEL.gguf --json llama-speed.json

Each side first tries its settings once per prompt length and depth and keeps the fastest there; then the
two go in turns for --repeats rounds. Both have run the request before the first round counts. A setting
slower than 0.7 of its side's best at the length before is not tried at the next.

A prompt counts from nothing to the logits of its last token; a decode step to the logits of its token,
without choosing from them. Needs the packages of requirements.txt; README.md tells how to build
llama.cpp so that its fast path runs.
"""

import argparse
import pathlib
import signal
import sys

import common
import render
from common import Partner, Refused, say

# Names as in `foveal bench model`; auto holds them no wider than the file does.
OURS = {"prefill": [{"weights": "auto"}, {"weights": "bf16"}], "decode": [{"weights": "auto"}]}
THEIRS = {
    "prefill": [
        {"flash": 0, "kv": "f16", "ubatch": 512},
        {"flash": 1, "kv": "f16", "ubatch": 512},
        {"flash": 0, "kv": "f16", "ubatch": 2048},
        {"flash": 1, "kv": "f16", "ubatch": 2048},
    ],
    # One token is one batch, whatever its limit. The f16 flash path is slow where AVX-512 FP16 is used.
    "decode": [
        {"flash": 0, "kv": "f16", "ubatch": 512},
        {"flash": 1, "kv": "f16", "ubatch": 512},
        {"flash": 1, "kv": "bf16", "ubatch": 512},
    ],
}
KEEP = 0.7
# A trial shorter than this many seconds runs twice, and the second counts.
AGAIN = 5.0


def words(setting):
    return " ".join(f"{k}={v}" for k, v in setting.items())


class Side:
    """One program in all its settings, each a process of its own that sleeps while it is not asked."""

    def __init__(self, name, settings, start):
        self.name = name
        self.settings = {kind: [words(s) for s in some] for kind, some in settings.items()}
        every = {words(s): s for some in settings.values() for s in some}
        self.partners = {w: start(s) for w, s in every.items()}

    def best(self, request, among, turns):
        """The fastest of some settings, tried once each, and those worth trying again."""
        rates = {}
        for s in among:
            with turns.unit():
                answer = self.partners[s].ask(request)
                if answer["seconds"] < AGAIN:
                    # The first one also pays for touching new memory.
                    answer = self.partners[s].ask(request)
                rates[s] = answer["tokens_per_second"]
            say(f"  {self.name} {s}: {rates[s]:.1f} tokens/s")
        best = max(rates, key=rates.get)
        return best, [s for s in among if rates[s] >= KEEP * rates[best]], rates


def measure(ours, theirs, requests, repeats, turns, rows, save):
    """Appends to `rows` and calls `save` after each, so that an interrupted run keeps what it has."""
    left = {}
    for kind, label, request in requests:
        say(label)
        picked, trials = [], []
        for side in (ours, theirs):
            among = left.get((side.name, kind), side.settings[kind])
            best, left[side.name, kind], rates = side.best(request, among, turns)
            picked.append(best)
            trials.append(rates)
        a, b = [], []
        for i in range(repeats):
            # One unit: both sides of a round see the same machine; who goes first alternates.
            with turns.unit():
                for own in (True, False) if i % 2 == 0 else (False, True):
                    side, setting, rates = (ours, picked[0], a) if own else (theirs, picked[1], b)
                    rates.append(side.partners[setting].ask(request)["tokens_per_second"])
        row = {"what": label, "unit": "tokens/s", "settings": {"ours": picked[0], "theirs": picked[1]}}
        row |= common.versus(a, b, higher_is_better=True) | {"trials": {"ours": trials[0], "theirs": trials[1]}}
        say(f"  ours {common.spread(row['ours'])}, theirs {common.spread(row['theirs'])}, ratio {row['ratio']:.2f}")
        rows.append(row)
        save()


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), repeats=9)
    parser.add_argument("model", type=pathlib.Path)
    numbers = lambda s: [int(x) for x in s.split(",") if x]
    parser.add_argument("--prompt", type=numbers, default=[512, 2048, 8192])
    parser.add_argument("--depth", type=numbers, default=[0, 2048, 7900])
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed together")
    a = parser.parse_args()
    turns = common.Turns(a.lock, a.hold)
    threads = f"threads={a.threads}"
    here = pathlib.Path(__file__).parent

    def own(setting):
        options = [f"--{k}={v}" for k, v in setting.items()]
        return Partner([a.bin / "foveal", "bench", "model", a.model, "--serve", "--quiet", "--threads", a.threads, *options])

    def peer(repack):
        def start(s):
            options = [f"{k}={v}" for k, v in s.items()]
            return Partner([sys.executable, here / "llama.py", a.model, threads, f"repack={repack}", *options])

        return start

    with turns.unit():
        ours = Side("foveal", OURS, own)
        repack = 1
        try:
            theirs = Side("llama.cpp", THEIRS, peer(1))
        except Refused as e:
            if e.status != -signal.SIGILL:
                raise
            say(f"llama.cpp cannot run with repacked weights here ({e}); it runs with the weights as stored,\n"
                "which is NOT its fastest: build it as README.md of this folder tells")
            repack = 0
            theirs = Side("llama.cpp", THEIRS, peer(0))
    requests = [("prefill", f"prefill {n}", {"prefill": {"tokens": n}}) for n in a.prompt]
    requests += [("decode", f"decode at {d}", {"decode": {"depth": d, "steps": a.steps}}) for d in a.depth]
    result = {
        "machine": common.machine(a.threads),
        "model": a.model.name,
        "ours": next(iter(ours.partners.values())).about["version"],
        "theirs": next(iter(theirs.partners.values())).about | {"repacked_weights": bool(repack)},
        "steps": a.steps,
        "rows": [],
    }
    measure(ours, theirs, requests, a.repeats, turns, result["rows"], lambda: common.save(a.json, result))
    turns.release()
    for side in (ours, theirs):
        for p in side.partners.values():
            p.close()
    print(render.llama_speed(result))


if __name__ == "__main__":
    main()
