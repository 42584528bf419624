"""What the scripts of this folder share: partners that answer on request, taking turns, statistics, tables."""

import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Refused(RuntimeError):
    """A partner answered with an error, or ended; `status` is negative after a signal."""

    def __init__(self, text, status=None):
        super().__init__(text)
        self.status = status


class Partner:
    """A child process that says one line of JSON about itself, then answers each line with one line."""

    def __init__(self, command, env=None):
        self.command = [str(c) for c in command]
        self.errors = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        environ = dict(os.environ, **(env or {}))
        self.child = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environ)
        self.about = self.answer()

    def answer(self):
        line = self.child.stdout.readline()
        if not line:
            status = self.child.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise Refused(f"{' '.join(self.command)} ended with status {status}: {last}", status)
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(f"{' '.join(self.command)}: {answer['error']}")
        return answer

    def ask(self, request):
        try:
            self.child.stdin.write((request if isinstance(request, str) else json.dumps(request)) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # answer() tells how it ended
        return self.answer()

    def close(self):
        self.child.stdin.close()
        self.child.wait()


class Turns:
    """An advisory lock on a file, held while something is timed, so that several who measure on one
    machine take turns. Once held for `hold` seconds it is let go between two units of work."""

    def __init__(self, path, hold):
        self.file = open(path, "a") if path else None
        self.hold = hold
        self.since = None

    @contextlib.contextmanager
    def unit(self):
        if self.file and self.since is None:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.since = time.monotonic()
        yield
        if self.file and time.monotonic() - self.since > self.hold:
            self.release()
            time.sleep(0.5)  # long enough for one who waits to get it

    def release(self):
        if self.file and self.since is not None:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_UN)
            self.since = None


def summary(values):
    """Median, extremes and count of some figures."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def rounds(own, request, theirs, turns, repeats, before=None):
    """Milliseconds of `repeats` requests to our side and calls of theirs, which returns its seconds: both in each round,
    either first in every other one. `before` is called once a round."""
    ours_ms, theirs_ms = [], []
    for i in range(repeats):
        with turns.unit():
            if before:
                before()
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                if side == 0:
                    ours_ms.append(1e3 * own.ask(request)["seconds"])
                else:
                    theirs_ms.append(1e3 * theirs())
    return ours_ms, theirs_ms


def versus(ours, theirs, higher_is_better):
    """Ratio of the medians, above 1 where ours is better, and the extremes of the rounds' ratios."""
    pairs = [o / t if higher_is_better else t / o for o, t in zip(ours, theirs)]
    o, t = statistics.median(ours), statistics.median(theirs)
    ratio = o / t if higher_is_better else t / o
    return {"ours": summary(ours), "theirs": summary(theirs), "ratio": ratio, "round_ratios": [min(pairs), max(pairs)]}


def figure(x):
    """Three significant digits."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def spread(s):
    return f"{figure(s['median'])} ({figure(s['min'])} to {figure(s['max'])})"


def table(head, rows):
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(head) + " |", "|:--" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, r)) + " |" for r in rows]) + "\n"


def machine(threads):
    """The processor in words, without anything that names this particular machine."""
    cpu, flags = platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    wanted = ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8"]
    return {
        "cpu": cpu,
        "isa": [f for f in wanted if f in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }


def write_json(path, value):
    """Whole or not at all."""
    path = pathlib.Path(path)
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def save(path, value):
    """As `write_json`, where a path was given."""
    if path:
        write_json(path, value)


def say(text):
    print(text, file=sys.stderr, flush=True)


def arguments(parser, repeats):
    """Options of every script."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds timed, after warming up")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target" / "release", help="folder of the built binaries")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--lock", type=pathlib.Path, help="hold an advisory lock on this file while timing")
    parser.add_argument("--hold", type=float, default=45, help="seconds after which the lock is let go for others")
    return parser
