"""From the config of a training run to the objects that it names."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion import data, denoiser, devices, options, predictions
from diffusion.commands import samplers
from diffusion.data import Dataset
from diffusion.errors import InputError, nearest, require_range
from diffusion.model import Model, make_model, make_schedule, sampling_clip
from diffusion.objectives.bound import bound_steps
from diffusion.objectives.losses import LEARN_VARIANCE, OBJECTIVES, Batch, Loss
from diffusion.objectives.weightings import WEIGHTINGS, loss_weights
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SamplerTable
from diffusion.training.loop import Plan
from diffusion.training.step import StepOptions, TrainState, ema_name, init_state


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a training run is made of, all of it checked.

    Attributes:
      config: the whole config.
      plan: how long to train, and how often to do what.
      dataset: the images.
      model: what is trained on them.
      objective: what training minimises.
      rate: number of updates -> learning rate.
      optimizer: moves the parameters.
      mesh: the devices.
      step_options: of the train step.
      table: draws the samples shown while training.
    """

    config: ConfigDict
    plan: Plan
    dataset: Dataset
    model: Model
    objective: Callable[[Batch], Loss]
    rate: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: Mesh
    step_options: StepOptions
    table: SamplerTable

    def make_state(self, key: jax.Array) -> TrainState:
        """Returns the state before the first step."""
        return init_state(self.model.init(key), self.optimizer, self.step_options.ema_decays)


def make_experiment(config: ConfigDict) -> Experiment:
    """Builds everything that a config asks for; finds all that can be wrong with it before anything is written.

    Raises:
      InputError: an unknown name, a value out of its range, choices that do not go together, or unreadable data.
    """
    settings = config.train
    # Numbers first, then what takes time.
    plan = Plan(*(settings[name] for name in ("num_steps", "batch_size", "log_every", "save_every", "grid_every")))
    _check_numbers(config)
    mesh = devices.training_mesh(plan.batch_size, settings.fsdp, settings.microbatches)
    rate = learning_rate(config.optimizer, plan.num_steps)
    optimizer = make_optimizer(config.optimizer, rate)
    schedule = make_schedule(config.schedule)
    objective = make_objective(settings, schedule)
    table = samplers.make_table(schedule, config.sample.sampler, config.sample.steps, config.sample.tau)
    # The data and the network.
    dataset = load_data(config.data)
    model = make_model(config, dataset.images.shape[1:], dataset.class_names if config.model.num_classes else ())
    if model.conditions is not None and len(dataset.class_names) != model.conditions.null:
        raise InputError(
            f"config.model.num_classes is {config.model.num_classes}; the data has {len(dataset.class_names)} classes"
        )
    # What fits together.
    denoiser.check_options(settings.prediction, denoiser.Options(sampling_clip(config, model)))
    samplers.check_fits(table, model)
    step_options = StepOptions(
        ema_decays=ema_decays(settings),
        microbatches=settings.microbatches,
        log_every=plan.log_every,
        label_dropout=settings.label_dropout if model.conditions is not None else 0.0,
    )
    return Experiment(config, plan, dataset, model, objective, rate, optimizer, mesh, step_options, table)


def _check_numbers(config):
    require_range("config.seed", config.seed, 0, 2**32 - 1)
    require_range("config.sample.num", config.sample.num, 1)
    require_range("config.train.keep", config.train.keep, 1)
    require_range("config.train.keep_best", config.train.keep_best, 0)
    require_range("config.train.microbatches", config.train.microbatches, 1)
    require_range("config.train.fsdp", config.train.fsdp, 1)
    require_range("config.data.workers", config.data.workers, 0)
    require_range("config.train.label_dropout", config.train.label_dropout, 0, 1, open_ends="high")
    ema_decays(config.train)


def ema_decays(config: ConfigDict) -> tuple[float, ...]:
    """Returns config.train.ema_decays.

    Args:
      config: the section config.train.

    Raises:
      InputError: there is none, one is no number, or one comes twice.
    """
    decays = tuple(config.ema_decays)
    for decay in decays:
        require_range("config.train.ema_decays", decay, 0, 1, open_ends="high")
    if not decays or len(set(map(ema_name, decays))) < len(decays):
        raise InputError(f"config.train.ema_decays are {decays}; give at least one, and none twice")
    return decays


def make_objective(config: ConfigDict, schedule: NoiseSchedule) -> Callable[[Batch], Loss]:
    """Returns the function of a batch that training minimises.

    Args:
      config: the section config.train.
      schedule: the noise schedule.

    Raises:
      InputError: an unknown name or option, or choices that do not go together.
    """
    predictions.check_known(config.prediction, "config.train.prediction")
    objective = options.parse("config.train.objective", config.objective, OBJECTIVES, leading=4)
    weighting = options.parse("config.train.weighting", config.weighting, WEIGHTINGS, leading=2)
    if "vlb_weight" in objective.options:
        require_range("vlb_weight of objective hybrid", objective.options["vlb_weight"], 0, open_ends="high")
    last = schedule.num_timesteps
    if not np.isfinite(predictions.reading(config.prediction, float(last), *schedule.at(last)).time):
        raise InputError(
            f"config.train.prediction is {config.prediction}, whose network is given log(noise / signal), and the "
            "schedule has no signal at T; take another prediction, or a schedule such as edm"
        )
    if objective.name == "vlb" and weighting.name != "simple":
        raise InputError(
            f"config.train.weighting is {weighting.name!r}, but objective vlb has its own weights; set it to simple"
        )
    if objective.name in LEARN_VARIANCE:
        # Refuses a prediction that says nothing about x_0 at T, where the bound needs it.
        bound_steps(schedule, range(schedule.num_timesteps, -1, -1), config.prediction)
    weights = None
    if weighting.name != "simple":
        weights = loss_weights(schedule, config.prediction, weighting.name, **weighting.options)
    bound = {"schedule": schedule, "prediction": config.prediction, "weights": weights}
    return partial(objective.function, **bound, **objective.options)


def load_data(config: ConfigDict) -> Dataset:
    """Loads the images that the section config.data names; fields that an old run lacks have their default."""
    others = {name: value for name, value in config.items() if name not in ("name", "flip", "workers")}
    known = inspect.signature(data.load).parameters
    if unknown := sorted(others.keys() - known.keys()):
        raise InputError(f"config.data has no field {unknown[0]!r} in this version; {nearest(unknown[0], known)}")
    return data.load(config.name, **others)


def learning_rate(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up, then constant, or a cosine to 0 at num_steps.

    Args:
      config: the section config.optimizer.
      num_steps: of the whole training.
    """
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
    """Returns Adam with clipping of the whole gradient; config is the section config.optimizer."""
    require_range("config.optimizer.clip_norm", config.clip_norm, 0, open_ends="low")
    require_range("config.optimizer.b1", config.b1, 0, 1, open_ends="high")
    require_range("config.optimizer.b2", config.b2, 0, 1, open_ends="high")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(rate, b1=config.b1, b2=config.b2))
