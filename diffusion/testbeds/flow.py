"""Solves the probability flow exactly, which is what a solver tends to with more and more steps."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Float
from scipy.integrate import solve_ivp

from diffusion import predictions
from diffusion.denoiser import denoise
from diffusion.errors import InputError, require_range
from diffusion.schedules import NoiseSchedule
from diffusion.testbeds.denoisers import moments
from diffusion.types import ApplyFn, Images, Params

_LAST_RATIO = 1e-6
"""The ratio noise / signal below which `ode_solution` takes the denoised estimate for x_0."""


def gaussian_flow(
    schedule: NoiseSchedule, mean, variance, x: Images, t_start: float, t_end: float = 0.0
) -> Float[np.ndarray, "B *shape"]:
    """Returns x carried from t_start to t_end by the exact probability flow of Gaussian data, an affine map of x.

    x_s = a_s m + sqrt((a_s^2 v + n_s^2) / (a_t^2 v + n_t^2)) (x_t - a_t m): a pixel stays as many standard deviations
    away from its mean.

    Args:
      schedule, mean, variance: as for `gaussian`.
      x: [B, *shape] at t_start.
      t_start, t_end: real times in 0..T, in any order.

    Returns:
      x at t_end, float64.
    """
    mean, variance = moments(mean, variance)
    (a, a_end), (n, n_end) = schedule.at([t_start, t_end])
    spread = np.sqrt((a_end**2 * variance + n_end**2) / (a**2 * variance + n**2))
    return a_end * mean + spread * (np.asarray(x, np.float64) - a * mean)


def ode_solution(
    apply_fn: ApplyFn,
    params: Params,
    schedule: NoiseSchedule,
    x: Images,
    t_start: float,
    t_end: float = 0.0,
    *,
    prediction: str = "eps",
    tolerance: float = 1e-8,
) -> Float[np.ndarray, "B *shape"]:
    """Follows the probability flow from x, by an adaptive Runge-Kutta method of order 8 in float64 (SciPy's DOP853).

    Solves d(x / a) / d log(n / a) = x / a - D (Song et al., arXiv:2011.13456, Eq. 13, in the variable of EDM,
    arXiv:2206.00364) on the host, for testbeds and for networks of any kind; a network's own arithmetic limits the
    accuracy. From n / a = 1e-6 to t = 0, D is taken as the solution: an error of 1e-12 / (2 v) for data of variance v.

    Args:
      apply_fn, params, prediction: the network, as for `diffusion.sample`.
      schedule: the noise schedule.
      x: [B, *shape] at t_start.
      t_start, t_end: real times, T >= t_start > t_end >= 0.
      tolerance: error allowed in x / a at each step, relative and absolute, as a root mean square over all samples. The
        total error of a well-posed flow has this order (tested against closed forms); near the border between the
        basins of two images it grows.

    Returns:
      x at t_end, float64.

    Raises:
      InputError: the prediction is unknown, the tolerance out of range, the times are out of order, or the signal at
        t_start is zero.
      ArithmeticError: the network returned values that are not finite, or steps became too small.
    """
    predictions.check_known(prediction)
    require_range("tolerance", tolerance, 1e-13, 0.1)
    if not 0 <= t_end < t_start <= schedule.num_timesteps:
        raise InputError(f"t_start is {t_start}, t_end {t_end}; need {schedule.num_timesteps} >= t_start > t_end >= 0")
    first, last = schedule.half_log_snr([t_start, t_end])
    if np.isinf(first):
        raise InputError(f"the signal is zero at t = {t_start}, where x / a is not finite; start lower")

    # Integrate y = x / a over log(n / a), from the start to t_end or to where the denoised estimate takes over.
    shape, ends = np.shape(x), (-first, max(-last, min(np.log(_LAST_RATIO), -first)))
    with jax.enable_x64(True):

        def x0_hat(log_ratio, y):
            t = schedule.time_of(-log_ratio)
            a, n = schedule.at(t)
            reading = predictions.reading(prediction, t, a, n)
            return np.asarray(_denoised(apply_fn, params, a * y.reshape(shape), reading)).ravel()

        y = np.asarray(x, np.float64).ravel() / schedule.at(t_start)[0]
        if ends[1] < ends[0]:
            solution = solve_ivp(
                lambda s, y: y - x0_hat(s, y), ends, y, method="DOP853", rtol=tolerance, atol=tolerance, t_eval=ends[1:]
            )
            if not solution.success or not np.all(np.isfinite(solution.y)):
                raise ArithmeticError(f"the probability flow could not be solved: {solution.message}")
            y = solution.y[:, -1]
        y = x0_hat(ends[1], y) if t_end == 0 else y
    return schedule.at(t_end)[0] * y.reshape(shape)


@partial(jax.jit, static_argnames="apply_fn")
def _denoised(apply_fn, params, x, reading):
    return denoise(partial(apply_fn, params), x, None, reading).x0
