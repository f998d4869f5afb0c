"""DEIS, iPNDM, PLMS, PNDM and k-diffusion's LMS combine earlier evaluations of eps: multistep, in the eps basis.

In rho = n / a the probability flow is d(x / a) = eps d rho. From t down to s

    x_s = (a_s / a_t) x_t + a_s sum_k eps_k int_t^s L_k d rho,      eps_k = (x_k - a_k D_k) / n_k,

with eps_0 the newest and L_k the Lagrange polynomials through the last p times, in lambda, rho or t. The integrals sum
to rho_s - rho_t, so this is the DDIM step plus weighted differences eps_k - eps_0. The registers hold x, then the eps
of 1, ..., p - 1 steps ago.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import (
    Form,
    Level,
    Stage,
    build,
    check_order,
    columns,
    ended,
    eps_levels,
    eps_of,
    eps_weight,
    first_order,
    levels,
    newest,
    order_label,
    step_orders,
)
from diffusion.solvers.integrals import NODES, WEIGHTS, lagrange_integrals
from diffusion.solvers.table import SamplerTable

ADAMS_BASHFORTH = {
    1: np.array([1.0]),
    2: np.array([3.0, -1.0]) / 2,
    3: np.array([23.0, -16.0, 5.0]) / 12,
    4: np.array([55.0, -59.0, 37.0, -9.0]) / 24,
}
"""The classical weights, for a uniform grid, of each order; the newest evaluation comes first."""

Weigh = Callable[[Sequence[Level], Level], Float[np.ndarray, "p"]]
"""Gives the weight of each eps in a step: (levels of the evaluations, the newest first; level of the end) -> [p]."""

_COORDINATES = {
    "lambda": lambda level: level.half_log_snr,
    "rho": lambda level: level.rho,
    "t": lambda level: level.t,
}


def deis(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 3,
    basis: str = "lambda",
    lower_order_final: bool = True,
    end: float = 0.0,
) -> SamplerTable:
    """Builds DEIS (arXiv:2204.13902): Adams-Bashforth, polynomials integrated exactly; tAB-DEIS and rho-AB-DEIS.

    One call a step. The first steps have order 1, 2, ..., until enough evaluations exist; the last step has order 1 and
    returns D, as lambda = inf at t = 0.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM) to 4, the number of evaluations combined; the paper's r is order - 1. A sequence gives each step
        its order, and sets lower_order_final aside.
      basis: the variable in which eps is a polynomial. "t" is the paper's tAB, and depends on how the schedule
        continues between timesteps; "rho" is its rho-AB; "lambda" is diffusers' DEIS.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. If False, only the last step is lowered.
      end: the time that the last step goes to; 1 is diffusers', which leaves that noise in.

    Raises:
      InputError: an option outside the above, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    if basis not in _COORDINATES:
        raise InputError(f"basis is {basis!r}; {nearest(str(basis), _COORDINATES)}")
    name = f"deis(order={order_label(order)}, basis={basis})"
    grid = ended(name, schedule, eps_levels(name, schedule, tau), end)
    orders = step_orders(grid, order, 4, lower_order_final)
    return _adams(name, tau, grid, orders, lambda nodes, to: _integrals(schedule, basis, nodes, to))


