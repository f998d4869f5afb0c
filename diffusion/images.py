"""Images as pixels: 8-bit values and floats, sheets of many, PNG and GIF files."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from diffusion.errors import InputError
from diffusion.files import write_atomically

LARGEST = 32.0
"""No clean sample is that large, be it of pixels or of latents scaled to a variance near 1; 8-bit pixels are."""

LONGEST_NAME = 24
"""The most characters of a name beside a row of pictures."""

HALF_BIN = 1 / 255
"""Half the distance between neighbouring values of an 8-bit pixel in [-1, 1]."""


def to_floats(images: UInt8[np.ndarray, "*shape"], dtype: Any = np.float32) -> Float[np.ndarray, "*shape"]:
    """Turns 8-bit values into floats in [-1, 1]; takes NumPy and JAX arrays, and works inside jit.

    Raises:
      InputError: the values are floats already.
    """
    if jax.dtypes.issubdtype(images.dtype, np.inexact):
        raise InputError(f"images have type {images.dtype}; give uint8 values in 0..255")
    return images.astype(dtype) / 127.5 - 1


def check_floats(name: str, values: Any, *, noisy: bool = False) -> None:
    """Raises InputError where 8-bit values were given for pixels in [-1, 1], or an array of whole numbers.

    Traced arrays show only their type.

    Args:
      name: of the argument, for the error.
      values: an array or a number.
      noisy: they hold noise, which has any scale but both signs; clean samples are at most `LARGEST`.
    """
    remedy = "pixels are floats in [-1, 1]: give diffusion.images.to_floats of uint8 images, which is v / 127.5 - 1"
    dtype = jax.dtypes.result_type(values)
    if not jax.dtypes.issubdtype(dtype, np.inexact) and not isinstance(values, int):
        raise InputError(f"{name} has type {dtype}; {remedy}")
    if isinstance(values, jax.core.Tracer) or (isinstance(values, jax.Array) and not values.is_fully_addressable):
        return
    if not np.size(values) or not np.ndim(values):
        return
    with jax.ensure_compile_time_eval():  # a constant inside a function that is being traced
        low, high = float(values.min()), float(values.max())
    if max(-low, high) > LARGEST and (low >= 0 or not noisy):
        raise InputError(f"{name} holds values from {low:g} to {high:g}; {remedy}")


def to_uint8(images: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Turns pixels in [-1, 1] into the nearest of 0..255; values outside are cut off."""
    scaled = np.round((np.asarray(images, np.float32) + 1) * 127.5)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def sheet(
    images: UInt8[np.ndarray, "N H W C"], *, columns: int = 0, min_height: int = 64
) -> UInt8[np.ndarray, "H W C"]:
    """Lays all images out on one, in rows, one pixel apart.

    Args:
      images: NHWC with 1 or 3 channels.
      columns: images a row; 0 for a square.
      min_height: smaller images are enlarged by a whole factor to at least this height.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(count**0.5)
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(min_height / height))
    cell_height, cell_width = height * factor + 1, width * factor + 1
    canvas = np.full((rows * cell_height + 1, columns * cell_width + 1, channels), 255, np.uint8)
    for i, image in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        top, left = i // columns * cell_height + 1, i % columns * cell_width + 1
        canvas[top : top + height * factor, left : left + width * factor] = image
    return canvas


def labelled_sheet(
    images: UInt8[np.ndarray, "N H W C"], names: Sequence[str], *, min_height: int = 64
) -> UInt8[np.ndarray, "H W C"]:
    """Lays images out in a row for each name, which stands before it; rows come in the order of their first image.

    Args:
      images: NHWC with 1 or 3 channels.
      names: of the images, one for each.
      min_height: as for `sheet`.
    """
    rows = {name: images[[other == name for other in names]] for name in dict.fromkeys(names)}
    columns = max(map(len, rows.values()))
    empty = np.full_like(images[:1], 255)
    cells = [np.concatenate([row, *[empty] * (columns - len(row))]) for row in rows.values()]
    picture = sheet(np.concatenate(cells), columns=columns, min_height=min_height)
    # The names, each in the middle of its row, in a margin that fits the longest.
    step = (len(picture) - 1) / len(rows)
    font = ImageFont.load_default(min(20, max(10, step / 4)))
    texts = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in rows]
    width = 12 + math.ceil(max(font.getlength(text) for text in texts))
    margin = Image.new("L", (width, len(picture)), 255)
    for i, text in enumerate(texts):
        ImageDraw.Draw(margin).text((width - 6, (i + 0.5) * step), text, fill=0, font=font, anchor="rm")
    named = np.repeat(np.asarray(margin)[:, :, None], picture.shape[-1], axis=2)
    return np.concatenate([named, picture], axis=1)


def write_png(
    path: str | os.PathLike, image: UInt8[np.ndarray, "H W C"], within: str | os.PathLike | None = None
) -> None:
    """Writes a PNG of 1 or 3 channels, as `files.write_atomically` does."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue(), within)


def write_gif(path: str | os.PathLike, frames: Sequence[UInt8[np.ndarray, "H W C"]], milliseconds: int = 80) -> None:
    """Writes a looping GIF whose last frame stays for a second."""
    pictures = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames]
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, buffer.getvalue())
