"""DDIM against DDPM over S and eta (DDIM, arXiv:2010.02502, table 1), from what evaluate.py has measured."""

import csv
import itertools
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.claims.report import Findings, new_figure
from diffusion.commands import plots
from diffusion.errors import InputError

_STEPS = (10, 20, 50, 100, 1000)
PUBLISHED = {
    label: dict(zip(_STEPS, values, strict=True))
    for label, values in {
        "eta 0 (DDIM)": (13.36, 6.84, 4.67, 4.16, 4.04),
        "eta 0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
        "eta 0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
        "eta 1 (DDPM)": (41.07, 18.36, 8.01, 5.78, 4.73),
        "sigma-hat": (367.43, 133.37, 32.72, 9.99, 3.17),
    }.items()
}
"""FID on CIFAR-10."""
_BASE = 100
"""The S that others are divided by: the largest that every row has."""


def measure(path: str | os.PathLike, *, metric: str = "frechet_pixels", grid: str = "uniform") -> Findings:
    """Our distances beside the published ones, with ratios over S and over eta.

    Args:
      path: evaluation.csv of evaluate.py.
      metric: a column of it.
      grid: which of its rows count.

    Raises:
      InputError: there is no such file, it has no such rows, or those of several models.
    """
    seeds, facts = _read(path, metric, grid)
    ours = {label: {s: float(np.mean(values)) for s, values in cells.items()} for label, cells in seeds.items()}
    rows = []
    for label, published in PUBLISHED.items():
        for count in _STEPS:
            if count in ours[label]:
                pair = [(values[label][count], values[label].get(_BASE)) for values in (ours, PUBLISHED)]
                over_steps = [value / base if base else None for value, base in pair]
                zero = [values["eta 0 (DDIM)"].get(count) for values in (ours, PUBLISHED)]
                over_eta = [value / base if base else None for (value, _), base in zip(pair, zero, strict=True)]
                spread = _spread(seeds[label][count])
                rows.append((label, count, ours[label][count], spread, published[count], *over_steps, *over_eta))
    agreeing, all_pairs = _agreement(ours)
    columns = ["noise", "S", f"ours: {metric}", "its seeds", "published: FID", f"ours / S = {_BASE}"]
    columns += [f"published / S = {_BASE}", "ours / eta 0", "published / eta 0"]
    facts = f"{facts} {agreeing} of {all_pairs} pairs of cells stand in the published order;"
    return Findings(columns, rows, _figure(ours, metric), facts)


def _read(path, metric, grid):
    """({label: {S: values of the seeds}}, facts)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; evaluate.py writes it")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(metric) and row["grid"] == grid and _label(row)]
    # By seed: ddim and ddim with eta 0 are the same samples.
    cells = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cells[_label(row)][int(row["steps"])][row["seed"]] = float(row[metric])
    models = {tuple(row[name] for name in ("run", "checkpoint_step", "ema", "num", "clip")) for row in rows}
    if not any(count in _STEPS for of_label in cells.values() for count in of_label):
        raise InputError(f"{path} holds no {metric} on {grid} at any of S = {', '.join(map(str, _STEPS))}")
    if len(models) != 1:
        raise InputError(f"{path} holds {metric} on {grid} of {len(models)} models or sample sizes; one is needed")
    run, step, ema, num, _ = models.pop()
    facts = f"{run[0].upper()}{run[1:]}, step {int(step):,}, EMA {ema}; means of seeds, {int(num):,} samples each, "
    facts += f"grid {grid};"
    return {label: {s: list(seeds.values()) for s, seeds in cells[label].items()} for label in PUBLISHED}, facts


def _spread(values):
    """The smallest and the largest of several, as text."""
    return f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else "one seed"


def _label(row):
    """The row of the paper's table that a row of evaluation.csv belongs to, or None."""
    eta = float(row["eta"]) if row["eta"] else None
    known = {("ddim", 0.0): 0, ("ddim", None): 0, ("ddim", 0.2): 1, ("ddim", 0.5): 2, ("ddim", 1.0): 3}
    known |= {("ddpm", None): 3, ("ddpm:variance=small", None): 3, ("sigma_hat", None): 4}
    number = known.get((row["sampler"], eta))
    return None if number is None else list(PUBLISHED)[number]


def _agreement(ours):
    """Of all pairs of cells that both have, how many stand in the same order, and how many there are."""
    cells = [(ours[label][s], PUBLISHED[label][s]) for label in PUBLISHED for s in _STEPS if s in ours[label]]
    pairs = list(itertools.combinations(cells, 2))
    return sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs), len(pairs)


def _figure(ours, metric):
    figure = new_figure(9, 4)
    titles = {"ours": (ours, metric), "published, CIFAR-10": (PUBLISHED, "FID")}
    for axes, (title, (values, name)) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for number, (label, series) in enumerate(values.items()):
            points = sorted((s, v) for s, v in series.items() if s in _STEPS)
            if points:
                axes.loglog(*zip(*points, strict=True), color=f"C{number}", marker="os^Dv"[number], label=label)
        axes.set_xticks(_STEPS, [str(s) for s in _STEPS])
        axes.minorticks_off()
        plots.scale_y(axes, [v for series in values.values() for s, v in series.items() if s in _STEPS])
        axes.set(xlabel="steps S", ylabel=name, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
