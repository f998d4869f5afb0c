"""From the section config.train to the function of a batch that training minimises."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import keys, options, predictions
from diffusion.errors import InputError, require_range
from diffusion.objectives import choice, progressive
from diffusion.objectives.bound import bound_steps
from diffusion.objectives.losses import LEARN_VARIANCE, Batch, Loss
from diffusion.objectives.teaching import Course
from diffusion.objectives.weightings import WEIGHTINGS, loss_weights
from diffusion.schedules import NoiseSchedule


def progressive_stages(config: ConfigDict) -> progressive.Stages | None:
    """Returns the stages of a progressive run, or None for any other; config is the section config.train."""
    objective = choice.parse(config.objective)
    if objective.name != "progressive":
        return None
    if config.keep_best:
        raise InputError("config.train.keep_best compares losses, which differ from stage to stage; set it to 0")
    return progressive.stages(config.num_steps, **objective.options)


def make_objective(
    config: ConfigDict, schedule: NoiseSchedule, course: Course | None = None
) -> Callable[[Batch], Loss]:
    """Returns the function of a batch that training minimises.

    Args:
      config: the section config.train.
      schedule: the noise schedule.
      course: what the objectives of students know of the run; None for one without a teacher.

    Raises:
      InputError: an unknown name or option, or choices that do not go together.
    """
    predictions.check_known(config.prediction, "config.train.prediction")
    objective = choice.parse(config.objective)
    weighting = options.parse("config.train.weighting", config.weighting, WEIGHTINGS, leading=2)
    if "vlb_weight" in objective.options:
        require_range("vlb_weight of objective hybrid", objective.options["vlb_weight"], 0, open_ends="high")
    last = schedule.num_timesteps
    if not np.isfinite(predictions.reading(config.prediction, float(last), *schedule.at(last)).time):
        raise InputError(
            f"config.train.prediction is {config.prediction}, whose network is given log(noise / signal), and the "
            "schedule has no signal at T; take another prediction, or a schedule such as edm"
        )
    student = choice.is_student(objective.name)
    if predictions.sees_end(config.prediction) and objective.name not in choice.MEAN_FLOW:
        raise InputError(
            f"config.train.prediction is {config.prediction}, which objective {objective.name} does not learn; set "
            "config.train.objective=mean_flow"
        )
    weighs_itself = objective.name == "vlb" or (student and objective.name != choice.GUIDED)
    if weighs_itself and weighting.name != "simple":
        raise InputError(
            f"config.train.weighting is {weighting.name!r}, but objective {objective.name} has its own weights; set it "
            "to simple"
        )
    if objective.name in LEARN_VARIANCE:
        # Refuses a prediction that says nothing about x_0 at T, where the bound needs it.
        bound_steps(schedule, range(schedule.num_timesteps, -1, -1), config.prediction)
    weights = None
    if weighting.name != "simple":
        weights = loss_weights(schedule, config.prediction, weighting.name, **weighting.options)
    bound = {"schedule": schedule, "prediction": config.prediction, "weights": weights}
    if student:
        bound["course"] = course or Course(config.num_steps)
        _try_out(partial(objective.function, **bound, **objective.options), bound["course"].null)
    return partial(objective.function, **bound, **objective.options)


def _try_out(objective: Callable[[Batch], Loss], null: int | None) -> None:
    """Calls an objective on one pixel without computing anything, which raises what is wrong with its options."""

    def network(x, time, cond):
        return x

    cond = None if null is None else jnp.full(1, null)

    def loss(x_0, sample_keys):
        return objective(Batch(network, x_0, cond, sample_keys, jnp.arange(1), 1, average=network, teacher=network))

    jax.eval_shape(loss, jnp.zeros((1, 1, 1, 1)), jax.random.split(keys.make(0), 1))
