"""The hand-made samplers that a learned one begins from and must beat."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from diffusion import options, timesteps
from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SOLVERS, SamplerTable
from diffusion.solvers.history import History, from_table

BASES = ("ddim", "dpm_solver_pp:order=2", "dpm_solver_pp:order=3", "unipc:order=2", "unipc:order=3")
BASES += ("unipc:order=2,lower_order_final=False", "unipc:order=3,lower_order_final=False", "deis:order=2")
BASES += ("ipndm", "ipndm:order=2")
GRIDS = tuple(grid + start for grid in ("uniform", "quadratic", "log_snr", "karras") for start in ("", ":start=0.985"))
GRIDS += ("uniform:start=0.9",)
"""Which hand-made solvers are looked at, on which grids; a start at 0.9 T is for 3 to 5 calls."""


def hand_made(schedule: NoiseSchedule, calls: int) -> Iterator[tuple[str, str, History]]:
    """Yields (solver, grid, history) for the hand-made samplers of so many calls that the schedule allows."""
    seen = set()
    for base in BASES:
        for text in GRIDS:
            try:
                history = from_table(solver(base)(schedule, grid(schedule, text, calls)))
            except InputError:  # such as order 3 in a single step, or a grid in log-SNR at zero terminal SNR
                continue
            # Rounded, as two solvers can be the same sampler by other sums. Adding 0 makes -0 a 0.
            key = b"".join((np.round(np.asarray(part, np.float64), 9) + 0.0).tobytes() for part in history)
            if key not in seen and history.nfe == calls:
                seen.add(key)
                yield base, text, history


def solver(text: str) -> Callable[..., SamplerTable]:
    """Returns the solver of a name with its options, as "unipc:order=2"."""
    choice = options.parse("sampler", text, SOLVERS, leading=2)
    return partial(choice.function, **choice.options)


def grid(schedule: NoiseSchedule, text: str, calls: int) -> timesteps.Tau:
    """Returns the grid of a name with its options, as "uniform:start=0.985"."""
    choice = options.parse("tau", text, timesteps.GRIDS, leading=2)
    return choice.function(schedule, calls, **choice.options)
