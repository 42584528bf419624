"""Tables of the figures that the scripts of this folder measure, and the page docs/performance.md."""

from common import spread, table

# Ratios aimed at; a table shows them beside what was reached.
GOALS = {
    "f32": 1.2,
    "bf16 64": 1.4,
    "bf16 128": 1.2,
    "backward": 1.2,
    "prefill 512": 1.0,
    "prefill 2048": 1.5,
    "prefill 8192": 2.5,
    "decode at 0": 0.9,
    "decode at 2048": 1.5,
    "decode at 7900": 2.5,
    "exp": 1.5,
    "long_conv": 2.0,
}
# Share of the measured product rate aimed at in bf16, by head width; of recurrences, by row.
SHARES = {"64": 40, "128": 55, "scalar": 40}


def goal(key):
    return f"{GOALS[key]:.1f}" if key in GOALS else ""


def ceilings(result):
    rows = [[r["what"], r["threads"], spread(r["rate"]), r["unit"]] for r in result["rows"]]
    e = result["exp"]
    text = table(["ceiling", "threads", "median (spread)", "unit"], rows)
    head = [f"{e['unit']}, median (spread)", "foveal", "torch.exp", "ratio", "goal"]
    return text + "\n" + table(head, [[e["what"], spread(e["ours"]), spread(e["theirs"]), f"{e['ratio']:.2f}", goal("exp")]])


def product_rate(limits, dtype):
    """Rate of the largest thread count's matrix product; None where it was not measured."""
    rates = [r for r in (limits or {}).get("rows", []) if r["what"] == f"{dtype} product"]
    return max(rates, key=lambda r: r["threads"])["rate"]["median"] if rates else None


def sdpa(result, limits=None):
    rows = []
    for r in result["rows"]:
        dtype, width = r["dtype"], r["what"].split(")")[0].split(", ")[-1]
        own, their = (r["flops"] / r[side]["median"] / 1e6 for side in ("ours", "theirs"))
        ceiling = product_rate(limits, dtype)
        share = f"{100 * own / ceiling:.0f}%" if ceiling else ""
        if share and dtype == "bf16" and width in SHARES and "backward" not in r["what"]:
            share += f" ({SHARES[width]}%)"
        key = "backward" if "backward" in r["what"] else dtype if dtype == "f32" else f"{dtype} {width}"
        ratio = [f"{r['ratio']:.2f}", goal(key)]
        rows.append([f"{dtype} {r['what']}", spread(r["ours"]), spread(r["theirs"]), *ratio, f"{own:.0f}", f"{their:.0f}", share])
    head = ["ms, median (spread)", "foveal", "PyTorch", "ratio", "goal", "our GFLOP/s", "their GFLOP/s", "of the product rate (goal)"]
    return table(head, rows)


def fft(result):
    rows = [[r["what"], spread(r["ours"]), spread(r["theirs"]), f"{r['ratio']:.2f}", goal("long_conv")] for r in result["rows"]]
    return table(["ms, median (spread)", "foveal", "torch.fft", "ratio", "goal"], rows)


def recur(result):
    rows = []
    for r in result["rows"]:
        own = r["flops"] / r["ours"]["median"] / 1e6
        share = f"{100 * own / r['product']['median']:.0f}%"
        if r["what"] in SHARES:
            share += f" ({SHARES[r['what']]}%)"
        rate = f"{r['product']['median']:.0f}"
        rows.append([r["what"], spread(r["ours"]), spread(r["theirs"]), f"{r['ratio']:.2f}", f"{own:.0f}", rate, share])
    head = ["ms, median (spread)", "foveal", "PyTorch", "ratio", "our GFLOP/s", "product's GFLOP/s", "share (goal)"]
    return table(head, rows)


def decode(result):
    f32 = {r["what"]: r["ours"]["median"] for r in result["rows"] if r["dtype"] == "f32"}
    rows = []
    for r in result["rows"]:
        own, read = (r["bytes"] / r[side]["median"] / 1e6 for side in ("ours", "read"))
        share = f"{100 * own / read:.0f}%" + (" (85%)" if r["dtype"] != "int4" else "")
        faster = f"{f32[r['what']] / r['ours']['median']:.2f}" + (" (3)" if r["dtype"] == "int8" else "")
        peer = f"{r['rendition']}{'' if r['dtype'] in ('f32', 'bf16') else ', bf16'}"
        rates = [f"{own:.1f}", f"{read:.1f}", share, faster]
        rows.append([f"{r['dtype']} {r['what']}", spread(r["ours"]), spread(r["theirs"]), peer, f"{r['ratio']:.2f}", *rates])
    head = ["ms, median (spread)", "foveal", "PyTorch", "its rendition", "ratio"]
    return table(head + ["our GB/s", "read GB/s", "of reading (goal)", "against our f32 (goal)"], rows)


def llama_speed(result):
    rows = []
    for r in result["rows"]:
        settings = [r["settings"]["ours"], r["settings"]["theirs"]]
        rows.append([r["what"], spread(r["ours"]), spread(r["theirs"]), f"{r['ratio']:.2f}", goal(r["what"]), *settings])
    return table(["tokens/s, median (spread)", "foveal", "llama.cpp", "ratio", "goal", "our setting", "their setting"], rows)


