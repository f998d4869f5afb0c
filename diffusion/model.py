"""A model: a network and what surrounds it, so that whoever holds one needs to know nothing else."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import keys, options, schedules
from diffusion.conditions import Conditions
from diffusion.errors import InputError, require_range, users_code
from diffusion.images import to_floats, to_uint8
from diffusion.models import Network, UNet, adapt, as_apply_fn
from diffusion.objectives import choice
from diffusion.objectives.losses import LEARN_VARIANCE
from diffusion.predictions import check_known, sees_end
from diffusion.schedules import NoiseSchedule
from diffusion.types import ApplyFn, Params

UNET = "unet"
"""What config.network is for the network that comes with the library, `models.UNet`."""


@dataclasses.dataclass(frozen=True)
class Space:
    """Where a model works, and the way there and back.

    Attributes:
      shape: of one sample, (H, W, C) for pixels.
      encode: uint8 images [B, H, W, C] -> [B, *shape]; works inside jit.
      decode: [B, *shape] -> uint8 images.
      clip: the clip that suits it: "recompute" where clean samples lie in [-1, 1], "none" where they have no bound.
    """

    shape: tuple[int, ...]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], np.ndarray]
    clip: str


def pixels(image_shape: tuple[int, int, int]) -> Space:
    """Returns the space of the images themselves, scaled to [-1, 1].

    Args:
      image_shape: (H, W, C).
    """
    return Space(tuple(image_shape), to_floats, to_uint8, "recompute")


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its parameters.

    Attributes:
      apply_fn: the network.
      schedule: the noise schedule it is trained with.
      space: where it works.
      prediction: what it predicts, a key of `diffusion.predictions.PREDICTIONS`.
      conditions: what it can be told, or None for an unconditional model.
      init: key -> params; None where nobody will train it from the start.
      learned_variance: whether it returns twice the channels, see `objectives.losses.hybrid_loss`.
    """

    apply_fn: ApplyFn
    schedule: NoiseSchedule
    space: Space
    prediction: str = "eps"
    conditions: Conditions | None = None
    init: Callable[[jax.Array], Params] | None = None
    learned_variance: bool = False

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one sample, as `diffusion.sample` takes it."""
        return self.space.shape


class Trained(NamedTuple):
    """A model with its parameters, from a run folder, a file, or the package.

    Attributes:
      model: the network and what surrounds it.
      params: its parameters, the average of one EMA.
      config: the whole config of the run.
      step: how many training steps it has had.
      ema: the name of the EMA.
    """

    model: Model
    params: Params
    config: ConfigDict
    step: int
    ema: str

    @property
    def clip(self) -> str:
        """How its estimates of x_0 are clipped unless something else is asked for."""
        return sampling_clip(self.config, self.model)


def sampling_clip(config: ConfigDict, model: Model) -> str:
    """Returns the clip that a config asks for, or else the one that suits the model's prediction and space."""
    return config.sample.clip or ("none" if sees_end(model.prediction) else model.space.clip)


def make_schedule(text: str) -> NoiseSchedule:
    """Returns the schedule that a config names, as "cosine" or "linear:beta_end=0.015,num_timesteps=500".

    Raises:
      InputError: an unknown name or option, or a value out of its range.
    """
    choice = options.parse("config.schedule", text, schedules.SCHEDULES, leading=0)
    return choice.function(**choice.options)


def make_model(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...] = (),
    networks: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Model:
    """Returns the model that the config of a run describes.

    Args:
      config: the whole config; see `current_config` for those of earlier versions.
      image_shape: (H, W, C) of the images.
      class_names: of the data; numbers if not given.
      networks: functions of the user's own by the names that config.network gives them, as {"mine:net": mine.net}. Each
        takes (image_shape, out_channels, num_classes) and its options, and returns init and apply as `models.adapt`
        takes them. Nothing is imported here, because a config can come from anybody.

    Raises:
      InputError: a field out of its range, or a network that does not fit the images or is not in `networks`.
    """
    check_known(config.train.prediction, "config.train.prediction")
    objective = choice.parse(config.train.objective)
    learned_variance, scales = objective.name in LEARN_VARIANCE, choice.scales(objective)
    sees = {"sees_end": sees_end(config.train.prediction), "sees_scale": scales is not None}
    channels = image_shape[-1] * (2 if learned_variance else 1)
    name, num_classes = config.get("network", UNET), config.model.num_classes
    if name == UNET:
        network = _unet(config.model, image_shape, channels, objective.name, sees)
    else:
        network = _own_network(name, networks, image_shape, channels, num_classes, sees)
    names = tuple(class_names) or tuple(map(str, range(num_classes)))
    return Model(
        apply_fn=network.apply_fn,
        schedule=make_schedule(config.schedule),
        space=pixels(image_shape),
        prediction=config.train.prediction,
        conditions=Conditions(names, num_classes, scales) if num_classes else None,
        init=jax.jit(keys.pinned(network.init)),
        learned_variance=learned_variance,
    )


