"""Vouches for parameters and for JSON files: a number that has changed on the disk is found, and not believed."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from diffusion import files
from diffusion.errors import InputError

LIMIT = 2**23
"""The most bytes that `read` takes unless told otherwise, as JSON takes twenty times that as objects."""

_SEAL = "sha256"


def write(path: str | os.PathLike, record: Mapping[str, Any], within: str | os.PathLike | None = None) -> None:
    """Writes a record as `files.write_json` does, with the SHA-256 of what it holds as its entry "sha256"."""
    files.write_json(path, {**record, _SEAL: digest_of(record)}, within)


def read(path: str | os.PathLike, limit: int = LIMIT, within: str | os.PathLike | None = None) -> dict[str, Any]:
    """Reads what `write` wrote, or an earlier version, which put no SHA-256 into it.

    Raises:
      InputError: it is no JSON object, or not what was written; else as `files.read_json`.
    """
    record = files.read_json(path, limit, within)
    if not isinstance(record, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object; move it away")
    if _SEAL in record and record.pop(_SEAL) != digest_of(record):
        raise InputError(f"{path} is damaged: it is not what was written; move it away")
    return record


def digest_of(record: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a record as 64 hex digits, the same for what is written as JSON and what is read of it."""
    # In the form in which it comes back: texts for the numbers that are keys, null for NaN.
    plain = json.loads(json.dumps(record), parse_constant=lambda _: None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def digest(params: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a nested dict of arrays, as 64 hex digits: of their names, dtypes, shapes and values."""
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    result = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        result.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return result.hexdigest()
