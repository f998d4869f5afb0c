"""Training objectives: pure functions of a batch and one random key a sample."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion.errors import InputError, nearest
from diffusion.gaussian import q_sample, velocity
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images

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
    network: Callable[[Images, Int[Array, "B"], Any], Images],
    schedule: NoiseSchedule,
    x_0: Images,
    cond: Any,
    keys: Key[Array, "B"],
    index: Int[Array, "B"],
    batch_size: int,
    prediction: str = "eps",
) -> Float[Array, "B"]:
    """DDPM's L_simple (arXiv:2006.11239, Eq. 14): squared error of the prediction at one random t a sample.

    Args:
      network: (x_t, t, cond) -> prediction, parameters bound.
      schedule: the noise schedule.
      x_0: clean images [B, H, W, C] in [-1, 1].
      cond: as the network takes it, or None.
      keys: one random key for each sample; the loss of a sample depends on its key and index, not on its batch.
      index, batch_size: see `stratified_timesteps`.
      prediction: a key of TARGETS.

    Returns:
      [B], the mean over the pixels of each image.
    """
    if prediction not in TARGETS:
        raise InputError(f"prediction is {prediction!r}; {nearest(prediction, TARGETS)}")
    uniforms = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0)))(keys)
    eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), x_0.shape[1:], x_0.dtype))(keys)
    t = stratified_timesteps(uniforms, index, batch_size, schedule.num_timesteps)
    output = network(q_sample(schedule, x_0, t, eps), t, cond)
    if output.shape != x_0.shape:
        raise InputError(f"the network returned shape {output.shape} for images of shape {x_0.shape}; they must agree")
    error = output - TARGETS[prediction](schedule, x_0, t, eps)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, x_0.ndim)))
