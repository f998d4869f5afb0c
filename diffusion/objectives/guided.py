"""Guidance distillation: a student takes the guidance scale as an input, and so is guided in one call in place of two.

It learns the guided answer of its teacher at random scales (arXiv:2210.03142, stage one).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion import keys, predictions
from diffusion.conditions import known_scales
from diffusion.denoiser import Network, split_variance
from diffusion.errors import InputError
from diffusion.gaussian import signal_noise
from diffusion.guidance import mix
from diffusion.objectives.losses import Batch, Loss, draw_noise, stratified_timesteps
from diffusion.objectives.teaching import Course, beside, require_teacher
from diffusion.objectives.weightings import Weights
from diffusion.schedules import NoiseSchedule
from diffusion.types import Images


def guidance_distillation_loss(
    batch: Batch,
    schedule: NoiseSchedule,
    prediction: str,
    weights: Weights | None,
    course: Course,
    scales: tuple[float, float] = (1.0, 4.0),
) -> Loss:
    """Returns the squared error of the student against its guided teacher, at one random t and scale a sample.

    Both predict the same, so that the error is that of the prediction itself, weighted as in `simple_loss`.

    Args:
      batch: cond holds labels. Its networks take (labels, scales) for cond; the teacher's answer is the same for each
        scale.
      schedule: the noise schedule.
      prediction: what both predict.
      weights: as for `simple_loss`.
      course: what else there is to know of the run and of the teacher.
      scales: the lowest and the highest guidance scale, from which the scale is drawn evenly; 1 is no guidance.

    Raises:
      InputError: there is no teacher, or it has no classes or predicts otherwise; or scales are no range with 1 in it.
    """
    require_teacher("guidance_distillation", course)
    low, high = known_scales(scales)
    if course.null is None:
        raise InputError("objective guidance_distillation learns guidance, and the teacher has no classes")
    if course.taught_by != prediction:
        raise InputError(
            f"config.train.prediction is {prediction}, and the teacher predicts {course.taught_by}; objective "
            "guidance_distillation compares the two: leave it out"
        )
    uniforms = jax.vmap(lambda k: keys.uniform(jax.random.fold_in(k, 0), (2,)))(batch.keys)
    t = stratified_timesteps(uniforms[:, 0], batch.index, batch.size, schedule.num_timesteps)
    scale = low + (high - low) * uniforms[:, 1]
    a, n = signal_noise(schedule, t, batch.x_0)
    inputs = predictions.inputs(prediction, t, a, n, a * batch.x_0 + n * draw_noise(batch))
    wanted = jax.lax.stop_gradient(guided(batch.teacher, inputs, batch.cond, course.null, scale))
    found, _ = split_variance(batch.network(*inputs, (batch.cond, scale)), batch.x_0.shape)
    error = jnp.mean(jnp.square(found - wanted), axis=tuple(range(1, wanted.ndim)))
    return Loss(error if weights is None else jnp.asarray(weights, error.dtype)[t] * error, t, error)


def guided(
    teacher: Network, inputs: tuple[Images, Array], labels: Array, null: int, scale: Float[Array, "B"]
) -> Images:
    """Returns a network's guided answer, in its own terms, by one call of twice the batch.

    Args:
      teacher: takes (labels, scales) for cond, and gives the same answer for each scale.
      inputs: x and the time as the network takes them.
      labels: [B].
      null: the label that means "no class".
      scale: one for each sample.
    """
    both = [jnp.concatenate([part, part]) for part in (*inputs, jnp.ones_like(scale))]
    told = jnp.concatenate([labels, jnp.full_like(labels, null)])
    output, reference = jnp.split(teacher(*both[:2], (told, both[2])), 2)
    return mix(output, reference, beside(scale, output))
