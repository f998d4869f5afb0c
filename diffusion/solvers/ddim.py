"""DDPM and DDIM step over a subsequence of the timesteps; they are one family with one knob, eta."""

from itertools import pairwise

import numpy as np

from diffusion.errors import InputError, nearest
from diffusion.gaussian import kept_noise, posterior_shares
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import Level, Stage, build, columns, ended, eps_of, grid_levels
from diffusion.solvers.table import SamplerTable
from diffusion.timesteps import require_concrete

VARIANCES = ("small", "large", "learned")


def ddim(schedule: NoiseSchedule, tau, eta: float = 0.0, end: float = 0.0) -> SamplerTable:
    """Builds Denoising Diffusion Implicit Models (arXiv:2010.02502, Eq. 12), from deterministic to DDPM's posterior.

    x_s = a_s D + n_s (A eps + B z), where sigma = n_s B is the paper's std of the fresh noise.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      eta: 0 is deterministic; 1 is the respaced DDPM posterior, `ddpm(variance="small")`.
      end: the time that the last step goes to; 1 is diffusers' set_alpha_to_one = False, which leaves that noise in.

    Raises:
      InputError: eta lies outside 0..1, end outside the last step, or tau is not a grid of the schedule.
    """
    check_eta(eta)
    x, D, z = columns(1)
    stages = []
    for at, to in pairwise(ended("ddim", schedule, grid_levels(schedule, tau), end, may_stay=True)):
        A, B = split_noise(at, to, eta)
        stages.append(Stage(at, [to.signal * D + to.noise * (A * eps_of(at, x, D) + B * z)]))
    return build(f"ddim(eta={eta:g})", tau, stages, num_registers=1)


def ddpm(schedule: NoiseSchedule, tau, variance: str = "small") -> SamplerTable:
    """Builds ancestral sampling with the respaced posterior (arXiv:2006.11239; arXiv:2102.09672, Eq. 19).

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
    x, D, z = columns(1)
    stages, stds = [], []
    for at, to in pairwise(grid_levels(schedule, tau)):
        A, B = split_noise(at, to, eta=1.0)
        small, large = to.noise * B, at.noise * B
        # A learned variance scales z before its column does, hence 1. The last step has no noise to inject.
        sigma = {"small": small, "large": large, "learned": 1.0}[variance] if to.t > 0 else 0.0
        stages.append(Stage(at, [to.signal * D + to.noise * (A * eps_of(at, x, D)) + sigma * z]))
        stds.append((small, large))
    name = f"ddpm(variance={variance})"
    if variance != "learned":
        return build(name, tau, stages, num_registers=1)
    # The log needs a beta_tilde above 0 in the last step. With one step there is none before it, and
    # any value will do, because no noise is injected.
    large = stds[-1][1]
    stds[-1] = (stds[-2][0] if len(stds) > 1 else large, large)
    return build(name, tau, stages, num_registers=1, log_variance=2 * np.log(stds))


def check_eta(eta: float) -> None:
    """Refuses an eta outside 0..1.

    Raises:
      InputError: it lies outside.
    """
    require_concrete("eta", eta)
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; it must lie in 0..1")


def split_noise(at: Level, to: Level, eta: float) -> tuple[float, float]:
    """Splits the noise of x_s as DDIM does, eps_s = A eps_t + B z with A^2 + B^2 = 1: `gaussian.split_noise` by levels.

    Returns:
      (A, B), both in 0..1; eta = 0 gives (1, 0).
    """
    kept, fresh = posterior_shares(at.signal**2, at.noise**2, to.signal**2, to.noise**2)
    return kept_noise(kept, eta), eta * np.sqrt(fresh)


def ancestral(at: Level, to: Level, eta: float) -> tuple[Level, float]:
    """Splits a step into a deterministic one and fresh noise, as k-diffusion's ancestral samplers do.

    The deterministic step may be of any order. It goes to less noise than x_s has, n_s A, and the noise drawn, of std
    n_s B, brings the variance back: A and B are those of `split_noise`. In units of the signal they are sigma_down and
    sigma_up of k-diffusion.

    Returns:
      (where the deterministic step goes, the std of the noise); with eta = 0 the first is `to`.
    """
    A, B = split_noise(at, to, eta)
    with np.errstate(divide="ignore"):
        down = Level(to.t, to.signal, float(A * to.noise), float(to.half_log_snr - np.log(A)))
    return down, float(to.noise * B)


def check_s_noise(s_noise: float, draws: bool, remedy: str) -> None:
    """Refuses a factor of the noise that is negative or not finite, or that has no noise to act on.

    Args:
      s_noise: the factor.
      draws: whether noise is drawn.
      remedy: what would draw it, as "eta above 0".

    Raises:
      InputError: it is one of these.
    """
    require_concrete("s_noise", s_noise)
    if not 0 <= s_noise < np.inf:
        raise InputError(f"s_noise is {s_noise}; it must be finite and at least 0, and 1 keeps the variance")
    if s_noise != 1 and not draws:
        raise InputError(f"s_noise is {s_noise}, and there is no noise that it acts on; give {remedy}, or leave it out")
