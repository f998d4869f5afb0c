"""Which examples make up a batch: a pure function of the seed and the step, so a resumed run needs no data state."""

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
    for name, value, least in (
        ("num_examples", num_examples, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        if value < least:
            raise InputError(f"{name}={value} is out of range; it must be at least {least}")
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size), num_examples)
    epochs = range(epoch[0], epoch[-1] + 1)
    return np.concatenate([_permutation(num_examples, seed, e)[place[epoch == e]] for e in epochs])


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # PCG64 by name: default_rng may choose another generator in a later NumPy, and a resumed run another order.
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(num_examples)
