"""Ranks hand-made samplers at a budget of network calls: by the distance of their samples to those of a solution.

All of them start from the same noise, so that the distance is what a solver and its grid lose, whatever the network
has learned. Samplers that draw noise on their way end elsewhere, and cannot be compared by it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion import options
from diffusion.errors import InputError
from diffusion.learning import starts
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SOLVERS, SamplerTable

GRIDS = ("uniform", "linspace", "quadratic", "leading", "log_snr", "karras", "karras:rho=3", "leading:last=false")
GRIDS += ("linspace:last=false", "uniform:start=0.9", "uniform:start=0.75", "kl_optimal", "beta")
"""`strided` and `trailing` are `uniform` where the number of steps divides T."""


def _choices(**lists):
    """Returns all combinations of options, each a dict."""
    found = [{}]
    for name, values in lists.items():
        found = [{**chosen, name: value} for chosen in found for value in values]
    return found


_ENDS = {"lower_order_final": (True, False)}
_SPENT = {"variant": ("official", "exact", "midpoint"), "calls": ("steps", "grid", "fast")}
_OPTIONS = {
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
    "rk": _choices(order=(2, 3, 4), basis=("rho", "flow")),
}

LEFT_OUT = {
    "ddpm": "stochastic",
    "sigma_hat": "stochastic",
    "euler_ancestral": "stochastic",
    "consistency": "stochastic",
    "dpm_solver_pp_sde": "stochastic",
    "restart": "stochastic",
    "edm": "heun, or stochastic",
    "tcd": "ddim, or stochastic",
    "euler": "the table of ddim",
}
"""The solvers that are not ranked, and why; one that is neither here nor has options above is ranked as it is."""

SAMPLERS: dict[str, tuple[str, ...]] = {
    name: tuple(
        options.write(options.Choice(name, solver, chosen), 2)
        for chosen in (_OPTIONS[name] if name in _OPTIONS else _choices())
    )
    for name, solver in SOLVERS.items()
    if name not in LEFT_OUT
}
"""The texts of each solver with the options that are tried."""

Make = Callable[[str, str, int], SamplerTable]
"""(sampler, grid, steps) -> table, from texts; it raises InputError where there is no such table."""


class Candidate(NamedTuple):
    """A sampler on a grid, both as text, with its number of steps and its table."""

    sampler: str
    tau: str
    steps: int
    table: SamplerTable


class Row(NamedTuple):
    """What a candidate loses.

    Attributes:
      candidate: the sampler.
      squares: of each sample, the mean square distance to the solution; infinite where a sample is not finite.
    """

    candidate: Candidate
    squares: Float[np.ndarray, "N"]

    @property
    def rms(self) -> float:
        """The root mean square distance over samples and numbers."""
        return float(np.sqrt(self.squares.mean()))

    @property
    def median(self) -> float:
        """The median over samples of their root mean square distances."""
        return float(np.sqrt(np.median(self.squares)))


def maker(schedule: NoiseSchedule) -> Make:
    """Returns what makes the tables of `SOLVERS` on a schedule."""
    return lambda sampler, tau, steps: starts.solver(sampler)(schedule, starts.grid(schedule, tau, steps))


def candidates(
    make: Make, calls: int, samplers: Sequence[str] | None = None, grids: Sequence[str] = GRIDS
) -> list[Candidate]:
    """Returns every sampler on every grid with as many steps as the budget allows, and no table twice.

    Args:
      make: see `maker`.
      calls: the budget; a sampler that cannot spend it exactly makes fewer.
      samplers: names of `SAMPLERS`, which stand for all their options, or samplers with options; None for all.
      grids: as texts.

    Raises:
      InputError: a sampler draws noise.
    """
    texts = [text for name in SAMPLERS if samplers is None for text in SAMPLERS[name]]
    texts += [text for name in samplers or () for text in SAMPLERS.get(name, (name,))]
    found: dict[bytes, Candidate] = {}
    for sampler in texts:
        for tau in grids:
            candidate = _largest(make, calls, sampler, tau)
            if candidate is None:
                continue
            if candidate.table.log_variance is not None or np.any(candidate.table.update[..., -1]):
                raise InputError(
                    f"sampler {sampler} draws noise at its steps, and no distance to a solution says how good its "
                    "samples are; leave it out, and compare it by the metrics of samples"
                )
            # Two names can be one table.
            found.setdefault(candidate.table.update.tobytes() + candidate.table.t.tobytes(), candidate)
    return list(found.values())


def _largest(make, calls, sampler, tau):
    """Returns the candidate of most steps within the budget, or None."""
    for steps in range(calls, 0, -1):
        try:
            table = make(sampler, tau, steps)
        except InputError:
            continue
        if table.nfe <= calls:
            return Candidate(sampler, tau, steps, table)
    return None


def rank(
    draw: Callable[[SamplerTable], Float[np.ndarray, "N *shape"]],
    entries: Sequence[Candidate],
    solution: Float[np.ndarray, "N *shape"],
) -> Iterator[Row]:
    """Yields what each candidate loses, in another order than theirs: tables of one number of calls follow each other.

    Such tables get one shape, so that a `draw` which compiles for each shape, as `diffusion.sample` does, compiles once
    for each number of calls.

    Args:
      draw: makes the samples of a table, always from the same noise.
      entries: from `candidates`.
      solution: what they would be if the table lost nothing.
    """
    for nfe in sorted({entry.table.nfe for entry in entries}, reverse=True):
        alike = [entry for entry in entries if entry.table.nfe == nfe]
        registers = max(entry.table.num_registers for entry in alike)
        for entry in alike:
            yield Row(entry, squares(draw(_widened(entry.table, registers)), solution))


def squares(samples: Float[np.ndarray, "N *shape"], solution: Float[np.ndarray, "N *shape"]) -> Float[np.ndarray, "N"]:
    """Returns the mean square distance of each sample to its solution, infinite where that is no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.asarray(samples, np.float64) - np.asarray(solution, np.float64)
        found = np.mean(apart.reshape(len(apart), -1) ** 2, axis=1)
    return np.where(np.isfinite(found), found, np.inf)


def _widened(table, registers):
    """Returns the table with registers beyond its own, which stay empty; its samples are the same."""
    stages, own, _ = table.update.shape
    update = np.zeros((stages, registers, registers + 2))
    update[:, :own, :own], update[:, :own, registers:] = table.update[..., :own], table.update[..., own:]
    return dataclasses.replace(table, update=update)
