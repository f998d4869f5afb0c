"""What a learned sampler is to make small: what is compared of the samples, and how much an error counts.

With r the difference of what is compared of a sample and of the teacher's, and e_n its mean over a sample n,

    log   mean_n log(e_n + floor)     e_n = mean r^2                       a few samples that end elsewhere do not rule
    mse   mean_n e_n                  e_n = mean r^2
    l1    mean_n e_n                  e_n = mean of |r|, smoothed near 0   for latents, where few numbers stray far

All three are least-squares problems after reweighting, which `least_squares` solves.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from diffusion.types import Images, Params

FLOOR = 1e-3
"""A mean square error of pixels in [-1, 1] at which a sample counts as reached."""

SMOOTH = 1e-3
"""An absolute error far below this counts by its square, so that l1 has a derivative at 0."""

Errors = Float[np.ndarray, "N"]


def as_they_are(params: Params, samples: Images) -> Images:
    """Compares the samples themselves."""
    return samples


def within_bounds(params: Params, samples: Images) -> Images:
    """Compares images as they are shown, cut off at -1 and 1."""
    return jnp.clip(samples, -1, 1)


@struct.dataclass
class Loss:
    """A Loss says what is compared of samples, and how much an error counts.

    Attributes:
      params: of `measure`, such as the weights of a classifier.
      measure: (params, samples [B, *shape]) -> what is compared [B, ...]; a function that JAX can trace.
      absolute: whether a difference counts by its absolute value, and not by its square.
      floor: the error at which a sample counts as reached; None for a plain mean over samples.
    """

    params: Any = None
    measure: Callable[[Any, Images], Array] = struct.field(pytree_node=False, default=as_they_are)
    absolute: bool = struct.field(pytree_node=False, default=False)
    floor: float | None = struct.field(pytree_node=False, default=FLOOR)

    def differences(self, samples: Images, targets: Images) -> Float[Array, "B R"]:
        """Returns r: what is compared of the samples, less the same of the teacher's."""
        r = self.measure(self.params, samples) - self.measure(self.params, targets)
        return r.reshape(len(samples), -1)

    def of(self, differences: Float[Array, "B R"]) -> Float[Array, "B"]:
        """Returns the error e_n of each sample."""
        squares = jnp.square(differences)
        return jnp.mean(jnp.sqrt(squares + SMOOTH**2) - SMOOTH if self.absolute else squares, axis=1)

    def pull(self, differences: Float[Array, "B R"]) -> Float[Array, "B R"]:
        """Returns by how much each square counts, so that the squares have the slope of the error: e'(r) / (2 r)."""
        squares = jnp.square(differences)
        return 0.5 / jnp.sqrt(squares + SMOOTH**2) if self.absolute else jnp.ones_like(squares)

    def mean(self, errors: Errors) -> float:
        """Returns what is minimised; infinite if an error is not finite."""
        if not np.isfinite(errors).all():
            return np.inf
        return float(np.mean(errors if self.floor is None else np.log(errors + self.floor)))

    def weights(self, errors: Errors) -> Errors:
        """Returns the derivative of `mean` by each error, times their number."""
        return np.ones(len(errors)) if self.floor is None else 1 / (errors + self.floor)

    def typical(self, errors: Errors) -> float:
        """Returns the logarithm of the typical error, by which samplers are judged; it ascends with `mean`.

        That is the mean error without a floor, and exp(mean_n log(e_n + floor)) - floor with one: near the mean where
        the floor is far above all errors, near the geometric mean where it is far below. Infinite if an error is not
        finite.
        """
        if not np.isfinite(errors).all():
            return np.inf
        floor = self.floor
        error = np.mean(errors) if floor is None else floor * np.expm1(np.mean(np.log1p(errors / floor)))
        return float(np.log(max(error, np.finfo(np.float64).tiny)))

    def scale(self, error: float) -> float:
        """Returns how much what is minimised changes where all errors near this one change by their own size."""
        return error if self.floor is None else error / (error + self.floor)


LOG = Loss()
"""The loss of `python learn.py` for models whose samples have no bound."""
