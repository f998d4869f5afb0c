"""What every data source returns, and the one check they share."""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from diffusion.data.decoding import ImageFiles
from diffusion.errors import InputError


class Dataset(NamedTuple):
    """A data set.

    images: uint8[N, H, W, C], NHWC, 0..255: an array, or ImageFiles that are read whenever they are indexed.
    labels: int32[N] in 0..len(class_names)-1, or None where the source has no classes.
    class_names: one name per class; () where labels is None.
    files: identity of the files the images come from, where pixels are none (see `fingerprint`); "" elsewhere.
    """

    images: np.ndarray | ImageFiles
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    files: str = ""


def fingerprint(dataset: Dataset) -> str:
    """A SHA-256 that tells data sets apart, as 64 hex digits: the same on other machines, in archives and folders.

    Of the shape, labels, class names and the pixels; of sets above 64 MiB the pixels of 1,000 images spread over the
    set; of image files, held in memory or not, their names and the content of 100, see `ImageFiles.digest`.
    """
    images, labels = dataset.images, dataset.labels
    digest = hashlib.sha256(repr((images.shape, dataset.class_names, dataset.files)).encode())
    digest.update(b"" if labels is None else labels.astype("<i4").tobytes())
    if not dataset.files:
        stride = 1 if images.nbytes <= 2**26 else -(-len(images) // 1000)
        digest.update(np.ascontiguousarray(images[::stride]))
    return digest.hexdigest()


def require(source: str, field: str, given: object, allowed: Collection) -> None:
    """Raises InputError unless the value given for config.data.<field> is one that the source allows."""
    if given not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise InputError(f"data {source!r} has no {field}={given!r}; set config.data.{field} to one of: {choices}")
