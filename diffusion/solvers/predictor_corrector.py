"""UniPC and SA-Solver correct each step with the evaluation at its end, which costs no further network call.

A predictor of p evaluations goes to the end of a step, where the network is called for the next step anyway. With this
evaluation as one more node the same integral is taken once more, and the step begins anew from the corrected x; the
evaluation itself is kept. Both are linear, so one row corrects a step and predicts the next. UniPC is the deterministic
case with one node more in the corrector; SA-Solver chooses both numbers and adds noise.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.exponential import (
    UNIPC_MOMENTS,
    Moments,
    check_sde_eta,
    chosen_moments,
    exponential_weights,
)
from diffusion.solvers.forms import (
    Level,
    Stage,
    build,
    check_order,
    columns,
    ended,
    eps_levels,
    eps_of,
    eps_weight,
    grid_levels,
    newest,
    order_label,
    step_orders,
)
from diffusion.solvers.integrals import exponential_moments
from diffusion.solvers.table import SamplerTable

BASES = ("x0", "eps")


def unipc(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 3,
    variant: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
    basis: str = "x0",
    end: float = 0.0,
) -> SamplerTable:
    """Builds UniPC-p (arXiv:2302.04867, Algorithms 1 and 2): order p + 1 with one network call a step.

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
      basis: what is a polynomial in lambda: "x0", or "eps", diffusers' predict_x0 = False. The last step to t = 0 is a
        DDIM step with either.
      end: the time that the last step goes to; 1 is diffusers' final_sigmas_type = "sigma_min", which leaves that noise
        in.

    Raises:
      InputError: an option outside the above, zero signal at tau[0] in the eps basis, or tau is not a grid of the
        schedule.
    """
    moments = chosen_moments(variant, UNIPC_MOMENTS)
    if basis not in BASES:
        raise InputError(f"basis is {basis!r}; {nearest(str(basis), BASES)}")
    name = f"unipc(order={order_label(order)}, variant={variant}{', basis=eps' if basis == 'eps' else ''})"
    grid = ended(name, schedule, (eps_levels if basis == "eps" else _named_levels)(name, schedule, tau), end)
    orders = step_orders(grid, order, 4, lower_order_final)
    corrected = _corrected(grid, disable_corrector)
    plan = [_Step(p, (p + 1) * c) for p, c in zip(orders, corrected, strict=True)]
    return _predicted_and_corrected(name, tau, grid, plan, moments, basis == "eps")


def sa_solver(
    schedule: NoiseSchedule,
    tau,
    predictor_order: int = 2,
    corrector_order: int = 2,
    sde_eta: float = 1.0,
    noisy: Sequence[float] = (0.2, 0.8),
    variant: str = "bh1",
    lower_order_final: bool = True,
) -> SamplerTable:
    """Builds SA-Solver (arXiv:2309.05019, Algorithm 1), a stochastic Adams predictor and corrector; one call a step.

    As `unipc`, which it is for sde_eta 0 and a corrector_order of one more than the predictor's; the noise of a step is
    part of its correction as well. The last step returns D.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      predictor_order: 1 to 4, how many evaluations the predictor takes.
      corrector_order: 1 to 4, how many the corrector takes, the new one among them; 0 corrects nothing.
      sde_eta: how much noise is drawn in the middle of the way: tau^2 of the paper. 1 is the reverse SDE.
      noisy: noise is drawn in steps that begin between these shares of T, the ends included, where timesteps count from
        0 as in diffusers; its default is 200..800 of 1,000.
      variant: "bh1" is published; it and "exact" differ where two evaluations are combined. See `unipc`.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. If False, only the last step is lowered.

    Raises:
      InputError: an option outside the above, or tau is not a grid of the schedule.
    """
    check_sde_eta(sde_eta)
    check_order(corrector_order, 4, lowest=0)
    if len(noisy) != 2 or not 0 <= noisy[0] <= noisy[1] <= 1:
        raise InputError(f"noisy is {tuple(noisy)}; give two shares of T between 0 and 1, the lower one first")
    moments, grid = chosen_moments(variant, UNIPC_MOMENTS), grid_levels(schedule, tau)
    orders = step_orders(grid, check_order(predictor_order, 4), 4, lower_order_final)
    known = step_orders(grid, max(corrector_order - 1, 1), 4, lower_order_final=False)
    low, high = (share * schedule.num_timesteps for share in noisy)
    plan = []
    for i, (p, c, corrected) in enumerate(zip(orders, known, _corrected(grid, ()), strict=True)):
        most = min(c + 1, corrector_order, len(grid) - i if lower_order_final else 4)
        plan.append(_Step(p, most * corrected, sde_eta if low <= grid[i].t - 1 <= high else 0.0))
    name = f"sa_solver(predictor_order={predictor_order}, corrector_order={corrector_order}, sde_eta={sde_eta:g})"
    return _predicted_and_corrected(name, tau, grid, plan, moments, eps=False)


class _Step(NamedTuple):
    """What is done in a step: how many evaluations predict, how many correct (0: none), and g, see `exponential`."""

    predict: int
    correct: int
    g: float = 0.0


def _predicted_and_corrected(
    name: str,
    tau,
    grid: Sequence[Level],
    plan: Sequence[_Step],
    moments: Callable[[float, Moments], Moments],
    eps: bool,
) -> SamplerTable:
    """Builds the table of a predictor and corrector, in the basis of eps or of x_0.

    Registers: x as predicted; the evaluations of earlier stages; and last, if any step is corrected, what the
    correction adds to x, except for its term in the evaluation to come.
    """
    held = max(max(step.predict, step.correct - 1) for step in plan)
    registers = held + any(step.correct for step in plan)
    x, *others, D, z = columns(registers)
    stages, start = [], x
    for i, (step, (at, to)) in enumerate(zip(plan, pairwise(grid), strict=True)):
        estimates = np.stack([_evaluation(at, x, D, eps), *others[: held - 1]])
        gh = step.g * (to.half_log_snr - at.half_log_snr) if step.g else 0.0  # 0 * inf would be NaN
        scale, rate = (to.noise, -1.0) if eps else (to.signal, 1 + step.g)
        kept = (to.signal / at.signal if eps else to.noise / at.noise * np.exp(-gh)) * start
        # The predictor: the step starts from the corrected x, or from the x that the network saw.
        p, c = step.predict, step.correct
        if eps and np.isinf(to.half_log_snr):
            change = eps_weight(at, to) * estimates[0]
        else:
            change = scale * (exponential_weights(newest(grid, i, p), to, moments, rate) @ estimates[:p])
        predicted = kept + change
        fresh = to.noise * np.sqrt(-np.expm1(-2 * gh)) * z
        rows, start = [predicted + fresh if step.g else predicted, *estimates[: held - 1]], x
        if c:
            # The corrector: the same step with the evaluation at its end as one more node. All but this evaluation is
            # known now and waits in the last register, as a difference from the x predicted, so that clipping or
            # guidance of x reaches the next step.
            length = to.half_log_snr - at.half_log_snr
            weights = exponential_moments(rate * length, 1)  # of a corrector that takes the new one only
            if c > 1:
                weights = exponential_weights(newest(grid, i, c - 1), to, moments, rate, corrector=True)
            rows.append(kept + scale * (weights[:-1] @ estimates[: c - 1]) - predicted)
            start = x + others[-1] + scale * weights[-1] * _evaluation(to, x, D, eps)
        stages.append(Stage(at, rows))
    return build(name, tau, stages, registers)


def _evaluation(at: Level, x, D, eps: bool):
    """Returns what a step takes for a polynomial."""
    return eps_of(at, x, D) if eps else D


def _named_levels(name: str, schedule: NoiseSchedule, tau) -> list[Level]:
    """Looks up the levels of a grid, as `eps_levels` does for those that cannot start at zero signal."""
    return grid_levels(schedule, tau)


def _corrected(grid: Sequence[Level], disable_corrector: Sequence[int]) -> list[bool]:
    """Tells for each step whether it is corrected: not the last, those disabled, nor those at an infinite lambda."""
    steps = len(grid) - 1
    for step in disable_corrector:
        if step not in range(steps):
            raise InputError(f"disable_corrector names step {step}; this grid has the steps 0..{steps - 1}")
    lengths = [to.half_log_snr - at.half_log_snr for at, to in pairwise(grid)]
    return [bool(np.isfinite(h)) and i not in disable_corrector and i < steps - 1 for i, h in enumerate(lengths)]
