"""Multistep DPM-Solver++ and DPM-Solver solve the linear part of the flow exactly; D or eps is a polynomial in lambda.

In lambda = log(a / n) the reverse process from t to s with h = lambda_s - lambda_t is, for D known between,

    x_s = (n_s / n_t) e^{-g h} x_t + a_s int_0^h (1 + g) e^{-(1 + g)(h - u)} D(u) du + n_s sqrt(1 - e^{-2 g h}) z,

where g = sde_eta scales the noise, 0 for the probability flow (DPM-Solver++, arXiv:2211.01095, sections 4 and 5). A
multistep method puts in the polynomial through the last p estimates D. Exact integration of it is the exponential
Adams-Bashforth method (a predictor), or Adams-Moulton if the polynomial also meets the D at the end of the step (a
corrector, see `predictor_corrector`). The published solvers are these methods with one moment of the kernel
approximated. In the eps basis (DPM-Solver, arXiv:2206.00927) the same process is

    x_s = (a_s / a_t) x_t - (1 + g) n_s int_0^h e^{h - u} eps(u) du + sqrt(g) n_s sqrt(e^{2 h} - 1) z.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.ddim import check_s_noise
from diffusion.solvers.forms import (
    Level,
    Stage,
    build,
    columns,
    ended,
    eps_levels,
    eps_of,
    eps_weight,
    first_order,
    grid_levels,
    newest,
    order_label,
    step_orders,
)
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
    s_noise: float = 1.0,
    end: float = 0.0,
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
        halves the second difference and has order 2. "halved" does so, too, and is exact at order 2: the steps before
        the third of k-diffusion's dpmpp_3m_sde.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. diffusers does so only below 15 steps. If False,
        only the last step is lowered.
      s_noise: a factor of the noise drawn; 1 keeps the variance.
      end: the time that the last step goes to; 1 is diffusers' final_sigmas_type = "sigma_min", which leaves that noise
        in, and the last step then may have the full order.

    Raises:
      InputError: an option outside the above, or tau is not a grid of the schedule.
    """
    check_sde_eta(sde_eta)
    check_s_noise(s_noise, sde_eta > 0, "sde_eta above 0")
    moments = chosen_moments(variant, DPM_MOMENTS)
    grid = ended("dpm_solver_pp", schedule, grid_levels(schedule, tau), end)
    orders = step_orders(grid, order, 3, lower_order_final)
    x, *past, D, z = columns(max(orders))
    estimates = np.stack([D, *past])
    stages = []
    for i, (p, (at, to)) in enumerate(zip(orders, pairwise(grid), strict=True)):
        gh = sde_eta * (to.half_log_snr - at.half_log_snr) if sde_eta else 0.0  # 0 * inf would be NaN
        kept, fresh = to.noise / at.noise * np.exp(-gh), to.noise * np.sqrt(-np.expm1(-2 * gh))
        b = exponential_weights(newest(grid, i, p), to, moments, rate=1 + sde_eta)
        new_x = kept * x + to.signal * (b @ estimates[:p]) + s_noise * fresh * z
        stages.append(Stage(at, [new_x, *estimates[:-1]]))
    name = f"dpm_solver_pp(order={order_label(order)}, sde_eta={sde_eta:g}, variant={variant})"
    return build(name, tau, stages, max(orders))


