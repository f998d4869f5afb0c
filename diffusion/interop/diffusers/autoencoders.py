"""Reads AutoencoderKL and VQModel of diffusers."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import keys
from diffusion.autoencoder import TrainedAutoencoder, make_autoencoder
from diffusion.errors import InputError
from diffusion.interop.diffusers import folders
from diffusion.interop.diffusers.state import LEAVES, Written, fields_of, require, to_params, to_tensors
from diffusion.records import readable
from diffusion.sealed import digest
from diffusion.types import Params

KL, VQ = "AutoencoderKL", "VQModel"

_SHARED = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 32,
    "force_upcast": True,
    "mid_block_add_attention": True,
}
DEFAULTS = {
    KL: {
        **_SHARED,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    # Published codebooks of 2022 lack the factor, and their latents are not scaled.
    VQ: {
        **_SHARED,
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
        "scaling_factor": 1.0,
        "norm_type": "group",
        "lookup_from_codebook": False,
    },
}
"""The arguments of the classes in diffusers 0.42 and their defaults."""

_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
}

_BLOCK = {"norm_1": "norm1", "norm_2": "norm2", "conv_1": "conv1", "conv_2": "conv2", "shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}


def is_autoencoder(folder: str | os.PathLike) -> bool:
    """Tells whether a folder holds an autoencoder alone, and not a pipeline or another network."""
    path = folders.local(folder, None)
    if not folders.is_folder(path) or (path / folders.INDEX).is_file():
        return False
    return folders.read_config(path / folders.CONFIG)["_class_name"] in DEFAULTS


def load_autoencoder(
    folder: str | os.PathLike, *, variant: str = "", image_size: tuple[int, int] | None = None
) -> TrainedAutoencoder:
    """Reads the autoencoder in a folder that diffusers' save_pretrained wrote, of its own or of a pipeline.

    Neither torch nor diffusers is needed. Its latents are scaled as its config says.

    Args:
      folder: has config.json, or has the folder vae or vqvae; or the id of such a model on the Hugging Face Hub.
      variant: of the weights, as fp16; "" for the full precision, or fp16 where there is nothing else.
      image_size: (height, width) of the images that it is for; None for those of its config.

    Raises:
      InputError: there is no such folder, something in it is missing, damaged or not supported, and named.
    """
    at = _part(folders.local(folder, variant))
    where, kind, found = _arguments(at)
    with readable(where, "autoencoder"):
        fields = read_fields(where, kind, found)
        size = image_size or found["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        shape = (height, width, found["in_channels"])
        autoencoder = make_autoencoder(fields, shape)
    like = jax.eval_shape(autoencoder.init, keys.make(0))
    params = _params(at, like, found, len(fields["channels"]), variant)
    whole = _whole_config(fields, shape)
    return TrainedAutoencoder(autoencoder, params, whole, 0, "published", digest(params))


def autoencoder_factor(folder: Path) -> int:
    """Returns how many times smaller the latents of a folder's autoencoder are, in height and in width."""
    where, _, found = _arguments(_part(folder))
    with readable(where, "autoencoder"):
        return 2 ** (len(found["block_out_channels"]) - 1)


def _arguments(at):
    """Returns (what errors call the config of an autoencoder, its class, the arguments of that)."""
    where = str(at / folders.CONFIG)
    config = folders.read_config(at / folders.CONFIG)
    kind = config["_class_name"]
    if kind not in DEFAULTS:
        raise InputError(f"{where}: {kind} is no autoencoder that is supported; supported: {', '.join(DEFAULTS)}")
    found = fields_of(where, config, DEFAULTS[kind])
    require(where, found, _SUPPORTED)
    return where, kind, found


def _part(folder):
    """Returns the folder of the autoencoder of a pipeline, or the folder itself."""
    return next((folder / name for name in ("vae", "vqvae") if (folder / name).is_dir()), folder)


