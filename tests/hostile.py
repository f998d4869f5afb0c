"""Builds archives, images and folders that are damaged or meant to harm, and loads them in a process of their own.

ARCHIVES, IMAGES and FOLDERS hold functions path -> None by name, which write a file or a folder there. Each of them
must end in one line of error, or be read, with little memory and nothing written.
"""

import gzip
import io
import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30


def picture(side=8, file_format="PNG", mode="RGB", **options):
    """The bytes of a good image."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- zips


def deflated_zeros(size):
    """A raw deflate stream of that many zeros, a multiple of 1 MiB, without compressing them all."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first * (size // MIB) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def member(name, content=None, *, packed=None, method=0, **fields):
    """One entry of a zip; a keyword replaces what its header should say."""
    content = picture() if content is None else content
    packed = content if packed is None else packed
    right = {"flags": 0x800, "crc": zlib.crc32(content), "stored": len(packed), "size": len(content)}
    return {
        "name": name.encode(),
        "data": packed,
        "method": method,
        "system": 3,
        "attr": 0,
        "extra": b"",
        **right,
        **fields,
    }


def write_zip(path, *members):
    local, central = b"", b""
    for m in members:
        offset = m.get("offset", len(local))
        common = struct.pack(
            "<5H3I2H", 20, m["flags"], m["method"], 0, 33, m["crc"], m["stored"], m["size"], len(m["name"]), 0
        )
        local += b"PK\3\4" + common + m["name"] + m["data"]
        made_by = m["system"] << 8 | 20
        central += b"PK\1\2" + struct.pack("<H", made_by) + common[:-2] + struct.pack("<H", len(m["extra"]))
        central += struct.pack("<3H2I", 0, 0, 0, m["attr"] << 16, offset) + m["name"] + m["extra"]
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(members), len(members), len(central), len(local), 0)
    path.write_bytes(local + central + end)


def zip_of(*members):
    return lambda path: write_zip(path, *members)


def zip_bomb(path):
    """1 MiB that unpacks to 1 GiB, as it says."""
    write_zip(path, member("a.png", b"", packed=deflated_zeros(GIB), method=8, size=GIB))


def zip_lying_bomb(path):
    """1 MiB that unpacks to 1 GiB, and says 100 bytes."""
    write_zip(path, member("a.png", b"", packed=deflated_zeros(GIB), method=8, size=100))


def zip_below_the_limit(path):
    """200 MiB of zeros, which may be unpacked."""
    write_zip(path, member("a.png", bytes(200 * MIB), packed=deflated_zeros(200 * MIB), method=8))


def zip_on_one_place(path):
    """A thousand members that are all the same bytes of 100 MiB unpacked."""
    one = member("0000.png", b"", packed=deflated_zeros(100 * MIB), method=8, size=300 * MIB)
    write_zip(path, one, *(dict(one, name=f"{i:04}.png".encode(), data=b"", offset=0) for i in range(1, 1000)))


def zip_with_zip64_sizes(path):
    extra = struct.pack("<2H2Q", 1, 16, 2**63, 2**63)
    write_zip(path, member("a.png", extra=extra, size=0xFFFFFFFF, stored=0xFFFFFFFF))


