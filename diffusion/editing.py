"""Makes starts for sampling from images and noises that are already there: image-to-image, and interpolation."""

import math

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

    Sample with a grid that starts at t, such as `timesteps.below(schedule, tau, t)`:

        tau = timesteps.below(schedule, timesteps.uniform(schedule, 25), 600)
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
    key = keys.threefry(key)
    of_images = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(ids)
    eps = jax.vmap(lambda k: keys.normal(k, images.shape[1:], images.dtype))(of_images)
    return jnp.asarray(signal, images.dtype) * images + jnp.asarray(noise, images.dtype) * eps


def slerp(a: Images, b: Images, weight: float | Float[Array, "B"]) -> Images:
    """Interpolates noises along an arc, sample by sample: a at weight 0, b at 1 (DDIM, arXiv:2010.02502, Eq. 67).

    A straight line between two independent noises passes points of too small a norm; the arc does not. Where the two
    are parallel, the straight line is taken.

    Args:
      a, b: [B, *shape].
      weight: in 0..1, one number or one for each sample.

    Raises:
      InputError: a and b differ in shape.
    """
    if a.shape != b.shape:
        raise InputError(f"slerp got shapes {a.shape} and {b.shape}; they must agree")
    check_floats("a", a, math.inf)
    axes = tuple(range(1, a.ndim))

    def dot(u, v):
        return jnp.sum(u * v, axis=axes, keepdims=True)

    weight = jnp.broadcast_to(jnp.asarray(weight, a.dtype), a.shape[:1]).reshape(-1, *[1] * len(axes))
    cosine = dot(a, b) / jnp.maximum(jnp.sqrt(dot(a, a) * dot(b, b)), jnp.finfo(a.dtype).tiny)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    # Where sin(angle) is 0 the arc's formula is 0/0; `safe` keeps it finite there, and the straight line replaces it.
    parallel = jnp.sin(angle) < 1e-6
    safe = jnp.where(parallel, 1.0, angle)
    along_a = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * safe) / jnp.sin(safe))
    along_b = jnp.where(parallel, weight, jnp.sin(weight * safe) / jnp.sin(safe))
    return along_a * a + along_b * b
