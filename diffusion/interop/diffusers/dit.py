"""Says what a config of DiTTransformer2DModel is here, and what its tensors are called."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError
from diffusion.interop.diffusers.folders import Weights
from diffusion.interop.diffusers.state import LEAVES, Written, fields_of, require, to_params, to_tensors
from diffusion.interop.diffusers.unet import told_earlier
from diffusion.types import Params

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""What the class is called, and what it was called in 2023, as one with many other uses."""

DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
"""The arguments of the class in diffusers 0.42 and their defaults."""

_OTHER_USES = {"cross_attention_dim": None, "double_self_attention": False, "num_vector_embeds": None}
_OTHER_USES |= {"only_cross_attention": False, "use_linear_projection": False}
"""Arguments of the earlier class that ask for other networks than DiT's."""

_SUPPORTED = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    **{name: (value,) for name, value in _OTHER_USES.items()},
}

_TOLD = "transformer_blocks.0.norm1.emb"
"""Each block stores the embedder of times and classes anew."""

_ENDS = {
    "time_1": f"{_TOLD}.timestep_embedder.linear_1",
    "time_2": f"{_TOLD}.timestep_embedder.linear_2",
    "class": f"{_TOLD}.class_embedder.embedding_table",
    "patches": "pos_embed.proj",
    "modulation": "proj_out_1",
    "out": "proj_out_2",
}
_BLOCK = {"query": "attn1.to_q", "key": "attn1.to_k", "value": "attn1.to_v", "attention_out": "attn1.to_out.0"}
_BLOCK |= {"modulation": "norm1.linear", "mlp_1": "ff.net.0.proj", "mlp_2": "ff.net.2"}

NULL = 1000
"""The label that means no class in DiTPipeline."""

_WRITTEN = (("mlp_ratio", 4), ("qk_norm", False))
"""The values of fields that DiTTransformer2DModel has."""

_COPY = re.compile(r"transformer_blocks\.([1-9]\d*)(\.norm1\.emb\..+)")


def read_fields(where: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (fields of `models.Transformer`, all arguments) of a config.

    Raises:
      InputError: an unknown field or value, which is named.
    """
    found = fields_of(where, config, {**DEFAULTS, **_OTHER_USES})
    require(where, found, _SUPPORTED)
    if not found["num_embeds_ada_norm"]:
        raise InputError(f"{where}: num_embeds_ada_norm is null, which is not supported; DiT has classes")
    heads = found["num_attention_heads"]
    fields = {
        "patch": found["patch_size"],
        "width": heads * found["attention_head_dim"],
        "depth": found["num_layers"],
        "num_heads": heads,
        "mlp_ratio": 4.0,
        "qk_norm": False,
        "dropout": float(found["dropout"]),
        "remat": "none",
    }
    found["out_channels"] = found["out_channels"] or found["in_channels"]
    return fields, found


def name_of(path: tuple[str, ...]) -> str:
    """Returns what a parameter of `models.Transformer` is called in a file."""
    first, *rest, leaf = path
    if first in _ENDS:
        return f"{_ENDS[first]}.{LEAVES[leaf]}"
    return f"transformer_blocks.{first.removeprefix('block_')}.{_BLOCK[rest[0]]}.{LEAVES[leaf]}"


def read_params(weights: Weights, like: Params, dtype: str = "float32") -> Params:
    """Returns the parameters of `models.Transformer`, matrices in dtype.

    Raises:
      InputError: blocks with different embedders, or as `to_params`.
    """
    for name in weights.shapes:
        copy = _COPY.fullmatch(name)
        first = f"transformer_blocks.0{copy[2]}" if copy else name
        if first != name and not (first in weights.shapes and np.array_equal(weights.read(name), weights.read(first))):
            raise InputError(f"{weights.where}: {name} differs from {first}; DiT has one embedder for all blocks")

    def ignored(name):
        return bool(_COPY.fullmatch(name)) or name == "pos_embed.pos_embed"

    params = to_params(_cut(weights), like, name_of, ignored, dtype)
    params["time_1"]["kernel"] = _other_half_first(params["time_1"]["kernel"])
    return params


def _other_half_first(kernel):
    """Returns the layer behind cosines and then sines, as they are there, of one behind sines and then cosines."""
    return jnp.roll(kernel, len(kernel) // 2, axis=0)


def write(fields: Mapping[str, Any], params: Params, shape: tuple[int, int, int], num_classes: int) -> Written:
    """Returns what a network is there, the inverse of `read_fields` and `read_params`.

    Args:
      fields: of `models.Transformer`.
      params: its parameters.
      shape: (h, w, C) of the latents.
      num_classes: how many it has.

    Raises:
      InputError: DiTTransformer2DModel or its pipeline has no network like this; the field is named.
    """
    height, width, channels = shape
    wrong = [(f"config.transformer.{name}", fields[name], value) for name, value in _WRITTEN if fields[name] != value]
    wrong += [("config.model.num_classes", num_classes, NULL)] * (num_classes != NULL)
    wrong += [("the width of the latents", width, height)] * (width != height)
    if wrong or fields["time_shift"] not in (0, -1):
        name, found, wanted = (wrong or [("config.transformer.time_shift", fields["time_shift"], "0 or -1")])[0]
        raise InputError(f"{name} is {found}; DiTPipeline of diffusers takes {wanted} only")
    heads, out = fields["num_heads"], params["out"]["bias"].size // fields["patch"] ** 2
    config = {
        "_class_name": CLASSES[0],
        **DEFAULTS,
        "num_attention_heads": heads,
        "attention_head_dim": fields["width"] // heads,
        "in_channels": channels,
        "out_channels": out,
        "num_layers": fields["depth"],
        "dropout": fields["dropout"],
        "sample_size": height,
        "patch_size": fields["patch"],
        "num_embeds_ada_norm": num_classes,
    }
    kernel = params["time_1"]["kernel"]
    if not fields["time_shift"]:  # times are told from 0 there
        kernel = told_earlier(kernel, -1.0)
    params = {**params, "time_1": {**params["time_1"], "kernel": _other_half_first(kernel)}}
    tensors = to_tensors(params, name_of)
    cut = f"{_ENDS['patches']}.weight"
    patches = tensors[cut].reshape(-1, fields["patch"], fields["patch"], channels)
    tensors[cut] = np.ascontiguousarray(patches.transpose(0, 3, 1, 2))
    for name in [name for name in tensors if name.startswith(_TOLD)]:
        copies = (name.replace("blocks.0.", f"blocks.{block}.") for block in range(1, fields["depth"]))
        tensors |= dict.fromkeys(copies, tensors[name])
    return Written(config, tensors)


def _cut(weights):
    """Returns weights in which the convolution that cuts an image into patches is a dense layer of a patch."""
    name = f"{_ENDS['patches']}.weight"
    shape = weights.shapes.get(name, ())
    if len(shape) != 4:
        return weights
    shapes = {**weights.shapes, name: (shape[0], int(np.prod(shape[1:])))}

    def read(wanted):
        array = weights.read(wanted)
        return array.transpose(0, 2, 3, 1).reshape(len(array), -1) if wanted == name else array

    return Weights(weights.where, shapes, read)
