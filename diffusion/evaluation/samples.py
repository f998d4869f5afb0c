"""Knows how sampling jobs lie on disk, and reads their images: one call for a job of one file or of many.

A job is a folder with sampling.json, which says what was drawn; the images in samples.npz, or above 1,000 images in
samples-00000-of-00050.npz and so on; and samples.sha256, the SHA-256 of each of these files as `sha256sum` writes it.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from diffusion import files
from diffusion.errors import InputError, is_whole, require_range
from diffusion.interop.zip_file import open_zip

RECORD, CHECKSUMS, SINGLE = "sampling.json", "samples.sha256", "samples.npz"
SHARDS = r"samples-(\d{5,9})-of-(\d{5,9})\.npz"
"""The names of a job's files; the last is a regular expression for the number of a file and their count."""

AGAIN = "start sample.py again with the same --out"

TEXT_LIMIT = 2**24
"""The most bytes of sampling.json and samples.sha256: a job of 10^8 images has 100,000 files, with 90 bytes each."""


class Samples(NamedTuple):
    """Holds the images of a sampling job.

    Attributes:
      images: pixels 0..255.
      ids: the number of each image; with the seed it determines the image.
      labels: the class of each, or None where the model has no classes.
    """

    images: UInt8[np.ndarray, "N H W C"]
    ids: Int[np.ndarray, "N"]
    labels: Int[np.ndarray, "N"] | None


def load_samples(folder: str | os.PathLike, max_memory: float = 1.0) -> Samples:
    """Reads all images of a finished sampling job, after checking that every file is as it was written.

    Args:
      folder: the --out of sample.py, or what that is by default: runs/NAME/samples/ddim-25steps-uniform-seed0.
      max_memory: GiB that the images may take, as a small file can claim to hold many.

    Raises:
      InputError: the job is not finished, a file is missing, damaged or of another job, or max_memory is too small.
    """
    require_range("max_memory", max_memory, 0, open_ends="low")
    folder, limit = Path(folder).expanduser(), int(max_memory * 2**30)
    try:
        names, sums = job_files(folder), read_checksums(folder)
        record = files.read_json(folder / RECORD, TEXT_LIMIT)
        total = record.get("num") if isinstance(record, dict) else None
        if not names or not is_whole(total) or total < 1:
            raise InputError(f"{folder} holds no finished sampling job")
        # The first file tells how large all of them are together.
        parts = [_read_verified(folder / names[0], sums, limit)]
        size = int(total) * math.prod(parts[0].images.shape[1:])
        if size > limit:
            raise InputError(f"the {total:,} images in {folder} take {size / 2**30:.2f} GiB; give a larger max_memory")
        images = np.empty((int(total), *parts[0].images.shape[1:]), np.uint8)
        done = 0
        for name in names:
            part = parts[0] if name == names[0] else _read_verified(folder / name, sums, limit)
            room = images[done : done + len(part.images)]
            if room.shape != part.images.shape or (part.labels is None) != (parts[0].labels is None):
                raise InputError(f"{folder / name} is of another job than {names[0]}")
            room[...] = part.images
            done += len(room)
            parts += [part._replace(images=None)] * (name != names[0])
    except OSError as error:
        place = error.filename or folder
        raise InputError(f"{place} cannot be read ({error.strerror or error}); {AGAIN}") from None
    ids = np.concatenate([part.ids for part in parts])
    if done != total or write_ids(ids) != record.get("ids"):
        raise InputError(f"{folder} does not hold the images that its {RECORD} lists; {AGAIN}")
    return Samples(images, ids, None if parts[0].labels is None else np.concatenate([part.labels for part in parts]))


