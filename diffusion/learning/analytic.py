"""Estimates gamma = E |eps_hat|^2 / d at each time, which Analytic-DPM needs, once for a trained run on its data."""

import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion import files, keys, predictions, sealed
from diffusion.data import Dataset
from diffusion.denoiser import denoise
from diffusion.errors import InputError
from diffusion.model import Model, Trained
from diffusion.types import Params

NUM_IMAGES, FILE = 1024, "analytic_gamma.json"


def estimate_gamma(
    model: Model,
    params: Params,
    images: UInt8[np.ndarray, "N H W C"],
    times,
    key: jax.Array,
    batch_size: int = 128,
    labels: Int[np.ndarray, "N"] | None = None,
) -> Float[np.ndarray, "K"]:
    """Returns E |eps_hat(x_t, t)|^2 / d (Analytic-DPM, arXiv:2201.06503, Eq. 11) by Monte Carlo over images and noise.

    Args:
      model, params: the model and its network's parameters.
      images: data, of which only whole batches are used; fewer images than one batch are repeated to fill it.
      times: real, in (0, T].
      key: a JAX random key.
      batch_size: images at a time.
      labels: the classes of the images, each of which is asked for with its own. None asks for "no class", which a
        model has learned only with label_dropout above 0.

    Returns:
      One float64 for each time, which does not depend on the other times.
    """
    key = keys.threefry(key)

    @jax.jit
    def batch_mean(x_0, cond, eps, reading):
        x_t = reading.signal * x_0 + reading.noise * eps
        d = denoise(partial(model.apply_fn, params), x_t, cond, reading)
        return jnp.mean(jnp.square((x_t - reading.signal * d.x0) / reading.noise))

    # Average over whole batches, all of one shape.
    count = max(1, len(images) // batch_size)
    batches = np.resize(images, (count, batch_size, *images.shape[1:]))
    conds = [None] * count if model.conditions is None else np.tile(model.conditions.nulls(batch_size), (count, 1))
    if labels is not None:
        conds = np.resize(np.asarray(labels, np.int32), (count, batch_size))
    gamma = np.zeros(len(times))
    for k, t in enumerate(times):
        # The key follows from the time itself and not from its position.
        of_time = jax.random.fold_in(key, int(np.float32(t).view(np.uint32)))
        reading = predictions.reading(model.prediction, np.float64(t), *model.schedule.at(t))
        for b, (batch, cond) in enumerate(zip(batches, conds, strict=True)):
            x_0 = model.space.encode(batch)
            eps = keys.normal(jax.random.fold_in(of_time, b), x_0.shape)
            gamma[k] += float(batch_mean(x_0, cond, eps, reading)) / count
    return gamma


def cached_gamma(
    folder: Path, trained: Trained, weights: str, data: Dataset, tau, say: Callable[[str], None] = lambda text: None
) -> Float[np.ndarray, "S"]:
    """Returns gamma at tau[:-1]; what analytic_gamma.json in the folder lacks is estimated and added to it.

    A folder that cannot be written is a warning, and the estimate is of use without it. Processes that estimate at once
    each keep what they found.

    Args:
      folder: made if it is not there.
      trained: the model.
      weights: SHA-256 of its parameters.
      data: what it was trained on. A model that has not learned "no class" is asked for each image's own class.
      tau: a grid.
      say: is told before an estimate, which takes a while, starts.

    Raises:
      InputError: the file is damaged.
    """
    by_class = trained.model.conditions is not None and trained.config.train.label_dropout == 0
    name = f"step {trained.step}, EMA {trained.ema}, weights {weights}{', by class' * by_class}"
    gamma = _read_gamma(folder).get(name, {})
    missing = [float(t) for t in tau[:-1] if float(t) not in gamma]
    if missing:
        say(f"estimating E|eps|^2 at {len(missing)} timesteps on {min(len(data.images), NUM_IMAGES):,} images")
        chosen = np.random.default_rng(0).permutation(len(data.images))[:NUM_IMAGES]
        labels = data.labels[chosen] if by_class else None
        images = data.images[chosen]
        found = estimate_gamma(trained.model, trained.params, images, missing, keys.make(0), labels=labels)
        gamma |= {t: float(value) for t, value in zip(missing, found, strict=True)}
        try:
            with files.locked(folder, "writing an estimate into", ".analytic_gamma.lock"):
                files.remove_temporaries(folder, re.escape(FILE), folder)
                known = _read_gamma(folder)  # again: another process may have added to it in the meantime
                known[name] = known.get(name, {}) | gamma
                texts = {key: {str(t): value for t, value in of.items()} for key, of in known.items()}
                sealed.write(folder / FILE, texts, folder)
        except (OSError, InputError) as error:
            warnings.warn(f"{folder / FILE} is not written, and is estimated again next time ({error})", stacklevel=2)
    return np.array([gamma[float(t)] for t in tau[:-1]])


def _read_gamma(folder):
    """Returns what the file knows: the values by time, by the model's parameters."""
    path = folder / FILE
    try:
        known = sealed.read(path, within=folder)
        result = {name: {float(t): float(value) for t, value in of.items()} for name, of in known.items()}
        if all(math.isfinite(value) and value >= 0 for of in result.values() for value in of.values()):
            return result
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (InputError, ValueError, TypeError, AttributeError, OverflowError, OSError):
        pass
    raise InputError(f"{path} is damaged or cannot be read; delete it, and it is estimated again")
