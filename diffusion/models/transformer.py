"""Defines the transformer of DiT in Flax Linen: an image is cut into patches, and every patch sees all others."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from diffusion.errors import InputError, require_range
from diffusion.models.attention import attend
from diffusion.models.deep import reused
from diffusion.models.layers import DTYPES, ZERO, Dense, check_told, dropout, embed_told
from diffusion.models.remat import check_remat, with_remat

TIME_FEATURES = 256
"""Sines and cosines of the timestep."""

_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """Predicts what a `diffusion.models.UNet` predicts, by attention between the patches of an image.

    Each block normalises without parameters; its scale, shift and gate come from the timestep and the class. The gates
    start at zero, so that at first a block adds nothing (adaLN-zero). Source: DiT, arXiv:2212.09748.

    Attributes:
      out_channels: of the prediction; 0 means as many as x has.
      num_classes: number of class labels; 0 makes the model unconditional.
      patch: height and width of a patch in pixels, which divides those of x.
      width: channels of each patch, a multiple of num_heads and of 4.
      depth: number of blocks.
      num_heads: attention heads in each block.
      mlp_ratio: channels inside each block's perceptron over width.
      qk_norm: normalise queries and keys of each head, so that their products stay bounded in long trainings
        (arXiv:2302.05442).
      dropout: rate after attention and perceptron, in training.
      time_shift: what is added to t before it is told; -1 for networks of others, whose times count from 0.
      dtype: of the arithmetic; parameters and normalisation are float32.
      remat: what the gradient computes again instead of keeping it, a key of `models.remat.POLICIES`; True is "full".
      sees_end, sees_scale: as those of `UNet`.
    """

    out_channels: int = 0
    num_classes: int = 0
    patch: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dropout: float = 0.0
    time_shift: float = 0.0
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
        """Returns the prediction in float32; the arguments are those of `UNet`."""
        self._check(x, t, cond)
        dtype, (_, height, width, channels) = DTYPES[self.dtype], x.shape
        rows, columns = height // self.patch, width // self.patch

        # Each patch becomes a token, which is told its place.
        tokens = _patches(x.astype(dtype), self.patch)
        h = Dense(self.width, dtype=dtype, kernel_init=_XAVIER, name="patches")(tokens)
        h += jnp.asarray(positions(rows, columns, self.width), dtype)[None]

        # What the timestep and the class say to every block.
        told = nn.swish(self._embed(t, cond, dtype))
        block = with_remat(Block, self.remat)
        for i in range(self.depth):
            if i == 1:
                first = h
            if i == self.depth - 1 > 1:
                h = reused(self, h, since=first)  # what the blocks between the first and the last have added
            fields = (self.num_heads, self.mlp_ratio, self.qk_norm, self.dropout, 2 * i, dtype)
            h = block(*fields, name=f"block_{i}")(h, told, dropout_keys)

        # The last layers start at zero, so an untrained network predicts zero.
        shift, scale = _modulation(told, self.width, 2, dtype, "modulation")
        out_channels = self.out_channels or channels
        out = Dense(self.patch**2 * out_channels, dtype=dtype, kernel_init=ZERO, name="out")
        return _image(out(_normalised(h, shift, scale)), rows, columns, self.patch).astype(jnp.float32)

    def _embed(self, t, cond, dtype):
        """Returns the embedding of the timestep, to which a class adds its own, [B, width]."""
        sizes = {"features": TIME_FEATURES, "width": self.width, "dtype": dtype}
        return embed_told(t + self.time_shift, cond, network=self, **sizes, init=_NORMAL, class_init=_NORMAL)

    def _check(self, x, t, cond):
        """Raises InputError if the fields allow no network, or x, t or cond do not suit it."""
        if self.dtype not in DTYPES:
            raise InputError(f"transformer.dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}")
        check_remat(self.remat, "transformer.remat")
        for name in ("patch", "width", "depth", "num_heads"):
            require_range(f"transformer.{name}", getattr(self, name), 1)
        require_range("transformer.mlp_ratio", self.mlp_ratio, 0, open_ends="low")
        require_range("transformer.dropout", self.dropout, 0, 1, open_ends="high")
        if self.width % self.num_heads or self.width % 4:
            raise InputError(
                f"transformer.width is {self.width}; it must be a multiple of 4 and of {self.num_heads} heads"
            )
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise InputError(
                f"samples of {x.shape[1]}x{x.shape[2]} cannot be cut into patches of {self.patch}; take another "
                "transformer.patch, one that divides both"
            )
        check_told(t, cond, self)


class Block(nn.Module):
    """Adds to every token what it learns from the others and from itself; [B, N, width] -> [B, N, width].

    The block's number `layer` and the next one make its two dropout masks differ from other blocks'.
    """

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    dropout: float
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h, told, dropout_keys=None):
        width = h.shape[-1]
        # Order: shift, scale and gate of the attention, then of the perceptron.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation(told, width, 6, self.dtype, "modulation")
        attended = self._attend(_normalised(h, shift_1, scale_1))
        h += gate_1 * dropout(dropout_keys, self.layer, self.dropout, attended)
        inner = Dense(round(width * self.mlp_ratio), dtype=self.dtype, kernel_init=_XAVIER, name="mlp_1")
        outer = Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name="mlp_2")
        thought = outer(nn.gelu(inner(_normalised(h, shift_2, scale_2)), approximate=True))
        return h + gate_2 * dropout(dropout_keys, self.layer + 1, self.dropout, thought)

    def _attend(self, h):
        batch, tokens, width = h.shape

        def heads(name):
            projected = Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name=name)(h)
            return projected.reshape(batch, tokens, self.num_heads, width // self.num_heads)

        query, key, value = heads("query"), heads("key"), heads("value")
        if self.qk_norm:
            query = nn.RMSNorm(dtype=self.dtype, name="query_norm")(query)
            key = nn.RMSNorm(dtype=self.dtype, name="key_norm")(key)
        out = Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name="attention_out")
        return out(attend(query, key, value).reshape(batch, tokens, width))


def positions(rows: int, columns: int, width: int) -> Float[np.ndarray, "rows*columns width"]:
    """Returns what each patch is told of its place: sines and cosines of its column, and then of its row.

    They are fixed, and patches are counted row by row (MAE, arXiv:2111.06377, as in DiT).

    Args:
      rows, columns: number of patches.
      width: a multiple of 4.
    """
    frequencies = 1 / 10000.0 ** (np.arange(width // 4) / (width // 4))

    def along(places):
        angles = np.outer(places, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([along(column), along(row)], axis=1).astype(np.float32)


def _patches(x, patch):
    """Cuts images [B, H, W, C] into tokens [B, N, patch * patch * C], row by row."""
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, height // patch, patch, width // patch, patch, channels).swapaxes(2, 3)
    return cut.reshape(batch, -1, patch * patch * channels)


def _image(tokens, rows, columns, patch):
    """Puts tokens together to images again, the inverse of `_patches`."""
    cut = tokens.reshape(len(tokens), rows, columns, patch, patch, -1).swapaxes(2, 3)
    return cut.reshape(len(tokens), rows * patch, columns * patch, -1)


def _modulation(told, width, count, dtype, name):
    """Returns count arrays [B, 1, width] that start at zero; the layer becomes one of the calling module's."""
    values = Dense(count * width, dtype=dtype, kernel_init=ZERO, name=name)(told)
    return jnp.split(values[:, None, :], count, axis=-1)


def _normalised(h, shift, scale):
    """Normalises each token with float32 statistics, then scales it by 1 + scale and adds shift."""
    h32 = h.astype(jnp.float32)
    mean = h32.mean(axis=-1, keepdims=True)
    variance = jnp.square(h32 - mean).mean(axis=-1, keepdims=True)
    plain = ((h32 - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(h.dtype)
    return plain * (1 + scale) + shift
