"""DPM-Solver++ and UniPC solve the linear part of the flow exactly and take D for a polynomial in lambda.

In lambda = log(a / n) the reverse process from t to s with h = lambda_s - lambda_t is, for D known between,

    x_s = (n_s / n_t) e^{-g h} x_t + a_s int_0^h (1 + g) e^{-(1 + g)(h - u)} D(u) du + n_s sqrt(1 - e^{-2 g h}) z,

where g = sde_eta scales the noise, 0 for the probability flow (DPM-Solver++, arXiv:2211.01095, sections 4 and 5). A
multistep method puts in the polynomial through the last p estimates D. Exact integration of it is the exponential
Adams-Bashforth method (a predictor), or Adams-Moulton if the polynomial also meets the D at the end of the step (a
corrector). The published solvers are these methods with one moment of the kernel approximated.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import Level, Stage, build, columns, grid_levels, newest, step_orders
from diffusion.solvers.integrals import exponential_moments, lagrange_integrals
from diffusion.solvers.table import SamplerTable
from diffusion.timesteps import require_concrete

Moments = Float[np.ndarray, "p"]


def dpm_solver_pp(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 2,
    sde_eta: float = 0.0,
    variant: str = "exact",
    lower_order_final: bool = True,
) -> SamplerTable:
    """Builds multistep DPM-Solver++ and SDE-DPM-Solver++ (arXiv:2211.01095, Algorithm 2 and section 5).

    One call a step. Registers: x, then D of 1, ..., order - 1 stages ago. Step i has order min(order, i + 1) until
    enough estimates exist. The last step, to lambda = inf, has order 1 and returns D. A start at zero signal (lambda =
    -inf) takes a step of order 1, and the orders begin again after it, as no polynomial reaches there.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM), 2 or 3; or a sequence that gives each step its order, and sets lower_order_final aside.
      sde_eta: g above, at least 0; 0 is deterministic and 1 the reverse SDE. At order 1 these are ddim with eta = 0 and
        1; in between, sde_eta is not DDIM's eta.
      variant: "exact" is exponential Adams-Bashforth, of the stated order ("heun" of diffusers at order 2). "official"
        is the published 2M (Algorithm 2; "midpoint" of diffusers) at order 2, and at order 3 the published 3M, which
        halves the second difference and has order 2.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. diffusers does so only below 15 steps. If False,
        only the last step is lowered.

    Raises:
      InputError: an order, sde_eta or variant outside the above, or tau is not a grid of the schedule.
    """
    require_concrete("sde_eta", sde_eta)
    if not 0 <= sde_eta < np.inf:
        raise InputError(f"sde_eta is {sde_eta}; it must be finite and at least 0 (0: deterministic, 1: reverse SDE)")
    moments = _choose(variant, _DPM)
    grid = grid_levels(schedule, tau)
    orders = step_orders(grid, order, 3, lower_order_final)
    x, *past, D, z = columns(max(orders))
    estimates = np.stack([D, *past])
    stages = []
    for i, (p, (at, to)) in enumerate(zip(orders, pairwise(grid), strict=True)):
        gh = sde_eta * (to.half_log_snr - at.half_log_snr) if sde_eta else 0.0  # 0 * inf would be NaN
        kept, fresh = to.noise / at.noise * np.exp(-gh), to.noise * np.sqrt(-np.expm1(-2 * gh))
        b = _weights(newest(grid, i, p), to, moments, rate=1 + sde_eta)
        stages.append(Stage(at, [kept * x + to.signal * (b @ estimates[:p]) + fresh * z, *estimates[:-1]]))
    name = f"dpm_solver_pp(order={_label(order)}, sde_eta={sde_eta:g}, variant={variant})"
    return build(name, tau, stages, max(orders))


def unipc(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 3,
    variant: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> SamplerTable:
    """Builds UniPC-p (arXiv:2302.04867, Algorithms 1 and 2, x_0 prediction): order p + 1 with one network call a step.

    The D at the end of a step first corrects that step (UniC-p), then takes part in predicting the next (UniP-p); it is
    not evaluated again at the corrected x. Both are linear, so one row does both. Registers: x as predicted; D of 1,
    ..., order - 1 stages ago; and last, if any step is corrected, what the correction adds to x, except for its term in
    the D to come.
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
        range(S), this is UniP-p.

    Raises:
      InputError: an order, variant or step outside the above, or tau is not a grid of the schedule.
    """
    moments = _choose(variant, _UNIPC)
    grid = grid_levels(schedule, tau)
    orders = step_orders(grid, order, 4, lower_order_final)
    corrected = _corrected(grid, disable_corrector)
    registers = max(orders) + any(corrected)
    x, *others, D, _ = columns(registers)
    estimates = np.stack([D, *others[: max(orders) - 1]])
    stages, start = [], x
    for i, (p, (at, to)) in enumerate(zip(orders, pairwise(grid), strict=True)):
        # UniP: the step starts from the corrected x, or from the x that the network saw.
        known, nodes = estimates[:p], newest(grid, i, p)
        kept = to.noise / at.noise * start
        predicted = kept + to.signal * (_weights(nodes, to, moments) @ known)
        rows, start = [predicted, *estimates[:-1]], x
        if corrected[i]:
            # UniC: the same step with D at its end as one more node. All but this D is known now and waits in the last
            # register, as a difference from the x predicted, so that clipping or guidance of x reaches the next step.
            weights = _weights(nodes, to, moments, corrector=True)
            rows.append(kept + to.signal * (weights[:-1] @ known) - predicted)
            start = x + others[-1] + to.signal * weights[-1] * D
        stages.append(Stage(at, rows))
    return build(f"unipc(order={_label(order)}, variant={variant})", tau, stages, registers)


# Variants: what each puts for the moments M_j of the kernel on a step of z = (1 + g) h. M_0 is exact in all.


def _exact(z: float, moments: Moments) -> Moments:
    """Leaves the moments as they are."""
    return moments


def _dpm_official(z: float, moments: Moments) -> Moments:
    """Puts half of the zeroth moment for the first, as the published 2M does, or halves the second, as 3M does."""
    if moments.size == 2:
        return moments[0] * np.array([1, 0.5])
    return moments * np.array([1, 1, 0.5])[: moments.size]


def _bh1(z: float, moments: Moments) -> Moments:
    """Puts B(h) / 2 for the first moment, with B(h) = h, where there are two nodes (UniP-2, UniC-1)."""
    return np.array([moments[0], z / 2]) if moments.size == 2 else moments


def _bh2(z: float, moments: Moments) -> Moments:
    """Puts B(h) / 2 for the first moment, with B(h) = 1 - e^{-h}, where there are two nodes (UniP-2, UniC-1)."""
    return moments[0] * np.array([1, 0.5]) if moments.size == 2 else moments


_DPM = {"exact": _exact, "official": _dpm_official}
_UNIPC = {"exact": _exact, "bh1": _bh1, "bh2": _bh2}


def _choose(variant, variants):
    """Looks up a variant by name."""
    if variant not in variants:
        raise InputError(f"variant is {variant!r}; {nearest(str(variant), variants)}")
    return variants[variant]


# Weights


def _weights(
    nodes: Sequence[Level],
    to: Level,
    moments: Callable[[float, Moments], Moments],
    rate: float = 1.0,
    corrector: bool = False,
) -> Float[np.ndarray, "p"]:
    """Integrates the kernel times each Lagrange polynomial over the step from nodes[0] to `to`.

    The polynomials run through the lambdas of the nodes, the newest first; a corrector's also through lambda at `to`,
    whose weight comes last.
    """
    at = nodes[0]
    h = to.half_log_snr - at.half_log_snr
    earlier = [(node.half_log_snr - at.half_log_snr) / h for node in nodes[1:]]
    shares = np.array([0.0, *earlier, *[1.0] * corrector])
    return lagrange_integrals(shares, moments(rate * h, exponential_moments(rate * h, shares.size)))


def _corrected(grid: Sequence[Level], disable_corrector: Sequence[int]) -> list[bool]:
    """Tells for each step whether it is corrected: not those disabled, nor those at an infinite lambda."""
    steps = len(grid) - 1
    for step in disable_corrector:
        if step not in range(steps):
            raise InputError(f"disable_corrector names step {step}; this grid has the steps 0..{steps - 1}")
    lengths = [to.half_log_snr - at.half_log_snr for at, to in pairwise(grid)]
    return [bool(np.isfinite(h)) and i not in disable_corrector for i, h in enumerate(lengths)]


def _label(order: int | Sequence[int]) -> str:
    """Writes an order, or the orders of all steps, as it stands in a table's name."""
    return f"{order}" if np.ndim(order) == 0 else "".join(map(str, order))
