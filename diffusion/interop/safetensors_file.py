"""Reads safetensors files of strangers: what the header says is checked before a byte of the tensors is read.

The format: eight bytes with the length of the header, the header as JSON, and then the tensors without gaps.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError
from diffusion.files import open_to_read

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""The names of the kinds of numbers that are read."""

HEADER_LIMIT = 2**24
"""The most bytes of a header. A network of a thousand tensors has 100 kB; as Python objects it takes ten times that."""


class Tensor(NamedTuple):
    """Says what one tensor is and where it lies.

    Attributes:
      dtype, shape: of the array.
      begin: its first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Counts its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """Holds what a file says of itself.

    Attributes:
      metadata: texts by name.
      tensors: by name.
    """

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_header(path: str | os.PathLike) -> Header:
    """Reads what a file holds, and not the tensors, so that a caller can refuse them before they take memory.

    Raises:
      InputError: it is no safetensors file, or is damaged: a length, a kind or a place of a tensor does not fit.
      OSError: it cannot be read.
    """
    with open_to_read(path) as file:
        try:
            return _parse(file)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{path} is damaged, or no safetensors file ({reason}); get it again") from None


def _parse(file: BinaryIO) -> Header:
    """Returns the header; raises ValueError, TypeError, KeyError or AttributeError for one that cannot be."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
    entries = json.loads(file.read(length), object_pairs_hook=_without_repetition)
    metadata = entries.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError("its metadata are not texts")
    # The tensors must fill the rest of the file, each where the one before ends.
    tensors, end = {}, 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = Tensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), end)
        numbers = (*tensor.shape, *entry["data_offsets"])
        whole = all(type(n) is int and n >= 0 for n in numbers)
        if not whole or math.prod(n or 1 for n in tensor.shape) > LARGEST:
            raise ValueError(f"{name!r} has the shape {entry['shape']}")
        end += tensor.nbytes
        if entry["data_offsets"] != [tensor.begin - 8 - length, end - 8 - length]:
            raise ValueError(f"{name!r} overlaps another tensor, or leaves a gap")
        tensors[name] = tensor
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, and the file at {size:,}")
    return Header(metadata, tensors)


LARGEST = 2**50
"""No size in a file is as large; NumPy cannot even make an empty array with larger ones."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name comes twice")
    return result


def read_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Reads the tensors that `read_header` found, or some of them; raises as it does."""
    arrays = {}
    with open_to_read(path) as file:
        for name, tensor in tensors.items():
            file.seek(tensor.begin)
            array = np.empty(tensor.shape, tensor.dtype)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != tensor.nbytes:
                raise InputError(f"{Path(path)} breaks off; get it again")
            arrays[name] = array
    return arrays
