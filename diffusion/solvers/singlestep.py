"""DPM-Solver and singlestep DPM-Solver++ make several network calls a step and remember nothing between steps.

With h = lambda_s - lambda_t and the network called again at lambda_t + r h, both are Runge-Kutta methods that solve the
linear part exactly: in the eps basis (DPM-Solver) or the x_0 basis (DPM-Solver++). These inner times are real and lie
between those of the grid, as in the papers; where they lie depends on how the schedule continues between timesteps.
diffusers' singlestep schedulers call the network at times of the grid alone, and so are other samplers.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import (
    Form,
    Level,
    build,
    check_order,
    eps_levels,
    eps_of,
    grid_levels,
    levels,
    runge_kutta,
)
from diffusion.solvers.integrals import NODES, WEIGHTS
from diffusion.solvers.table import SamplerTable

INNER = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
"""The published r of the inner evaluations, by order."""


def dpm_solver(schedule: NoiseSchedule, tau, order: int = 2) -> SamplerTable:
    """Builds DPM-Solver-1, -2 and -3, singlestep in the eps basis (arXiv:2206.00927, Algorithms 1 and 2, Eq. 3.7).

    `order` calls a step. The last step has order 1 and returns D, as no time lies at a fraction of the way to lambda =
    inf: order (S - 1) + 1 calls in all.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM); 2, with r1 = 1/2; or 3, with r1 = 1/3 and r2 = 2/3.

    Raises:
      InputError: an order outside 1..3, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    order = check_order(order, 3)
    name = f"dpm_solver(order={order})"
    return _singlestep(name, schedule, tau, order, eps_levels(name, schedule, tau), _EPS)


def dpm_solver_pp_singlestep(schedule: NoiseSchedule, tau, order: int = 2) -> SamplerTable:
    """Builds DPM-Solver++(2S) (arXiv:2211.01095, Algorithm 1) and its 3S, singlestep in the x_0 basis.

    `order` calls a step. The last step has order 1 and returns D: order (S - 1) + 1 calls in all. A step from zero
    signal (lambda = -inf) has order 1, too. 3S is DPM-Solver-3 with D for eps and -lambda for lambda, as in the
    authors' code; the paper stops at 2S.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM); 2, with r1 = 1/2; or 3, with r1 = 1/3 and r2 = 2/3.

    Raises:
      InputError: an order outside 1..3, or tau is not a grid of the schedule.
    """
    order = check_order(order, 3)
    name = f"dpm_solver_pp_singlestep(order={order})"
    return _singlestep(name, schedule, tau, order, grid_levels(schedule, tau), _X0)


class _Basis(NamedTuple):
    """A basis is what a solver takes to be nearly constant, eps or x_0, and the weight this has in a step.

    `held` returns (scale, z): if the quantity is held over a step of length h, it weighs scale expm1(z) at the end.
    """

    evaluate: Callable[[Level, Form, Form], Form]
    held: Callable[[Level, float], tuple[float, float]]


_EPS = _Basis(eps_of, lambda to, h: (-to.noise, h))
_X0 = _Basis(lambda at, x, D: D, lambda to, h: (-to.signal, -h))


def _singlestep(name: str, schedule: NoiseSchedule, tau, order: int, grid: list[Level], basis: _Basis) -> SamplerTable:
    """Builds either solver: each step has the given order, or order 1 if its length in lambda is infinite."""
    steps = list(pairwise(grid))
    lengths = [to.half_log_snr - at.half_log_snr for at, to in steps]
    fractions = [[*INNER[order], 1.0] if np.isfinite(h) else [1.0] for h in lengths]
    registers = max(map(len, fractions))
    stages = []
    # The network is called again at each share of the step in lambda, and each call improves the next target.
    for (at, to), h, shares in zip(steps, lengths, fractions, strict=True):
        inner = levels(schedule, schedule.time_of([at.half_log_snr + r * h for r in shares[:-1]]))
        targets = [*inner, to]
        later = zip(targets[1:], pairwise(shares), strict=True)
        weights = [0.0, *(_weight(order, basis, target, r, share, h) for target, (r, share) in later)]
        stages += runge_kutta(at, targets, weights, basis.evaluate, registers)
    return build(name, tau, stages, registers)


def _weight(order: int, basis: _Basis, to: Level, r: float, share: float, h: float) -> float:
    """Weighs F(lambda_t + r h) - F(lambda_t) in the solution at `to`, which lies at lambda_t + share h."""
    scale, z = basis.held(to, share * h)
    if order == 2:
        # The published 2 and 2S put half of the weight of a constant F for the integral of a change linear in lambda.
        # The two agree to second order.
        return scale * np.expm1(z) / (2 * r)
    # F linear in lambda gives (share / r) ((e^z - 1) / z - 1). The quadrature adds terms of one sign, where that
    # difference would cancel for short steps.
    return scale * share / r * (WEIGHTS @ np.expm1(z * NODES))
