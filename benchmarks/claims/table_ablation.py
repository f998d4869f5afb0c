"""What of a sampler is worth learning: learned tables with one part after the other left out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.claims.report import Findings, model_facts, new_figure
from diffusion import data, devices, timesteps
from diffusion.commands import drawing, rollouts
from diffusion.commands.datasets import cache_folder
from diffusion.evaluation import features
from diffusion.files import write_json
from diffusion.guidance import Guidance
from diffusion.learning import starts, tables
from diffusion.learning.family import GROUPS, SCOPES
from diffusion.learning.losses import Loss, within_bounds
from diffusion.model import Trained
from diffusion.solvers import SamplerTable, unipc
from diffusion.solvers.history import from_table, to_table


class Variant(NamedTuple):
    """One way to learn.

    Attributes:
      kind: what is compared, a heading.
      name: in words.
      groups: what is free, of `family.GROUPS`; () is the best hand-made sampler that learning starts from.
      noises: to learn from, and as many to judge by.
      loss: how samples are compared.
      start: the solver to begin at.
    """

    kind: str
    name: str
    groups: tuple[str, ...] = GROUPS
    noises: int = 32
    loss: Loss = Loss(measure=within_bounds)
    start: str = "unipc:order=2"


def _without(*names):
    return tuple(group for group in GROUPS if group not in names)


VARIANTS = (
    Variant("what is free", "everything (GS)"),
    Variant("what is free", "nothing: the start", ()),
    Variant("what is free", "times only (LD3)", SCOPES["tau"]),
    Variant("what is free", "coefficients only (S4S)", SCOPES["coefficients"]),
    Variant("what is free", "all but the times told to the network", _without("times")),
    Variant("what is free", "all but the last row", _without("last")),
    Variant("what is free", "all but the history of the rows before", _without("history")),
    Variant("what is free", "all but the sums of the rows before", _without("sums")),
    Variant("noises", "8", noises=8),
    Variant("noises", "16", noises=16),
    Variant("noises", "64", noises=64),
    Variant("start", "ddim", start="ddim"),
    Variant("start", "ipndm", start="ipndm"),
    Variant("start", "deis:order=2", start="deis:order=2"),
    Variant("loss", "mse", loss=Loss(measure=within_bounds, floor=None)),
    Variant("loss", "l1", loss=Loss(measure=within_bounds, absolute=True, floor=None)),
)

TEACHER_CALLS, ITERATIONS, GRID = 64, 8, "uniform:start=0.985"
"""What all variants have in common: a search from one start, so that they differ in nothing else."""

KEPT = Path("samples/table_ablation")
"""Where figures that have been measured lie: a measurement that was cut off goes on, and the folder can be deleted."""


def measure(
    name: str,
    trained: Trained,
    *,
    calls: Sequence[int] = (4, 5),
    variants: Sequence[Variant] = VARIANTS,
    seeds: Sequence[int] = range(5),
    kept: Path = KEPT,
) -> Findings:
    """The distance of tables that are learned in part; with all but the first of calls, only what is free changes."""
    beds, figures = {}, {}
    for count in calls:
        for variant in variants:
            if count == calls[0] or variant.kind == variants[0].kind:
                figures[variant, count] = _figure_of(trained, variant, count, seeds, beds, kept)
    whole = {count: np.mean(figures[variants[0], count]) for count in calls}
    columns = ["part", "variant"]
    columns += [text for count in calls for text in (f"{count} calls", "its seeds", "beside everything")]
    rows = []
    for variant in variants:
        cells = []
        for count in calls:
            found = figures.get((variant, count))
            if found is None:
                cells += [None] * 3
                continue
            cells += [float(np.mean(found)), f"{min(found):.4f} to {max(found):.4f}", np.mean(found) / whole[count]]
        rows.append((variant.kind, variant.name, *cells))
    first = variants[0]
    facts = (
        f"{model_facts(name, trained)}; Frechet distance on pixels, means of {len(seeds)} seeds, as many samples as "
        f"real images; {first.noises} noises and {first.start} on {GRID} where nothing is said, at most {ITERATIONS} "
        "iterations;"
    )
    return Findings(columns, rows, _picture(variants, calls, figures), facts)


def _figure_of(trained, variant, count, seeds, beds, kept):
    """Returns the distance for each seed, from the folder if it has been measured."""
    words = f"{variant.kind}-{variant.name}-{count}".translate(str.maketrans(" :=,", "____"))
    path = kept / f"{words}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["seeds"] == list(seeds):
            return record["distances"]
    if (which := (variant.noises, variant.loss)) not in beds:
        beds[which] = make_bed(trained, *which)
    bed = beds[which]
    table = learn(bed, count, variant.groups, variant.start)
    found = distances(trained, table, seeds)
    kept.mkdir(parents=True, exist_ok=True)
    write_json(path, {"seeds": list(seeds), "distances": found, **table.facts}, kept)
    print(f"{variant.kind}: {variant.name}, {count} calls: {np.mean(found):.4f}", flush=True)
    return found


def make_bed(trained: Trained, noises: int, loss: Loss) -> tables.Bed:
    """Returns the bed of `python learn.py --noises=...` with its defaults, of a model without classes."""
    model, guidance, key = trained.model, Guidance(), rollouts.key_of(0, "tabl")
    size = min(noises, rollouts.batch_size(model, 64))
    train, held = (
        rollouts.batches(model, guidance, (), key, range(first, first + noises), size) for first in (0, noises)
    )
    settings = {"clip": trained.clip, "dynamic_threshold": None}
    teacher = from_table(unipc(model.schedule, timesteps.uniform(model.schedule, TEACHER_CALLS), order=3))
    return tables.make_bed(rollouts.asked(trained, settings, guidance), model.schedule, teacher, train, held, loss)


def learn(bed: tables.Bed, calls: int, groups: tuple[str, ...], solver: str) -> SamplerTable:
    """Returns what is learned of some groups in a few iterations from one solver on the grid GRID."""
    history = from_table(starts.solver(solver)(bed.schedule, starts.grid(bed.schedule, GRID, calls)))
    search = tables.begin(bed, calls, groups or GROUPS, among=[(solver, GRID, history)])
    while groups and search.current is not None and search.iterations < ITERATIONS:
        search = tables.advance(bed, search)
    facts = {"iterations": search.iterations, "held_out": search.leader.best_loss}
    return to_table(tables.result(bed, search), f"learned({calls} calls)", facts)


def distances(trained: Trained, table: SamplerTable, seeds: Sequence[int]) -> list[float]:
    """Returns the Frechet distance on pixels for each seed, from as many samples as real images."""
    real, space = data.load("digits"), features.pixels()
    reference = features.make_reference(space, real, cache_folder())
    result = []
    for seed in seeds:
        options = {"seed": seed, "mesh": devices.data_mesh(), "batch_size": 256, "clip": trained.clip}
        batches = drawing.generate(trained.model, trained.params, table, range(len(real.images)), **options)
        found = features.measure(reference, space.extract(np.concatenate(list(batches))), ["frechet"])
        result.append(found["frechet_pixels"])
    return result


def _picture(variants, calls, figures):
    figure = new_figure(8, 0.9 + 0.3 * len(variants))
    axes = figure.subplots(1, len(calls), sharey=True, squeeze=False)[0]
    for panel, count in zip(axes, calls, strict=True):
        found = [figures.get((variant, count), [np.nan]) for variant in variants]
        means = [np.mean(of) for of in found]
        spread = [[mean - min(of) for mean, of in zip(means, found, strict=True)]]
        spread.append([max(of) - mean for mean, of in zip(means, found, strict=True)])
        colours = [f"C{list(dict.fromkeys(v.kind for v in variants)).index(variant.kind)}" for variant in variants]
        panel.barh(range(len(variants)), means, xerr=spread, color=colours, capsize=2)
        panel.axvline(means[0], color="grey", linestyle="--")
        panel.set_yticks(range(len(variants)), [f"{variant.kind}: {variant.name}" for variant in variants])
        panel.set(xlabel="frechet_pixels", title=f"{count} calls")
        panel.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    return figure