def job_files(folder: Path) -> list[str]:
    """Returns the names of the files of images that belong to the job in a folder, in order; [] if there is none.

    Raises:
      InputError: one is missing, or they are of two jobs.
    """
    found = sorted(path.name for path in folder.iterdir() if re.fullmatch(SHARDS, path.name))
    single = [SINGLE] * os.path.lexists(folder / SINGLE)
    if single or not found:
        if found:
            raise InputError(f"{folder} holds {SINGLE} and {found[0]}, of two jobs; remove those of one")
        return single
    numbers = [tuple(map(int, re.fullmatch(SHARDS, name).groups())) for name in found]
    count = numbers[0][1]
    if sorted(numbers) != [(index, count) for index in range(len(numbers))] or len(numbers) != count:
        raise InputError(f"{folder} holds {len(found):,} files of a job of {count:,}; {AGAIN}")
    return [name for _, name in sorted(zip(numbers, found, strict=True))]


def read_checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file by its name, as samples.sha256 says; a line that broke off is left out."""
    try:
        text = files.read(folder / CHECKSUMS, TEXT_LIMIT, folder).decode(errors="replace")
    except FileNotFoundError:
        return {}
    lines = (re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in text.split("\n"))
    return {match[2]: match[1] for match in lines if match}


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, which must lie in its folder itself and not behind a link."""
    with files.open_to_read(path, path.parent) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_verified(path, sums, limit):
    """Returns the images of one file, if they are as they were written."""
    if path.name not in sums:
        raise InputError(f"{path} has no line in {CHECKSUMS}, so its job is not finished, or of version 0.1; {AGAIN}")
    if path.stat().st_size > limit + 2**20:  # what cannot be compressed, and the names of arrays
        raise InputError(f"{path} holds more than the {limit:,} bytes that are allowed; give a larger max_memory")
    if sha256_of(path) != sums[path.name]:
        raise InputError(f"{path} is damaged: it is not what was written; {AGAIN}")
    return read_file(path, limit)


class _TooLargeError(InputError):
    """Reports a file that is whole, and holds more than the caller allows."""


def read_file(path: Path, limit: int) -> Samples:
    """Returns the images of one file of a job.

    Args:
      path: samples.npz, or one of several.
      limit: bytes that its arrays may take.

    Raises:
      InputError: it is damaged, or holds more.
      OSError: it cannot be read.
    """
    arrays, left = {}, limit
    try:
        with files.open_to_read(path, path.parent) as file, open_zip(file) as archive:
            for name in archive.namelist():
                if name in arrays or name not in ("samples.npy", "ids.npy", "labels.npy"):
                    raise ValueError(f"{name!r} does not belong there")
                entry = archive.getinfo(name)
                if entry.file_size > left:
                    sizes = f"{entry.file_size:,} bytes of {name}, {left:,} are allowed"
                    raise _TooLargeError(f"{path} has {sizes}; give a larger max_memory")
                arrays[name] = _read_array(entry, archive)
                left -= arrays[name].nbytes
    except (OSError, _TooLargeError):
        raise
    except Exception as error:  # damaged zips raise nearly any exception
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:150]}); draw it again") from None
    images, ids, labels = (arrays.get(f"{name}.npy") for name in ("samples", "ids", "labels"))
    if images is None or ids is None or images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{path} holds something other than samples and ids; draw it again")
    if any(a.dtype.kind not in "iu" or a.shape != images.shape[:1] for a in (ids, labels) if a is not None):
        raise InputError(f"{path} holds ids or labels that do not fit its samples; draw it again")
    return Samples(images, ids, labels)


def _read_array(entry, archive):
    """Returns an array of a .npz; raises ValueError if it has another size than its own header says."""
    with archive.open(entry) as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename} has not the size that it says")
        return np.frombuffer(file.read(), dtype).reshape(shape)


def write_ids(ids: Sequence[int] | Int[np.ndarray, "N"]) -> str:
    """Writes numbers as --seeds takes them: [0, 1, 2, 7] as "0-2,7"."""
    ids = np.asarray(ids, np.int64)
    parts = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes samples.sha256 anew."""
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    files.write_atomically(folder / CHECKSUMS, text.encode(), folder)


def add_checksum(folder: Path, name: str, value: str) -> None:
    """Adds the line of one file to samples.sha256, which is there; a job of many files does not write it all again."""
    with files.open_to_append(folder / CHECKSUMS, folder) as file:
        file.write(f"{value}  {name}\n".encode())
        file.flush()
        os.fsync(file.fileno())
