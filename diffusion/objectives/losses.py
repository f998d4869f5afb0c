"""Training objectives: pure functions of a batch and one random key a sample.

An objective is called as (network, schedule, x_0, cond, keys, index, batch_size, *, prediction, weights, ...) and
returns a Loss. All draw one timestep and one eps for each sample; what they return for it depends on its own key and
index, never on the batch around it. They are fit for jit, grad, lax.scan and shard_map.

Args of all:
  network: (x_t, t, cond) -> output, parameters bound.
  schedule: the noise schedule; its arrays concrete, not traced, where the variance is learned.
  x_0: clean images [B, H, W, C] in [-1, 1].
  cond: as the network takes it, or None.
  keys: one random key for each sample. fold_in 0 makes its timestep, 1 its eps; higher numbers are free for the caller.
  index, batch_size: see `stratified_timesteps`.
  prediction: what the network predicts, a key of TARGETS.
  weights: [T + 1], multiplies the squared error at each timestep (see `weightings.loss_weights`); None is 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion.denoiser import log_variance_between, split_variance
from diffusion.errors import InputError, nearest
from diffusion.gaussian import q_sample, velocity
from diffusion.objectives.bound import bound_steps, step_bits
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images

Network = Callable[[Images, Int[Array, "B"], Any], Images]


class Loss(NamedTuple):
    """One entry for each sample.

    Attributes:
      value: what training averages and differentiates.
      t: the timestep drawn, in 1..T.
      error: mean squared error of the prediction itself, without weight, for curves over t.
    """

    value: Float[Array, "B"]
    t: Int[Array, "B"]
    error: Float[Array, "B"]


TARGETS = {
    "eps": lambda schedule, x_0, t, eps: eps,
    "x0": lambda schedule, x_0, t, eps: x_0,
    "v": velocity,
    "flow": lambda schedule, x_0, t, eps: eps - x_0,
}
"""What the network learns to predict, from x_0, t and eps."""


def stratified_timesteps(uniforms: Float[Array, "B"], index: Int[Array, "B"], batch_size: int, num_timesteps: int):
    """One timestep from each of batch_size equal parts of 1..T: each is uniform over 1..T, their spread is even.

    Low-discrepancy times lower the variance of the loss and its gradient at no cost (Kingma et al., arXiv:2107.00630,
    appendix I.1).

    Args:
      uniforms: in [0, 1), one for each sample.
      index: position of each sample in the whole batch, 0..batch_size - 1.
      batch_size: of the whole batch, over all devices.
      num_timesteps: T.

    Returns:
      int [B] in 1..T.
    """
    share = (index + uniforms) / batch_size
    # Rounding can make share 1.0 for the last sample of a large batch.
    return jnp.minimum(jnp.floor(share * num_timesteps).astype(int), num_timesteps - 1) + 1


def simple_loss(
    network: Network,
    schedule: NoiseSchedule,
    x_0: Images,
    cond: Any,
    keys: Key[Array, "B"],
    index: Int[Array, "B"],
    batch_size: int,
    *,
    prediction: str = "eps",
    weights: Float[np.ndarray, "T+1"] | None = None,
) -> Loss:
    """DDPM's L_simple (arXiv:2006.11239, Eq. 14): squared error of the prediction at one random t a sample, weighted.

    Arguments as the module says.
    """
    drawn = _evaluate(network, schedule, x_0, cond, keys, index, batch_size, prediction)
    if drawn.share is not None:
        raise InputError("the network predicts a variance, which objective simple leaves untrained; use hybrid or vlb")
    return Loss(_weighted(drawn, weights), drawn.t, drawn.error)


def hybrid_loss(
    network: Network,
    schedule: NoiseSchedule,
    x_0: Images,
    cond: Any,
    keys: Key[Array, "B"],
    index: Int[Array, "B"],
    batch_size: int,
    *,
    prediction: str = "eps",
    weights: Float[np.ndarray, "T+1"] | None = None,
    vlb_weight: float = 0.001,
) -> Loss:
    """L_simple + vlb_weight L_vlb (improved DDPM, arXiv:2102.09672, Eq. 16), which learns the variance besides.

    L_vlb reaches the variance alone: the prediction is detached there. Its sum over timesteps is estimated by T times
    the term drawn, in bits per dimension; with the paper's 0.001 that is the T / 1000 of the authors' code.

    The other arguments are as the module says.

    Args:
      network: returns 2 C channels, the prediction and then where its log-variance lies between those of beta_tilde
        (-1) and beta (1), see `denoiser.log_variance_between`.
      x_0: 8-bit images.
      weights: of L_simple.
      vlb_weight: the paper's lambda.
    """
    drawn = _evaluate(network, schedule, x_0, cond, keys, index, batch_size, prediction)
    bound = _bound(schedule, x_0, drawn, jax.lax.stop_gradient(drawn.output), prediction)
    return Loss(_weighted(drawn, weights) + vlb_weight * bound, drawn.t, drawn.error)


def vlb_loss(
    network: Network,
    schedule: NoiseSchedule,
    x_0: Images,
    cond: Any,
    keys: Key[Array, "B"],
    index: Int[Array, "B"],
    batch_size: int,
    *,
    prediction: str = "eps",
    weights: None = None,
) -> Loss:
    """L_vlb of the training process in bits per dimension (improved DDPM, Eq. 4-7), of mean and variance.

    T times the term at the t drawn, so that its mean over t estimates the sum: L_0, the negative log-likelihood of
    8-bit pixels, at t = 1, and L_{t-1}, a divergence of Gaussians, above. L_T has no parameters and is left out.

    Arguments as for `hybrid_loss`, but that the bound has its own weights.
    """
    if weights is not None:
        raise InputError("objective vlb weights timesteps as the bound does; use config.train.weighting=simple")
    drawn = _evaluate(network, schedule, x_0, cond, keys, index, batch_size, prediction)
    return Loss(_bound(schedule, x_0, drawn, drawn.output, prediction), drawn.t, drawn.error)


OBJECTIVES: dict[str, Callable[..., Loss]] = {"simple": simple_loss, "hybrid": hybrid_loss, "vlb": vlb_loss}

LEARN_VARIANCE = ("hybrid", "vlb")
"""The objectives for which the network returns twice the channels of its images."""


class _Evaluation(NamedTuple):
    """The network's answer for one noisy version of each sample."""

    t: Int[Array, "B"]
    x_t: Images
    output: Images
    share: Images | None
    error: Float[Array, "B"]


