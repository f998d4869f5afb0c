"""Estimates gamma = E |eps_hat|^2 / d at each time, which Analytic-DPM needs, once for a trained run on its data."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion import keys, predictions
from diffusion.data import Dataset
from diffusion.denoiser import denoise
from diffusion.errors import InputError
from diffusion.files import write_json
from diffusion.model import Model, Trained
from diffusion.types import Params

NUM_IMAGES = 1024


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


def cached_gamma(folder: Path, trained: Trained, weights: str, data: Dataset, tau) -> Float[np.ndarray, "S"]:
    """Returns gamma at tau[:-1]; what analytic_gamma.json in the folder lacks is estimated and added to it.

    Args:
      folder: made if it is not there.
      trained: the model.
      weights: SHA-256 of its parameters.
      data: what it was trained on. A model that has not learned "no class" is asked for each image's own class.
      tau: a grid.

    Raises:
      InputError: the file is damaged.
    """
    by_class = trained.model.conditions is not None and trained.config.train.label_dropout == 0
    asked = ", by class" if by_class else ""
    # What is known for these parameters.
    path = folder / "analytic_gamma.json"
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        of_weights = known.setdefault(f"step {trained.step}, EMA {trained.ema}, weights {weights}{asked}", {})
        gamma = {float(t): float(value) for t, value in of_weights.items()}
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged; delete it, and it is estimated again") from None
    # Estimate and keep the rest.
    missing = [float(t) for t in tau[:-1] if float(t) not in gamma]
    if missing:
        print(f"estimating E|eps|^2 at {len(missing)} timesteps on {min(len(data.images), NUM_IMAGES):,} images")
        chosen = np.random.default_rng(0).permutation(len(data.images))[:NUM_IMAGES]
        labels = data.labels[chosen] if by_class else None
        images = data.images[chosen]
        found = estimate_gamma(trained.model, trained.params, images, missing, keys.make(0), labels=labels)
        gamma |= {t: float(value) for t, value in zip(missing, found, strict=True)}
        of_weights |= {str(t): value for t, value in gamma.items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return np.array([gamma[float(t)] for t in tau[:-1]])
