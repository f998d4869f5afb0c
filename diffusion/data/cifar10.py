"""Loads CIFAR-10 from its official binary archive, which unlike the pickled one runs no code when it is read."""

import errno
import hashlib
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from diffusion.data.dataset import Dataset, require
from diffusion.errors import InputError, printable

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
REMEDY = f"download {URL} by hand and pass path=/path/to/cifar-10-binary.tar.gz"

FOLDER = "cifar-10-batches-bin"
SPLITS = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
RECORDS_PER_FILE = 10_000
RECORD_BYTES = 1 + 3 * 32 * 32
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load(path: str = "", split: str = "", size: int = 0, channels: int = 0) -> Dataset:
    """Loads CIFAR-10: images uint8[N, 32, 32, 3], labels 0..9; N is 50,000 (train) or 10,000 (test).

    Args:
      path: the official cifar-10-binary.tar.gz, or a folder with its .bin files or with cifar-10-batches-bin; ""
        downloads the archive (162 MiB) once into the user's cache.
      split: "train" (also "") or "test".
      size: 0 or 32.
      channels: 0 or 3.

    Raises:
      InputError: an argument has another value, the download fails, or a file is missing or damaged.
    """
    split = split or "train"
    require("cifar10", "split", split, SPLITS)
    require("cifar10", "size", size, [0, 32])
    require("cifar10", "channels", channels, [0, 3])
    try:
        location = Path(path).expanduser() if path else _download()
        is_folder = location.is_dir()
    except (OSError, RuntimeError) as error:  # no such user, or a name that is too long
        raise InputError(f"path={printable(path)!r} cannot be read ({error}); correct it, or {REMEDY}") from error
    if is_folder:
        files = _read_folder(location, SPLITS[split])
    else:
        if path:
            _check_archive(location)
        files = _read_archive(location, SPLITS[split])
    images, labels = zip(*(parse_records(content, name, RECORDS_PER_FILE) for name, content in files), strict=True)
    return Dataset(np.concatenate(images), np.concatenate(labels), CLASS_NAMES)


def parse_records(
    content: bytes, name: str, num_records: int
) -> tuple[UInt8[np.ndarray, "num_records 32 32 3"], Int32[np.ndarray, "num_records"]]:
    """Decodes one .bin file, whose records are a label byte and then 32x32 planes of red, green and blue.

    Args:
      content: of the file.
      name: what errors call the file.
      num_records: how many records it must have.

    Returns:
      The images, 0..255, and their labels, 0..9.

    Raises:
      InputError: the number of records differs, or a label is above 9.
    """
    if len(content) != num_records * RECORD_BYTES:
        raise InputError(
            f"{name} does not hold {num_records:,} records of {RECORD_BYTES} bytes: "
            f"it is damaged or not CIFAR-10's binary version; {REMEDY}"
        )
    records = np.frombuffer(content, np.uint8).reshape(num_records, RECORD_BYTES)
    labels = records[:, 0].astype(np.int32)
    if labels.max(initial=0) > 9:
        raise InputError(f"{name} has label {labels.max()}, allowed are 0..9: the file is damaged; {REMEDY}")
    planes = records[:, 1:].reshape(num_records, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _download() -> Path:
    import pooch

    try:
        return Path(
            pooch.retrieve(
                URL,
                known_hash=f"sha256:{SHA256}",
                fname="cifar-10-binary.tar.gz",
                path=pooch.os_cache("diffusion"),
                progressbar=sys.stderr.isatty(),
            )
        )
    except (OSError, ValueError) as error:  # OSError: no network or no space; ValueError: a wrong hash
        reason = " ".join(str(error).split())
        raise InputError(f"CIFAR-10 could not be downloaded ({reason}); {REMEDY}") from error


def _read_folder(folder: Path, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    return [(str(folder / name), _read_file(folder / name)) for name in names]


def _read_file(path: Path) -> bytes:
    """Returns a file's content, of a larger one only so much that its size is seen to be wrong."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        with path.open("rb") as file:
            return file.read(RECORDS_PER_FILE * RECORD_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error


def _check_archive(archive: Path) -> None:
    if not archive.is_file():
        raise InputError(f"path={str(archive)!r} is neither a file nor a folder; correct it, or {REMEDY}")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(f"{archive} is not CIFAR-10's binary archive (sha256 {digest}, expected {SHA256}); {REMEDY}")


def _read_archive(archive: Path, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            # Read in the archive's order, not ours: to go back in a gzip stream is to decompress it from the start.
            content = {m.name: tar.extractfile(m).read() for m in tar if m.name.removeprefix(f"{FOLDER}/") in names}
        return [(f"{archive}:{name}", content[f"{FOLDER}/{name}"]) for name in names]
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{archive} cannot be read ({error!r}); {REMEDY}") from error
