"""DPM-Solver and singlestep DPM-Solver++ make several network calls a step and remember nothing between steps.

With h = lambda_s - lambda_t and the network called again at lambda_t + r h, both are Runge-Kutta methods that solve the
linear part exactly: in the eps basis (DPM-Solver) or the x_0 basis (DPM-Solver++). The inner calls are made at real
times between those of the grid, as in the papers, and then depend on how the schedule continues between timesteps; or
at times of the grid, as in diffusers. With eta > 0 a step goes to less noise than the grid says, and fresh noise makes
up for it: k-diffusion's dpm_2_ancestral and dpmpp_2s_ancestral.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.ddim import ancestral, check_eta, check_s_noise
from diffusion.solvers.forms import (
    Form,
    Level,
    Stage,
    build,
    check_order,
    columns,
    eps_levels,
    eps_of,
    grid_levels,
    levels,
    order_label,
    runge_kutta,
)
from diffusion.solvers.integrals import NODES, WEIGHTS, exponential_moments, lagrange_integrals
from diffusion.solvers.orders import CALLS, planned
from diffusion.solvers.table import SamplerTable

INNER = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
"""The published r of the inner evaluations, by order."""

VARIANTS = ("official", "exact", "midpoint")


def dpm_solver(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 2,
    eta: float = 0.0,
    s_noise: float = 1.0,
    variant: str = "official",
    calls: str = "steps",
    inner: Sequence[float] = (),
) -> SamplerTable:
    """Builds DPM-Solver-1, -2 and -3, singlestep in the eps basis (arXiv:2206.00927, Algorithms 1 and 2, Eq. 3.7).

    `order` calls a step. The last step has order 1 and returns D, as no time lies at a fraction of the way to lambda =
    inf: order (S - 1) + 1 calls in all. Order 2 is k-diffusion's dpm_2, and with eta = 1 its dpm_2_ancestral; order 3
    with calls "fast" is its dpm_fast, followed by the step to 0.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM), 2 or 3; or a sequence, the order of each step.
      eta: 0 is deterministic; at 1 each step goes to as little noise as DDPM's does, and the rest is drawn anew.
      s_noise: a factor of the noise drawn; 1 keeps the variance.
      variant: "official" is published. "exact" integrates the polynomial through all evaluations of a step, the
        authors' "taylor" and diffusers' "heun". "midpoint" is diffusers', which differs from "official" at order 3.
      calls: "steps", `order` of them a step. "grid": one at each time of tau, S in all; a step goes over `order` times.
        "fast": S in all as well, with steps of equal share in tau and inner calls between, DPM-Solver-fast.
      inner: where in a step, as shares of it in lambda, the inner calls are made: r1 of order 2 (1/2 unless given), or
        r1, r2 of order 3 (1/3, 2/3), which keeps its order with r2 = 2/3 only.

    Raises:
      InputError: an option outside the above, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    options = _Options(order, eta, s_noise, variant, calls, tuple(inner))
    name = _name("dpm_solver", options)
    return _singlestep(name, schedule, tau, options, eps_levels(name, schedule, tau), _EPS)


def dpm_solver_pp_singlestep(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 2,
    eta: float = 0.0,
    s_noise: float = 1.0,
    variant: str = "official",
    calls: str = "steps",
    inner: Sequence[float] = (),
) -> SamplerTable:
    """Builds DPM-Solver++(2S) (arXiv:2211.01095, Algorithm 1) and its 3S, singlestep in the x_0 basis.

    `order` calls a step. The last step has order 1 and returns D: order (S - 1) + 1 calls in all. A step from zero
    signal (lambda = -inf) has order 1, too. 3S is DPM-Solver-3 with D for eps and -lambda for lambda, as in the
    authors' code; the paper stops at 2S. Order 2 with eta = 1 is k-diffusion's dpmpp_2s_ancestral; calls "grid" is
    diffusers' DPMSolverSinglestepScheduler.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order, eta, s_noise, variant, calls, inner: see `dpm_solver`.

    Raises:
      InputError: an option outside the above, or tau is not a grid of the schedule.
    """
    options = _Options(order, eta, s_noise, variant, calls, tuple(inner))
    name = _name("dpm_solver_pp_singlestep", options)
    return _singlestep(name, schedule, tau, options, grid_levels(schedule, tau), _X0)


class _Options(NamedTuple):
    """What both solvers are told."""

    order: int | Sequence[int]
    eta: float
    s_noise: float
    variant: str
    calls: str
    inner: tuple[float, ...]


