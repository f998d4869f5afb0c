"""What the objectives of students share: what they know of their teacher, and how they read a network's x_0."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import predictions
from diffusion.denoiser import Network, Options, denoise
from diffusion.errors import InputError
from diffusion.objectives.losses import Batch, draw_noise
from diffusion.predictions import Reading
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images


class Course(NamedTuple):
    """What an objective of students knows of the run besides a batch.

    Attributes:
      num_steps: training steps in all; its schedules go by the share of them that is done.
      taught_by: what the first teacher predicts; None where there is no teacher.
      clip: whether the teacher's estimates of x_0 are clipped to [-1, 1], as in sampling from pixels.
      null: the teacher's label that means "no class"; None where it has no classes.
    """

    num_steps: int
    taught_by: str | None = None
    clip: bool = True
    null: int | None = None


def require_teacher(objective: str, course: Course) -> None:
    """Raises InputError if there is no teacher to learn from."""
    if course.taught_by is None:
        raise InputError(f"objective {objective} learns from a teacher; name one, in a config by config.teacher")


def beside(values: Float[Array, "B"], x: Images) -> Images:
    """Gives one number for each sample the axes and the type of x."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def noisy(batch: Batch, reading: Reading) -> Images:
    """Returns the batch's samples at the levels of a reading, [B], with their own noise."""
    return beside(reading.signal, batch.x_0) * batch.x_0 + beside(reading.noise, batch.x_0) * draw_noise(batch)


def read(network: Network, reading: Reading, x: Images, cond: Any, clip: bool) -> Images:
    """Returns a network's estimate of x_0; the reading's fields are [B], and the variance channels are left out."""
    shaped = reading.with_levels(lambda field: beside(field, x))
    return denoise(network, x, cond, shaped, Options("recompute" if clip else "none")).x0


def readings(prediction: str, schedule: NoiseSchedule, t: np.ndarray) -> Reading:
    """Returns how a network is read at times of any shape, in float64."""
    return predictions.reading(prediction, np.asarray(t, np.float64), *schedule.at(t))


def rows_at(table: Any, *index: jax.Array) -> Any:
    """Looks up every array of a pytree of float64 tables, in the working precision."""
    return jax.tree.map(lambda values: jnp.asarray(values, jnp.result_type(float))[index], table)
