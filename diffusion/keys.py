"""The one random generator of this package: threefry2x32 in its partitionable form, whatever JAX's settings are.

Other generators of JAX, such as rbg, draw other numbers for a sample when the batch around it changes, and so does
threefry in its older form when a draw is split over devices. So all keys are made or converted here, and functions that
draw are `pinned`.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from diffusion.errors import InputError

GENERATOR = "threefry2x32, partitionable"
"""What runs and jobs write down about their random numbers; what another generator has begun must not go on."""

_IMPLEMENTATION = "threefry2x32"

P = ParamSpec("P")
R = TypeVar("R")


def make(seed: int) -> Key[Array, ""]:
    """Returns the key of a seed, the same one whatever `jax_default_prng_impl` says."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def threefry(key: Any) -> Key[Array, ""]:
    """Returns a caller's key as a key of the package's generator; works inside jit.

    A threefry key stays as it is. Of another generator's key, the first two of its words become the key. JAX seeds and
    folds an rbg key as two threefry keys side by side, so `jax.random.key(0)` gives the same samples under
    `jax_default_prng_impl="rbg"` as without it.

    Args:
      key: from `jax.random.key`, or the bare uint32 words of `jax.random.PRNGKey`.

    Raises:
      InputError: it is no key, or several.
    """
    data = None
    if isinstance(key, jax.Array | np.ndarray):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if typed and key.shape == () and jax.random.key_impl(key) == _IMPLEMENTATION:
            return key
        data = jax.random.key_data(key) if typed else key
    if data is None or data.dtype != jnp.uint32 or data.ndim != 1 or data.shape[0] < 2:
        shape = f" of shape {np.shape(key)}" if np.ndim(key) else ""
        shown = repr(key) if isinstance(key, int | float | str | None) else type(key).__name__ + shape
        raise InputError(f"key is {shown}; give one random key, as jax.random.key(0)")
    return jax.random.wrap_key_data(jnp.asarray(data[:2]), impl=_IMPLEMENTATION)


def pinned(function: Callable[P, R]) -> Callable[P, R]:
    """Has all that is drawn inside a function drawn in the partitionable form, also where it is traced."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.threefry_partitionable(True):
            return function(*args, **kwargs)

    return inside


@pinned
def normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Draws standard normal numbers; those of a key differ between types."""
    return jax.random.normal(key, shape, dtype)


@pinned
def uniform(key: Key[Array, ""], shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Draws numbers that are uniform in 0..1, without 1."""
    return jax.random.uniform(key, shape, dtype)


@pinned
def bernoulli(key: Key[Array, ""], share: float, shape: tuple[int, ...] = ()) -> Array:
    """Draws booleans that are True with a probability of share."""
    # Compared in float32, as in `jax.random.bernoulli` without `jax_enable_x64`.
    return uniform(key, shape) < jnp.float32(share)
