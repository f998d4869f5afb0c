"""Reads the images of a set from their files: all at once, or each when it is asked for."""

import contextlib
import hashlib
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from diffusion import machine
from diffusion.data.archives import Files
from diffusion.data.decoding import MIB, Budget, decode
from diffusion.data.names import shown
from diffusion.errors import InputError, printable

BLOCK = 32  # images that one task of the thread pool decodes
SAMPLE = 100  # images whose content stands for a set's
MOST_NAMED = 200  # damaged images in one message

_CONTENT = Budget(256 * MIB)


class Damaged(NamedTuple):
    """An image that cannot be read.

    Attributes:
      name: of its file.
      reason: why, in a few words.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.name)} ({self.reason})"


class ImageFiles:
    """Stands in for an array uint8[N, H, W, C], and decodes its images from files when they are asked for.

    It has the array's shape, dtype and length, and is indexed along N by a number, a slice, or integers int[b], which
    give new arrays of shape [H, W, C] or [b, H, W, C]. It can be pickled, and several threads may use it at once.

    Raises:
      InputError: an image cannot be read; the message names it.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: Files, size: int, channels: int, max_decoded: float):
        """Takes the files, the size and channels that their images get, and the MiB that one may take."""
        self.files = files
        self.shape = (len(files.names), size, size, channels)
        self.max_decoded = max_decoded

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

    def take(self, chosen: Sequence[int]) -> "ImageFiles":
        """Returns ImageFiles of only the chosen images, in the order given."""
        return ImageFiles(self.files.take(chosen), *self.shape[2:], self.max_decoded)

    def sample(self) -> list[int]:
        """Returns the numbers of up to 100 images spread over the set, whose content stands for it in `digest`."""
        return sorted({k * (len(self) - 1) // (SAMPLE - 1) for k in range(SAMPLE)})

    def digest(self, inner_names: list[str]) -> str:
        """Returns the identity of the files: a SHA-256 of their names and of the content of a sample of them.

        It leaves out the pixels, which differ a little between versions of JPEG decoders, and the files' sizes, as
        asking for each takes long in a large folder.

        Args:
          inner_names: the files' names, without the folders that hold them all.
        """
        digest = hashlib.sha256("\0".join(inner_names).encode(errors="surrogateescape"))
        for i in self.sample():
            with _naming(self.files.names[i]):
                digest.update(self._content(i))
        return digest.hexdigest()

    def _content(self, i: int) -> bytes:
        return self.files.read(i, int(self.max_decoded * MIB))

    def _decode(self, i: int) -> np.ndarray:
        with _naming(self.files.names[i]), _CONTENT.of(self.files.size(i)):
            return decode(self._content(i), *self.shape[2:], self.max_decoded)


def read_all(images: ImageFiles) -> tuple[UInt8[np.ndarray, "N H W C"], dict[int, Damaged]]:
    """Returns all the images as one array, and by its number each that cannot be read, whose pixels are undefined."""
    result = np.empty(images.shape, np.uint8)

    def keep(i):
        result[i] = images[i]

    return result, _try(images, range(len(images)), keep)


def find_damaged(images: ImageFiles, chosen: Sequence[int] | None = None) -> dict[int, Damaged]:
    """Reads all images, or the chosen ones; returns those that cannot be read, in order, by their numbers."""
    return _try(images, range(len(images)) if chosen is None else chosen, images.__getitem__)


def refuse(damaged: Sequence[Damaged], tried: int, count: int) -> None:
    """Raises InputError, which names the damaged images, up to a few hundred.

    Args:
      damaged: at least one image.
      tried: how many images were read.
      count: how many there are.
    """
    names = ", ".join(map(str, damaged[:MOST_NAMED]))
    others = f" and {len(damaged) - MOST_NAMED:,} more" if len(damaged) > MOST_NAMED else ""
    more = f" ({tried:,} of {count:,} were tried; train.py --check reads them all)" if tried < count else ""
    if len(damaged) == 1:
        name, reason = shown(damaged[0].name), damaged[0].reason
        raise InputError(
            f"image {name} cannot be read ({reason}){more}; put a good copy in its place, remove it before a run "
            "starts, or leave it out with skip_damaged=True"
        )
    raise InputError(
        f"{len(damaged):,} of {tried:,} images cannot be read{more}: {names}{others}; put good copies in their places, "
        "remove them before a run starts, or leave them out with skip_damaged=True"
    )


def _try(images: ImageFiles, chosen: Sequence[int], use: Callable[[int], object]) -> dict[int, Damaged]:
    """Calls use with each chosen number, in threads; returns those for which it raised InputError."""

    def try_block(block: Sequence[int]) -> dict[int, Damaged]:
        damaged = {}
        for i in block:
            try:
                use(i)
            except _Unreadable as error:
                damaged[i] = error.image
        return damaged

    # Threads decode at the same time only while Pillow has released the interpreter's lock. For tiny files, around
    # 64x64 pixels and less, they hold the lock most of the time and would only wait for each other.
    tiny = False
    with contextlib.suppress(OSError):
        tiny = images.files.size(chosen[0]) < 4096
    blocks = [chosen[start : start + BLOCK] for start in range(0, len(chosen), BLOCK)]
    hidden = None if len(chosen) > 5000 else True  # tqdm takes None as "hidden unless on a terminal"
    damaged = {}
    with (
        ThreadPoolExecutor(1 if tiny else machine.cores()) as pool,
        tqdm(total=len(chosen), desc="reading images", disable=hidden) as bar,
    ):
        for block, found in zip(blocks, pool.map(try_block, blocks), strict=True):
            damaged |= found
            bar.update(len(block))
    return damaged


class _Unreadable(InputError):
    """Reports one damaged image, and what to do about it in the middle of a run."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # these, and not the message, make it again where it is unpickled
        self.image = Damaged(name, reason)

    def __str__(self) -> str:
        return f"image {shown(self.image.name)} cannot be read ({self.image.reason}); put a good copy in its place"


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes the decoders raise nearly any exception
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = re.sub(r"<.*?>", "", text)  # "<_io.BytesIO object at ...>" says nothing
        raise _Unreadable(name, printable(" ".join(text.split())) or type(error).__name__) from error
