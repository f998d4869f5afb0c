"""Gives a program's model to `diffusion.learning.rollout`: how it is asked, and the noises its samples begin with."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion import keys
from diffusion.commands import drawing
from diffusion.denoiser import Options
from diffusion.guidance import Guidance
from diffusion.learning.rollout import DIRECTIONS, Asked, Noises, draw
from diffusion.model import Model, Trained

PIXELS_AT_ONCE = 2**16
"""Small images go through the network together up to so many numbers, whatever --batch_size says."""


def asked(trained: Trained, settings: Mapping[str, Any], guidance: Guidance) -> Asked:
    """Returns the network with clip, thresholding and guidance as the flags give them; see `sources.Source`."""
    model, options = trained.model, Options(settings["clip"], settings["dynamic_threshold"])
    guidance = guidance if guidance.acts() else None
    return Asked(trained.params, guidance, model.apply_fn, model.prediction, options)


def batches(
    model: Model, guidance: Guidance, labels: Sequence[int], key: jax.Array, ids: range, size: int
) -> tuple[Noises, ...]:
    """Returns the noises of these numbers in batches of one size; the classes take turns, as in a job of sample.py."""
    result = []
    for begin in range(ids.start, ids.stop, size):
        part = range(begin, begin + size)
        told = drawing.conditions_of(model, np.asarray(part), labels, guidance)
        cond, null = told.get("cond"), told.get("null_cond") if guidance.acts() else None
        result.append(Noises(draw(key, part, model.space.shape), cond, null))
    return tuple(result)


def batch_size(model: Model, at_once: int) -> int:
    """Returns how many noises go through the network at once, each in `DIRECTIONS` directions.

    Args:
      model: whose samples may be small.
      at_once: images that the network surely takes together.
    """
    return max(1, max(at_once, PIXELS_AT_ONCE // int(np.prod(model.space.shape))) // DIRECTIONS)


def key_of(seed: int, purpose: str) -> jax.Array:
    """Returns a key of its own for a purpose: no image that sample.py draws begins with one of its noises."""
    return jax.random.fold_in(keys.make(seed), int.from_bytes(purpose.encode()))
