"""Seconds until a command has done its first work: with an empty cache of compiled programs, and with a full one.

    python benchmarks/first_picture.py [--rounds=3] [--commands=sample,train] [--out=docs/speed.md]

Each round takes an empty cache of its own, gives the command once, and then once more. `sample` draws one picture of
the digits that ship in 25 steps, and `train` makes one step of configs/digits.py; both from the start of Python to its
end. Prints the median and the range of all rounds, and the share of the cores that other programs used. --out writes
them into a page, between the marks "measured: first_picture" and "measured: end".
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pages
from absl import app, flags
from paired import Others

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Empty caches.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "A page that takes the table. Default: it is only printed.")
_COMMANDS = flags.DEFINE_list("commands", ["sample", "train"], "What is timed.")

COMMANDS = {
    "sample": ["sample.py", "--workdir=shipped", "--steps=25", "--num=1"],
    "train": ["train.py", "--config.train.num_steps=1", "--config.train.save_every=1"],
}
PROJECT = Path(__file__).parent.parent


PLACE = ("measured", "first_picture")


def main(_):
    pages.check(_OUT.value, *PLACE)
    rows = ["| command | with an empty cache | with a full one | others used |", "|---|---|---|---|"]
    print("\n".join(rows))
    for name in _COMMANDS.value:
        others = Others()
        cold, warm = zip(*(round_of(name) for _ in range(_ROUNDS.value)), strict=True)
        rows.append(f"| python {' '.join(COMMANDS[name])} | {text(cold)} | {text(warm)} | {others.share():.0%} |")
        print(rows[-1], flush=True)
    pages.write(_OUT.value, *PLACE, [*rows, "", f"{os.cpu_count()} cores, {time.strftime('%B %Y')}."])


def round_of(name):
    """(seconds with an empty cache, seconds with the cache that this has filled)."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder, "compiled"))}
        return tuple(seconds(name, Path(folder, part), environment) for part in ("first", "second"))


def seconds(name, folder, environment):
    """Seconds that the command takes."""
    out = "--out" if name == "sample" else "--workdir"
    command = [sys.executable, *COMMANDS[name], f"{out}={folder}"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start


def text(values):
    return f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    app.run(main)
