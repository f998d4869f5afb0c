"""Data sets, in memory as uint8 or read from files while training, and the batches that training makes of them.

NumPy only; streaming.py alone imports grain.
"""

from diffusion.data import cifar10, digits, images
from diffusion.data.batching import Batch, Batches, batches
from diffusion.data.dataset import Dataset, fingerprint
from diffusion.data.decoding import ImageFiles
from diffusion.data.order import batch_indices
from diffusion.errors import InputError, nearest

__all__ = ["DATASETS", "Batch", "Batches", "Dataset", "ImageFiles", "batch_indices", "batches", "fingerprint", "load"]

DATASETS = {"digits": digits.load, "cifar10": cifar10.load, "images": images.load}
"""Each is (path, split, size, channels) -> Dataset, images takes max_memory too; "" and 0: the source's own choice."""


def load(
    name: str, *, path: str = "", split: str = "", size: int = 0, channels: int = 0, max_memory: float = 4.0
) -> Dataset:
    """Loads a data set by name; the modules of this package say what each source allows.

    Args:
      name: a key of DATASETS.
      path: where the files are, for sources that read some.
      split: which part of it, for example "train".
      size: height and width of the images in pixels.
      channels: 1 (grey) or 3 (RGB).
      max_memory: GiB; larger sets of image files are read while training. The other sources are small, always held.

    Raises:
      InputError: an unknown name, or an argument that the source does not allow; nothing is ignored in silence.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; set config.data.name ({nearest(name, DATASETS)})")
    options = {"max_memory": max_memory} if name == "images" else {}
    return DATASETS[name](path=path, split=split, size=size, channels=channels, **options)
