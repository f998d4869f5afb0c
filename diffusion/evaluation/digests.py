"""The identity of a set of arrays, by which files are checked and caches named."""

import hashlib
from typing import Any

import flax.traverse_util
import numpy as np


def digest(params: dict[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a nested dict of arrays, as 64 hex digits."""
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    result = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        result.update(f"{name} {array.dtype} {array.shape}\n".encode())
        result.update(array)
    return result.hexdigest()
