"""From the config of a training run to the objects that it names."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion import denoiser, devices, keys, machine
from diffusion.autoencoder import Autoencoder, TrainedAutoencoder
from diffusion.commands import config_files, latents, objectives, own, samplers, students
from diffusion.commands.datasets import load_data
from diffusion.commands.optimizers import learning_rate, make_optimizer
from diffusion.data import Dataset
from diffusion.errors import InputError, require_range
from diffusion.model import UNET, Model, Trained, make_model, make_schedule, sampling_clip
from diffusion.objectives import choice, progressive
from diffusion.objectives.losses import Batch, Loss, Terms
from diffusion.solvers import SamplerTable
from diffusion.training.loop import Plan
from diffusion.training.state import Trainee, TrainState, ema_name, init_state
from diffusion.training.step import StepOptions
from diffusion.types import Params


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a training run is made of, all of it checked.

    Attributes:
      config: the whole config.
      plan: how long to train, and how often to do what.
      dataset: the images.
      model: what is trained on them; a Trainee where it is an autoencoder.
      objective: what training minimises.
      rate: number of updates -> learning rate.
      optimizer: moves the parameters.
      mesh: the devices.
      step_options: of the train step.
      table: draws the samples shown while training; those of a progressive student see `table_at`. None for an
        autoencoder, which draws none.
      teacher: whose parameters a student starts from; None for any other run.
      frozen: what the objective needs besides the state, see `make_train_step`.
      autoencoder: what is trained, as the rest of the library sees it; None for a model.
    """

    config: ConfigDict
    plan: Plan
    dataset: Dataset
    model: Model | Trainee
    objective: Callable[[Batch], Loss | Terms]
    rate: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: Mesh
    step_options: StepOptions
    table: SamplerTable | None
    teacher: Trained | None = None
    frozen: Any = None
    autoencoder: Autoencoder | None = None

    def make_state(self, key: jax.Array, taught: Params | None = None) -> TrainState:
        """Returns the state before the first step; a student begins with its teacher's parameters, `taught`."""
        params = self.model.init(key)
        if taught is not None:  # what the student's network takes besides, it begins by leaving out of account
            flat = flax.traverse_util.flatten_dict(params) | flax.traverse_util.flatten_dict(taught)
            params = flax.traverse_util.unflatten_dict(jax.tree.map(jnp.copy, flat))
        needed = choice.parse(self.config.train.objective).name in choice.TAUGHT
        teacher = jax.tree.map(jnp.copy, params) if needed else None
        asked = self.step_options
        return init_state(params, self.optimizer, asked.ema_decays, teacher, asked.averaged, asked.curves)

    def stages(self) -> progressive.Stages | None:
        """Returns the stages of a progressive run, or None for any other."""
        return objectives.progressive_stages(self.config.train)

    def table_at(self, step: int) -> SamplerTable:
        """Returns what draws the samples shown after a training step."""
        steps = students.progressive_steps(self.config, step)
        return self.table if steps is None else students.own_table(self.model.schedule, steps)


def make_experiment(
    config: ConfigDict, teacher: Trained | None = None, autoencoder: TrainedAutoencoder | None = None
) -> Experiment:
    """Builds everything that a config asks for; finds all that can be wrong with it before anything is written.

    Args:
      config: the whole config; that of a student comes from `students.complete`.
      teacher: from `students.open_teacher`.
      autoencoder: from `latents.open_autoencoder`.

    Raises:
      InputError: an unknown name, a value out of its range, choices that do not go together, or unreadable data.
    """
    config_files.check(config)
    settings = config.train
    # Numbers first, then what takes time.
    plan = Plan(*(settings[name] for name in ("num_steps", "batch_size", "log_every", "save_every", "grid_every")))
    check_numbers(config)
    mesh = devices.training_mesh(plan.batch_size, settings.fsdp, settings.microbatches)
    stages = objectives.progressive_stages(settings)
    rate = learning_rate(config.optimizer, plan.num_steps, () if stages is None else stages.begins[1:])
    optimizer = make_optimizer(config.optimizer, rate)
    schedule = make_schedule(config.schedule)
    objective = objectives.make_objective(settings, schedule, students.course(config, teacher))
    table = samplers.make_table(schedule, config.sample.sampler, config.sample.steps, config.sample.tau)
    # The data and the network.
    dataset = load_data(config.data)
    config = with_classes(config, dataset.class_names)
    class_names = dataset.class_names if config.model.num_classes else ()
    shape = dataset.images.shape[1:]
    model = make_model(config, shape, class_names, own.networks(config.network), autoencoder)
    require_memory(config, model)
    # What fits together.
    if model.learned_variance and autoencoder is not None:
        raise InputError(
            f"objective {settings.objective} measures bits of 8-bit pixels, which latents are not; take simple"
        )
    if sampling_clip(config, model) != "none":
        latents.check_pixels(model, f"config.sample.clip={config.sample.clip}")
    denoiser.check_options(settings.prediction, denoiser.Options(sampling_clip(config, model)))
    samplers.check_fits(table, model)
    students.check_sampler(config, None, schedule, table)
    if teacher is not None:
        _check_same_images(model, teacher.model)
    step_options = StepOptions(
        ema_decays=ema_decays(settings),
        microbatches=settings.microbatches,
        log_every=plan.log_every,
        label_dropout=settings.label_dropout if model.conditions is not None else 0.0,
        promotions=() if stages is None else stages.begins[1:],
    )
    return Experiment(config, plan, dataset, model, objective, rate, optimizer, mesh, step_options, table, teacher)


