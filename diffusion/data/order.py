"""Decides which examples make up a batch and which are mirrored, by pure functions of the seed and the step.

So a resumed run needs no saved state of the data.
"""

import functools

import numpy as np
from jaxtyping import Bool, Int64

from diffusion.errors import InputError


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> Int64[np.ndarray, "batch_size"]:
    """Returns the examples in batch number `step` of an endless stream.

    The stream is one epoch after another, each a fresh permutation of all examples. No remainder is dropped: a batch
    may straddle two epochs, or span several if batch_size > num_examples.

    Args:
      num_examples, batch_size: at least 1.
      seed: at least 0.
      step: 0-based batch number; earlier batches need not have been drawn.

    Returns:
      Numbers in 0..num_examples-1.

    Raises:
      InputError: an argument is out of its range.
    """
    check(num_examples, batch_size, seed, step)
    return locate(num_examples, batch_size, seed, step)[0]


def check(num_examples: int, batch_size: int, seed: int, step: int) -> None:
    """Raises InputError unless the arguments of `batch_indices` are in their ranges."""
    for name, value, least in (
        ("num_examples", num_examples, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        if value < least:
            raise InputError(f"{name}={value} is out of range; it must be at least {least}")


def locate(
    num_examples: int, batch_size: int, seed: int, step: int, rows: slice | range = slice(None)
) -> tuple[Int64[np.ndarray, "b"], Int64[np.ndarray, "b"]]:
    """Returns which examples some rows of batch number `step` are, and the 0-based epoch of each.

    The arguments are as for `batch_indices`, and rows are places in 0..batch_size-1. Nothing is checked again.
    """
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size)[rows], num_examples)
    index = np.empty_like(place)
    for e in np.unique(epoch).tolist():
        index[epoch == e] = _permutation(num_examples, seed, e)[place[epoch == e]]
    return index, epoch


def mirrored(
    num_examples: int, seed: int, index: Int64[np.ndarray, "b"], epoch: Int64[np.ndarray, "b"]
) -> Bool[np.ndarray, "b"]:
    """Says whether each example is mirrored in its epoch, by a fair coin for each (seed, epoch, example).

    Args:
      num_examples, seed: as for `batch_indices`.
      index, epoch: from `locate`.
    """
    result = np.empty(index.shape, bool)
    for e in np.unique(epoch).tolist():
        result[epoch == e] = _coins(num_examples, seed, e)[index[epoch == e]]
    return result


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # PCG64 by name: were default_rng another generator in a later NumPy, a resumed run would take another order.
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(num_examples)


@functools.lru_cache(maxsize=4)
def _coins(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # The 1 makes these coins independent of the permutation. (A 0 would not: NumPy fills seeds up with zeros.)
    return np.random.PCG64((seed, epoch, 1)).random_raw(num_examples) >> 63 == 1
