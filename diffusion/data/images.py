"""A folder, zip or tar of image files, of any size, with a class per sub-folder."""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion.data.dataset import Dataset, require
from diffusion.data.files import open_files
from diffusion.errors import InputError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's others include PostScript, which is a program
BLOCK = 32  # images per task of the thread pool


def load(path: str = "", split: str = "", size: int = 0, channels: int = 0) -> Dataset:
    """All images below a folder or in an archive, in the order of their relative paths.

    A folder that holds everything else is looked through, so an archive may have a wrapping folder. The class of an
    image is the name of the folder it lies in; where any image lies in no folder, or all in the same, the set has no
    classes. Hidden files and __MACOSX are left out. See decode for the pixels.

    Args:
      path: a folder, .zip, .tar, .tar.gz or .tgz with .jpg, .jpeg, .png, .webp or .bmp files.
      split: the top folder to use, for example "train"; "" uses everything.
      size: height and width of the result in pixels, at least 1.
      channels: 3 (also 0) for RGB, 1 for grey.

    Returns:
      images uint8[N, size, size, channels].

    Raises:
      InputError: a missing or damaged path or image (the first in order is named), an unknown split, no images,
        or more of them than fit in this machine's memory.
    """
    if not path:
        raise InputError("data 'images' needs a folder or an archive of images; set config.data.path")
    if size < 1:
        raise InputError(f"data 'images' needs a size of at least 1, not {size}; set config.data.size, for example 64")
    require("images", "channels", channels, [0, 1, 3])
    with open_files(path) as files:
        names = sorted(filter(_is_image, files.names))
        if not names:
            raise InputError(f"{path} has no images; put files with one of {' '.join(SUFFIXES)} there")
        selected = _select(names, split, path)
        labels, class_names = _classes([_parts(name) for name in selected.values()])
        images = _decode_all(list(selected), files.read, size, channels or 3)
    return Dataset(images, labels, class_names)


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


def _parts(name: str) -> list[str]:
    return name.split("/")


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))
    return name.lower().endswith(SUFFIXES) and not hidden


def _look_through(inner: dict[str, str]) -> dict[str, str]:
    """Drops the top folder from the relative names (the values), as often as one folder holds all of them."""
    while all("/" in name for name in inner.values()) and len({_parts(name)[0] for name in inner.values()}) == 1:
        inner = {full: name.split("/", 1)[1] for full, name in inner.items()}
    return inner


def _select(names: list[str], split: str, path: str) -> dict[str, str]:
    """The names in the split, each with its name relative to the folder where the class folders begin."""
    outer = {name: name for name in names}
    inner = _look_through(outer)
    if not split:
        return inner
    for candidates in (outer, inner):
        chosen = {full: name for full, name in candidates.items() if name.startswith(f"{split}/")}
        if chosen:
            return _look_through(chosen)
    folders = {_parts(name)[0] for name in (*outer.values(), *inner.values()) if "/" in name}
    valid = nearest(split, folders) if folders else "there are no sub-folders"
    raise InputError(f"{path} has no folder {split!r}; set config.data.split ({valid}) or leave it empty")


def _classes(parts: list[list[str]]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if any(len(p) == 1 for p in parts):
        return None, ()
    class_names, labels = np.unique([p[-2] for p in parts], return_inverse=True)
    return labels.astype(np.int32), tuple(class_names.tolist())


def _decode_all(names: list[str], read: Callable[[str], bytes], size: int, channels: int) -> np.ndarray:
    num_bytes = len(names) * size * size * channels
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise InputError(
            f"{len(names):,} images of {size}x{size}x{channels} take {num_bytes / 2**30:,.0f} GiB, this machine has "
            f"{memory / 2**30:,.0f} GiB of memory; set a smaller config.data.size or use fewer images"
        )
    images = np.empty((len(names), size, size, channels), np.uint8)

    def decode_block(start: int) -> int:
        block = range(start, min(start + BLOCK, len(names)))
        for i in block:
            with _naming(names[i]):
                images[i] = decode(read(names[i]), size, channels)
        return len(block)

    # Threads decode at the same time only while Pillow has released the interpreter's lock; for tiny files, around
    # 64x64 pixels and less, they hold it most of the time and wait for each other.
    with _naming(names[0]):
        workers = 1 if len(read(names[0])) < 4096 else os.cpu_count()
    show = None if len(names) > 5000 else True  # None: only on a terminal
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(names), desc="reading images", disable=show) as bar:
        for count in pool.map(decode_block, range(0, len(names), BLOCK)):
            bar.update(count)
    return images


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        reason = " ".join(re.sub(r"<.*?>", "", str(error)).split())  # without the repr of a buffer
        raise InputError(f"image {name} cannot be read ({reason}); replace or remove it") from error
