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
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import diffusion
from diffusion import schedules, solvers, testbeds, timesteps
from diffusion.data import digits
from diffusion.data import images as image_files
from diffusion.errors import InputError
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


GRIDS = {name: timesteps.GRIDS[name] for name in ("uniform", "linspace", "quadratic", "leading", "log_snr", "karras")}
GRIDS |= {
    "karras:rho=3": partial(timesteps.karras, rho=3.0),
    "leading:last=false": partial(timesteps.leading, last=False),
    "linspace:last=false": partial(timesteps.linspace, last=False),
    "uniform:start=0.9": partial(timesteps.uniform, start=0.9),
    "uniform:start=0.75": partial(timesteps.uniform, start=0.75),
    "kl_optimal": timesteps.kl_optimal,
    "beta": timesteps.beta,
}
"""`strided` and `trailing` are `uniform` where the number of steps divides T."""


def _choices(**lists):
    """All combinations of options, each a dict."""
    options = [{}]
    for name, values in lists.items():
        options = [{**option, name: value} for option in options for value in values]
    return options


_ENDS = {"lower_order_final": (True, False)}
_SPENT = {"variant": ("official", "exact", "midpoint"), "calls": ("steps", "grid", "fast")}
OURS = {
    "ddim": _choices(),
    "dpm_solver": _choices(order=(2, 3), **_SPENT),
    "dpm_solver_multistep": _choices(order=(2, 3), variant=("official",), **_ENDS),
    "dpm_solver_pp": _choices(order=(2, 3), variant=("exact", "official"), **_ENDS),
    "dpm_solver_pp_singlestep": _choices(order=(2, 3), **_SPENT),
    "unipc": _choices(order=(2, 3), variant=("bh1", "bh2", "exact"), basis=("x0", "eps"), end=(0, 1), **_ENDS),
    "sa_solver": _choices(predictor_order=(2, 3), corrector_order=(2, 3, 4), sde_eta=(0.0,)),
    "er_sde": _choices(order=(2, 3), kind=("ode",)),
    "deis": _choices(order=(2, 3, 4), basis=("lambda", "rho", "t"), **_ENDS),
    "lms": _choices(order=(2, 3, 4), **_ENDS),
    "ipndm": _choices(order=(2, 3, 4), **_ENDS),
    "plms": _choices(order=(2, 4), **_ENDS),
    "pndm": _choices(**_ENDS),
    "heun": _choices(),
    "rk": _choices(order=(2, 3, 4), basis=("rho", "flow")),
}
LEFT_OUT = {
    "ddpm": "stochastic",
    "sigma_hat": "stochastic",
    "euler_ancestral": "stochastic",
    "consistency": "stochastic",
    "euler": "the table of ddim",
    "edm": "heun, or stochastic",
    "dpm_solver_pp_sde": "stochastic",
    "restart": "stochastic",
    "tcd": "ddim, or stochastic",
}


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
    for name in solvers.SOLVERS.keys() - OURS.keys() - LEFT_OUT.keys():
        OURS[name] = _choices()
        print(f"{name} is ranked with its defaults; name its options in OURS, or why not to rank it in LEFT_OUT")
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
                Row("diffusers", *row[:2], budget, row[2], *errors(problem, row[3]))
                for row in library_rows(problem, _SCHEDULE.value, budget)
            ]
        report(problem, [row for row in rows if row.budget == budget], budget)
    print("left out:", "; ".join(f"{name}: {reason}" for name, reason in LEFT_OUT.items()))
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
    rows, seen = [], set()
    for solver, choices in OURS.items():
        for options in choices:
            for grid in GRIDS:
                table = largest_table(problem.schedule, solver, options, grid, budget)
                if table is None or (key := table.update.tobytes() + table.t.tobytes()) in seen:
                    continue  # the same table under another name
                seen.add(key)
                x = diffusion.sample(
                    *problem.testbed,
                    table,
                    jax.random.key(0),
                    len(problem.noise),
                    problem.noise.shape[1:],
                    x_init=jnp.asarray(problem.noise),
                )
                name = ",".join(f"{key}={value}" for key, value in options.items())
                rows.append(Row("ours", f"{solver}:{name}".rstrip(":"), grid, budget, table.nfe, *errors(problem, x)))
    return rows


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
    return Row("learned", "learned", f"from {search.leader.start[0]}", budget, budget, *errors(problem, x))


def largest_table(schedule, solver, options, grid, budget):
    """The table of most steps within the budget, or None."""
    for steps in range(budget, 0, -1):
        try:
            tau = GRIDS[grid](schedule, steps)
            table = solvers.SOLVERS[solver](schedule, tau, **options)
        except InputError:
            continue
        if table.nfe <= budget:
            return table
    return None


def errors(problem, x):
    """(root mean square error, median of those of the samples)."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.mean((np.asarray(x, np.float64) - problem.exact).reshape(len(problem.noise), -1) ** 2, axis=1)
    squares = np.where(np.isfinite(squares), squares, np.inf)
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
