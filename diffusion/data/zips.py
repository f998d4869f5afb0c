"""Lists zip archives and reads their members, in threads and processes that need not list the archive again."""

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from diffusion.data.listing import Listed, Listing
from diffusion.data.names import inside, shown
from diffusion.errors import InputError

HEADER = struct.Struct("<4s5H3I2H")
UNIX = 3  # in a zip, the kind of system that it was made on
CHUNK = 1 << 20
LONGEST_LINK = 4096  # bytes of a symbolic link's target


def list_zip(path: Path) -> Listed:
    """Lists a zip; the places are for `read_member`.

    Raises:
      InputError: a member lies outside the archive.
      Exception: of nearly any kind, as zipfile raises them for a damaged archive.
    """
    listing = Listing(4)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        members = archive.infolist()
        backslashes = _parts_with_backslashes(members)
        for member in members:
            name = _name(member)
            if "\\" in name and (backslashes or member.create_system != UNIX):
                name = name.replace("\\", "/")
            plain = inside(name)
            place = (member.header_offset, member.compress_size, member.CRC, member.file_size)
            if name.endswith("/"):
                continue
            if min(place) < 0 or member.header_offset + member.compress_size > total or member.file_size >= 2**63:
                raise InputError(f"its member {shown(name)!r} does not lie within it; copy the archive again")
            if member.create_system == UNIX and stat.S_ISLNK(member.external_attr >> 16):
                if member.file_size > LONGEST_LINK:
                    raise InputError(f"its member {shown(name)!r} is a link of {member.file_size:,} bytes; repack it")
                listing.add_link(plain, read_member(file.fileno(), *place).decode(errors="surrogateescape"))
            else:
                listing.add(plain, *place)
    return listing.listed()


def _name(member: zipfile.ZipInfo) -> str:
    """Returns a member's name; where the zip does not say how it is written, most programs have written UTF-8."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        written = member.filename.encode("cp437")  # as zipfile has read it
    except UnicodeEncodeError:  # later versions of zipfile also read a field that holds the name in UTF-8
        return member.filename
    try:
        return written.decode()
    except UnicodeDecodeError:
        return os.fsdecode(written) if member.create_system == UNIX else member.filename


def _parts_with_backslashes(members: list[zipfile.ZipInfo]) -> bool:
    r"""Says whether "\" parts the folders of names; raises InputError if some names have "\" and others "/".

    Programs for Windows write it against the rules; on other systems it may be a letter of a file's name.
    """
    unix = [m.filename for m in members if m.create_system == UNIX]
    odd = [name for name in unix if "\\" in name]
    if odd and any("/" in name for name in unix):
        raise InputError(f"its member {shown(odd[0])!r} has a backslash, others have slashes; pack the folder again")
    return bool(odd)


def read_member(fd: int, offset: int, packed: int, crc: int, size: int) -> bytes:
    """Reads one member of a zip as zipfile would, which would first have to list the whole archive.

    Args:
      fd: the archive.
      offset: where the member's header is.
      packed, size: its bytes in the archive, and unpacked; more than that are never unpacked.
      crc: its checksum.

    Raises:
      zipfile.BadZipFile: it is not as the archive's list says, or cannot be unpacked.
    """
    # The list at the archive's end does not say where the content starts; the member's own header does.
    head = os.pread(fd, HEADER.size, offset)
    if len(head) < HEADER.size or head[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("it is not where the archive's list says")
    _, _, flags, method, *_, name_bytes, extra_bytes = HEADER.unpack(head)
    if flags & 1:
        raise zipfile.BadZipFile("it is encrypted")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"it is packed by method {method}, only store and deflate can be read")

    # Read the content, and check it as zipfile does.
    start = offset + HEADER.size + name_bytes + extra_bytes
    content = _inflate(fd, start, packed, size) if method == zipfile.ZIP_DEFLATED else os.pread(fd, packed, start)
    if len(content) != size:
        raise zipfile.BadZipFile(f"its size is not the {size:,} bytes that the archive's list says")
    if zlib.crc32(content) != crc:
        raise zipfile.BadZipFile("its checksum is wrong")
    return content


def _inflate(fd: int, start: int, packed: int, size: int) -> bytes:
    """Returns the unpacked content, or one byte more than `size` of it where it is larger."""
    decoder, result = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    for place in range(start, start + packed, CHUNK):
        chunk = os.pread(fd, min(CHUNK, start + packed - place), place)
        result += decoder.decompress(chunk, size + 1 - len(result))
        if len(result) > size or decoder.eof or not chunk:
            break
    return bytes(result)
