"""Training objectives: pure functions of a batch, with one loss for each sample.

An objective is a function of one `Batch` once its schedule, prediction and loss weights are bound. It draws one
timestep and one eps for each sample; what it returns for a sample depends on the sample's own key and index, never on
the batch around it. Objectives are fit for jit, grad, lax.scan and shard_map.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion import keys, predictions
from diffusion.denoiser import Network, log_variance_between, split_variance
from diffusion.errors import InputError
from diffusion.gaussian import signal_noise
from diffusion.objectives.bound import bound_steps, step_bits
from diffusion.objectives.weightings import Weights
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images


class Batch(NamedTuple):
    """Everything an objective is computed from.

    Attributes:
      network: the network with the parameters being trained, (x, time, cond) -> output.
      x_0: clean samples [B, *shape] in the model's space, [-1, 1] for pixels.
      cond: as the network takes it, or None.
      keys: one random key for each sample. fold_in 0 makes its timestep, 1 its eps; higher numbers are free for the
        caller.
      index: the position of each sample in the whole batch.
      size: of the whole batch, over all devices and microbatches.
      average: the network with the first EMA of the parameters, the usual target of consistency training; None where
        there is no EMA.
      teacher: the network that a student learns from; None for any other run.
      frozen: what `make_train_step` was given as frozen, such as the parameters of a network of features; never
        trained.
      step: the number of training steps made before this one.
      params: the parameters being trained, for an objective that asks more of them than `network` does.
    """

    network: Network
    x_0: Images
    cond: Any
    keys: Key[Array, "B"]
    index: Int[Array, "B"]
    size: int
    average: Network | None = None
    teacher: Network | None = None
    frozen: Any = None
    step: Int[Array, ""] | int = 0
    params: Any = None


class Loss(NamedTuple):
    """What an objective returns, with one entry for each sample.

    Attributes:
      value: what training averages and differentiates.
      t: the timestep drawn, in 1..T.
      error: mean squared error of the prediction itself, without a weight, for curves over t.
    """

    value: Float[Array, "B"]
    t: Int[Array, "B"]
    error: Float[Array, "B"]


class Terms(NamedTuple):
    """What an objective without timesteps returns, with one entry for each sample.

    Attributes:
      value: what training averages and differentiates.
      curves: what it consists of, or anything else whose mean over the samples is logged, by name.
    """

    value: Float[Array, "B"]
    curves: dict[str, Float[Array, "B"] | Float[Array, ""]]


def stratified_timesteps(
    uniforms: Float[Array, "B"], index: Int[Array, "B"], batch_size: int, num_timesteps: int | Int[Array, ""]
) -> Int[Array, "B"]:
    """Draws one timestep from each of batch_size equal parts of 1..T: each is uniform over 1..T, their spread is even.

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
    share = (jnp.asarray(index, uniforms.dtype) + uniforms) / batch_size
    # Rounding can make share 1.0 for the last sample of a large batch.
    return jnp.minimum(jnp.floor(share * num_timesteps).astype(int), num_timesteps - 1) + 1


def draw_noise(batch: Batch) -> Images:
    """Draws the eps of each sample, from its own key."""
    x_0 = batch.x_0
    return jax.vmap(lambda k: keys.normal(jax.random.fold_in(k, 1), x_0.shape[1:], x_0.dtype))(batch.keys)


def simple_loss(batch: Batch, schedule: NoiseSchedule, prediction: str = "eps", weights: Weights | None = None) -> Loss:
    """Returns DDPM's L_simple: the squared error of the prediction at one random t a sample, weighted.

    DDPM, arXiv:2006.11239, Eq. 14.

    Args:
      batch: see `Batch`.
      schedule: the noise schedule.
      prediction: what the network predicts, a key of `diffusion.predictions.PREDICTIONS`.
      weights: multiplies the squared error at each timestep (`weightings.loss_weights`); None is 1.

    Raises:
      InputError: an unknown prediction, or a network that also predicts a variance.
    """
    drawn = _evaluate(batch, schedule, prediction)
    if drawn.share is not None:
        raise InputError("the network predicts a variance, which objective simple leaves untrained; use hybrid or vlb")
    return Loss(_weighted(drawn, weights), drawn.t, drawn.error)


