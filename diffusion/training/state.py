"""The state that training changes, what it is of, and what a step says of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from diffusion.spaces import Space
from diffusion.types import Params

TENTHS = 10
"""The error of the network is logged for each of so many equal parts of the timesteps 1..T."""

TENTH_NAMES = tuple(f"error_tenth_{k}" for k in range(1, TENTHS + 1))
"""What these curves are called in the record."""


class Totals(NamedTuple):
    """Sums over the steps since the last multiple of log_every, in which skipped ones do not count.

    Attributes:
      steps: how many.
      loss, grad_norm: of those steps.
      errors, counts: the squared errors of the samples by the tenth of 1..T that their t lies in, and how many there
        were, both divided by the batch size; or the means of an objective's own curves, and ones.
    """

    steps: Float[Array, ""]
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    errors: Float[Array, "curves"]
    counts: Float[Array, "curves"]


@struct.dataclass
class TrainState:
    """All that training changes, so all that a checkpoint needs. Random keys follow from the seed and the step.

    Attributes:
      step: number of steps made, int32 scalar.
      params: weights that the optimizer moves.
      ema_params: for each decay (by `ema_name`) their exponential moving average; samples are drawn with these.
      opt_state: the optimizer's state.
      totals: the sums that the next row of the log is made of.
      skipped, skipped_in_row: how many steps changed nothing because their gradient was not finite, of all and of the
        last ones in a row.
      teacher: the parameters that a student learns from; None, and in no checkpoint, for any other run.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: dict[str, Params]
    opt_state: optax.OptState
    totals: Totals
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    teacher: Params | None = None


class Trainee(NamedTuple):
    """What is trained where it is no `Model`, as far as training has to know it.

    Attributes:
      apply_fn: (params, images) -> what the network makes of them, with dropout_keys as that of a Model.
      space: in which batches are given to the objective.
      init: key -> params.
    """

    apply_fn: Callable[..., Any]
    space: Space
    init: Callable[[jax.Array], Params]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.space.shape

    @property
    def conditions(self) -> None:
        """Nobody tells it anything."""
        return


class Metrics(NamedTuple):
    """What one step returns: mean loss of the batch, norm of the gradient before clipping, and copies of counters.

    stop is above 0 where any process wants to stop.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    totals: Totals
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    stop: Float[Array, ""]


def ema_name(decay: float) -> str:
    """Returns the name of an EMA in TrainState.ema_params, in checkpoints and for sample.py --ema: "0.9999"."""
    return f"{decay:.10g}"


def whole(params: Params) -> Params:
    """Returns all parameters, the part that is averaged, and whose gradient is logged, of most runs."""
    return params


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    ema_decays: Sequence[float],
    teacher: Params | None = None,
    averaged: Callable[[Params], Params] = whole,
    curves: Sequence[str] = TENTH_NAMES,
) -> TrainState:
    """Returns the state before the first step; each EMA starts as a copy of params.

    Args:
      params: what is trained.
      optimizer: moves them.
      ema_decays, averaged, curves: as in `StepOptions`.
      teacher: the parameters that a student learns from.
    """
    ema_params = {ema_name(decay): jax.tree.map(jnp.copy, averaged(params)) for decay in ema_decays}
    none = [jnp.zeros((), jnp.int32) for _ in range(3)]
    totals = Totals(*(jnp.zeros(shape, jnp.float32) for shape in ((), (), (), len(curves), len(curves))))
    return TrainState(none[0], params, ema_params, optimizer.init(params), totals, *none[1:], teacher)


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Returns min(decay, (1 + step) / (10 + step)), so that short runs and first steps forget the random start."""
    made = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + made) / (10 + made))
