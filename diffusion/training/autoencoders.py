"""Opens autoencoders: runs that trained one, and files of them."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion import keys, sealed
from diffusion.autoencoder import TrainedAutoencoder, unscaled
from diffusion.errors import InputError, nearest
from diffusion.interop import diffusers
from diffusion.model import check_finite
from diffusion.pretrained import autoencoders as files
from diffusion.pretrained import weights
from diffusion.records import autoencoder_from_record
from diffusion.training import checkpoints
from diffusion.training.run_folder import RunFolder, existing
from diffusion.training.state import ema_name

SCALING = "latents.json"
"""The file of a run with the scaling of its latents, for one checkpoint."""


def load_autoencoder(path: str | os.PathLike, ema: str = "", step: int | None = None) -> TrainedAutoencoder:
    """Returns the autoencoder in a run folder or a file, with its parameters and the scaling of its latents.

    Args:
      path: a run folder, a file that convert.py wrote, or a folder of diffusers.
      ema: which of a run's EMAs, by decay; "" is the first.
      step: which of a run's checkpoints; None is the newest good one.

    Raises:
      InputError: there is no such run or file, it is damaged, or holds something else; or its latents have not been
        measured yet; or ema or step is of no use for what has one of each.
    """
    if step is not None and (str(path).endswith(weights.SUFFIX) or diffusers.is_folder(path)):
        raise InputError(f"step is {step}, and {path} is no run, which has checkpoints; leave it out")
    if str(path).endswith(weights.SUFFIX):
        return files.load(path, ema)
    if diffusers.is_folder(path):
        found = diffusers.load_autoencoder(path)
        if ema not in ("", found.ema):
            raise InputError(f"ema is {ema}; {path} holds only that of {found.ema}")
        return found
    folder = existing(path)
    with checkpoints.opened(folder.checkpoints, step) as found:
        trained = load_unscaled(folder, found, ema)
    scaling = read_scaling(folder, trained)
    if scaling is None:
        raise InputError(
            f"the latents of {folder.path} have not been measured at step {trained.step:,}; let its training come to "
            f"its end, or run `python evaluate.py --workdir={folder.path}`, which measures them"
        )
    return scaled(trained, scaling)


def load_unscaled(folder: RunFolder, step: int, ema: str = "") -> TrainedAutoencoder:
    """Returns the autoencoder of a checkpoint, with latents as the encoder gives them.

    Args:
      folder: the run.
      step: a checkpoint that is as it was written.
      ema: which of its EMAs, by decay; "" is the first.

    Raises:
      InputError: it is no autoencoder, or there is no such EMA.
    """
    where = f"checkpoint {folder.checkpoints / str(step)}"
    config, autoencoder = autoencoder_from_record(checkpoints.metadata(folder.checkpoints, step), where)
    names = [ema_name(decay) for decay in config.train.ema_decays]
    if not names or (ema and ema not in names):
        raise InputError(f"{folder.path} has no EMA of {ema}; {nearest(ema, names)}")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(autoencoder.init, keys.make(0))
    del like["scaling"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    params = checkpoints.load_ema(folder.checkpoints, step, ema or names[0], like)
    check_finite(params, where)
    params = {**params, "scaling": unscaled(autoencoder.latent_channels)}
    return TrainedAutoencoder(autoencoder, params, config, step, ema or names[0], sealed.digest(params))


def scaled(trained: TrainedAutoencoder, scaling: Mapping[str, Any]) -> TrainedAutoencoder:
    """Returns the autoencoder with another scaling of its latents, "shift" and "scale" of each channel."""
    arrays = {name: jnp.asarray(scaling[name], jnp.float32) for name in ("shift", "scale")}
    params = {**trained.params, "scaling": arrays}
    return trained._replace(params=params, sha256=sealed.digest(params))


def write_scaling(folder: RunFolder, trained: TrainedAutoencoder, scaling: Mapping[str, Any], count: int) -> None:
    """Writes the scaling of a checkpoint's latents to the run.

    Args:
      folder: the run.
      trained: from `load_unscaled`.
      scaling: what was measured, see `diffusion.autoencoder.measure_scaling`.
      count: the number of images that it was measured on.
    """
    numbers = {name: [float(x) for x in scaling[name]] for name in ("shift", "scale")}
    facts = {"step": trained.step, "ema": trained.ema, "weights_sha256": trained.sha256, "images": count}
    sealed.write(folder.path / SCALING, {**facts, **numbers}, folder.path)


def read_scaling(folder: RunFolder, trained: TrainedAutoencoder) -> dict[str, Any] | None:
    """Returns the scaling that was measured for these parameters of a run, or None if nobody did.

    Raises:
      InputError: the file is damaged.
    """
    path = folder.path / SCALING
    if not path.exists():
        return None
    record = sealed.read(path, within=folder.path)
    if record.get("weights_sha256") != trained.sha256:
        return None
    shape = (trained.autoencoder.latent_channels,)
    try:
        found = {name: jnp.asarray(record[name], jnp.float32) for name in ("shift", "scale")}
    except (KeyError, TypeError, ValueError):
        found = {}
    if any(x.shape != shape or not jnp.isfinite(x).all() for x in found.values()) or not found:
        raise InputError(f"{path} is damaged: it holds no shift and scale of {shape[0]} channels; remove it")
    return found
