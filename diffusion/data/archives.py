"""Reads a folder, a zip and a tar in one way: as the names of its image files, and a function that reads one of them.

An archive's kind is found by its content, not by its name.
"""

import errno
import functools
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffusion.data import names, tars, zips
from diffusion.data.listing import Listed
from diffusion.errors import InputError, printable

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
MIB = 2**20


class Folder:
    """Reads files below a folder; `names` are relative to it, with "/" between folders."""

    reopens = True

    def __init__(self, path: Path, names: Sequence[str]):
        self._path = path
        self.names = names

    def size(self, i: int) -> int:
        """Returns the bytes of file number i."""
        return os.stat(self._path / self.names[i]).st_size

    def read(self, i: int, most: int) -> bytes:
        """Returns the content of file number i; any thread or process may call it.

        Raises:
          OSError: it is missing, or no regular file, which could have no end.
          ValueError: it has more bytes than `most`.
        """
        # Without O_NONBLOCK, opening a named pipe would wait for ever.
        fd = os.open(self._path / self.names[i], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no regular file")
            _require_size(status.st_size, most)
            return file.read(status.st_size) or b""

    def take(self, chosen: Sequence[int]) -> "Folder":
        """Returns a Folder of only the chosen files, in the order given."""
        return Folder(self._path, [self.names[i] for i in chosen])


class Archive:
    """Reads files of an archive at known offsets, so that threads do not wait and processes do not list it again.

    Attributes:
      names: the files in it, with "/" between folders.
      reopens: whether other processes can read it after it was pickled.
    """

    def __init__(
        self, path: Path, names: Sequence[str], places: np.ndarray, read_at: Callable, unpacked: BinaryIO | None = None
    ):
        """Takes the list of files.

        Args:
          path: the archive.
          names: the files in it.
          places: int64 [N, k], for each name the arguments that read_at takes after the file descriptor; the last is
            the file's size.
          read_at: (file descriptor, *place) -> content.
          unpacked: an open file to read instead of the archive.
        """
        self.names = names
        self.reopens = unpacked is None
        self._path = path
        self._places = places
        self._read_at = read_at
        self._unpacked = unpacked

    @functools.cached_property
    def _file(self) -> BinaryIO:
        return self._unpacked or self._path.open("rb")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def size(self, i: int) -> int:
        """Returns the bytes of file number i, as the archive states them."""
        return int(self._places[i, -1])

    def read(self, i: int, most: int) -> bytes:
        """Returns the content of file number i, never more than the archive states; any thread or process may call it.

        Raises:
          ValueError: it has more bytes than `most`.
          Exception: of nearly any kind, if it is damaged.
        """
        _require_size(self.size(i), most)
        # Keep a reference to the file: another thread may open it at the same moment and replace it in the cache,
        # which would close it here.
        file = self._file
        return self._read_at(file.fileno(), *self._places[i].tolist())

    def take(self, chosen: Sequence[int]) -> "Archive":
        """Returns an Archive of only the chosen files, in the order given."""
        names = [self.names[i] for i in chosen]
        return Archive(self._path, names, self._places[np.asarray(chosen, np.int64)], self._read_at, self._unpacked)


Files = Folder | Archive


def open_files(path: str) -> tuple[Files, Listed]:
    """Lists a folder, or a zip, tar or gzipped tar; returns a reader of its images, and all that it holds.

    Raises:
      InputError: the path does not exist, is neither, or cannot be listed; a member cannot be read or leads out of it.
    """
    given, allowed = printable(path), f"pass a folder or a {', '.join(ARCHIVES)} file"
    try:
        location = Path(path).expanduser().absolute()
        if not location.exists():
            raise InputError(f"path={given!r} does not exist; {allowed}")
        if location.is_dir():
            listed = _list_folder(location)
            return Folder(location, listed.images), listed
        if not location.is_file():
            raise InputError(f"path={given!r} is neither a folder nor a file; {allowed}")
        return _open_archive(location)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith("path=") else f"{given}: {error}") from error
    except (PermissionError, RuntimeError) as error:  # the latter where ~name is nobody's home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"path={given!r} cannot be read ({reason}); check the path and its permissions") from error
    except Exception as error:  # a damaged archive makes zipfile and tarfile raise nearly any exception
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise InputError(f"{given} cannot be read and may be damaged ({reason}); copy it again") from error


def _open_archive(path: Path) -> tuple[Archive, Listed]:
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
        if head.startswith(b"\x1f\x8b"):
            plain = tars.unpack(path)
            plain.seek(0)
            if not _is_tar(plain.read(tarfile.BLOCKSIZE)):
                raise InputError("it is a gzip, but of no tar; unpack it")
            listed = tars.list_tar(plain)
            return Archive(path, listed.images, listed.places, tars.read_member, plain), listed
        if _is_tar(head):
            listed = tars.list_tar(file)
            return Archive(path, listed.images, listed.places, tars.read_member), listed
    if head.startswith(b"PK") or zipfile.is_zipfile(path):
        listed = zips.list_zip(path)
        return Archive(path, listed.images, listed.places, zips.read_member), listed
    known = path.name.lower().endswith(ARCHIVES)
    why = "it may be damaged; copy it again" if known else f"pass a folder or a {', '.join(ARCHIVES)} file"
    raise InputError(f"by its content this is no image folder, zip, tar or gzipped tar; {why}")


def _is_tar(head: bytes) -> bool:
    """Says whether the first block of a file is a tar's: a header, or the zeros at the end of an empty tar."""
    if head == bytes(tarfile.BLOCKSIZE):
        return True
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _list_folder(folder: Path) -> Listed:
    """Lists the files below a folder and below links to folders; no folder is read twice.

    A folder with several names is read by its own and not by a link, or else by the first link in the order of names,
    whatever order the file system lists them in.
    """
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    repeated = 0
    waiting = [""]
    while waiting:
        # What is below these without a link, and then the links that this has found.
        links: list[str] = []
        for start in sorted(waiting):
            status = os.stat(folder / start)
            if (status.st_dev, status.st_ino) in seen:
                repeated += not names.is_hidden(start.rstrip("/"))
                continue
            _walk(folder, start, files, links, seen)
        waiting = links
    images = sorted(filter(names.is_image, files))
    return Listed(images, None, [name for name in files if not names.is_image(name)], repeated)


def _walk(folder: Path, start: str, files: list[str], links: list[str], seen: set[tuple[int, int]]) -> None:
    """Adds the files below a folder, links to folders, and which folders were read; enters no link."""
    stack = [start]
    while stack:
        inner = stack.pop()
        status = os.stat(folder / inner)
        if (status.st_dev, status.st_ino) in seen:  # as a link has led here before
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    files.append(inner + entry.name)
                else:
                    (links if entry.is_symlink() else stack).append(f"{inner}{entry.name}/")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # such as a link to itself
            raise
        return False


def _require_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it takes {size / MIB:,.0f} MiB, above max_decoded={most / MIB:g}")
