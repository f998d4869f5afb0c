"""What Analytic-DPM needs of a network: gamma = E |eps_hat|^2 / d at each time, estimated once a run on its data."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from diffusion.denoiser import PREDICTIONS, Options, denoise
from diffusion.errors import InputError
from diffusion.experiment import Model, Trained
from diffusion.files import write_json
from diffusion.types import Params

NUM_IMAGES = 1024


def estimate_gamma(
    model: Model, params: Params, images: UInt8[np.ndarray, "N H W C"], times, key: jax.Array, batch_size: int = 128
) -> Float[np.ndarray, "K"]:
    """E |eps_hat(x_t, t)|^2 / d (Analytic-DPM, arXiv:2201.06503, Eq. 11) by Monte Carlo over images and noise.

    Args:
      model, params: the network.
      images: data, of which whole batches are used, at least one (filled up by repetition).
      times: real, in (0, T].
      key: a JAX random key.
      batch_size: images at a time.

    Returns:
      float64, one value for each time.
    """

    @jax.jit
    def batch_mean(x_0, eps, signal, noise, reading, labels):
        x_t = signal * x_0 + noise * eps
        cond = labels if model.num_classes else None
        d = denoise(model.apply_fn, params, x_t, cond, reading, signal, Options())
        return jnp.mean(jnp.square((x_t - signal * d.x0) / noise))

    count = max(1, len(images) // batch_size)
    data = np.resize(images, (count, batch_size, *images.shape[1:])).astype(np.float32) / 127.5 - 1
    gamma = np.zeros(len(times))
    # No class: the estimate is of the marginal process.
    labels = jnp.full((batch_size,), model.num_classes)
    for k, t in enumerate(times):
        signal, noise = model.schedule.at(t)
        reading = PREDICTIONS[model.prediction](np.float64(t), signal, noise)
        for b, x_0 in enumerate(data):
            eps = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, k), b), x_0.shape)
            gamma[k] += float(batch_mean(x_0, eps, signal, noise, reading, labels)) / count
    return gamma


def cached_gamma(folder: Path, trained: Trained, images, tau) -> Float[np.ndarray, "S"]:
    """gamma at tau[:-1], read from analytic_gamma.json in the folder where it was estimated before, else added."""
    path = folder / "analytic_gamma.json"
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path} is damaged; delete it, and it is estimated again") from None
    of_step = known.setdefault(f"step {trained.step}, EMA {trained.ema}", {})
    missing = [float(t) for t in tau[:-1] if str(float(t)) not in of_step]
    if missing:
        print(f"estimating E|eps|^2 at {len(missing)} timesteps on {min(len(images), NUM_IMAGES):,} images")
        chosen = np.random.default_rng(0).permutation(len(images))[:NUM_IMAGES]
        gamma = estimate_gamma(trained.model, trained.params, images[chosen], missing, jax.random.key(0))
        of_step |= {str(t): float(g) for t, g in zip(missing, gamma, strict=True)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return np.array([of_step[str(float(t))] for t in tau[:-1]])
