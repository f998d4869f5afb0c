"""Makes a trained model of ours from a folder of diffusers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import keys
from diffusion.errors import InputError
from diffusion.interop.diffusers import folders, unet2d
from diffusion.interop.diffusers.autoencoders import autoencoder_factor, load_autoencoder
from diffusion.interop.diffusers.schedulers import Sampling, read_scheduler
from diffusion.interop.diffusers.state import to_params
from diffusion.model import UNET2D, Trained, make_model
from diffusion.records import readable

EMA = "published"
"""What the only average of an imported model is called."""


def load(
    folder: str | os.PathLike,
    *,
    variant: str = "",
    scheduler: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Trained:
    """Reads the model in a folder that diffusers' save_pretrained wrote: a pipeline, or a network with its scheduler.

    Neither torch nor diffusers is needed, and nothing in the folder is executed. The sampler, its grid, steps and clip
    become the defaults of the model. Times of ours are theirs + 1.

    Args:
      folder: has model_index.json, or config.json and beside it, or in the folder scheduler next to it,
        scheduler_config.json.
      variant: of the weights, as fp16; "" for the full precision, or fp16 where there is nothing else.
      scheduler: a config, with its _class_name, in the place of the folder's.
      image_size: (height, width) where the network's config has none, or another one.

    Raises:
      InputError: there is no such folder, something in it is missing, damaged or not supported, and named.
    """
    folder = Path(folder).expanduser()
    if not folders.is_folder(folder):
        raise InputError(
            f"{folder} is no folder of diffusers: it has neither {folders.INDEX} nor a {folders.CONFIG} with a "
            "_class_name"
        )
    at, where = _network(folder)
    config = folders.read_config(where)
    with readable(str(where)):
        fields, found = unet2d.read_fields(str(where), config)
        shape = unet2d.image_shape(str(where), found, image_size)
    sampling, autoencoder = _scheduler(folder, scheduler), _autoencoder(folder, shape, variant)
    fields |= {"time_scale": 1.0, "time_shift": sampling.time_shift, "dtype": "float32"}
    whole = whole_config(UNET2D, fields, found, sampling)
    if autoencoder is not None:
        shape, whole.latents = autoencoder.autoencoder.image_shape, str(folder)
    with readable(str(where)):
        model = make_model(whole, shape, autoencoder=autoencoder)
    like = jax.eval_shape(model.init, keys.make(0))
    weights = folders.open_weights(at, folders.count(jax.tree.leaves(like)), variant)
    return Trained(model, to_params(weights, like, unet2d.name_of), whole, 0, EMA)


def _network(folder):
    """Returns the folder of the network and the path of its config."""
    at = folders.part(folder, "unet")
    config = folders.read_config(at / folders.CONFIG)
    if config["_class_name"] != unet2d.CLASS:
        raise InputError(f"{at / folders.CONFIG}: {config['_class_name']} is not supported; supported: {unet2d.CLASS}")
    return at, at / folders.CONFIG


def _autoencoder(folder, shape, variant):
    """Returns the autoencoder in whose latents a pipeline's network works, None for one of pixels."""
    if not any((folder / name).is_dir() for name in ("vae", "vqvae")):
        return None
    height, width, channels = shape
    factor = autoencoder_factor(folder)
    found = load_autoencoder(folder, variant=variant, image_size=(height * factor, width * factor))
    if found.autoencoder.latent_channels != channels:
        raise InputError(
            f"{folder}: the network has {channels} in_channels, and its autoencoder latents of "
            f"{found.autoencoder.latent_channels}"
        )
    return found


def _scheduler(folder, given) -> Sampling:
    """Returns what the scheduler of a folder, or the one that is given, says."""
    if given is not None:
        if not isinstance(given, Mapping) or not isinstance(given.get("_class_name"), str):
            raise InputError(f"scheduler is {given!r}; give a config with its _class_name")
        where, config = "scheduler", given
    else:
        # Where a network is named by its own folder, its scheduler lies next to that.
        places = (folders.part(folder, "scheduler"), folder.absolute().parent / "scheduler")
        paths = [place / folders.SCHEDULER for place in places if (place / folders.SCHEDULER).is_file()]
        if not paths:
            raise InputError(
                f"{folder} has a network without its scheduler; name the folder of its pipeline, or put "
                f"{folders.SCHEDULER} into it, as "
                '{"_class_name": "DDPMScheduler"}'
            )
        where, config = str(paths[0]), folders.read_config(paths[0])
    with readable(where, "scheduler"):
        return read_scheduler(where, config)


def whole_config(network: str, fields: Mapping[str, Any], found: Mapping[str, Any], sampling: Sampling) -> ConfigDict:
    """Returns the config that a run of this model would have, as far as the folder says it.

    Args:
      network: as config.network has it; its section has this name, too.
      fields: of that section.
      found: the arguments of the network's class.
      sampling: what the scheduler says.

    Raises:
      InputError: the network's output has neither as many channels as its input nor twice as many.
    """
    channels, out = found["in_channels"], found["out_channels"]
    if out not in (channels, 2 * channels):
        raise InputError(f"out_channels is {out}, of {channels} in_channels; supported: as many, or twice as many")
    size = found["sample_size"]
    null = unet2d.LABEL_DROPOUT in found
    classes = (found["num_class_embeds"] or 0) - null
    return ConfigDict(
        {
            "latents": "",
            "data": {
                "name": "images",
                "path": "",  # nothing in the folder says where its images are
                "split": "",
                "size": size if isinstance(size, int) else 0,
                "channels": channels,
                "labels": "folders" if classes else "none",
            },
            "schedule": sampling.schedule,
            "network": network,
            "model": {"num_classes": classes, "out_channels": 0},
            network: {**fields, "null_class": null or not classes},
            "train": {
                "prediction": sampling.prediction,
                "objective": "simple" if out == channels else "hybrid",
                "label_dropout": found.get(unet2d.LABEL_DROPOUT, 0.0),
                "ema_decays": (),
            },
            "sample": {
                "sampler": sampling.sampler,
                "steps": sampling.steps,
                "tau": sampling.tau,
                "clip": sampling.clip,
                "num": 64,
            },
        }
    )
