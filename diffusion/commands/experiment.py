"""From a config to the objects it names; the one library module that reads a config."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diffusion import data, schedules, solvers, timesteps
from diffusion.errors import InputError, nearest, require_range
from diffusion.models import UNet, as_apply_fn
from diffusion.objectives.bound import bound_steps
from diffusion.objectives.losses import LEARN_VARIANCE, OBJECTIVES, TARGETS, Loss
from diffusion.objectives.weightings import WEIGHTINGS, loss_weights
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SamplerTable
from diffusion.training import checkpoints
from diffusion.training.run_folder import RunFolder
from diffusion.training.step import ema_name
from diffusion.types import ApplyFn, Params


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its weights.

    Attributes:
      schedule: the noise schedule it is trained with.
      prediction: what it predicts, a key of losses.TARGETS.
      apply_fn: the network.
      image_shape: (H, W, C).
      num_classes: 0 if unconditional.
      init: key -> params.
      learned_variance: whether it returns twice the channels, see `losses.hybrid_loss`.
    """

    schedule: NoiseSchedule
    prediction: str
    apply_fn: ApplyFn
    image_shape: tuple[int, int, int]
    num_classes: int
    init: Any
    learned_variance: bool = False


class Trained(NamedTuple):
    """What a run folder holds: the model, the weights of one EMA (its name), the whole config, the step saved at."""

    model: Model
    params: Params
    config: ConfigDict
    step: int
    ema: str


def load_trained(folder: RunFolder, ema: str = "", step: int | None = None) -> Trained:
    """A checkpoint of a run.

    Args:
      folder: the run.
      ema: which of its EMAs, by decay; "" is the first.
      step: which checkpoint; None is the newest good one.

    Raises:
      InputError: it is damaged, or does not fit its own config; there is no such step or EMA.
    """
    step = folder.latest_step() if step is None else checkpoints.verified(folder.checkpoints, step)
    saved = checkpoints.metadata(folder.checkpoints, step)
    config = ConfigDict(saved["config"])
    model = make_model(config, tuple(saved["image_shape"]))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    names = [ema_name(decay) for decay in ema_decays(config.train)]
    if ema and ema not in names:
        raise InputError(f"{folder.path} has no EMA of {ema}; {nearest(ema, names)}")
    ema = ema or names[0]
    return Trained(model, checkpoints.load_ema(folder.checkpoints, step, ema, like), config, step, ema)


def ema_decays(config: ConfigDict) -> tuple[float, ...]:
    """config.train.ema_decays; config: the section config.train.

    Raises:
      InputError: there is none, one is no number, or one comes twice.
    """
    decays = tuple(config.ema_decays)
    for decay in decays:
        require_range("config.train.ema_decays", decay, 0, 1, open_ends="high")
    if not decays or len(set(map(ema_name, decays))) < len(decays):
        raise InputError(f"config.train.ema_decays are {decays}; give at least one, and none twice")
    return decays


def make_schedule(config: ConfigDict) -> NoiseSchedule:
    """config: the section config.schedule."""
    if config.name not in schedules.SCHEDULES:
        raise InputError(f"config.schedule.name is {config.name!r}; {nearest(config.name, schedules.SCHEDULES)}")
    return schedules.SCHEDULES[config.name](config.num_timesteps, **config[config.name])


def make_model(config: ConfigDict, image_shape: tuple[int, int, int]) -> Model:
    """The network, schedule and prediction type of a whole config, for images of the given shape.

    Raises:
      InputError: a field out of its range, or a network that does not fit the images.
    """
    if config.train.prediction not in TARGETS:
        raise InputError(
            f"config.train.prediction is {config.train.prediction!r}; {nearest(config.train.prediction, TARGETS)}"
        )
    learned_variance = _objective(config.train) in LEARN_VARIANCE
    channels = image_shape[-1] * (2 if learned_variance else 1)
    module = UNet(**{**config.model, "out_channels": config.model.out_channels or channels})

    def init(key):
        return module.init(key, jnp.zeros((1, *image_shape)), jnp.ones((1,)))["params"]

    jax.eval_shape(init, jax.random.key(0))  # raises what is wrong with the fields before anything is computed
    if module.out_channels != channels:
        raise InputError(
            f"config.model.out_channels is {module.out_channels}; images have {image_shape[-1]} channels and objective "
            f"{config.train.objective} wants {channels}, set 0 or that"
        )
    return Model(
        schedule=make_schedule(config.schedule),
        prediction=config.train.prediction,
        apply_fn=as_apply_fn(module),
        image_shape=tuple(image_shape),
        num_classes=module.num_classes,
        init=jax.jit(init),
        learned_variance=learned_variance,
    )


def make_objective(config: ConfigDict, schedule: NoiseSchedule) -> Callable[..., Loss]:
    """What training minimises; config: the section config.train.

    Returns:
      (network, schedule, x_0, cond, keys, index, batch_size) -> Loss, as in `losses`, prediction and weights bound.

    Raises:
      InputError: an unknown name or option, or choices that do not go together.
    """
    objective = OBJECTIVES[_objective(config)]
    name, _, options = _parse_choice("config.train.weighting", config.weighting, WEIGHTINGS)
    if config.objective == "vlb" and name != "simple":
        raise InputError(f"config.train.weighting is {name!r}, but objective vlb has its own weights; set it to simple")
    if config.objective in LEARN_VARIANCE:
        bound_steps(schedule, range(schedule.num_timesteps, -1, -1), config.prediction)  # refuses what it cannot take
    weights = None if name == "simple" else loss_weights(schedule, config.prediction, name, **options)
    return partial(objective, prediction=config.prediction, weights=weights)


