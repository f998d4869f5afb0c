"""Where a model works: in the pixels of images, or in the latents of an autoencoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key, UInt8

from diffusion import keys
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.images import to_floats, to_uint8
from diffusion.types import Images


@dataclasses.dataclass(frozen=True)
class Space:
    """Where a model works, and the way there and back.

    Attributes:
      shape: of one sample, (H, W, C) for pixels.
      encode: uint8 images [B, H, W, C] -> [B, *shape]; works inside jit.
      decode: [B, *shape] -> uint8 images, an array of NumPy's.
      clip: the clip that suits it: "recompute" where clean samples lie in [-1, 1], "none" where they have no bound.
      draw: (stored examples [B, ...], keys [B]) -> clean samples [B, *shape], where training reads something else than
        uint8 images: latents are stored as `moments` returns them, and drawn anew in each step. None for `encode`.
      autoencoder: whose latents these are; None for any other space.
    """

    shape: tuple[int, ...]
    encode: Callable[[Any], Images]
    decode: Callable[[Any], UInt8[np.ndarray, "B H W C"]]
    clip: str
    draw: Callable[[Any, Key[Array, "B"]], Images] | None = None
    autoencoder: TrainedAutoencoder | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image outside."""
        return self.shape if self.autoencoder is None else self.autoencoder.autoencoder.image_shape

    def examples(self, stored: Any, sample_keys: Key[Array, "B"]) -> Images:
        """Returns clean samples as training takes them, each by its own key; works inside jit."""
        return self.encode(stored) if self.draw is None else self.draw(stored, sample_keys)


def pixels(image_shape: tuple[int, int, int]) -> Space:
    """Returns the space of the images themselves, scaled to [-1, 1].

    Args:
      image_shape: (H, W, C).
    """
    return Space(tuple(image_shape), to_floats, to_uint8, "recompute")


def latents(trained: TrainedAutoencoder) -> Space:
    """Returns the space of an autoencoder's latents, each channel of which has variance 1 on its training set.

    Args:
      trained: the autoencoder; images have the size that it was trained on.
    """
    autoencoder, params = trained.autoencoder, trained.params

    def encode(images):
        return autoencoder.encode(params, to_floats(images))

    def decode(x):
        return to_uint8(np.asarray(autoencoder.decode(params, jnp.asarray(x))))

    return Space(
        shape=autoencoder.latent_shape,
        encode=encode,
        decode=decode,
        clip="none",
        draw=draw_latents,
        autoencoder=trained,
    )


def with_hole(
    trained: TrainedAutoencoder, image: UInt8[np.ndarray, "H W C"], anew: Bool[np.ndarray, "H W 1"]
) -> Float32[np.ndarray, "h w 1+c"]:
    """Returns what an inpainting network is told of a picture: where it is drawn anew, and the latents of the rest.

    As in StableDiffusionInpaintPipeline of diffusers, what is drawn anew is grey in the picture, and a place of the
    latents is drawn anew where the first of its pixels is.

    Args:
      trained: the autoencoder.
      image: the picture.
      anew: which of its pixels are drawn anew.
    """
    seen = np.where(anew, np.float32(0), np.asarray(to_floats(image)))
    found = np.asarray(trained.encode(trained.params, seen[None]))[0]
    factor = trained.autoencoder.factor
    return np.concatenate([anew[::factor, ::factor].astype(np.float32), found], axis=-1)


def moments(trained: TrainedAutoencoder, images: UInt8[Array, "B H W C"]) -> Float32[np.ndarray, "B h w 2*c"]:
    """Returns mean and standard deviation of the latents of images, one after the other along the channels."""
    found = trained.autoencoder.moments(trained.params, to_floats(images))
    return np.asarray(jnp.concatenate(found, axis=-1))


def draw_latents(stored: Float[Array, "B h w 2*c"], sample_keys: Key[Array, "B"]) -> Float[Array, "B h w c"]:
    """Draws latents from the Gaussians that `moments` returns; each depends only on its own key.

    Args:
      stored: means and standard deviations.
      sample_keys: keys of the step; fold_in 5 makes the noise, as lower numbers are taken.
    """
    mean, std = jnp.split(stored, 2, axis=-1)
    noise = jax.vmap(lambda key: keys.normal(jax.random.fold_in(key, 5), mean.shape[1:], mean.dtype))(sample_keys)
    return mean + std * noise
