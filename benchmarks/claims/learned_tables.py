"""Learned tables against hand-made solvers at equal network calls, from what evaluate.py has measured."""

import csv
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.claims.report import Findings, new_figure
from diffusion.commands import plots
from diffusion.commands.learned import LEARNED
from diffusion.errors import InputError

DDIM = "ddim on uniform"


def measure(path: str | os.PathLike, *, metric: str = "frechet_pixels") -> Findings:
    """The distance of learned tables, of the best hand-made sampler of the same calls, and of DDIM.

    Args:
      path: evaluation.csv of evaluate.py. Only samplers with as many seeds as the learned tables count.
      metric: a column of it.

    Raises:
      InputError: there is no such file, or it has no rows of learned tables.
    """
    cells = _read(Path(path), metric)
    learned = cells.pop(LEARNED, {})
    if not learned:
        raise InputError(f"{path} holds no {metric} of --samplers={LEARNED}; measure them first")
    count = max(len(seeds) for seeds in learned.values())
    means = {
        label: {calls: float(np.mean(seeds)) for calls, seeds in of.items() if len(seeds) >= count}
        for label, of in cells.items()
    }
    rows = []
    for calls, seeds in sorted(learned.items()):
        mean = float(np.mean(seeds))
        there = {label: of[calls] for label, of in means.items() if calls in of}
        best = min(there, key=there.get) if there else ""
        known = there.get(best)
        spread = f"{min(seeds):.4f} to {max(seeds):.4f}"
        ratio = mean / known if known else None
        ddim = means.get(DDIM, {})
        equal = min((calls for calls, value in ddim.items() if value <= mean), default=None)
        if equal is None and ddim:
            equal = f"above {max(ddim)}"
        rows.append((calls, mean, spread, best, known, ratio, equal))
    columns = ["calls", f"learned: {metric}", "its seeds", "best hand-made", "its mean", "learned / best"]
    columns += ["calls that DDIM needs"]
    facts = f"Means of {count} seeds, 1,797 samples each;"
    return Findings(columns, rows, _figure(learned, means, metric), facts)


def _read(path, metric):
    """{label: {calls: values of the seeds}}."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; evaluate.py writes it")
    cells = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            if row.get(metric):
                label = row["sampler"] if row["sampler"] == LEARNED else f"{row['sampler']} on {row['grid']}"
                cells[label][int(row["nfe"])].append(float(row[metric]))
    return cells


def _figure(learned, means, metric):
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    hand_made = defaultdict(list)
    for label, of in means.items():
        for calls, value in of.items():
            if label != DDIM:
                hand_made[calls].append(value)
    best = {calls: min(values) for calls, values in hand_made.items() if calls in learned}
    ddim, low = means.get(DDIM, {}), {calls: np.mean(seeds) for calls, seeds in learned.items()}
    for number, (label, series) in enumerate({"DDIM": ddim, "best hand-made": best, "learned": low}.items()):
        if series:
            axes.loglog(*zip(*sorted(series.items()), strict=True), "os^"[number] + "-", label=label)
    ticks = sorted({*low, *ddim})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    plots.scale_y(axes, [*ddim.values(), *best.values(), *low.values()])
    axes.set(xlabel="network calls", ylabel=metric, title="Digits: learned tables and hand-made samplers")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
