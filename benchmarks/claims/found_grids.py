"""Grids by dynamic programming against those of a formula, at few steps."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.claims.report import Findings, model_facts, new_figure
from benchmarks.claims.table_ablation import distances
from diffusion import keys, timesteps
from diffusion.commands import rollouts
from diffusion.data import digits
from diffusion.guidance import Guidance
from diffusion.learning import analytic, paths
from diffusion.model import Trained
from diffusion.solvers import ddim, unipc

SOLVERS = {"ddim": ddim, "unipc:order=2": partial(unipc, order=2)}
FORMULAS = ("uniform", "quadratic", "log_snr", "karras")
PATHS, IMAGES = 64, 256
"""How many paths of a teacher, and how many images, the grids that are found look at."""


def measure(
    name: str, trained: Trained, *, steps: Sequence[int] = (5, 10), seeds: Sequence[int] = range(3)
) -> Findings:
    """The distance with each grid, all from 0.985 T on, and the times that dynamic programming takes."""
    grids = make_grids(trained, steps)
    rows, means = [], {}
    for grid in (*FORMULAS, "dp_bound", "dp_path"):
        for count in steps:
            tau = grids[grid, count]
            cells = []
            for label, solver in SOLVERS.items():
                found = distances(trained, solver(trained.model.schedule, tau), seeds)
                means[label, grid, count] = float(np.mean(found))
                cells += [means[label, grid, count], f"{min(found):.4f} to {max(found):.4f}"]
            rows.append((grid, count, *cells, ", ".join(f"{t:.0f}" for t in tau[:-1])))
            print(*rows[-1], flush=True)
    columns = ["grid", "steps", *(text for label in SOLVERS for text in (label, "its seeds")), "times"]
    facts = (
        f"{model_facts(name, trained)}; Frechet distance on pixels, means of {len(seeds)} seed(s), as many samples as "
        "real images, all grids from 0.985 T on;"
    )
    return Findings(columns, rows, _figure(means, steps), facts)


def make_grids(trained: Trained, steps: Sequence[int]) -> dict[tuple[str, int], timesteps.Tau]:
    """Returns the grids by name and number of steps; what is estimated is estimated once."""
    model, start = trained.model, 0.985
    times = paths.times(model.schedule, start)
    images = digits.load().images
    chosen = np.random.default_rng(0).permutation(len(images))[:IMAGES]
    gamma = analytic.estimate_gamma(model, trained.params, images[chosen], times[:-1], keys.make(0))
    guidance, key = Guidance(), rollouts.key_of(0, "path")
    (noises,) = rollouts.batches(model, guidance, (), key, range(PATHS), PATHS)
    asked = rollouts.asked(trained, {"clip": trained.clip, "dynamic_threshold": None}, guidance)
    costs = paths.path_costs(asked, model.schedule, times, noises)
    result = {}
    for count in steps:
        for grid in FORMULAS:
            result[grid, count] = timesteps.GRIDS[grid](model.schedule, count, start=start)
        result["dp_bound", count] = paths.dp_bound(model.schedule, count, lambda tau: gamma, start)
        result["dp_path", count] = paths.dp_path(model.schedule, count, lambda tau: costs, start)
    return result


def _figure(means, steps):
    figure = new_figure(9, 3.6)
    grids = list(dict.fromkeys(grid for _, grid, _ in means))
    for axes, label in zip(figure.subplots(1, len(SOLVERS), sharey=True), SOLVERS, strict=True):
        for number, count in enumerate(steps):
            offsets = np.arange(len(grids)) + 0.4 * number
            axes.bar(offsets, [means[label, grid, count] for grid in grids], 0.4, label=f"{count} steps")
        axes.set_xticks(np.arange(len(grids)) + 0.2, grids, rotation=30)
        axes.set(yscale="log", ylabel="frechet_pixels", title=label)
        axes.grid(alpha=0.3, axis="y")
        axes.legend()
    return figure
