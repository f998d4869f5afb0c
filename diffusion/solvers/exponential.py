"""DPM-Solver++ and UniPC: the linear part solved exactly, the denoised estimate as a polynomial in lambda.

In lambda = log(a / n) the reverse process from t to s with h = lambda_s - lambda_t is, for D known between,

    x_s = (n_s / n_t) e^{-g h} x_t + a_s int_0^h (1 + g) e^{-(1 + g)(h - u)} D(u) du + n_s sqrt(1 - e^{-2 g h}) z

where g = sde_eta scales the noise, 0 for the probability flow (DPM-Solver++, arXiv:2211.01095, sections 4 and 5). A
multistep method puts in the polynomial through the last p estimates D. Exact integration of it is the exponential
Adams-Bashforth method (a predictor), or Adams-Moulton where the polynomial also meets the D at the end of the step (a
corrector). The published solvers are these methods with one moment of the kernel approximated: see `_DPM`, `_UNIPC`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diffusion import timesteps
from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.integrals import exponential_moments, lagrange_integrals
from diffusion.solvers.table import SamplerTable, make_table


def dpm_solver_pp(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 2,
    sde_eta: float = 0.0,
    variant: str = "exact",
    lower_order_final: bool = True,
) -> SamplerTable:
    """Multistep DPM-Solver++ and SDE-DPM-Solver++ (arXiv:2211.01095, Algorithm 2 and section 5); one call a step.

    Registers: x, then D of 1, ..., order - 1 stages ago. Step i has order min(order, i + 1) until enough estimates
    exist. The last step, to lambda = inf, has order 1 and returns D. A start at zero signal (lambda = -inf) takes a
    step of order 1, and the orders begin again after it, as no polynomial reaches there.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM), 2 or 3; or a sequence that gives each step its order, and sets lower_order_final aside.
      sde_eta: g above, at least 0; 0 is deterministic and 1 the reverse SDE. At order 1 these are ddim with eta = 0 and
        1; between, sde_eta is not DDIM's eta.
      variant: "exact" is exponential Adams-Bashforth, of the stated order ("heun" of diffusers at order 2). "official"
        is the published 2M (Algorithm 2; "midpoint" of diffusers) at order 2, and at order 3 the published 3M, which
        halves the second difference and has order 2.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. diffusers does so only below 15 steps. If False,
        only the last step is lowered.

    Raises:
      InputError: an order, sde_eta or variant outside the above, or tau is not a grid of the schedule.
    """
    if not 0 <= sde_eta < np.inf:
        raise InputError(f"sde_eta is {sde_eta}; it must be finite and at least 0 (0: deterministic, 1: reverse SDE)")
    published = _choose(variant, _DPM)
    grid = _grid(schedule, tau, order, 3, lower_order_final)
    damping = sde_eta * grid.h if sde_eta else np.zeros_like(grid.h)  # 0 * inf would be NaN
    keep = grid.noise[1:] / grid.noise[:-1] * np.exp(-damping)
    update, estimates = _history(grid, max(grid.orders))
    for i, p in enumerate(grid.orders):
        update[i, 0, 0] = keep[i]
        update[i, 0, estimates[:p]] = grid.signal[i + 1] * _weights(grid, i, published, rate=1 + sde_eta)
    update[:, 0, -1] = grid.noise[1:] * np.sqrt(-np.expm1(-2 * damping))
    return _table(f"dpm_solver_pp(order={_label(order)}, sde_eta={sde_eta:g}, variant={variant})", grid, update)


def unipc(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 3,
    variant: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> SamplerTable:
    """UniPC-p (arXiv:2302.04867, Algorithms 1 and 2, x_0 prediction): order p + 1 with one network call a step.

    The D at the end of a step first corrects that step (UniC-p), then takes part in predicting the next (UniP-p); it is
    not evaluated again at the corrected x. Both are linear, so one row does both. Registers: x as predicted; D of 1,
    ..., order - 1 stages ago; and last, if a step is corrected, what that adds to x but for its term in the D to come.
    Orders at the start and the end are as in `dpm_solver_pp`. The last step is not corrected, as in the authors' code
    and in diffusers, and neither is a step from zero signal.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: p, 1 to 4; or a sequence that gives each step its order (the paper's order schedules, as 1, 2, 3, 3, 2, 1),
        and sets lower_order_final aside.
      variant: "bh1" and "bh2" are the published B(h) = h and e^h - 1. The solution does not depend on B(h) except in
        UniP-2 and UniC-1, where the authors fix the coefficient at 1/2; "exact" integrates there, too.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. If False, only the last step is lowered.
      disable_corrector: steps, counted from 0, whose result is not corrected, as in diffusers; with all of them,
        range(S), this is UniP-p alone.

    Raises:
      InputError: an order, variant or step outside the above, or tau is not a grid of the schedule.
    """
    published = _choose(variant, _UNIPC)
    grid = _grid(schedule, tau, order, 4, lower_order_final)
    corrected = _corrected(grid, disable_corrector)
    update, estimates = _history(grid, max(grid.orders) + any(corrected))
    unit = np.eye(update.shape[-1])
    x = unit[0]  # the row of the x to step from; without a corrector, what the network saw
    for i, p in enumerate(grid.orders):
        kept, signal = grid.noise[i + 1] / grid.noise[i] * x, grid.signal[i + 1]
        update[i, 0] = kept + signal * _weights(grid, i, published) @ unit[estimates[:p]]
        x = unit[0]
        if corrected[i]:
            *known, coming = signal * _weights(grid, i, published, corrector=True)
            # As a difference from the x predicted, so that what changes x (clipping, guidance) reaches the next step.
            update[i, -1] = kept + known @ unit[estimates[:p]] - update[i, 0]
            x = unit[0] + unit[-3] + coming * unit[-2]
    return _table(f"unipc(order={_label(order)}, variant={variant})", grid, update)


def _dpm_official(z, moments):
    """2M replaces the first moment by half of the zeroth; 3M halves the second moment."""
    if moments.size == 2:
        return moments[0] * np.array([1, 0.5])
    return moments * np.array([1, 1, 0.5])[: moments.size]


def _bh1(z, moments):
    """With two nodes (UniP-2, UniC-1) the first moment is B(h) / 2 with B(h) = h."""
    return np.array([moments[0], z / 2]) if moments.size == 2 else moments


def _bh2(z, moments):
    """With two nodes (UniP-2, UniC-1) the first moment is B(h) / 2 with B(h) = 1 - e^{-h}."""
    return moments[0] * np.array([1, 0.5]) if moments.size == 2 else moments


def _exact(z, moments):
    return moments


_DPM = {"exact": _exact, "official": _dpm_official}
_UNIPC = {"exact": _exact, "bh1": _bh1, "bh2": _bh2}
"""What each variant puts for the moments M_j of the kernel on a step of z = (1 + g) h; M_0 is exact in all."""


class _Grid(NamedTuple):
    """A grid as these solvers read it; h and orders belong to the step from tau[i] to tau[i + 1]."""

    tau: Float[np.ndarray, "S+1"]
    signal: Float[np.ndarray, "S+1"]
    noise: Float[np.ndarray, "S+1"]
    half_log_snr: Float[np.ndarray, "S+1"]
    h: Float[np.ndarray, "S"]
    orders: Int[np.ndarray, "S"]


def _grid(schedule, tau, order, highest, lower_order_final):
    tau = timesteps.check(schedule, tau)
    signal, noise = schedule.at(tau)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(signal / noise)
    orders = _orders(half_log_snr, order, highest, lower_order_final)
    return _Grid(tau, signal, noise, half_log_snr, np.diff(half_log_snr), orders)


def _orders(half_log_snr, order, highest, lower_order_final):
    """The order of each step, int [S]: as asked for, where enough estimates at finite lambda exist."""
    steps = half_log_snr.size - 1
    possible = np.clip(np.cumsum(np.isfinite(half_log_snr[:-1])), 1, highest)
    possible[np.isinf(half_log_snr[1:])] = 1
    if np.ndim(order) == 0:
        if order not in range(1, highest + 1):
            raise InputError(f"order is {order}; it must be a whole number in 1..{highest}")
        wanted = np.minimum(int(order), np.arange(steps, 0, -1)) if lower_order_final else int(order)
        return np.minimum(wanted, possible)
    if len(order) != steps:
        raise InputError(f"order names {len(order)} steps and tau has {steps}; give one order for each step")
    for i, (p, most) in enumerate(zip(order, possible, strict=True)):
        if p not in range(1, most + 1):
            raise InputError(f"order of step {i} is {p}; with the estimates known there it must lie in 1..{most}")
    return np.array(order, int)


def _corrected(grid, disable_corrector):
    """Whether each step is corrected, a list of S booleans; h is infinite at the last step and from zero signal."""
    steps = grid.h.size
    for step in disable_corrector:
        if step not in range(steps):
            raise InputError(f"disable_corrector names step {step}; this grid has the steps 0..{steps - 1}")
    return [np.isfinite(h) and i not in disable_corrector for i, h in enumerate(grid.h)]


def _history(grid, registers):
    """An update that only moves D into register 1, 1 into 2, ...; and the columns of D of 0, 1, ... stages ago."""
    estimates = [-2, *range(1, max(grid.orders))]
    update = np.zeros((grid.h.size, registers, registers + 2))
    update[:, estimates[1:], estimates[:-1]] = 1
    return update, estimates


def _weights(grid, i, published, rate=1.0, corrector=False):
    """The kernel's integral over step i of each Lagrange polynomial, on lambda_i, lambda_{i-1}, ... (p of them).

    A corrector has lambda_{i+1} as one more node, the last.
    """
    p, back = grid.orders[i], i - np.arange(1, grid.orders[i])
    earlier = (grid.half_log_snr[back] - grid.half_log_snr[i]) / grid.h[i]
    nodes = np.array([0.0, *earlier, *[1.0] * corrector])
    z = rate * grid.h[i]
    return lagrange_integrals(nodes, published(z, exponential_moments(z, p + corrector)))


def _choose(variant, variants):
    if variant not in variants:
        raise InputError(f"variant is {variant!r}; {nearest(str(variant), variants)}")
    return variants[variant]


def _label(order):
    return f"{order}" if np.ndim(order) == 0 else "".join(map(str, order))


def _table(name, grid, update):
    return make_table(name, grid.tau, grid.tau[:-1], grid.signal[:-1], grid.noise[:-1], update)
