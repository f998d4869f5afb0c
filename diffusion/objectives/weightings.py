"""How much each timestep counts in the squared error: float64 tables over the timesteps.

At a given x_t the errors of all predictions are multiples of one another: that of eps is a/n times that of x_0, of v
(a^2 + n^2)/n, of flow (a + n)/n. So a weight on the squared error of x_0 is one on that of any prediction, and all
weightings but "simple" are the same loss whatever the network predicts.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, nearest, require_range
from diffusion.schedules import NoiseSchedule

Weights = Float[np.ndarray, "T+1"]

PER_X0_ERROR: dict[str, Callable] = {
    "eps": lambda a, n: a / n,
    "x0": lambda a, n: np.ones_like(a),
    "v": lambda a, n: (a**2 + n**2) / n,
    "flow": lambda a, n: (a + n) / n,
}
"""The error of a prediction over that of the x_0 it stands for, at a fixed x_t with signal a and noise n > 0."""


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
    """What the mean squared error of a prediction is multiplied by at each timestep.

    Args:
      schedule: the noise schedule.
      prediction: what the network predicts, a key of PER_X0_ERROR.
      name: a key of WEIGHTINGS.
      options: of that weighting.

    Returns:
      float64 [T + 1], indexed by t; entry 0 means nothing.

    Raises:
      InputError: an unknown name, an option out of its range, or a weight that is not finite: an error of eps where
        the signal is 0 says nothing about x_0.
    """
    for what, value, known in (("weighting", name, WEIGHTINGS), ("prediction", prediction, PER_X0_ERROR)):
        if value not in known:
            raise InputError(f"{what} is {value!r}; {nearest(str(value), known)}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        weights = WEIGHTINGS[name](schedule, prediction, **options)
    bad = np.flatnonzero(~np.isfinite(weights))
    if bad.size:
        raise InputError(
            f"weighting {name} of {prediction} errors is not finite at t = {bad[0]}, where the SNR is "
            f"{_snr(schedule)[bad[0] - 1]:.3g}; predict v, x0 or flow, or use weighting simple"
        )
    return weights


def _snr(schedule):
    """SNR at 1..T."""
    return schedule.alpha_bar[1:] / schedule.noise_var[1:]


def _on_x0(schedule, prediction, weights):
    """Weights [T] of the squared error of x_0 as those of the prediction's own, [T + 1]."""
    ratio = PER_X0_ERROR[prediction](np.sqrt(schedule.alpha_bar[1:]), np.sqrt(schedule.noise_var[1:]))
    return np.concatenate([[0.0], weights / ratio**2])
