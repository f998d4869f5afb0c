"""The train state and the one jitted train step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from diffusion import devices
from diffusion.errors import InputError
from diffusion.objectives.losses import Loss
from diffusion.schedules import NoiseSchedule
from diffusion.types import Params

TENTHS = 10
"""The error of the network is logged for each of so many equal parts of the timesteps 1..T."""


class Totals(NamedTuple):
    """Sums over the steps since the last multiple of log_every, in which skipped ones do not count.

    Attributes:
      steps: how many.
      loss, grad_norm: of those steps.
      errors, counts: the squared errors of the samples by the tenth of 1..T that their t lies in, and how many there
        were, both divided by the batch size.
    """

    steps: Float[Array, ""]
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    errors: Float[Array, "TENTHS"]
    counts: Float[Array, "TENTHS"]


@struct.dataclass
class TrainState:
    """All that training changes, so all that a checkpoint needs. Random keys follow from the seed and the step.

    Attributes:
      step: number of steps made, int32 scalar.
      params: weights that the optimizer moves.
      ema_params: for each decay (by `ema_name`) their exponential moving average; samples are drawn with these.
      opt_state: the optimizer's state.
      totals: what the next row of the log is made of.
      skipped, skipped_in_row: steps whose gradient was not finite, which changed nothing: all, and up to this step.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: dict[str, Params]
    opt_state: optax.OptState
    totals: Totals
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


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
    """The name of an EMA in TrainState.ema_params, in checkpoints and for sample.py --ema: "0.9999"."""
    return f"{decay:.10g}"


def init_state(params: Params, optimizer: optax.GradientTransformation, ema_decays: Sequence[float]) -> TrainState:
    """The state before the first step; each EMA starts as a copy of params."""
    ema_params = {ema_name(decay): jax.tree.map(jnp.copy, params) for decay in ema_decays}
    none = [jnp.zeros((), jnp.int32) for _ in range(3)]
    totals = Totals(*(jnp.zeros(()) for _ in range(3)), *(jnp.zeros(TENTHS) for _ in range(2)))
    return TrainState(none[0], params, ema_params, optimizer.init(params), totals, *none[1:])


