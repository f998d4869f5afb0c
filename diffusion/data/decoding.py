"""Decodes image files to arrays: one of them, all at once, or each when it is asked for."""

import contextlib
import hashlib
import io
import operator
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion.data.archives import Files
from diffusion.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # not all that Pillow reads: a PostScript file, for one, is a program
BLOCK = 32  # images that one task of the thread pool decodes


class ImageFiles:
    """Stands in for an array uint8[N, H, W, C], and decodes its images from files when they are asked for.

    It has the array's shape, dtype and length, and is indexed along N by a number, a slice, or integers int[b], which
    give new arrays of shape [H, W, C] or [b, H, W, C]. It can be pickled, and several threads may use it at once.

    Raises:
      InputError: an image cannot be read; the message names it.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: Files, size: int, channels: int):
        self.files = files
        self.shape = (len(files.names), size, size, channels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> UInt8[np.ndarray, "*b H W C"]:
        if isinstance(index, slice):
            index = range(len(self))[index]
        if np.ndim(index) == 0:
            return self._decode(range(len(self))[operator.index(index)])
        images = np.empty((len(index), *self.shape[1:]), np.uint8)
        for k, i in enumerate(index):
            images[k] = self[i]
        return images

    def digest(self, inner_names: list[str]) -> str:
        """Returns the identity of the files: a SHA-256 of their names and of the content of 100 of them.

        It leaves out the pixels, which differ a little between versions of JPEG decoders, and the files' sizes, as
        asking for each takes long in a large folder.

        Args:
          inner_names: the files' names, without the folders that hold them all.
        """
        digest = hashlib.sha256("\0".join(inner_names).encode(errors="surrogateescape"))
        for i in sorted({k * (len(self) - 1) // 99 for k in range(100)}):
            with _naming(self.files.names[i]):
                digest.update(self.files.read(i))
        return digest.hexdigest()

    def _decode(self, i: int) -> np.ndarray:
        with _naming(self.files.names[i]):
            return decode(self.files.read(i), *self.shape[2:])


def read_all(images: ImageFiles) -> UInt8[np.ndarray, "N H W C"]:
    """Returns all the images as one array; if some cannot be read, the error names the first."""
    result = np.empty(images.shape, np.uint8)

    def decode_block(start: int) -> int:
        block = range(start, min(start + BLOCK, len(images)))
        for i in block:
            result[i] = images[i]
        return len(block)

    # Threads decode at the same time only while Pillow has released the interpreter's lock. For tiny files, around
    # 64x64 pixels and less, they hold the lock most of the time and would only wait for each other.
    with _naming(images.files.names[0]):
        threads = 1 if len(images.files.read(0)) < 4096 else os.cpu_count()
    hidden = None if len(images) > 5000 else True  # tqdm takes None as "hidden unless on a terminal"
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(images), desc="reading images", disable=hidden) as bar:
        for count in pool.map(decode_block, range(0, len(images), BLOCK)):
            bar.update(count)
    return result


def decode(content: bytes, size: int, channels: int) -> UInt8[np.ndarray, "{size} {size} {channels}"]:
    """Decodes one image file, turns it upright, and puts white behind what is transparent.

    The largest centred square is resized with Pillow's antialiased bicubic filter. A JPEG's decoder first shrinks it by
    a power of two, to no less than twice the size: this is much faster, and looks the same.

    Args:
      content: of the file, one of FORMATS.
      size: height and width of the result in pixels.
      channels: 1 (grey) or 3 (RGB).
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    image.draft(None, (2 * size, 2 * size))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey; depending on its version, Pillow's convert would clip it or cut bits
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes the decoders raise nearly any exception
        reason = " ".join(re.sub(r"<.*?>", "", str(error)).split())  # "<_io.BytesIO object at ...>" says nothing
        raise InputError(
            f"image {name} cannot be read ({reason}); put a good copy in its place, or remove it before a run starts"
        ) from error
