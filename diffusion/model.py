"""A model: a network and what surrounds it, so that whoever holds one needs to know nothing else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from diffusion import keys, options, schedules
from diffusion.errors import InputError
from diffusion.images import to_floats, to_uint8
from diffusion.models import UNet, as_apply_fn
from diffusion.objectives.losses import LEARN_VARIANCE, OBJECTIVES
from diffusion.predictions import check_known
from diffusion.schedules import NoiseSchedule
from diffusion.types import ApplyFn, Params


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


class Conditions(NamedTuple):
    """What a model is told besides x and t: one of some classes, as an int label.

    Attributes:
      names: of the classes 0, 1, ....
      null: the label that means "no class".
    """

    names: tuple[str, ...]
    null: int

    def nulls(self, count: int) -> Int32[np.ndarray, "count"]:
        """Returns "no class" for so many samples."""
        return np.full(count, self.null, np.int32)


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
    """Returns the clip that a config asks for, or else the one that suits the model's space."""
    return config.sample.clip or model.space.clip


def make_schedule(text: str) -> NoiseSchedule:
    """Returns the schedule that a config names, as "cosine" or "linear:beta_end=0.015,num_timesteps=500".

    Raises:
      InputError: an unknown name or option, or a value out of its range.
    """
    choice = options.parse("config.schedule", text, schedules.SCHEDULES, leading=0)
    return choice.function(**choice.options)


def make_model(config: ConfigDict, image_shape: tuple[int, int, int], class_names: tuple[str, ...] = ()) -> Model:
    """Returns the model that the config of a run describes.

    Args:
      config: the whole config; see `current_config` for those of earlier versions.
      image_shape: (H, W, C) of the images.
      class_names: of the data; numbers if not given.

    Raises:
      InputError: a field out of its range, or a network that does not fit the images.
    """
    check_known(config.train.prediction, "config.train.prediction")
    objective = options.parse("config.train.objective", config.train.objective, OBJECTIVES, leading=4).name
    learned_variance = objective in LEARN_VARIANCE
    channels = image_shape[-1] * (2 if learned_variance else 1)
    module = UNet(**{**config.model, "out_channels": config.model.out_channels or channels})

    @keys.pinned
    def init(key):
        return module.init(keys.threefry(key), jnp.zeros((1, *image_shape)), jnp.ones((1,)))["params"]

    jax.eval_shape(init, keys.make(0))  # raises what is wrong with the fields before anything is computed
    if module.out_channels != channels:
        raise InputError(
            f"config.model.out_channels is {module.out_channels}; images have {image_shape[-1]} channels and objective "
            f"{objective} wants {channels}, set 0 or that"
        )
    names = tuple(class_names) or tuple(map(str, range(module.num_classes)))
    return Model(
        apply_fn=as_apply_fn(module),
        schedule=make_schedule(config.schedule),
        space=pixels(image_shape),
        prediction=config.train.prediction,
        conditions=Conditions(names, module.num_classes) if module.num_classes else None,
        init=jax.jit(init),
        learned_variance=learned_variance,
    )


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
