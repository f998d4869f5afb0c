"""The terms of DDPM's variational bound, one for each reverse step over all timesteps or a subsequence.

-log p(x_0) <= L_T + sum of the terms of the steps (DDPM, arXiv:2006.11239, Eq. 5). The term of a step t -> s is the
divergence of the model's p(x_s | x_t) from the posterior q(x_s | x_t, x_0); that of the last step, which ends at data,
is the negative log-likelihood of 8-bit pixels. Both Gaussians share the mean's coefficient of x_t, so their means
differ by that of x_0 times the error of the denoised estimate.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Bool, Float

from diffusion import predictions
from diffusion.images import HALF_BIN
from diffusion.predictions import Reading
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import ddpm
from diffusion.types import Images


class BoundSteps(NamedTuple):
    """The steps of a grid, each entry [S] in the grid's order, or those of one step or one for each sample.

    Attributes:
      reading: how the network is asked and read where each step starts.
      from_x0: the coefficient of x_0 in the mean of q(x_s | x_t, x_0).
      log_small, log_large: logs of beta_tilde and beta, as in `ddpm`: beta_tilde of the last step is that of the step
        before it (with one step, beta).
    """

    reading: Reading
    from_x0: Float[np.ndarray, "S"]
    log_small: Float[np.ndarray, "S"]
    log_large: Float[np.ndarray, "S"]


def bound_steps(schedule: NoiseSchedule, tau, prediction: str) -> BoundSteps:
    """Returns the steps of a grid in float64, taken from the table that samples with a learned variance.

    Raises:
      InputError: tau is not a grid of the schedule, or starts where the prediction says nothing about x_0.
    """
    table = ddpm(schedule, tau, "learned")
    predictions.check_signal(table.name, prediction, table.t, table.signal, table.noise)
    reading = predictions.reading(prediction, table.t, table.signal, table.noise)
    return BoundSteps(reading, table.update[:, 0, 1], *table.log_variance.T)


def step_bits(
    step: BoundSteps, x_0: Images, x0_hat: Images, log_variance: Images, last: Bool[Array, "..."]
) -> Float[Array, "B"]:
    """Returns the term of one step in bits per dimension: Eq. 5 of DDPM, L_{t-1}, or L_0 where the step is the last.

    Args:
      step: entries that broadcast to x_0.
      x_0: 8-bit images in [-1, 1], [B, *shape].
      x0_hat: the denoised estimate at the start of the step.
      log_variance: of the model's step.
      last: whether the step ends at data; broadcasts to x_0.
    """
    excess = step.log_small - log_variance
    shift = step.from_x0 * (x0_hat - x_0)
    # expm1: the two variances nearly agree in most steps.
    divergence = 0.5 * (jnp.expm1(excess) - excess + jnp.square(shift) * jnp.exp(-log_variance))
    # Far from the end x0_hat is so wrong that the derivative of its log-likelihood overflows, and 0 * inf is NaN: what
    # is not used is computed at x_0 itself.
    log_likelihood = discretized_log_likelihood(x_0, jnp.where(last, x0_hat, x_0), log_variance)
    return mean_bits(jnp.where(last, -log_likelihood, divergence))


def mean_bits(nats: Images) -> Float[Array, "B"]:
    """Returns the mean over the dimensions of each sample, in bits."""
    return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / np.log(2)


def discretized_log_likelihood(x_0: Images, mean: Images, log_variance: Images) -> Images:
    """Returns the log-probability that a Gaussian gives to the bin of each 8-bit pixel (DDPM, Eq. 13).

    Bins are 2/255 wide; the first and the last have no outer end, so that all 256 add up to 1. Differences of the
    distribution function are taken between logs and in the lower tail, where nothing cancels: a pixel a hundred
    standard deviations away has its finite log-probability.

    Args:
      x_0: images in [-1, 1] whose pixels are whole multiples of 1/255 less 1.
      mean, log_variance: of the Gaussian, in pixel units.

    Returns:
      In nats, in x_0's shape.
    """
    inverse_std = jnp.exp(-0.5 * log_variance)
    low, high = ((x_0 - mean + side) * inverse_std for side in (-HALF_BIN, HALF_BIN))
    upper_tail = low + high > 0
    low, high = jnp.where(upper_tail, -high, low), jnp.where(upper_tail, -low, high)
    # log_ndtr takes long to compile, so one call serves all three.
    log_high, log_low, log_rest = log_ndtr(jnp.stack(jnp.broadcast_arrays(high, low, -low)))
    inside = log_high + _log1m_exp(log_low - log_high)
    first, final = jnp.where(upper_tail, log_rest, log_high), jnp.where(upper_tail, log_high, log_rest)
    return jnp.where(x_0 < -1 + HALF_BIN, first, jnp.where(x_0 > 1 - HALF_BIN, final, inside))


def _log1m_exp(x):
    """Returns log(1 - exp(x)) for x < 0 without cancellation at either end."""
    near = x > -np.log(2)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
