"""Decodes one image file to pixels, within bounds on the memory that it may take."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # not all that Pillow reads: a PostScript file, for one, is a program
MIB = 2**20
PIXEL_BYTES = {"WEBP": 8, "TIFF": 8}
"""What a pixel costs in decoding; 4 in the other formats. WebP's decoder keeps two frames, TIFF's may have 16 bits."""

MAX_DECODED = 682
"""MiB of 4-byte pixels above which Pillow refuses any image, whatever we allow."""

STRIP = 2**22  # pixels that are converted at a time
ORIENTATION = 0x0112  # in EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of an EXIF orientation upright."""

SIDEWAYS = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]
"""Those that change height and width."""

# Pillow warns of images that max_decoded allows, and of damaged EXIF, without the image's name.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class Budget:
    """Bounds the memory that threads use at a time: who asks for more than is left waits until others have ended."""

    def __init__(self, total: int):
        self._total = self._left = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, amount: int) -> Iterator[None]:
        """Holds an amount while the body runs; one above the total counts as all of it."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


_PIXELS = Budget(256 * MIB)


def decode(
    content: bytes, size: int, channels: int, max_decoded: int = MAX_DECODED
) -> UInt8[np.ndarray, "{size} {size} {channels}"]:
    """Decodes one image file, turns it upright, and puts white behind what is transparent.

    The largest centred square is resized with Pillow's antialiased bicubic filter. A JPEG's decoder first shrinks it by
    a power of two, to no less than twice the size: this is much faster, and looks the same. EXIF that cannot be read
    counts as none.

    Args:
      content: of the file, one of FORMATS.
      size: height and width of the result in pixels.
      channels: 1 (grey) or 3 (RGB).
      max_decoded: MiB that the whole image may take, by the size that it states and PIXEL_BYTES.

    Raises:
      Exception: of nearly any kind, if the file is damaged; ValueError if it is larger than max_decoded, or its pixels
        are numbers that are no grey levels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"its pixels take more than {MAX_DECODED} MiB, above max_decoded={max_decoded:g}") from None
    cost = _cost(image)
    if cost > max_decoded * MIB:
        width, height = image.size
        raise ValueError(
            f"its {width:,} x {height:,} pixels take {cost / MIB:,.0f} MiB, above max_decoded={max_decoded:g}"
        )
    image.draft(None, (2 * size, 2 * size))
    with _PIXELS.of(_cost(image)):
        wide = image.tile and str(image.tile[0].args).find("RGB;16") >= 0
        image.load()
        if wide and isinstance(image.info.get("transparency"), tuple):  # Pillow has kept the high bytes of the pixels
            image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
        image = _visible(_upright(image), "RGB" if channels == 3 else "L")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(size, size, channels)


def upright_size(content: bytes) -> tuple[int, int]:
    """Returns (width, height) of an image file once it is turned upright; raises as `decode`."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    return image.size[::-1] if _turn(image) in SIDEWAYS else image.size


def _cost(image: Image.Image) -> int:
    """Returns the bytes that decoding takes, by the sizes that the file states."""
    width, height = image.size
    if image.format == "TIFF":  # it is decoded by tiles, which may be larger than the image
        width, height = max(width, _number(image, 322)), max(height, _number(image, 323))
    return width * height * PIXEL_BYTES.get(image.format, 4)


def _number(image: Image.Image, tag: int) -> int:
    value = image.tag_v2.get(tag, 0)
    return value if isinstance(value, int) else 0


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Returns what turns an image upright, or None where it is or nothing can be read."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # EXIF is damaged in as many ways as pixels are, and says nothing of them
        return None
    return UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _visible(image: Image.Image, mode: str) -> Image.Image:
    """Returns the image in a mode without transparency, "RGB" or "L", on white; in strips, which need little memory."""
    if image.mode == mode and not image.has_transparency_data:
        return image
    width, height = image.size
    rows = max(1, STRIP // width)
    result = Image.new(mode, image.size)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        if image.mode.startswith("I"):
            strip = _eight_bits(strip)
        elif image.mode == "F":
            raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
        elif strip.has_transparency_data:
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip.convert("RGBA"))
        result.paste(strip.convert(mode), (0, top))
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns 16-bit grey with 8 bits; depending on its version, Pillow's convert would clip it or cut bits off."""
    wide = np.asarray(image)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16")
    grey = ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)  # v / 257, rounded; it is never halfway
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return Image.fromarray(grey)
