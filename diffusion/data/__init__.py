"""Loads data sets, held in memory as uint8 or read from files during training, and makes batches of them.

It needs only NumPy and Pillow; of its modules just streaming.py imports grain.
"""

from typing import Any

from diffusion.data import cifar10, digits, images
from diffusion.data.batching import Batch, Batches, batches
from diffusion.data.dataset import Dataset, fingerprint
from diffusion.data.image_files import Damaged, ImageFiles
from diffusion.data.images import Reading
from diffusion.data.order import batch_indices
from diffusion.errors import InputError, nearest

__all__ = [
    "DATASETS",
    "Batch",
    "Batches",
    "Damaged",
    "Dataset",
    "ImageFiles",
    "Reading",
    "batch_indices",
    "batches",
    "check",
    "fingerprint",
    "load",
]

DATASETS = {"digits": digits.load, "cifar10": cifar10.load, "images": images.load}
"""Loaders (path, split, size, channels) -> Dataset by name; "" and 0 leave a choice to the source.

"images" also takes labels, and a Reading.
"""


def load(
    name: str,
    *,
    path: str = "",
    split: str = "",
    size: int = 0,
    channels: int = 0,
    labels: str = "",
    **reading: Any,
) -> Dataset:
    """Loads a data set by name; the module of that name says which arguments its source allows.

    Args:
      name: a key of DATASETS.
      path: where the files are, for sources that read files.
      split: which part of the set, for example "train".
      size: height and width of the images in pixels.
      channels: 1 (grey) or 3 (RGB).
      labels: "none" leaves out the classes; "" has those of the source, and so has "folders" for image files.
      reading: max_memory, max_decoded and skip_damaged of `Reading`; the other sources are small, always held,
        and checked as a whole, so they do not need them.

    Raises:
      InputError: the name is unknown, or the source does not allow an argument; nothing is ignored in silence.
    """
    _require_name(name)
    reading = Reading(**reading)
    place = {"path": path, "split": split, "size": size, "channels": channels}
    if name == "images":
        return images.load(**place, labels=labels, reading=reading)
    if labels not in ("", "none"):
        raise InputError(f"data {name!r} has no labels={labels!r}; allowed: labels='', labels='none'")
    dataset = DATASETS[name](**place)
    return dataset._replace(labels=None, class_names=()) if labels else dataset


def check(
    name: str, *, path: str = "", split: str = "", size: int = 0, channels: int = 0, **reading: Any
) -> tuple[list[Damaged], int]:
    """Reads every image of a set and keeps none; returns those that cannot be read, and how many there are in all.

    The arguments and errors are those of `load`, which reads only a few images of a set that is not held in memory.
    """
    _require_name(name)
    place = {"path": path, "split": split, "size": size, "channels": channels}
    if name == "images":
        return images.check(**place, reading=Reading(**reading))
    return [], len(DATASETS[name](**place).images)  # which raises an error for damage anywhere


def _require_name(name: str) -> None:
    if name not in DATASETS:
        raise InputError(f"unknown data set name={name!r}; {nearest(name, DATASETS)}")
