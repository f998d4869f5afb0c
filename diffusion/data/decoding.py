"""Image files as arrays: one decoded, all decoded at once, or each when it is asked for."""

import contextlib
import hashlib
import io
import operator
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion.data.archives import Files
from diffusion.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's others include PostScript, which is a program
BLOCK = 32  # images per task of the thread pool


class ImageFiles:
    """The images of some files, decoded when they are asked for; in place of an array uint8[N, H, W, C].

    Has its shape, dtype and length, and is indexed like it along N: by a number, a slice, or integers int[b], which
    give new arrays of shape [H, W, C] or [b, H, W, C]. Can be pickled; may be used by several threads at once.

    Raises:
      InputError: where an image cannot be read; it is named.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: Files, size: int, channels: int):
        self.files = files
        self.shape = (len(files.names), size, size, channels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = range(len(self))[index]
        if np.ndim(index) == 0:
            return self._decode(range(len(self))[operator.index(index)])
        images = np.empty((len(index), *self.shape[1:]), np.uint8)
        for k, i in enumerate(index):
            images[k] = self[i]
        return images

    def digest(self, inner_names: list[str]) -> str:
        """Identity of the files: a SHA-256 of their names and of the content of 100 of them.

        Not of pixels, which differ a little between versions of JPEG decoders; not of sizes, which cost an access to
        each file of a folder.

        Args:
          inner_names: the names, without the folders around all of them.
        """
        digest = hashlib.sha256("\0".join(inner_names).encode(errors="surrogateescape"))
        for i in sorted({k * (len(self) - 1) // 99 for k in range(100)}):
            with _naming(self.files.names[i]):
                digest.update(self.files.read(i))
        return digest.hexdigest()

    def _decode(self, i: int) -> np.ndarray:
        with _naming(self.files.names[i]):
            return decode(self.files.read(i), *self.shape[2:])


def read_all(images: ImageFiles) -> np.ndarray:
    """All of them, uint8[N, H, W, C]; of several that cannot be read, the first is named."""
    result = np.empty(images.shape, np.uint8)

    def decode_block(start: int) -> int:
        block = range(start, min(start + BLOCK, len(images)))
        for i in block:
            result[i] = images[i]
        return len(block)

    # Threads decode at the same time only while Pillow has released the interpreter's lock; for tiny files, around
    # 64x64 pixels and less, they hold it most of the time and wait for each other.
    with _naming(images.files.names[0]):
        threads = 1 if len(images.files.read(0)) < 4096 else os.cpu_count()
    show = None if len(images) > 5000 else True  # None: only on a terminal
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(images), desc="reading images", disable=show) as bar:
        for count in pool.map(decode_block, range(0, len(images), BLOCK)):
            bar.update(count)
    return result


def decode(content: bytes, size: int, channels: int) -> np.ndarray:
    """Decodes one image file to uint8[size, size, channels], upright, on white where it is transparent.

    The largest centred square is resized with Pillow's antialiased bicubic filter. A JPEG is first shrunk by its
    decoder, a power of two at most, to no less than twice the size: much faster, and the same to the eye.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    image.draft(None, (2 * size, 2 * size))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would clip or cut, by its version
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
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        reason = " ".join(re.sub(r"<.*?>", "", str(error)).split())  # without the repr of a buffer
        raise InputError(
            f"image {name} cannot be read ({reason}); put a good copy in its place, or remove it before a run starts"
        ) from error