def cut(build, share):
    """The first part of what another builder writes."""

    def write(path):
        build(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


LINK = stat.S_IFLNK | 0o777

# ----------------------------------------------------------------------------------------------------------------- tars


def info(name, content=b"", **fields):
    result = tarfile.TarInfo(name)
    result.size = len(content)
    for field, value in fields.items():
        setattr(result, field, value)
    return result, content


def tar_bytes(*entries, tar_format=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for entry, content in entries:
            archive.addfile(entry, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def tar_of(*entries, **options):
    return lambda path: path.write_bytes(tar_bytes(*entries, **options))


GOOD = info("good.png", picture())


def gzipped_zeros(before, count, after=b""):
    """A gzip of some bytes, of zeros, and of other bytes, without compressing the zeros."""
    parts = [gzip.compress(before), *[gzip.compress(bytes(MIB), 9)] * (count // MIB), gzip.compress(after)]
    return b"".join(parts)


def tar_gz_bomb(path):
    """2 MiB that unpack to 2 GiB."""
    path.write_bytes(gzipped_zeros(tar_bytes(info("a.png"))[:512], 2 * GIB))


def tar_with_a_header_of_zeros(kind):
    """A member whose own header goes on for 200 MiB, in 200 KiB."""

    def write(path):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 200 * MIB
        path.write_bytes(gzipped_zeros(header.tobuf(), 200 * MIB, tar_bytes(GOOD)))

    return write


def tar_with_a_size_below_zero(path):
    header = bytearray(info("a.png")[0].tobuf())
    header[124:136] = b"\xff" * 10 + b"\xf0\x00"
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    path.write_bytes(tar_bytes(GOOD)[:1024] + header + bytes(1024))


def tar_with_pax(records):
    """A member after a PAX header of these records."""
    entry, content = info("a.png", picture(), pax_headers=records)
    return tar_of(GOOD, (entry, content), tar_format=tarfile.PAX_FORMAT)


def tar_of_sparse_numbers(path):
    """A map of holes that goes on for 200 MiB of numbers, in less than 1 MiB."""
    header, _ = info("a.png", b"", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    header.size = 200 * MIB
    block = gzip.compress(b"0\n" * (MIB // 2), 9)
    head = header.tobuf(tarfile.PAX_FORMAT) + b"999999999\n"
    path.write_bytes(gzip.compress(head) + block * 200 + gzip.compress(bytes(10240)))


def tar_of_nested_long_names(path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    path.write_bytes((header.tobuf() + b"a".ljust(512, b"\0")) * 5000 + tar_bytes(GOOD))


def tar_of_many(path):
    """50,000 empty members of different names, in a few hundred KiB."""
    headers = b"".join(tarfile.TarInfo(f"{i:06}.txt").tobuf() for i in range(50_000))
    path.write_bytes(gzip.compress(headers + tar_bytes(GOOD), 1))


def tar_with_a_damaged_header(path):
    content = bytearray(tar_bytes(GOOD, info("b.png", picture())))
    content[content.index(b"b.png")] ^= 1
    path.write_bytes(content)


def member_of(kind):
    return tar_of(GOOD, info("a.png", type=kind))


ARCHIVES = {
    "zip_bomb": zip_bomb,
    "zip_lying_bomb": zip_lying_bomb,
    "zip_below_the_limit": zip_below_the_limit,
    "zip_on_one_place": zip_on_one_place,
    "zip_with_zip64_sizes": zip_with_zip64_sizes,
    "zip_outside": zip_of(member("../a.png")),
    "zip_outside_by_backslashes": zip_of(member("..\\..\\a.png", system=0)),
    "zip_absolute": zip_of(member("/tmp/a.png")),
    "zip_of_a_drive": zip_of(member("C:\\a.png", system=0)),
    "zip_link_outside": zip_of(member("a.png", b"/etc/passwd", attr=LINK)),
    "zip_link_up": zip_of(member("x/a.png", b"../../a.png", attr=LINK)),
    "zip_long_link": zip_of(member("a.png", bytes(10_000), attr=LINK)),
    "zip_link_no_utf8": zip_of(member("a.png", b"\xff\xfe", attr=LINK)),
    "zip_encrypted": zip_of(member("a.png", flags=0x801)),
    "zip_of_another_method": zip_of(member("a.png", method=12)),
    "zip_of_another_checksum": zip_of(member("a.png", crc=1)),
    "zip_of_another_size": zip_of(member("a.png", size=1)),
    "zip_beyond_its_end": zip_of(member("a.png", offset=10**6)),
    "zip_of_damaged_extra": zip_of(member("a.png", extra=b"\1\0\xff\xff")),
    "zip_of_terminal_escapes": zip_of(member("\x1b]0;owned\x07\x1b[2Ja.png", b"no image")),
    "zip_of_newlines": zip_of(member("a\nerror: all is well\n.png", b"no image")),
    "zip_of_a_bad_name": zip_of({**member("a.png"), "name": b"\xff\xfe.png"}),
    "zip_of_a_long_name": zip_of(member("a" * 60_000 + ".png", b"no image")),
    "zip_cut": cut(zip_of(member("a.png")), 0.6),
    "tar_outside": tar_of(GOOD, info("../a.png", picture())),
    "tar_absolute": tar_of(info("/tmp/a.png", picture())),
    "tar_link_outside": tar_of(GOOD, info("a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "tar_link_up": tar_of(GOOD, info("x/a.png", type=tarfile.SYMTYPE, linkname="../../a.png")),
    "tar_folder_link_outside": tar_of(GOOD, info("x", type=tarfile.SYMTYPE, linkname="/etc")),
    "tar_below_a_link": tar_of(info("x", type=tarfile.SYMTYPE, linkname="."), info("x/a.png", picture())),
    "tar_links_in_a_circle": tar_of(
        info("a.png", type=tarfile.SYMTYPE, linkname="b.png"), info("b.png", type=tarfile.SYMTYPE, linkname="a.png")
    ),
    "tar_hard_link_outside": tar_of(GOOD, info("a.png", type=tarfile.LNKTYPE, linkname="../../etc/passwd")),
    "tar_hard_link_to_nothing": tar_of(GOOD, info("a.png", type=tarfile.LNKTYPE, linkname="b.png")),
    "tar_device": member_of(tarfile.CHRTYPE),
    "tar_pipe": member_of(tarfile.FIFOTYPE),
    "tar_of_an_unknown_kind": member_of(b"Z"),
    "tar_gz_bomb": tar_gz_bomb,
    "tar_pax_of_zeros": tar_with_a_header_of_zeros(tarfile.XHDTYPE),
    "tar_long_name_of_zeros": tar_with_a_header_of_zeros(tarfile.GNUTYPE_LONGNAME),
    "tar_with_a_size_below_zero": tar_with_a_size_below_zero,
    "tar_pax_size_below_zero": tar_with_pax({"size": "-1536"}),
    "tar_pax_size_of_words": tar_with_pax({"size": "many"}),
    "tar_pax_huge_size": tar_with_pax({"size": "9" * 30}),
    "tar_pax_sparse_of_words": tar_with_pax({"GNU.sparse.map": "a,b", "GNU.sparse.size": "x"}),
    "tar_of_sparse_numbers": tar_of_sparse_numbers,
    "tar_of_nested_long_names": tar_of_nested_long_names,
    "tar_of_many": tar_of_many,
    "tar_with_a_damaged_header": tar_with_a_damaged_header,
    "tar_cut": cut(tar_of(GOOD, info("b.png", picture(64))), 0.3),
    "gzip_cut": cut(lambda path: path.write_bytes(gzip.compress(tar_bytes(GOOD))), 0.5),
    "gzip_of_text": lambda path: path.write_bytes(gzip.compress(b"hello " * 1000)),
    "zeros": lambda path: path.write_bytes(bytes(10_240)),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "nothing": lambda path: path.write_bytes(b""),
}
"""Archives: builders by name."""

# --------------------------------------------------------------------------------------------------------------- images


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, rows=b"", *, colour=2, depth=8, before=b""):
    """A PNG of a stated size, whose packed rows may be of another."""
    head = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def zlib_zeros(size):
    """A zlib stream of at least that many zeros; its checksum is missing, which decoders of PNG do not mind."""
    return b"\x78\xda" + deflated_zeros(-(-size // MIB) * MIB)


def tiff(width, height, data, **tags):
    """A TIFF of 8-bit RGB packed by deflate, in one strip; tags are given as _277=3."""
    values = {256: width, 257: height, 258: 8, 259: 8, 262: 2, 273: 8, 277: 3, 278: height, 279: len(data)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    values = {tag: value for tag, value in values.items() if value is not None}
    offset = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in sorted(values.items()))
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, offset) + data + bytes(len(data) % 2) + directory


def written(content):
    return lambda path: path.write_bytes(content() if callable(content) else content)


def jpeg_of(width, height):
    """A good progressive JPEG that states another size."""
    content = bytearray(picture(16, "JPEG", progressive=True))
    place = content.index(b"\xff\xc2") + 5
    content[place : place + 4] = struct.pack(">2H", height, width)
    return bytes(content)


def webp_canvas():
    """A lossless WebP of 16,383 x 16,383 pixels in a header, and little more."""
    body = bytearray(picture(8, "WEBP", lossless=True))
    place = body.index(b"VP8L") + 9
    body[place : place + 4] = struct.pack("<I", 16382 | 16382 << 14)
    return bytes(body)


def bmp(width, height, bits=24):
    head = struct.pack("<2sI2HI", b"BM", 0, 0, 0, 54)
    return head + struct.pack("<I2i2H6I", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0) + bytes(100)


def large(mode, side, file_format, **options):
    """A good image of one colour at the limit of what is read."""

    def make():
        buffer = io.BytesIO()
        Image.new(mode, (side, side)).save(buffer, file_format, **options)
        return buffer.getvalue()

    return written(make)


def float_tiff():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


IMAGES = {
    "png_of_huge_sides.png": written(png(60_000, 60_000)),
    "png_beyond_all.png": written(png(2**31 - 1, 2**31 - 1)),
    "png_bomb.png": written(lambda: png(16_000, 16_000, zlib_zeros(16_000 * 48_001))),
    "png_of_no_pixels.png": written(png(0, 0)),
    "png_longer_than_it_says.png": written(lambda: png(8, 8, zlib_zeros(GIB))),
    "png_at_the_limit.png": written(lambda: png(8192, 8192, zlib_zeros(8192 * 32_769), colour=6)),
    "png_of_16_bits_at_the_limit.png": written(lambda: png(8192, 8192, zlib_zeros(8192 * 16_385), colour=0, depth=16)),
    "png_text_bomb.png": written(lambda: png(8, 8, before=chunk(b"zTXt", b"a\0\0" + zlib_zeros(GIB)))),
    "png_profile_bomb.png": written(lambda: png(8, 8, before=chunk(b"iCCP", b"a\0\0" + zlib_zeros(GIB)))),
    "png_cut.png": written(picture(64)[:3000]),
    "jpeg_of_huge_sides.jpg": written(jpeg_of(65_500, 65_500)),
    "jpeg_at_the_limit.jpg": written(jpeg_of(8192, 8192)),
    "jpeg_cut.jpg": written(picture(64, "JPEG")[:1000]),
    "jpeg_of_damaged_exif.jpg": written(picture(8, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "webp_of_huge_sides.webp": written(webp_canvas),
    "webp_at_the_limit.webp": large("RGB", 5700, "WEBP", method=0),
    "webp_cut.webp": written(picture(64, "WEBP")[:200]),
    "tiff_of_huge_sides.tif": written(tiff(10**5, 10**5, b"")),
    "tiff_of_a_huge_tile.tif": written(
        lambda: tiff(8, 8, zlib_zeros(GIB), _273=None, _278=None, _279=None, _322=18_000, _323=18_000, _324=8, _325=MIB)
    ),
    "tiff_of_many_samples.tif": written(tiff(8, 8, b"", _277=65_535)),
    "tiff_strip_bomb.tif": written(lambda: tiff(8, 8, zlib_zeros(GIB))),
    "tiff_at_the_limit.tif": large("RGB", 5700, "TIFF", compression="tiff_deflate"),
    "tiff_in_a_circle.tif": written(tiff(8, 8, b"")[:-4] + struct.pack("<I", 8)),
    "tiff_of_floats.tif": written(float_tiff),
    "bmp_of_huge_sides.bmp": written(bmp(50_000, 50_000)),
    "bmp_of_sides_below_zero.bmp": written(bmp(-8, -8)),
    "gif.png": written(picture(8, "GIF")),
    "postscript.jpg": written(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"),
    "page.jpg": written(b"<html>"),
    "nothing.png": written(b""),
    "sparse.png": lambda path: path.open("wb").truncate(4 * GIB),
}
"""Image files: builders by file name."""


def folder_of(make):
    def write(path):
        path.mkdir()
        (path / "good.png").write_bytes(picture())
        make(path)

    return write


FOLDERS = {
    "pipe": folder_of(lambda path: os.mkfifo(path / "a.png")),
    "device": folder_of(lambda path: (path / "a.png").symlink_to("/dev/zero")),
    "link_to_itself": folder_of(lambda path: (path / "a.png").symlink_to("a.png")),
    "link_to_nothing": folder_of(lambda path: (path / "a.png").symlink_to("b.png")),
    "escapes": folder_of(lambda path: (path / "\x1b[2Ja.png").write_bytes(b"no image")),
    "no_utf8": folder_of(lambda path: (path / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"no image")),
}
"""Folders: builders by name."""

# -------------------------------------------------------------------------------------------------------------- loading

_LOADER = """
import json, os, resource, signal, sys, time, types
package = types.ModuleType("diffusion")  # without its __init__, which imports JAX
package.__path__ = [sys.argv[1] + "/diffusion"]
sys.modules["diffusion"] = package
from diffusion import data
from diffusion.errors import InputError

for path in json.load(sys.stdin):
    reading, writing = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if not child:
        signal.alarm(120)
        try:
            data.load("images", path=path, size=8)
            answer = ["read", ""]
        except InputError as error:
            answer = ["refused", str(error)]
        except BaseException as error:
            answer = ["broken", repr(error)]
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    end, message = json.loads(answer) if answer else ("broken", f"status {status}")
    result = {"path": path, "end": end, "message": message}
    print(json.dumps(result | {"memory": usage.ru_maxrss * 1024, "seconds": time.monotonic() - begin}), flush=True)
"""


def load(paths, **options):
    """Loads each path by itself; returns dicts of end ("read", "refused", "broken"), message, memory and seconds."""
    command = [sys.executable, "-c", _LOADER, str(ROOT)]
    listed = json.dumps([os.fspath(path) for path in paths])
    result = subprocess.run(command, input=listed, capture_output=True, text=True, timeout=1200, **options)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr
