"""Which examples make up a batch, and which are mirrored: pure functions of the seed and the step.

So a resumed run needs no data state.
"""

import functools

import numpy as np

from diffusion.errors import InputError


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The examples of batch number `step` of an endless stream.

    The stream is one epoch after another, each a fresh permutation of all examples. No remainder is dropped: a batch
    may straddle two epochs, or hold several where batch_size > num_examples.

    Args:
      num_examples, batch_size: at least 1.
      seed: at least 0.
      step: 0-based batch number; batches before it need not have been drawn.

    Returns:
      int64[batch_size] in 0..num_examples-1.

    Raises:
      InputError: an argument out of its range.
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
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of batch number `step`: which examples they are, int64[b], and each one's 0-based epoch, int64[b].

    The arguments are those of `batch_indices`; rows are places in 0..batch_size-1. Nothing is checked again.
    """
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size)[rows], num_examples)
    index = np.empty_like(place)
    for e in np.unique(epoch).tolist():
        index[epoch == e] = _permutation(num_examples, seed, e)[place[epoch == e]]
    return index, epoch


def mirrored(num_examples: int, seed: int, index: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """Whether each example is mirrored in its epoch, bool[b]: a fair coin for each (seed, epoch, example).

    Args:
      num_examples, seed: as for `batch_indices`.
      index, epoch: int64[b], from `locate`.
    """
    result = np.empty(index.shape, bool)
    for e in np.unique(epoch).tolist():
        result[epoch == e] = _coins(num_examples, seed, e)[index[epoch == e]]
    return result


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # PCG64 by name: default_rng may choose another generator in a later NumPy, and a resumed run another order.
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(num_examples)


@functools.lru_cache(maxsize=4)
def _coins(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # The 1 sets this stream apart from the permutation's. (A 0 would not: NumPy fills seeds up with zeros.)
    return np.random.PCG64((seed, epoch, 1)).random_raw(num_examples) >> 63 == 1
