"""What every data source returns, and the one check they share."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from diffusion.errors import InputError


class Dataset(NamedTuple):
    """A data set held in memory.

    images: uint8[N, H, W, C], NHWC, 0..255.
    labels: int32[N] in 0..len(class_names)-1, or None where the source has no classes.
    class_names: one name per class; () where labels is None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]


def require(source: str, field: str, given: object, allowed: Collection) -> None:
    """Raises InputError unless the value given for config.data.<field> is one that the source allows."""
    if given not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise InputError(f"data {source!r} has no {field}={given!r}; set config.data.{field} to one of: {choices}")