def read_fields(where: str, kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section config.autoencoder for the arguments of a class; raises InputError for what it has not."""
    levels = len(found["block_out_channels"])
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(found[name]) != [block] * levels:
            raise InputError(f"{where}: {name} are {list(found[name])}; supported: {block} for each of {levels} levels")
    if found["out_channels"] != found["in_channels"]:
        raise InputError(f"{where}: out_channels is {found['out_channels']}; supported: as many as in_channels")
    return {
        "channels": tuple(found["block_out_channels"]),
        "num_blocks": found["layers_per_block"],
        "latent_channels": found["latent_channels"],
        "groups": found["norm_num_groups"],
        "attention": found["mid_block_add_attention"],
        "codes": found["num_vq_embeddings"] if kind == VQ else 0,
        "code_channels": (found["vq_embed_dim"] or found["latent_channels"]) if kind == VQ else 0,
        "dtype": "float32",
    }


def _params(at, like, found, levels, variant) -> Params:
    """Returns the parameters with the scaling of the config; a layer that the file lacks by its config is the identity.

    The scaling is (z - shift_factor) scaling_factor in both.
    """
    network = {name: part for name, part in like.items() if name != "scaling"}
    # Later text-to-image models have autoencoders without these layers.
    left_out = [part for part in ("quant_conv", "post_quant_conv") if found.get(f"use_{part}") is False]
    wanted = {name: part for name, part in network.items() if name not in left_out}
    weights = folders.open_weights(at, folders.count(jax.tree.leaves(wanted)), variant)
    params = to_params(weights, wanted, lambda path: name_of(path, levels))
    for name in left_out:
        width = network[name]["bias"].shape[0]
        params[name] = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    channels = like["scaling"]["shift"].shape
    shift, scale = found.get("shift_factor") or 0.0, found["scaling_factor"]
    params["scaling"] = {"shift": jnp.full(channels, shift), "scale": jnp.full(channels, scale)}
    return params


def write_autoencoder(trained: TrainedAutoencoder, shift: bool = False) -> Written:
    """Returns what an autoencoder is there, the inverse of `load_autoencoder`.

    Latents have one factor there. Where each channel has its own, a Gaussian's layers on both sides of the latents take
    the scaling in, and the factor is 1.

    Args:
      trained: the autoencoder.
      shift: whether its config may have a shift_factor, which the pipelines do not read.

    Raises:
      InputError: a codebook's latents are scaled by channel, which a VQModel cannot.
    """
    fields, (height, width, channels) = trained.config.autoencoder, trained.autoencoder.image_shape
    kind = VQ if fields.codes else KL
    moved, scaled = (np.asarray(trained.params["scaling"][name]) for name in ("shift", "scale"))
    params = {name: part for name, part in trained.params.items() if name != "scaling"}
    one = np.all(moved == moved[0]) and np.all(scaled == scaled[0])
    if not one or (moved[0] and not (shift and kind == KL)):
        if kind == VQ:
            raise InputError("the latents of this codebook are scaled by channel, for which VQModel has no field")
        params = _scaled_within(params, moved, scaled)
        moved, scaled = np.zeros(1), np.ones(1)
    config = {
        "_class_name": kind,
        **DEFAULTS[kind],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(fields.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(fields.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(fields.channels),
        "layers_per_block": fields.num_blocks,
        "latent_channels": fields.latent_channels,
        "norm_num_groups": fields.groups,
        "mid_block_add_attention": fields.attention,
        "sample_size": height if height == width else [height, width],
        "scaling_factor": float(str(scaled[0])),  # the shortest number that is this one in float32
    }
    if kind == VQ:
        config |= {"num_vq_embeddings": fields.codes, "vq_embed_dim": fields.code_channels or fields.latent_channels}
    elif moved[0]:
        config["shift_factor"] = float(str(moved[0]))
    levels = len(fields.channels)
    return Written(config, to_tensors(params, lambda path: name_of(path, levels), is_pixelwise))


def _scaled_within(params, shift, scale):
    """Returns parameters whose latents are scaled as they leave the encoder, and scaled back in the decoder."""
    before, after = (params[name] for name in ("quant_conv", "post_quant_conv"))
    both = np.concatenate([scale, np.ones_like(scale)])  # mean and log-variance
    bias = np.concatenate([(np.asarray(before["bias"])[: len(scale)] - shift) * scale, 2 * np.log(scale)])
    bias[len(scale) :] += np.asarray(before["bias"])[len(scale) :]
    quant = {"kernel": np.asarray(before["kernel"]) * both, "bias": bias}
    kernel = np.asarray(after["kernel"])
    back = {"kernel": kernel / scale[:, None], "bias": np.asarray(after["bias"]) + shift @ kernel}
    arrays = jax.tree.map(lambda array: np.asarray(array, np.float32), {"quant_conv": quant, "post_quant_conv": back})
    return {**params, **arrays}


def _whole_config(fields: Mapping[str, Any], shape: tuple[int, int, int]) -> ConfigDict:
    """Returns the config that a run of this autoencoder would have, as far as the folder says it."""
    objective = "vq_autoencoder" if fields["codes"] else "kl_autoencoder"
    return ConfigDict(
        {
            "latents": "",
            "data": {"name": "images", "path": "", "split": "", "size": shape[0], "channels": shape[2]},
            "schedule": "linear",
            "network": "unet",
            "model": {"num_classes": 0},
            "autoencoder": dict(fields),
            "train": {"prediction": "eps", "objective": objective, "label_dropout": 0.0, "ema_decays": ()},
            "sample": {"sampler": "ddim", "steps": 25, "tau": "uniform", "clip": ""},
        }
    )


def name_of(path: tuple[str, ...], levels: int) -> str:
    """Returns what a parameter of `AutoencoderNetwork` is called in a file; levels is how many it has."""
    *layers, leaf = path
    if layers[0] == "quantizer":
        return "quantize.embedding.weight"
    if layers[0] in ("quant_conv", "post_quant_conv"):
        return f"{layers[0]}.{LEAVES[leaf]}"
    side, first, *rest = layers
    return ".".join([side, *_layer(first, rest, levels), LEAVES[leaf]])


def _layer(first, rest, levels):
    """Returns the parts of the name of a layer of the encoder or the decoder."""
    if first == "middle":
        if rest[0] == "attention":
            return ["mid_block.attentions.0", _ATTENTION[rest[1]]]
        return ["mid_block.resnets", rest[0].removeprefix("block_"), _BLOCK[rest[1]]]
    match = re.fullmatch(r"(down|up)_(\d+)_(?:block_(\d+)|downsample|upsample)", first)
    if match is None:
        return [{"norm_out": "conv_norm_out"}.get(first, first)]
    way, level, block = match.groups()
    number = int(level) if way == "down" else levels - 1 - int(level)  # theirs are listed deepest first
    if block is None:
        return [f"{way}_blocks.{number}.{way}samplers.0.conv"]
    return [f"{way}_blocks.{number}.resnets.{block}", _BLOCK[rest[0]]]


def is_pixelwise(name: str) -> bool:
    """Tells whether a tensor is a convolution of one pixel there and a dense layer here."""
    return bool(re.search(r"(^|\.)(conv_shortcut|quant_conv|post_quant_conv)\.weight$", name))
