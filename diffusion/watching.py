"""Lets a function on the host watch a compiled scan: each stage calls it, for progress or previews."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback

from diffusion.errors import InputError, failure

Callback = Callable[[int, np.ndarray, np.ndarray], None]
"""(number of the stage from 0, x that the network saw, estimate of x_0); if it raises, the run ends."""

_LOGGER = logging.getLogger("jax._src.callback")
"""Where JAX tells of a callback that raises, with all its frames; the caller hears of it by an error."""

_NUMBERS = itertools.count(1)
_RUNS: dict[int, tuple[Callback, list[BaseException]]] = {}
"""The runs that are watched now, by number, so that another callback is no other program to compile."""


@contextlib.contextmanager
def watched(callback: Callback, *inputs: Any) -> Iterator[int]:
    """Yields the number of a run, which `tell` is to be given in it; the run must be over when the block ends.

    Args:
      callback: what is called.
      inputs: of the run.

    Raises:
      InputError: the callback raises, which ends the run; it is no function; or this is inside another function's jit,
        grad or vmap, where it would be called when that is compiled.
    """
    if not callable(callback):
        raise InputError(f"callback is a {type(callback).__name__}; give a function (stage, x, x0)")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
        raise InputError("callback is called where sample itself runs; call sample outside of jit, grad and vmap")
    number, errors = next(_NUMBERS), []
    _RUNS[number] = (callback, errors)

    def is_news(record):
        return record.exc_info is None or record.exc_info[1] not in errors

    _LOGGER.addFilter(is_news)
    try:
        yield number
        jax.effects_barrier()
    except jax.errors.JaxRuntimeError:
        if not errors:
            raise
    finally:
        _LOGGER.removeFilter(is_news)
        del _RUNS[number]
    if errors:
        if not isinstance(errors[0], Exception):  # Ctrl-C
            raise errors[0]
        raise InputError(f"callback fails with {failure(errors[0])}") from errors[0]


def tell(number: Any, stage: Any, x: jax.Array, x0: jax.Array) -> None:
    """Calls the callback of a run, from within the compiled program."""
    io_callback(_deliver, None, number, stage, x, x0)


def _deliver(number, stage, x, x0):
    callback, errors = _RUNS[int(number)]
    if errors:
        return
    try:
        callback(int(stage), np.asarray(x), np.asarray(x0))
    except BaseException as error:
        errors.append(error)
        raise
