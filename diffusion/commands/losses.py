"""Losses by name, for `--loss` of learn.py: "log:floor=0.001", "mse", "l1" or "features:space=classifier"."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import options
from diffusion.commands.datasets import load_data_of
from diffusion.commands.feature_spaces import open_space
from diffusion.errors import InputError, require_range
from diffusion.learning.losses import FLOOR, Loss, as_they_are, within_bounds
from diffusion.model import Trained

SCALED_ON = 1024
"""So many real images say how far features spread."""


def log(trained: Trained, floor: float = FLOOR) -> Loss:
    """Compares samples by the logarithm of their squared error; one of floor counts as reached."""
    require_range("floor of loss log", floor, 0, open_ends="low")
    return Loss(measure=_measure(trained), floor=floor)


def mse(trained: Trained) -> Loss:
    """Compares samples by their mean squared error."""
    return Loss(measure=_measure(trained), floor=None)


def l1(trained: Trained) -> Loss:
    """Compares samples by their mean absolute error, which suits latents."""
    return Loss(measure=_measure(trained), absolute=True, floor=None)


def features(trained: Trained, space: str = "classifier", floor: float = 0.01, seed: int = 1, file: str = "") -> Loss:
    """Compares the features of samples, as log does; their variance over real images is 1.

    Args:
      trained: the model, of pixels; a classifier is trained on its data.
      space: classifier, inception or pixels.
      floor: as for log, in units of the features' variance.
      seed: of the classifier; evaluate.py judges by the one of seed 0.
      file: of Inception's weights; "" downloads them.
    """
    require_range("floor of loss features", floor, 0, open_ends="low")
    if not _is_of_pixels(trained):
        raise InputError("loss features needs a model of pixels, and this one works on latents; take --loss=l1")
    if file and space != "inception":
        raise InputError(f"loss features: file goes with space=inception, not {space}")
    real = load_data_of(trained)
    try:
        found = open_space(space, real, inception=file or None, seed=seed)
    except InputError as error:
        raise InputError(str(error).replace("--inception=FILE", "features:space=inception,file=FILE")) from None
    chosen = np.sort(np.random.default_rng(0).permutation(len(real.images))[:SCALED_ON])
    vectors = found.extract(np.asarray(real.images[chosen])).vectors
    spread = float(np.sqrt(np.mean(np.var(vectors, axis=0))))

    def measure(params, samples):
        return found.trace(params["network"], jnp.clip(samples, -1, 1)) / params["spread"]

    return Loss({"network": jax.device_put(found.params), "spread": spread}, measure, floor=floor)


LOSSES = {"log": log, "mse": mse, "l1": l1, "features": features}


def parse(text: str) -> options.Choice:
    """Reads a loss, without making it."""
    return options.parse("loss", text, LOSSES, leading=1)


def spelled_out(choice: options.Choice) -> str:
    """Returns a loss with all its options, so that two texts are equal only if the losses are."""
    values = choice.complete(leading=1)
    return ":".join([choice.name, *[",".join(f"{key}={value}" for key, value in values.items())] * bool(values)])


def _is_of_pixels(trained):
    return trained.model.space.clip != "none"


def _measure(trained):
    """Returns what is compared of samples: where images have a bound they are compared as they are shown, within it."""
    return within_bounds if _is_of_pixels(trained) else as_they_are
