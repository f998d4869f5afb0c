"""Loads the images that a config names."""

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pooch
from ml_collections import ConfigDict

from diffusion import data
from diffusion.conditions import Conditions
from diffusion.data import Dataset
from diffusion.data.names import some
from diffusion.errors import InputError, nearest
from diffusion.model import Trained


def load_data(config: ConfigDict) -> Dataset:
    """Loads the images that the section config.data names; fields that an old run lacks have their default."""
    _refuse_pictures(config)
    known = {*inspect.signature(data.load).parameters, *data.Reading._fields} - {"reading"}
    if unknown := sorted(_without(config, "flip", "workers").keys() - known):
        raise InputError(f"config.data has no field {unknown[0]!r} in this version; {nearest(unknown[0], known)}")
    with data_fields():
        return data.load(**_without(config, "flip", "workers"))


def load_data_of(trained: Trained, split: str | None = None) -> Dataset:
    """Loads the images that a model was trained on.

    Args:
      trained: the model.
      split: another part of the same source; None is the part it was trained on.

    Raises:
      InputError: the data cannot be read, or has images of another shape or other classes than the model.
    """
    section = trained.config.data.copy_and_resolve_references()
    check_known(section)
    if split is not None:
        section.split = split
    found, conditions = load_data(section), trained.model.conditions
    ours, theirs = trained.model.space.image_shape, tuple(found.images.shape[1:])
    if theirs != ours:
        raise InputError(f"the data has images of {theirs}, and the model draws {ours}; name data of the model's size")
    # Labels are numbers, which mean the same only if the classes do.
    if isinstance(conditions, Conditions) and tuple(found.class_names) != conditions.names:
        part = f" of split {section.split!r}" if section.split else ""
        raise InputError(
            f"the data{part} has the classes {some(found.class_names, 5) or '(none)'}, and the model was trained with "
            f"{some(conditions.names, 5)}; give the data that has the model's classes"
        )
    return found


def check_known(section: ConfigDict) -> None:
    """Raises InputError if the section config.data, of a model from elsewhere, does not say where its images are."""
    if section.name == "images" and not section.path:
        raise InputError(
            "the images that this model was trained on are not known, as it comes from elsewhere; evaluate.py compares "
            "it with those of --data=FOLDER, and analytic_dpm, which needs its own, cannot draw from it"
        )


def named(data: str, image_shape: tuple[int, ...], classes: bool = False) -> ConfigDict:
    """Returns the section config.data of images that a flag names.

    Args:
      data: digits, cifar10, or a folder or archive of images, which are brought to the size of the model's.
      image_shape: (H, W, C) of those.
      classes: whether the model has classes, which sub-folders then are.

    Raises:
      InputError: a folder of images for a model whose images are no squares.
    """
    if data in ("digits", "cifar10"):
        return ConfigDict({"name": data, "path": "", "split": ""})
    height, width, channels = image_shape
    if height != width:
        raise InputError(f"data is {data!r}, and the model draws images of {height}x{width}; only squares compare")
    labels = "folders" if classes else "none"
    return ConfigDict(
        {"name": "images", "path": data, "split": "", "size": height, "channels": channels, "labels": labels}
    )


def compared_with(trained: Trained, data: str) -> Trained:
    """Returns a model as if it had been trained on the images that a flag names, see `named`."""
    config = trained.config.copy_and_resolve_references()
    with config.unlocked():
        config.data = named(data, trained.model.space.image_shape, isinstance(trained.model.conditions, Conditions))
    return trained._replace(config=config)


def cache_folder(name: str = "evaluation") -> Path:
    """Returns a folder for all runs of this user, which need not exist.

    Args:
      name: "evaluation" has statistics of real images and classifiers, "latents" the latents of data sets.
    """
    return Path(pooch.os_cache("diffusion"), name)


def check_data(config: ConfigDict) -> tuple[list[data.Damaged], int]:
    """Reads all images that the section config.data names; returns the damaged ones, and how many there are in all."""
    _refuse_pictures(config)
    with data_fields():
        return data.check(**_without(config, "flip", "workers", "labels"))


def _refuse_pictures(config):
    """Tells who gives the default recipe a folder of pictures which recipe takes one."""
    if config.name == "digits" and config.get("path"):
        raise InputError(
            f"the data is digits, which take no config.data.path={config.path!r}; for your own images add "
            "--config=configs/images_small.py, or configs/images.py on a GPU"
        )


def _without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


@contextlib.contextmanager
def data_fields() -> Iterator[None]:
    """Gives arguments in the errors of `diffusion.data`, such as size=0, the names of their fields in the config."""
    try:
        yield
    except InputError as error:
        names = "name|path|split|size|channels|labels|max_memory|max_decoded|skip_damaged|workers"
        text = re.sub(rf"(?<![^\s(])({names})=", r"config.data.\1=", str(error))
        raise InputError(text) from error
