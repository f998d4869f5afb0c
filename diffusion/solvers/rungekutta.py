"""Classical Runge-Kutta methods in the noise level: on eps in n / a, or on the velocity of a rectified flow."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import (
    Form,
    Level,
    build,
    check_order,
    eps_levels,
    eps_of,
    eps_weight,
    grid_levels,
    levels,
    runge_kutta,
)
from diffusion.solvers.table import SamplerTable


class _Tableau(NamedTuple):
    """A Butcher tableau: the shares of the step at which the later evaluations are made, and the rows of weights."""

    shares: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]


TABLEAUS = {
    2: _Tableau((1,), ((1,), (1 / 2, 1 / 2))),
    3: _Tableau((1 / 2, 1), ((1 / 2,), (-1, 2), (1 / 6, 2 / 3, 1 / 6))),
    4: _Tableau((1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6))),
}
"""Heun's method, Kutta's of third order and the classical one of fourth: DEIS's rho2Heun, rho3Kutta and rho4RK."""

BASES = ("rho", "flow")


def rk(schedule: NoiseSchedule, tau, order: int = 4, basis: str = "rho") -> SamplerTable:
    """Builds rho-RK-DEIS (arXiv:2204.13902, section 3.3): Heun's, Kutta's or the classical Runge-Kutta method.

    `order` calls a step. The last step is a DDIM step, which returns D, as the network cannot be called at t = 0:
    order (S - 1) + 1 calls. Order 2 with basis "rho" is `heun`.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 2 (Heun), 3 (Kutta) or 4.
      basis: "rho" solves d(x / a) = eps d rho in rho = n / a, and cannot start at zero signal. "flow" solves dy = v ds
        with y = x / (a + n), s = n / (a + n) and v = eps - x_0, the straight lines of rectified flow, which any
        schedule is after scaling; it starts anywhere. Order 2 is diffusers' FlowMatchHeunDiscreteScheduler.

    Raises:
      InputError: an order or basis outside the above, zero signal at tau[0] with basis "rho", or tau is not a grid of
        the schedule.
    """
    order = check_order(order, 4, lowest=2)
    if basis not in BASES:
        raise InputError(f"basis is {basis!r}; {nearest(str(basis), BASES)}")
    name = f"rk(order={order}, basis={basis})"
    grid = eps_levels(name, schedule, tau) if basis == "rho" else grid_levels(schedule, tau)
    steps, tableau = list(pairwise(grid)), TABLEAUS[order]
    registers = order if len(steps) > 1 else 1
    evaluate, weigh = (eps_of, eps_weight) if basis == "rho" else (_velocity, _velocity_weight)
    stages = []
    for at, to in steps[:-1]:
        targets = [*(_between(schedule, basis, at, to, c) for c in tableau.shares), to]
        # A target is a DDIM step, which holds F_0, and what the others differ from F_0; its own weight drops out.
        rows = [
            [weigh(at, target) * a / sum(row) for a in row[1:]]
            for target, row in zip(targets, tableau.rows, strict=True)
        ]
        stages += runge_kutta(at, targets, rows, evaluate, registers)
    stages += runge_kutta(*steps[-1][:1], [grid[-1]], [0.0], evaluate, registers)
    return build(name, tau, stages, registers)


def _between(schedule: NoiseSchedule, basis: str, at: Level, to: Level, share: float) -> Level:
    """Finds the level at a share of the step in rho or in s."""
    if share == 1:
        return to
    if basis == "rho":
        half_log_snr = -np.log(at.rho + share * (to.rho - at.rho))
    else:
        s, s_to = (level.noise / (level.signal + level.noise) for level in (at, to))
        middle = s + share * (s_to - s)
        half_log_snr = np.log((1 - middle) / middle)
    return levels(schedule, schedule.time_of([half_log_snr]))[0]


def _velocity(at: Level, x: Form, D: Form) -> Form:
    """Computes v = eps - x_0."""
    return eps_of(at, x, D) - D


def _velocity_weight(at: Level, to: Level) -> float:
    """Returns the weight of a constant v in x_s: (a_s + n_s) (s - t), with s and t the noise in units of a + n."""
    return (to.noise * at.signal - at.noise * to.signal) / (at.signal + at.noise)
