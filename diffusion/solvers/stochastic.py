"""Solvers of the reverse SDE that are no deterministic one with noise added: dpmpp_sde of k-diffusion, and ER-SDE."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.ddim import ancestral, check_eta, check_s_noise
from diffusion.solvers.forms import (
    Level,
    Stage,
    build,
    check_order,
    columns,
    eps_levels,
    first_order,
    grid_levels,
    levels,
)
from diffusion.solvers.integrals import NODES, WEIGHTS
from diffusion.solvers.table import SamplerTable

PATHS = ("sigma", "sde", "independent")


def dpm_solver_pp_sde(
    schedule: NoiseSchedule, tau, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, path: str = "sigma"
) -> SamplerTable:
    """Builds k-diffusion's dpmpp_sde, diffusers' DPMSolverSDEScheduler: singlestep SDE-DPM-Solver++ with two calls.

    The first call of a step makes it to lambda_t + r h, with noise of its own, where the second is made; then the step
    is made from its start with both. The last step returns D, and a step from zero signal has one call: 2 S - 1 calls.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      eta: 0 is `dpm_solver_pp_singlestep`; 1 the reverse SDE.
      s_noise: a factor of the noise drawn; 1 keeps the variance.
      r: where the second call is made, as a share of the step in lambda; 0 < r < 1.
      path: how the noise of the whole step belongs to that of its part. "sigma": as a Brownian path in n / a, which is
        k-diffusion's noise tree. "sde": as in the exact solution of the SDE. "independent": not at all.

    Raises:
      InputError: an option outside the above, or tau is not a grid of the schedule.
    """
    check_eta(eta)
    check_s_noise(s_noise, eta > 0, "eta above 0")
    if not 0 < r < 1:
        raise InputError(f"r is {r}; it must lie between 0 and 1, and 1/2 is usual")
    if path not in PATHS:
        raise InputError(f"path is {path!r}; {nearest(str(path), PATHS)}")
    grid = grid_levels(schedule, tau)
    long = [np.isfinite(to.half_log_snr - at.half_log_snr) for at, to in pairwise(grid)]
    registers = 1 + any(long)
    x, *begun, D, z = columns(registers)
    stages = []
    for (at, to), two in zip(pairwise(grid), long, strict=True):
        down, std = ancestral(at, to, eta)
        if not two:
            stages.append(Stage(at, [first_order(at, down, x, D) + s_noise * std * z]))
            continue
        middle = levels(schedule, schedule.time_of([at.half_log_snr + r * (to.half_log_snr - at.half_log_snr)]))[0]
        middle_down, middle_std = ancestral(at, middle, eta)
        # Of D that is constant the step makes first_order; the second call weighs 1 / (2 r), the first the rest.
        weight = -down.signal * np.expm1(at.half_log_snr - down.half_log_snr) / (2 * r)
        shared = _shared(path, at, middle, to)
        first = first_order(at, middle_down, x, D) + s_noise * middle_std * z
        whole = first_order(at, down, x, D) - weight * D + s_noise * std * shared * z
        stages.append(Stage(at, [first, whole]))
        stages.append(Stage(middle, [begun[0] + weight * D + s_noise * std * np.sqrt(1 - shared**2) * z]))
    return build(f"dpm_solver_pp_sde(eta={eta:g}, path={path})", tau, stages, registers)


def _shared(path: str, at: Level, middle: Level, to: Level) -> float:
    """Returns the correlation of the noise of a step with that of its first part."""
    if path == "independent":
        return 0.0
    if path == "sigma":
        return np.sqrt((at.rho - middle.rho) / (at.rho - to.rho))
    # The noise of the SDE is a Brownian path in e^{2 lambda}.
    part, whole, rest = (2 * (b.half_log_snr - a.half_log_snr) for a, b in ((at, middle), (at, to), (middle, to)))
    return np.sqrt(np.expm1(-part) / np.expm1(-whole) * np.exp(-rest))


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "er": lambda sigma: np.exp(sigma**0.3) + 10,
    "sde": lambda sigma: sigma,
    "ode": lambda sigma: np.ones_like(sigma),
}
"""phi(sigma) / sigma of ER-SDE: how much more noise is drawn at higher noise. "er" is the authors' choice, SDE 5."""


