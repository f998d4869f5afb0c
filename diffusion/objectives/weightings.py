"""Loss weights: how much each timestep counts in the squared error, as float64 tables over the timesteps.

At a given x_t the errors of all predictions are multiples of one another (`diffusion.predictions.error_ratio`). So a
weight on the squared error of x_0 is a weight on that of any prediction, and all weightings but "simple" are the same
loss whatever the network predicts.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, nearest, require_range
from diffusion.predictions import PREDICTIONS, check_known, error_ratio, sees_end
from diffusion.schedules import NoiseSchedule

Weights = Float[np.ndarray, "T+1"]


def simple(schedule: NoiseSchedule, prediction: str) -> Weights:
    """1 on the prediction's own error (DDPM, arXiv:2006.11239, Eq. 14): another loss for each prediction."""
    return np.ones(schedule.num_timesteps + 1)


def snr(schedule: NoiseSchedule, prediction: str) -> Weights:
    """The SNR on the error of x_0: DDPM's simple loss of eps, whatever is predicted."""
    return _on_x0(schedule, prediction, _snr(schedule))


def min_snr(schedule: NoiseSchedule, prediction: str, gamma: float = 5.0) -> Weights:
    """min(SNR, gamma) on the error of x_0 (Hang et al., arXiv:2303.09556, section 3.4); gamma > 0, inf is `snr`."""
    require_range("gamma of weighting min_snr", gamma, 0, open_ends="low")
    return _on_x0(schedule, prediction, np.minimum(_snr(schedule), gamma))


def p2(schedule: NoiseSchedule, prediction: str, k: float = 1.0, gamma: float = 1.0) -> Weights:
    """1 / (k + SNR)^gamma on the error of eps (Choi et al., arXiv:2204.00227, Eq. 8); both at least 0."""
    require_range("k of weighting p2", k, 0)
    require_range("gamma of weighting p2", gamma, 0)
    return _on_x0(schedule, prediction, _snr(schedule) / (k + _snr(schedule)) ** gamma)


def sigmoid(schedule: NoiseSchedule, prediction: str, bias: float = 0.0) -> Weights:
    """The sigmoid weighting of Kingma & Gao (arXiv:2303.00848) and of SiD2 (Hoogeboom et al., arXiv:2410.19324).

    With l = log SNR it is sigmoid(bias - l) (-dl/du) on the error of eps, which is exp(bias) sigmoid(l - bias) (-dl/du)
    on that of x_0, where u = t/T. The factor -dl/du belongs to it: it makes the loss an integral over l, so that the
    schedule decides only how often a noise level is seen and not how much it counts.

    Here each timestep has the mean over its cell t - 1/2..t + 1/2 (T has the lower half), whose integral is known:
    T exp(bias) times a difference of softplus(l - bias). It is finite also where the signal is 0.

    Args:
      schedule, prediction: as in `loss_weights`.
      bias: the log SNR at which sigmoid(bias - l) is half; a lower one takes weight from low noise. The papers tune
        it to the size of the images.
    """
    if not (math.isfinite(bias) and abs(bias) <= 100):
        raise InputError(f"bias of weighting sigmoid is {bias}; it is a log SNR, in -100..100")
    num = schedule.num_timesteps
    edges = np.minimum(np.arange(num + 1) + 0.5, num)
    softplus = np.logaddexp(0.0, 2 * schedule.half_log_snr(edges) - bias)
    return _on_x0(schedule, prediction, num * np.exp(bias) * -np.diff(softplus) / np.diff(edges))


def edm(schedule: NoiseSchedule, prediction: str, sigma_data: float = 0.5) -> Weights:
    """SNR + 1 / sigma_data^2 on the error of x_0 (Karras et al., arXiv:2206.00364, Table 1, where sigma is n/a).

    With sigma_data = 0.5 that is "simple" for the prediction edm: EDM weighs the error of F itself by 1.

    Only the weight is EDM's: it also draws log(sigma) from a Gaussian, whereas timesteps here are uniform.

    Args:
      schedule, prediction: as in `loss_weights`.
      sigma_data: the standard deviation of the data, above 0.
    """
    require_range("sigma_data of weighting edm", sigma_data, 0, open_ends="low")
    return _on_x0(schedule, prediction, _snr(schedule) + 1 / sigma_data**2)


WEIGHTINGS: dict[str, Callable[..., Weights]] = {
    "simple": simple,
    "snr": snr,
    "min_snr": min_snr,
    "p2": p2,
    "sigmoid": sigmoid,
    "edm": edm,
}


def loss_weights(schedule: NoiseSchedule, prediction: str, name: str, **options: Any) -> Weights:
    """Returns what the mean squared error of a prediction is multiplied by at each timestep.

    Args:
      schedule: the noise schedule.
      prediction: what the network predicts, a key of `diffusion.predictions.PREDICTIONS`.
      name: a key of WEIGHTINGS.
      options: of that weighting.

    Returns:
      float64 [T + 1], indexed by t; entry 0 means nothing.

    Raises:
      InputError: an unknown name, an option out of its range, or a weight that is not finite: an error of eps where
        the signal is 0 says nothing about x_0.
    """
    check_known(prediction)
    if name not in WEIGHTINGS:
        raise InputError(f"weighting is {name!r}; {nearest(str(name), WEIGHTINGS)}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        weights = WEIGHTINGS[name](schedule, prediction, **options)
    bad = np.flatnonzero(~np.isfinite(weights))
    if bad.size:
        a, n = schedule.at(bad[0])
        others = " or ".join(kind for kind in PREDICTIONS if error_ratio(kind, a, n) > 0 and not sees_end(kind))
        raise InputError(
            f"weighting {name} of {prediction} errors is not finite at t = {bad[0]}, where the SNR is "
            f"{_snr(schedule)[bad[0] - 1]:.3g}; predict {others}, or use weighting simple"
        )
    return weights


def _snr(schedule):
    """Returns the SNR at 1..T."""
    return schedule.alpha_bar[1:] / schedule.noise_var[1:]


def _on_x0(schedule, prediction, weights):
    """Turns weights [T] of the squared error of x_0 into weights [T + 1] of the prediction's own."""
    ratio = error_ratio(prediction, np.sqrt(schedule.alpha_bar[1:]), np.sqrt(schedule.noise_var[1:]))
    return np.concatenate([[0.0], weights / ratio**2])
