"""Makes a trained model of ours from a folder of diffusers."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import keys, spaces
from diffusion.errors import InputError, nearest
from diffusion.interop.diffusers import dit, folders, lora, unet2d, unet2d_condition
from diffusion.interop.diffusers.autoencoders import autoencoder_factor, is_autoencoder, load_autoencoder
from diffusion.interop.diffusers.clip_text import load_text
from diffusion.interop.diffusers.schedulers import Sampling, read_scheduler
from diffusion.interop.diffusers.state import to_params
from diffusion.model import TRANSFORMER, UNET2D, UNET2D_CONDITION, Trained, make_model
from diffusion.models.layers import DTYPES
from diffusion.records import readable
from diffusion.types import Params

EMA = "published"
"""What the only average of an imported model is called."""


def load(
    folder: str | os.PathLike,
    *,
    variant: str = "",
    scheduler: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
) -> Trained:
    """Reads the model in a folder that diffusers' save_pretrained wrote: a pipeline, or a network with its scheduler.

    Neither torch nor diffusers is needed, and nothing in the folder is executed. The sampler, its grid, steps and clip
    become the defaults of the model. Times of ours are theirs + 1. A text-to-image model takes prompts by its
    `conditions`, see `diffusion.conditions.Prompts`.

    Args:
      folder: has model_index.json, or config.json and beside it, or in the folder scheduler next to it,
        scheduler_config.json; or the id of such a model on the Hugging Face Hub, as google/ddpm-cifar10-32, which is
        fetched with the package huggingface_hub.
      variant: of the weights, as fp16; "" for the full precision, or fp16 where there is nothing else.
      scheduler: a config, with its _class_name, in the place of the folder's.
      image_size: (height, width) of the images, where the network's config has none, or another one.
      dtype: "float32", or "bfloat16" for arithmetic and matrices of network and text encoder, in half the memory; an
        autoencoder is float32 in any case.
      loras: (file, scale) of LoRAs that are added to the network and to the text encoder, for all to be as if trained.

    Raises:
      InputError: there is no such folder, something in it is missing, damaged or not supported, and named.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; {nearest(str(dtype), DTYPES)}")
    name, folder = os.fspath(folder), folders.local(folder, variant)
    if not folders.is_folder(folder):
        raise InputError(
            f"{folder} is no folder of diffusers: it has neither {folders.INDEX} nor a {folders.CONFIG} with a "
            "_class_name"
        )
    if is_autoencoder(folder):
        folders.refuse_part(folder)
        raise InputError(f"{folder} holds an autoencoder alone, which draws no samples; `load_autoencoder` reads it")
    added = [lora.read(path, scale) for path, scale in loras]
    network = _network(folder, _size(folder, image_size))
    if network.text_width:  # without its text encoder it draws nothing
        folders.refuse_part(folder)
    network.fields["dtype"] = dtype
    sampling = _scheduler(folder, scheduler)
    whole = _whole_config(network, sampling)
    lora.unused(added, [lora.UNET] * (network.kind != TRANSFORMER) + [lora.TEXT] * (network.text_width > 0))
    text = None
    if network.text_width:
        text = load_text(folder, network.text_width, dtype, variant, added)
        text = dataclasses.replace(text, picture_channels=network.fields["picture_channels"])
    with readable(network.where):  # what is wrong with the network is said before its weights are read
        names = _class_names(folder, network.num_classes)
        model = make_model(whole, network.shape, names, text=text)
    autoencoder = _autoencoder(folder, network.shape, variant)
    if autoencoder is not None:
        shape, whole.latents = autoencoder.autoencoder.image_shape, name
        whole.data.size, whole.data.channels = shape[0], shape[2]
        model = dataclasses.replace(model, space=spaces.latents(autoencoder))
    like = jax.eval_shape(model.init, keys.make(0))
    weights = folders.open_weights(network.at, folders.count(jax.tree.leaves(like)), variant)
    weights = lora.merged(weights, lora.UNET, added)
    return Trained(model, network.read(weights, like, dtype), whole, 0, EMA)


class _Network(NamedTuple):
    """What a folder says of its network.

    Attributes:
      at: its folder.
      where: what errors call its config.
      kind: as config.network has it; its section has this name, too.
      fields: of that section, but for what the scheduler says of times.
      shape: (H, W, C) of its input.
      out_channels: of its output.
      num_classes, label_dropout: as config.model and config.train have them.
      read: (weights, the shapes of the parameters, dtype of matrices) -> the parameters.
      text_width: of the embeddings of texts that it is told; 0 for none.
    """

    at: Path
    where: str
    kind: str
    fields: dict[str, Any]
    shape: tuple[int, int, int]
    out_channels: int
    num_classes: int
    label_dropout: float
    read: Callable[[folders.Weights, Params, str], Params]
    text_width: int = 0


def _network(folder, size):
    """Returns the network of a folder; raises InputError where it is none that is supported."""
    kinds = {unet2d.CLASS: _unet, unet2d_condition.CLASS: _text_unet, **dict.fromkeys(dit.CLASSES, _transformer)}
    found = ""
    for name in ("transformer", "unet"):
        where = folders.part(folder, name) / folders.CONFIG
        if where.is_file():
            kind = folders.read_config(where)["_class_name"]
            if kind in kinds and (kind in dit.CLASSES) == (name == "transformer"):
                return kinds[kind](folder, size)
            found = found or f"{where}: {kind} is not supported"
    known = ", ".join([unet2d.CLASS, dit.CLASSES[0], unet2d_condition.CLASS])
    raise InputError(f"{found or f'{folder} holds no {where.relative_to(folder)} of a network'}; supported: {known}")


