"""DDPM and DDIM over a subsequence of the timesteps: one family with one knob."""

import dataclasses

import numpy as np

from diffusion import timesteps
from diffusion.errors import InputError, nearest
from diffusion.gaussian import kept_noise, posterior_shares
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.table import SamplerTable, one_register

VARIANCES = ("small", "large", "learned")


def ddim(schedule: NoiseSchedule, tau, eta: float = 0.0) -> SamplerTable:
    """Denoising Diffusion Implicit Models, arXiv:2010.02502, Eq. 12: x_s = a_s D + sqrt(n_s^2 - sigma^2) eps + sigma z.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      eta: 0 is deterministic; 1 is the respaced DDPM posterior, `ddpm(variance="small")`.

    Raises:
      InputError: eta lies outside 0..1, or tau is not a grid of the schedule.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; it must lie in 0..1")
    kept, fresh = _shares(schedule, tau)
    return _table(f"ddim(eta={eta:g})", schedule, tau, kept_noise(kept, eta), eta * schedule.at(tau[1:])[1] * fresh)


def ddpm(schedule: NoiseSchedule, tau, variance: str = "small") -> SamplerTable:
    """Ancestral sampling with the respaced posterior (DDPM, arXiv:2006.11239; improved DDPM, arXiv:2102.09672, Eq. 19).

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      variance: "small" is the posterior's own variance beta_tilde, the same table as ddim with eta = 1; "large" is
        beta = 1 - alpha_bar_t / alpha_bar_s; "learned" is for a network of twice the channels, whose second half says
        where between the logs of the two its variance lies, -1 to 1 (improved DDPM, Eq. 15). The last step injects no
        noise with any; its beta_tilde, 0, is replaced by the one before it inside the log.

    Raises:
      InputError: an unknown variance, or tau is not a grid of the schedule.
    """
    if variance not in VARIANCES:
        raise InputError(f"variance is {variance!r}; {nearest(str(variance), VARIANCES)}")
    kept, fresh = _shares(schedule, tau)
    noise = schedule.at(tau)[1]
    small, large = noise[1:] * fresh, noise[:-1] * fresh
    sigma = {"small": small, "large": large, "learned": np.ones_like(small)}[variance]
    sigma[-1] = 0.0
    table = _table(f"ddpm(variance={variance})", schedule, tau, kept_noise(kept, 1.0), sigma)
    if variance != "learned":
        return table
    # With one step there is no step before the last; its noise counts for nothing.
    small[-1] = small[-2] if len(small) > 1 else large[-1]
    return dataclasses.replace(table, log_variance=2 * np.log(np.stack([small, large], axis=-1)))


def _shares(schedule, tau):
    """(kept, fresh) of every step: `posterior_shares`, the second as a std: beta_tilde = (n_s fresh)^2; float64 [S]."""
    alpha_bar, noise_var = schedule.powers(timesteps.check(schedule, tau))
    kept, fresh = posterior_shares(alpha_bar[:-1], noise_var[:-1], alpha_bar[1:], noise_var[1:])
    return kept, np.sqrt(fresh)


def _table(name, schedule, tau, kept, sigma):
    """x_s = a_s D + n_s kept eps + sigma z with eps = (x_t - a_t D) / n_t put in."""
    signal, noise = schedule.at(tau)
    keep = noise[1:] * kept / noise[:-1]
    return one_register(name, schedule, tau, keep, signal[1:] - keep * signal[:-1], sigma)