def hybrid_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str = "eps",
    weights: Weights | None = None,
    vlb_weight: float = 0.001,
) -> Loss:
    """Returns L_simple + vlb_weight L_vlb, which learns the variance as well (improved DDPM, arXiv:2102.09672, Eq. 16).

    L_vlb reaches only the variance: the prediction is detached there. Its sum over timesteps is estimated by T times
    the term drawn, in bits per dimension; with the paper's 0.001 that is the T / 1000 of the authors' code.

    Args:
      batch: its network returns 2 C channels, the prediction and then where its log-variance lies between those of
        beta_tilde (-1) and beta (1), see `denoiser.log_variance_between`. Its x_0 are 8-bit images.
      schedule: the noise schedule; its arrays are concrete, not traced.
      prediction: as for `simple_loss`.
      weights: of L_simple.
      vlb_weight: the paper's lambda.

    Raises:
      InputError: an unknown prediction, one that says nothing about x_0 at T, or a network without a variance.
    """
    drawn = _evaluate(batch, schedule, prediction)
    bound = _bound(schedule, batch.x_0, drawn, jax.lax.stop_gradient(drawn.output), prediction)
    return Loss(_weighted(drawn, weights) + vlb_weight * bound, drawn.t, drawn.error)


def vlb_loss(batch: Batch, schedule: NoiseSchedule, prediction: str = "eps", weights: None = None) -> Loss:
    """Returns L_vlb of the training process in bits per dimension, of mean and variance (improved DDPM, Eq. 4-7).

    It is T times the term at the t drawn, so that its mean over t estimates the sum: L_0, the negative log-likelihood
    of 8-bit pixels, at t = 1, and L_{t-1}, a divergence of Gaussians, above. L_T has no parameters and is left out.

    Arguments are as for `hybrid_loss`, except that there are no weights: the bound has its own.
    """
    if weights is not None:
        raise InputError("objective vlb weights timesteps as the bound does; use weighting simple")
    drawn = _evaluate(batch, schedule, prediction)
    return Loss(_bound(schedule, batch.x_0, drawn, drawn.output, prediction), drawn.t, drawn.error)


OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "simple": simple_loss,
    "hybrid": hybrid_loss,
    "vlb": vlb_loss,
}
"""Functions (batch, schedule, prediction, weights, options) -> Loss."""

LEARN_VARIANCE = ("hybrid", "vlb")
"""The objectives for which the network returns twice the channels of its images."""


class _Evaluation(NamedTuple):
    """The network's answer for one noisy version of each sample."""

    t: Int[Array, "B"]
    x_t: Images
    output: Images
    share: Images | None
    error: Float[Array, "B"]


def _evaluate(batch, schedule, prediction):
    """Draws t and eps and asks the network."""
    predictions.check_known(prediction)
    if predictions.sees_end(prediction):
        raise InputError(
            f"prediction {prediction} is learned by the objectives mean_flow and mean_flow_distillation only"
        )
    x_0 = batch.x_0
    uniforms = jax.vmap(lambda k: keys.uniform(jax.random.fold_in(k, 0)))(batch.keys)
    eps = draw_noise(batch)
    t = stratified_timesteps(uniforms, batch.index, batch.size, schedule.num_timesteps)
    a, n = signal_noise(schedule, t, x_0)
    x_t = a * x_0 + n * eps
    output, share = split_variance(batch.network(*predictions.inputs(prediction, t, a, n, x_t), batch.cond), x_0.shape)
    error = jnp.square(output - predictions.target(prediction, a, n, x_0, eps))
    return _Evaluation(t, x_t, output, share, jnp.mean(error, axis=tuple(range(1, x_0.ndim))))


def _weighted(drawn, weights):
    return drawn.error if weights is None else jnp.asarray(weights, drawn.error.dtype)[drawn.t] * drawn.error


def _bound(schedule, x_0, drawn, output, prediction):
    """Returns T times the bound's term at each sample's t, in bits per dimension."""
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
