"""Sampling that starts from something of the user's: a picture, a part of one, or the way between two images."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Bool, Float32, UInt8

from diffusion import editing, files, keys, options, predictions, spaces
from diffusion.adaptive import Adaptive
from diffusion.commands import learned, prompts, samplers, usage
from diffusion.data import decoding
from diffusion.errors import InputError, printable, require_range
from diffusion.model import Model
from diffusion.solvers import SamplerTable
from diffusion.types import Images

STRENGTH = 0.6
"""Where image-to-image starts if nothing is said, as a share of T: shapes stay, and textures are drawn anew."""


class Edit(NamedTuple):
    """What sampling starts from in place of noise, and what it keeps.

    Attributes:
      words: what is said of it in the title of a job.
      label: what tells it from others in the name of a folder.
      settings: everything that determines it, for the record.
      from_noise: whether images start from pure noise, and not from a noised picture.
      start: numbers of images [B] -> x_init [B, *space.shape]; None for noise of their own.
      known: (values, mask) as `diffusion.sample` takes them, or None.
      kept: (picture, where it stays), which is pasted over every image; or None.
      told: what an inpainting network is told of the picture, see `spaces.with_hole`; or None.
      notes: what a user may not expect.
    """

    words: str
    label: str
    settings: dict[str, Any]
    from_noise: bool
    start: Callable[[Sequence[int]], Images] | None = None
    known: tuple[Images, Images] | None = None
    kept: tuple[UInt8[np.ndarray, "H W C"], Bool[np.ndarray, "H W 1"]] | None = None
    told: Float32[np.ndarray, "h w C"] | None = None
    notes: tuple[str, ...] = ()

    def sampling_options(self) -> dict[str, Any]:
        """Returns what goes to `drawing.generate`."""
        return {name: value for name, value in (("x_init", self.start), ("known", self.known)) if value is not None}

    def paste(self, images: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W C"]:
        """Returns the images with the kept pixels of the picture, to the bit."""
        return images if self.kept is None else np.where(self.kept[1], self.kept[0], images)


def define_flags() -> None:
    """Defines the flags that `started` and `open_edit` read, and --resample."""
    usage.group("From a picture, or between two images")
    flags.DEFINE_string("init", None, "A picture to start from in place of noise; its centred square is resized.")
    flags.DEFINE_float(
        "strength",
        None,
        f"0..1, the share of T that --init is noised to: low keeps more of it. Default: {STRENGTH}, and 1 with --mask.",
    )
    flags.DEFINE_string(
        "mask", None, "A picture of the size of --init: white is drawn anew, and black, with darker greys, stays."
    )
    flags.DEFINE_integer(
        "resample", 1, "With --mask: make each step so often, by which both parts fit better.", lower_bound=1
    )
    flags.DEFINE_list("interpolate", None, "A,B: go from image number A to number B in --num images.")


def check(given: Any) -> None:
    """Raises InputError if flags of this module do not go together."""
    for name, other in (("strength", "init"), ("mask", "init"), ("resample", "mask")):
        if given[name].value != given[name].default and given[other].value is None:
            raise InputError(f"--{name} does nothing without --{other}")
    if given.interpolate is not None:
        for name in ("init", "seeds"):
            if given[name].value is not None:
                raise InputError(f"--interpolate and --{name} exclude each other; leave one out")
    if given.strength is not None:
        require_range("strength", given.strength, 0, 1, open_ends="low")


def started(given: Any, sampler: str, tau: str) -> str:
    """Returns the grid that starts where --strength says, by the option start that grids have.

    Args:
      given: all flags.
      sampler, tau: by name.

    Raises:
      InputError: --init or --strength with a sampler or a grid that has a start of its own.
    """
    if given.init is None:
        return tau
    strength = given.strength
    if samplers.is_file(sampler) or sampler == learned.LEARNED:
        if strength is not None or given.mask is None:
            raise InputError(
                f"the table of --sampler={sampler} has its own start, where little of --init is left; name a solver "
                "instead, as --sampler=ddim"
            )
        return tau
    leading = 1 if tau.partition(":")[0] in samplers.OWN_LENGTH else 2
    choice = options.parse("tau", tau, samplers.TAUS, leading)
    if "start" in choice.options or "start" not in choice.complete(leading):
        if strength is not None:
            raise InputError(f"tau {tau} has its own start; leave out --strength, or name a grid without one")
        return tau
    if strength is None:
        strength = STRENGTH if given.mask is None else 1.0
    return options.write(choice._replace(options={**choice.options, "start": strength}), leading)


def open_edit(given: Any, model: Model, labels: Sequence[int], table: SamplerTable | Adaptive) -> Edit | None:
    """Returns what the flags ask for, or None if images are drawn whole from noise.

    Args:
      given: all flags.
      model: what is sampled.
      labels: the classes that images take in turn.
      table: the sampler, which starts where the picture is noised to.

    Raises:
      InputError: a picture that cannot be read or a mask of another size, numbers of images that are none, or a model
        or a sampler that cannot do it.
    """
    if given.interpolate is not None:
        return _between(given, model, labels, table)
    if given.init is not None and table.start is not None:
        raise InputError(
            "--afs is for images that are drawn whole from noise, and --init gives a picture; leave out one"
        )
    return None if given.init is None else _from_picture(given, model, table)


def _from_picture(given, model, table):
    """Starts from a picture, keeps a part of it, or both."""
    picture, size, notes = _read("init", given.init, model.space.image_shape)
    clean = _encode(model, picture)
    fills, known, kept, hole = prompts.fills_holes(model), None, None, None
    if given.mask is not None:
        keep = ~_read_mask(given.mask, model.space.image_shape, size)
        kept = picture, keep
        if fills:
            hole = spaces.with_hole(model.space.autoencoder, picture, ~keep)
        else:
            known, unknown = _known(model, clean, keep)
            notes = (*notes, *unknown)
    # A network that is told the picture starts from pure noise unless it is asked otherwise.
    whole_way = fills and given.strength in (None, 1)
    start = None
    if given.mask is None or (table.tau[0] < model.schedule.num_timesteps and not whole_way):
        start = _noised(clean, model, float(table.tau[0]), given.seed)
        if table.tau[0] >= model.schedule.num_timesteps:
            notes = (*notes, f"at t = {table.tau[0]:g}, the most noise, next to nothing of --init is left")
    words, label = f" from {printable(Path(given.init).name)}", f"init={_sha256(picture)[:8]}"
    settings = {"init_sha256": _sha256(picture), "init_noised": start is not None}
    if start is not None:
        words += f" noised to t = {table.tau[0]:g}"
    if kept is not None:
        words += f", drawn where {printable(Path(given.mask).name)} is white,"
        label += f"-mask={_sha256(kept[1])[:8]}" + f"-resample={given.resample}" * (given.resample > 1)
        settings["mask_sha256"] = _sha256(kept[1])
    return Edit(words, label, settings, start is None, start, known, kept, hole, notes)


def _known(model, clean, keep):
    """Returns (the clean sample with where it is known, notes) for a network that is told nothing of it."""
    if predictions.sees_end(model.prediction):
        raise InputError(
            f"--mask goes into estimates of x_0, and a model that predicts {model.prediction} makes none; leave it out"
        )
    height, width = clean.shape[:2]
    # A place of the latents is known where all of its pixels are.
    places = keep.reshape(height, len(keep) // height, width, keep.shape[1] // width, 1)
    whole = places.all(axis=(1, 3))
    lost = "the mask keeps no whole place of the latents, so the drawn part does not know the rest"
    return (clean, whole.astype(np.float32)), () if whole.any() else (lost,)


def _between(given, model, labels, table):
    """Goes from one image to another along an arc of their noises."""
    texts, count = given.interpolate, given.num
    whole = all(text.strip().isdecimal() and int(text) < 2**32 for text in texts)
    if len(texts) != 2 or not whole or int(texts[0]) == int(texts[1]):
        raise InputError(f"interpolate is {','.join(texts)!r}; write the numbers of two images, as 3,17")
    ends = [int(text) for text in texts]
    if count < 2:
        raise InputError(f"num is {count}; going from one image to another takes at least 2")
    if len(set(labels)) > 1:
        raise InputError("images between two others are of one class: name it with --labels")
    is_table = isinstance(table, SamplerTable)
    if table.log_variance is not None or (is_table and np.any(table.update[:, :, -1])):
        raise InputError(
            f"{table.name} adds noise in its steps, by which neighbours differ; take a sampler that adds none, as ddim "
            "with --eta=0"
        )
    std = np.float32(table.start_std)

    def start(ids):
        with jax.enable_x64(False):
            pair = editing.start_noise(keys.make(given.seed), jnp.asarray(ends, jnp.uint32), model.space.shape)
            weights = np.asarray(ids, np.float32) / (count - 1)
            first, last = (jnp.broadcast_to(end, (len(weights), *end.shape)) for end in pair)
            return np.asarray(std * editing.slerp(first, last, weights))

    words, label = f" from number {ends[0]} to number {ends[1]}", f"interpolate={ends[0]},{ends[1]}"
    return Edit(words, label, {"interpolate": ends}, True, start)


def _noised(clean, model, t, seed):
    """Returns the function that noises a picture for each number of an image."""

    def start(ids):
        with jax.enable_x64(False):
            images = jnp.broadcast_to(clean, (len(ids), *clean.shape))
            numbers = jnp.asarray(np.asarray(ids, np.uint32))
            return np.asarray(editing.noised(model.schedule, images, t, keys.make(seed), numbers))

    return start


def _encode(model, picture):
    """Returns the clean sample of one picture."""
    with jax.enable_x64(False):
        return np.asarray(model.space.encode(picture[None]), np.float32)[0]


def _read(flag, path, image_shape):
    """Returns (uint8 picture of a shape, the (width, height) that it had, notes on what was done to it)."""
    height, width, channels = image_shape
    if height != width:
        raise InputError(f"--{flag} is for models of square images, and this one's are {height} x {width}")
    path = Path(path).expanduser()
    try:
        content = files.read(path)
        picture, size = decoding.decode(content, height, channels), decoding.upright_size(content)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes the decoders raise nearly any exception
        told = error.strerror if isinstance(error, OSError) else str(error) if isinstance(error, ValueError) else None
        reason = told or "it is damaged, or no picture"
        raise InputError(f"--{flag}={printable(str(path))} cannot be read ({reason}); give a PNG or a JPEG") from None
    if size == (width, height):
        return picture, size, ()
    square = "" if size[0] == size[1] else "the centred square of "
    return picture, size, (f"{square}--{flag}, {size[0]} x {size[1]} pixels, is resized to {width} x {height}",)


def _read_mask(path, image_shape, init_size):
    """Returns where a mask is white, [H, W, 1]."""
    height, width, _ = image_shape
    mask, size, _ = _read("mask", path, (height, width, 1))
    if size not in ((width, height), init_size):
        raise InputError(
            f"--mask has {size[0]} x {size[1]} pixels; it must have {init_size[0]} x {init_size[1]} as --init, or "
            f"{width} x {height} as the model's images"
        )
    white = mask >= 128
    if white.all() or not white.any():
        colour, what = ("white", "kept") if white.all() else ("black", "drawn anew")
        raise InputError(f"--mask is {colour} everywhere, so nothing is {what}; white is drawn anew, black is kept")
    return white


def _sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
