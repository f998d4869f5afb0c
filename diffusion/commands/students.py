"""Students, networks trained for few calls: what one takes from its teacher, and what may be asked of it afterwards."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained, timesteps
from diffusion.commands import config_files, opening, own, recipes
from diffusion.errors import InputError
from diffusion.model import UNET, UNET2D_CONDITION, Trained
from diffusion.objectives import choice, progressive
from diffusion.objectives.teaching import Course
from diffusion.schedules import NoiseSchedule
from diffusion.sealed import digest
from diffusion.solvers import SamplerTable, ddim

_NETWORKS = ("config.network", "config.model.", "config.transformer.", "config.unet2d.")

_TAKEN = ("config.latents", "config.data.", "config.schedule", *_NETWORKS, "config.train.prediction")
"""The fields in which a student is as its teacher, unless the recipe sets them."""

_SECTIONS, _OF_TRAINING = ("model", "transformer", "unet2d"), ("dropout", "remat", "dtype")

_ITS_OWN = tuple(f"config.{section}.{name}" for section in _SECTIONS for name in _OF_TRAINING)
"""Those of them that a student does not take over: they say how it is trained."""

_ALIKE = ("config.latents", "config.schedule", *_NETWORKS)
"""The fields in which a student cannot differ from its teacher, from whose parameters it starts."""


class Sampler(NamedTuple):
    """A sampler as flags and configs name it."""

    sampler: str
    steps: int
    tau: str


def open_teacher(config: ConfigDict) -> Trained | None:
    """Returns the model that config.teacher names, or None where it names none.

    Raises:
      InputError: there is no such model, it is damaged or not finite; the objective needs a teacher or takes none.
    """
    name, objective = config.teacher, choice.parse(config.train.objective).name
    if not name:
        if objective in choice.TAUGHT:
            raise InputError(
                f"objective {objective} learns from a teacher; name one as --config.teacher=RUN, a file of convert.py, "
                f"or {pretrained.SHIPPED}"
            )
        return None
    if not choice.is_student(objective):
        raise InputError(
            f"config.teacher is {name!r}, but objective {objective} learns from data; take config.train.objective="
            f"{', '.join(choice.STUDENTS)}, or leave it out"
        )
    networks = own.networks(config.network)
    try:
        return opening.open_named(name, "", networks).trained
    except InputError as error:
        raise InputError(f"config.teacher: {str(error).replace('--workdir', 'config.teacher')}") from None


def identity(teacher: Trained | None) -> dict[str, Any]:
    """Returns what the record of a run says of its teacher, {} for none; a resumed run must have the same one."""
    if teacher is None:
        return {}
    return {"teacher": {"sha256": digest(teacher.params), "step": teacher.step, "ema": teacher.ema}}


def complete(config: ConfigDict, teacher: Trained | None, given: Collection[str] = ()) -> ConfigDict:
    """Returns the config of a student with what it takes from its teacher, and with its own sampler.

    Args:
      config: the whole config; any other than a student's is returned as it is.
      teacher: from `open_teacher`.
      given: the fields that the command line sets, as "train.prediction"; these, and those that differ from the
        defaults, are not taken from the teacher.

    Raises:
      InputError: the recipe sets something otherwise in which a student is as its teacher, or it cannot learn from it.
    """
    if not choice.is_student(config.train.objective):
        return config
    config, defaults = config.copy_and_resolve_references(), dict(config_files.leaves(recipes.defaults()))
    named = {f"config.{name}" for name in given}

    def is_set(name, value):
        return name in named or value != defaults[name]

    if teacher is not None:
        _check_lesson(config, teacher)
        theirs = dict(config_files.leaves(teacher.config))
        for name, value in list(config_files.leaves(config)):
            if not name.startswith(_TAKEN) or name in _ITS_OWN or name not in theirs:
                continue
            if not is_set(name, value):
                _assign(config, name, theirs[name])
            elif name.startswith(_ALIKE) and not (config_files.same(value, theirs[name]) or _all_classes(name, value)):
                raise InputError(
                    f"{name} is {value!r}, the teacher's is {theirs[name]!r}; a student starts from its teacher's "
                    "parameters: leave it out, as configs/digits_progressive.py does"
                )
    for field, value in own_sampler(config)._asdict().items():
        if not is_set(f"config.sample.{field}", config.sample[field]):
            config.sample[field] = value
    return config


def own_sampler(config: ConfigDict, step: int | None = None) -> Sampler:
    """Returns the sampler that a run's model is for; config.sample says which for any other than a student.

    Args:
      config: the whole config of the run.
      step: the number of training steps made, on which the steps of a progressive student depend; None for all.
    """
    if progressive_steps(config, step) is not None:
        return Sampler("ddim", progressive_steps(config, step), "uniform")
    objective = choice.parse(config.train.objective).name
    if objective in ("consistency", "consistency_distillation"):
        return Sampler("consistency", 2, "uniform")
    if objective in choice.MEAN_FLOW:
        return Sampler("ddim", 2, "uniform")
    return Sampler(config.sample.sampler, config.sample.steps, config.sample.tau)


def progressive_steps(config: ConfigDict, step: int | None = None) -> int | None:
    """Returns how many DDIM steps a progressive student has learned to make, as `own_sampler`; None for any other."""
    chosen = choice.parse(config.train.objective)
    if chosen.name != "progressive":
        return None
    num_steps = config.train.num_steps
    return progressive.stages(num_steps, **chosen.options).at(num_steps if step is None else step)


def course(config: ConfigDict, teacher: Trained | None) -> Course:
    """Returns what the objective of a student knows of the run and of its teacher."""
    clip = config.sample.clip != "none"
    if teacher is None:
        return Course(config.train.num_steps, clip=clip)
    conditions = teacher.model.conditions
    null = None if conditions is None else conditions.null
    return Course(config.train.num_steps, teacher.model.prediction, clip, null)


def default_steps(trained: Trained) -> int:
    """Returns how many steps a model makes unless something else is asked for."""
    steps = progressive_steps(trained.config, trained.step)
    return trained.config.sample.steps if steps is None else steps


def check_sampler(config: ConfigDict, step: int | None, schedule: NoiseSchedule, table: SamplerTable) -> None:
    """Raises InputError if a table asks for what a student cannot do; step is as for `own_sampler`.

    What a network of mean velocities can do follows from its prediction, see `sampling.check_prediction`, and a student
    that takes the guidance scale is sampled as its teacher is.
    """
    objective = choice.parse(config.train.objective).name
    if not choice.is_student(objective) or objective in (*choice.MEAN_FLOW, choice.GUIDED):
        return
    steps = progressive_steps(config, step)
    given = "config.sample" if step is None else "--sampler, --steps, --tau, --eta and --init"
    if steps is not None:
        if not _same_table(table, own_table(schedule, steps)):
            raise InputError(
                f"this progressive student has learned one thing, {steps} ddim step{'s' * (steps > 1)} on the uniform "
                f"grid, which {table.name} in {table.nfe} calls is not: leave out {given}"
            )
    elif table.update.shape[1] != 1 or np.any(table.update[:, 0, 0]):
        raise InputError(
            f"this consistency student draws a whole sample in each call, and {table.name} goes on from x; take "
            "sampler consistency with any number of steps, 1 to 4 are usual"
        )


def check_is_denoiser(config: ConfigDict, what: str) -> None:
    """Raises InputError if a model is a student, whose output is no mean of x_0 as what is called `what` needs it."""
    if choice.is_student(config.train.objective):
        raise InputError(
            f"{what} needs a network that estimates the mean of x_0, and this is a student for few calls; name its "
            "teacher, or a model of objective simple"
        )


def own_table(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Returns the one table of a progressive student."""
    return ddim(schedule, timesteps.uniform(schedule, steps))


