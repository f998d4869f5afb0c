"""Loads the 1,797 handwritten digits that ship with scikit-learn, real images for examples and tests."""

import numpy as np

from diffusion.data.dataset import Dataset, require


def load(path: str = "", split: str = "", size: int = 0, channels: int = 0) -> Dataset:
    """Loads all the digits: images uint8[1797, 8, 8, 1], labels 0..9.

    The source's 17 grey levels v in 0..16 become round(255 v / 16).

    Args:
      path: must be "", as there is no file to choose.
      split: "" or "all"; the set is too small to be divided.
      size: 0 or 8.
      channels: 0 or 1.

    Raises:
      InputError: an argument has any other value.
    """
    require("digits", "path", path, [""])
    require("digits", "split", split, ["", "all"])
    require("digits", "size", size, [0, 8])
    require("digits", "channels", channels, [0, 1])
    # Importing scikit-learn takes a second, for which users of other data should not wait.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    return Dataset(images, digits.target.astype(np.int32), tuple(map(str, range(10))))
