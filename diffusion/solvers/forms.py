"""What solvers with several registers or calls a step share: rows written the way papers write steps.

A row of a table is a linear form in the columns (registers, D, z). With the columns as unit vectors,
`x, *others, D, z = columns(R)`, an expression such as `first_order(at, to, x, D) + w * (old - eps_of(at, x, D))` IS the
row. All methods here are a DDIM step, exact where D is constant, plus weighted differences of evaluations: no weight of
size 1 / a_t is subtracted from another, and a constant D is reproduced whatever the weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion import timesteps
from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.table import SamplerTable, make_table

Form = Float[np.ndarray, "R+2"]
"""A linear form in the columns of a table."""


class Level(NamedTuple):
    """A time with its signal a, noise n and lambda = log(a / n)."""

    t: float
    signal: float
    noise: float
    half_log_snr: float


class Stage(NamedTuple):
    """One network call: where it is made, and the next registers; those not named become 0."""

    at: Level
    rows: Sequence[Form]


def levels(schedule: NoiseSchedule, t) -> list[Level]:
    """The levels at real times t, [K]."""
    return [Level(*map(float, values)) for values in zip(t, *schedule.at(t), schedule.half_log_snr(t), strict=True)]


def grid_levels(schedule: NoiseSchedule, tau) -> list[Level]:
    """The levels of a checked grid, from tau[0] to 0."""
    return levels(schedule, timesteps.check(schedule, tau))


def eps_levels(name: str, schedule: NoiseSchedule, tau) -> list[Level]:
    """`grid_levels` for a solver in the eps basis, which cannot start where the signal is zero."""
    grid = grid_levels(schedule, tau)
    if grid[0].signal == 0:
        raise InputError(
            f"{name} starts at t = {grid[0].t:g}, where the signal is zero and eps says nothing about x_0; "
            "start tau lower, or use ddim or dpm_solver_pp"
        )
    return grid


def check_order(order: int, highest: int, lowest: int = 1) -> int:
    """Returns the order if it is a whole number in lowest..highest."""
    if order not in range(lowest, highest + 1):
        raise InputError(f"order is {order}; it must be a whole number in {lowest}..{highest}")
    return int(order)


def columns(num_registers: int) -> Float[np.ndarray, "R+2 R+2"]:
    """The registers, D and z as linear forms."""
    return np.eye(num_registers + 2)


def first_order(at: Level, to: Level, x: Form, D: Form) -> Form:
    """x_s = (n_s / n_t) x + a_s (1 - e^{-h}) D, h = lambda_s - lambda_t: DDIM (arXiv:2010.02502, Eq. 12) at eta = 0.

    The form with expm1 keeps short steps exact, and holds for h = inf, at s = 0 and from zero signal.
    """
    return to.noise / at.noise * x - to.signal * np.expm1(at.half_log_snr - to.half_log_snr) * D


def eps_of(at: Level, x: Form, D: Form) -> Form:
    """eps = (x - a_t D) / n_t."""
    return (x - at.signal * D) / at.noise


def eps_weight(at: Level, to: Level) -> float:
    """a_s (rho_s - rho_t), rho = n / a: the weight of eps in x_s = (a_s / a_t) x + a_s int eps d rho."""
    return to.signal * at.noise / at.signal * np.expm1(at.half_log_snr - to.half_log_snr)


def runge_kutta(
    at: Level,
    targets: Sequence[Level],
    weights: Sequence[float],
    evaluate: Callable[[Level, Form, Form], Form],
    num_registers: int,
) -> list[Stage]:
    """The stages of one step from `at`, in which each evaluation F_j serves the next target alone.

    U_j = first_order(at, target_j) + weight_j (F_{j-1} - F_0), F_j = evaluate(target_j, U_j, D_j); the last U_j is the
    next x. All U_j are begun in the first stage and wait in the registers for their last term. Needs as many registers
    as targets.
    """
    x, *waiting, D, _ = columns(num_registers)
    begun = [first_order(at, to, x, D) - w * evaluate(at, x, D) for to, w in zip(targets, weights, strict=True)]
    stages = [Stage(at, begun)]
    for here, weight in zip(targets[:-1], weights[1:], strict=True):
        stages.append(Stage(here, [waiting[0] + weight * evaluate(here, x, D), *waiting[1:]]))
    return stages


def build(name: str, tau, stages: Sequence[Stage], num_registers: int) -> SamplerTable:
    """The table of these stages."""
    update = np.zeros((len(stages), num_registers, num_registers + 2))
    for matrix, stage in zip(update, stages, strict=True):
        matrix[: len(stage.rows)] = stage.rows
    t, signal, noise, _ = np.array([stage.at for stage in stages]).T
    return make_table(name, tau, t, signal, noise, update)
