"""What `diffusion.models.unet2d` makes of times and noise levels: features, embeddings, and a consistency boundary."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from diffusion.models.layers import INIT, Dense
from diffusion.predictions import SIGMA_DATA


class TimeEmbedding(nn.Module):
    """A perceptron from features [B, F] of a number to its embedding [B, width]."""

    width: int
    dtype: Any
    act: Callable = nn.silu

    @nn.compact
    def __call__(self, features):
        h = Dense(self.width, dtype=self.dtype, kernel_init=INIT, name="linear_1")(features)
        return Dense(self.width, dtype=self.dtype, kernel_init=INIT, name="linear_2")(self.act(h))


def with_boundary(
    out: Float[Array, "B H W C"], x: Float[Array, "B H W C"], t: Float[Array, "B"], sigma_min: float
) -> Float[Array, "B H W C"]:
    """Returns EDM's F for the estimate that a consistency model makes of its own output (arXiv:2303.01469, appendix C).

    Args:
      out: the output F'.
      x: the input, which EDM's preconditioning has scaled.
      t: log(sigma) / 4.
      sigma_min: where the estimate is the input itself.
    """
    sigma = jnp.exp(4 * t.astype(jnp.float32))[:, None, None, None]
    power = sigma**2 + SIGMA_DATA**2
    skip = SIGMA_DATA**2 * (1 / ((sigma - sigma_min) ** 2 + SIGMA_DATA**2) - 1 / power)
    return (1 - sigma_min / sigma) * out + skip * power / (SIGMA_DATA * sigma) * x.astype(jnp.float32)


def positional_features(
    numbers: Float[Array, "B"], dim: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "B dim"]:
    """Returns sines and cosines at dim // 2 frequencies from 1 down, in float32; an odd dim ends in a zero.

    Args:
      numbers: timesteps from 0 on.
      dim: width of the result.
      flip_sin_to_cos: whether cosines come first.
      freq_shift: 1 makes the lowest frequency 1e-4, 0 leaves it above.
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = numbers.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1), ((0, 0), (0, dim % 2)))


def fourier_features(numbers: Float[Array, "B"], weight: Float[Array, "C"]) -> Float[Array, "B 2*C"]:
    """Returns sines and cosines of the log of positive numbers, at frequencies that are parameters (score-SDE)."""
    angles = jnp.log(numbers.astype(jnp.float32))[:, None] * weight[None, :] * 2 * jnp.pi
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