def _evaluate(network, schedule, x_0, cond, keys, index, batch_size, prediction):
    """Draws t and eps and asks the network."""
    if prediction not in TARGETS:
        raise InputError(f"prediction is {prediction!r}; {nearest(prediction, TARGETS)}")
    uniforms = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0)))(keys)
    eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), x_0.shape[1:], x_0.dtype))(keys)
    t = stratified_timesteps(uniforms, index, batch_size, schedule.num_timesteps)
    x_t = q_sample(schedule, x_0, t, eps)
    output, share = split_variance(network(x_t, t, cond), x_0.shape)
    error = jnp.square(output - TARGETS[prediction](schedule, x_0, t, eps))
    return _Evaluation(t, x_t, output, share, jnp.mean(error, axis=tuple(range(1, x_0.ndim))))


def _weighted(drawn, weights):
    return drawn.error if weights is None else jnp.asarray(weights, drawn.error.dtype)[drawn.t] * drawn.error


def _bound(schedule, x_0, drawn, output, prediction):
    """T times the bound's term at each sample's t, in bits per dimension."""
    if drawn.share is None:
        raise InputError(
            f"the network returned {output.shape[-1]} channels; to learn the variance it needs twice the images' "
            f"{x_0.shape[-1]}"
        )
    num = schedule.num_timesteps
    steps = bound_steps(schedule, np.arange(num, -1, -1), prediction)

    def per_pixel(values):
        return values.reshape(-1, *[1] * (x_0.ndim - 1))

    step = jax.tree.map(lambda values: per_pixel(jnp.asarray(values, x_0.dtype)[num - drawn.t]), steps)
    x0_hat = step.reading.from_x * drawn.x_t + step.reading.from_output * output
    log_variance = log_variance_between(drawn.share, step.log_small, step.log_large)
    return num * step_bits(step, x_0, x0_hat, log_variance, last=per_pixel(drawn.t == 1))
