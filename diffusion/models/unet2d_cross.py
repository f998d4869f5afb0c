"""Defines the blocks of `diffusion.models.unet2d_condition` that see a text, after attention.py of diffusers."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from diffusion.models.attention import attend
from diffusion.models.layers import INIT, ZERO, Dense, GroupNorm
from diffusion.models.unet2d_blocks import Resampler, Resnet, Style

PLAIN_EPS = 1e-5
"""Of the norms inside transformer blocks, whatever the network's field says."""


PAIRS = 2**22
"""So many pairs of a query and a key are weighed at once: 128 MiB for 8 heads. Images of 512 pixels have 2^24."""


def attend_in_parts(query: Array, key: Array, value: Array) -> Array:
    """Returns `attend` of [B, N, H, D], in parts of the queries where there are many pairs."""
    batch, count = query.shape[:2]
    parts = min(count, -(-count * key.shape[1] // PAIRS))
    while count % parts:
        parts += 1
    if parts == 1:
        return attend(query, key, value)
    cut = query.reshape(batch, parts, count // parts, *query.shape[2:]).swapaxes(0, 1)
    found = jax.lax.map(lambda part: attend(part, key, value), cut)
    return found.swapaxes(0, 1).reshape(query.shape)


class CrossAttention(nn.Module):
    """Lets tokens [B, N, C] see themselves, or a context [B, M, D] where there is one."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context=None):
        batch, _, channels = x.shape
        seen = x if context is None else context

        def heads(name, h):
            h = Dense(channels, use_bias=False, dtype=self.dtype, kernel_init=INIT, name=name)(h)
            return h.reshape(batch, h.shape[1], self.num_heads, -1)

        h = attend_in_parts(heads("to_q", x), heads("to_k", seen), heads("to_v", seen))
        return Dense(channels, dtype=self.dtype, kernel_init=INIT, name="to_out_0")(h.reshape(x.shape))


class Gated(nn.Module):
    """Multiplies half of a layer's output by the GELU of the other half, [B, N, C] -> [B, N, features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = Dense(2 * self.features, dtype=self.dtype, kernel_init=INIT, name="proj")(x)
        h, gate = jnp.split(h, 2, axis=-1)
        return h * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """A perceptron of four times the width, [B, N, C] -> [B, N, C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = Gated(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, kernel_init=INIT, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Adds to each token what it learns from the others, from the context, and from itself; keeps the shape."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        def norm(name):
            return nn.LayerNorm(epsilon=PLAIN_EPS, dtype=self.dtype, name=name)

        x = x + CrossAttention(self.num_heads, self.dtype, name="attn1")(norm("norm1")(x))
        x = x + CrossAttention(self.num_heads, self.dtype, name="attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class TextTransformer(nn.Module):
    """Lets the positions of an image [B, H, W, C] see each other and a context [B, M, D]; keeps the shape."""

    depth: int
    num_heads: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        batch, height, width, channels = x.shape
        h = GroupNorm(groups=self.groups, epsilon=1e-6, name="norm")(x).reshape(batch, height * width, channels)
        h = Dense(channels, dtype=self.dtype, kernel_init=INIT, name="proj_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(self.num_heads, self.dtype, name=f"transformer_blocks_{i}")(h, context)
        h = Dense(channels, dtype=self.dtype, kernel_init=ZERO, name="proj_out")(h)
        return x + h.reshape(x.shape)


class CrossDownBlock(nn.Module):
    """One level on the way down: returns (h, the results to keep).

    Attributes:
      features: channels of the level.
      layers: residual blocks.
      depth: transformer blocks behind each of them; 0 for none, and then the level sees no text.
      num_heads: of their attention.
      halves: whether the image is halved at the end.
      style: of the network.
    """

    features: int
    layers: int
    depth: int
    num_heads: int
    halves: bool
    style: Style

    @nn.compact
    def __call__(self, h, context, told, numbers: Iterator[int]):
        results = []
        for i in range(self.layers):
            h = Resnet(self.features, self.style, name=f"resnets_{i}")(h, told, next(numbers))
            if self.depth:
                fields = (self.depth, self.num_heads, self.style.groups, self.style.dtype)
                h = TextTransformer(*fields, name=f"attentions_{i}")(h, context)
            results.append(h)
        if self.halves:
            h = Resampler(False, self.style, name="downsamplers_0")(h)
            results.append(h)
        return h, results


class CrossMiddleBlock(nn.Module):
    """Two residual blocks at the lowest resolution with transformer blocks between them; keeps the shape."""

    depth: int
    num_heads: int
    scale: float
    style: Style

    @nn.compact
    def __call__(self, h, context, told, numbers: Iterator[int]):
        channels, style = h.shape[-1], self.style
        h = Resnet(channels, style, scale=self.scale, name="resnets_0")(h, told, next(numbers))
        fields = (self.depth, self.num_heads, style.groups, style.dtype)
        h = TextTransformer(*fields, name="attentions_0")(h, context)
        return Resnet(channels, style, scale=self.scale, name="resnets_1")(h, told, next(numbers))


class CrossUpBlock(nn.Module):
    """One level on the way up; the fields are those of `CrossDownBlock`, and there is a result kept for each layer."""

    features: int
    depth: int
    num_heads: int
    doubles: bool
    style: Style

    @nn.compact
    def __call__(self, h, kept: Sequence[Any], context, told, numbers: Iterator[int]):
        for i, result in enumerate(kept):
            h = jnp.concatenate([h, result], axis=-1)
            h = Resnet(self.features, self.style, name=f"resnets_{i}")(h, told, next(numbers))
            if self.depth:
                fields = (self.depth, self.num_heads, self.style.groups, self.style.dtype)
                h = TextTransformer(*fields, name=f"attentions_{i}")(h, context)
        return Resampler(True, self.style, name="upsamplers_0")(h) if self.doubles else h
