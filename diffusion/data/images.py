"""Loads a folder, zip or tar of image files of any size, with one class per sub-folder."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from diffusion import machine
from diffusion.data import image_files, names
from diffusion.data.archives import open_files
from diffusion.data.dataset import Dataset, require
from diffusion.data.decoding import MAX_DECODED
from diffusion.data.image_files import Damaged, ImageFiles
from diffusion.errors import InputError

GIB = 2**30


class Reading(NamedTuple):
    """Says how image files are read.

    Attributes:
      max_memory: GiB of pixels; of a larger set each image is decoded whenever it is asked for.
      max_decoded: MiB; an image file that is larger, or whose pixels would be, is refused.
      skip_damaged: leave out images that cannot be read; else they are an error.
    """

    max_memory: float = 4.0
    max_decoded: float = 256.0
    skip_damaged: bool = False


DEFAULT = Reading()


class _Found(NamedTuple):
    """What a path holds, before any image is decoded."""

    images: ImageFiles
    inner_names: list[str]
    labels: Int32[np.ndarray, "N"] | None
    class_names: tuple[str, ...]
    left_out: str


def load(
    path: str = "", split: str = "", size: int = 0, channels: int = 0, labels: str = "", reading: Reading = DEFAULT
) -> Dataset:
    """Loads all images below a folder or in an archive, in the order of their relative paths.

    `names.classes` says which classes they have, and `decoding.decode` how the pixels are made. A folder that holds
    everything does not count, so an archive may have a wrapping folder. Hidden files and __MACOSX are left out.

    Args:
      path: a folder, zip, tar or gzipped tar with files of one of `names.SUFFIXES`.
      split: the top folder to use, for example "train"; "" uses everything.
      size: height and width of the result in pixels, at least 1.
      channels: 3 (also 0) for RGB, 1 for grey.
      labels: "", "folders" or "none", see `names.classes`.
      reading: limits, and what to do with damaged images.

    Returns:
      A data set of images uint8[N, size, size, channels]: an array, or ImageFiles if it would exceed max_memory.

    Raises:
      InputError: the path is missing or damaged, the split is unknown, there are no images or more than fit in this
        machine's memory, a set above max_memory is in a .tar.gz; or images are damaged, and all of them are named. Of
        ImageFiles 100 are tried, those that stand for the set in its fingerprint, unless skip_damaged asks for all.
    """
    found = _find(path, split, size, channels, labels, reading)
    images = found.images
    # Decode everything now, or, where that would take too much memory, each image when it is asked for.
    if math.prod(images.shape) > reading.max_memory * GIB:
        _require_reading_out_of_order(images, path, reading.max_memory)
        _require_memory(images.shape[1:])
        pixels, chosen = None, None if reading.skip_damaged else images.sample()
        damaged = image_files.find_damaged(images, chosen)
    else:
        _require_memory(images.shape)
        pixels, damaged = image_files.read_all(images)
    if damaged and not reading.skip_damaged:
        tried = len(images.sample()) if pixels is None else len(images)
        image_files.refuse(list(damaged.values()), tried, len(images))
    return _dataset(found, pixels, damaged)


def check(
    path: str = "", split: str = "", size: int = 0, channels: int = 0, reading: Reading = DEFAULT
) -> tuple[list[Damaged], int]:
    """Reads every image and keeps none; returns those that cannot be read, in order, and how many there are in all.

    The arguments and errors are those of `load`.
    """
    found = _find(path, split, size, channels, "none", reading)
    _require_memory(found.images.shape[1:])
    return list(image_files.find_damaged(found.images).values()), len(found.images)


def _find(path, split, size, channels, labels, reading):
    """Checks the arguments and lists the images, their names below all common folders, and their classes."""
    if not path:
        raise InputError("data 'images' needs a folder or an archive of images; set path=FOLDER")
    if size < 1:
        raise InputError(f"data 'images' needs a size of at least 1, not size={size}; set for example size=64")
    require("images", "channels", channels, [0, 1, 3])
    if not reading.max_memory >= 0:
        raise InputError(f"max_memory={reading.max_memory} is out of range; it must be at least 0")
    if not 1 <= reading.max_decoded <= MAX_DECODED:
        raise InputError(f"max_decoded={reading.max_decoded} is out of range; it must be in 1..{MAX_DECODED} MiB")

    # Of all files keep the images of the split.
    files, listed = open_files(path)
    left_out = [names.kinds(listed.others)] if names.kinds(listed.others) else []
    if not files.names:
        hint = f"; it has {left_out[0]}" if left_out else ""
        raise InputError(f"{path} has no images{hint}; put files with one of {' '.join(names.SUFFIXES)} there")
    folder = names.split_folder(files.names, split, path)
    if folder:
        files = files.take([i for i, name in enumerate(files.names) if name.startswith(folder)])
        left_out = [names.kinds(name for name in listed.others if name.startswith(folder))]
    if listed.repeated:
        left_out += [f"{listed.repeated:,} links to folders that are read by their own names"]

    # Names without the wrapping folder give the classes, and the set's identity wherever it lies.
    top = len(names.common_folder(files.names))
    inner_names = [name[top:] for name in files.names]
    found_labels, class_names = names.classes(files.names, labels)
    images = ImageFiles(files, size, channels or 3, reading.max_decoded)
    return _Found(images, inner_names, found_labels, class_names, ", ".join(filter(None, left_out)))


def _dataset(found: _Found, pixels: np.ndarray | None, damaged: dict[int, Damaged]) -> Dataset:
    """Returns the data set, without its damaged images; pixels are None where it is read from its files later."""
    images, inner_names, labels = found.images, found.inner_names, found.labels
    if damaged:
        kept = [i for i in range(len(images)) if i not in damaged]
        if not kept:
            image_files.refuse(list(damaged.values()), len(images), len(images))
        if labels is not None:
            if len(empty := set(labels.tolist()) - set(labels[kept].tolist())):
                raise InputError(
                    f"no image of class {names.shown(found.class_names[min(empty)])} can be read, "
                    f"such as {next(iter(damaged.values()))}; put good copies in their places, or remove its folder"
                )
            labels = labels[kept]
        if pixels is not None:
            for k, i in enumerate(kept):  # in place, as the set may take most of the memory
                pixels[k] = pixels[i]
            pixels = pixels[: len(kept)]
        images, inner_names = images.take(kept), [inner_names[i] for i in kept]
    return Dataset(
        images if pixels is None else pixels,
        labels,
        found.class_names,
        images.digest(inner_names),
        found.left_out,
        tuple(found.inner_names[i] for i in damaged),
    )


def _require_reading_out_of_order(images: ImageFiles, path: str, max_memory: float) -> None:
    if not images.files.reopens:
        raise InputError(
            f"{path} holds {math.prod(images.shape) / GIB:,.1f} GiB of pixels, above max_memory={max_memory:g}, and a "
            ".tar.gz cannot be read out of order; unpack it, or repack it as .tar or .zip"
        )


def _require_memory(shape: tuple[int, ...]) -> None:
    memory = machine.memory()
    if math.prod(shape) > memory:
        raise InputError(
            f"{' x '.join(map(str, shape))} pixels take {math.prod(shape) / GIB:,.0f} GiB, this machine has "
            f"{memory / GIB:,.0f} GiB of memory; set a smaller size={shape[-2]}, or a smaller max_memory="
        )
