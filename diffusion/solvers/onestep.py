"""One-step samplers under the names of other papers and libraries, and DDPM with the optimal variance."""

import dataclasses

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.ddim import ddim, ddpm
from diffusion.solvers.forms import grid_levels
from diffusion.solvers.table import SamplerTable, one_register


def euler(schedule: NoiseSchedule, tau) -> SamplerTable:
    """k-diffusion's Euler, x / a moved along eps in sigma = n / a: the table of ddim with eta = 0.

    x_s / a_s = x / a_t + (sigma_s - sigma_t) eps is Eq. 13 of DDIM (arXiv:2010.02502).

    Raises:
      InputError: tau is not a grid of the schedule.
    """
    return dataclasses.replace(ddim(schedule, tau), name="euler")


def euler_ancestral(schedule: NoiseSchedule, tau, eta: float = 1.0) -> SamplerTable:
    """k-diffusion's ancestral Euler: the table of ddim with the same eta.

    k-diffusion steps to sigma_down and adds noise sigma_up = eta sigma_s sqrt(1 - sigma_s^2 / sigma_t^2) to x / a, with
    sigma_down^2 + sigma_up^2 = sigma_s^2. As sigma_s a_s = n_s, that is DDIM's sigma, and sigma_down its kept eps.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      eta: 0 is deterministic; 1 is DDPM.

    Raises:
      InputError: eta lies outside 0..1, or tau is not a grid of the schedule.
    """
    return dataclasses.replace(ddim(schedule, tau, eta), name=f"euler_ancestral(eta={eta:g})")


def sigma_hat(schedule: NoiseSchedule, tau) -> SamplerTable:
    """DDIM's sigma-hat (arXiv:2010.02502, section 5): the table of ddpm with variance="large".

    Raises:
      InputError: tau is not a grid of the schedule.
    """
    return dataclasses.replace(ddpm(schedule, tau, variance="large"), name="sigma_hat")


def consistency(schedule: NoiseSchedule, tau) -> SamplerTable:
    """Multistep consistency sampling (arXiv:2303.01469, Algorithm 1): x_s = a_s D + n_s z, all noise anew in each step.

    For networks trained for consistency, whose D is a sample and not a mean.

    Raises:
      InputError: tau is not a grid of the schedule.
    """
    after = grid_levels(schedule, tau)[1:]
    signal, noise = np.array([[level.signal, level.noise] for level in after]).T
    return one_register("consistency", schedule, tau, 0 * signal, signal, noise)


def analytic_dpm(
    schedule: NoiseSchedule,
    tau,
    gamma: Float[np.ndarray, "S"],
    eta: float = 1.0,
    max_cov: float | None = None,
) -> SamplerTable:
    """Analytic-DPM (arXiv:2201.06503, Theorem 1): ddim's mean with the variance that is optimal for it.

    variance = sigma^2 + b^2 Cov, with b the weight of D, and Cov = (n_t / a_t)^2 (1 - gamma) the mean variance of a
    pixel of x_0 given x_t. sigma is DDIM's, so eta = 1 is the paper's A-DDPM and 0 its A-DDIM. The last step injects
    none.

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
    base = ddim(schedule, tau, eta)
    gamma = np.asarray(gamma, np.float64)
    if gamma.shape != base.t.shape:
        raise InputError(f"gamma has shape {gamma.shape}; give one value for each of tau[:-1], {base.t.shape}")
    if not np.all(gamma >= 0) or (max_cov is None and np.any(gamma > 1)):
        worst = gamma[np.argmax(np.abs(gamma - 0.5))]
        raise InputError(f"gamma is {worst}; it must lie in 0..1; average more samples, or set max_cov to limit Cov")
    if max_cov is not None and not 0 < max_cov < np.inf:
        raise InputError(f"max_cov is {max_cov}; it must be finite and above 0, as 1 for data in [-1, 1]")
    if base.signal[0] == 0:
        raise InputError(f"analytic_dpm starts at t = {base.t[0]:g}, where the signal is zero and gamma says nothing")
    cov = (base.noise / base.signal) ** 2 * (1 - gamma)
    cov = cov if max_cov is None else np.clip(cov, 0, max_cov)
    keep, add, sigma = base.update[:, 0].T
    std = np.sqrt(sigma**2 + add**2 * cov)
    std[-1] = 0.0
    return one_register(f"analytic_dpm(eta={eta:g})", schedule, tau, keep, add, std)