def _objective(config):
    if config.objective not in OBJECTIVES:
        raise InputError(f"config.train.objective is {config.objective!r}; {nearest(config.objective, OBJECTIVES)}")
    return config.objective


def load_data(config: ConfigDict) -> data.Dataset:
    """config: the section config.data; what an old run's lacks has its default."""
    others = {name: value for name, value in config.items() if name not in ("name", "flip", "workers")}
    return data.load(config.name, **others)


def learning_rate(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """step -> learning rate: linear warm-up, then constant, or a cosine to 0 at num_steps; config.optimizer."""
    if config.decay not in ("constant", "cosine"):
        raise InputError(f"config.optimizer.decay is {config.decay!r}; {nearest(config.decay, ('constant', 'cosine'))}")
    require_range("config.optimizer.learning_rate", config.learning_rate, 0, open_ends="low, high")
    require_range("config.optimizer.warmup_steps", config.warmup_steps, 0)
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.decay == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, num_steps - config.warmup_steps))
    # Step 0 already moves: a warm-up of n steps ends at update n, not n + 1.
    return optax.join_schedules([lambda step: warmup(step + 1), after], [config.warmup_steps])


def make_optimizer(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam with clipping of the whole gradient; config.optimizer."""
    require_range("config.optimizer.clip_norm", config.clip_norm, 0, open_ends="low")
    require_range("config.optimizer.b1", config.b1, 0, 1, open_ends="high")
    require_range("config.optimizer.b2", config.b2, 0, 1, open_ends="high")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(rate, b1=config.b1, b2=config.b2))


def make_tau(schedule: NoiseSchedule, name: str, num_steps: int) -> timesteps.Tau:
    """A grid by name: a key of GRIDS, "sections:10,15,20", "sections:ddim25" or "explicit:1000,500,250".

    The last two carry their own number of steps and ignore num_steps.
    """
    kind, _, spec = name.partition(":")
    if kind == "sections" and spec:
        return timesteps.sections(schedule, spec)
    if kind == "explicit" and spec:
        try:
            times = [float(part) for part in spec.split(",")]
        except ValueError:
            raise InputError(f"tau {name!r} is no list of timesteps; write for example explicit:1000,500,250") from None
        return timesteps.explicit(schedule, times)
    if name not in timesteps.GRIDS:
        known = [*timesteps.GRIDS, "sections:10,15,20", "explicit:1000,500,250"]
        raise InputError(f"tau is {name!r}; {nearest(name, known)}")
    return timesteps.GRIDS[name](schedule, num_steps)


def make_table(schedule: NoiseSchedule, sampler: str, num_steps: int, tau: str, **given: Any) -> SamplerTable:
    """A table by name.

    Args:
      schedule: the noise schedule.
      sampler: a key of SOLVERS, with options after a colon: "ddim:eta=0.5", "dpm_solver_pp:order=3,variant=official".
      num_steps, tau: see `make_tau`.
      given: options that take precedence, for what cannot be written as text.

    Raises:
      InputError: an unknown name or option, a value out of its range, or an option without its value.
    """
    known = solvers.SOLVERS | solvers.ESTIMATED_SOLVERS
    _, solver, options = _parse_choice("sampler", sampler, known, given)
    return solver(schedule, make_tau(schedule, tau, num_steps), **options)


_NOT_OPTIONS = ("schedule", "tau", "prediction")


def _parse_choice(
    what: str, text: str, known: Mapping[str, Callable], given: Mapping[str, Any] | None = None
) -> tuple[str, Callable, dict[str, Any]]:
    """Reads "name" or "name:option=value,option=value", a key of known and options of that function.

    Args:
      what: what to call the choice in errors.
      text: the choice.
      known: functions by name; their parameters but _NOT_OPTIONS are the options.
      given: options that take precedence.

    Returns:
      (name, function, options): options given by either, parsed as the type of their default.
    """
    name, _, settings = text.partition(":")
    if name not in known:
        raise InputError(f"{what} is {name!r}; {nearest(name, known)}")
    parameters = inspect.signature(known[name]).parameters.values()
    options = {p.name: p.default for p in parameters if p.name not in _NOT_OPTIONS}
    chosen = dict(given or {})
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{what} option {part!r} has no value; write {name}:{key}=VALUE")
        if key in options:
            value = _parse(f"{what} option {name}:{key}", value, options[key])
        chosen.setdefault(key, value)
    unknown = [key for key in chosen if key not in options]
    if unknown:
        valid = nearest(unknown[0], options) if options else "it has no options"
        raise InputError(f"{what} {name} has no option {unknown[0]!r}; {valid}")
    missing = [key for key, default in options.items() if default is inspect.Parameter.empty and key not in chosen]
    if missing:
        raise InputError(f"{what} {name} needs {missing[0]}, which cannot be given by name; call it from Python")
    return name, known[name], chosen


def _parse(what, value, default):
    """An option's text as its default's type; numbers where there is no default."""
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"{what} is {value!r}; write true or false")
        return value.lower() == "true"
    try:
        return int(value) if isinstance(default, int) else float(value)
    except ValueError:
        raise InputError(f"{what} is {value!r}; write a number") from None