def _check_lesson(config, teacher):
    """Refuses a teacher from which the objective cannot learn."""
    if teacher.config.network == UNET2D_CONDITION:
        raise InputError("config.teacher is told texts, and no student here is; learn.py learns a table for it instead")
    known = progressive_steps(teacher.config, teacher.step)
    if teacher.model.learned_variance:
        raise InputError(
            "config.teacher predicts its variance, which students do not; take a teacher of objective simple"
        )
    chosen = choice.parse(config.train.objective)
    if known is None and not choice.is_student(teacher.config.train.objective):
        _check_inputs(config, teacher, chosen.name)
        return
    start = progressive.stages(config.train.num_steps, **chosen.options).steps[0] if chosen.name == "progressive" else 0
    if known is None or chosen.name != "progressive":
        raise InputError(
            f"config.teacher is itself a student of objective {teacher.config.train.objective}, from which objective "
            f"{chosen.name} cannot learn; name the teacher that it learned from"
        )
    if known != 2 * start:
        remedy = f"progressive:start={known // 2}" if known > 1 else "the teacher that it learned from"
        raise InputError(
            f"config.teacher is a progressive student of {known} steps, and objective progressive with start={start} "
            f"needs a teacher of {2 * start}; take {remedy}"
        )


def _check_inputs(config, teacher, objective):
    """Refuses a teacher that does not begin as a student whose network takes more than its own."""
    if objective in choice.MEAN_FLOW and teacher.model.prediction != "flow":
        raise InputError(
            f"config.teacher predicts {teacher.model.prediction}; objective {objective} begins with a network of the "
            "velocity: take a teacher of config.train.prediction=flow on config.schedule=rectified_flow"
        )
    if objective == choice.GUIDED:
        if teacher.model.conditions is None:
            raise InputError(f"config.teacher has no classes; objective {objective} needs them, as guidance does")
        if teacher.config.train.label_dropout == 0:
            raise InputError(
                "config.teacher was trained with config.train.label_dropout=0 and so has not learned what no class "
                "means, which guidance needs; take one of label_dropout above 0"
            )
    if objective in (*choice.MEAN_FLOW, choice.GUIDED) and config.network != UNET:
        raise InputError(
            f"config.network is {config.network!r}; with objective {objective} and a teacher it must be {UNET}, as a "
            "student's network takes more than its teacher's"
        )


def _assign(config, name, value):
    """Sets a field by its full name."""
    *sections, last = name.split(".")[1:]
    for section in sections:
        config = config[section]
    with config.ignore_type():  # a file has lists where a config has tuples
        config[last] = value


def _all_classes(name, value):
    return name == "config.model.num_classes" and value == -1


def _same_table(table, wanted):
    """Tells whether two tables compute the same, whatever they are called."""
    pairs = ((table.update, wanted.update), (table.t, wanted.t))
    return all(x.shape == y.shape and np.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in pairs)
