"""MeanFlow: a network of the mean velocity between two times of a rectified flow, which goes there in one call.

On the path from x_t down to x_s, with times in 0..1, the mean velocity is u = (x_t - x_s) / (t - s). How it changes
along the path says what it is: u = v - (t - s) du/dt, with v the velocity at t (arXiv:2505.13447, Eq. 6). So it is
learned without following a path, and where s = t it is the velocity itself.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import keys, predictions
from diffusion.denoiser import Network
from diffusion.errors import InputError, require_range
from diffusion.objectives.losses import Batch, Loss, draw_noise
from diffusion.objectives.teaching import Course, beside, require_teacher
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images

SMALL = 0.01
"""The squared error of a sample, summed over its pixels, below which its weight hardly grows."""

Times = Float[Array, "B"]
"""Times of a rectified flow, in 0..1."""


def mean_flow_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str,
    weights: None,
    course: Course,
    same: float = 0.75,
    times: Sequence[float] = (),
    power: float = 1.0,
) -> Loss:
    """Returns how far a mean velocity lies from the one that its own change along a path says it should be.

    The velocity of the path is that of the data, eps - x_0, as in the training of an ordinary model.

    Args:
      batch: its network takes times [B, 2], t and s, which here are real numbers in 0..T.
      schedule: a rectified flow; its arrays are concrete, not traced.
      prediction: mean_flow.
      weights: None, as this objective has its own.
      course: what else there is to know of the run.
      same: the share of the samples with s = t, which learn the velocity itself.
      times: (center, spread) of normal numbers, whose sigmoids are the times; () draws them evenly. The later of two is
        t. The paper takes (-0.4, 1) for ImageNet's latents and (-2, 2) for CIFAR-10.
      power: a sample's squared error is divided by its own size, (error + 0.01)^power, so that a few samples of large
        errors do not decide; 0 takes it as it is.

    Raises:
      InputError: another prediction or schedule, weights are given, or a number is out of its range.
    """
    _check(schedule, prediction, weights, same, times, power)
    t, s = _draw_times(batch, same, times)
    eps = draw_noise(batch)
    x = _between(batch, t, eps)
    return _compare(batch, schedule.num_timesteps, x, eps - batch.x_0, (t, s), power)


def mean_flow_distillation_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str,
    weights: None,
    course: Course,
    same: float = 0.75,
    times: Sequence[float] = (),
    power: float = 1.0,
) -> Loss:
    """Returns the same as `mean_flow_loss` with the velocity of a teacher, which does not scatter as that of data does.

    Arguments and errors are as for `mean_flow_loss`; the teacher predicts the velocity, or the mean one, of which that
    at s = t is taken.
    """
    require_teacher("mean_flow_distillation", course)
    _check(schedule, prediction, weights, same, times, power)
    t, s = _draw_times(batch, same, times)
    x = _between(batch, t, draw_noise(batch))
    velocity = jax.lax.stop_gradient(_mean_velocity(batch.teacher, schedule.num_timesteps, batch.cond)(x, t, t))
    return _compare(batch, schedule.num_timesteps, x, velocity, (t, s), power)


def _check(schedule, prediction, weights, same, times, power):
    """Refuses what the objective cannot work with."""
    if weights is not None:
        raise InputError("a mean_flow objective has its own weights; use weighting simple")
    if not predictions.sees_end(prediction):
        raise InputError(
            f"config.train.prediction is {prediction}; objective mean_flow learns mean velocities: set "
            "config.train.prediction=mean_flow"
        )
    share = np.arange(schedule.num_timesteps + 1) / schedule.num_timesteps
    if not np.allclose([schedule.alpha_bar, schedule.noise_var], [(1 - share) ** 2, share**2], rtol=0, atol=1e-9):
        raise InputError("objective mean_flow needs straight paths; set config.schedule=rectified_flow")
    require_range("same of objective mean_flow", same, 0, 1)
    require_range("power of objective mean_flow", power, 0, open_ends="high")
    if len(times) not in (0, 2) or not np.all(np.isfinite(times)) or (len(times) == 2 and times[1] <= 0):
        shown = ",".join(f"{number:g}" for number in times)
        raise InputError(
            f"times of objective mean_flow are {shown}; give the mean of normal numbers and their standard deviation, "
            "above 0, as times=-0.4,1"
        )


def _draw_times(batch: Batch, same: float, times: Sequence[float]) -> tuple[Times, Times]:
    """Draws t >= s for each sample; the first of the two numbers is spread evenly over the batch."""
    uniforms = jax.vmap(lambda k: keys.uniform(jax.random.fold_in(k, 0), (3,)))(batch.keys)
    uniforms = uniforms.astype(jnp.result_type(float))
    even = (jnp.asarray(batch.index, uniforms.dtype) + uniforms[:, 0]) / batch.size
    drawn = jnp.stack([even, uniforms[:, 1]])
    if len(times):
        center, spread = times
        drawn = jax.nn.sigmoid(center + spread * jax.scipy.special.ndtri(drawn))
    t = drawn.max(axis=0)
    return t, jnp.where(uniforms[:, 2] < same, t, drawn.min(axis=0))


def _between(batch: Batch, t: Times, eps: Images) -> Images:
    """Returns x_t on the straight path from the data to eps."""
    share = beside(t, eps)
    return (1 - share) * batch.x_0 + share * eps


def _mean_velocity(network: Network, num_timesteps: int, cond):
    """Returns the function (x, t, s) -> u of a network, which itself takes timesteps."""

    def velocity(x, t, s):
        return network(x, num_timesteps * jnp.stack([t, s], axis=-1), cond)

    return velocity


def _compare(batch, num_timesteps, x, velocity, times, power):
    """Returns the loss of the mean velocity at x, where the path has a velocity."""
    t, s = times
    mean = _mean_velocity(batch.network, num_timesteps, batch.cond)
    # Along the path x moves by its velocity and t by 1, while s stays: one derivative in this direction.
    found, change = jax.jvp(mean, (x, t, s), (velocity.astype(x.dtype), jnp.ones_like(t), jnp.zeros_like(s)))
    wanted = jax.lax.stop_gradient(velocity - beside(t - s, x) * change)
    error = jnp.sum(jnp.square(found - wanted), axis=tuple(range(1, x.ndim)))
    value = error / jax.lax.stop_gradient((error + SMALL) ** power)
    timestep = jnp.clip(jnp.ceil(num_timesteps * t).astype(int), 1, num_timesteps)
    return Loss(value, timestep, error / (x.size // x.shape[0]))
