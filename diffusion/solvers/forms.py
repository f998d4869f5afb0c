"""A solver is written as formulas on unit vectors, which makes its code read like the paper and yields its table.

A stage of a table makes the next registers from the registers (x, and what the solver keeps from earlier calls), the
denoised estimate D and fresh noise z. `columns` returns all of these as unit vectors. The formula of a paper, computed
on them, is a linear form: the very row of coefficients that the table stores. This is the deterministic DDIM in full,
x_s = a_s D + n_s eps for each step from `at` (t) to `to` (s):

    from itertools import pairwise

    from diffusion.solvers.forms import Stage, build, columns, eps_of, grid_levels


    def my_ddim(schedule, tau):
        x, D, _ = columns(1)
        stages = []
        for at, to in pairwise(grid_levels(schedule, tau)):
            stages.append(Stage(at, [to.signal * D + to.noise * eps_of(at, x, D)]))
        return build("my_ddim", tau, stages, num_registers=1)

A multistep method keeps earlier evaluations in further registers. The two-step method of Adams and Bashforth solves
d(x / a) = eps d rho, with rho = n / a: to the DDIM step it adds r / 2 times the last change of eps, weighed as eps is,
where r is the ratio of this step in rho to the one before. The first step has none before it and takes r = 0:

    from itertools import pairwise

    from diffusion.solvers.forms import Stage, build, columns, eps_levels, eps_of, eps_weight, first_order


    def my_adams(schedule, tau):
        x, old, D, _ = columns(2)  # old is the eps of the step before
        grid, stages = eps_levels("my_adams", schedule, tau), []
        for i, (at, to) in enumerate(pairwise(grid)):
            eps = eps_of(at, x, D)
            r = (to.rho - at.rho) / (at.rho - grid[i - 1].rho) if i else 0.0
            new_x = first_order(at, to, x, D) + eps_weight(at, to) * r / 2 * (eps - old)
            stages.append(Stage(at, [new_x, eps]))
        return build("my_adams", tau, stages, num_registers=2)

Most methods of this package are written as a DDIM step, exact where D is constant, plus weighted differences of
evaluations. Then no weight of size 1 / a_t is subtracted from another, and a constant D is reproduced whatever the
weights.
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
"""A linear form in the columns of a table: R registers, D and z."""


class Level(NamedTuple):
    """A Level holds a time with its signal a, noise n and lambda = log(a / n)."""

    t: float
    signal: float
    noise: float
    half_log_snr: float

    @property
    def rho(self) -> float:
        """rho = n / a is the noise in units of the signal, the sigma of EDM and k-diffusion."""
        return self.noise / self.signal


class Stage(NamedTuple):
    """A Stage is one network call: the level where it is made, and the next registers; those not given become 0."""

    at: Level
    rows: Sequence[Form]


def columns(num_registers: int) -> Float[np.ndarray, "R+2 R+2"]:
    """Returns the registers, D and z as unit vectors, in this order, for formulas to be computed on."""
    return np.eye(num_registers + 2)


def build(
    name: str,
    tau,
    stages: Sequence[Stage],
    num_registers: int,
    log_variance: Float[np.ndarray, "stages 2"] | None = None,
) -> SamplerTable:
    """Turns the stages of a solver into its checked table.

    Args:
      name: what to call the sampler.
      tau: the grid, [S + 1].
      stages: one for each network call, in order.
      num_registers: R, the registers that the forms were made for with `columns(R)`.
      log_variance: for a network that predicts its variance; see `SamplerTable`.

    Raises:
      InputError: an entry is not finite, as where a solver divides by a signal of zero.
    """
    update = np.zeros((len(stages), num_registers, num_registers + 2))
    for matrix, stage in zip(update, stages, strict=True):
        matrix[: len(stage.rows)] = stage.rows
    t, signal, noise, _ = np.array([stage.at for stage in stages]).T
    return make_table(name, tau, t, signal, noise, update, log_variance)


# Levels


def levels(schedule: NoiseSchedule, t: Float[np.ndarray, "K"]) -> list[Level]:
    """Looks up the levels at real times t in 0..T."""
    return [Level(*map(float, values)) for values in zip(t, *schedule.at(t), schedule.half_log_snr(t), strict=True)]


def grid_levels(schedule: NoiseSchedule, tau) -> list[Level]:
    """Checks the grid tau and looks up its levels, from tau[0] to 0; `pairwise` of them gives the steps.

    Raises:
      InputError: tau is not a grid of the schedule.
    """
    return levels(schedule, timesteps.check(schedule, tau))


def ended(name: str, schedule: NoiseSchedule, grid: list[Level], end: float, may_stay: bool = False) -> list[Level]:
    """Returns the levels of a grid whose last step goes to another time than 0, and keeps the noise of that time.

    Args:
      name: of the sampler, for errors.
      schedule: the noise schedule.
      grid: the levels of tau.
      end: the time.
      may_stay: True if the last step may have no length, as from 1 to 1, which some methods have no weights for.

    Raises:
      InputError: the time lies outside the last step.
    """
    if not 0 <= end <= grid[-2].t:
        raise InputError(f"{name}: end is {end}; it must lie in 0..{grid[-2].t:g}, in the last step of tau")
    if end == grid[-2].t and not may_stay:
        raise InputError(f"{name}: end is {end}, where the last step of tau begins; leave that time out of tau")
    return [*grid[:-1], *levels(schedule, [end])] if end else grid


def eps_levels(name: str, schedule: NoiseSchedule, tau) -> list[Level]:
    """Does the same as `grid_levels` for a solver in the eps basis, which cannot start where the signal is zero.

    Raises:
      InputError: zero signal at tau[0], or tau is not a grid of the schedule.
    """
    grid = grid_levels(schedule, tau)
    if grid[0].signal == 0:
        raise InputError(
            f"{name} starts at t = {grid[0].t:g}, where the signal is zero and eps says nothing about x_0; "
            "start tau lower, or use ddim or dpm_solver_pp"
        )
    return grid


# Orders


def check_order(order: int, highest: int, lowest: int = 1) -> int:
    """Returns the order as an int if it is a whole number in lowest..highest.

    Raises:
      InputError: it is not.
    """
    if order not in range(lowest, highest + 1):
        raise InputError(f"order is {order}; it must be a whole number in {lowest}..{highest}")
    return int(order)


def step_orders(
    grid: Sequence[Level],
    order: int | Sequence[int],
    highest: int,
    lower_order_final: bool,
    full_at_zero: bool = False,
) -> list[int]:
    """Decides how many evaluations each step of a multistep method combines: at most `order`, fewer at both ends.

    A step can use only the evaluations that exist by then. None at zero signal counts, where lambda is -inf, because no
    polynomial reaches there; the orders begin again after it.

    Args:
      grid: the levels, S + 1 of them.
      order: a whole number in 1..highest; or a sequence that gives each step its order, and sets lower_order_final
        aside.
      highest: the highest order that the method has.
      lower_order_final: the last steps take the orders ..., 3, 2, 1.
      full_at_zero: True for polynomials that reach t = 0, as those in rho do. Otherwise the last step, to lambda = inf,
        has order 1.

    Returns:
      S orders.

    Raises:
      InputError: an order outside its range, or a sequence that is not of length S.
    """
    steps, lambdas = len(grid) - 1, np.array([level.half_log_snr for level in grid])
    possible = np.clip(np.cumsum(np.isfinite(lambdas[:-1])), 1, highest)
    if not full_at_zero:
        possible[np.isinf(lambdas[1:])] = 1
    if np.ndim(order) == 0:
        wanted = np.full(steps, check_order(order, highest))
        if lower_order_final:
            wanted = np.minimum(wanted, np.arange(steps, 0, -1))
        return np.minimum(wanted, possible).tolist()
    if len(order) != steps:
        raise InputError(f"order names {len(order)} steps and tau has {steps}; give one order for each step")
    for i, (p, most) in enumerate(zip(order, possible, strict=True)):
        if p not in range(1, most + 1):
            raise InputError(f"order of step {i} is {p}; with the estimates known there it must lie in 1..{most}")
    return [int(p) for p in order]


def order_label(order: int | Sequence[int]) -> str:
    """Writes an order, or the orders of all steps, as it stands in a table's name."""
    return f"{order}" if np.ndim(order) == 0 else "".join(map(str, order))