HEAD = """# Performance

<!-- Written by benches/peers/run_all.py from performance-data.json; edit benches/peers/render.py instead. -->

Every figure is a median with the slowest and fastest round, both programs in turns on the same machine and warmed up. Ratios
are above 1 where foveal is faster. Times of a shared machine vary; the ratios are what to read. A goal is what the
project aims at, reached or not. [benches/peers](../benches/peers/README.md) tells how to install what is
compared with, and how each side is set.

All of it again: `python benches/peers/run_all.py MODEL.gguf`, and one part with `--only PART`.
"""


def section(title, command, result, text):
    m = result["machine"]
    where = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {', '.join(m['isa'])}; {m['date']}"
    rounds = [r.get("rate", r.get("ours"))["repeats"] for r in result["rows"]]
    where += f"; medians of {min(rounds)} rounds" if rounds else ""
    return f"\n## {title}\n\n`{command}`\n\n{where}\n\n{text}"


def page(data):
    text = HEAD
    if "ceilings" in data:
        r = data["ceilings"]
        about = f"PyTorch {r['theirs']['version']}, foveal on {r['ours']['isa']}.\n\n"
        text += section("What the machine can do", "python benches/peers/ceilings.py", r, about + ceilings(r))
    if "sdpa" in data:
        r = data["sdpa"]
        about = (
            f"PyTorch {r['theirs']['version']} ({r['theirs']['capability']}), foveal on {r['ours']['isa']}. "
            "Shapes are (batch, heads, tokens, head_dim); FLOPs are 4·B·H·T²·D, half under a causal mask.\n\n"
        )
        body = about + sdpa(r, data.get("ceilings"))
        text += section("Exact attention against PyTorch's scaled_dot_product_attention", "python benches/peers/sdpa.py", r, body)
    if "sdpa_backward" in data:
        r = data["sdpa_backward"]
        about = "As above; FLOPs are 14·B·H·T²·D. Our gradients are f32 in both types, PyTorch's of the type of its input.\n\n"
        command = "python benches/peers/sdpa.py --backward"
        text += section("Forward and backward", command, r, about + sdpa(r, data.get("ceilings")))
    if "fft" in data:
        r = data["fft"]
        size = r["rows"][0]
        about = (
            f"{size['channels']:,} channels of {size['samples']:,} samples in f32, filters as long as the signal. PyTorch "
            f"{r['theirs']['version']}, foveal on {r['ours']['isa']}. A causal convolution transforms twice the length; results and the "
            "skip d·u are part of the time on both sides.\n\n"
        )
        text += section("Long convolution against torch.fft", "python benches/peers/fft.py", r, about + fft(r))
    if "recur" in data:
        r = data["recur"]
        about = (
            f"PyTorch {r['theirs']['version']} ({r['theirs']['capability']}) with the textbook's chunks of 64 in batched bf16 "
            f"products, foveal on {r['ours']['isa']}; (batch, heads, tokens, head_dim) = {tuple(r['shape'])}, bf16 in. FLOPs are those "
            "that our kernel counts; the product is of 2048 x 2048 matrices in bf16, by the faster of both, in the same rounds.\n\n"
        )
        text += section("Linear recurrences against PyTorch", "python benches/peers/recur.py", r, about + recur(r))
    if "decode" in data:
        r = data["decode"]
        about = (
            f"PyTorch {r['theirs']['version']} ({r['theirs']['capability']}), foveal on {r['ours']['isa']}. One query of 9 heads "
            "over 3 heads of keys and values, 64 wide; bytes are those of keys and values, reading is as many bytes by the "
            "same threads in the same rounds (8,192 keys fit a third-level cache, int8 and int4 nearly the second). Of "
            "PyTorch's renditions the fastest; int8 and int4 stand beside its bf16.\n\n"
        )
        text += section("One query over a long store against PyTorch", "python benches/peers/decode.py", r, about + decode(r))
    if "llama_speed" in data:
        r = data["llama_speed"]
        weights = "repacked for the instruction set" if r["theirs"]["repacked_weights"] else "as stored, which is not its fastest"
        about = (
            f"{r['model']}, foveal {r['ours']}, llama-cpp-python {r['theirs']['version']} with its weights {weights}. Each side in "
            "the fastest of its settings at that row. A prompt counts to the logits of its last token, a decode step "
            f"to the logits of its token; {r['steps']} steps are timed together. The goals are meant on the best rates "
            "that llama.cpp was seen to reach on such a machine (prompts 512: 1,360, 2,048: 750, 8,192: 279 "
            "tokens/s; decoding at 0: 323, 2,048: 80, 7,900: 27): where it is slower here, a ratio over the goal "
            "says less.\n\n"
        )
        body = about + llama_speed(r)
        text += section("A whole model against llama.cpp", "python benches/peers/llama_speed.py MODEL.gguf", r, body)
    return text
