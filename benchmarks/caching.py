"""Quality against seconds where deep levels are kept from call to call, beside fewer steps and learned tables.

    python benchmarks/caching.py [--network=digits] [--batch=64] [--rounds=9] [--num=1797]
    python benchmarks/caching.py --network=cifar --batch=4 --rounds=7

Every row is timed in turn with the first one, and its seconds are a ratio of neighbours: the median of all rounds with
its quartiles. For the digits that ship there is also the Frechet distance of --num samples to the real images in
pixels, with clipping as sample.py does it, and how far samples lie from those of UniPC with 100 calls from the same
noise. The network of configs/cifar.py, of 35.7M parameters, has random weights and so its seconds only. Prints a
Markdown table.
"""

import time
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from diffusion import devices, pretrained, solvers, timesteps
from diffusion.caching import Cache
from diffusion.commands import config_files, datasets, drawing, learned, opening, recipes
from diffusion.evaluation import features
from diffusion.guidance import Guidance
from diffusion.images import to_floats
from diffusion.model import make_model
from diffusion.solvers import SamplerTable

_NETWORK = flags.DEFINE_enum("network", "digits", ["digits", "cifar"], "Which network.")
_BATCH = flags.DEFINE_integer("batch", 64, "Images at a time.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed rounds.")
_NUM = flags.DEFINE_integer("num", 1797, "Samples whose quality is measured.")


class Row(NamedTuple):
    """A sampler, and the calls of `Cache`; 1 for none."""

    table: SamplerTable
    calls: int

    def name(self):
        whole = len(range(0, self.table.nfe, self.calls))
        return f"{self.table.name}, {self.table.nfe} calls" + f", k = {self.calls} ({whole} whole)" * (self.calls > 1)


def main(_):
    devices.prepare()
    mesh = devices.data_mesh()
    if _NETWORK.value == "digits":
        opened = opening.open_named(pretrained.SHIPPED, "", {})
        model, params = opened.trained.model, opened.trained.params
        rows, clip = digits_rows(opened), opened.trained.clip
    else:
        recipes.alias()  # that a config may import another
        model = make_model(config_files.read(str(recipes.FOLDER / "cifar.py")), (32, 32, 3))
        params, clip = model.init(jax.random.key(0)), "recompute"
        rows = [Row(ddim(model, 12), k) for k in (1, 2, 3)]

    def draw(row, ids):
        cache = Cache(model.split, row.calls) if row.calls > 1 else None
        options = {"seed": 0, "mesh": mesh, "batch_size": _BATCH.value, "clip": clip, "cache": cache}
        return np.concatenate(list(drawing.generate(model, params, row.table, ids, **options)))

    passed = seconds(rows, lambda row: draw(row, range(_BATCH.value)))
    ratios = np.percentile([[mine / first for mine, first in pairs] for pairs in passed], [50, 25, 75], axis=1).T
    figures = [["-", "-"] for _ in rows]
    if _NETWORK.value == "digits":
        figures = qualities(opened.trained, rows, draw)
    on = f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{_NETWORK.value}, batch {_BATCH.value}, {on}, {_ROUNDS.value} rounds")
    print("| sampler | seconds over those of the first row | Frechet distance | RMS to 100 calls |")
    print("|---|---|---|---|")
    for row, (ratio, low, high), (distance, error) in zip(rows, ratios, figures, strict=True):
        print(f"| {row.name()} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {distance} | {error} |")
    print(f"The first row takes {np.median([first for pairs in passed for _, first in pairs]):.3f} s.")


def ddim(model, steps):
    return solvers.ddim(model.schedule, timesteps.uniform(model.schedule, steps))


def digits_rows(opened):
    """Cached at 25 and 10 steps, fewer steps, and learned tables with and without a cache."""
    model = opened.trained.model
    rows = [Row(ddim(model, steps), k) for steps in (25, 10) for k in (1, 2, 3)]
    rows += [Row(ddim(model, steps), 1) for steps in (18, 15, 7, 6)]
    tables = [learned.find(opened, calls, Guidance()) for calls in (10, 6, 5, 4)]
    return rows + [Row(table, k) for table in tables for k in ((1, 2, 3) if table.nfe > 5 else (1,))]


def seconds(rows, draw):
    """For each row, (its seconds, those of the first row beside it) in every round."""

    def timed(row):
        start = time.perf_counter()
        draw(row)
        return time.perf_counter() - start

    for row in rows:
        draw(row)  # compile
    rounds = [[(timed(row), timed(rows[0])) for row in rows] for _ in range(_ROUNDS.value)]
    return list(zip(*rounds, strict=True))


def qualities(trained, rows, draw):
    """(Frechet distance in pixels, RMS distance in [-1, 1] to the samples of many calls) of each row."""
    real, space = datasets.load_data_of(trained), features.pixels()
    reference = features.make_reference(space, real, datasets.cache_folder(), split=trained.config.data.split)
    schedule = trained.model.schedule
    exact = to_floats(draw(Row(solvers.unipc(schedule, timesteps.uniform(schedule, 100)), 1), range(256)))
    found = []
    for row in rows:
        images = draw(row, range(_NUM.value))
        distance = features.measure(reference, space.extract(images), ["frechet"])
        error = np.sqrt(np.mean((to_floats(images[: len(exact)]) - exact[: len(images)]) ** 2))
        found.append([f"{next(iter(distance.values())):.3f}", f"{error:.3f}"])
    return found


if __name__ == "__main__":
    app.run(main)
