"""Defines the UNet of Stable Diffusion 1.x and 2.x, UNet2DConditionModel, block by block and under its names of fields.

Layers are called as in their files, with "_" for "."; see `diffusion.models.unet2d`.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from diffusion.errors import InputError, nearest, require_range
from diffusion.models.checks import check_choices, check_input
from diffusion.models.deep import reused
from diffusion.models.layers import DTYPES, ZERO, Conv, GroupNorm
from diffusion.models.unet2d_blocks import ACTIVATIONS, Style
from diffusion.models.unet2d_cross import CrossDownBlock, CrossMiddleBlock, CrossUpBlock
from diffusion.models.unet2d_times import TimeEmbedding, positional_features

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
"""The types of blocks by the names that diffusers has for them, and whether they see the text."""

MIDDLE = ("UNetMidBlock2DCrossAttn", "")

_LEVELS = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "cross_attention_dim")
"""The fields that are one number for all levels, or one for each."""


class UNet2DCondition(nn.Module):
    """Predicts what a `diffusion.models.UNet` predicts, told a text, with the layers of UNet2DConditionModel.

    Fields have the names that diffusers gives them; where it has null, this has 0 or "".

    Attributes:
      block_out_channels: channels of each level; from level to level the image halves.
      down_block_types, up_block_types: keys of `DOWN` and `UP`, one a level; up, the deepest first.
      mid_block_type: one of `MIDDLE`.
      layers_per_block: residual blocks on the way down, one number or one a level; the way up has one more.
      transformer_layers_per_block: transformer blocks behind a residual block; one number or one a level.
      attention_head_dim: the NUMBER of heads, whatever its name says; one number or one a level.
      cross_attention_dim: width of the text's embeddings; one number or one a level, all the same.
      mid_block_scale_factor: what the sums of the middle are divided by.
      downsample_padding: of the convolution that halves; 0 pads right and below only.
      act_fn: a key of `unet2d_blocks.ACTIVATIONS`.
      norm_num_groups, norm_eps: of the norms.
      resnet_time_scale_shift: default or scale_shift: whether the time is added, or scales and shifts a norm.
      time_embedding_dim: width of the embedding; 0 for four times the first channels.
      freq_shift, flip_sin_to_cos: which frequencies the embedding has, and whether cosines come first.
      center_input_sample: whether x is taken to be in [0, 1], and scaled to [-1, 1].
      time_scale, time_shift: the network is told time_scale t + time_shift. Theirs counts from 0, hence the -1.
      out_channels: of the prediction; 0 for as many as the input has.
      picture_channels: of the picture that an inpainting network is told besides the text; 0 for any other network.
      dropout: rate inside the residual blocks, used only where dropout_keys are given.
      dtype: "float32" or "bfloat16" for the arithmetic; the statistics of norms and of attention are float32.
      sees_end, sees_scale: must be False; this network is told neither.
    """

    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    layers_per_block: int | Sequence[int] = 2
    transformer_layers_per_block: int | Sequence[int] = 1
    attention_head_dim: int | Sequence[int] = 8
    cross_attention_dim: int | Sequence[int] = 768
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int = 0
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    center_input_sample: bool = False
    time_scale: float = 1.0
    time_shift: float = -1.0
    out_channels: int = 0
    picture_channels: int = 0
    dropout: float = 0.0
    dtype: str = "float32"
    sees_end: bool = False
    sees_scale: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, "B"] | Int[Array, "B"],
        cond: Float[Array, "B M D"] | tuple[Float[Array, "B M D"], Float[Array, "B H W P"]] | None = None,
        *,
        dropout_keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B H W out_channels"]:
        """Returns the prediction in float32.

        Args:
          x: noisy images.
          t: timesteps in 1..T, whole or real.
          cond: embeddings of the tokens of a text, of width cross_attention_dim; for an inpainting network
            (embeddings, picture), see `diffusion.spaces.with_hole`.
          dropout_keys: typed JAX keys in training, one for each sample; None for no dropout.
        """
        self._check(x, t)
        dtype, style = DTYPES[self.dtype], self._style()
        text, picture = self._told(cond, x)
        context = self._context(text, len(x)).astype(dtype)
        told = (self._embed(self.time_scale * t.astype(jnp.float32) + self.time_shift, dtype), dropout_keys)
        numbers = itertools.count()  # of the residual blocks; dropout masks differ by this number
        levels = list(zip(self.block_out_channels, *map(self._by_level, _LEVELS[:3]), strict=True))
        last = len(levels) - 1

        # The way down: every result is kept, for the way up to use at the same resolution.
        h = jnp.concatenate([x, *picture], axis=-1)
        h = (2 * h - 1 if self.center_input_sample else h).astype(dtype)
        h = Conv(self.block_out_channels[0], dtype=dtype, name="conv_in")(h)
        kept = [h]
        for i, (kind, (features, layers, depth, heads)) in enumerate(zip(self.down_block_types, levels, strict=True)):
            fields = (features, layers, depth * DOWN[kind], heads, i < last, style)
            h, results = CrossDownBlock(*fields, name=f"down_blocks_{i}")(h, context, told, numbers)
            kept += results

        if self.mid_block_type:
            _, _, depth, heads = levels[-1]
            fields = (depth, heads, self.mid_block_scale_factor, style)
            h = CrossMiddleBlock(*fields, name="mid_block")(h, context, told, numbers)

        # The way up: each residual block takes the newest result that is still kept.
        for i, (kind, level) in enumerate(zip(self.up_block_types, reversed(levels), strict=True)):
            features, layers, depth, heads = level
            block = CrossUpBlock(features, depth * UP[kind], heads, i < last, style, name=f"up_blocks_{i}")
            h = reused(self, h) if i == last > 0 else h  # of all levels below the outermost
            h = block(h, [kept.pop() for _ in range(layers + 1)], context, told, numbers)

        # The last convolution starts at zero, so an untrained network predicts zero.
        norm = GroupNorm(groups=self.norm_num_groups, epsilon=self.norm_eps, name="conv_norm_out")
        out_channels = self.out_channels or x.shape[-1]
        out = Conv(out_channels, dtype=dtype, kernel_init=ZERO, name="conv_out")(ACTIVATIONS[self.act_fn](norm(h)))
        return out.astype(jnp.float32)

    def _by_level(self, name):
        """Returns a field as one number for each level."""
        value = getattr(self, name)
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)

    def _style(self):
        """Returns what all residual blocks have in common."""
        return Style(
            layers=0,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
            act=self.act_fn,
            head_dim=0,
            padding=self.downsample_padding,
            down="conv",
            up="conv",
            dropout=self.dropout,
            dtype=DTYPES[self.dtype],
        )

    def _embed(self, time, dtype):
        """Returns the embedding of the time [B, width]."""
        channels = self.block_out_channels[0]
        features = positional_features(time, channels, self.flip_sin_to_cos, self.freq_shift)
        width = self.time_embedding_dim or 4 * channels
        act = ACTIVATIONS[self.act_fn]
        return TimeEmbedding(width, dtype, act, name="time_embedding")(features.astype(dtype))

    def _told(self, cond, x):
        """Returns (the text of cond, a list with its picture or nothing); raises InputError where that is missing."""
        if not self.picture_channels:
            return cond, []
        shape = (*x.shape[:3], self.picture_channels)
        if cond is None and self.is_initializing():
            return None, [jnp.zeros(shape)]
        if not isinstance(cond, tuple) or len(cond) != 2 or jnp.shape(cond[1]) != shape:
            raise InputError(
                f"cond of this inpainting network must be (embeddings of texts, a picture of shape {shape}): "
                "diffusion.spaces.with_hole makes that picture"
            )
        return cond[0], [cond[1]]

    def _context(self, cond, count):
        """Returns the text's embeddings, or raises InputError where there are none or they have another width."""
        width = self._by_level("cross_attention_dim")[0]
        if cond is None and self.is_initializing():
            return jnp.zeros((count, 1, width))
        if cond is None or jnp.ndim(cond) != 3 or cond.shape[0] != count or cond.shape[2] != width:
            found = "None" if cond is None else f"of shape {jnp.shape(cond)}"
            raise InputError(
                f"cond is {found}; this network is told a text, as embeddings [{count}, tokens, {width}]: "
                "model.conditions.encode(texts) makes them"
            )
        return cond

    def _check(self, x, t):
        """Raises InputError if the fields allow no network, or x or t does not suit it."""
        name, levels = "unet2d_condition", len(self.block_out_channels)
        choices = {"dtype": DTYPES, "act_fn": ACTIVATIONS, "resnet_time_scale_shift": ("default", "scale_shift")}
        check_choices(self, name, choices | {"mid_block_type": MIDDLE})
        for field, known in (("down_block_types", DOWN), ("up_block_types", UP)):
            kinds = getattr(self, field)
            if wrong := [kind for kind in kinds if kind not in known]:
                raise InputError(f"{name}.{field} has {wrong[0]!r}; {nearest(str(wrong[0]), known)}")
            if not levels or len(kinds) != levels:
                raise InputError(f"{name}.{field} has {len(kinds)} entries for {levels} block_out_channels")
        for field in _LEVELS:
            values = self._by_level(field)
            if len(values) != levels or not all(isinstance(value, int) and value >= 1 for value in values):
                raise InputError(f"{name}.{field} is {getattr(self, field)}; give one number from 1, or {levels}")
        if len(set(self._by_level("cross_attention_dim"))) > 1:
            raise InputError(f"{name}.cross_attention_dim is {self.cross_attention_dim}; a text has one width")
        self._check_numbers()
        check_input(self, name, x, t)

    def _check_numbers(self):
        """Raises InputError if a number is out of its range, or channels are no multiples of groups or heads."""
        name = "unet2d_condition"
        require_range(f"{name}.norm_num_groups", self.norm_num_groups, 1)
        require_range(f"{name}.downsample_padding", self.downsample_padding, 0)
        require_range(f"{name}.picture_channels", self.picture_channels, 0)
        for width, heads in zip(self.block_out_channels, self._by_level("attention_head_dim"), strict=True):
            require_range(f"{name}.block_out_channels", width, 4)
            if width % self.norm_num_groups or width % heads:
                raise InputError(
                    f"{name} has a level of {width} channels; that must be a multiple of norm_num_groups, "
                    f"{self.norm_num_groups}, and of its attention_head_dim, {heads} heads"
                )
        if self.block_out_channels[0] // 2 <= self.freq_shift:
            raise InputError(f"{name}.freq_shift is {self.freq_shift}; it must be below half of the first channels")
