"""Reads a folder, a zip and a tar in one way: as the names of its files, and a function that reads one of them."""

import functools
import gzip
import os
import posixpath
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffusion.errors import InputError


class Folder:
    """Reads the files below a folder; `names` are relative to it, with "/" between folders, in no particular order."""

    reopens = True

    def __init__(self, path: Path, names: Sequence[str]):
        self._path = path
        self.names = names

    def read(self, i: int) -> bytes:
        """Returns the content of file number i; any thread or process may call it."""
        return (self._path / self.names[i]).read_bytes()

    def take(self, chosen: Sequence[int]) -> "Folder":
        """Returns a Folder of only the chosen files, in the order given."""
        return Folder(self._path, [self.names[i] for i in chosen])


class Archive:
    """Reads files of an archive at known offsets, so that threads do not wait and processes do not list it again.

    Attributes:
      names: the files in it, with "/" between folders, in no particular order.
      reopens: whether other processes can read it after it was pickled.
    """

    def __init__(
        self, path: Path, names: Sequence[str], places: np.ndarray, read_at: Callable, unpacked: BinaryIO | None = None
    ):
        """Takes the list of files as the openers below make it.

        Args:
          path: the archive.
          names: the files in it.
          places: int64 [N, k], for each name the arguments that read_at takes after the file descriptor.
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

    def read(self, i: int) -> bytes:
        """Returns the content of file number i; any thread or process may call it."""
        # Keep a reference to the file: another thread may open it at the same moment and replace it in the cache,
        # which would close it here.
        file = self._file
        return self._read_at(file.fileno(), *self._places[i].tolist())

    def take(self, chosen: Sequence[int]) -> "Archive":
        """Returns an Archive of only the chosen files, in the order given."""
        names = [self.names[i] for i in chosen]
        return Archive(self._path, names, self._places[np.asarray(chosen, np.int64)], self._read_at, self._unpacked)


Files = Folder | Archive


def open_files(path: str) -> Files:
    """Lists a folder or a .zip, .tar, .tar.gz or .tgz archive.

    Raises:
      InputError: the path does not exist, has another suffix, or cannot be listed.
    """
    location = Path(path).expanduser()
    openers = [opener for suffix, opener in ARCHIVES.items() if location.name.lower().endswith(suffix)]
    if not location.exists():
        raise InputError(f"config.data.path={path!r} does not exist; pass a folder or a {', '.join(ARCHIVES)} file")
    if not location.is_dir() and not openers:
        raise InputError(f"config.data.path={path!r} is no image folder or archive; allowed: {', '.join(ARCHIVES)}")
    try:
        return (_open_folder if location.is_dir() else openers[0])(location.absolute())
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{path} cannot be read and may be damaged ({error}); copy it again") from error


def _open_folder(folder: Path) -> Folder:
    def fail(error: OSError) -> None:
        raise error  # without this, os.walk silently skips folders that it may not list

    names, seen = [], set()
    for top, below, found in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:  # links can lead back here: visit each folder once
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = "" if top == str(folder) else os.path.relpath(top, folder).replace(os.sep, "/") + "/"
        names += [inner + name for name in found]
    return Folder(folder, names)


def _archive(path: Path, members: dict[str, tuple[int, ...]], read_at: Callable, unpacked=None) -> Archive:
    return Archive(path, list(members), np.array(list(members.values()), np.int64), read_at, unpacked)


def _open_zip(path: Path) -> Archive:
    with zipfile.ZipFile(path) as archive:
        members = {
            posixpath.normpath(m.filename): (m.header_offset, m.compress_size, m.CRC)
            for m in archive.infolist()
            if not m.is_dir()
        }
    return _archive(path, members, _read_zipped)


def _read_zipped(fd: int, offset: int, size: int, crc: int) -> bytes:
    """Reads one member of a zip as zipfile would, which would first have to list the whole archive."""
    # The list at the archive's end does not say where the content starts; the member's own header does.
    header = struct.Struct("<4s5H3I2H")
    signature, _, flags, method, *_, name_bytes, extra_bytes = header.unpack(os.pread(fd, header.size, offset))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile("it is not where the archive's list says")
    if flags & 1:
        raise zipfile.BadZipFile("it is encrypted")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"it is packed by method {method}, only store and deflate can be read")

    # Read the content, and check it as zipfile does.
    content = os.pread(fd, size, offset + header.size + name_bytes + extra_bytes)
    if method == zipfile.ZIP_DEFLATED:
        content = zlib.decompress(content, -zlib.MAX_WBITS)
    if zlib.crc32(content) != crc:
        raise zipfile.BadZipFile("its checksum is wrong")
    return content


def _open_tar(path: Path) -> Archive:
    with tarfile.open(path, "r:") as archive:
        return _archive(path, _list_tar(archive), _read_plain)


def _open_tar_gz(path: Path) -> Archive:
    # A gzip stream cannot be read out of order, so it is unpacked into an unnamed file, which needs no memory and
    # vanishes when it is closed.
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the archive
    with gzip.open(path) as packed:
        shutil.copyfileobj(packed, plain, 1 << 20)
    plain.seek(0)
    return _archive(path, _list_tar(tarfile.open(fileobj=plain, mode="r:")), _read_plain, plain)


def _list_tar(archive: tarfile.TarFile) -> dict[str, tuple[int, int]]:
    members = {posixpath.normpath(m.name): (m.offset_data, m.size) for m in archive if m.isfile()}
    # tarfile takes a cut or damaged header for the end of the archive; the true end is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off after {len(members):,} files")
    return members


def _read_plain(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)


ARCHIVES = {".zip": _open_zip, ".tar": _open_tar, ".tar.gz": _open_tar_gz, ".tgz": _open_tar_gz}
"""Functions that open an archive, by its suffix in lower case."""
