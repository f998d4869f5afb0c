"""Writes files that appear whole or not at all, locks folders, and computes digests."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from diffusion.errors import InputError


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file whole or not at all, by renaming a temporary one beside it, which is removed if anything fails."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets only the owner read it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # missing if a signal came just after the renaming
        raise


def write_json(path: str | os.PathLike, record: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a readable JSON file, whole or not at all; NaN and infinity, which JSON lacks, become null."""
    write_atomically(path, (json.dumps(_finite(record), indent=2, allow_nan=False) + "\n").encode())


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def locked(folder: str | os.PathLike, what: str, name: str = ".lock") -> Iterator[None]:
    """Makes the folder, and holds a lock that keeps other processes from doing the same work in it.

    Args:
      folder: where the lock lies.
      what: the work, for the error message: "training in", "measuring into".
      name: of the lock file.

    Raises:
      InputError: another process holds the lock.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is {what} {folder}; wait for it, or name another folder") from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}); let no two processes work there", stacklevel=3
            )
        yield


def digest(params: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a nested dict of arrays, as 64 hex digits: of their names, dtypes, shapes and values."""
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    result = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        result.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return result.hexdigest()