def _check_same_images(model: Model, teacher: Model) -> None:
    """Raises InputError if a student is to learn other images or classes than its teacher's."""
    names = [getattr(found.conditions, "names", "none") for found in (model, teacher)]
    facts = {"images of": [model.image_shape, teacher.image_shape], "classes": names}
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise InputError(f"config.data has {what} {ours}, config.teacher {theirs}; they must be the same")


def require_memory(config: ConfigDict, model: Model | Trainee) -> None:
    """Raises InputError if parameters, averages, optimizer and gradient or the images of a batch exceed this machine.

    Only a CPU's memory is known beforehand; a GPU that is full says so itself.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return
    copies = 4 + len(config.train.ema_decays)  # parameters, gradient, two moments, averages
    copies += choice.parse(config.train.objective).name in choice.TAUGHT
    parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, keys.make(0))))
    sizes = {
        f"the network has {parameters:,} parameters, which in training": 4 * copies * parameters,
        f"config.train.batch_size is {config.train.batch_size:,}, images which": 4
        * config.train.batch_size
        * math.prod(model.image_shape),
    }
    for what, size in sizes.items():
        if size > machine.memory():
            raise InputError(
                f"{what} take {size / 2**30:,.0f} GiB; this machine has {machine.memory() / 2**30:,.0f} GiB. Take "
                "a smaller network, config.train.batch_size or data.size"
            )


def with_classes(config: ConfigDict, class_names: Sequence[str]) -> ConfigDict:
    """Returns a config in which config.model.num_classes is the number of classes that the network is told.

    Args:
      config: the whole config; -1 in that field stands for as many classes as the data has.
      class_names: of the data, none if it has no classes.

    Raises:
      InputError: the field names another number than the data has.
    """
    wanted = config.model.num_classes
    if wanted not in (-1, 0, len(class_names)):
        raise InputError(
            f"config.model.num_classes is {wanted}; the data has {len(class_names)} classes; -1 takes those, 0 none"
        )
    config = config.copy_and_resolve_references()
    if wanted == -1:  # a single class would tell the network nothing
        config.model.num_classes = len(class_names) if len(class_names) > 1 else 0
    return config


def require_levels(config: ConfigDict, image_shape: Sequence[int]) -> None:
    """Raises InputError if config.model.attention_resolutions names a height that no level of the UNet has.

    A new run has to pass; one that was begun before there was this check goes on, as it has no such attention.
    """
    if config.network != UNET:
        return
    heights = [image_shape[0] >> level for level in range(len(config.model.multipliers))]
    for height in config.model.attention_resolutions:
        if height not in (0, *heights):
            raise InputError(
                f"config.model.attention_resolutions has {height}; images of {image_shape[0]} pixels have levels of "
                f"{', '.join(map(str, heights))}, and 0 stands for no attention but in the middle"
            )


def check_numbers(config: ConfigDict) -> None:
    """Raises InputError for a number of any run that is out of its range."""
    for name, value in config_files.leaves(config):
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int) and name != "config.seed":
                require_range(name, number, -(2**31), 2**31 - 1)
            elif isinstance(number, float) and math.isnan(number):
                raise InputError(f"{name} is nan; it must be a number")
    require_range("config.seed", config.seed, 0, 2**32 - 1)
    require_range("config.data.max_memory", config.data.max_memory, 0)
    require_range("config.sample.num", config.sample.num, 1)
    require_range("config.train.keep", config.train.keep, 1)
    require_range("config.train.keep_best", config.train.keep_best, 0)
    require_range("config.train.microbatches", config.train.microbatches, 1)
    require_range("config.train.fsdp", config.train.fsdp, 1)
    require_range("config.data.workers", config.data.workers, 0)
    require_range("config.train.label_dropout", config.train.label_dropout, 0, 1, open_ends="high")
    ema_decays(config.train)
    every, log_every = config.train.save_every, config.train.log_every
    if config.train.keep_best and every % log_every:
        raise InputError(
            f"config.train.save_every is {every}; keep_best ranks steps by the mean loss since the last row "
            f"of the log: make it a multiple of log_every, {log_every}, or some of these means are over few steps"
        )


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
