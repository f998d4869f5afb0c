"""Encodes a data set once and keeps its latents on disk, so that training in them never asks the autoencoder again."""

import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from diffusion import files
from diffusion.data.dataset import Dataset, fingerprint
from diffusion.data.latents import Latents
from diffusion.training import manifest

SHARD = 2048
"""How many images one file has the latents of."""

_SHARDS = r"\d{6}\.npy"

Encoder = Callable[[UInt8[np.ndarray, "B H W C"]], Float32[np.ndarray, "B h w 2*c"]]
"""Gives the mean and the standard deviation of the latents of images, one after the other along the channels."""


def encoded(
    dataset: Dataset,
    encode: Encoder,
    autoencoder: str,
    folder: str | os.PathLike,
    *,
    flip: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Latents:
    """Returns the latents of a data set, from disk where they are there.

    They lie in a folder named after all that they depend on, so those of another autoencoder, of other images, classes
    or sizes, or without mirror images are never taken. Each file appears whole or not at all, and what was killed goes
    on after the last one. If nothing can be written there is a warning, and they are kept in memory.

    Args:
      dataset: the images.
      encode: the autoencoder; it gets `SHARD` images at a time, the last of them repeated where there are fewer, so
        that the same images have the same latents bit for bit.
      autoencoder: its identity, 64 hex digits.
      folder: where the folder lies; made if it is not there.
      flip: whether to encode the mirror image of each image as well.
      progress: is called with the number of images done and their number, before the first and after each file.

    Raises:
      InputError: an image cannot be read.
    """
    facts = (SHARD, fingerprint(dataset), _pixels(dataset), autoencoder, flip)
    home = Path(folder, hashlib.sha256(repr(facts).encode()).hexdigest()[:32])
    count = len(dataset.images)
    paths = [home / f"{number:06}.npy" for number in range(-(-count // SHARD))]
    if _is_whole(home):
        return Latents([_opened(path) for path in paths])
    progress(0, count)
    shards = []
    for number, path in enumerate(paths):
        if not path.exists():
            made = _encode_shard(dataset, encode, number * SHARD, flip)
            shards.append(_opened(path) if _save(path, made) else made)
        else:
            shards.append(_opened(path))
        progress(min((number + 1) * SHARD, count), count)
    if all(isinstance(shard, np.memmap) for shard in shards):
        _finish(home)
    return Latents(shards)


def _encode_shard(dataset, encode, start, flip):
    """Returns the moments of `SHARD` images from one on, and of their mirror images, [n, V, h, w, 2 c]."""
    count = min(SHARD, len(dataset.images) - start)
    images = dataset.images[np.minimum(np.arange(start, start + SHARD), start + count - 1)]
    views = [images, images[:, :, ::-1]] if flip else [images]
    return np.stack([np.asarray(encode(np.ascontiguousarray(view)), np.float32)[:count] for view in views], axis=1)


def _pixels(dataset):
    """Returns the SHA-256 of all pixels in memory; those of files are known by the set's own fingerprint."""
    images = dataset.images
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest() if isinstance(images, np.ndarray) else ""


def _opened(path):
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _is_whole(home):
    """Tells whether a folder holds all that was written there; what is damaged is removed, to be made again."""
    if not home.is_dir():
        return False
    files.remove_temporaries(home, _SHARDS, home)
    if not (home / manifest.NAME).exists():
        return False
    try:
        manifest.verify(home)
    except (OSError, ValueError) as error:
        warnings.warn(f"latents in {home} are made again: {error}", stacklevel=3)
        for name in (_SHARDS, re.escape(manifest.NAME)):
            files.remove_matching(home, name, home)
        return False
    return True


def _save(path, moments):
    """Writes a file of latents; returns whether it could, after a warning if not."""
    buffer = io.BytesIO()
    np.save(buffer, moments)
    try:
        files.make_folder(path.parent)
        files.write_atomically(path, buffer.getvalue(), path.parent)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror or error}): latents stay in memory", stacklevel=4)
        return False
    return True


def _finish(home):
    """Seals a folder that is complete; without the seal its files are taken as they are."""
    try:
        manifest.write(home)
    except OSError as error:  # of another process that has just done so, or of a full disk
        warnings.warn(f"{home} stays unsealed ({error.strerror or error})", stacklevel=3)
