"""Progressive distillation: one step of the student learns to do what two steps of its teacher do.

A run goes through stages. In each, the student halves the teacher's number of DDIM steps; at its end the student
becomes the teacher of the next (Salimans & Ho, arXiv:2202.00512, algorithm 2).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion import keys, timesteps
from diffusion.errors import InputError, is_whole
from diffusion.objectives.losses import Batch, Loss, stratified_timesteps
from diffusion.objectives.teaching import Course, beside, noisy, read, readings, require_teacher, rows_at
from diffusion.predictions import Reading
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import ddim

MAX_AMPLIFICATION = 100
"""How much more an error of the network may count in x_0 at T: for eps under a usual schedule it is 150 to 20,000."""


class Stages(NamedTuple):
    """The stages of a run.

    Attributes:
      steps: how many DDIM steps the student makes in each.
      begins: the training step that each begins with; the first is 0.
    """

    steps: tuple[int, ...]
    begins: tuple[int, ...]

    def at(self, step: int) -> int:
        """Returns the number of DDIM steps that a student has learned, or is learning, after so many training steps."""
        return self.steps[int(np.searchsorted(self.begins, max(step - 1, 0), side="right")) - 1]


def stages(num_steps: int, start: int = 64, end: int = 4, lengths: Sequence[float] = ()) -> Stages:
    """Divides a run into stages of start, start / 2, ... end DDIM steps.

    Args:
      num_steps: training steps in all.
      start: what the first student has; its teacher makes twice as many.
      end: what the last has; start over a power of two.
      lengths: how long each stage is, in relation to the others; () makes all equally long.

    Raises:
      InputError: end is not reached by halving start, or a length is missing, too many or not above 0.
    """
    for name, value in (("start", start), ("end", end), ("the number of training steps", num_steps)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} of objective progressive is {value}; it must be a whole number of at least 1")
    count = max(start // end, 1).bit_length()
    if end << (count - 1) != start:
        raise InputError(f"objective progressive cannot halve start={start} down to end={end}; as 64 to 4, 8 to 1")
    lengths = tuple(lengths) or (1.0,) * count
    if len(lengths) != count or not all(0 < length < np.inf for length in lengths):
        raise InputError(
            f"lengths of objective progressive are {','.join(f'{length:g}' for length in lengths)}; give {count} "
            f"numbers above 0, one for each stage from {start} to {end} steps"
        )
    ends = [round(num_steps * part / sum(lengths)) for part in accumulate(lengths)]
    begins = (0, *ends[:-1])
    if len(set(begins)) < count or begins[-1] >= num_steps:
        raise InputError(f"config.train.num_steps is {num_steps}, too few for {count} stages of objective progressive")
    return Stages(tuple(start >> k for k in range(count)), begins)


class _Rows(NamedTuple):
    """Each step of the student in each stage, [stages, steps]: two steps of the teacher, from t to a time between, on.

    Attributes:
      student: how the student is read at t.
      first, second: how the teacher is read at t, and between.
      keep, add: the teacher's first step is x_between = keep x_t + add D.
      share: of the teacher's first D in what the student learns.
      weight: of the error.
      t: the time, for the log.
    """

    student: Reading
    first: Reading
    second: Reading
    keep: Float[np.ndarray, "stages steps"]
    add: Float[np.ndarray, "stages steps"]
    share: Float[np.ndarray, "stages steps"]
    weight: Float[np.ndarray, "stages steps"]
    t: Float[np.ndarray, "stages steps"]


def progressive_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str,
    weights: None,
    course: Course,
    start: int = 64,
    end: int = 4,
    lengths: Sequence[float] = (),
) -> Loss:
    """Returns the error of the x_0 with which one DDIM step lands where two steps of the teacher do.

    A DDIM step from t to s is x_s = (n_s / n_t) x_t + b D. Two of them multiply x_t by the same n_s / n_t as one, so
    the D that one step needs is a weighted mean of the two that the teacher finds: nothing is divided by a small
    signal. Its error weighs max(SNR, 1), the paper's truncated SNR (arXiv:2202.00512, Eq. 9). Each sample draws one
    step of the student's uniform grid.

    Args:
      batch: with a teacher, which makes twice the steps of the student.
      schedule: the noise schedule; its arrays are concrete, not traced.
      prediction: what the student predicts.
      weights: None, as this objective has its own.
      course: what else there is to know of the run and of the first teacher.
      start, end, lengths: see `stages`.

    Raises:
      InputError: weights are given, a number is wrong, or an error of the network counts too much in x_0 at T.
    """
    if weights is not None:
        raise InputError("objective progressive has its own weights; use weighting simple")
    require_teacher("progressive", course)
    plan = stages(course.num_steps, start, end, lengths)
    rows = _rows(schedule, prediction, course, plan)
    stage = jnp.searchsorted(jnp.asarray(plan.begins), batch.step, side="right") - 1
    uniforms = jax.vmap(lambda k: keys.uniform(jax.random.fold_in(k, 0)))(batch.keys)
    number = stratified_timesteps(uniforms, batch.index, batch.size, jnp.asarray(plan.steps)[stage])
    row = rows_at(rows, stage, number - 1)

    # What the teacher makes of x_t in two steps; the student is to do so in one.
    x_t = noisy(batch, row.student)
    early = read(batch.teacher, row.first, x_t, batch.cond, course.clip)
    between = beside(row.keep, x_t) * x_t + beside(row.add, x_t) * early
    late = read(batch.teacher, row.second, between, batch.cond, course.clip)
    share = beside(row.share, x_t)
    wanted = jax.lax.stop_gradient(share * early + (1 - share) * late)
    found = read(batch.network, row.student, x_t, batch.cond, clip=False)
    error = jnp.mean(jnp.square(found - wanted), axis=tuple(range(1, x_t.ndim)))
    return Loss(row.weight * error, row.t.astype(int), error)


def _rows(schedule, prediction, course, plan):
    """Returns the steps of all stages in float64; those with fewer steps are filled up with their last one."""
    if 2 * plan.steps[0] > schedule.num_timesteps:
        raise InputError(
            f"objective progressive starts from a teacher of {2 * plan.steps[0]} steps; the schedule has "
            f"{schedule.num_timesteps} timesteps: take a smaller start"
        )
    _check_amplification(schedule, prediction)
    made = []
    for stage, count in enumerate(plan.steps):
        table = ddim(schedule, timesteps.uniform(schedule, 2 * count))
        (keep, keep_late), (add, add_late) = (column.reshape(-1, 2).T for column in table.update[:, 0, :2].T)
        t, between = table.t.reshape(-1, 2).T
        taught_by = prediction if stage else course.taught_by
        weight = np.maximum(np.divide(*schedule.powers(t)), 1.0)
        read_at = [readings(kind, schedule, at) for kind, at in ((prediction, t), (taught_by, t), (taught_by, between))]
        row = _Rows(*read_at, keep, add, keep_late * add / (keep_late * add + add_late), weight, t)
        made.append(jax.tree.map(lambda x: np.pad(x, (0, plan.steps[0] - len(x)), mode="edge"), row))
    return jax.tree.map(lambda *parts: np.stack(parts), *made)


def _check_amplification(schedule, prediction):
    """Refuses a prediction whose errors at T count so much in x_0 that no network learns x_0 there."""
    last = schedule.num_timesteps
    largest = np.abs(readings(prediction, schedule, last).from_output)
    if not largest <= MAX_AMPLIFICATION:
        raise InputError(
            f"config.train.prediction is {prediction}: an error of the network at T counts {largest:,.0f} times in "
            "x_0, from which a student of few steps cannot learn; set config.train.prediction=v, whatever the teacher "
            "predicts"
        )
