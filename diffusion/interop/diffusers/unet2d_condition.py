"""Says what a config of UNet2DConditionModel is here; its tensors are called as those of UNet2DModel."""

from collections.abc import Mapping
from typing import Any

from diffusion.interop.diffusers.state import fields_of, require

CLASS = "UNet2DConditionModel"

DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
}
"""The arguments of the class in diffusers 0.42 that are fields here, and their defaults."""

_SUPPORTED = {
    # Attention's softmax is float32 here in any case, and a layer of attention is a dense one or a convolution alike.
    "upcast_attention": (False, True, None),
    "use_linear_projection": (False, True),
    "only_cross_attention": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0, 1),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False, None),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}
"""Its other arguments, and the values that are supported."""

_FLOATS = ("mid_block_scale_factor", "norm_eps", "dropout")

_NOT_FIELDS = ("sample_size", "in_channels", "out_channels")


def read_fields(where: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (fields of `models.UNet2DCondition`, all arguments) of a config.

    Raises:
      InputError: an unknown field or value, which is named.
    """
    found = fields_of(where, config, DEFAULTS | {name: values[0] for name, values in _SUPPORTED.items()})
    require(where, found, _SUPPORTED)
    require(where, found, {"mid_block_type": ("UNetMidBlock2DCrossAttn", None)})
    fields = {name: found[name] for name in DEFAULTS if name not in _NOT_FIELDS}
    fields |= {"mid_block_type": found["mid_block_type"] or "", "time_embedding_dim": found["time_embedding_dim"] or 0}
    fields |= {name: float(fields[name]) for name in _FLOATS}
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return fields, found