def newest(grid: Sequence[Level], i: int, p: int) -> Sequence[Level]:
    """Returns the levels of the p newest evaluations in step i: grid[i], grid[i - 1], ...."""
    return grid[i - p + 1 : i + 1][::-1]


# Formulas that several solvers use


def eps_of(at: Level, x: Form, D: Form) -> Form:
    """Computes eps = (x - a_t D) / n_t, the noise that x holds if x_0 is D."""
    return (x - at.signal * D) / at.noise


def first_order(at: Level, to: Level, x: Form, D: Form) -> Form:
    """Makes the DDIM step x_s = (n_s / n_t) x + a_s (1 - e^{-h}) D, h = lambda_s - lambda_t (arXiv:2010.02502, Eq. 12).

    This is eta = 0. The form with expm1 keeps short steps exact, and holds for h = inf: at s = 0, and from zero signal.
    """
    return to.noise / at.noise * x - to.signal * np.expm1(at.half_log_snr - to.half_log_snr) * D


def eps_weight(at: Level, to: Level) -> float:
    """Returns a_s (rho_s - rho_t), the weight of a constant eps in x_s = (a_s / a_t) x + a_s int eps d rho."""
    return to.signal * at.rho * np.expm1(at.half_log_snr - to.half_log_snr)


def runge_kutta(
    at: Level,
    targets: Sequence[Level],
    weights: Sequence[float | Sequence[float]],
    evaluate: Callable[[Level, Form, Form], Form],
    num_registers: int,
) -> list[Stage]:
    """Writes one step from `at` as stages: an explicit Runge-Kutta method with evaluations at the targets in turn.

    U_j = first_order(at, target_j) + sum_k weights_jk (F_k - F_0), F_k = evaluate(target_k, U_k, D_k); the last U_j is
    the next x. All U_j are begun in the first stage and wait in the registers for their further terms. Needs as many
    registers as targets.

    Args:
      at: where the step begins, and F_0 is evaluated.
      targets: where F_1, F_2, ... are evaluated, and where the step ends.
      weights: for each target those of F_1, F_2, ...; a number is the weight of the newest of them, as in methods in
        which each evaluation enters the next target only. The first target has none before it: 0.
      evaluate: (level, x, D) -> F, such as `eps_of`.
      num_registers: R.
    """
    rows = [[0.0] * (j - 1) + [w] * (j > 0) if np.ndim(w) == 0 else list(w) for j, w in enumerate(weights)]
    x, *waiting, D, _ = columns(num_registers)
    begun = [first_order(at, to, x, D) - sum(w) * evaluate(at, x, D) for to, w in zip(targets, rows, strict=True)]
    stages = [Stage(at, begun)]
    for k, here in enumerate(targets[:-1], 1):
        found = evaluate(here, x, D)
        # Those that wait lose their first, which is x now; what stands behind the last is unused.
        terms = [w[k - 1] * found for w in rows[k:]]
        moved = [u + term for u, term in zip(waiting, terms, strict=False)]
        stages.append(Stage(here, [*moved, *waiting[len(moved) :]]))
    return stages
