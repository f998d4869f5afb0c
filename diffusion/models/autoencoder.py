"""Defines the networks of an autoencoder: its encoder, its decoder, a codebook, and the critic that it may train with.

The architecture is that of AutoencoderKL and VQModel in diffusers, part by part, so that their weights fit once they
are renamed and laid out for NHWC.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from diffusion.errors import InputError, require_range
from diffusion.models.layers import INIT, ZERO, Conv, GroupNorm, SelfAttention, Upsample
from diffusion.models.unet import DTYPES


class Block(nn.Module):
    """Adds to x what two convolutions make of it; [B, H, W, C] -> [B, H, W, features]."""

    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return GroupNorm(groups=self.groups, name=name)

        h = Conv(self.features, dtype=self.dtype, name="conv_1")(nn.swish(norm("norm_1")(x)))
        h = Conv(self.features, dtype=self.dtype, kernel_init=ZERO, name="conv_2")(nn.swish(norm("norm_2")(h)))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, kernel_init=INIT, name="shortcut")(x)
        return x + h


class Middle(nn.Module):
    """Two blocks at the lowest resolution, with self-attention between them; keeps the shape [B, H, W, C]."""

    groups: int
    attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h):
        channels = h.shape[-1]
        h = Block(channels, self.groups, self.dtype, name="block_0")(h)
        if self.attention:
            h = SelfAttention(1, self.dtype, self.groups, name="attention")(h)
        return Block(channels, self.groups, self.dtype, name="block_1")(h)


class Encoder(nn.Module):
    """Turns images [B, H, W, C] into [B, H/f, W/f, out_channels], f = 2^(levels - 1)."""

    channels: Sequence[int]
    num_blocks: int
    out_channels: int
    groups: int
    attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        h = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(images.astype(self.dtype))
        for level, features in enumerate(self.channels):
            for i in range(self.num_blocks):
                h = Block(features, self.groups, self.dtype, name=f"down_{level}_block_{i}")(h)
            # On even sizes "SAME" pads right and bottom alone, as diffusers does by hand.
            if level < len(self.channels) - 1:
                h = Conv(features, stride=2, dtype=self.dtype, name=f"down_{level}_downsample")(h)
        h = Middle(self.groups, self.attention, self.dtype, name="middle")(h)
        h = nn.swish(GroupNorm(groups=self.groups, name="norm_out")(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Turns [B, h, w, C] into images [B, f h, f w, out_channels], f = 2^(levels - 1)."""

    channels: Sequence[int]
    num_blocks: int
    out_channels: int
    groups: int
    attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z):
        h = Conv(self.channels[-1], dtype=self.dtype, name="conv_in")(z)
        h = Middle(self.groups, self.attention, self.dtype, name="middle")(h)
        for level, features in reversed(list(enumerate(self.channels))):
            for i in range(self.num_blocks + 1):
                h = Block(features, self.groups, self.dtype, name=f"up_{level}_block_{i}")(h)
            if level > 0:
                h = Upsample(self.dtype, name=f"up_{level}_upsample")(h)
        h = nn.swish(GroupNorm(groups=self.groups, name="norm_out")(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class Quantizer(nn.Module):
    """Holds a codebook, and replaces each vector of z [B, h, w, D] by its nearest code."""

    codes: int
    features: int

    def setup(self):
        scale = 1 / self.codes
        self.embedding = self.param("embedding", nn.initializers.uniform(2 * scale), (self.codes, self.features))

    def __call__(self, z):
        """Returns (codes in the place of z, their numbers [B, h, w])."""
        index = nearest_codes(z, self.embedding)
        return self.embedding[index], index


def nearest_codes(z: Float[Array, "*n D"], embedding: Float[Array, "K D"]) -> Array:
    """Returns for each vector the number of the code that is nearest to it, int32 [*n]."""
    # |z - e|^2 without |z|^2, which is the same for all codes.
    product = jnp.einsum("...d,kd->...k", z, embedding)
    distance = jnp.broadcast_to(jnp.square(embedding).sum(axis=-1), product.shape) - 2 * product
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


_RANGES = (
    ("num_blocks", 0, 64),
    ("latent_channels", 1, 2**20),
    ("groups", 1, 2**20),
    ("codes", 0, 2**20),
    ("code_channels", 0, 2**20),
)


class AutoencoderNetwork(nn.Module):
    """Turns images into latents a few times smaller, and back.

    Without codes it is diffusers' AutoencoderKL: the encoder gives a Gaussian for each number of the latents. With
    codes it is their VQModel: the decoder sees the nearest entry of a codebook in the place of each latent vector.

    Attributes:
      channels: of each level from full resolution down, multiples of groups; from level to level the image halves.
      num_blocks: residual blocks in each level of the encoder; the decoder has one more.
      latent_channels: what the encoder ends in, and the decoder begins with.
      image_channels: of the images.
      groups: in which activations are normalised.
      attention: whether all positions see each other at the lowest resolution.
      codes: entries of the codebook; 0 for none.
      code_channels: of these entries, and then of the latents; 0 for latent_channels.
      dtype: "float32" or "bfloat16" for the arithmetic; parameters and normalisation stay in float32.
    """

    channels: Sequence[int] = (128, 256, 512, 512)
    num_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    attention: bool = True
    codes: int = 0
    code_channels: int = 0
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """How many times smaller the latents are, in height and in width."""
        return 2 ** (len(self.channels) - 1)

    @property
    def depth(self) -> int:
        """The channels of the latents that users see."""
        return self.code_channels or self.latent_channels if self.codes else self.latent_channels

    def setup(self):
        self._check()
        dtype = DTYPES[self.dtype]
        shared = {"groups": self.groups, "attention": self.attention, "dtype": dtype}
        moments = self.latent_channels if self.codes else 2 * self.latent_channels
        self.encoder = Encoder(tuple(self.channels), self.num_blocks, moments, **shared)
        self.decoder = Decoder(tuple(self.channels), self.num_blocks, self.image_channels, **shared)
        self.quant_conv = nn.Dense(self.depth if self.codes else moments, dtype=dtype, kernel_init=INIT)
        self.post_quant_conv = nn.Dense(self.latent_channels, dtype=dtype, kernel_init=INIT)
        if self.codes:
            self.quantizer = Quantizer(self.codes, self.depth)

    def __call__(self, images):
        """Returns images after encoding and decoding; it touches every parameter, as `init` needs."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w D"], Float[Array, "B h w D"]]:
        """Returns mean and log-variance of the latents of images in [-1, 1], in float32.

        With a codebook the mean is what will be replaced by codes, and the log-variance that of no noise, -inf.
        """
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise InputError(
                f"images of {images.shape[1]}x{images.shape[2]} cannot be halved {len(self.channels) - 1} times; use "
                f"sizes that are multiples of {self.factor}, or fewer autoencoder.channels"
            )
        out = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        if self.codes:
            return out, jnp.full_like(out, -jnp.inf)
        mean, log_variance = jnp.split(out, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        """Returns the images of latents, in float32; with a codebook, of the codes nearest to them."""
        return self.decode_exactly(self.quantizer(z)[0] if self.codes else z)

    def decode_exactly(self, z: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        """Returns the images of latents as they are, whatever the codebook."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def _check(self):
        """Raises InputError if the fields allow no network."""
        if self.dtype not in DTYPES:
            raise InputError(f"autoencoder.dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}")
        # The upper ends are far above every network, and below what would take for ever only to describe.
        for name, low, high in _RANGES:
            require_range(f"autoencoder.{name}", getattr(self, name), low, high)
        require_range("the number of autoencoder.channels", len(self.channels), 1, 12)
        if any(not 1 <= width <= 2**20 or width % self.groups for width in self.channels):
            raise InputError(
                f"autoencoder.channels are {tuple(self.channels)}; give a multiple of autoencoder.groups, "
                f"{self.groups}, for each level"
            )
        if self.code_channels and not self.codes:
            raise InputError(f"autoencoder.code_channels is {self.code_channels}, of no codes; set autoencoder.codes")


class PatchCritic(nn.Module):
    """Judges overlapping patches of images [B, H, W, C]: [B, h, w], high for what it takes to be real.

    The convolutions are those of the PatchGAN discriminator that latent diffusion trains with; there are fewer where
    images are small, and groups are normalised in the place of batches, so that an image is judged by itself.
    """

    width: int = 64
    max_stages: int = 3

    @nn.compact
    def __call__(self, images):
        h = images
        stages = max(1, min(self.max_stages, min(images.shape[1:3]).bit_length() - 3))
        for stage in range(stages):
            h = nn.Conv(self.width * min(2**stage, 8), (4, 4), (2, 2), name=f"conv_{stage}", kernel_init=INIT)(h)
            h = GroupNorm(name=f"norm_{stage}")(h) if stage else h
            h = jax.nn.leaky_relu(h, 0.2)
        h = nn.Conv(self.width * min(2**stages, 8), (4, 4), name="conv_last", kernel_init=INIT)(h)
        h = jax.nn.leaky_relu(GroupNorm(name="norm_last")(h), 0.2)
        return nn.Conv(1, (4, 4), name="judgement", kernel_init=INIT)(h)[..., 0]
