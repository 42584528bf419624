"""All comparisons of this folder, then docs/performance.md from their figures.

    cargo build --release --workspace --examples --bins
    python benches/peers/run_all.py MODEL.gguf --out docs/performance-data.json
    python benches/peers/run_all.py --render                  # the page again, from the data

Parts run one after another and the data file is written after each, so that a part can be repeated alone
(--only sdpa). Options after `--` go to every part, for example `-- --repeats 3`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import common
import render

# What each part runs; the model's path goes to those that need one.
PARTS = {
    "ceilings": ["ceilings.py"],
    "sdpa": ["sdpa.py"],
    "sdpa_backward": ["sdpa.py", "--backward"],
    "fft": ["fft.py"],
    "recur": ["recur.py"],
    "decode": ["decode.py"],
    "llama_speed": ["llama_speed.py"],
}
NEED_A_MODEL = ["llama_speed"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, nargs="?", help="GGUF file for llama_speed")
    parser.add_argument("--out", type=pathlib.Path, default=common.ROOT / "docs" / "performance-data.json")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part; may be repeated")
    parser.add_argument("--render", action="store_true", help="run nothing")
    argv = sys.argv[1:]
    rest = argv[argv.index("--") + 1 :] if "--" in argv else []
    a = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    parts = [] if a.render else a.only or list(PARTS)
    if a.model is None and any(part in NEED_A_MODEL for part in parts):
        parser.error(f"{', '.join(NEED_A_MODEL)} needs a GGUF file")
    data = json.loads(a.out.read_text()) if a.out.exists() else {}
    here = pathlib.Path(__file__).parent
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            figures = pathlib.Path(folder) / "figures.json"
            script, *options = PARTS[part]
            model = [str(a.model)] if part in NEED_A_MODEL else []
            command = [sys.executable, str(here / script), *model, *options, "--json", str(figures), *rest]
            subprocess.run(command, check=True)
            data[part] = json.loads(figures.read_text())
        common.write_json(a.out, data)
    a.out.with_name("performance.md").write_text(render.page(data))


if __name__ == "__main__":
    main()
