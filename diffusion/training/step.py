"""The train state and the one jitted train step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from diffusion.losses import simple_loss
from diffusion.schedules import NoiseSchedule
from diffusion.types import Params


@struct.dataclass
class TrainState:
    """All that training changes. Random keys are not in it: they follow from the seed and the step.

    Attributes:
      step: number of updates made, int32 scalar.
      params: weights that the optimizer moves.
      ema_params: their exponential moving average; samples are drawn with these.
      opt_state: the optimizer's state.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """Scalars of one step: mean loss of the batch, and the norm of the gradient before clipping."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; ema_params start as a copy of params."""
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def ema_decay_at(step, decay: float):
    """min(decay, (1 + step) / (10 + step)): short runs and first steps forget the random start."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def make_train_step(
    apply_fn: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    schedule: NoiseSchedule,
    mesh: Mesh,
    key: jax.Array,
    *,
    ema_decay: float,
    prediction: str = "eps",
    flip: bool = False,
    null_label: int | None = None,
    label_dropout: float = 0.0,
) -> Callable[[TrainState, Array, Any], tuple[TrainState, Metrics]]:
    """The jitted step (state, images, cond) -> (state, metrics). It donates its state.

    Step k draws all its noise from fold_in(key, k) and the sample's place in the batch, so it does not depend on the
    number of devices (dropout masks do). Data-parallel over the mesh's "data" axis: each device differentiates its
    share of the batch, and the gradients meet in ONE collective, raveled into a vector. A collective for each
    parameter can deadlock XLA's CPU thread pool.

    Args:
      apply_fn: the network, taking train=True and dropout_key besides (params, x, t, cond).
      optimizer: an optax transformation.
      schedule: the noise schedule.
      mesh: its "data" axis must divide the batch.
      key: the run's random key.
      ema_decay: the highest decay of ema_params, see `ema_decay_at`.
      prediction: a key of losses.TARGETS.
      flip: mirror each image with probability 1/2.
      null_label, label_dropout: how often a label is replaced by the one that means "no class", which guidance needs.

    Returns:
      The step. It takes images uint8 [B, H, W, C] and cond, a pytree with leading axis B or None.
    """

    def batch_loss(params, images, cond, step_key, start, batch_size):
        index = start + jnp.arange(images.shape[0])
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)
        x_0 = images.astype(jnp.float32) / 127.5 - 1.0
        if flip:
            mirrored = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 2)))(keys)
            x_0 = jnp.where(mirrored[:, None, None, None], x_0[:, :, ::-1], x_0)
        if label_dropout:
            dropped = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 3), label_dropout))(keys)
            cond = jnp.where(dropped, null_label, cond)
        # The first index of the share tells devices apart; samples never reach this index, as it is past the batch.
        dropout_key = jax.random.fold_in(step_key, batch_size + start)
        network = partial(apply_fn, params, train=True, dropout_key=dropout_key)
        return simple_loss(network, schedule, x_0, cond, keys, index, batch_size, prediction).mean()

    def mean_gradient(params, images, cond, step_key):
        share = images.shape[0]
        start, batch_size = jax.lax.axis_index("data") * share, mesh.shape["data"] * share
        loss, grads = jax.value_and_grad(batch_loss)(params, images, cond, step_key, start, batch_size)
        vector, unravel = ravel_pytree((loss, grads))
        return unravel(jax.lax.pmean(vector, "data"))

    replicated, split = PartitionSpec(), PartitionSpec("data")
    mean_gradient = jax.shard_map(
        mean_gradient, mesh=mesh, in_specs=(replicated, split, split, replicated), out_specs=replicated, check_vma=False
    )

    def train_step(state, images, cond):
        loss, grads = mean_gradient(state.params, images, cond, jax.random.fold_in(key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay_at(state.step, ema_decay)
        ema_params = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema_params, params)
        return TrainState(state.step + 1, params, ema_params, opt_state), Metrics(loss, optax.tree.norm(grads))

    everywhere = NamedSharding(mesh, replicated)
    return jax.jit(train_step, donate_argnums=0, out_shardings=everywhere)
