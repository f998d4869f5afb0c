"""Makes starts for sampling from images and noises that are already there: image-to-image, and interpolation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion import keys
from diffusion.errors import InputError
from diffusion.images import check_floats
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images


def noised(
    schedule: NoiseSchedule, images: Images, t: float, key: jax.Array, sample_ids: Int[Array, "B"] | None = None
) -> Images:
    """Returns x_t of given images, from which image-to-image starts (SDEdit, arXiv:2108.01073).

    Sample with a grid that starts at t itself, or the noise and the sampler do not fit, and every sample is off.
    `timesteps.below` makes one of any grid:

        tau = timesteps.below(schedule, timesteps.uniform(schedule, 25), 630)
        x_init = noised(schedule, images, tau[0], key)
        sample(apply_fn, params, solvers.ddim(schedule, tau), key, len(images), images.shape[1:], x_init=x_init)

    Args:
      schedule: the noise schedule.
      images: [B, H, W, C] in [-1, 1].
      t: a real time in 0..T.
      key: a JAX random key; image i gets the noise from which `sample` would start sample sample_ids[i].
      sample_ids: one for each image; 0..B-1 if not given.
    """
    check_floats("images", images)
    signal, noise = schedule.at(t)
    ids = jnp.arange(len(images)) if sample_ids is None else jnp.asarray(sample_ids)
    eps = start_noise(key, ids, images.shape[1:], images.dtype)
    return jnp.asarray(signal, images.dtype) * images + jnp.asarray(noise, images.dtype) * eps


def start_noise(
    key: jax.Array, sample_ids: Int[Array, "B"], sample_shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Images:
    """Returns the noise of standard deviation 1 that `diffusion.sample` starts from, to be made into an `x_init`.

    `sample` multiplies it by (signal^2 + noise^2)^(1/2) of its table's first level, which is 1 on most schedules.

    Args:
      key: the JAX random key of `sample`.
      sample_ids: the numbers of the samples.
      sample_shape: the shape of one.
      dtype: of the noise.
    """
    key = keys.threefry(key)
    of_samples = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(sample_ids)
    return jax.vmap(lambda k: keys.normal(k, sample_shape, dtype))(of_samples)


def slerp(a: Images, b: Images, weight: float | Float[Array, "B"]) -> Images:
    """Interpolates noises along an arc, sample by sample: a at weight 0, b at 1 (DDIM, arXiv:2010.02502, Eq. 67).

    A straight line between two independent noises passes points of too small a norm; the arc does not. Where the two
    are equal or opposite, or one is 0, the straight line is taken. Values and gradients are finite everywhere.

    Args:
      a, b: [B, *shape].
      weight: in 0..1, one number or one for each sample.

    Raises:
      InputError: a and b differ in shape.
    """
    if a.shape != b.shape:
        raise InputError(f"slerp got shapes {a.shape} and {b.shape}; they must agree")
    check_floats("a", a, noisy=True)
    check_floats("b", b, noisy=True)
    axes = tuple(range(1, a.ndim))

    def dot(u, v):
        return jnp.sum(u * v, axis=axes, keepdims=True)

    weight = jnp.broadcast_to(jnp.asarray(weight, a.dtype), a.shape[:1]).reshape(-1, *[1] * len(axes))
    product = dot(a, a) * dot(b, b)
    cosine = jnp.clip(dot(a, b) / jnp.sqrt(jnp.where(product > 0, product, 1)), -1, 1)
    # The square of a small angle, and where the arc's formula is 0/0: at equal, opposite or zero ends. There `safe`
    # keeps it and its derivatives finite, and for small angles the first terms of its series replace it.
    squared = 2 * (1 - cosine)
    near, no_arc = squared < jnp.finfo(a.dtype).eps ** 0.5, (1 + cosine < 1e-12) | (product == 0)
    safe = jnp.arccos(jnp.where(near | no_arc, 0.0, cosine))

    def beyond_line(share):
        """Returns by how much an end weighs more on the arc than its share on the straight line."""
        series = share * (1 - share**2) * squared / 6
        arc = jnp.sin(share * safe) / jnp.sin(safe) - share
        return jnp.where(no_arc, 0.0, jnp.where(near, series, arc))

    return a + weight * (b - a) + beyond_line(1 - weight) * a + beyond_line(weight) * b
