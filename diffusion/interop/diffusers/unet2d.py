"""Says what a config of UNet2DModel is here, and what its tensors are called."""

import re
from collections.abc import Mapping
from typing import Any

from diffusion.errors import InputError
from diffusion.interop.diffusers.state import LEAVES, fields_of, require

CLASS, VERSION = "UNet2DModel", "0.42.0"
"""The class, and the version of diffusers whose fields these are."""

DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""The arguments of the class in diffusers 0.42 and their defaults."""

_NOT_FIELDS = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "_label_dropout")
"""Those that are no field of `UNet2D`: the images and the classes say them."""

_NULL = {"time_embedding_dim": 0, "mid_block_type": "", "attention_head_dim": 0, "norm_num_groups": 0}
_NULL |= {"attn_norm_num_groups": 0, "class_embed_type": "", "num_train_timesteps": 0, "downsample_type": "conv"}
_NULL |= {"upsample_type": "conv"}
"""What null is here."""

_NULLABLE = ("time_embedding_dim", "mid_block_type", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups")
_NULLABLE += ("class_embed_type", "num_train_timesteps")
"""Those that are null there where they are 0 or "" here."""

_FLOATS = ("mid_block_scale_factor", "norm_eps", "dropout")


def read_fields(where: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (fields of `models.UNet2D`, all arguments) of a config.

    Raises:
      InputError: an unknown field or value, which is named.
    """
    found = fields_of(where, config, DEFAULTS)
    found |= {LABEL_DROPOUT: float(config[LABEL_DROPOUT])} if LABEL_DROPOUT in config else {}
    require(where, found, {"mid_block_type": ("UNetMidBlock2D", None)})
    if found["class_embed_type"] is not None:
        found["num_class_embeds"] = None  # the class reads it only where there is no type
    fields = {name: value for name, value in found.items() if name not in _NOT_FIELDS}
    fields = {name: _NULL.get(name, value) if value is None else value for name, value in fields.items()}
    fields |= {name: float(fields[name]) for name in _FLOATS}
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return fields, found


LABEL_DROPOUT = "_label_dropout"
"""What a config of ours says besides: that the last class means "no class", and how often it was trained.

diffusers leaves fields alone whose names begin with "_".
"""


def write_config(fields: Mapping[str, Any], config: Any, shape: tuple[int, int, int], variance: bool) -> dict[str, Any]:
    """Returns the config of a network, the inverse of `read_fields`.

    Args:
      fields: of `models.UNet2D`.
      config: the whole config of the run.
      shape: (H, W, C) of the images.
      variance: whether the network also predicts its variance.
    """
    num_classes, null = config.model.num_classes, fields["null_class"]
    theirs = {name: value for name, value in fields.items() if name in DEFAULTS}
    theirs = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
    theirs |= {name: None for name in _NULLABLE if not theirs.get(name)}
    height, width, channels = shape
    classes = num_classes + bool(null) if num_classes else None
    return {
        "_class_name": CLASS,
        **theirs,
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * (2 if variance else 1),
        "num_class_embeds": classes,
        **({LABEL_DROPOUT: config.train.label_dropout} if classes and null else {}),
    }


def image_shape(where: str, found: Mapping[str, Any], image_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Returns (H, W, C) of the images of a network; raises InputError where neither config nor argument says it."""
    size = found["sample_size"] if image_size is None else image_size
    if size is None:
        raise InputError(f"{where}: sample_size is null; give image_size, as (32, 32)")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, found["in_channels"]


def name_of(path: tuple[str, ...]) -> str:
    """Returns what a parameter of `models.UNet2D` or `UNet2DCondition` is called in a file."""
    if path == ("time_proj",):
        return "time_proj.weight"
    numbered = r"(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|to_out|transformer_blocks|net)_(\d+)"
    *layers, leaf = path
    return ".".join([*(re.sub(f"^{numbered}$", r"\1.\2", layer) for layer in layers), LEAVES[leaf]])
