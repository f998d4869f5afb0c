"""Ranks all deterministic solvers, and diffusers' schedulers beside them, on the ideal denoiser of real images.

    python benchmarks/ranking.py [--images=PATH] [--size=32] [--count=2000] [--samples=16] [--calls=5,10,25]
        [--schedule=linear] [--bandwidth=0] [--top=10] [--learn=64] [--out=ranking.csv]

The network is exact (`diffusion.testbeds.ideal` of the digits, or of some images in a folder or archive), so what is
measured is the solver and the grid alone: the root mean square distance, over samples and pixels, to the exact solution
of the probability flow from the same noise, all in float64. Beside it the median over samples, which a sample that
lands on another image does not move. A budget is a number of network calls; who cannot spend it exactly takes fewer.
With bandwidth 0 the flow ends at images of the set and draws everyone near onto them: many calls then err by nothing,
and a bandwidth of 0.1 tells more. Without torch and diffusers only ours are ranked. About five minutes for the digits
on two busy cores; the time of others grows with count and samples.
"""

import csv
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import diffusion
from diffusion import schedules, testbeds
from diffusion.data import digits
from diffusion.data import images as image_files
from diffusion.evaluation import ranking
from diffusion.learning import rollout, tables
from diffusion.learning.family import GROUPS
from diffusion.learning.losses import Loss

_IMAGES = flags.DEFINE_string("images", "", "A folder or archive of images; the digits of scikit-learn if empty.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of these images.")
_COUNT = flags.DEFINE_integer("count", 2000, "Images in the set, drawn with a fixed seed.")
_SAMPLES = flags.DEFINE_integer("samples", 16, "Samples.")
_CALLS = flags.DEFINE_list("calls", ["5", "10", "25"], "Budgets of network calls.")
_SCHEDULE = flags.DEFINE_enum("schedule", "linear", ["linear", "scaled_linear", "cosine"], "Noise schedule.")
_TOP = flags.DEFINE_integer("top", 10, "Rows to print for each side and budget; 0 prints all.")
_OUT = flags.DEFINE_string("out", "", "A CSV file for all rows.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", 0.0, "Std of a Gaussian around each image, in pixels of [-1, 1].")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-7, "Of the exact solution.")
_LEARN = flags.DEFINE_integer("learn", 0, "Also learn a table for each budget, from so many noises of their own.")


class Problem(NamedTuple):
    """What is to be solved.

    Attributes:
      name, schedule, testbed: the data, its noise schedule, and its exact eps-network.
      noise: [N, *shape], the start of all solvers.
      exact: where the probability flow takes it from T to 0.
    """

    name: str
    schedule: schedules.NoiseSchedule
    testbed: testbeds.Testbed
    noise: np.ndarray
    exact: np.ndarray


class Row(NamedTuple):
    """One solver on one grid; rms and median in pixel units of [-1, 1]."""

    side: str
    solver: str
    grid: str
    budget: int
    calls: int
    rms: float
    median: float