def ema_decay_at(step, decay: float):
    """min(decay, (1 + step) / (10 + step)): short runs and first steps forget the random start."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def make_train_step(
    apply_fn: Callable[..., Array],
    objective: Callable[..., Loss],
    optimizer: optax.GradientTransformation,
    schedule: NoiseSchedule,
    mesh: Mesh,
    key: jax.Array,
    *,
    ema_decays: Sequence[float],
    microbatches: int = 1,
    log_every: int = 1,
    null_label: int | None = None,
    label_dropout: float = 0.0,
) -> Callable[[TrainState, Array, Any, Array], tuple[TrainState, Metrics]]:
    """The jitted step (state, images, cond, stop) -> (state, metrics). It donates its state.

    Step k draws all noise of sample i from fold_in(fold_in(key, k), i), so neither noise nor dropout depends on the
    number of devices, processes or microbatches. A step whose loss or gradient is not finite changes only counters.

    Args:
      apply_fn: the network, taking dropout_keys [B] besides (params, x, t, cond).
      objective: (network, schedule, x_0, cond, keys, index, batch_size) -> Loss, see `diffusion.objectives.losses`.
      optimizer: an optax transformation.
      schedule: the noise schedule.
      mesh: from `devices.training_mesh`.
      key: the run's random key.
      ema_decays: for each EMA its highest decay, see `ema_decay_at`.
      microbatches: the batch goes through the network in so many parts, whose gradients are added up.
      log_every: the totals start anew after each multiple of it.
      null_label, label_dropout: how often a label is replaced by the one that means "no class", which guidance needs.

    Returns:
      The step. It takes images uint8 [B, H, W, C]; cond, int [B] or None; stop, float [number of devices], each above
      0 where its process wants to stop.
    """

    def part_loss(params, images, cond, index, step_key, batch_size):
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)
        x_0 = images.astype(jnp.float32) / 127.5 - 1.0
        if label_dropout:
            dropped = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 3), label_dropout))(keys)
            cond = jnp.where(dropped, null_label, cond)
        dropout_keys = jax.vmap(lambda k: jax.random.fold_in(k, 4))(keys)
        network = partial(apply_fn, params, dropout_keys=dropout_keys)
        loss = objective(network, schedule, x_0, cond, keys, index, batch_size)
        tenth = jax.nn.one_hot((loss.t - 1) * TENTHS // schedule.num_timesteps, TENTHS)
        return loss.value.mean(), ((tenth * loss.error[:, None]).mean(0), tenth.mean(0))

    def gradient(params, images, cond, index, step_key, batch_size):
        """((loss, by tenth), gradient), means over these samples."""
        differentiate = jax.value_and_grad(part_loss, has_aux=True)
        if microbatches == 1:
            return differentiate(params, images, cond, index, step_key, batch_size)
        # Sample i goes to part i % microbatches, so that a batch laid over devices stays where it is.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), (images, cond, index))

        def add(total, part):
            return jax.tree.map(jnp.add, total, differentiate(params, *part, step_key, batch_size)), None

        shapes = jax.eval_shape(differentiate, params, *jax.tree.map(lambda x: x[0], parts), step_key, batch_size)
        # XLA's gradient of a convolution to its kernel is many times slower inside a loop on a CPU.
        unroll = mesh.devices.flat[0].platform == "cpu"
        total, _ = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts, unroll=unroll)
        return jax.tree.map(lambda x: x / microbatches, total)

    def whole_gradient(params, images, cond, stop, step_key):
        """Of the whole batch; where parameters are sharded, XLA lays out the work."""
        index = jnp.arange(images.shape[0])
        return gradient(params, images, cond, index, step_key, images.shape[0]), stop.mean()

    def shared_gradient(params, images, cond, stop, step_key):
        """Each device takes its share of the batch, and all results meet in ONE collective, raveled into a vector.

        A collective for each parameter can deadlock XLA's CPU thread pool.
        """
        share = images.shape[0]
        index = jax.lax.axis_index(mesh.axis_names) * share + jnp.arange(share)
        result = gradient(params, images, cond, index, step_key, mesh.size * share)
        vector, unravel = ravel_pytree((result, stop.mean()))
        return unravel(jax.lax.pmean(vector, mesh.axis_names))

    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    if mesh.shape["fsdp"] > 1:
        mean_gradient = whole_gradient
    else:
        in_specs = (everywhere, split, split, split, everywhere)
        mean_gradient = jax.shard_map(
            shared_gradient, mesh=mesh, in_specs=in_specs, out_specs=everywhere, check_vma=False
        )

    def train_step(state, images, cond, stop):
        if images.shape[0] % (mesh.size * microbatches):
            raise InputError(
                f"a batch of {images.shape[0]} cannot be shared by {mesh.size} devices in {microbatches} microbatches"
            )
        step_key = jax.random.fold_in(key, state.step)
        ((loss, by_tenth), grads), stop = mean_gradient(state.params, images, cond, stop, step_key)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = {
            ema_name(decay): _average(state.ema_params[ema_name(decay)], params, ema_decay_at(state.step, decay))
            for decay in ema_decays
        }
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        before = state.totals
        totals = jax.tree.map(lambda x: jnp.where(state.step % log_every == 0, 0, x), before)
        added = Totals(jnp.ones(()), loss, grad_norm, *by_tenth)
        changed = (params, ema_params, opt_state, jax.tree.map(jnp.add, totals, added))
        unchanged = (state.params, state.ema_params, state.opt_state, totals)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), changed, unchanged)
        skipped_in_row = jnp.where(good, 0, state.skipped_in_row + 1)
        after = TrainState(state.step + 1, *kept, state.skipped + ~good, skipped_in_row)
        metrics = Metrics(loss, grad_norm, after.totals, after.skipped, after.skipped_in_row, stop)
        return jax.lax.with_sharding_constraint((after, metrics), devices.state_sharding(mesh, (after, metrics)))

    return jax.jit(train_step, donate_argnums=0)


def _average(ema, params, decay):
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
