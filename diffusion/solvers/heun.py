"""EDM's two samplers take Heun steps in sigma = n / a: `heun` is deterministic, `edm` adds noise before each step.

`edm` also takes other steps, as k-diffusion's sample_euler and sample_dpm_2 with churn do. `restart` goes back over
many steps with one noise and makes them again.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from diffusion.errors import InputError, is_whole, nearest
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.ddim import check_s_noise
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
from diffusion.solvers.table import SamplerTable, check_calls
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
    return _churned("heun", tau, grid, grid[:-1], [0.0] * len(grid), _heun_step)


def edm(
    schedule: NoiseSchedule,
    tau,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = np.inf,
    s_noise: float = 1.0,
    step: str = "heun",
) -> SamplerTable:
    """Builds EDM's stochastic sampler (arXiv:2206.00364, Algorithm 2), which adds noise before each Heun step.

    The noise raises sigma to sigma_hat = sigma (1 + min(s_churn / S, sqrt(2) - 1)) where s_min <= sigma <= s_max. The
    step then starts at the time whose sigma is sigma_hat; its noise is the z of the row before. The first step starts
    at sigma_hat outright, so x_init stands for x there. 2 S - 1 calls, or S with step "euler"; s_churn = 0 is `heun`.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`; EDM's own is `karras`.
      s_churn: at least 0. The paper takes 40 for ImageNet-64 in 256 steps, with s_min 0.05, s_max 50, s_noise 1.003.
      s_min, s_max: 0 <= s_min <= s_max; noise is added where sigma lies between them.
      s_noise: std of the noise added, above 0.
      step: "heun"; "euler", k-diffusion's sample_euler with its churn; or "dpm_2", its sample_dpm_2: `dpm_solver`.

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
    if s_churn == 0 and (s_min, s_max, s_noise) != (0, np.inf, 1):
        raise InputError(
            f"s_churn is 0, so that no noise is added, and s_min {s_min}, s_max {s_max} and s_noise {s_noise} are of "
            "that noise; give s_churn above 0, or leave them out"
        )
    steps = {"heun": _heun_step, "euler": _euler_step, "dpm_2": lambda *args: _dpm_2_step(schedule, *args)}
    if step not in steps:
        raise InputError(f"step is {step!r}; {nearest(str(step), steps)}")
    kind = "" if step == "heun" else f", step={step}"
    name = f"edm(s_churn={s_churn:g}, s_min={s_min:g}, s_max={s_max:g}, s_noise={s_noise:g}{kind})"
    grid = eps_levels(name, schedule, tau)
    sigma = np.array([at.rho for at in grid[:-1]])
    gamma = np.where((s_min <= sigma) & (sigma <= s_max), min(s_churn / sigma.size, 2**0.5 - 1), 0.0)
    starts = _raised(name, schedule, grid, sigma, gamma)
    added = s_noise * sigma * np.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
    return _churned(name, tau, grid, starts, [*added, 0.0], steps[step])


def restart(
    schedule: NoiseSchedule,
    tau,
    s_min: float = 0.3,
    s_max: float = 1.0,
    repeats: int = 1,
    s_noise: float = 1.0,
) -> SamplerTable:
    """Builds Restart sampling (arXiv:2306.14878, Algorithm 1): `heun`, a part of whose way is made again from noise.

    When sigma = n / a has come down to s_min, noise takes it back to s_max, and the steps between are made again,
    `repeats` times, which makes the errors of earlier steps smaller. Both are the nearest sigmas of tau, at least a
    step apart. 2 (S + repeats m) - 1 calls for m steps between; with one step in all there are none.

    Args:
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`; EDM's own is `karras`.
      s_min, s_max: 0 < s_min < s_max; the paper takes 0.06 to 0.3 and 0.3 to 1 on CIFAR-10 and ImageNet-64.
      repeats: K of the paper; 0 is `heun`.
      s_noise: a factor of the noise; 1 keeps the variance.

    Raises:
      InputError: an option outside the above, zero signal at tau[0], or tau is not a grid of the schedule.
    """
    check_s_noise(s_noise, repeats != 0, "repeats above 0")
    if not 0 < s_min < s_max:
        raise InputError(f"s_min is {s_min} and s_max {s_max}; 0 < s_min < s_max must hold")
    if not is_whole(repeats) or repeats < 0:
        raise InputError(f"repeats is {repeats}; it must be a whole number of at least 0")
    name = f"restart(s_min={s_min:g}, s_max={s_max:g}, repeats={repeats})"
    grid = eps_levels(name, schedule, tau)
    log_sigma = np.log([level.rho for level in grid[:-1]])
    low = max(int(np.argmin(np.abs(log_sigma - np.log(s_min)))), min(1, len(grid) - 2))
    high = min(int(np.argmin(np.abs(log_sigma - np.log(s_max)))), max(low - 1, 0))
    again = grid[high : low + 1]
    check_calls(name, 2 * (len(grid) - 1 + repeats * (low - high)) - 1)
    way = [*pairwise(grid[: low + 1]), *[*pairwise(again)] * int(repeats), *pairwise(grid[low:])]
    starts, ends = [at for at, _ in way], [to for _, to in way]
    jump = s_noise * np.sqrt(again[0].rho ** 2 - again[-1].rho ** 2)
    added = [jump if i and at is again[0] and i > high else 0.0 for i, at in enumerate(starts)]
    return _churned(name, tau, [grid[0], *ends], starts, added, _heun_step)


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


def _churned(
    name: str,
    tau,
    grid: list[Level],
    starts: list[Level],
    added: list[float],
    step: Callable[[Level, Level, int], list[Stage]],
) -> SamplerTable:
    """Builds steps from starts[i] to grid[i + 1]; before step i noise of std added[i] is put on x / a.

    step(at, to, registers) writes the stages of a step; the last one, to t = 0, is Euler's with all of them.
    """
    registers = len(step(starts[0], grid[1], 2)) if len(starts) > 1 else 1
    x, *_, D, z = columns(registers)
    stages = []
    for i, (at, to) in enumerate(zip(starts[:-1], grid[1:-1], strict=True)):
        *first, (here, rows) = step(at, to, registers)
        # The noise of the next step comes with this row: x / a + added z, at the level where that step starts.
        onward = starts[i + 1]
        churned = onward.signal / to.signal * rows[0] + onward.signal * added[i + 1] * z
        stages += [*first, Stage(here, [churned])]
    stages.append(Stage(starts[-1], [first_order(starts[-1], grid[-1], x, D)]))
    return build(name, tau, stages, registers)


def _heun_step(at: Level, to: Level, registers: int) -> list[Stage]:
    """Writes a step of Heun's in sigma: the mean of the eps at both ends."""
    return runge_kutta(at, [to, to], [0.0, eps_weight(at, to) / 2], eps_of, registers)


def _euler_step(at: Level, to: Level, registers: int) -> list[Stage]:
    """Writes a step of Euler's in sigma, which is DDIM's."""
    return runge_kutta(at, [to], [0.0], eps_of, registers)


def _dpm_2_step(schedule: NoiseSchedule, at: Level, to: Level, registers: int) -> list[Stage]:
    """Writes a step with the eps at the geometric mean of both sigmas: DPM-Solver-2."""
    middle = levels(schedule, schedule.time_of([(at.half_log_snr + to.half_log_snr) / 2]))[0]
    return runge_kutta(at, [middle, to], [0.0, eps_weight(at, to)], eps_of, registers)
