"""Defines the UNet of published diffusers folders, UNet2DModel, block by block and under its names of fields.

Layers are called as in their files, with "_" for ".": down_blocks_0/resnets_1/norm1 is down_blocks.0.resnets.1.norm1.
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
from diffusion.models.unet2d_blocks import ACTIVATIONS, DOWN, UP, DownBlock, MiddleBlock, Style, UpBlock, plain_name
from diffusion.models.unet2d_times import TimeEmbedding, fourier_features, positional_features, with_boundary

_LOWEST = {"layers_per_block": 1, "downsample_padding": 0, "attention_head_dim": 0, "sigma_min": 0}

TIME_TYPES = ("positional", "fourier", "learned")
CLASS_TYPES = ("", "timestep", "identity")


class UNet2D(nn.Module):
    """Predicts what a `diffusion.models.UNet` predicts, with the layers of UNet2DModel in diffusers.

    Fields have the names that diffusers gives them; where it has null, this has 0 or "".

    Attributes:
      block_out_channels: channels of each level; from level to level the image halves.
      down_block_types, up_block_types: keys of `unet2d_blocks.DOWN` and `UP`, one a level; up, the deepest first.
      mid_block_type: UNetMidBlock2D, or "" for none.
      add_attention: whether the middle has attention.
      layers_per_block: residual blocks in each level on the way down; the way up has one more.
      mid_block_scale_factor: what the sums of the middle are divided by.
      downsample_padding: of the convolution that halves; 0 pads right and below only.
      downsample_type, upsample_type: conv or resnet, of the blocks with attention.
      act_fn: a key of `unet2d_blocks.ACTIVATIONS`.
      attention_head_dim: channels of a head; 0 for one head.
      norm_num_groups: groups of the norms; 0 for a quarter of the channels, at most 32.
      attn_norm_num_groups: groups before the attention of the middle; 0 for norm_num_groups, or for no norm where
        resnet_time_scale_shift is scale_shift.
      norm_eps: of the norms.
      resnet_time_scale_shift: default or scale_shift: whether the time is added, or scales and shifts a norm.
      time_embedding_type: positional, fourier (of the log of the time, which then divides the output) or learned.
      time_embedding_dim: width of the embedding; 0 for four times the first channels.
      freq_shift, flip_sin_to_cos: which frequencies the positional embedding has, and whether cosines come first.
      num_train_timesteps: rows of a learned embedding.
      center_input_sample: whether x is taken to be in [0, 1], and scaled to [-1, 1].
      class_embed_type: "" for labels; timestep for real numbers [B]; identity for vectors [B, time_embedding_dim].
      num_classes: of the labels; 0 for a network that is told none.
      null_class: whether the label num_classes means "no class"; published networks have no such label.
      time_scale, time_shift: the network is told time_scale t + time_shift. Theirs counts from 0, hence the -1.
      sigma_min: of a consistency model, which returns its input at this noise; 0 for any other. Then t is log(sigma) /
        4 and x scaled, as for prediction edm, and the output is EDM's F of the estimate that such a model makes.
      out_channels: of the prediction; 0 for as many as the input has.
      dropout: rate inside the residual blocks, used only where dropout_keys are given.
      dtype: "float32" or "bfloat16" for the arithmetic; parameters and normalisation stay in float32.
      sees_end, sees_scale: must be False; UNet2DModel is told neither.
    """

    block_out_channels: Sequence[int] = (128, 256, 256, 256)
    down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_block_types: Sequence[str] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    mid_block_type: str = "UNetMidBlock2D"
    add_attention: bool = True
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    act_fn: str = "silu"
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int = 0
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    time_embedding_type: str = "positional"
    time_embedding_dim: int = 0
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    num_train_timesteps: int = 0
    center_input_sample: bool = False
    class_embed_type: str = ""
    num_classes: int = 0
    null_class: bool = True
    time_scale: float = 1.0
    time_shift: float = -1.0
    sigma_min: float = 0.0
    out_channels: int = 0
    dropout: float = 0.0
    dtype: str = "float32"
    sees_end: bool = False
    sees_scale: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, "B"] | Int[Array, "B"],
        cond: Int[Array, "B"] | Float[Array, "B"] | Float[Array, "B D"] | None = None,
        *,
        dropout_keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B H W out_channels"]:
        """Returns the prediction in float32.

        Args:
          x: noisy images.
          t: timesteps in 1..T, whole or real; a learned embedding takes the nearest.
          cond: see `class_embed_type`.
          dropout_keys: typed JAX keys in training, one for each sample; None for no dropout.
        """
        self._check(x, t, cond)
        dtype, style = DTYPES[self.dtype], self._style()
        time = self.time_scale * t.astype(jnp.float32) + self.time_shift
        told = (self._embed(time, cond, dtype), dropout_keys)
        numbers = itertools.count()  # of the residual blocks; dropout masks differ by this number
        out_channels = self.out_channels or x.shape[-1]
        last = len(self.block_out_channels) - 1

        # The way down: every result is kept, for the way up to use at the same resolution.
        scaled = x
        small = x = (2 * x - 1 if self.center_input_sample else x).astype(dtype)
        h = Conv(self.block_out_channels[0], dtype=dtype, name="conv_in")(x)
        kept = [h]
        for i, (kind, features) in enumerate(zip(self.down_block_types, self.block_out_channels, strict=True)):
            block = DownBlock(plain_name(kind), features, i < last, style, name=f"down_blocks_{i}")
            h, results, small = block(h, small, told, numbers)
            kept += results

        if self.mid_block_type:
            fields = (self.add_attention, self.attn_norm_num_groups, self.mid_block_scale_factor, style)
            h = MiddleBlock(*fields, name="mid_block")(h, told, numbers)

        # The way up: each residual block takes the newest result that is still kept. Skip blocks add up an image.
        image = None
        for i, (kind, features) in enumerate(zip(self.up_block_types, reversed(self.block_out_channels), strict=True)):
            block = UpBlock(plain_name(kind), features, i < last, style, name=f"up_blocks_{i}")
            results = [kept.pop() for _ in range(self.layers_per_block + 1)]
            if i == last > 0:
                h, image = reused(self, (h, image))  # of all levels below the outermost
            h, image = block(h, results, image, told, numbers)

        # The last convolution starts at zero, so an untrained network predicts zero.
        groups = self.norm_num_groups or min(self.block_out_channels[0] // 4, 32)
        h = nn.silu(GroupNorm(groups=groups, epsilon=self.norm_eps, name="conv_norm_out")(h))
        out = Conv(out_channels, dtype=dtype, kernel_init=ZERO, name="conv_out")(h).astype(jnp.float32)
        out = out if image is None else out + image
        out = out / time[:, None, None, None] if self.time_embedding_type == "fourier" else out
        return with_boundary(out, scaled, t, self.sigma_min) if self.sigma_min else out

    def _style(self):
        """Returns what all blocks have in common."""
        return Style(
            layers=self.layers_per_block,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
            act=self.act_fn,
            head_dim=self.attention_head_dim,
            padding=self.downsample_padding,
            down=self.downsample_type,
            up=self.upsample_type,
            dropout=self.dropout,
            dtype=DTYPES[self.dtype],
        )

    def _embed(self, time, cond, dtype):
        """Returns the embedding of the time, to which a class adds its own, [B, width]."""
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]
        features = self._time_features()

        def mlp(name, numbers):
            h = TimeEmbedding(width, dtype, name=name)
            return h(features(numbers).astype(dtype))

        embedding = mlp("time_embedding", time)
        if not self.num_classes and not self.class_embed_type:
            return embedding
        if cond is None:
            cond = self._no_condition(time, width)
        if self.class_embed_type == "timestep":
            return embedding + mlp("class_embedding", cond)
        if self.class_embed_type == "identity":
            return embedding + cond.astype(dtype)
        rows = self.num_classes + self.null_class
        table = nn.Embed(rows, width, dtype=dtype, name="class_embedding")
        return embedding + table(cond)

    def _time_features(self):
        """Returns a function from times [B] to what the embedding is made of; its layer is shared with a class's."""
        channels = self.block_out_channels[0]
        if self.time_embedding_type == "fourier":
            weight = self.param("time_proj", nn.initializers.normal(16.0), (channels,), jnp.float32)
            return lambda numbers: fourier_features(numbers, weight)
        if self.time_embedding_type == "learned":
            table = nn.Embed(self.num_train_timesteps, channels, name="time_proj")
            return lambda numbers: table(jnp.clip(jnp.round(numbers).astype(jnp.int32), 0, table.num_embeddings - 1))
        return lambda numbers: positional_features(numbers, channels, self.flip_sin_to_cos, self.freq_shift)

    def _no_condition(self, time, width):
        """Returns what stands for no condition, or raises InputError where the network was not trained without one."""
        if not self.class_embed_type and self.null_class:
            return jnp.full(time.shape, self.num_classes)
        if not self.is_initializing():
            wanted = {"timestep": "numbers [B]", "identity": f"vectors [B, {width}]"}
            labels = f"labels in 0..{self.num_classes - 1}"
            raise InputError(f"cond is None; this network is always told {wanted.get(self.class_embed_type, labels)}")
        return jnp.zeros((*time.shape, width) if self.class_embed_type == "identity" else time.shape, jnp.int32)

    def _check(self, x, t, cond):
        """Raises InputError if the fields allow no network, or x, t or cond do not suit it."""
        levels = len(self.block_out_channels)
        choices = {"dtype": DTYPES, "act_fn": ACTIVATIONS, "resnet_time_scale_shift": ("default", "scale_shift")}
        choices |= {"downsample_type": ("conv", "resnet"), "upsample_type": ("conv", "resnet")}
        choices |= {"time_embedding_type": TIME_TYPES, "class_embed_type": CLASS_TYPES}
        check_choices(self, "unet2d", choices | {"mid_block_type": ("UNetMidBlock2D", "")})
        if not levels or not all(isinstance(width, int) and width >= 4 for width in self.block_out_channels):
            raise InputError(f"unet2d.block_out_channels are {self.block_out_channels}; give widths of at least 4")
        for name, low in _LOWEST.items():
            require_range(f"unet2d.{name}", getattr(self, name), low)
        if self.time_embedding_type == "learned":
            require_range("unet2d.num_train_timesteps", self.num_train_timesteps, 1)
        if self.time_embedding_type == "fourier" and not self.time_scale + self.time_shift > 0:
            raise InputError(
                f"unet2d.time_shift is {self.time_shift:g}; a fourier embedding takes the log of times, and the first "
                "would be told as 0 or less: give unet2d.time_shift=0"
            )
        if self.time_embedding_type == "positional" and self.block_out_channels[0] // 2 <= self.freq_shift:
            raise InputError(f"unet2d.freq_shift is {self.freq_shift}; it must be below half of the first channels")
        _check_kinds(self.down_block_types, self.up_block_types, levels, x.shape[-1], self.out_channels)
        self._check_widths()
        check_input(self, "unet2d", x, t)
        if cond is not None and not self.num_classes and not self.class_embed_type:
            raise InputError("class labels were given to an unconditional model; set model.num_classes")

    def _check_widths(self):
        """Raises InputError if channels are no multiples of the groups, or narrower than a head."""
        for width in self.block_out_channels:
            for name in ("norm_num_groups", "attn_norm_num_groups"):
                groups = getattr(self, name)
                if groups < 0 or (groups and width % groups):
                    raise InputError(f"unet2d.{name} is {groups}; it must divide the {width} channels of each level")
            if self.attention_head_dim > width:
                raise InputError(f"unet2d.attention_head_dim is {self.attention_head_dim}, of {width} channels")


def _check_kinds(down, up, levels, in_channels, out_channels):
    """Raises InputError if the types of blocks are unknown, too many, or do not go together."""
    for name, kinds, known in (("down_block_types", down, DOWN), ("up_block_types", up, UP)):
        for kind in kinds:
            if plain_name(kind) not in known:
                raise InputError(f"unet2d.{name} has {kind!r}; {nearest(str(kind), known)}")
        if len(kinds) != levels:
            raise InputError(f"unet2d.{name} has {len(kinds)} entries for {levels} block_out_channels; give one each")
    # The image that skip blocks carry along changes its size with theirs only.
    skips = [DOWN[plain_name(kind)].skip for kind in down[:-1]]
    if skips != sorted(skips, reverse=True):
        raise InputError(f"unet2d.down_block_types are {tuple(down)}; blocks with Skip must come first")
    skips_up = {UP[plain_name(kind)].skip for kind in up}
    if len(skips_up) > 1:
        raise InputError(f"unet2d.up_block_types are {tuple(up)}; either all or none can have Skip")
    if (any(skips) and in_channels != 3) or (True in skips_up and levels > 1 and (out_channels or in_channels) != 3):
        raise InputError(f"blocks with Skip take images of 3 channels, and these have {in_channels}; take other blocks")
