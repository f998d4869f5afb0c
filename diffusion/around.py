"""What can be put around a network: a classifier that steers it, a function of its estimates, another time."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from diffusion.errors import InputError, is_whole, require_range
from diffusion.types import ApplyFn, Images, Params

LogProb = Callable[[Params, Images, Float[Array, "B"], Any], Float[Array, "B"]]
"""(params, x, t, cond) -> log p(cond | x) of each sample, of x as noisy as it is at t."""


@struct.dataclass
class Steering:
    """What changes the network's estimates of x_0. A pytree; the functions are static.

    The order is that of the fields, and comes after guidance and before clipping and known pixels.

    Attributes:
      log_prob, params: a classifier of noisy images (arXiv:2105.05233, Algorithm 2): its gradient by x, times scale and
        the noise n, is taken off eps, so that x_0 moves by scale n^2 / a times it. It is given x itself, not scaled as
        the input of a network may be, the time as the network has it, and cond. guided-diffusion calls the gradient
        cond_fn, and clips before it is added.
      scale: how far to push; 1 samples from p(x) p(cond | x), and more sharpens. A number.
      denoised_fn: (x_0, t [B]) -> x_0, applied to every estimate, such as a projection on what is known of the image.
    """

    log_prob: LogProb | None = struct.field(pytree_node=False, default=None)
    params: Params = None
    scale: Any = 1.0
    denoised_fn: Callable[[Images, Float[Array, "B"]], Images] | None = struct.field(pytree_node=False, default=None)

    def check(self) -> None:
        """Raises InputError for a scale that is no finite number, or that nothing uses."""
        scaled = False
        if not isinstance(self.scale, jax.core.Tracer):  # whose value is not known yet
            if not _is_finite_number(self.scale):
                raise InputError(f"scale of steering is {self.scale}; it must be one finite number")
            scaled = self.scale != 1
        if self.log_prob is None and (scaled or self.params is not None):
            raise InputError("steering has params or a scale, which are the classifier's; give its log_prob as well")

    def push(self, x: Images, t: Float[Array, "B"], cond: Any, signal: Any, noise: Any) -> Images:
        """Returns how far the classifier moves the estimate of x_0; without a signal x says nothing of it, and it is 0.

        Raises:
          InputError: log_prob does not return one real number for each sample.
        """
        if self.log_prob is None:
            return jnp.zeros_like(x)

        def total(x):
            found = self.log_prob(self.params, x, t, cond)
            if jnp.shape(found) != x.shape[:1]:
                raise InputError(
                    f"log_prob returns shape {jnp.shape(found)} for {x.shape[0]} samples; it must be one number each, "
                    "the log-probability of what is asked for"
                )
            return jnp.sum(found)

        gradient = jax.grad(total)(x).astype(x.dtype)
        factor = jnp.where(signal > 0, noise**2 / jnp.where(signal > 0, signal, 1), 0)
        return jnp.asarray(self.scale * factor, x.dtype) * gradient

    def project(self, x0: Images, t: Float[Array, "B"]) -> Images:
        """Returns the estimate after denoised_fn.

        Raises:
          InputError: it changes the shape.
        """
        if self.denoised_fn is None:
            return x0
        found = jnp.asarray(self.denoised_fn(x0, t))
        if found.shape != x0.shape:
            raise InputError(f"denoised_fn returns shape {found.shape} for estimates of shape {x0.shape}")
        return found.astype(x0.dtype)


def _is_finite_number(value):
    array = np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "iuf" and bool(np.isfinite(array))


@lru_cache
def rescaled_times(apply_fn: ApplyFn, num_timesteps: int, top: float = 1000.0) -> ApplyFn:
    """Returns a network that is told times in 0..top, whatever T is, the same object for the same arguments.

    Code of OpenAI's that is trained with rescale_timesteps, as with T = 4000, counts from 0 and is told t 1000 / T.

    Args:
      apply_fn: the network, which wants times below top.
      num_timesteps: T of the schedule, whose times are 1..T.
      top: what T stands for.

    Raises:
      InputError: T or top is not above 0.
    """
    if not is_whole(num_timesteps) or num_timesteps < 1:
        raise InputError(f"num_timesteps is {num_timesteps}; it must be a whole number of at least 1")
    require_range("top", top, 0, open_ends="low")

    def told(params, x, t, cond=None):
        return apply_fn(params, x, (t - 1) * (top / num_timesteps), cond)

    return told
