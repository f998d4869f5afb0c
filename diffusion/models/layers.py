"""Defines the UNet's layers: group norm, dropout, residual block, self-attention, resampling, time embedding."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Key

from diffusion.errors import InputError
from diffusion.keys import bernoulli
from diffusion.models.attention import attend
from diffusion.types import Timesteps

# DDPM's initialisation. The last layer of a residual branch starts at zero, so that at first the branch adds nothing.
INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZERO = nn.initializers.zeros

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""What a network may compute in, by name."""


def sinusoidal_embedding(t: Float[Array, "B"] | Timesteps, dim: int) -> Float[Array, "B dim"]:
    """Returns sines and cosines of t at dim // 2 frequencies from 1 down to 1e-4, in float32.

    Source: DDPM, arXiv:2006.11239, appendix B.

    Args:
      t: [B], timesteps in 1..T, whole or real.
      dim: even width of the embedding, at least 4.
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def embed_told(
    t: Float[Array, "B"] | Float[Array, "B 2"],
    cond: Any,
    *,
    network: nn.Module,
    features: int,
    width: int,
    dtype: jnp.dtype,
    init: Callable,
    class_init: Callable,
) -> Float[Array, "B width"]:
    """Returns the embedding of all that a network is told besides x; its layers become the calling module's.

    Args:
      t, cond: as the network takes them.
      network: the calling module, with num_classes, sees_end and sees_scale as in `UNet`.
      features: sines and cosines of a number.
      width: of the embedding.
      dtype: of the arithmetic.
      init, class_init: of the layers, and of the embedding of classes.
    """

    def embed(number, name, last=init):
        hidden = Dense(width, dtype=dtype, kernel_init=init, name=f"{name}_1")
        out = Dense(width, dtype=dtype, kernel_init=last, name=f"{name}_2")
        return out(nn.swish(hidden(sinusoidal_embedding(number, features))))

    labels, scales = cond if network.sees_scale and cond is not None else (cond, None)
    embedding = embed(t[:, 0] if network.sees_end else t, "time")
    if network.sees_end:
        embedding += embed(t[:, 0] - t[:, 1], "span", ZERO)
    if network.sees_scale:
        embedding += embed(jnp.ones(t.shape[0]) if scales is None else scales, "scale", ZERO)
    if network.num_classes:
        labels = jnp.full(t.shape[:1], network.num_classes) if labels is None else labels  # this means "no class"
        table = nn.Embed(network.num_classes + 1, width, dtype=dtype, embedding_init=class_init, name="class")
        embedding += table(labels)
    return embedding


def check_told(t: Any, cond: Any, network: nn.Module) -> None:
    """Raises InputError unless t and cond suit a network with num_classes, sees_end and sees_scale as in `UNet`."""
    if cond is not None and not network.num_classes:
        raise InputError("class labels were given to an unconditional model; set model.num_classes")
    if t.ndim != 1 + network.sees_end:
        wanted = "[B, 2], where a step begins and where it ends" if network.sees_end else "[B]"
        raise InputError(f"t has shape {t.shape}; this network takes {wanted}")
    if network.sees_scale and cond is not None and not isinstance(cond, tuple):
        raise InputError("this network takes the guidance scale as an input; give cond as (labels, scales)")


def num_groups(channels: int, max_groups: int = 32) -> int:
    """Returns the number of groups to normalise in: as many equal ones of at least four channels as max_groups allows.

    A group of one channel would remove exactly what the timestep adds to that channel: a constant over its pixels.
    """
    most = max(1, min(max_groups, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class GroupNorm(nn.Module):
    """Normalises [B, ..., C] within groups of channels, with float32 statistics; returns x's dtype.

    Sums are taken for each channel and only then for each group, so that x is read once for the statistics and once for
    one fused multiply-add: on a CPU this is about twice as fast as normalising a reshaped array.

    There are as many groups as `groups` says; 0 leaves that to `num_groups`.
    """

    max_groups: int = 32
    epsilon: float = 1e-6
    groups: int = 0

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = self.groups or num_groups(channels, self.max_groups)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x32 = x.astype(jnp.float32)
        pixels = tuple(range(1, x.ndim - 1))

        def group_mean(per_channel):  # [B, C] -> [B, C]; each channel gets the mean of its group
            grouped = per_channel.reshape(-1, groups, channels // groups).mean(axis=-1, keepdims=True)
            return jnp.broadcast_to(grouped, (*grouped.shape[:2], channels // groups)).reshape(-1, channels)

        mean = group_mean(x32.mean(axis=pixels))
        # The variance is E[x^2] - E[x]^2, which can round below zero where x is constant.
        variance = jnp.maximum(group_mean(jnp.square(x32).mean(axis=pixels)) - jnp.square(mean), 0.0)
        # One multiply-add both normalises and applies the learned scale and bias.
        gain = scale[None, :] * jax.lax.rsqrt(variance + self.epsilon)
        shift = bias[None, :] - mean * gain
        per_sample = (-1, *([1] * len(pixels)), channels)
        return (x32 * gain.reshape(per_sample) + shift.reshape(per_sample)).astype(x.dtype)


def in_turn(x: Array, kernel: Array) -> Array:
    """Returns the kernel of a layer that is applied to x; one that a CPU must widen from bfloat16 waits for x.

    XLA widens all that it can before anything else, and keeps over a loop what does not change in it. All kernels would
    be in the memory at once, in float32, twice as large as they are. So this one is made to depend on x, and
    `optimization_barrier` does not do, as XLA takes it out before it puts its work in order.
    """
    if kernel.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return kernel
    return _after(x.ravel()[0], kernel)


@jax.custom_jvp
def _after(first, kernel):
    """Returns the kernel, whatever the number is, which XLA does not see."""
    always = (first <= jnp.inf) | jnp.isnan(first)
    # Of whole numbers, as a choice between numbers in bfloat16 would be made after they are widened.
    bits = jax.lax.bitcast_convert_type(kernel, jnp.uint16)
    return jax.lax.bitcast_convert_type(jnp.where(always, bits, 0), kernel.dtype)


@_after.defjvp
def _after_jvp(primals, tangents):
    return _after(*primals), tangents[1]


def _promoted(x, kernel, bias, *, dtype):
    """Does in a dense layer what flax does, with the kernel in its turn."""
    return promote_dtype(x, in_turn(x, kernel), bias, dtype=dtype)


def _product(x, kernel, dimensions, precision=None):
    """Multiplies, in a dense layer, x [B, ..., C] and a kernel [C, D]; on a CPU with a gradient that is fast there."""
    positions = math.prod(x.shape[1:-1])
    # With fewer positions than D, the products of `_rows` would be larger than x.
    plain = precision is not None or x.ndim < 3 or positions < kernel.shape[1] or x.dtype != jnp.float32
    if plain or jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, kernel, dimensions, precision=precision)
    return _rows(x.reshape(len(x), positions, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


@jax.custom_jvp
def _rows(x, kernel):
    """Returns x @ kernel for [B, N, C] and [C, D], of which the gradient to the kernel is a sum of products by image.

    For one product of all images, XLA first lays x and the gradient out anew, and computes what it has fused with them
    in an order that is slow: that took a twenty-fifth of a training step.
    """
    return x @ kernel


def _rows_jvp(primals, tangents):
    """Leaves out what does not move, as a derivative along x alone would else multiply with zeros."""
    (x, kernel), (d_x, d_kernel) = primals, tangents
    out = x @ kernel  # a plain product, which config.model.remat=products knows and keeps
    moved = jnp.zeros_like(out) if isinstance(d_x, SymbolicZero) else d_x @ kernel
    if not isinstance(d_kernel, SymbolicZero):
        moved += jnp.einsum("bnc,bcd->bnd", x, jnp.broadcast_to(d_kernel, (len(x), *d_kernel.shape)))
    return out, moved


_rows.defjvp(_rows_jvp, symbolic_zeros=True)

Dense = partial(nn.Dense, promote_dtype=_promoted, dot_general=_product)
"""A dense layer of flax with its kernel in its turn, see `in_turn`, and with a gradient that is fast on a CPU."""


class Conv(nn.Module):
    """Convolves with a square kernel and a bias, [B, H, W, C] -> [B, H', W', features].

    Padding is "SAME", or pixels before and after each row and column.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = INIT
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME"

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", self.kernel_init, (self.kernel, self.kernel, x.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", ZERO, (self.features,), jnp.float32)
        kernel = in_turn(x, kernel)
        x, kernel, bias = x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype)
        strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=layout)
        return out + bias[None, None, None, :]


