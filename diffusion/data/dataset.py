"""Defines what every data source returns, and the one check that they share."""

import hashlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from diffusion.data.image_files import ImageFiles
from diffusion.data.latents import Latents
from diffusion.data.names import some
from diffusion.errors import InputError


class Dataset(NamedTuple):
    """Holds the images of a data set and their classes.

    Attributes:
      images: pixels 0..255, as an array, or as ImageFiles that are read whenever they are indexed; in the training of
        a latent model, the latents in their place.
      labels: 0..len(class_names)-1, or None where the source has no classes.
      class_names: one name per class; () where labels is None.
      files: identity of the image files, which stands in for their pixels (see `fingerprint`); "" for other sources.
      left_out: how many files of what kind were found and not read, as "9 .heic, 2 .gif".
      damaged: names of the images that cannot be read and were left out, as the caller asked.
    """

    images: UInt8[np.ndarray, "N H W C"] | ImageFiles | Latents
    labels: Int32[np.ndarray, "N"] | None
    class_names: tuple[str, ...]
    files: str = ""
    left_out: str = ""
    damaged: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Returns how many images each class has, by its name; {} where there are no classes."""
        numbers = () if self.labels is None else np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names, numbers, strict=False))

    def notes(self) -> Iterator[str]:
        """Yields lines on what was left out."""
        if self.left_out:
            yield f"left out: {self.left_out}"
        if self.damaged:
            yield f"left out {len(self.damaged):,} images that cannot be read: {some(self.damaged)}"


def fingerprint(dataset: Dataset) -> str:
    """Returns a SHA-256, as 64 hex digits, that tells data sets apart and is the same on every machine.

    It covers the shape, labels, class names and pixels; in sets above 64 MiB only the pixels of 1,000 images spread
    over the set. For image files, held in memory or not, in a folder or an archive, it covers in place of pixels their
    names and the content of 100 files, see `ImageFiles.digest`.
    """
    images, labels = dataset.images, dataset.labels
    digest = hashlib.sha256(repr((images.shape, dataset.class_names, dataset.files)).encode())
    digest.update(b"" if labels is None else labels.astype("<i4").tobytes())
    if not dataset.files:
        stride = 1 if images.nbytes <= 2**26 else -(-len(images) // 1000)
        digest.update(np.ascontiguousarray(images[::stride]))
    return digest.hexdigest()


def require(source: str, field: str, given: object, allowed: Collection) -> None:
    """Raises InputError unless the value given for an argument is one that the source allows."""
    if given not in allowed:
        choices = ", ".join(f"{field}={choice!r}" for choice in allowed)
        raise InputError(f"data {source!r} has no {field}={given!r}; allowed: {choices}")