def _unet(config, image_shape, channels, objective, sees):
    """Returns the UNet of the section config.model."""
    _check_size(config)
    module = UNet(**{**config, **sees, "out_channels": config.out_channels or channels})
    t = jnp.ones((1, 2) if module.sees_end else (1,))

    def init(key):
        return module.init(keys.threefry(key), jnp.zeros((1, *image_shape)), t)["params"]

    jax.eval_shape(init, keys.make(0))  # raises what is wrong with the fields before anything is computed
    if module.out_channels != channels:
        raise InputError(
            f"config.model.out_channels is {module.out_channels}; images have {image_shape[-1]} channels and objective "
            f"{objective} wants {channels}, set 0 or that"
        )
    return Network(init, as_apply_fn(module))


def _own_network(text, networks, image_shape, channels, num_classes, sees):
    """Returns the network that a function of the user's own makes."""
    name = options.own_name(text)
    if not name:
        raise InputError(f"config.network is {text!r}; it must be {UNET}, or your own as package.module:function")
    if name not in networks:
        raise InputError(
            f"the network of this model is {name}, Python code that does not come with it; if you trust that code, "
            f"name it: --network={name}, or networks={{{name!r}: function}} in Python"
        )
    require_range("config.model.num_classes", num_classes, 0)
    what = f"network {name}"
    choice = options.parse_own("network", text, networks[name], ("image_shape", "out_channels", "num_classes"))
    with users_code(what):
        parts = choice.function(tuple(image_shape), channels, num_classes, **choice.options)
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise InputError(f"{what} returns a {type(parts).__name__}; it must return two functions, init and apply")
    return adapt(*parts, image_shape, out_channels=channels, num_classes=num_classes, what=what, **sees)


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
    return config


_FIELDS = {
    "data": {"name": str},
    "model": {},
    "train": {"prediction": str, "objective": str, "label_dropout": int | float, "ema_decays": list | tuple},
    "sample": {"sampler": str, "tau": str, "steps": int, "clip": str | None},
}
"""The fields of a saved config that programs read before anything checks them, and the types of these."""

MAX_SIDE, MAX_BLOCKS, MAX_NUMBER = 2**16, 1000, 2**20
"""The largest height or width of images, and number of blocks and any other number of a network, in a file.

Describing a network takes time for each block, and none for its width; a million of anything is no network.
"""


def from_record(
    saved: Mapping[str, Any], where: str, networks: Mapping[str, Callable[..., Any]] = MappingProxyType({})
) -> tuple[ConfigDict, Model]:
    """Returns the config and the model that a file or checkpoint describes, which may come from anybody.

    Args:
      saved: holds "config", "image_shape" and, where there are classes, "class_names".
      where: what the error calls it, such as "checkpoint runs/digits/checkpoints/5".
      networks: see `make_model`.

    Raises:
      InputError: a field is missing, of another type, out of its range, or so large that no network has it.
    """
    with _readable(where):
        config, shape, names = _read_record(saved)
        return config, make_model(config, shape, names, networks)


def config_from_record(saved: Mapping[str, Any], where: str) -> ConfigDict:
    """Returns the config alone, which needs no network of anybody's own; otherwise as `from_record`."""
    with _readable(where):
        return _read_record(saved)[0]


def _read_record(saved):
    """Returns (config, image_shape, class_names) of a file or checkpoint; raises nearly anything if it is no such."""
    config = current_config(saved["config"])
    for section, fields in _FIELDS.items():
        for name, kind in fields.items():
            if not isinstance(config[section][name], kind):
                raise TypeError(f"config.{section}.{name} is {config[section][name]!r}"[:100])
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
def _readable(where):
    """Turns what goes wrong with what a stranger wrote, which can be nearly any exception, into an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:
        reason = " ".join(f"{'no ' * isinstance(error, KeyError)}{error}".split())[:200]
        raise InputError(f"{where} describes no model that this version knows ({reason})") from None


def _check_size(config):
    """Refuses a network that would take forever only to describe."""
    numbers = [n for value in config.values() for n in (value if isinstance(value, list | tuple) else [value])]
    if any(isinstance(n, int | float) and not abs(n) <= MAX_NUMBER for n in numbers):
        raise InputError(f"config.model has a number above {MAX_NUMBER:,}; give smaller ones")
    if config.num_blocks * len(config.multipliers) > MAX_BLOCKS:
        raise InputError(f"config.model has more than {MAX_BLOCKS:,} blocks; give fewer")


def check_finite(params: Params, where: str) -> None:
    """Raises InputError if a parameter is NaN or infinite, as after a training that diverged."""
    for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        if not np.isfinite(np.asarray(leaf)).all():
            raise InputError(f"{where} has weights that are not finite ({name}): the training diverged; take another")
