"""Reads the records of models that files and checkpoints hold, which can come from anybody."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from diffusion import options, schedules
from diffusion.autoencoder import Autoencoder, TrainedAutoencoder, make_autoencoder
from diffusion.errors import InputError
from diffusion.model import UNET, Model, make_model
from diffusion.objectives import choice


def current_config(saved: Mapping[str, Any]) -> ConfigDict:
    """Returns the config that a run or a file holds, in today's form.

    Versions before 0.2 had a section for each schedule, and wrote lists of timesteps without "times=".
    """
    config = ConfigDict(saved)
    if "schedule" in config and not isinstance(config.schedule, str):
        section = config.schedule
        given = {"num_timesteps": section.num_timesteps, **section[section.name]}
        choice = options.Choice(section.name, schedules.SCHEDULES[section.name], given)
        del config["schedule"]
        config.schedule = options.write(choice, leading=0)
    for name, option in (("explicit", "times"), ("sections", "counts")):
        if "sample" not in config or "tau" not in config.sample:
            break
        kind, _, rest = config.sample.tau.partition(":")
        if kind == name and "=" not in rest:
            config.sample.tau = f"{name}:{option}={rest}"
    # There was one network then, and one space.
    config.network, config.latents = config.get("network", UNET), config.get("latents", "")
    if isinstance(config.get("transformer"), ConfigDict):
        config.transformer.time_shift = config.transformer.get("time_shift", 0.0)
    return config


_FIELDS = {
    "data": {"name": str},
    "model": {},
    "train": {"prediction": str, "objective": str, "label_dropout": int | float, "ema_decays": list | tuple},
    "sample": {"sampler": str, "tau": str, "steps": int, "clip": str | None},
}
"""The fields of a saved config that programs read before anything checks them, and the types of these."""

MAX_SIDE = 2**16
"""The largest height or width of images in a file."""


def from_record(
    saved: Mapping[str, Any],
    where: str,
    networks: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    autoencoder: TrainedAutoencoder | None = None,
) -> tuple[ConfigDict, Model]:
    """Returns the config and the model that a file or checkpoint describes, which may come from anybody.

    Args:
      saved: holds "config", "image_shape" and, where there are classes, "class_names"; of a latent model also
        "autoencoder", with its "sha256".
      where: what the error calls it, such as "checkpoint runs/digits/checkpoints/5".
      networks, autoencoder: see `make_model`.

    Raises:
      InputError: a field is missing, of another type, out of its range, or so large that no network has it; or this is
        not the autoencoder in whose latents the model was trained.
    """
    with readable(where):
        config, shape, names = _read_record(saved)
        if autoencoder is not None and saved["autoencoder"]["sha256"] != autoencoder.sha256:
            raise InputError(
                f"it was trained in the latents of the autoencoder with SHA-256 {saved['autoencoder']['sha256']}, and "
                f"this one has {autoencoder.sha256}"
            )
        return config, make_model(config, shape, names, networks, autoencoder)


def autoencoder_from_record(saved: Mapping[str, Any], where: str) -> tuple[ConfigDict, Autoencoder]:
    """Returns the config and the autoencoder that a file or checkpoint describes, which may come from anybody.

    Args:
      saved: holds "config" and "image_shape".
      where: what the error calls it.

    Raises:
      InputError: it describes no autoencoder, or one with a field out of its range.
    """
    with readable(where, "autoencoder"):
        config, shape, _ = _read_record(saved)
        if not choice.is_autoencoder(config.train.objective):
            raise InputError(f"it is a model of objective {config.train.objective}, and no autoencoder; name one")
        return config, make_autoencoder(config.autoencoder, shape)


def config_from_record(saved: Mapping[str, Any], where: str) -> ConfigDict:
    """Returns the config alone, which needs no network of anybody's own; otherwise as `from_record`."""
    with readable(where):
        return _read_record(saved)[0]


def _read_record(saved):
    """Returns (config, image_shape, class_names) of a file or checkpoint; raises nearly anything if it is no such."""
    config = current_config(saved["config"])
    for section, fields in _FIELDS.items():
        for name, kind in fields.items():
            if not isinstance(config[section][name], kind):
                raise TypeError(f"config.{section}.{name} is {config[section][name]!r}"[:100])
    if not isinstance(config.latents, str):
        raise TypeError(f"config.latents is {config.latents!r}"[:100])
    if not all(isinstance(decay, int | float) for decay in config.train.ema_decays):
        raise TypeError(f"config.train.ema_decays is {config.train.ema_decays!r}"[:100])
    shape, names = saved["image_shape"], saved.get("class_names") or ()
    if len(shape) != 3 or not all(type(n) is int and 1 <= n <= MAX_SIDE for n in shape):
        raise ValueError(f"image_shape is {shape!r}"[:100])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names are no list of texts")
    count = config.model.num_classes
    if names and count and len(names) != count:
        raise ValueError(f"it has {len(names)} names for {count} classes")
    return config, tuple(shape), tuple(names) if count else ()


@contextlib.contextmanager
def readable(where: str, what: str = "model") -> Iterator[None]:
    """Turns what goes wrong with what a stranger wrote, which can be nearly any exception, into an InputError.

    Args:
      where: what the error calls it.
      what: should be described there.
    """
    try:
        yield
    except InputError as error:
        named = str(error).startswith(where)
        raise InputError(str(error) if named else f"{where}: {error}") from None
    except Exception as error:
        reason = " ".join(f"{'no ' * isinstance(error, KeyError)}{error}".split())[:200]
        raise InputError(f"{where} describes no {what} that this version knows ({reason})") from None
