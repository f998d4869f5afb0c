"""Data sets, held in memory as uint8, and the order in which training walks through them. NumPy only."""

from diffusion.data import cifar10, digits, images
from diffusion.data.dataset import Dataset
from diffusion.data.order import batch_indices
from diffusion.errors import InputError, nearest

__all__ = ["DATASETS", "Dataset", "batch_indices", "load"]

DATASETS = {"digits": digits.load, "cifar10": cifar10.load, "images": images.load}
"""Each is (path, split, size, channels) -> Dataset; "" and 0 stand for the source's own choice."""


def load(name: str, *, path: str = "", split: str = "", size: int = 0, channels: int = 0) -> Dataset:
    """Loads a data set by name; the modules of this package say what each source allows.

    Args:
      name: a key of DATASETS.
      path: where the files are, for sources that read some.
      split: which part of it, for example "train".
      size: height and width of the images in pixels.
      channels: 1 (grey) or 3 (RGB).

    Raises:
      InputError: an unknown name, or an argument that the source does not allow; nothing is ignored in silence.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; set config.data.name ({nearest(name, DATASETS)})")
    return DATASETS[name](path=path, split=split, size=size, channels=channels)
