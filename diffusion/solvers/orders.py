"""Plans the steps of a singlestep solver: from where to where each goes, with which order, and how calls are spent."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import Level, levels

CALLS = ("steps", "grid", "fast")
"""How many calls a singlestep solver makes: `order` of them for each step of tau; or one for each, as said below."""


class Step(NamedTuple):
    """A Step goes from a level to another; `met` are the levels of tau in between, for the inner calls of "grid"."""

    at: Level
    met: Sequence[Level]
    to: Level
    order: int


def planned(
    name: str, schedule: NoiseSchedule, grid: list[Level], order: int | Sequence[int], calls: str, highest: int
) -> list[Step]:
    """Decides from where to where each step goes, and its order.

    Steps of infinite length in lambda, to t = 0 and from zero signal, have order 1.

    Args:
      name: of the sampler, for errors.
      schedule: the noise schedule.
      grid: the levels of tau, S + 1 of them.
      order: of all steps, or of each.
      calls: "steps": each step of tau is a step, and makes as many calls as its order. "grid": a step of order p goes
        over p steps of tau and makes its inner calls at the times between, so S calls are made. Every step has the
        order asked for, but the last, and one before it that takes what is left (diffusers' singlestep schedulers).
        "fast": DPM-Solver-fast (arXiv:2206.00927, section 3.4) makes S - 1 calls down to the last time above 0, with
        orders such as 3, 3, 2, 1 in steps that each take the same share of tau; a last call goes to 0.
      highest: the highest order that the solver has.

    Raises:
      InputError: an order outside 1..highest, or orders that do not add up.
    """
    steps = len(grid) - 1
    if np.ndim(order) > 0 and any(p not in range(1, highest + 1) for p in order):
        raise InputError(f"order is {tuple(order)}; each must be a whole number in 1..{highest}")
    if calls == "steps":
        return _each(grid, order, steps)
    if calls == "grid":
        return _grouped(grid, _spent(grid, order))
    if np.isinf(grid[0].half_log_snr):
        raise InputError(f"{name} spaces steps by log-SNR, which is infinite at t = {grid[0].t:g}; take calls 'grid'")
    orders = _given(order, steps) if np.ndim(order) else _fast(steps - 1, int(order))
    return [*_respaced(schedule, grid[:-1], orders), Step(grid[-2], (), grid[-1], 1)]


def _each(grid, order, steps):
    """Plans a step for each step of tau."""
    finite = [np.isfinite(to.half_log_snr - at.half_log_snr) for at, to in pairwise(grid)]
    if np.ndim(order) == 0:
        orders = [int(order) if long else 1 for long in finite]
    elif len(order) != steps:
        raise InputError(f"order names {len(order)} steps and tau has {steps}; give one order for each step")
    else:
        orders = [int(p) for p in order]
        for i, (p, long) in enumerate(zip(orders, finite, strict=True)):
            if p > 1 and not long:
                raise InputError(f"order of step {i} is {p}; a step to t = 0 or from zero signal has order 1")
    return [Step(at, (), to, p) for (at, to), p in zip(pairwise(grid), orders, strict=True)]


def _given(order, calls):
    """Checks the orders of steps that make so many calls, the last of order 1, and returns those before the last."""
    if sum(order) != calls or order[-1] != 1:
        raise InputError(f"order is {tuple(order)}; the orders must add up to {calls}, the steps of tau, and end in 1")
    return [int(p) for p in order[:-1]]


def _spent(grid, order):
    """Returns orders that add up to the steps of the grid."""
    steps, start = len(grid) - 1, [1] * bool(np.isinf(grid[0].half_log_snr) and len(grid) > 2)
    if np.ndim(order):
        orders = [*_given(order, steps), 1]
        if start and orders[0] > 1:
            raise InputError(f"order of step 0 is {orders[0]}; a step from zero signal has order 1")
        return orders
    full, rest = divmod(steps - 1 - len(start), int(order))
    return [*start, *[int(order)] * full, *[rest] * (rest > 0), 1]


def _fast(calls, order):
    """Returns the orders of DPM-Solver-fast for so many calls; those of orders below 3 are the authors' as well."""
    full, rest = divmod(calls, order)
    if order == 3 and rest == 0 and calls:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def _grouped(grid, orders):
    """Plans steps that each go over as many steps of tau as their order."""
    ends = np.cumsum([0, *orders])
    return [
        Step(grid[i], grid[i + 1 : j], grid[j], p) for (i, j), p in zip(pairwise(ends.tolist()), orders, strict=True)
    ]


def _respaced(schedule, finite, orders):
    """Plans steps that each take the same share of the levels, between which lambda is taken to be linear."""
    places = np.linspace(0, len(finite) - 1, len(orders) + 1)
    lambdas = np.interp(places, np.arange(len(finite)), [level.half_log_snr for level in finite])
    between = levels(schedule, schedule.time_of(lambdas))
    ends = [finite[round(i)] if i == round(i) else level for i, level in zip(places.tolist(), between, strict=True)]
    return [Step(at, (), to, p) for (at, to), p in zip(pairwise(ends), orders, strict=True)]
