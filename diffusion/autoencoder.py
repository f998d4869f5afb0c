"""An autoencoder as the rest of the library sees it: images to scaled latents, and back."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffusion import keys
from diffusion.errors import InputError, require_range
from diffusion.models.autoencoder import AutoencoderNetwork, nearest_codes
from diffusion.types import Images, Params

MAX_PIXELS = 2**18
"""So many pixels are encoded or decoded at a time: 256 images of 32 x 32, or 4 of 256 x 256."""


class Moments(NamedTuple):
    """What the encoder says of the latents: a Gaussian for each number, or only a mean.

    Attributes:
      mean: of the latents.
      std: their standard deviation; 0 where the autoencoder is not a variational one.
    """

    mean: Float[Array, "B h w C"]
    std: Float[Array, "B h w C"]


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A network that turns images into latents and back, without its parameters.

    Its methods are pure functions, jitted once for each shape. Parameters are nested dicts; their entry "scaling"
    holds the "shift" and the "scale" of each channel, with which latents of the training set have mean 0 and variance
    1: scaled latents are (z - shift) scale.

    Attributes:
      image_shape: (H, W, C) of the images that it was trained on; it takes every size that is divisible by `factor`.
      factor: how many times smaller latents are, in height and in width.
      latent_channels: of the latents.
      encoder: (params, images in [-1, 1]) -> `Moments` that are not scaled.
      decoder: (params, latents that are not scaled) -> images.
      init: key -> params, scaled by 1.
    """

    image_shape: tuple[int, int, int]
    factor: int
    latent_channels: int
    encoder: Callable[[Params, Images], Moments]
    decoder: Callable[[Params, Images], Images]
    init: Callable[[jax.Array], Params]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the latents of one image."""
        height, width = self.image_shape[:2]
        return height // self.factor, width // self.factor, self.latent_channels

    def moments(self, params: Params, images: Images, *, batch_size: int = 0) -> Moments:
        """Returns mean and standard deviation of the scaled latents of images.

        Args:
          params: of the autoencoder.
          images: [B, H, W, C] in [-1, 1], H and W divisible by `factor`.
          batch_size: images at a time, which bounds the memory; 0 for as many as have `MAX_PIXELS`.

        Raises:
          InputError: images of another size or number of channels.
        """
        self._check("images", images, self.image_shape[-1], self.factor)
        pixels = images.shape[1] * images.shape[2]
        return _in_parts(functools.partial(_moments, self, params), images, batch_size, pixels)

    def encode(self, params: Params, images: Images, *, batch_size: int = 0) -> Float[Array, "B h w C"]:
        """Returns the scaled latents of images, the mean that `moments` gives; takes the same arguments."""
        return self.moments(params, images, batch_size=batch_size).mean

    def decode(self, params: Params, latents: Float[Array, "B h w C"], *, batch_size: int = 0) -> Images:
        """Returns the images of scaled latents, near to [-1, 1].

        Args:
          params: of the autoencoder.
          latents: [B, h, w, latent_channels], scaled.
          batch_size: images at a time, which bounds the memory; 0 for as many as have `MAX_PIXELS`.

        Raises:
          InputError: latents with another number of channels.
        """
        self._check("latents", latents, self.latent_channels, 1)
        pixels = latents.shape[1] * latents.shape[2] * self.factor**2
        return _in_parts(functools.partial(_decode, self, params), latents, batch_size, pixels)

    def _check(self, what, array, channels, factor):
        """Raises InputError for an array of another number of axes or channels, or of a size that cannot be halved."""
        shape = tuple(array.shape)
        if len(shape) != 4 or shape[-1] != channels or shape[1] % factor or shape[2] % factor or 0 in shape:
            sizes = f", heights and widths that are multiples of {factor}" if factor > 1 else ""
            raise InputError(f"{what} have shape {shape}; this autoencoder takes [B, H, W, {channels}]{sizes}")


class TrainedAutoencoder(NamedTuple):
    """An autoencoder with its parameters, from a run folder or a file.

    Attributes:
      autoencoder: its functions.
      params: its parameters, the average of one EMA, with the "scaling" that was measured on its training set.
      config: the whole config of the run.
      step: how many training steps it has had.
      ema: the name of the EMA.
      sha256: the identity of the parameters, as 64 hex digits.
    """

    autoencoder: Autoencoder
    params: Params
    config: ConfigDict
    step: int
    ema: str
    sha256: str

    def encode(self, params: Params, images: Images, *, batch_size: int = 0) -> Float[Array, "B h w C"]:
        """Returns the scaled latents of images, see `Autoencoder.encode`."""
        return self.autoencoder.encode(params, images, batch_size=batch_size)

    def decode(self, params: Params, latents: Float[Array, "B h w C"], *, batch_size: int = 0) -> Images:
        """Returns the images of scaled latents, see `Autoencoder.decode`."""
        return self.autoencoder.decode(params, latents, batch_size=batch_size)

    def facts(self) -> dict[str, Any]:
        """Returns all but the parameters, for the record of a file."""
        return {
            "config": self.config.to_dict(),
            "image_shape": list(self.autoencoder.image_shape),
            "step": self.step,
            "ema": self.ema,
            "sha256": self.sha256,
        }


def unscaled(channels: int) -> dict[str, Array]:
    """Returns the entry "scaling" of parameters whose latents stay as the encoder gives them."""
    return {"shift": jnp.zeros(channels, jnp.float32), "scale": jnp.ones(channels, jnp.float32)}


def make_autoencoder(fields: Mapping[str, Any], image_shape: tuple[int, int, int]) -> Autoencoder:
    """Returns the autoencoder that the section config.autoencoder describes.

    Args:
      fields: of `AutoencoderNetwork`, except image_channels.
      image_shape: (H, W, C) of the images.

    Raises:
      InputError: a field out of its range, or images that cannot be halved so often.
    """
    return from_network(make_network(fields, image_shape), tuple(map(int, image_shape)))


def make_network(fields: Mapping[str, Any], image_shape: tuple[int, int, int]) -> AutoencoderNetwork:
    """Returns the network alone; takes the arguments of `make_autoencoder`, and raises as it does."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    network = AutoencoderNetwork(**fields, image_channels=int(image_shape[-1]))
    # Raises what is wrong with the fields before anything is computed.
    jax.eval_shape(network.init, keys.make(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return network


@functools.lru_cache
def from_network(network: AutoencoderNetwork, image_shape: tuple[int, int, int]) -> Autoencoder:
    """Returns a network as the rest of the library sees it; equal ones give the same functions, so none recompiles."""

    def call(params, method, x):
        own = {name: part for name, part in params.items() if name != "scaling"}
        return network.apply({"params": own}, x, method=method)

    def encoder(params, images):
        mean, log_variance = call(params, "encode", images)
        return Moments(mean, jnp.exp(0.5 * log_variance))

    def init(key):
        params = network.init(keys.threefry(key), jnp.zeros((1, *image_shape)))["params"]
        return {**params, "scaling": unscaled(network.depth)}

    return Autoencoder(
        image_shape=image_shape,
        factor=network.factor,
        latent_channels=network.depth,
        encoder=encoder,
        decoder=lambda params, z: call(params, "decode", z),
        init=jax.jit(keys.pinned(init)),
    )


def measure_scaling(
    autoencoder: Autoencoder, params: Params, batches: Iterable[Images]
) -> dict[str, Float[np.ndarray, "C"]]:
    """Returns the scaling with which the latents of all images together have mean 0 and variance 1 in each channel.

    Args:
      autoencoder: whose latents.
      params: its parameters, whatever their scaling is now.
      batches: images in [-1, 1], batch by batch; of one size, so that one compilation serves them, but for the last.

    Returns:
      "shift" and "scale"; a channel that is the same everywhere keeps scale 1.

    Raises:
      InputError: there is no image, or a latent that is not finite.
    """
    plain = {**params, "scaling": unscaled(autoencoder.latent_channels)}
    count, sums = 0, np.zeros((2, autoencoder.latent_channels))
    for images in batches:
        z = np.asarray(autoencoder.encode(plain, images), np.float64).reshape(-1, autoencoder.latent_channels)
        count += len(z)
        sums += np.stack([z.sum(axis=0), np.square(z).sum(axis=0)])
    if not count or not np.isfinite(sums).all():
        raise InputError("the latents cannot be measured: there are none, or they are not finite; train again")
    mean = sums[0] / count
    std = np.sqrt(np.maximum(sums[1] / count - np.square(mean), 0))
    return {"shift": mean, "scale": 1 / np.where(std > 1e-6, std, 1)}


def code_numbers(autoencoder: Autoencoder, params: Params, images: Images) -> Int[Array, "B h w"]:
    """Returns which code of its codebook an autoencoder takes for each place of images in [-1, 1].

    Raises:
      InputError: it has no codebook, or as `Autoencoder.encode`.
    """
    if "quantizer" not in params:
        raise InputError("this autoencoder has no codebook; its latents are Gaussian")
    z = autoencoder.encode(params, images)
    shift, scale = _scaling(params)
    z = z / scale + shift
    return nearest_codes(z, params["quantizer"]["embedding"])


@functools.partial(jax.jit, static_argnums=0)
def _moments(autoencoder, params, images):
    mean, std = autoencoder.encoder(params, images)
    shift, scale = _scaling(params)
    return Moments((mean - shift) * scale, std * scale)


@functools.partial(jax.jit, static_argnums=0)
def _decode(autoencoder, params, latents):
    shift, scale = _scaling(params)
    return autoencoder.decoder(params, latents / scale + shift)


def _scaling(params):
    """Returns shift and scale as arrays that fit latents."""
    return (jnp.asarray(params["scaling"][name], jnp.float32)[None, None, None, :] for name in ("shift", "scale"))


def _in_parts(function, x, batch_size, pixels):
    """Calls a function on parts of a batch, all of one size, so that one compilation serves them."""
    require_range("batch_size", batch_size, 0)
    count = len(x)
    size = min(count, batch_size or max(1, MAX_PIXELS // pixels))
    if size == count:
        return function(x)
    parts = []
    for start in range(0, count, size):
        # The last part is filled up with its last image.
        part = function(x[np.minimum(np.arange(start, start + size), count - 1)])
        parts.append(jax.tree.map(lambda leaf, start=start: leaf[: count - start], part))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
