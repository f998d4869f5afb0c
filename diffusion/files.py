"""Files that appear whole or not at all, locks and digests, and images as pixels."""

import contextlib
import fcntl
import hashlib
import io
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
from jaxtyping import Float, UInt8
from PIL import Image

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


def write_gif(path: str | os.PathLike, frames: Sequence[UInt8[np.ndarray, "H W C"]], milliseconds: int = 80) -> None:
    """Writes a looping GIF whose last frame stays for a second."""
    pictures = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames]
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, buffer.getvalue())


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


def to_uint8(images: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels in [-1, 1] to the nearest of 0..255; values outside are cut off."""
    scaled = np.round((np.asarray(images, np.float32) + 1) * 127.5)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def grid(images: UInt8[np.ndarray, "N H W C"], *, columns: int = 0, min_height: int = 64) -> UInt8[np.ndarray, "H W C"]:
    """All images on one, in rows, one pixel apart.

    Args:
      images: NHWC with 1 or 3 channels.
      columns: images a row; 0 for a square.
      min_height: smaller images are enlarged by a whole factor to at least this height.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(count**0.5)
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(min_height / height))
    cell_height, cell_width = height * factor + 1, width * factor + 1
    canvas = np.full((rows * cell_height + 1, columns * cell_width + 1, channels), 255, np.uint8)
    for i, image in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        top, left = i // columns * cell_height + 1, i % columns * cell_width + 1
        canvas[top : top + height * factor, left : left + width * factor] = image
    return canvas


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "H W C"]) -> None:
    """Writes a PNG of 1 or 3 channels, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