def _size(folder, image_size):
    """Returns the size of what the network of a folder sees, for images of a size; None for that of its config."""
    if image_size is None or not _has_autoencoder(folder):
        return image_size
    factor = autoencoder_factor(folder)
    if any(side < factor or side % factor for side in image_size):
        height, width = image_size
        near = " x ".join(str(max(1, round(side / factor)) * factor) for side in image_size)
        raise InputError(
            f"image_size is {height} x {width}; the autoencoder takes multiples of {factor} pixels: give {near}"
        )
    return tuple(side // factor for side in image_size)


def _read(folder, name, read_fields, image_size):
    """Returns (folder of a network, what errors call its config, fields of ours, arguments of its class, shape)."""
    at = folders.part(folder, name)
    where = str(at / folders.CONFIG)
    with readable(where):
        fields, found = read_fields(where, folders.read_config(at / folders.CONFIG))
        return at, where, fields, found, unet2d.image_shape(where, found, image_size)


def _unet(folder, image_size):
    at, where, fields, found, shape = _read(folder, "unet", unet2d.read_fields, image_size)
    null = unet2d.LABEL_DROPOUT in found
    classes = (found["num_class_embeds"] or 0) - null
    fields |= {"null_class": null or not classes}
    dropout = found[unet2d.LABEL_DROPOUT] if null else 0.0

    return _Network(at, where, UNET2D, fields, shape, found["out_channels"], classes, dropout, _read_unet)


def _text_unet(folder, image_size):
    at, where, fields, found, shape = _read(folder, "unet", unet2d_condition.read_fields, image_size)
    with readable(where):
        width = int(np.max(fields["cross_attention_dim"]))
        # An inpainting network sees, behind its latents, a mask and the latents of a picture.
        fields["picture_channels"] = out + 1 if shape[2] == 2 * (out := found["out_channels"]) + 1 else 0
        shape = (*shape[:2], shape[2] - fields["picture_channels"])
    # Texts were left out for a tenth of the images in its training.
    return _Network(at, where, UNET2D_CONDITION, fields, shape, found["out_channels"], 0, 0.1, _read_unet, width)


def _read_unet(weights, like, dtype):
    return to_params(weights, like, unet2d.name_of, dtype=dtype)


def _transformer(folder, image_size):
    at, where, fields, found, shape = _read(folder, "transformer", dit.read_fields, image_size)
    classes = found["num_embeds_ada_norm"]
    return _Network(at, where, TRANSFORMER, fields, shape, found["out_channels"], classes, 0.1, dit.read_params)


def _class_names(folder, num_classes):
    """Returns the names that a pipeline has for its classes, with the number where two have one name; or none."""
    if not (folder / folders.INDEX).is_file():
        return ()
    names = folders.read_config(folder / folders.INDEX).get("id2label")
    numbers = [str(number) for number in range(num_classes)]
    if not isinstance(names, dict) or not all(isinstance(names.get(number), str) for number in numbers):
        return ()
    times = Counter(names[number] for number in numbers)
    return tuple(names[number] if times[names[number]] == 1 else f"{names[number]} {number}" for number in numbers)


def _has_autoencoder(folder):
    """Tells whether a pipeline has an autoencoder; raises InputError where it names one that is not there."""
    index = folder / folders.INDEX
    named = folders.read_config(index) if index.is_file() else {}
    for name in ("vae", "vqvae"):
        if (folder / name).is_dir():
            return True
        if named.get(name):
            raise InputError(f"{index} names a {name}, which is not there; get the whole folder again")
    return False


def _autoencoder(folder, shape, variant):
    """Returns the autoencoder in whose latents a pipeline's network works, None for one of pixels."""
    if not _has_autoencoder(folder):
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
        places = [folders.part(folder, "scheduler")]
        if not (folder / folders.INDEX).is_file():
            places.append(folder.absolute().parent / "scheduler")
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


def _whole_config(network: _Network, sampling: Sampling) -> ConfigDict:
    """Returns the config that a run of this model would have, as far as the folder says it.

    Raises:
      InputError: the network's output has neither as many channels as its input nor twice as many.
    """
    (height, _, channels), out, classes = network.shape, network.out_channels, network.num_classes
    if out not in (channels, 2 * channels):
        raise InputError(
            f"{network.where}: out_channels is {out}, of {channels} in_channels; supported: as many, or twice as many"
        )
    fields = {**network.fields, "time_shift": sampling.time_shift}
    if network.kind in (UNET2D, UNET2D_CONDITION):
        fields["time_scale"] = sampling.time_scale
    if network.kind == UNET2D:
        fields["sigma_min"] = sampling.sigma_min
    elif sampling.sigma_min:
        raise InputError(f"{network.where}: a consistency model of this class is not supported; supported: UNet2DModel")
    labels = "folders" if classes else "none"
    return ConfigDict(
        {
            "latents": "",
            # Nothing in the folder says where its images are.
            "data": {"name": "images", "path": "", "split": "", "size": height, "channels": channels, "labels": labels},
            "schedule": sampling.schedule,
            "network": network.kind,
            "model": {"num_classes": classes, "out_channels": 0},
            network.kind: fields,
            "train": {
                "prediction": sampling.prediction,
                "objective": "simple" if out == channels else "hybrid",
                "label_dropout": network.label_dropout,
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
