"""Reads the flags of text-to-image models: prompts, size, precision and LoRA files."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from diffusion import files
from diffusion.conditions import Prompts
from diffusion.errors import InputError, printable
from diffusion.model import Model, Trained

MAX_BYTES = 2**22
"""The largest file of prompts; the record of a job keeps them all."""

SHOWN = 60
"""The most characters of a prompt that a message shows."""

NOTED = 3
"""So many prompts that are cut are named."""

_FOR_TEXTS = ("prompt", "prompts", "negative_prompt")

_OF_FOLDERS = ("size", "lora")

FLAGS = (*_FOR_TEXTS, *_OF_FOLDERS, "dtype")
"""What the flags are called."""

LARGEST = 8192
"""Pixels a side; attention over more would take more memory than machines have."""


def imported_options(given: Any) -> dict[str, Any]:
    """Returns what the flags ask of `interop.diffusers.load`; a flag that is not given is left out.

    Raises:
      InputError: a flag holds something that it cannot.
    """
    found = {} if given.size is None else {"image_size": _size(given.size)}
    found |= {} if given.dtype is None else {"dtype": given.dtype}
    if given.lora is not None and not (given.lora and all(given.lora)):
        raise InputError(f"lora is {','.join(given.lora)!r}; give files, as style.safetensors:0.7")
    return found | ({} if given.lora is None else {"loras": [_lora(text) for text in given.lora]})


def refuse_options(given: Any) -> None:
    """Raises InputError if flags for folders of diffusers are given, for a model that comes from elsewhere."""
    for name in _OF_FOLDERS:
        if given[name].value is not None:
            raise InputError(f"--{name} is for folders of diffusers, and this model is none; leave it out")


def _size(text):
    """Returns (height, width) of --size."""
    sides = text.split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isascii() and side.isdecimal() and len(side) < 6 for side in sides):
        raise InputError(f"size is {text!r}; write 512, or HEIGHTxWIDTH as 512x768")
    if max(map(int, sides)) > LARGEST:
        raise InputError(f"size is {text}; give at most {LARGEST:,} pixels a side")
    return int(sides[0]), int(sides[-1])


def _lora(text):
    """Returns (file, scale) of FILE:SCALE, or of a FILE alone, whose scale is 1."""
    path, _, scale = text.rpartition(":")
    with contextlib.suppress(ValueError):
        return (path, float(scale)) if path else (text, 1.0)
    return text, 1.0


def texts(given: Any) -> tuple[str, ...]:
    """Returns the prompts of the flags, () for none; to be asked before the weights are read, which takes a while.

    Raises:
      InputError: both kinds are given, or a file that holds none.
    """
    if given.prompt is not None and given.prompts is not None:
        raise InputError("--prompt and --prompts exclude each other; give one")
    if given.prompts is not None:
        return read(given.prompts)
    return () if given.prompt is None else (given.prompt,)


def told(given: Any, trained: Trained, prompts: Sequence[str], guides: bool) -> Trained:
    """Returns the model with the prompts of the flags, and says what is cut of them; any other model as it is.

    Args:
      given: all flags.
      trained: the model.
      prompts: from `texts`.
      guides: whether guidance acts in which the model itself is asked without a prompt.

    Raises:
      InputError: a text-to-image model without prompts, or another with them.
    """
    conditions = trained.model.conditions
    asked = [name for name in _FOR_TEXTS if given[name].value is not None]
    if not isinstance(conditions, Prompts):
        if asked:
            raise InputError(f"--{asked[0]} is for text-to-image models, and this one is told no text; leave it out")
        return trained
    _check_picture(given, trained.model)
    if not prompts:
        raise InputError('this model draws what a text says; give --prompt="TEXT", or --prompts=FILE with one a line')
    if given.negative_prompt is not None and not guides:
        raise InputError("--negative_prompt does nothing without guidance by the prompt; give --guidance_scale=7.5")
    found = conditions.replace(prompts, given.negative_prompt or "")
    for note in _notes(found, guides):
        print(f"note: {note}")
    return trained._replace(model=dataclasses.replace(trained.model, conditions=found))


def fills_holes(model: Model) -> bool:
    """Tells whether a model is told a picture, a part of which it draws anew."""
    return isinstance(model.conditions, Prompts) and model.conditions.picture_channels > 0


def _check_picture(given, model):
    """Raises InputError if a model that draws a part of a picture anew is given none, or is to do something else."""
    if not fills_holes(model):
        return
    if "mask" not in given or given.mask is None:  # programs other than sample.py take no pictures
        raise InputError(
            "this model draws a part of a picture anew: draw with sample.py, and give --init=PICTURE and --mask=PICTURE"
        )
    if given.resample != 1:
        raise InputError("--resample is for models that are not told the picture, and this one is; leave it out")


def with_picture(model: Model, picture: Float32[np.ndarray, "h w C"]) -> Model:
    """Returns an inpainting model that is told a picture with its prompts, see `spaces.with_hole`."""
    return dataclasses.replace(model, conditions=dataclasses.replace(model.conditions, picture=picture))


def settings(model: Model, sized: bool = False) -> dict[str, Any]:
    """Returns what a record says of the prompts of a model, and of the size of images where a flag gave it.

    A model that is told no prompts, at its own size, has {}.
    """
    shape = {"image_shape": list(model.space.image_shape)} if sized else {}
    found = model.conditions
    if not isinstance(found, Prompts):
        return shape
    texts = {"prompts": list(found.names), "negative_prompt": found.negative}
    return {**shape, **texts, "text_encoder_sha256": found.encoder.sha256}


def shortened(text: str) -> str:
    """Returns a prompt for a message, printable and not too long."""
    return printable(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")


def read(path: str) -> tuple[str, ...]:
    """Returns the prompts in a file, one a line; raises InputError if it holds none or cannot be read."""
    if Path(path).expanduser().is_dir():
        raise InputError(f"--prompts={path} is a folder; name a file of text in it, with one prompt a line")
    try:
        text = files.read(Path(path).expanduser(), MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--prompts={path} is no text in UTF-8; write it anew") from None
    except OSError as error:
        raise InputError(f"--prompts={path} cannot be read ({error.strerror or error}); check the path") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise InputError(f"--prompts={path} holds no prompt; write one a line")
    return lines


def _notes(found: Prompts, guides: bool) -> Sequence[str]:
    """Returns what a user may not expect of prompts."""
    texts = dict.fromkeys((*found.names, found.negative))
    cut = [(text, left) for text in texts if (left := found.encoder.left_out(text))]
    notes = [
        f'the prompt "{shortened(text)}" is longer than the text encoder takes; its end is cut: "{printable(left)}"'
        for text, left in cut[:NOTED]
    ]
    notes += [f"{len(cut) - NOTED:,} more prompts are cut"] * (len(cut) > NOTED)
    unguided = "without guidance images follow the prompt little; --guidance_scale=7.5 is usual"
    return [*notes, *[unguided] * (not guides)]
