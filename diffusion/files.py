"""Files that appear whole or not at all, locks, and digests."""

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
    """Writes a file through a temporary one beside it, which is gone if anything fails."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0o600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # a signal may come when it has its name
        raise


def write_json(path: str | os.PathLike, record: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a readable JSON file, whole or not at all; numbers that are not finite, which JSON lacks, become null."""
    write_atomically(path, (json.dumps(_finite(record), indent=2, allow_nan=False) + "\n").encode())


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def locked(folder: str | os.PathLike, what: str, name: str = ".lock") -> Iterator[None]:
    """Makes the folder and keeps other processes from doing the same in it.

    Args:
      folder: where the lock lies.
      what: what is done there, for the error: "training in", "measuring into".
      name: of the file that is the lock.

    Raises:
      InputError: another process is doing so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is {what} {folder}; wait for it, or name another folder") from None
        except OSError as error:  # a network file system without locks
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}); let no two processes work there", stacklevel=3
            )
        yield


def digest(params: Mapping[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a nested dict of arrays, as 64 hex digits."""
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    result = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        result.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return result.hexdigest()
