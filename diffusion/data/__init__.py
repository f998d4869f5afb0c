"""Loads data sets, held in memory as uint8 or read from files during training, and makes batches of them.

It needs only NumPy; of its modules just streaming.py imports grain.
"""

from diffusion.data import cifar10, digits, images
from diffusion.data.batching import Batch, Batches, batches
from diffusion.data.dataset import Dataset, fingerprint
from diffusion.data.decoding import ImageFiles
from diffusion.data.order import batch_indices
from diffusion.errors import InputError, nearest

__all__ = ["DATASETS", "Batch", "Batches", "Dataset", "ImageFiles", "batch_indices", "batches", "fingerprint", "load"]

DATASETS = {"digits": digits.load, "cifar10": cifar10.load, "images": images.load}
"""Loaders (path, split, size, channels) -> Dataset by name; "" and 0 leave a choice to the source.

"images" also takes max_memory.
"""


def load(
    name: str, *, path: str = "", split: str = "", size: int = 0, channels: int = 0, max_memory: float = 4.0
) -> Dataset:
    """Loads a data set by name; the module of that name says which arguments its source allows.

    Args:
      name: a key of DATASETS.
      path: where the files are, for sources that read files.
      split: which part of the set, for example "train".
      size: height and width of the images in pixels.
      channels: 1 (grey) or 3 (RGB).
      max_memory: GiB; a larger set of image files is read during training. The other sources are small and always held.

    Raises:
      InputError: the name is unknown, or the source does not allow an argument; nothing is ignored in silence.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; set config.data.name ({nearest(name, DATASETS)})")
    options = {"max_memory": max_memory} if name == "images" else {}
    return DATASETS[name](path=path, split=split, size=size, channels=channels, **options)
