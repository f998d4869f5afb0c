"""Defines the UNet of DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B)."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from diffusion.errors import InputError, require_range
from diffusion.models.deep import reused
from diffusion.models.layers import (
    DTYPES,
    INIT,
    ZERO,
    Conv,
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    Upsample,
    check_told,
    embed_told,
)
from diffusion.models.remat import check_remat, with_remat


class UNet(nn.Module):
    """Predicts eps, x_0, v or a flow velocity from a noisy image and its timestep.

    With width 128, multipliers (1, 2, 2, 2), two blocks per level and attention at 16 it is DDPM's CIFAR-10 network of
    35,746,307 parameters.

    Attributes:
      width: channels at full resolution; even, at least 4. A level has width * multiplier channels, which must be a
        multiple of num_heads.
      multipliers: one factor for each resolution; every level but the last ends by halving the image.
      num_blocks: residual blocks per level on the way down; the way up has one more.
      attention_resolutions: image heights at which self-attention follows every block. The middle always has it.
      num_heads: attention heads.
      dropout: rate inside the residual blocks, used only where dropout_keys are given.
      num_classes: 0 for an unconditional model; otherwise cond holds labels, and num_classes itself means "no class".
      out_channels: channels of the prediction; 0 for as many as the input has.
      dtype: "float32" or "bfloat16" for the arithmetic; parameters and normalisation stay in float32.
      sees_end: whether t is [B, 2], with the time in 1..T and the one in 0..T that the step goes to; where both are the
        same, a new network is as one without this.
      sees_scale: whether cond is (labels, scales), with the guidance scale that the answer is for, a real [B]; a new
        network gives the same answer for each.
      remat: what the backward pass computes again instead of keeping it, a key of `models.remat.POLICIES`; True is
        "full". The parameters and gradients are the same. It saves memory on accelerators, not on a CPU.
    """

    width: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    num_heads: int = 1
    dropout: float = 0.0
    num_classes: int = 0
    out_channels: int = 0
    dtype: str = "float32"
    remat: str | bool = "none"
    sees_end: bool = False
    sees_scale: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, "B"] | Int[Array, "B"] | Float[Array, "B 2"],
        cond: Int[Array, "B"] | tuple[Int[Array, "B"], Float[Array, "B"]] | None = None,
        *,
        dropout_keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B H W out_channels"]:
        """Returns the prediction in float32.

        Args:
          x: noisy images.
          t: timesteps in 1..T, whole or real; see `sees_end`.
          cond: labels in 0..num_classes, or None; see `sees_scale`.
          dropout_keys: typed JAX keys in training, one for each sample; None for no dropout.
        """
        self._check(x, t, cond)
        dtype = DTYPES[self.dtype]
        levels = [self.width * m for m in self.multipliers]
        residual, attention = self._layers(self._embed(t, cond, dtype), dropout_keys, dtype)

        def block(h, features, name):
            h = residual(h, features, name)
            return attention(h, name) if h.shape[1] in self.attention_resolutions else h

        # The way down: every result is kept, for the way up to use at the same resolution.
        h = Conv(self.width, dtype=dtype, name="conv_in")(x.astype(dtype))
        skips = [h]
        for level, features in enumerate(levels):
            for i in range(self.num_blocks):
                h = block(h, features, f"down_{level}_block_{i}")
                skips.append(h)
            # A convolution of stride 2 halves the image before the next level.
            if level < len(levels) - 1:
                h = Conv(features, stride=2, dtype=dtype, name=f"down_{level}_downsample")(h)
                skips.append(h)

        # The middle, at the lowest resolution: here every pixel can see all others.
        h = residual(h, levels[-1], "middle_block_0")
        h = attention(h, "middle")
        h = residual(h, levels[-1], "middle_block_1")

        # The way up: each block takes the newest result that is still kept as extra channels, until none is left.
        for level, features in reversed(list(enumerate(levels))):
            if level == 0 < len(levels) - 1:
                h = reused(self, h)  # of all levels below the outermost
            for i in range(self.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), features, f"up_{level}_block_{i}")
            if level > 0:
                h = Upsample(dtype, name=f"up_{level}_upsample")(h)

        # The last convolution starts at zero, so an untrained network predicts zero.
        h = nn.swish(GroupNorm(name="norm_out")(h))
        out = Conv(self.out_channels or x.shape[-1], dtype=dtype, kernel_init=ZERO, name="conv_out")
        return out(h).astype(jnp.float32)

    def _layers(self, embedding, dropout_keys, dtype):
        """Returns two functions: (h, features, name) -> h adds a residual block, (h, name) -> h adds self-attention."""
        residual_block, self_attention = (with_remat(layer, self.remat) for layer in (ResidualBlock, SelfAttention))
        # Residual blocks are numbered in the order of their calls; dropout masks differ by this number.
        numbers = itertools.count()

        def residual(h, features, name):
            module = residual_block(features, self.dropout, next(numbers), dtype, name=name)
            return module(h, embedding, dropout_keys)

        def attention(h, name):
            return self_attention(self.num_heads, dtype, name=f"{name}_attention")(h)

        return residual, attention

    def _embed(self, t, cond, dtype):
        """Returns the embedding of the timestep, to which a class adds its own, [B, 4 * width]."""
        inits = {"init": INIT, "class_init": nn.linear.default_embed_init}
        return embed_told(t, cond, network=self, features=self.width, width=4 * self.width, dtype=dtype, **inits)

    def _check(self, x, t, cond):
        """Raises InputError if the fields allow no network, or x, t or cond do not suit it."""
        # Each field by itself.
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}")
        check_remat(self.remat, "model.remat")
        if self.width < 4 or self.width % 2:
            raise InputError(f"model.width is {self.width}; it must be even and at least 4")
        if not self.multipliers or not all(isinstance(m, int) and m >= 1 for m in self.multipliers):
            raise InputError(
                f"model.multipliers are {self.multipliers}; give a whole number of at least 1 for each level"
            )
        for name, least in (("num_blocks", 0), ("num_heads", 1), ("num_classes", 0), ("out_channels", 0)):
            if getattr(self, name) < least:
                raise InputError(f"model.{name} is {getattr(self, name)}; it must be at least {least}")
        require_range("model.dropout", self.dropout, 0, 1, open_ends="high")
        if not all(isinstance(resolution, int) for resolution in self.attention_resolutions):
            raise InputError(f"model.attention_resolutions are {self.attention_resolutions}; give image heights, or 0")

        # Fields that depend on each other, and on the input.
        for features in (self.width * m for m in self.multipliers):
            if features % self.num_heads:
                raise InputError(
                    f"model.width and model.multipliers give a level of {features} channels; it must be a multiple "
                    f"of {self.num_heads} heads"
                )
        factor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise InputError(
                f"images of {x.shape[1]}x{x.shape[2]} cannot be halved {len(self.multipliers) - 1} times; "
                f"use sizes that are multiples of {factor} or fewer model.multipliers"
            )
        check_told(t, cond, self)
