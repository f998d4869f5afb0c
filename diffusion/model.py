"""A model: a network and what surrounds it, so that whoever holds one needs to know nothing else."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import keys, options, schedules
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.caching import Split
from diffusion.conditions import Conditions, Prompts
from diffusion.errors import InputError, require_range, users_code
from diffusion.models import Network, Transformer, UNet, UNet2D, UNet2DCondition, adapt, as_apply_fn, as_split, deep
from diffusion.objectives import choice
from diffusion.objectives.losses import LEARN_VARIANCE
from diffusion.predictions import check_known, sees_end
from diffusion.schedules import NoiseSchedule
from diffusion.spaces import Space, latents, pixels
from diffusion.types import ApplyFn, Params

UNET, TRANSFORMER, UNET2D, UNET2D_CONDITION = "unet", "transformer", "unet2d", "unet2d_condition"
"""What config.network is for the networks that come with the library: `UNet`, `Transformer`, `UNet2D` and
`UNet2DCondition` of models; the last is told a text, and comes from folders of others only."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its parameters.

    Attributes:
      apply_fn: the network.
      schedule: the noise schedule it is trained with.
      space: where it works.
      prediction: what it predicts, a key of `diffusion.predictions.PREDICTIONS`.
      conditions: what it can be told, classes or prompts, or None for an unconditional model.
      init: key -> params; None where nobody will train it from the start.
      learned_variance: whether it returns twice the channels, see `objectives.losses.hybrid_loss`.
      split: the network for `diffusion.caching`; None where it has no levels to keep.
    """

    apply_fn: ApplyFn
    schedule: NoiseSchedule
    space: Space
    prediction: str = "eps"
    conditions: Conditions | Prompts | None = None
    init: Callable[[jax.Array], Params] | None = None
    learned_variance: bool = False
    split: Split | None = None

    @property
    def guides_itself(self) -> bool:
        """Whether the network is told the guidance scale, and so is guided in one call."""
        return self.conditions is not None and self.conditions.scales is not None

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
    autoencoder: TrainedAutoencoder | None = None,
    text: Prompts | None = None,
) -> Model:
    """Returns the model that the config of a run describes.

    Args:
      config: the whole config; see `diffusion.records` for those of earlier versions.
      image_shape: (H, W, C) of the images.
      class_names: of the data; numbers if not given.
      networks: functions of the user's own by the names that config.network gives them, as {"mine:net": mine.net}. Each
        takes (image_shape, out_channels, num_classes) and its options, and returns init and apply as `models.adapt`
        takes them. Nothing is imported here, because a config can come from anybody.
      autoencoder: in whose latents the model works; None for pixels.
      text: what encodes the prompts of a text-to-image model; None for any other.

    Raises:
      InputError: a field out of its range, a network that does not fit the samples or is not in `networks`, or an
        autoencoder of images of another size or number of channels.
    """
    space = _space(config, tuple(image_shape), autoencoder)
    shape = space.shape
    check_known(config.train.prediction, "config.train.prediction")
    objective = choice.sampling_objective(config.train.objective)
    learned_variance, scales = objective.name in LEARN_VARIANCE, choice.scales(objective)
    sees = {"sees_end": sees_end(config.train.prediction), "sees_scale": scales is not None}
    channels = shape[-1] * (2 if learned_variance else 1)
    name, num_classes = config.network, config.model.num_classes
    if name == UNET:
        _check_size(config.model, config.model.num_blocks * len(config.model.multipliers), "config.model")
        network = _network(UNet, {**config.model, **sees}, shape, channels, objective.name)
    elif name == TRANSFORMER:
        _check_size(config.transformer, config.transformer.depth, "config.transformer")
        told = {"num_classes": num_classes, "out_channels": config.model.out_channels, **sees}
        network = _network(Transformer, {**config.transformer, **told}, shape, channels, objective.name)
    elif name == UNET2D:
        blocks = config.unet2d.layers_per_block * len(config.unet2d.block_out_channels)
        _check_size(config.unet2d, blocks, "config.unet2d")
        _check_told(config)
        told = {"num_classes": num_classes, "out_channels": config.model.out_channels, **sees}
        network = _network(UNet2D, {**config.unet2d, **told}, shape, channels, objective.name)
    elif name == UNET2D_CONDITION:
        network = _text_network(config, text, shape, channels, sees)
    else:
        network = _own_network(name, networks, shape, channels, num_classes, sees)
    names = tuple(class_names) or tuple(map(str, range(num_classes)))
    classes = Conditions(names, num_classes, scales) if num_classes else None
    return Model(
        apply_fn=network.apply_fn,
        schedule=make_schedule(config.schedule),
        space=space,
        prediction=config.train.prediction,
        conditions=classes if text is None else text,
        init=jax.jit(keys.pinned(network.init)),
        learned_variance=learned_variance,
        split=network.split,
    )


def _space(config, image_shape, autoencoder):
    """Returns where the model of a config works."""
    if bool(config.latents) != (autoencoder is not None):
        given = "no autoencoder was given" if autoencoder is None else "an autoencoder was given"
        raise InputError(f"config.latents is {config.latents!r}, and {given}; a latent model needs both")
    if autoencoder is None:
        return pixels(image_shape)
    theirs = autoencoder.autoencoder.image_shape
    if theirs != image_shape:
        raise InputError(
            f"the images are {_size(image_shape)}, and the autoencoder of config.latents was trained on "
            f"{_size(theirs)}; give images of that size, or train an autoencoder on these"
        )
    return latents(autoencoder)


def _size(shape):
    return "x".join(map(str, shape))


def _network(module, fields, shape, channels, objective):
    """Returns a network that comes with the library, with these fields."""
    module = module(**{**fields, "out_channels": fields["out_channels"] or channels})
    t = jnp.ones((1, 2) if module.sees_end else (1,))

    def variables(key, **options):
        return module.init(keys.threefry(key), jnp.zeros((1, *shape)), t, **options)

    # Raises what is wrong with the fields before anything is computed.
    found = jax.eval_shape(partial(variables, mutable=["params", deep.FOUND]), keys.make(0))
    if module.out_channels != channels:
        raise InputError(
            f"config.model.out_channels is {module.out_channels}; samples have {shape[-1]} channels and objective "
            f"{objective} wants {channels}, set 0 or that"
        )
    split = as_split(module) if deep.FOUND in found else None
    return Network(lambda key: variables(key)["params"], as_apply_fn(module), split)


def _check_told(config):
    """Raises InputError if a UNet2D cannot be told what its training or prediction tells it."""
    if config.unet2d.time_embedding_type == "fourier" and config.train.prediction == "edm":
        raise InputError(
            "config.unet2d.time_embedding_type is fourier, which takes the log of times, and prediction edm tells a "
            "network times below 0: give positional, or another config.train.prediction"
        )
    dropout = config.train.label_dropout
    if config.model.num_classes and not config.unet2d.null_class and dropout:
        raise InputError(
            f"config.train.label_dropout is {dropout:g}, and the network has no label for samples without a class: set "
            "config.unet2d.null_class=True, or label_dropout=0"
        )


def _text_network(config, text, shape, channels, sees):
    """Returns the network of a text-to-image model."""
    if text is None:
        raise InputError(
            f"config.network is {UNET2D_CONDITION!r}, which is told a text; such a model is read from its folder of "
            "diffusers, text encoder included, and is neither trained here nor kept in a file"
        )
    fields = config.unet2d_condition
    blocks = np.max(fields.layers_per_block) * np.max(fields.transformer_layers_per_block)
    _check_size(fields, blocks * len(fields.block_out_channels), "config.unet2d_condition")
    told = {"out_channels": config.model.out_channels, **sees}
    return _network(UNet2DCondition, {**fields, **told}, shape, channels, config.train.objective)


def _own_network(text, networks, image_shape, channels, num_classes, sees):
    """Returns the network that a function of the user's own makes."""
    name = options.own_name(text)
    if not name:
        raise InputError(
            f"config.network is {text!r}; it must be {UNET}, {TRANSFORMER}, {UNET2D}, or your own as "
            "package.module:function"
        )
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


MAX_BLOCKS, MAX_NUMBER = 1000, 2**20
"""The largest number of blocks and any other number of a network, as a file of a stranger may have any.

Describing a network takes time for each block, and none for its width; a million of anything is no network.
"""


def _check_size(fields, blocks, section):
    """Refuses a network that would take forever only to describe."""
    numbers = [n for value in fields.values() for n in (value if isinstance(value, list | tuple) else [value])]
    if any(isinstance(n, int | float) and not abs(n) <= MAX_NUMBER for n in numbers):
        raise InputError(f"{section} has a number above {MAX_NUMBER:,}; give smaller ones")
    if blocks > MAX_BLOCKS:
        raise InputError(f"{section} has more than {MAX_BLOCKS:,} blocks; give fewer")


def check_finite(params: Params, where: str) -> None:
    """Raises InputError if a parameter is NaN or infinite, as after a training that diverged."""
    for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        if not np.isfinite(np.asarray(leaf)).all():
            raise InputError(f"{where} has weights that are not finite ({name}): the training diverged; take another")
