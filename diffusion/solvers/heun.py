"""EDM's two samplers take Heun steps in sigma = n / a: `heun` is deterministic, `edm` adds noise before each step."""

import numpy as np

from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import (
    Level,
    Stage,
    build,
    columns,
    eps_levels,
    eps_of,
    eps_weight,
    first_order,
    levels,
    runge_kutta,
)
from diffusion.solvers.table import SamplerTable
from diffusion.timesteps import require_concrete


def heun(schedule: NoiseSchedule, tau) -> SamplerTable:
    """Builds EDM's deterministic sampler (arXiv:2206.00364, Algorithm 1): Heun steps in sigma = n / a, the last Euler.

    2 S - 1 calls: the first of a step makes it with eps_t, the second, at its end, corrects it to the mean of both eps.
    The last step returns D. The correction weighs a difference of evaluations by about a_s / (2 a_t), large where
    tau[0] has next to no signal (cosine at T: a = 5e-5); start tau lower there.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`; EDM's own is `karras`.

    Raises:
      InputError: zero signal at tau[0], or tau is not a grid of the schedule.
    """
    grid = eps_levels("heun", schedule, tau)
    return _heun("heun", tau, grid, grid[:-1], [0.0] * len(grid))


def edm(
    schedule: NoiseSchedule,
    tau,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = np.inf,
    s_noise: float = 1.0,
) -> SamplerTable:
    """Builds EDM's stochastic sampler (arXiv:2206.00364, Algorithm 2), which adds noise before each Heun step.

    The noise raises sigma to sigma_hat = sigma (1 + min(s_churn / S, sqrt(2) - 1)) where s_min <= sigma <= s_max. The
    step then starts at the time whose sigma is sigma_hat; its noise is the z of the row before. The first step starts
    at sigma_hat outright, so x_init stands for x there. 2 S - 1 calls; s_churn = 0 is `heun`.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`; EDM's own is `karras`.
      s_churn: at least 0. The paper takes 40 for ImageNet-64 in 256 steps, with s_min 0.05, s_max 50, s_noise 1.003.
      s_min, s_max: 0 <= s_min <= s_max; noise is added where sigma lies between them.
      s_noise: std of the noise added, above 0.

    Raises:
      InputError: an option outside the above, a sigma_hat above the schedule's largest sigma (as always where churn
        meets tau[0] = T), zero signal at tau[0], or tau is not a grid of the schedule.
    """
    require_concrete("an option of edm", s_churn, s_min, s_max, s_noise)
    if not 0 <= s_churn < np.inf:
        raise InputError(f"s_churn is {s_churn}; it must be finite and at least 0")
    if not 0 <= s_min <= s_max:
        raise InputError(f"s_min is {s_min} and s_max {s_max}; 0 <= s_min <= s_max must hold")
    if not 0 < s_noise < np.inf:
        raise InputError(f"s_noise is {s_noise}; it must be finite and above 0")
    name = f"edm(s_churn={s_churn:g}, s_min={s_min:g}, s_max={s_max:g}, s_noise={s_noise:g})"
    grid = eps_levels(name, schedule, tau)
    sigma = np.array([at.rho for at in grid[:-1]])
    gamma = np.where((s_min <= sigma) & (sigma <= s_max), min(s_churn / sigma.size, 2**0.5 - 1), 0.0)
    starts = _raised(name, schedule, grid, sigma, gamma)
    added = s_noise * sigma * np.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
    return _heun(name, tau, grid, starts, [*added, 0.0])


def _raised(name: str, schedule: NoiseSchedule, grid: list[Level], sigma: np.ndarray, gamma: np.ndarray) -> list[Level]:
    """Finds the level at which each step starts, where the noise in units of the signal is sigma (1 + gamma)."""
    largest = np.exp(-schedule.half_log_snr(schedule.num_timesteps))
    for level, s, g in zip(grid, sigma, gamma, strict=False):
        if g > 0 and s * (1 + g) > largest * (1 + 1e-12):
            raise InputError(
                f"{name} raises sigma to {s * (1 + g):.4g} at t = {level.t:g}, above the schedule's largest, "
                f"{largest:.4g}; give s_max below {s:.4g}, or start tau lower"
            )
    churned = levels(schedule, schedule.time_of(-np.log(sigma * (1 + gamma))))
    return [up if g > 0 else level for level, up, g in zip(grid, churned, gamma, strict=False)]


def _heun(name: str, tau, grid: list[Level], starts: list[Level], added: list[float]) -> SamplerTable:
    """Builds Heun steps from starts[i] to grid[i + 1]; before step i noise of std added[i] is put on x / a."""
    registers = 2 if len(starts) > 1 else 1
    x, *_, D, z = columns(registers)
    stages = []
    for i, (at, to) in enumerate(zip(starts[:-1], grid[1:-1], strict=True)):
        half = eps_weight(at, to) / 2
        *first, (here, rows) = runge_kutta(at, [to, to], [0.0, half], eps_of, registers)
        # The noise of the next step comes with this row: x / a + added z, at the level where that step starts.
        onward = starts[i + 1]
        churned = onward.signal / to.signal * rows[0] + onward.signal * added[i + 1] * z
        stages += [*first, Stage(here, [churned])]
    stages.append(Stage(starts[-1], [first_order(starts[-1], grid[-1], x, D)]))
    return build(name, tau, stages, registers)
