"""Lists tar archives, unpacking gzipped ones, and reads their members."""

import gzip
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO

from diffusion.data.listing import Listed, Listing
from diffusion.data.names import inside
from diffusion.errors import InputError

LONGEST_HEADER = 1 << 20  # bytes of a member's headers; names and times take some hundred
RATIO = 100  # of a gzipped tar's content to the file; images hardly shrink
SMALL = 1 << 28  # bytes up to which any ratio will do
CHUNK = 1 << 20


class _Headers:
    """Stands between tarfile and the file, and bounds what is read for one member; its content is never read."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell = file.seek, file.tell
        self._file = file
        self._left = LONGEST_HEADER

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"a member has a header of more than {LONGEST_HEADER:,} bytes")
        return self._file.read(size)

    def next_member(self) -> None:
        self._left = LONGEST_HEADER


def list_tar(file: BinaryIO) -> Listed:
    """Lists a tar that is not packed; the places are for `read_member`.

    Raises:
      InputError: a member lies outside the archive, or is an image and cannot be read.
      Exception: of nearly any kind, as tarfile raises them for a damaged archive.
    """
    listing, headers, count, end = Listing(2), _Headers(file), 0, 0
    file.seek(0)
    with tarfile.open(fileobj=headers, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all
            headers.next_member()
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError("a member has a size below 0")
            _add(listing, member)
            count, end = count + 1, archive.offset
        # tarfile takes a cut or damaged header for the end of the archive; the true end is a block of zeros.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it breaks off after {count:,} members")
    return listing.listed()


def _add(listing: Listing, member: tarfile.TarInfo) -> None:
    name = inside(member.name)
    if member.islnk():
        listing.add_same(name, inside(member.linkname))
    elif member.issym():
        listing.add_link(name, member.linkname)
    elif member.issparse():
        listing.refuse(name, "it is stored with holes (tar --sparse)")
    elif member.isfile():
        listing.add(name, member.offset_data, member.size)
    elif not member.isdir():
        listing.refuse(name, "it is no file but a device, a pipe or of an unknown kind")


def read_member(fd: int, offset: int, size: int) -> bytes:
    """Reads a member of a tar that is not packed."""
    return os.pread(fd, size, offset)


def unpack(path: Path) -> BinaryIO:
    """Unpacks a gzip into an unnamed file, which needs no memory and vanishes when it is closed.

    A gzip cannot be read out of order.

    Raises:
      InputError: it unpacks to more than RATIO times its size, or to more than the disk has room for.
      OSError, EOFError, zlib.error: it is damaged.
    """
    most = max(SMALL, RATIO * path.stat().st_size)
    free = shutil.disk_usage(tempfile.gettempdir()).free * 9 // 10
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the archive
    try:
        with gzip.open(path) as packed:
            while chunk := packed.read(CHUNK):
                _require_room(plain.tell() + len(chunk), most, free)
                plain.write(chunk)
        plain.flush()
    except BaseException:
        plain.close()
        raise
    return plain


def _require_room(size: int, most: int, free: int) -> None:
    if size > most:
        raise InputError(f"it unpacks to more than {RATIO} times its size; if you trust it, unpack it yourself")
    if size > free:
        raise InputError(
            f"it does not fit unpacked in {tempfile.gettempdir()}, which has room for {free / 2**30:,.1f} GiB; set "
            "TMPDIR to a folder on a larger disk, or repack it as .tar or .zip"
        )
