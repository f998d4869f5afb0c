"""A folder, a zip and a tar as one thing: the names of its files, and a function that reads one."""

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
    """Files below a folder. names are relative to it, with "/" between folders, in no particular order."""

    reopens = True

    def __init__(self, path: Path, names: Sequence[str]):
        self._path = path
        self.names = names

    def read(self, i: int) -> bytes:
        """File number i, from any thread or process."""
        return (self._path / self.names[i]).read_bytes()

    def take(self, chosen: Sequence[int]) -> "Folder":
        """The same with these files alone, in this order."""
        return Folder(self._path, [self.names[i] for i in chosen])


class Archive:
    """Files in an archive, read at known places, so that neither threads nor processes need to wait or list it again.

    Attributes:
      names: of the files in it, with "/" between folders, in no particular order.
      reopens: whether it can be pickled and read by other processes.
    """

    def __init__(
        self, path: Path, names: Sequence[str], places: np.ndarray, read_at: Callable, unpacked: BinaryIO | None = None
    ):
        """places: for each name the arguments of read_at after the file; unpacked: an open file to read instead."""
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
        """File number i, from any thread or process."""
        file = self._file  # held until the end: a thread that opens it at the same moment closes the other's
        return self._read_at(file.fileno(), *self._places[i].tolist())

    def take(self, chosen: Sequence[int]) -> "Archive":
        """The same with these files alone, in this order."""
        names = [self.names[i] for i in chosen]
        return Archive(self._path, names, self._places[np.asarray(chosen, np.int64)], self._read_at, self._unpacked)


Files = Folder | Archive


def open_files(path: str) -> Files:
    """Lists a folder or a .zip, .tar, .tar.gz or .tgz archive.

    Raises:
      InputError: the path does not exist, has another suffix, or its listing cannot be read.
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
        raise error  # os.walk would leave out in silence what it may not list

    names, seen = [], set()
    for top, below, found in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:  # links in a circle, or twice to one folder
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
    """Reads what zipfile would, which knows a member only after it has listed the whole archive."""
    header = struct.Struct("<4s5H3I2H")
    signature, _, flags, method, *_, name_bytes, extra_bytes = header.unpack(os.pread(fd, header.size, offset))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile("it is not where the archive's list says")
    if flags & 1:
        raise zipfile.BadZipFile("it is encrypted")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"it is packed by method {method}, only store and deflate can be read")
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
    # A gzip stream cannot be read out of order; an unnamed file can, needs no memory, and vanishes when closed.
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the archive
    with gzip.open(path) as packed:
        shutil.copyfileobj(packed, plain, 1 << 20)
    plain.seek(0)
    return _archive(path, _list_tar(tarfile.open(fileobj=plain, mode="r:")), _read_plain, plain)


def _list_tar(archive: tarfile.TarFile) -> dict[str, tuple[int, int]]:
    members = {posixpath.normpath(m.name): (m.offset_data, m.size) for m in archive if m.isfile()}
    # tarfile takes a cut or a damaged header for the end; the true end is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off after {len(members):,} files")
    return members


def _read_plain(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)


ARCHIVES = {".zip": _open_zip, ".tar": _open_tar, ".tar.gz": _open_tar_gz, ".tgz": _open_tar_gz}
"""How a file is opened, by its suffix in lower case."""
