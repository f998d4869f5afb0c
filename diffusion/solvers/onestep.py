"""One-step samplers go here by the names of other papers and libraries, with DDPM of optimal variance among them."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule, transition_var
from diffusion.solvers.ddim import check_eta, check_s_noise, ddim, ddpm, split_noise
from diffusion.solvers.forms import Level, Stage, build, columns, ended, eps_of, first_order, grid_levels, levels
from diffusion.solvers.table import SamplerTable
from diffusion.timesteps import require_concrete


def euler(schedule: NoiseSchedule, tau) -> SamplerTable:
    """Builds k-diffusion's Euler, which moves x / a along eps in sigma = n / a: the table of ddim with eta = 0.

    x_s / a_s = x / a_t + (sigma_s - sigma_t) eps is Eq. 13 of DDIM (arXiv:2010.02502).

    Raises:
      InputError: tau is not a grid of the schedule.
    """
    return dataclasses.replace(ddim(schedule, tau), name="euler")


def euler_ancestral(schedule: NoiseSchedule, tau, eta: float = 1.0, s_noise: float = 1.0) -> SamplerTable:
    """Builds k-diffusion's ancestral Euler: the table of ddim with the same eta.

    k-diffusion steps to sigma_down and adds noise sigma_up = eta sigma_s sqrt(1 - sigma_s^2 / sigma_t^2) to x / a, with
    sigma_down^2 + sigma_up^2 = sigma_s^2. As sigma_s a_s = n_s, sigma_up is DDIM's sigma and sigma_down the eps it
    keeps, both in units of the signal.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      eta: 0 is deterministic; 1 is DDPM.
      s_noise: a factor of the noise drawn; 1 keeps the variance.

    Raises:
      InputError: an option outside the above, or tau is not a grid of the schedule.
    """
    table = ddim(schedule, tau, eta)
    check_s_noise(s_noise, eta > 0, "eta above 0")
    update = table.update * [1.0, 1.0, s_noise]
    return dataclasses.replace(table, update=update, name=f"euler_ancestral(eta={eta:g})")


def sigma_hat(schedule: NoiseSchedule, tau) -> SamplerTable:
    """Builds DDIM's sigma-hat (arXiv:2010.02502, section 5): the table of ddpm with variance="large".

    Raises:
      InputError: tau is not a grid of the schedule.
    """
    return dataclasses.replace(ddpm(schedule, tau, variance="large"), name="sigma_hat")


def consistency(schedule: NoiseSchedule, tau, sigma_min: float = 0.0) -> SamplerTable:
    """Builds multistep consistency sampling: x_s = a_s D + n_s z.

    Every step draws all noise anew. This is for networks trained for consistency, whose D is a sample and not a mean.
    It is Algorithm 1 of arXiv:2303.01469, whose epsilon is sigma_min: the paper's networks return x itself at noise
    0.002 in units of the signal, not at 0, and so its steps add noise of variance sigma_s^2 - epsilon^2.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      sigma_min: at least 0, and at most the noise of the lowest time above 0 in tau.

    Raises:
      InputError: sigma_min lies outside this range, or tau is not a grid of the schedule.
    """
    _, D, z = columns(1)
    grid = grid_levels(schedule, tau)
    lowest = np.exp(-grid[-2].half_log_snr)
    if not 0 <= sigma_min <= lowest * (1 + 1e-9):
        raise InputError(f"sigma_min is {sigma_min}; it must be in 0..{lowest:g}, the lowest noise of tau")
    stages = []
    for at, to in pairwise(grid):
        fresh = max(to.noise**2 - (to.signal * sigma_min) ** 2, 0) ** 0.5
        stages.append(Stage(at, [to.signal * D + fresh * z]))
    name = f"consistency(sigma_min={sigma_min:g})" if sigma_min else "consistency"
    return build(name, tau, stages, num_registers=1)


def tcd(schedule: NoiseSchedule, tau, eta: float = 0.3, end: float = 0.0) -> SamplerTable:
    """Builds strategic stochastic sampling, for networks of trajectory consistency distillation (arXiv:2402.19159).

    A deterministic DDIM step goes past the next time s of tau to s' below it, and new noise takes x from s' back to s.
    As in diffusers, s' is the timestep 1 + floor((1 - eta) (s - 1)).

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      eta: gamma of the paper. 0 is deterministic DDIM; at 1 every step goes to s' = 1, nearly as `consistency`.
      end: the time that the last step goes to; 1 is diffusers', which leaves that noise in.

    Raises:
      InputError: eta lies outside 0..1, end outside the last step, or tau is not a grid of the schedule.
    """
    check_eta(eta)
    x, D, z = columns(1)
    stages = []
    grid = ended("tcd", schedule, grid_levels(schedule, tau), end, may_stay=True)
    for i, (at, to) in enumerate(pairwise(grid)):
        past, std = to, 0.0
        if eta > 0 and i < len(grid) - 2:
            past = levels(schedule, [1 + np.floor((1 - eta) * (to.t - 1))])[0]
            std = np.sqrt(transition_var(to.signal**2, to.noise**2, past.signal**2, past.noise**2))
        stages.append(Stage(at, [to.signal / past.signal * first_order(at, past, x, D) + std * z]))
    return build(f"tcd(eta={eta:g})", tau, stages, num_registers=1)


def analytic_dpm(
    schedule: NoiseSchedule,
    tau,
    gamma: Float[np.ndarray, "S"],
    eta: float = 1.0,
    max_cov: float | None = None,
) -> SamplerTable:
    """Builds Analytic-DPM (arXiv:2201.06503, Theorem 1): ddim's mean with the variance that is optimal for it.

    variance = sigma^2 + b^2 Cov, with b the weight of D, and Cov = (n_t / a_t)^2 (1 - gamma) the mean variance of a
    pixel of x_0 given x_t. sigma is DDIM's, so eta = 1 is the paper's A-DDPM and 0 its A-DDIM. The last step injects no
    noise.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      gamma: E |eps_hat|^2 / d at each of tau[:-1], in that order; mean over data, noise and pixels. With an array of
        all timesteps 0..T, give array[tau[:-1]].
      eta: 0..1.
      max_cov: where given, Cov is limited to 0..max_cov, the paper's Theorem 2: 1 for data in [-1, 1].

    Raises:
      InputError: gamma has another shape; gamma lies outside 0..1 (a negative Cov, from too few samples) and max_cov is
        not given; eta or max_cov outside its range; zero signal at tau[0]; or tau is not a grid of the schedule.
    """
    check_eta(eta)
    require_concrete("gamma and max_cov", gamma, max_cov)
    grid = grid_levels(schedule, tau)
    gamma = np.asarray(gamma, np.float64)
    _check_analytic(grid, gamma, max_cov)
    x, D, z = columns(1)
    stages = []
    for (at, to), share in zip(pairwise(grid), gamma, strict=True):
        A, B = split_noise(at, to, eta)
        mean, sigma = to.signal * D + to.noise * (A * eps_of(at, x, D)), to.noise * B
        cov, b = at.rho**2 * (1 - share), mean @ D
        if max_cov is not None:
            cov = np.clip(cov, 0, max_cov)
        std = np.sqrt(sigma**2 + b**2 * cov) if to.t > 0 else 0.0
        stages.append(Stage(at, [mean + std * z]))
    return build(f"analytic_dpm(eta={eta:g})", tau, stages, num_registers=1)


def _check_analytic(grid: Sequence[Level], gamma: np.ndarray, max_cov: float | None) -> None:
    """Refuses a gamma or max_cov with which the optimal variance means nothing on this grid."""
    if gamma.shape != (len(grid) - 1,):
        raise InputError(f"gamma has shape {gamma.shape}; give one value for each of tau[:-1], {(len(grid) - 1,)}")
    if not np.all(gamma >= 0) or (max_cov is None and np.any(gamma > 1)):
        worst = gamma[np.argmax(np.abs(gamma - 0.5))]
        raise InputError(f"gamma is {worst}; it must lie in 0..1; average more samples, or set max_cov to limit Cov")
    if max_cov is not None and not 0 < max_cov < np.inf:
        raise InputError(f"max_cov is {max_cov}; it must be finite and above 0, as 1 for data in [-1, 1]")
    if grid[0].signal == 0:
        raise InputError(f"analytic_dpm starts at t = {grid[0].t:g}, where the signal is zero and gamma says nothing")