def lms(schedule: NoiseSchedule, tau, order: int | Sequence[int] = 4, lower_order_final: bool = False) -> SamplerTable:
    """Builds k-diffusion's linear multistep (`sample_lms`): `deis(basis="rho")`, by default in full order to the end.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM) to 4; the first steps have order 1, 2, .... Or a sequence, the order of each step.
      lower_order_final: the last steps take the orders ..., 3, 2, 1 instead; then the last returns D.

    Raises:
      InputError: an order outside 1..4, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    name = f"lms(order={order_label(order)})"
    grid = eps_levels(name, schedule, tau)
    orders = step_orders(grid, order, 4, lower_order_final, full_at_zero=True)
    return _adams(name, tau, grid, orders, lambda nodes, to: _integrals(schedule, "rho", nodes, to))


def ipndm(
    schedule: NoiseSchedule, tau, order: int | Sequence[int] = 4, lower_order_final: bool = False
) -> SamplerTable:
    """Builds iPNDM (arXiv:2204.13902): classical Adams-Bashforth weights on eps, in DDIM's step; one call a step.

    It has the stated order only where the grid is uniform in rho. On other smooth grids it has order 2, as PNDM's
    authors prove for theirs, because the weights know nothing of the grid.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM) to 4; the first steps have order 1, 2, .... Or a sequence, the order of each step.
      lower_order_final: the last steps take the orders ..., 3, 2, 1; published: False, full order to the very end.

    Raises:
      InputError: an order outside 1..4, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    name = f"ipndm(order={order_label(order)})"
    grid = eps_levels(name, schedule, tau)
    orders = step_orders(grid, order, 4, lower_order_final, full_at_zero=True)
    return _adams(name, tau, grid, orders, _classical)