def _name(solver: str, options: _Options) -> str:
    """Checks the options and writes the name of a table: the order, and what is not at its default."""
    if np.ndim(options.order) == 0:
        check_order(options.order, 3)
    check_eta(options.eta)
    check_s_noise(options.s_noise, options.eta > 0, "eta above 0")
    for what, value, known in (("variant", options.variant, VARIANTS), ("calls", options.calls, CALLS)):
        if value not in known:
            raise InputError(f"{what} is {value!r}; {nearest(str(value), known)}")
    r = options.inner
    if r and (not all(0 < a < b for a, b in pairwise([*r, 1.0])) or len(r) != np.max(options.order) - 1):
        raise InputError(
            f"inner is {r}; give one share between 0 and 1 for order 2, two in ascending order for order 3"
        )
    if r and options.calls == "grid":
        raise InputError(f"inner is {r}, and with calls 'grid' tau says where calls are made; leave inner out")
    defaults = {"eta": 0.0, "s_noise": 1.0, "variant": "official", "calls": "steps", "inner": ()}
    others = {key: getattr(options, key) for key, default in defaults.items() if getattr(options, key) != default}
    return f"{solver}({', '.join([f'order={order_label(options.order)}', *(f'{k}={v}' for k, v in others.items())])})"


class _Basis(NamedTuple):
    """A basis is what a solver takes to be nearly constant, eps or x_0, and the weight this has in a step.

    `held` returns (scale, z): if the quantity is held over a step of length h, it weighs scale expm1(z) at the end.
    """

    evaluate: Callable[[Level, Form, Form], Form]
    held: Callable[[Level, float], tuple[float, float]]


_EPS = _Basis(eps_of, lambda to, h: (-to.noise, h))
_X0 = _Basis(lambda at, x, D: D, lambda to, h: (-to.signal, -h))


def _singlestep(
    name: str, schedule: NoiseSchedule, tau, options: _Options, grid: list[Level], basis: _Basis
) -> SamplerTable:
    """Builds either solver: each step has the order asked for, or order 1 if its length in lambda is infinite."""
    plan = planned(name, schedule, grid, options.order, options.calls, highest=3)
    registers = max(step.order for step in plan)
    fresh = columns(registers)[-1]
    stages = []
    for at, met, end, order in plan:
        to, std = ancestral(at, end, options.eta)
        h = to.half_log_snr - at.half_log_snr
        p = order if np.isfinite(h) else 1
        # The network is called again at each share of the step in lambda, and each call improves the next target.
        if options.calls == "grid":
            inside, shares = met, [*((level.half_log_snr - at.half_log_snr) / h for level in met), 1.0]
        else:
            wanted = options.inner if len(options.inner) == p - 1 else INNER[p]
            inside = levels(schedule, schedule.time_of([at.half_log_snr + r * h for r in wanted]))
            shares = [*wanted, 1.0]
        targets = [*inside, to]
        weights = [_weights(options.variant, basis, target, shares[: j + 1], h) for j, target in enumerate(targets)]
        *first, (here, rows) = runge_kutta(at, targets, weights, basis.evaluate, registers)
        new_x = rows[0] + options.s_noise * std * fresh if std else rows[0]
        stages += [*first, Stage(here, [new_x, *rows[1:]])]
    return build(name, tau, stages, registers)


def _weights(variant: str, basis: _Basis, to: Level, shares: Sequence[float], h: float) -> float | list[float]:
    """Weighs F(lambda_t + r h) - F(lambda_t) in the solution at `to`, which lies at lambda_t + share h.

    Args:
      variant: one of `VARIANTS`.
      basis: of the solver.
      to: the target.
      shares: the r of all earlier evaluations but the first, and then the share of the target.
      h: the length of the whole step in lambda.
    """
    *earlier, share = shares
    if not earlier:
        return 0.0
    r, (scale, z) = earlier[-1], basis.held(to, share * h)
    if variant == "exact" and len(earlier) > 1:
        nodes = np.array([0.0, *earlier]) / share
        return list(-scale * lagrange_integrals(nodes, exponential_moments(-z, nodes.size))[1:])
    if len(earlier) == 1 and (variant == "midpoint" or (variant == "official" and share == 1)):
        # The published 2 and 2S put half of the weight of a constant F for the integral of a change linear in lambda.
        # The two agree to second order.
        return scale * np.expm1(z) / (2 * (r / share))
    # F linear in lambda gives (share / r) ((e^z - 1) / z - 1). The quadrature adds terms of one sign, where that
    # difference would cancel for short steps.
    return scale * share / r * (WEIGHTS @ np.expm1(z * NODES))