def dropout(keys: Key[Array, "B"] | None, layer: int, rate: float, x: Float[Array, "B *s"]) -> Float[Array, "B *s"]:
    """Zeroes each element of x with probability rate and divides the others by 1 - rate.

    The mask of sample i depends only on keys[i] and the layer's number, so it is the same in any batch and on any
    number of devices.

    Args:
      keys: typed JAX keys, one for each sample, or None for no dropout.
      layer: a number that no other layer has.
      rate: from 0 to below 1; 0 draws nothing.
      x: activations of any shape.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


class ResidualBlock(nn.Module):
    """Adds to x what DDPM's block makes of it and the timestep; [B, H, W, C] -> [B, H, W, features].

    The branch is norm, swish, conv, + time, norm, swish, dropout, conv. The block's number `layer` makes its dropout
    masks differ from other blocks'.
    """

    features: int
    dropout: float
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, embedding, dropout_keys=None):
        h = Conv(self.features, dtype=self.dtype, name="conv_1")(nn.swish(GroupNorm(name="norm_1")(x)))
        time = Dense(self.features, dtype=self.dtype, kernel_init=INIT, name="time")(nn.swish(embedding))
        h = nn.swish(GroupNorm(name="norm_2")(h + time[:, None, None, :]))
        h = dropout(dropout_keys, self.layer, self.dropout, h)
        h = Conv(self.features, dtype=self.dtype, kernel_init=ZERO, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, kernel_init=INIT, name="shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """Lets all H * W positions of x attend to each other; keeps the shape [B, H, W, C].

    The branch is norm, scaled dot-product attention, projection; x is added to it.
    """

    num_heads: int
    dtype: jnp.dtype
    groups: int = 0

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = GroupNorm(groups=self.groups, name="norm")(x).reshape(batch, height * width, channels)

        def heads(name):
            projected = Dense(channels, dtype=self.dtype, kernel_init=INIT, name=name)(h)
            return projected.reshape(batch, height * width, self.num_heads, channels // self.num_heads)

        h = attend(heads("query"), heads("key"), heads("value"))
        out = Dense(channels, dtype=self.dtype, kernel_init=ZERO, name="out")
        return x + out(h.reshape(batch, height, width, channels))


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then convolves; [B, H, W, C] -> [B, 2H, 2W, C]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(doubled)