def main(_):
    jax.config.update("jax_enable_x64", True)
    problem = make_problem()
    rows = []
    for budget in map(int, _CALLS.value):
        rows += our_rows(problem, budget)
        if _LEARN.value:
            rows.append(learned_row(problem, budget))
        if importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers"):
            from ranking_diffusers import library_rows

            rows += [
                Row("diffusers", *row[:2], budget, row[2], *errors(ranking.squares(row[3], problem.exact)))
                for row in library_rows(problem, _SCHEDULE.value, budget)
            ]
        report(problem, [row for row in rows if row.budget == budget], budget)
    print("left out:", "; ".join(f"{name}: {reason}" for name, reason in ranking.LEFT_OUT.items()))
    if _OUT.value:
        with open(_OUT.value, "w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *sorted(rows, key=lambda row: (row.budget, row.rms))])


def make_problem():
    schedule = schedules.SCHEDULES[_SCHEDULE.value]()
    images = load_images()
    # As floats: converting them in every call takes longer than its products.
    testbed = testbeds.ideal(schedule, images / 127.5 - 1, bandwidth=_BANDWIDTH.value)
    testbed = testbed._replace(params=jax.device_put(testbed.params))
    noise = np.random.default_rng(0).standard_normal((_SAMPLES.value, *images.shape[1:]))
    exact = testbeds.ode_solution(*testbed, schedule, noise, schedule.num_timesteps, tolerance=_TOLERANCE.value)
    finer = testbeds.ode_solution(*testbed, schedule, noise, schedule.num_timesteps, tolerance=_TOLERANCE.value / 10)
    name = _IMAGES.value.rsplit("/", 1)[-1] or "digits"
    change = np.sqrt(np.mean((exact - finer) ** 2))
    print(
        f"{len(images):,} images of {name}, {images.shape[1:]}; {len(noise)} samples, {_SCHEDULE.value} schedule, "
        f"bandwidth {_BANDWIDTH.value:g}; the exact solution changes by {change:.1e} at a tenth of the tolerance",
        flush=True,
    )
    return Problem(name, schedule, testbed, noise, finer)


def load_images():
    """uint8 [N, H, W, C], the chosen number of them."""
    images = (
        image_files.load(_IMAGES.value, size=_SIZE.value, labels="none").images
        if _IMAGES.value
        else digits.load().images
    )
    chosen = np.random.default_rng(1).permutation(len(images))[: _COUNT.value]
    return images[np.sort(chosen)]


def our_rows(problem, budget):
    def draw(table):
        shape, start = problem.noise.shape[1:], jnp.asarray(problem.noise)
        return diffusion.sample(*problem.testbed, table, jax.random.key(0), len(start), shape, x_init=start)

    entries = ranking.candidates(ranking.maker(problem.schedule), budget)
    return [
        Row("ours", row.candidate.sampler, row.candidate.tau, budget, row.candidate.table.nfe, *errors(row.squares))
        for row in ranking.rank(draw, entries, problem.exact)
    ]


def learned_row(problem, budget):
    """A table learned from the exact solution, on noises that the ranking does not see."""
    size, shape = 16, problem.noise.shape[1:]
    rng = np.random.default_rng(2)
    batches, targets = [], []
    for _ in range(2 * -(-_LEARN.value // size)):
        noises = rollout.Noises(rng.standard_normal((size, *shape)))
        batches.append(noises)
        start = problem.schedule.num_timesteps
        targets.append(testbeds.ode_solution(*problem.testbed, problem.schedule, noises.x, start, tolerance=1e-6))
    half = len(batches) // 2
    asked = rollout.Asked(problem.testbed.params, None, problem.testbed.apply_fn)
    parts = (tuple(batches[:half]), tuple(batches[half:]), tuple(targets[:half]), tuple(targets[half:]))
    bed = tables.Bed(asked, problem.schedule, *parts, Loss(floor=None))  # the ranking is by the plain mean
    search = tables.begin(bed, budget, GROUPS)
    while search.current is not None:
        search = tables.advance(bed, search)
    x = rollout.run(asked, tables.result(bed, search), rollout.Noises(problem.noise))
    return Row(
        "learned",
        "learned",
        f"from {search.leader.start[0]}",
        budget,
        budget,
        *errors(ranking.squares(x, problem.exact)),
    )


def errors(squares):
    """(root mean square error, median of those of the samples)."""
    return float(np.sqrt(squares.mean())), float(np.sqrt(np.median(squares)))


def report(problem, rows, budget):
    """The best of both sides, and by how much they differ."""
    best = {}
    for side in dict.fromkeys(row.side for row in rows):
        ranked = sorted((row for row in rows if row.side == side), key=lambda row: row.rms)
        best[side] = ranked[0]
        print(f"\n{problem.name}, {budget} calls, {side}: the best of {len(ranked)}\n")
        print("| | solver | grid | calls | RMS error | median |\n|---|---|---|---|---|---|")
        for place, row in enumerate(ranked[: _TOP.value or None], 1):
            print(f"| {place} | `{row.solver}` | {row.grid} | {row.calls} | {row.rms:.2e} | {row.median:.2e} |")
    if "diffusers" in best:
        ours, theirs = best["ours"], best["diffusers"]
        print(f"\nbest of ours / best of diffusers at {budget} calls: {ours.rms / theirs.rms:.3f}", flush=True)


if __name__ == "__main__":
    app.run(main)
