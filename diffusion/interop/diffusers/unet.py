"""Says which UNet2DModel of diffusers computes what a `diffusion.models.UNet` computes, and with which parameters."""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError
from diffusion.interop.diffusers.unet2d import DEFAULTS
from diffusion.models.layers import num_groups
from diffusion.types import Params

_BLOCK = {"norm_1": "norm1", "norm_2": "norm2", "conv_1": "conv1", "conv_2": "conv2"}
_BLOCK |= {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out_0"}
_ENDS = {"norm_out": "conv_norm_out", "class": "class_embedding", "conv_in": "conv_in", "conv_out": "conv_out"}


def fields_and_params(
    config: Mapping[str, Any], params: Params, image_shape: tuple[int, int, int]
) -> tuple[dict[str, Any], Params]:
    """Returns (fields of `models.UNet2D`, its parameters) for a network of config.model.

    Raises:
      InputError: no UNet2DModel computes the same; the field and a remedy are named.
    """
    levels = [config["width"] * m for m in config["multipliers"]]
    attending = [image_shape[0] >> i in config["attention_resolutions"] for i in range(len(levels))]
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attending]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attending)]
    fields = {
        **{name: value for name, value in DEFAULTS.items() if value is not None},
        "block_out_channels": tuple(levels),
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "layers_per_block": config["num_blocks"],
        "downsample_padding": 0,
        "attention_head_dim": _head_dim(config, levels, attending),
        "norm_num_groups": _groups(config, levels),
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "dropout": config["dropout"],
        "null_class": True,
    }
    if config["num_blocks"] < 1:
        raise InputError(f"config.model.num_blocks is {config['num_blocks']}; UNet2DModel has at least 1")
    ours = flax.traverse_util.flatten_dict(params)
    theirs = {_path(path, len(levels)): _leaf(path, np.asarray(leaf)) for path, leaf in ours.items()}
    kernel = ("time_embedding", "linear_1", "kernel")
    theirs[kernel] = told_earlier(theirs[kernel], -1.0)  # it is told t - 1
    return fields, flax.traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in theirs.items()})


def _groups(config, levels):
    """Returns how many groups all norms have, or raises InputError where they differ."""
    found = sorted({num_groups(width) for width in (*levels, *_joined(config, levels))})
    if len(found) > 1:
        raise InputError(
            f"config.model.width={config['width']} with multipliers {tuple(config['multipliers'])} makes norms of "
            f"{', '.join(map(str, found))} groups, and UNet2DModel has one number for all; take a width that is a "
            "multiple of 128, or train with config.network=unet2d"
        )
    return found[0]


def _joined(config, levels):
    """Returns the channels that the blocks on the way up begin with."""
    kept = [levels[0]]
    for i, width in enumerate(levels):
        kept += [width] * (config["num_blocks"] + (i < len(levels) - 1))
    found, h = [], levels[-1]
    for width in reversed(levels):
        for _ in range(config["num_blocks"] + 1):
            found.append(h + kept.pop())
            h = width
    return found


def _head_dim(config, levels, attending):
    """Returns the channels of a head, 0 for one head; raises InputError where levels would need several numbers."""
    heads = config["num_heads"]
    if heads == 1:
        return 0
    found = {width // heads for width, attends in zip(levels, attending, strict=True) if attends} | {
        levels[-1] // heads
    }
    if len(found) > 1:
        raise InputError(
            f"config.model.num_heads is {heads} in levels of different channels, and UNet2DModel has heads of one "
            "size; train with config.network=unet2d"
        )
    return found.pop()


def _path(path, levels):
    """Returns where a parameter of `models.UNet` is in `models.UNet2D`."""
    first, *rest = path
    if first in _ENDS:
        return (_ENDS[first], *rest)
    if match := re.fullmatch(r"time_([12])", first):
        return ("time_embedding", f"linear_{match[1]}", *rest)
    if match := re.fullmatch(r"middle_block_([01])", first):
        return ("mid_block", f"resnets_{match[1]}", _BLOCK[rest[0]], *rest[1:])
    if first == "middle_attention":
        return ("mid_block", "attentions_0", _ATTENTION[rest[0]], *rest[1:])
    way, level, kind = re.fullmatch(r"(down|up)_(\d+)_(.+)", first).groups()
    number = int(level) if way == "down" else levels - 1 - int(level)  # theirs are listed deepest first
    block = f"{way}_blocks_{number}"
    if kind in ("downsample", "upsample"):
        return (block, f"{way}samplers_0", "conv", *[part for part in rest if part != "conv"])
    index = re.fullmatch(r"block_(\d+)(_attention)?", kind)
    if index[2]:
        return (block, f"attentions_{index[1]}", _ATTENTION[rest[0]], *rest[1:])
    return (block, f"resnets_{index[1]}", _BLOCK[rest[0]], *rest[1:])


def _leaf(path, array):
    """Returns a parameter as it is there: the shortcut is a convolution of one pixel."""
    return array[None, None] if path[-2] == "shortcut" and path[-1] == "kernel" else array


def told_earlier(kernel: Any, less: float) -> Any:
    """Returns the layer behind sines and cosines that does with those of t what this one does with those of t - less.

    sin((t - d) f) = cos(d f) sin(t f) - sin(d f) cos(t f), and the cosine likewise.

    Args:
      kernel: [features, width], for sines at frequencies from 1 to 1e-4 and then cosines.
      less: d.
    """
    half = len(kernel) // 2
    angles = less * np.exp(-np.log(10000.0) * np.arange(half) / (half - 1))[:, None]
    sines, cosines = np.float64(kernel[:half]), np.float64(kernel[half:])
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([cos * sines + sin * cosines, cos * cosines - sin * sines]).astype(np.float32)