def plms(
    schedule: NoiseSchedule, tau, order: int = 4, lower_order_final: bool = False, end: float = 0.0
) -> SamplerTable:
    """Builds PLMS as in latent diffusion and diffusers (PNDM with skip_prk_steps): `ipndm` with a second-order start.

    PNDM, arXiv:2202.09778. The first step is made with eps_0, then made again with the mean of eps_0 and the eps found
    at its end, which enters no later step. So S + 1 calls; 1 where S = 1, as the network cannot be called at t = 0.
    order=2 is the paper's S-PNDM. The first step weighs a difference of evaluations by about a_s / (2 a_t), large where
    tau[0] has next to no signal (cosine at T: a = 5e-5); start tau lower there.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 2 to 4; the steps have order 2 (the start), 2, 3, 4, 4, ....
      lower_order_final: the last steps take the orders ..., 3, 2, 1; published: False, full order to the very end.
      end: the time that the last step goes to; 1 is diffusers' set_alpha_to_one = False, which leaves that noise in.

    Raises:
      InputError: an order outside 2..4, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    order = check_order(order, 4, lowest=2)
    name = f"plms(order={order})"
    grid = ended(name, schedule, eps_levels(name, schedule, tau), end, may_stay=True)
    steps = len(grid) - 1
    x, *past, D, _ = columns(min(order, steps))
    stages = []
    for i, p in enumerate(step_orders(grid, order, 4, lower_order_final, full_at_zero=True)):
        stages.append(_multistep(newest(grid, i, p), grid[i + 1], x, past, D, _classical))
        if i == 0 and steps > 1:
            # Register 0 holds the step made with eps_0, so only half of the change of eps is missing.
            half = eps_weight(grid[0], grid[1]) / 2
            stages.append(Stage(grid[1], [x + half * (eps_of(grid[1], x, D) - past[0]), *past]))
    return build(name, tau, stages, len(past) + 1)


def pndm(schedule: NoiseSchedule, tau, lower_order_final: bool = False, end: float = 0.0) -> SamplerTable:
    """Builds F-PNDM (arXiv:2202.09778): three pseudo Runge-Kutta steps of 4 calls, then `ipndm` of order 4.

    S + 9 calls. For S < 4 the last step is a multistep one all the same, as a Runge-Kutta step would call the network
    at t = 0: 1, 5 and 9 calls for S = 1, 2 and 3. Half a step is half of the time t, so t need not be whole. The first
    step weighs differences of evaluations by about a_s / a_t: with next to no signal at tau[0] (cosine at T: a = 5e-5)
    it diverges, as published; start tau lower there.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      lower_order_final: the last steps take the orders ..., 3, 2, 1; published: False, full order to the very end.
      end: the time that the last step goes to; 1 is diffusers' set_alpha_to_one = False, which leaves that noise in.

    Raises:
      InputError: zero signal at tau[0], or tau is not a grid of the schedule.
    """
    grid = ended("pndm", schedule, eps_levels("pndm", schedule, tau), end, may_stay=True)
    steps = len(grid) - 1
    starts = min(3, steps - 1)
    registers = starts + 3 if starts else 1
    x, *others, D, _ = columns(registers)
    past, stages = others[:starts], []
    for i, p in enumerate(step_orders(grid, 4, 4, lower_order_final, full_at_zero=True)):
        if i < starts:
            half = levels(schedule, [(grid[i].t + grid[i + 1].t) / 2])[0]
            stages += _pseudo_runge_kutta(grid[i], half, grid[i + 1], registers)
        else:
            stages.append(_multistep(newest(grid, i, p), grid[i + 1], x, past, D, _classical))
    return build("pndm", tau, stages, registers)


def _pseudo_runge_kutta(at: Level, half: Level, to: Level, registers: int) -> list[Stage]:
    """Writes PNDM's pseudo Runge-Kutta step as four stages: a DDIM step plus differences e_j - e_1.

    Registers: x; the history of e_1; the DDIM step from `at` to `to`, in the last stage the result except for the term
    of e_4; and what e_2 adds to the result.
    """
    x, *past, begun, added, D, _ = columns(registers)
    c, c_half = eps_weight(at, to), eps_weight(at, half)

    def change(level):
        """Computes e_j - e_1, where e_j is found at this level."""
        return eps_of(level, x, D) - past[0]

    started = [first_order(at, half, x, D), eps_of(at, x, D), *past[:-1], first_order(at, to, x, D)]
    return [
        Stage(at, started),
        Stage(half, [x + c_half * change(half), *past, begun, c / 3 * change(half)]),
        Stage(half, [begun + c * change(half), *past, begun + added + c / 3 * change(half)]),
        Stage(to, [begun + c / 6 * change(to), *past]),
    ]


def _adams(name: str, tau, grid: Sequence[Level], orders: Sequence[int], weigh: Weigh) -> SamplerTable:
    """Builds a multistep method whose step i combines the last orders[i] evaluations."""
    x, *past, D, _ = columns(max(orders))
    stages = [_multistep(newest(grid, i, p), grid[i + 1], x, past, D, weigh) for i, p in enumerate(orders)]
    return build(name, tau, stages, len(past) + 1)


def _multistep(nodes: Sequence[Level], to: Level, x: Form, past: Sequence[Form], D: Form, weigh: Weigh) -> Stage:
    """Writes the step from nodes[0], where x is, to `to`; the past holds eps at the other nodes, the newest first."""
    at = nodes[0]
    now = eps_of(at, x, D)
    weights = weigh(nodes, to)[1:] if len(nodes) > 1 else ()
    corrections = (w * (old - now) for w, old in zip(weights, past, strict=False))
    return Stage(at, [first_order(at, to, x, D) + sum(corrections), *[now, *past][: len(past)]])


def _classical(nodes: Sequence[Level], to: Level) -> Float[np.ndarray, "p"]:
    """Weighs the evaluations as on a uniform grid, whatever the grid is."""
    return eps_weight(nodes[0], to) * ADAMS_BASHFORTH[len(nodes)]


def _integrals(schedule: NoiseSchedule, basis: str, nodes: Sequence[Level], to: Level) -> Float[np.ndarray, "p"]:
    """Computes a_s int L_k d rho from nodes[0] to `to`, with L_k a polynomial in the basis variable."""
    at, coordinate = nodes[0], _COORDINATES[basis]
    length = coordinate(to) - coordinate(at)
    # v in 0..1 is the share of the step passed in the basis variable, at the nodes of the quadrature.
    if basis == "rho":
        # The integrand is a polynomial, so the quadrature is exact, and it reaches rho = 0.
        v, measure = NODES, eps_weight(at, to) * WEIGHTS
    else:
        # In lambda, where d rho = -rho d lambda.
        h = to.half_log_snr - at.half_log_snr
        measure = -to.signal * at.rho * h * np.exp(-h * NODES) * WEIGHTS
        passed = at.half_log_snr + h * NODES
        v = NODES if basis == "lambda" else (schedule.time_of(passed) - at.t) / length
    knots = np.array([(coordinate(node) - coordinate(at)) / length for node in nodes])
    return lagrange_integrals(knots, measure @ v[:, None] ** np.arange(len(nodes)))
