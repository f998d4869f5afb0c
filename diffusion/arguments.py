"""Checks the arguments of `sample`, before anything is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from diffusion.adaptive import Adaptive
from diffusion.around import Steering
from diffusion.brownian import Brownian
from diffusion.caching import Cache
from diffusion.errors import InputError, nearest
from diffusion.guidance import Guidance
from diffusion.images import check_floats
from diffusion.solvers.table import SamplerTable
from diffusion.types import Images

_SHORT = {
    "guidance_scale": "scale",
    "null_cond": "null",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
    "guidance_rule": "rule",
}
"""The keywords of `sample` that are short for fields of its guidance."""


def check_table(table: Any) -> None:
    """Raises InputError for what is often given in the place of a table."""
    if isinstance(table, SamplerTable | Adaptive):
        return
    make = "make one by solver(schedule, tau), as diffusion.solvers.ddim(schedule, tau)"
    if callable(table):
        raise InputError(f"table is the function {getattr(table, '__name__', table)}, not a table of it; {make}")
    if isinstance(table, jax.Array | np.ndarray | list | tuple):
        raise InputError(f"table is an array or a list, perhaps a grid tau; {make}")
    raise InputError(f"table is a {type(table).__name__}; {make}")


def check_ids(sample_ids: Any, num_samples: int) -> Int[Array, "N"]:
    """Returns the numbers of the samples, 0..N-1 for None; raises InputError for anything but N whole numbers."""
    ids = jnp.arange(num_samples) if sample_ids is None else jnp.asarray(sample_ids)
    if ids.shape != (num_samples,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"sample_ids have shape {ids.shape}, type {ids.dtype}; give {num_samples} whole numbers")
    return ids


def check_start(x_init: Any, shape: tuple[int, ...], table: SamplerTable) -> Images | None:
    """Returns x_init as an array, or None; raises InputError for a wrong shape, type or value, or if it is missing."""
    if x_init is None:
        if is_concrete(table.tau) and table.tau[0] < table.tau[-1]:
            raise InputError(f"{table.name} goes from images to noise; give the images as x_init")
        return None
    x_init = jnp.asarray(x_init)
    if x_init.shape != shape or not jnp.issubdtype(x_init.dtype, jnp.floating):
        raise InputError(f"x_init has shape {x_init.shape}, type {x_init.dtype}; give real numbers of {shape}")
    check_floats("x_init", x_init, noisy=True)
    return x_init


def check_conditions(num_samples: int, cond: Any) -> None:
    """Raises InputError unless every leaf of cond has a leading axis of so many samples."""
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != (num_samples,):
            raise InputError(
                f"cond has a leaf of shape {jnp.shape(leaf)}; its leading axis must be {num_samples} samples"
            )


def check_known(known: Any, shape: tuple[int, ...]) -> tuple[Images, Images] | None:
    """Returns (values, mask) broadcast to the samples, or None; raises InputError if they cannot be."""
    if known is None:
        return None
    try:
        values, mask = (part if isinstance(part, int | float) else jnp.asarray(part) for part in known)
        placed = tuple(jnp.broadcast_to(part, shape) for part in (values, mask))
    except (ValueError, TypeError):
        raise InputError(f"known must be (values, mask), each of a shape that broadcasts to {shape}") from None
    check_floats("known values", values)
    if is_concrete(mask) and not np.all((np.asarray(mask) >= 0) & (np.asarray(mask) <= 1)):
        raise InputError("the mask of known holds values outside 0..1; give 1 where pixels are known, and 0 elsewhere")
    return placed


def check_guidance(guidance: Any, short: dict[str, Any], cond: Any) -> Guidance | None:
    """Returns the guidance that the arguments of `sample` ask for, or None where it would change nothing.

    Raises:
      InputError: guidance that is none, or given twice, or a field of it that `Guidance.check` refuses.
      TypeError: an unknown keyword.
    """
    for name in short:
        if name not in _SHORT:
            raise TypeError(f"sample() has no argument {name!r}; {nearest(name, _SHORT)}")
    if not isinstance(guidance, Guidance | None):
        raise InputError(f"guidance is {type(guidance).__name__}; give a diffusion.Guidance")
    if guidance is not None and short:
        raise InputError(f"{next(iter(short))} is short for a field of guidance; give one or the other")
    guidance = guidance or Guidance(**{_SHORT[name]: value for name, value in short.items()})
    acts = guidance.acts()
    # Even a guidance that does nothing may be misspelt; its conditions count only where it acts.
    guidance.check(cond, acts)
    return guidance if acts else None


def check_noise(noise: Any, table: SamplerTable) -> Int[Array, "stages 2"] | None:
    """Returns between which places on its brownian path each stage draws its noise, or None for noise of each stage.

    Raises:
      InputError: what is no `Brownian`, or one on whose path the table has no places.
    """
    if noise is None:
        return None
    if not isinstance(noise, Brownian):
        raise InputError(f"noise is a {type(noise).__name__}; give diffusion.Brownian(schedule.num_timesteps)")
    noise.check()
    return noise.intervals(table)


def check_steering(steering: Any) -> None:
    """Raises InputError for what is no `Steering`, or one that `Steering.check` refuses."""
    if not isinstance(steering, Steering):
        raise InputError(f"steering is a {type(steering).__name__}; give diffusion.Steering(log_prob=...)")
    steering.check()


def check_cache(
    cache: Cache | None, table: SamplerTable, guidance: Guidance | None
) -> Bool[np.ndarray, "calls"] | None:
    """Returns which calls are computed whole, or None where all are, and so nothing is worth keeping.

    Args:
      cache: as `sample` takes it.
      table: the sampler.
      guidance: None where it does not act.

    Raises:
      InputError: a network without levels to keep, or calls that the table does not have.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise InputError(f"cache is a {type(cache).__name__}; give diffusion.Cache(model.split, 3), or other calls")
    whole = cache.whole(table.nfe)
    if guidance is not None and guidance.reference_fn is not None and guidance.reference_split is None:
        raise InputError(
            "cache keeps the deep levels of both networks, and the second one, of the guidance, has none to keep "
            "(reference_split is None); leave out cache"
        )
    return None if whole.all() else whole


def is_concrete(array: Any) -> bool:
    """Whether the values of an array are known, as they are not while JAX traces a function."""
    return not isinstance(array, jax.core.Tracer)
