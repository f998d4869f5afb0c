"""Consistency: a network whose estimates of x_0 agree along each path from noise to data draws samples in one call.

Two points of a path, at t and at an earlier r, must give the same x_0; the estimate at r is learned from and not moved,
and at r = 0 it is the data. A run begins as the training of an ordinary model; then the gap between t and r closes
(easy consistency tuning, arXiv:2406.14548).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion import keys, predictions
from diffusion.errors import InputError, require_range
from diffusion.objectives.losses import Batch, Loss, stratified_timesteps
from diffusion.objectives.teaching import Course, beside, noisy, read, readings, require_teacher, rows_at
from diffusion.predictions import Reading
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images


def consistency_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str,
    weights: None,
    course: Course,
    pretraining: float = 0.3,
    gaps: tuple[float, float] = (0.5, 0.03),
) -> Loss:
    """Returns how far the estimates of x_0 at two noise levels of one image and one noise lie apart.

    The second point has the noise of the first, x_r = a_r x_0 + n_r eps, so no teacher is needed. Both estimates have
    the same dropout.

    Args:
      batch: see `Batch`.
      schedule: the noise schedule; its arrays are concrete, not traced.
      prediction: what the network predicts.
      weights: None, as this objective has its own: max(SNR, 1) over the gap.
      course: what else there is to know of the run.
      pretraining: the share of the run, at its beginning, in which r is 0, so that x_0 is learned as an ordinary model
        learns it. A student that predicts otherwise than its teacher needs it.
      gaps: t - r as a share of T, after that and at the end of the run; it shrinks by the same factor in each step.
        Where t is below it, r is 0.

    Raises:
      InputError: weights are given, a number is out of its range, or the prediction says nothing about x_0 at T.
    """
    points = _draw(batch, schedule, prediction, weights, course, pretraining, gaps)
    return _compare(batch, points, noisy(batch, points.early), batch.x_0)


def consistency_distillation_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str,
    weights: None,
    course: Course,
    pretraining: float = 0.3,
    gaps: tuple[float, float] = (0.125, 0.03),
) -> Loss:
    """Returns how far the estimates of x_0 at two points of one path of the teacher lie apart.

    The second point is one step of Heun's method from the first along the teacher's probability flow (consistency
    distillation, arXiv:2303.01469, algorithm 2). In the pretraining the teacher's estimate of x_0 is learned.

    Arguments and errors are as for `consistency_loss`; the batch has a teacher.
    """
    require_teacher("consistency_distillation", course)
    points = _draw(batch, schedule, prediction, weights, course, pretraining, gaps)
    x_r, x0 = _heun(batch, schedule, course, points, noisy(batch, points.late))
    return _compare(batch, points, x_r, x0)


class _Points(NamedTuple):
    """Two times r < t of each sample, how the student is read there, and the gap, 1 in the pretraining."""

    t: Int[Array, "B"]
    r: Int[Array, "B"]
    late: Reading
    early: Reading
    gap: Float[Array, ""]


def _draw(batch, schedule, prediction, weights, course, pretraining, gaps):
    """Draws the two times of each sample."""
    if weights is not None:
        raise InputError("a consistency objective has its own weights; use weighting simple")
    require_range("pretraining of a consistency objective", pretraining, 0, 1)
    if len(gaps) != 2 or not 1 >= gaps[0] >= gaps[1] > 0:
        shown = ",".join(f"{gap:g}" for gap in gaps)
        raise InputError(f"gaps of a consistency objective are {shown}; give two shares of T, 1 >= first >= last > 0")
    num = schedule.num_timesteps
    predictions.check_signal("the objective", prediction, num, *schedule.at(num))
    uniforms = jax.vmap(lambda k: keys.uniform(jax.random.fold_in(k, 0)))(batch.keys)
    t = stratified_timesteps(uniforms, batch.index, batch.size, num)
    share = jnp.asarray(batch.step, jnp.float32) / course.num_steps
    gap = gaps[0] * (gaps[1] / gaps[0]) ** jnp.clip((share - pretraining) / max(1 - pretraining, 1e-9), 0, 1)
    gap = jnp.where(share < pretraining, 1.0, gap)
    r = jnp.clip(t - jnp.round(num * gap).astype(int), 0, t - 1)
    at = readings(prediction, schedule, np.maximum(np.arange(num + 1), 1))  # 0 is not read, and may be 0 / 0
    return _Points(t, r, rows_at(at, t), rows_at(at, r), gap)


def _compare(batch, points, x_r, x0):
    """Returns the loss between the estimates at t and at r, or x0 where r is 0."""
    found = read(batch.network, points.late, noisy(batch, points.late), batch.cond, clip=False)
    # Nothing is clipped here: where pixels lie at an end, as black ones do, that would pull them inwards at every gap.
    wanted = read(batch.network, points.early, x_r, batch.cond, clip=False)
    wanted = jax.lax.stop_gradient(jnp.where(beside(points.r, x0) == 0, x0, wanted))
    error = jnp.mean(jnp.square(found - wanted), axis=tuple(range(1, x0.ndim)))
    snr = jnp.square(points.late.signal / points.late.noise)
    # Much weight at little noise keeps the estimates there exact, which all others are learned from.
    return Loss(jnp.maximum(snr, 1) / points.gap * error, points.t, error)


def _heun(batch, schedule, course, points, x: Images):
    """Returns the teacher's x at r by one step of Heun's method from x at t, and its first estimate of x_0."""
    num = schedule.num_timesteps
    at = readings(course.taught_by, schedule, np.maximum(np.arange(num + 1), 1))
    late, early = rows_at(at, points.t), rows_at(at, points.r)
    keep = beside(early.noise / late.noise, x)
    add = beside(early.signal, x) - keep * beside(late.signal, x)
    first = read(batch.teacher, late, x, batch.cond, course.clip)
    second = read(batch.teacher, early, keep * x + add * first, batch.cond, course.clip)
    # In the exponential form the step is exact for a constant D, and the mean of both ends makes it of second order.
    return keep * x + add * (first + second) / 2, first