def er_sde(
    schedule: NoiseSchedule, tau, order: int = 3, kind: str = "er", eta: float = 1.0, s_noise: float = 1.0
) -> SamplerTable:
    """Builds ER-SDE-Solver-1, -2 and -3 (arXiv:2309.06169, Eq. 12 and Algorithms 1 to 3, for both VP and VE).

    One call a step. In sigma = n / a and y = x / a, with phi a function of sigma that says how much noise is drawn,

        y_s = r y_t + (1 - r) D + [s - t + phi(s) int_s^t d sigma / phi] D' + ... + sqrt(s^2 - r^2 t^2) z,

    r = phi(s) / phi(t), with s and t the sigmas there and D', D'' taken from differences of earlier D. The integrals
    are exact here; the authors' code sums over 200 points. Step i has order min(order, i + 1); the last step returns D.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      order: 1 to 3.
      kind: phi: "er", sigma (e^{sigma^0.3} + 10); "sde", sigma^2, the reverse SDE; "ode", sigma, no noise.
      eta: the power of phi / sigma; 0 is deterministic.
      s_noise: a factor of the noise drawn; 1 keeps the variance.

    Raises:
      InputError: an option outside the above, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    order = check_order(order, 3)
    check_s_noise(s_noise, kind != "ode" and eta > 0, "another kind than ode and eta above 0")
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; {nearest(str(kind), KINDS)}")
    if not 0 <= eta < np.inf:
        raise InputError(f"eta is {eta}; it must be finite and at least 0")
    name = f"er_sde(order={order}, kind={kind}, eta={eta:g})"
    grid = eps_levels(name, schedule, tau)
    registers = min(order, len(grid) - 1)
    x, *past, D, z = columns(registers)
    stages = []
    for i, (at, to) in enumerate(pairwise(grid)):
        ratio = float((KINDS[kind](np.array(to.rho)) / KINDS[kind](np.array(at.rho))) ** eta) if to.t > 0 else 0.0
        kept = to.noise / at.noise * ratio  # of x
        new_x = kept * x + (to.signal - kept * at.signal) * D
        known = [D, *past][: min(i + 1, order)]
        if to.t > 0 and len(known) > 1:
            weights = _taylor(kind, eta, at.rho, to.rho)
            new_x = new_x + to.signal * sum(w * d for w, d in zip(weights, _derivatives(grid, i, known), strict=False))
        if to.t > 0:
            new_x = new_x + s_noise * to.noise * np.sqrt(max(1 - ratio**2, 0.0)) * z
        stages.append(Stage(at, [new_x, *[D, *past][: registers - 1]]))
    return build(name, tau, stages, registers)


def _taylor(kind: str, eta: float, at: float, to: float) -> tuple[float, float]:
    """Integrates what a first and a second derivative of D add to a step between two sigmas."""
    # In log sigma, where the integrand is smooth over long steps; d sigma / phi = d log sigma / (phi / sigma).
    sigma = to * (at / to) ** NODES
    weights = WEIGHTS * np.log(at / to) / KINDS[kind](sigma) ** eta
    end = to * float(KINDS[kind](np.array(to))) ** eta
    return to - at + end * np.sum(weights), (to - at) ** 2 / 2 + end * (weights @ (sigma - at))


def _derivatives(grid, i: int, known) -> list:
    """Returns D' and, with three evaluations, D'' by differences in sigma, as published."""
    sigma = [grid[i - k].rho for k in range(len(known))]
    slopes = [(new - old) / (s - s_old) for new, old, s, s_old in zip(known, known[1:], sigma, sigma[1:], strict=False)]
    return [slopes[0], *((slopes[0] - slopes[1]) / ((sigma[0] - sigma[2]) / 2) for _ in slopes[1:])]
