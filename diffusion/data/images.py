"""Loads a folder, zip or tar of image files of any size, with one class per sub-folder."""

import math
import os

import numpy as np
from jaxtyping import Int32

from diffusion.data.archives import open_files
from diffusion.data.dataset import Dataset, require
from diffusion.data.decoding import ImageFiles, read_all
from diffusion.errors import InputError, nearest, require_range

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
GIB = 2**30


def load(path: str = "", split: str = "", size: int = 0, channels: int = 0, max_memory: float = 4.0) -> Dataset:
    """Loads all images below a folder or in an archive, in the order of their relative paths.

    An image's class is the name of the folder it lies in. A set has no classes if any image lies in no folder or all
    lie in the same one; a folder that holds everything does not count, so an archive may have a wrapping folder.
    Hidden files and __MACOSX are left out. `decoding.decode` says how the pixels are made.

    Args:
      path: a folder, .zip, .tar, .tar.gz or .tgz with .jpg, .jpeg, .png, .webp or .bmp files.
      split: the top folder to use, for example "train"; "" uses everything.
      size: height and width of the result in pixels, at least 1.
      channels: 3 (also 0) for RGB, 1 for grey.
      max_memory: GiB; of a larger set each image is decoded whenever it is asked for.

    Returns:
      A data set of images uint8[N, size, size, channels]: an array, or ImageFiles if it would exceed max_memory.

    Raises:
      InputError: the path or an image is missing or damaged (the first in order is named; of ImageFiles only image 0
        is tried), the split is unknown, there are no images or more than fit in this machine's memory, or a set above
        max_memory is in a .tar.gz.
    """
    if not path:
        raise InputError("data 'images' needs a folder or an archive of images; set config.data.path")
    if size < 1:
        raise InputError(f"data 'images' needs a size of at least 1, not {size}; set config.data.size, for example 64")
    require("images", "channels", channels, [0, 1, 3])
    require_range("config.data.max_memory", max_memory, 0)

    # Of all files keep the images, and of these the split.
    files = open_files(path)
    files = files.take(_sorted_images(files.names))
    if not files.names:
        raise InputError(f"{path} has no images; put files with one of {' '.join(SUFFIXES)} there")
    chosen = _select(files.names, split, path)
    files = files.take(chosen)

    # Names without the wrapping folder give the classes, and the set's identity wherever it lies.
    top = len(_common_folder(files.names))
    inner_names = [name[top:] for name in files.names]
    labels, class_names = _classes(inner_names)
    images = ImageFiles(files, size, channels or 3)

    # Decode everything now, or, where that would take too much memory, each image when it is asked for.
    if math.prod(images.shape) > max_memory * GIB:
        _require_reading_out_of_order(images, path, max_memory)
        _require_memory(images.shape[1:])
        _ = images[0]  # files of a wrong kind are found now, not in the middle of training
        return Dataset(images, labels, class_names, images.digest(inner_names))
    _require_memory(images.shape)
    return Dataset(read_all(images), labels, class_names, images.digest(inner_names))


def _is_image(name: str) -> bool:
    hidden = "/." in f"/{name}" or "__MACOSX/" in name
    return name.lower().endswith(SUFFIXES) and not hidden


def _common_folder(names: list[str]) -> str:
    """Returns the innermost folder that holds all of the sorted names, as "a/b/", or "" if there is none."""
    common = os.path.commonprefix([names[0], names[-1]])  # noqa: RUF071 - cut to whole folders below
    return common[: common.rfind("/") + 1]


def _sorted_images(names: list[str]) -> list[int]:
    """Returns the places of the images in names, sorted by name."""
    return sorted((i for i, name in enumerate(names) if _is_image(name)), key=names.__getitem__)


def _select(names: list[str], split: str, path: str) -> range | list[int]:
    """Returns the places of the split in the sorted names; its folder lies at the top or in the wrapping folder."""
    if not split:
        return range(len(names))
    inner = _common_folder(names)
    for folder in (f"{split}/", f"{inner}{split}/"):
        if chosen := [i for i, name in enumerate(names) if name.startswith(folder)]:
            return chosen
    folders = {name[len(top) :].split("/")[0] for top in ("", inner) for name in names if "/" in name[len(top) :]}
    valid = nearest(split, folders) if folders else "there are no sub-folders"
    raise InputError(f"{path} has no folder {split!r}; set config.data.split ({valid}) or leave it empty")


def _classes(names: list[str]) -> tuple[Int32[np.ndarray, "N"] | None, tuple[str, ...]]:
    """Returns each image's class and the names of the classes, or None and () where there are no classes."""
    if not all("/" in name for name in names):
        return None, ()
    folders = [name.rsplit("/", 2)[-2] for name in names]
    class_names = sorted(set(folders))
    number = {name: k for k, name in enumerate(class_names)}
    return np.array([number[folder] for folder in folders], np.int32), tuple(class_names)


def _require_reading_out_of_order(images: ImageFiles, path: str, max_memory: float) -> None:
    if not images.files.reopens:
        raise InputError(
            f"{path} holds {math.prod(images.shape) / GIB:,.1f} GiB of pixels, above config.data.max_memory="
            f"{max_memory:g}, and a .tar.gz cannot be read out of order; unpack it, or repack it as .tar or .zip"
        )


def _require_memory(shape: tuple[int, ...]) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if math.prod(shape) > memory:
        raise InputError(
            f"{' x '.join(map(str, shape))} pixels take {math.prod(shape) / GIB:,.0f} GiB, this machine has "
            f"{memory / GIB:,.0f} GiB of memory; set a smaller config.data.size or config.data.max_memory"
        )
