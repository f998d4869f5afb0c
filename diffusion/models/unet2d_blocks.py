"""Defines the blocks of `diffusion.models.unet2d`, as in unet_2d_blocks.py, resnet.py and attention.py of diffusers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from diffusion.models.attention import attend
from diffusion.models.layers import INIT, ZERO, Conv, Dense, GroupNorm, dropout

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
}
"""The activations by the names that diffusers has for them."""


class Kind(NamedTuple):
    """What tells a type of block from the others.

    Attributes:
      attention: whether attention follows the residual blocks.
      skip: whether the block also carries a small image along, resized by a filter (score-SDE's NCSN++).
      resampling: conv or resnet, how the image is halved or doubled at the end; "" for what the network's field says.
    """

    attention: bool = False
    skip: bool = False
    resampling: str = "conv"


DOWN = {
    "DownBlock2D": Kind(),
    "AttnDownBlock2D": Kind(attention=True, resampling=""),
    "ResnetDownsampleBlock2D": Kind(resampling="resnet"),
    "SkipDownBlock2D": Kind(skip=True),
    "AttnSkipDownBlock2D": Kind(attention=True, skip=True),
}
UP = {
    "UpBlock2D": Kind(),
    "AttnUpBlock2D": Kind(attention=True, resampling=""),
    "ResnetUpsampleBlock2D": Kind(resampling="resnet"),
    "SkipUpBlock2D": Kind(skip=True),
    "AttnSkipUpBlock2D": Kind(attention=True, skip=True),
}
"""The types of blocks by the names that diffusers has for them."""


def plain_name(kind: str) -> str:
    """Returns the name of a type without the prefix that early files have."""
    return str(kind).removeprefix("UNetRes")


class Style(NamedTuple):
    """What all blocks of a network have in common; see the fields of `UNet2D`."""

    layers: int
    groups: int
    eps: float
    scale_shift: bool
    act: str
    head_dim: int
    padding: int
    down: str
    up: str
    dropout: float
    dtype: Any

    def norm(self, name: str, groups: int) -> GroupNorm:
        """Returns a norm in so many groups."""
        return GroupNorm(groups=groups, epsilon=self.eps, name=name)

    def groups_of(self, channels: int) -> int:
        """Returns in how many groups channels are normalised."""
        return self.groups or quarter(channels)


def quarter(channels: int) -> int:
    """Returns as many groups as have four channels each, at most 32."""
    return min(channels // 4, 32)


def halved(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """Averages squares of four pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def doubled(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Repeats every pixel."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


_TAPS = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
"""The filter that skip blocks resize by."""


def filtered_half(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """Filters, and takes every second pixel."""
    return _filtered(x, _TAPS, strides=(2, 2), padding=((1, 1), (1, 1)))


def filtered_double(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Puts zeros between the pixels, and filters."""
    return _filtered(x, 4 * _TAPS, lhs_dilation=(2, 2), padding=((2, 2), (2, 2)))


def _filtered(x, taps, strides=(1, 1), **options):
    channels = x.shape[-1]
    kernel = jnp.tile(jnp.asarray(taps, x.dtype)[:, :, None, None], (1, 1, 1, channels))
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, dimension_numbers=layout, feature_group_count=channels, **options
    )


_RESIZED = {
    "": lambda x: x,
    "down": halved,
    "up": doubled,
    "filter_down": filtered_half,
    "filter_up": filtered_double,
}


class Resnet(nn.Module):
    """Adds to x what two convolutions make of it and the time, [B, H, W, C] -> [B, H', W', features].

    Attributes:
      features: channels of the result.
      style: of the network.
      groups, groups_out: of the two norms; 0 for those of the style.
      resized: a key of `_RESIZED`: how the image changes its size, between the first norm and convolution.
      scale: what the sum is divided by.
      shortcut: whether a convolution of one pixel is on the way around; it is anyway where channels change.
    """

    features: int
    style: Style
    groups: int = 0
    groups_out: int = 0
    resized: str = ""
    scale: float = 1.0
    shortcut: bool = False

    @nn.compact
    def __call__(self, x, told, number):
        style, (embedding, keys), resize = self.style, told, _RESIZED[self.resized]
        act, dtype = ACTIVATIONS[style.act], style.dtype
        h = act(style.norm("norm1", self.groups or style.groups_of(x.shape[-1]))(x))
        x, h = resize(x), resize(h)
        h = Conv(self.features, dtype=dtype, name="conv1")(h)

        # The time shifts the activations, or scales and shifts them behind the norm.
        width = self.features * (2 if style.scale_shift else 1)
        time = Dense(width, dtype=dtype, kernel_init=INIT, name="time_emb_proj")(act(embedding))[:, None, None, :]
        norm = style.norm("norm2", self.groups_out or style.groups_of(self.features))
        if style.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + time)

        h = dropout(keys, number, style.dropout, act(h))
        h = Conv(self.features, dtype=dtype, kernel_init=ZERO, name="conv2")(h)
        if self.shortcut or x.shape[-1] != self.features:
            x = Conv(self.features, kernel=1, dtype=dtype, name="conv_shortcut")(x)
        return (x + h) / self.scale


class Attention(nn.Module):
    """Lets all positions of x attend to each other, behind a norm in so many groups, or none; keeps the shape."""

    style: Style
    groups: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        head_dim = self.style.head_dim or channels
        h = self.style.norm("group_norm", self.groups)(x) if self.groups else x
        h = h.reshape(batch, height * width, channels)

        def dense(features, name, init=INIT):
            return Dense(features, dtype=self.style.dtype, kernel_init=init, name=name)

        def heads(name):
            return dense(channels // head_dim * head_dim, name)(h).reshape(batch, height * width, -1, head_dim)

        h = attend(heads("to_q"), heads("to_k"), heads("to_v"))
        out = dense(channels, "to_out_0", ZERO)(h.reshape(batch, height, width, -1))
        return (x + out) / self.scale


class Resampler(nn.Module):
    """Halves an image by a convolution of stride 2, or doubles it by repeating pixels and a convolution."""

    up: bool
    style: Style

    @nn.compact
    def __call__(self, x):
        if self.up:
            return Conv(x.shape[-1], dtype=self.style.dtype, name="conv")(doubled(x))
        edge = (self.style.padding,) * 2 if self.style.padding else (0, 1)
        return Conv(x.shape[-1], stride=2, dtype=self.style.dtype, padding=(edge, edge), name="conv")(x)


class DownBlock(nn.Module):
    """One level on the way down: returns (h, the results to keep, the small image that skip blocks carry along)."""

    kind: str
    features: int
    halves: bool
    style: Style

    @nn.compact
    def __call__(self, h, small, told, numbers: Iterator[int]):
        kind, style, results = DOWN[self.kind], self.style, []
        scale = 2**0.5 if kind.skip else 1.0
        out = quarter(self.features) if kind.skip else 0
        for i in range(style.layers):
            groups = quarter(h.shape[-1]) if kind.skip else 0
            h = Resnet(self.features, style, groups, out, scale=scale, name=f"resnets_{i}")(h, told, next(numbers))
            if kind.attention:
                norm = 32 if kind.skip else style.groups_of(self.features)
                h = Attention(style, norm, scale, name=f"attentions_{i}")(h)
            results.append(h)
        if not self.halves:
            return h, results, small
        if kind.skip:
            fields = {"resized": "filter_down", "scale": scale, "shortcut": True, "name": "resnet_down"}
            h = Resnet(self.features, style, out, out, **fields)(h, told, next(numbers))
            small = filtered_half(small)
            h = Conv(self.features, kernel=1, dtype=style.dtype, name="skip_conv")(small) + h
        elif (kind.resampling or style.down) == "resnet":
            h = Resnet(self.features, style, resized="down", name="downsamplers_0")(h, told, next(numbers))
        else:
            h = Resampler(False, style, name="downsamplers_0")(h)
        return h, [*results, h], small


class MiddleBlock(nn.Module):
    """Two residual blocks at the lowest resolution with attention between them; keeps the shape."""

    attention: bool
    groups: int
    scale: float
    style: Style

    @nn.compact
    def __call__(self, h, told, numbers: Iterator[int]):
        channels = h.shape[-1]
        h = Resnet(channels, self.style, scale=self.scale, name="resnets_0")(h, told, next(numbers))
        if self.attention:
            groups = self.groups or (0 if self.style.scale_shift else self.style.groups_of(channels))
            h = Attention(self.style, groups, self.scale, name="attentions_0")(h)
        return Resnet(channels, self.style, scale=self.scale, name="resnets_1")(h, told, next(numbers))


class UpBlock(nn.Module):
    """One level on the way up: returns (h, the image that skip blocks add up, or None before the first of them)."""

    kind: str
    features: int
    doubles: bool
    style: Style

    @nn.compact
    def __call__(self, h, kept: Sequence[Any], image, told, numbers: Iterator[int]):
        kind, style = UP[self.kind], self.style
        if kind.skip:
            return self._skip(kind, h, kept, image, told, numbers)
        for i, result in enumerate(kept):
            h = jnp.concatenate([h, result], axis=-1)
            h = Resnet(self.features, style, name=f"resnets_{i}")(h, told, next(numbers))
            if kind.attention:
                h = Attention(style, style.groups_of(self.features), name=f"attentions_{i}")(h)
        if self.doubles and (kind.resampling or style.up) == "resnet":
            h = Resnet(self.features, style, resized="up", name="upsamplers_0")(h, told, next(numbers))
        elif self.doubles:
            h = Resampler(True, style, name="upsamplers_0")(h)
        return h, image

    def _skip(self, kind, h, kept, image, told, numbers):
        """Does the same for a skip block, whose attention follows the last residual block only."""
        style, scale, out = self.style, 2**0.5, quarter(self.features)
        for i, result in enumerate(kept):
            first, second = h.shape[-1], result.shape[-1]
            # diffusers divides only the second by four in a block with attention, and published files go by that.
            groups = min(first + second // 4, 32) if kind.attention else quarter(first + second)
            h = jnp.concatenate([h, result], axis=-1)
            h = Resnet(self.features, style, groups, out, scale=scale, name=f"resnets_{i}")(h, told, next(numbers))
        if kind.attention:
            h = Attention(style, 32, scale, name="attentions_0")(h)
        image = None if image is None else filtered_double(image)
        if self.doubles:
            shown = nn.silu(style.norm("skip_norm", out)(h))
            shown = Conv(3, dtype=style.dtype, name="skip_conv")(shown).astype(jnp.float32)
            image = shown if image is None else image + shown
            fields = {"resized": "filter_up", "scale": scale, "shortcut": True, "name": "resnet_up"}
            h = Resnet(self.features, style, out, out, **fields)(h, told, next(numbers))
        return h, image
