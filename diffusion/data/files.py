"""A folder, a zip and a tar as one thing: the names of its files, and a function that reads one."""

import contextlib
import gzip
import os
import posixpath
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from diffusion.errors import InputError


class Files(NamedTuple):
    """Names relative to the top, with "/" between folders, in no particular order; read(name) from any thread."""

    names: list[str]
    read: Callable[[str], bytes]


@contextlib.contextmanager
def open_files(path: str) -> Iterator[Files]:
    """Opens a folder or a .zip, .tar, .tar.gz or .tgz archive.

    Raises:
      InputError: the path does not exist, has another suffix, or its listing cannot be read.
    """
    location = Path(path).expanduser()
    openers = [opener for suffix, opener in ARCHIVES.items() if location.name.lower().endswith(suffix)]
    if not location.exists():
        raise InputError(f"config.data.path={path!r} does not exist; pass a folder or a {', '.join(ARCHIVES)} file")
    if not location.is_dir() and not openers:
        raise InputError(f"config.data.path={path!r} is no image folder or archive; allowed: {', '.join(ARCHIVES)}")
    with contextlib.ExitStack() as stack:
        try:
            files = _open_folder(location) if location.is_dir() else openers[0](location, stack)
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
            raise InputError(f"{path} cannot be read and may be damaged ({error}); copy it again") from error
        yield files


def _open_folder(folder: Path) -> Files:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out in silence what it may not list

    walk = os.walk(folder, followlinks=True, onerror=fail)
    names = [os.path.relpath(os.path.join(top, name), folder) for top, _, files in walk for name in files]
    return Files([name.replace(os.sep, "/") for name in names], lambda name: (folder / name).read_bytes())


def _open_zip(path: Path, stack: contextlib.ExitStack) -> Files:
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {posixpath.normpath(m.filename): m for m in archive.infolist() if not m.is_dir()}
    return _locked(members, archive.read)


def _open_tar(path: Path, stack: contextlib.ExitStack) -> Files:
    return _list_tar(stack.enter_context(tarfile.open(path, "r:")))


def _open_tar_gz(path: Path, stack: contextlib.ExitStack) -> Files:
    # A gzip stream cannot be read out of order; an unnamed file can, needs no memory, and vanishes when closed.
    plain = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    with gzip.open(path) as packed:
        shutil.copyfileobj(packed, plain, 1 << 20)
    plain.seek(0)
    return _list_tar(stack.enter_context(tarfile.open(fileobj=plain, mode="r:")))


def _list_tar(archive: tarfile.TarFile) -> Files:
    members = {posixpath.normpath(m.name): m for m in archive if m.isfile()}
    # tarfile takes a cut or a damaged header for the end; the true end is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off after {len(members):,} files")
    return _locked(members, lambda member: archive.extractfile(member).read())


def _locked(members: dict, read_member: Callable) -> Files:
    # All readers of an archive share one file position.
    lock = threading.Lock()

    def read(name: str) -> bytes:
        with lock:
            return read_member(members[name])

    return Files(list(members), read)


ARCHIVES = {".zip": _open_zip, ".tar": _open_tar, ".tar.gz": _open_tar_gz, ".tgz": _open_tar_gz}
"""How a file is opened, by its suffix in lower case."""