def dpm_solver_multistep(
    schedule: NoiseSchedule,
    tau,
    order: int | Sequence[int] = 2,
    sde_eta: float = 0.0,
    variant: str = "official",
    lower_order_final: bool = True,
    s_noise: float = 1.0,
    end: float = 0.0,
) -> SamplerTable:
    """Builds multistep DPM-Solver in the eps basis: diffusers' dpmsolver and sde-dpmsolver (arXiv:2206.00927).

    One call a step. Registers: x, then eps of 1, ..., order - 1 stages ago. Orders at the start and the end are as in
    `dpm_solver_pp`. The last step, to lambda = inf, draws no noise and returns D.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 (DDIM), 2 or 3; or a sequence that gives each step its order, and sets lower_order_final aside.
      sde_eta: g above, at least 0; 0 is deterministic and 1 the reverse SDE.
      variant: "official" puts half of the zeroth moment for the first at order 2 ("midpoint" of diffusers) and halves
        the second difference at order 3, as `dpm_solver_pp` does. "exact" integrates the polynomial ("heun" of
        diffusers at order 2); with sde_eta 0 it is `deis` in lambda.
      lower_order_final: the last steps take the orders ..., 3, 2, 1. If False, only the last step is lowered.
      s_noise: a factor of the noise drawn; 1 keeps the variance.
      end: the time that the last step goes to; 1 is diffusers' final_sigmas_type = "sigma_min".

    Raises:
      InputError: an option outside the above, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    check_sde_eta(sde_eta)
    check_s_noise(s_noise, sde_eta > 0, "sde_eta above 0")
    moments = chosen_moments(variant, DPM_MOMENTS)
    name = f"dpm_solver_multistep(order={order_label(order)}, sde_eta={sde_eta:g}, variant={variant})"
    grid = ended(name, schedule, eps_levels(name, schedule, tau), end)
    orders = step_orders(grid, order, 3, lower_order_final)
    x, *past, D, z = columns(max(orders))
    stages = []
    for i, (p, (at, to)) in enumerate(zip(orders, pairwise(grid), strict=True)):
        h, now = to.half_log_snr - at.half_log_snr, eps_of(at, x, D)
        g = sde_eta if np.isfinite(h) else 0.0
        new_x = first_order(at, to, x, D) + g * eps_weight(at, to) * now
        if p > 1:
            weights = (1 + g) * to.noise * exponential_weights(newest(grid, i, p), to, moments, rate=-1.0)
            new_x = new_x + sum(w * (old - now) for w, old in zip(weights[1:], past, strict=False))
        if g:
            new_x = new_x + s_noise * to.noise * np.sqrt(g * np.expm1(2 * h)) * z
        stages.append(Stage(at, [new_x, *[now, *past][: len(past)]]))
    return build(name, tau, stages, max(orders))


def check_sde_eta(sde_eta: float) -> None:
    """Refuses an sde_eta that is negative or not finite.

    Raises:
      InputError: it is.
    """
    require_concrete("sde_eta", sde_eta)
    if not 0 <= sde_eta < np.inf:
        raise InputError(f"sde_eta is {sde_eta}; it must be finite and at least 0 (0: deterministic, 1: reverse SDE)")


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


def _halved(z: float, moments: Moments) -> Moments:
    """Halves the second moment where there is one, and is exact with two nodes, as k-diffusion's 3M is."""
    return moments * np.array([1, 1, 0.5])[: moments.size]


DPM_MOMENTS = {"exact": _exact, "official": _dpm_official, "halved": _halved}
UNIPC_MOMENTS = {"exact": _exact, "bh1": _bh1, "bh2": _bh2}


def chosen_moments(variant: str, variants: Mapping[str, Callable]) -> Callable[[float, Moments], Moments]:
    """Looks up by name what a variant puts for the moments.

    Raises:
      InputError: an unknown name.
    """
    if variant not in variants:
        raise InputError(f"variant is {variant!r}; {nearest(str(variant), variants)}")
    return variants[variant]


# Weights


def exponential_weights(
    nodes: Sequence[Level],
    to: Level,
    moments: Callable[[float, Moments], Moments],
    rate: float = 1.0,
    corrector: bool = False,
) -> Float[np.ndarray, "p"]:
    """Integrates the kernel times each Lagrange polynomial over the step from nodes[0] to `to`.

    The kernel is rate e^{-rate (h - u)}; a rate of -1 is the eps basis. The polynomials run through the lambdas of the
    nodes, the newest first; a corrector's also through lambda at `to`, whose weight comes last.
    """
    at = nodes[0]
    h = to.half_log_snr - at.half_log_snr
    earlier = [(node.half_log_snr - at.half_log_snr) / h for node in nodes[1:]]
    shares = np.array([0.0, *earlier, *[1.0] * corrector])
    return lagrange_integrals(shares, moments(rate * h, exponential_moments(rate * h, shares.size)))
