"""Grids of real times, spaced by the noise level: in lambda, in sigma = noise / signal, or shifted towards noise."""

from typing import Any

import numpy as np
from scipy import special

from diffusion.errors import InputError, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.timesteps.checks import Tau, count, descending, started


def log_snr(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces real times evenly in lambda from T to 1, then takes 0 (DPM-Solver, arXiv:2206.00927, section 3.4)."""
    top, bottom = _lambda_range(schedule)
    return started(schedule, _from_lambda(schedule, np.linspace(top, bottom, count(schedule, num_steps))), start)


def karras(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0, start: float = 1.0) -> Tau:
    """Spaces (noise / signal)^(1/rho) evenly from T to 1 in real times, then takes 0 (EDM, arXiv:2206.00364, Eq. 5)."""
    _require_positive("rho", rho, 7)
    top, bottom = _lambda_range(schedule)
    warped = np.linspace(np.exp(-top / rho), np.exp(-bottom / rho), count(schedule, num_steps))
    return started(schedule, _from_lambda(schedule, -rho * np.log(warped)), start)


def polyexponential(schedule: NoiseSchedule, num_steps: int, rho: float = 1.0, start: float = 1.0) -> Tau:
    """Spaces lambda as a ramp to the power rho from T to 1, then takes 0, as k-diffusion; rho = 1 is `log_snr`."""
    _require_positive("rho", rho, 1)
    top, bottom = _lambda_range(schedule)
    ramp = np.linspace(1, 0, count(schedule, num_steps)) ** rho
    return started(schedule, _from_lambda(schedule, bottom + ramp * (top - bottom)), start)


def kl_optimal(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces arctan(noise / signal) evenly from T to 1, then takes 0 (Align Your Steps, arXiv:2404.14507, Theorem 3.1).

    It is optimal for data that is a Gaussian of variance 1.
    """
    top, bottom = _lambda_range(schedule)
    angles = np.linspace(np.arctan(np.exp(-top)), np.arctan(np.exp(-bottom)), count(schedule, num_steps))
    return started(schedule, _from_lambda(schedule, -np.log(np.tan(angles))), start)


def beta(
    schedule: NoiseSchedule, num_steps: int, alpha: float = 0.6, beta: float = 0.6, of: str = "t", start: float = 1.0
) -> Tau:
    """Takes the quantiles of a beta distribution, dense at both ends (Beta Sampling, arXiv:2407.12173).

    Args:
      schedule: the noise schedule.
      num_steps: S.
      alpha, beta: of the distribution, above 0; below 1 it is dense at the ends.
      of: what is distributed so. "t": times in 1..T at the levels 1, 1 - 1/S, ..., 1/S, as in the paper and ComfyUI,
        which rounds them. "sigma": noise / signal between its values at 1 and T, at even levels with both ends,
        diffusers' use_beta_sigmas.
      start: the share of T that T becomes; all times are multiplied by it.
    """
    _require_positive("alpha", alpha, 0.6)
    _require_positive("beta", beta, 0.6)
    steps = count(schedule, num_steps)
    if of not in ("t", "sigma"):
        raise InputError(f"of is {of!r}; {nearest(str(of), ('t', 'sigma'))}")
    if of == "t":
        shares = special.betaincinv(alpha, beta, 1 - np.arange(steps) / steps)
        return started(schedule, np.append(1 + (schedule.num_timesteps - 1) * shares, 0.0), start)
    low, high = (np.exp(-value) for value in reversed(_lambda_range(schedule)))
    sigma = low + special.betaincinv(alpha, beta, 1 - np.linspace(0, 1, steps)) * (high - low)
    return started(schedule, _from_lambda(schedule, -np.log(sigma)), start)


def shifted(
    schedule: NoiseSchedule,
    num_steps: int,
    shift: float = 0.0,
    mu: float = 0.0,
    tokens: int = 0,
    lowest: float = 0.0,
    terminal: float = 0.0,
    start: float = 1.0,
) -> Tau:
    """Shifts even times towards noise: a share u of T is k u / (1 + (k - 1) u) (SD3, arXiv:2403.03206, Eq. 23).

    On a rectified flow the share of T is the noise itself, and this is the grid of diffusers' flow schedulers.

    Args:
      schedule: the noise schedule.
      num_steps: S.
      shift: k, above 0; 3 is Stable Diffusion 3's, and taken where mu and tokens are not given either.
      mu: log k, for the models that say it so; give one of shift, mu and tokens.
      tokens: how many tokens an image has, for the models that shift by resolution: mu is linear, from 0.5 at 256
        tokens to 1.15 at 4,096, as in Flux. 4,096 are 1024 x 1024 pixels there.
      lowest: the last u above 0, before the shift; 1 / S, which makes all of them even, where not given. diffusers'
        FlowMatchEulerDiscreteScheduler, left alone, takes the shifted 1 / T.
      terminal: where given, the shares are stretched so that the last one above 0 is this, diffusers' shift_terminal.
      start: the share of T that T becomes; all times are multiplied by it.
    """
    steps, given = count(schedule, num_steps), {"shift": shift, "mu": mu, "tokens": tokens}
    if sum(value != 0 for value in given.values()) > 1:
        names = [f"{name}={value}" for name, value in given.items() if value]
        raise InputError(f"tau shifted has {' and '.join(names)}, which say the same; give one of them")
    if shift < 0 or tokens < 0 or not np.isfinite([shift, mu]).all():
        raise InputError(f"tau shifted has shift={shift}, mu={mu}, tokens={tokens}; shift and tokens must be above 0")
    for name, value in (("lowest", lowest), ("terminal", terminal)):
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; it must be a share of T below 1, or 0 for none")
    if tokens:
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    k = np.exp(mu) if mu else shift or 3.0
    u = np.linspace(1, lowest or 1 / steps, steps)
    u = k * u / (1 + (k - 1) * u)
    if terminal and steps > 1:
        u = 1 - (1 - u) * (1 - terminal) / (1 - u[-1])
    return started(schedule, np.append(schedule.num_timesteps * u, 0.0), start)


AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""noise / signal of the optimized schedules of Align Your Steps, arXiv:2404.14507, Table 3."""


def ays(schedule: NoiseSchedule, num_steps: int, model: str = "sd15", start: float = 1.0) -> Tau:
    """Takes the times that Align Your Steps optimized for a model, in 10 steps (arXiv:2404.14507, Table 3).

    Any other number of steps interpolates log(noise / signal), as its authors do; the last level is 0 here.

    Args:
      schedule: the noise schedule.
      num_steps: S; 10 takes the published figures.
      model: a key of `AYS`: "sd15" and "sdxl", of Stable Diffusion, "deepfloyd" and "svd".
      start: the share of T that T becomes; all times are multiplied by it.

    Raises:
      InputError: an unknown model, or one whose largest noise is another than the schedule's.
    """
    if model not in AYS:
        raise InputError(f"model is {model!r}; {nearest(str(model), AYS)}")
    steps, known = count(schedule, num_steps), np.log(AYS[model])
    top = -schedule.half_log_snr(schedule.num_timesteps)
    if not abs(top - known[0]) < 0.01:
        raise InputError(
            f"tau ays:model={model} begins at noise / signal {AYS[model][0]}, and this schedule at {np.exp(top):.5g}; "
            "it is for models of another schedule"
        )
    log_sigma = np.interp(np.linspace(0, 10, steps + 1)[:-1], np.arange(11), known)
    times = schedule.time_of(-np.minimum(log_sigma, top))
    times[0] = schedule.num_timesteps
    return started(schedule, np.append(times, 0.0), start)


def _require_positive(name: str, value: Any, usual: float) -> None:
    if not 0 < value < np.inf:
        raise InputError(f"{name} is {value}; it must be above 0, and {usual} is usual")


def _lambda_range(schedule):
    """Returns lambda at T and at 1, the ends of a grid spaced in log-SNR."""
    top = schedule.half_log_snr(schedule.num_timesteps)
    if np.isinf(top):
        raise InputError("this grid is spaced in log-SNR, which is infinite at zero terminal SNR; use 'uniform'")
    return float(top), float(schedule.half_log_snr(1))


def _from_lambda(schedule, half_log_snr):
    """Makes the grid through given values of lambda, from T to 1, and then 0."""
    tau = schedule.time_of(half_log_snr)
    # The ends are T and 1 by definition; rounding must not push them off the grid.
    tau[-1] = 1.0 if tau.size > 1 else tau[-1]
    tau[0] = schedule.num_timesteps
    return descending(schedule, np.append(tau, 0.0))
