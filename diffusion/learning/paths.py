"""Grids by dynamic programming: the S steps among given times whose costs add up to the least.

Two costs are known. `bound_costs` are the terms of the variational bound (Watson et al., arXiv:2106.03802), for which T
numbers of a trained network are enough. `path_costs` say how far a straight step strays from a teacher's path (GITS,
arXiv:2405.11326). Neither needs a gradient, and one table of costs serves every S.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion import timesteps
from diffusion.errors import InputError, is_whole, require_range
from diffusion.learning import rollout
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import unipc
from diffusion.solvers.history import from_table
from diffusion.timesteps import Tau

NUM_TIMES = 61
"""How many times a grid is chosen from, T and 0 among them."""

LATER = 1.15
"""By how much GITS multiplies the cost of a step for each step that comes before it."""

Costs = Float[np.ndarray, "M M"]
"""costs[i, j], i < j, of the step from the i-th time to the j-th; the first time is the start and the last is 0."""


def dp_bound(
    schedule: NoiseSchedule, num_steps: int, gamma: Callable[[Tau], Float[np.ndarray, "M-1"]], start: float = 1.0
) -> Tau:
    """Takes the S times of the tightest variational bound (Watson et al., arXiv:2106.03802); made for DDPM's noise.

    Args:
      schedule: the noise schedule.
      num_steps: S, at least 2, because the bound's last term begins at t = 1.
      gamma: times -> E |eps_hat|^2 / d at all of them but the last, see `analytic.estimate_gamma`.
      start: the share of T from which on the grid runs.

    Raises:
      InputError: S or start is out of range.
    """
    if not schedule.variance_preserving:
        raise InputError("tau dp_bound needs a variance-preserving schedule, as the bound's terms have no other form")
    tau = times(schedule, start)
    if num_steps == 1 and len(tau) > 2:
        raise InputError("steps is 1; tau dp_bound has at least 2, as the bound's last term begins at t = 1")
    _require_steps(num_steps, len(tau))
    return _chosen(schedule, tau, shortest(bound_costs(schedule, tau, gamma(tau)), num_steps))


def dp_path(
    schedule: NoiseSchedule,
    num_steps: int,
    path_costs: Callable[[Tau], Costs],
    start: float = 1.0,
    later: float = LATER,
) -> Tau:
    """Takes the S times at which straight steps stay nearest to a teacher's path (GITS, arXiv:2405.11326).

    Args:
      schedule: the noise schedule.
      num_steps: S.
      path_costs: times -> costs, see the function of this name.
      start: the share of T from which on the grid runs.
      later: see `shortest`; the paper takes 1.15.

    Raises:
      InputError: S, start or later is out of range.
    """
    require_range("later of tau dp_path", later, 0, open_ends="low")
    tau = times(schedule, start)
    _require_steps(num_steps, len(tau))
    return _chosen(schedule, tau, shortest(path_costs(tau), num_steps, later))


GRIDS = {"dp_bound": dp_bound, "dp_path": dp_path}
"""Grids that need what is estimated on a trained network."""


def _chosen(schedule, tau, path):
    return timesteps.explicit(schedule, tau[path])


def times(schedule: NoiseSchedule, start: float = 1.0) -> Tau:
    """Returns the times that a grid is chosen from: evenly spaced from start * T to 1, and 0."""
    require_range("start of tau", start, 0, 1, open_ends="low")
    latest = max(1.0, start * schedule.num_timesteps)
    return np.append(np.unique(np.round(np.linspace(1, latest, min(NUM_TIMES - 1, int(latest)))))[::-1], 0.0)


def shortest(costs: Costs, num_steps: int, later: float = 1.0) -> list[int]:
    """Returns the indices, num_steps + 1 of them from 0 to M - 1, of the path of least cost.

    Args:
      costs: see `Costs`; inf where a step is not allowed.
      num_steps: S.
      later: the cost of a step is multiplied by this for each step before it.

    Raises:
      InputError: there are fewer than S steps to make, or none of finite cost.
    """
    count = len(costs)
    _require_steps(num_steps, count)
    # best[j]: the least cost of so many steps from j to the end; after[k][j]: where the first of k + 1 of them goes.
    best = np.where(np.arange(count) == count - 1, 0.0, np.inf)
    after = []
    allowed = np.triu(np.ones((count, count), bool), 1)
    for _ in range(num_steps):
        total = np.where(allowed, costs + later * best[None, :], np.inf)
        after.append(np.argmin(total, axis=1))
        best = np.min(total, axis=1)
    if not np.isfinite(best[0]):
        raise InputError(f"no grid of {num_steps} steps has a finite cost")
    path = [0]
    for choice in reversed(after):
        path.append(int(choice[path[-1]]))
    return path


def _require_steps(num_steps, count):
    if not is_whole(num_steps) or not 1 <= num_steps < count:
        raise InputError(f"steps is {num_steps}; a grid by dynamic programming has 1..{count - 1} steps here")


def bound_costs(schedule: NoiseSchedule, tau: Tau, gamma: Float[np.ndarray, "M-1"]) -> Costs:
    """Returns what each step adds to the variational bound in nats per dimension, with the variance beta_tilde.

    L(t -> s) = (SNR_s - SNR_t) E |x_0 - D(x_t)|^2 / (2 d), where the squared error is (n / a)^2 (1 - gamma) for the
    mean that a trained network predicts. The bound's last term begins at t = 1, so only that time leads to 0.

    Args:
      schedule: the noise schedule.
      tau: the times, which end with 1 and 0.
      gamma: E |eps_hat|^2 / d at all times but 0, as `analytic.estimate_gamma` returns it.
    """
    signal, noise = schedule.powers(tau[:-1])
    error = noise / np.maximum(signal, 1e-300) * np.clip(1 - gamma, 0, None)
    snr = signal / noise
    costs = np.full((len(tau), len(tau)), np.inf)
    costs[:-1, :-1] = 0.5 * np.maximum(snr[None, :] - snr[:, None], 0) * np.minimum(error, 1.0)[:, None]
    costs[-2, -1] = 0.0
    return costs


def path_costs(asked: rollout.Asked, schedule: NoiseSchedule, tau: Tau, noises: rollout.Noises) -> Costs:
    """Returns the root mean square distance of one DDIM step from a teacher's path, UniPC on all the times.

    Args:
      asked: the network.
      schedule: its noise schedule.
      tau: the times.
      noises: where the paths begin.
    """
    path, estimates = rollout.path(asked, from_table(unipc(schedule, tau, order=3)), noises)
    path = jnp.stack(path)
    signal, noise = schedule.at(tau)
    costs = np.full((len(tau), len(tau)), np.inf)
    for i in range(len(tau) - 1):
        keep = noise[i + 1 :] / noise[i]
        columns = np.asarray([keep, signal[i + 1 :] - keep * signal[i]], np.float32)
        costs[i, i + 1 :] = _distances(path[i], estimates[i], path[i + 1 :], columns)
    return costs


def _distances(x, estimate, targets, columns):
    """Returns how far the DDIM steps from x land from the targets."""
    landed = jnp.tensordot(columns.T, jnp.stack([x, estimate]), axes=1)
    return np.asarray(jnp.sqrt(jnp.mean(jnp.square(landed - targets), axis=tuple(range(1, targets.ndim)))))
