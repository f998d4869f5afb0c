"""Turns images into vectors of features in one of several spaces, from the pixels themselves to FID's Inception."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion.data import Dataset, fingerprint
from diffusion.errors import InputError
from diffusion.evaluation import classifier as classifiers
from diffusion.evaluation import inception as inceptions
from diffusion.evaluation.cache import cached
from diffusion.sealed import digest
from diffusion.types import Images

MAX_PIXELS = 16
"""Largest height and width of images in the space of pixels."""


class Features(NamedTuple):
    """Holds what a space says of images.

    Attributes:
      vectors: one row per image.
      probabilities: of the classes that the space's network knows, or None if it has none.
    """

    vectors: Float[np.ndarray, "N D"]
    probabilities: Float[np.ndarray, "N K"] | None


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """Turns images into vectors by its `extract`, and says which space the vectors are in.

    Attributes:
      name: "pixels", "classifier" or "inception"; part of the names of figures.
      key: identity of the network's parameters; only vectors of equal keys can be compared.
      extract: uint8 images [N, H, W, C], N >= 1, -> Features in float32. Raises InputError for images that the space
        does not take.
      facts: what a report should say of the space, such as the classifier's accuracy on images held out; "doubts" is a
        list of sentences that warn of figures in it.
      params, trace: trace(params, images [N, H, W, C] in [-1, 1]) -> the vectors of `extract`, as a function that JAX
        can trace and differentiate: images are not rounded to 8 bits. None where a space has no such function.
    """

    name: str
    key: str
    extract: Callable[[UInt8[np.ndarray, "N H W C"]], Features]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: Any = None
    trace: Callable[[Any, Images], Float[Array, "N D"]] | None = None


def pixels() -> FeatureSpace:
    """Returns the space whose vectors are the pixels, scaled to [0, 1]; for images of at most 16 x 16.

    For larger images the covariance of pixels, with 3,072 dimensions for 32 x 32 in colour, says little of how they
    look and takes many thousand images to estimate.
    """

    def extract(images):
        _check_images(images)
        if max(images.shape[1:3]) > MAX_PIXELS:
            raise InputError(
                f"pixels of {images.shape[1]} x {images.shape[2]} images are poor features; they are for at most "
                f"{MAX_PIXELS} x {MAX_PIXELS}: use the classifier or Inception"
            )
        return Features(images.reshape(len(images), -1).astype(np.float32) / 255, None)

    def trace(params, images):
        return (images.reshape(len(images), -1) + 1) / 2

    return FeatureSpace("pixels", "pixels 1", extract, trace=trace)


def classifier(
    dataset: Dataset, cache_folder: str | os.PathLike, *, epochs: int = 20, seed: int = 0, batch_size: int = 256
) -> FeatureSpace:
    """Returns the space of a small classifier, trained on the data unless the folder already has it.

    The vectors are its last hidden layer. It is a little surer of real images that it was trained on than of others.

    Args:
      dataset: labelled images, as for `classifier.train`.
      cache_folder: where the weights file lies; made if it is not there. A damaged file is replaced, and there is a
        warning if the folder cannot be used.
      epochs, seed: as for `classifier.train`.
      batch_size: images at a time; changes only memory and speed.

    Raises:
      InputError: the data cannot train a classifier.
    """
    trained = trained_classifier(dataset, cache_folder, epochs=epochs, seed=seed)

    def extract(images):
        _check_images(images)
        if images.shape[1:] != trained.image_shape:
            raise InputError(f"images have shape {images.shape[1:]}; the classifier knows {trained.image_shape}")
        return _in_batches(lambda x: classifiers.apply(trained.params, x, trained.num_classes), images, batch_size)

    facts = {name: value for name, value in trained._asdict().items() if name not in ("params", "image_shape")}
    facts["doubts"] = trained.doubts()
    return FeatureSpace("classifier", trained.sha256(), extract, facts, trained.params, classifiers.vectors)


def trained_classifier(
    dataset: Dataset, cache_folder: str | os.PathLike, *, epochs: int = 20, seed: int = 0
) -> classifiers.Classifier:
    """Returns the classifier of that space itself; takes the arguments of `classifier`, and raises as it does."""
    wanted = fingerprint(dataset), epochs, seed

    def load(path):
        found = classifiers.load(path)
        if (found.data, found.epochs, found.seed) != wanted:
            raise InputError("it is of other data")
        return found

    path = Path(cache_folder, f"classifier-{wanted[0][:16]}-{epochs}-{seed}.safetensors")
    return cached(path, load, lambda: classifiers.train(dataset, epochs=epochs, seed=seed), classifiers.save)


def inception(path: str | os.PathLike | None = None, *, batch_size: int = 32) -> FeatureSpace:
    """Returns the space of FID's Inception, with 2,048 features and 1,008 classes; grey images become RGB.

    Args:
      path: its weights file, see `inception.load`; None downloads it once.
      batch_size: images at a time, about 20 MiB each; changes only memory and speed.
    """
    params = jax.device_put(inceptions.load(path))

    def extract(images):
        _check_images(images)
        return _in_batches(lambda x: inceptions.apply(params, x), _coloured(images), batch_size)

    def trace(params, images):
        resized = inceptions.resize(_coloured(images))
        return inceptions.Inception().apply({"params": params}, resized).pool

    return FeatureSpace("inception", digest(jax.device_get(params)), extract, params=params, trace=trace)


def _coloured(images):
    """Returns grey images as RGB, and others as they are; takes NumPy and JAX arrays."""
    return images if images.shape[3] == 3 else images.repeat(3, axis=3)


def _check_images(images):
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[3] not in (1, 3):
        raise InputError(f"images are {images.dtype} {images.shape}; give uint8 [N, H, W, 1 or 3], at least one")


def _in_batches(apply, images, batch_size):
    """Returns Features from a network `apply` of images -> (vectors, logits), which is compiled for one batch size."""
    vectors, probabilities = [], []
    for start in range(0, len(images), batch_size):
        # Fill the last batch up with its last image, so that it has the shape that is already compiled.
        found = apply(images[np.minimum(np.arange(start, start + batch_size), len(images) - 1)])
        count = min(batch_size, len(images) - start)
        vectors.append(np.asarray(found[0])[:count])
        probabilities.append(np.asarray(jax.nn.softmax(found[1]))[:count])
    return Features(np.concatenate(vectors), np.concatenate(probabilities))
