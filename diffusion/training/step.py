"""The one jitted train step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from diffusion import devices, keys
from diffusion.errors import InputError
from diffusion.model import Model
from diffusion.objectives.losses import Batch, Loss, Terms
from diffusion.training.state import (
    TENTH_NAMES,
    TENTHS,
    Metrics,
    Totals,
    Trainee,
    TrainState,
    ema_decay_at,
    ema_name,
    init_state,
    whole,
)
from diffusion.types import Params

__all__ = ["TENTHS", "StepOptions", "TrainState", "ema_decay_at", "ema_name", "init_state", "make_train_step"]


class StepOptions(NamedTuple):
    """How a train step works, apart from what it trains.

    Attributes:
      ema_decays: for each EMA its highest decay, see `ema_decay_at`.
      microbatches: the batch goes through the network in so many parts, whose gradients are added up.
      log_every: the totals start anew after each multiple of it.
      label_dropout: how often a condition is replaced by the one that means "none", which guidance needs.
      promotions: the numbers of steps made after which the student becomes its own teacher, and the optimizer starts
        anew.
      averaged: the part of the parameters that EMAs are of.
      learning: the part of the gradient whose norm is logged; the others are no gradients, or of an opponent.
      curves: the names of what is logged besides the loss, the tenths of the timesteps or an objective's own.
    """

    ema_decays: Sequence[float] = (0.9999,)
    microbatches: int = 1
    log_every: int = 1
    label_dropout: float = 0.0
    promotions: Sequence[int] = ()
    averaged: Callable[[Params], Params] = whole
    learning: Callable[[Params], Params] = whole
    curves: Sequence[str] = TENTH_NAMES


def make_train_step(
    model: Model | Trainee,
    objective: Callable[[Batch], Loss | Terms],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    key: jax.Array,
    options: StepOptions,
    frozen: Any = None,
) -> Callable[[TrainState, Array, Any, Array], tuple[TrainState, Metrics]]:
    """Returns the jitted step (state, images, cond, stop) -> (state, metrics). It donates its state.

    Step k draws all noise of sample i from fold_in(fold_in(key, k), i), so neither noise nor dropout depends on the
    number of devices, processes or microbatches. A step whose loss or gradient is not finite changes only counters.

    Args:
      model: what is trained; the apply_fn of a Model takes dropout_keys [B] besides (params, x, t, cond).
      objective: a function of one batch, see `diffusion.objectives.losses`.
      optimizer: an optax transformation.
      mesh: from `devices.training_mesh`.
      key: the run's random key.
      options: see `StepOptions`.
      frozen: a pytree of arrays that reaches the objective as `Batch.frozen` and is never trained, such as the
        parameters of a network of features.

    Returns:
      The step. It takes images uint8 [B, H, W, C], or what else the model's space draws its samples from; cond, a
      pytree with leading axis B or None; stop, float [number of devices], each above 0 where its process wants to stop.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    part_loss = _part_loss(model, objective, keys.threefry(key), options.label_dropout)
    mean_gradient = _over_devices(_gradient(part_loss, options.microbatches, unroll=on_cpu), mesh)
    first_ema = ema_name(options.ema_decays[0]) if options.ema_decays else None

    @keys.pinned
    def train_step(state, images, cond, stop, frozen):
        if images.shape[0] % (mesh.size * options.microbatches):
            raise InputError(
                f"a batch of {images.shape[0]} cannot be shared by {mesh.size} devices in {options.microbatches} "
                "microbatches"
            )
        if options.promotions:
            state = _promoted(state, optimizer, jnp.asarray(options.promotions), on_cpu)
        others = (state.ema_params.get(first_ema), state.teacher, frozen)
        ((loss, by_tenth), grads), stop = mean_gradient(state.params, others, (images, cond), stop, state.step)
        after, grad_norm = _update(state, loss, by_tenth, grads, optimizer, options, on_cpu)
        metrics = Metrics(loss, grad_norm, after.totals, after.skipped, after.skipped_in_row, stop)
        return jax.lax.with_sharding_constraint((after, metrics), devices.state_sharding(mesh, (after, metrics)))

    frozen = jax.device_put(frozen, NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(train_step, donate_argnums=0)
    return lambda state, images, cond, stop: jitted(state, images, cond, stop, frozen)


def _part_loss(model, objective, key, label_dropout):
    """Returns the mean loss of a part of a batch as a function of the parameters.

    The function is (params, others, part, step, size) -> (loss, error by tenths of the timesteps): others are the
    average, the teacher and what is frozen, part is (images, cond, index) and size is that of the whole batch.
    """

    def part_loss(params, others, part, step, size):
        images, cond, index = part
        average, teacher, frozen = others
        step_key = jax.random.fold_in(key, step)
        sample_keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)
        if label_dropout:
            cond = _drop_conditions(cond, model.conditions.null, sample_keys, label_dropout)
        dropout_keys = jax.vmap(lambda k: jax.random.fold_in(k, 4))(sample_keys)
        batch = Batch(
            network=partial(model.apply_fn, params, dropout_keys=dropout_keys),
            x_0=model.space.examples(images, sample_keys),
            cond=cond,
            keys=sample_keys,
            index=index,
            size=size,
            average=None if average is None else partial(model.apply_fn, average),
            teacher=None if teacher is None else partial(model.apply_fn, teacher),
            frozen=frozen,
            step=step,
            params=params,
        )
        loss = objective(batch)
        return loss.value.mean(), _curves(model, loss)

    return part_loss


def _curves(model, loss):
    """Returns (sums, counts) of what is logged besides the loss, both divided by the number of samples."""
    if isinstance(loss, Terms):
        means = jnp.stack([jnp.asarray(curve, jnp.float32).mean() for curve in loss.curves.values()])
        return means, jnp.ones_like(means)
    tenth = jax.nn.one_hot((loss.t - 1) * TENTHS // model.schedule.num_timesteps, TENTHS, dtype=jnp.float32)
    return (tenth * loss.error[:, None]).mean(0), tenth.mean(0)


def _gradient(part_loss, microbatches, unroll):
    """Returns (params, others, part, step, size) -> ((loss, by tenth), gradient), means over the samples."""
    differentiate = jax.value_and_grad(part_loss, has_aux=True)
    if microbatches == 1:
        return differentiate

    def gradient(params, others, part, step, size):
        # Sample i goes to part i % microbatches, so that a batch laid over devices stays where it is.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), part)

        def of_part(part):
            return differentiate(params, others, part, step, size)

        def add(total, part):
            return jax.tree.map(jnp.add, total, of_part(part)), None

        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
        # XLA's gradient of a convolution to its kernel is many times slower inside a loop on a CPU.
        total, _ = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts, unroll=unroll)
        return jax.tree.map(lambda x: x / microbatches, total)

    return gradient


def _drop_conditions(cond, null, sample_keys, share):
    """Replaces the conditions of a share of the samples by the one that means "none"."""
    dropped = jax.vmap(lambda k: keys.bernoulli(jax.random.fold_in(k, 3), share))(sample_keys)

    def replace(given, none):
        return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), none, given)

    return jax.tree.map(replace, cond, null)


def _over_devices(gradient, mesh):
    """Returns (params, others, (images, cond), stop, step) -> (gradient of the whole batch, mean of stop)."""

    def whole_gradient(params, others, batch, stop, step):
        """Where parameters are sharded, XLA lays out the work."""
        images, cond = batch
        size = images.shape[0]
        return gradient(params, others, (images, cond, jnp.arange(size, dtype=jnp.int32)), step, size), stop.mean()

    def shared_gradient(params, others, batch, stop, step):
        """Each device takes its share of the batch, and all results meet in ONE collective, raveled into a vector.

        A collective for each parameter can deadlock XLA's CPU thread pool.
        """
        images, cond = batch
        share = images.shape[0]
        index = jax.lax.axis_index(mesh.axis_names) * share + jnp.arange(share, dtype=jnp.int32)
        result = gradient(params, others, (images, cond, index), step, mesh.size * share)
        if mesh.size == 1:  # what one device has is the whole, and without the vector it compiles in less time
            return result, stop.mean()
        # Without the barrier XLA makes one function of the vector and what leads to it, and compiles that for long.
        vector, unravel = ravel_pytree(jax.lax.optimization_barrier((result, stop.mean())))
        return unravel(jax.lax.pmean(vector, mesh.axis_names))

    if mesh.shape["fsdp"] > 1:
        return whole_gradient
    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    in_specs = (everywhere, everywhere, split, split, everywhere)
    return jax.shard_map(shared_gradient, mesh=mesh, in_specs=in_specs, out_specs=everywhere, check_vma=False)


def _update(state, loss, by_tenth, grads, optimizer, options, on_cpu):
    """Returns the state after a step, and the norm of the gradient; a step that is not finite changes only counters."""
    grad_norm = optax.tree.norm(options.learning(grads))
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if options.learning is not whole:
        good &= jnp.isfinite(optax.tree.norm(grads))
    totals = jax.tree.map(lambda x: jnp.where(state.step % options.log_every == 0, 0, x), state.totals)
    added = Totals(*(jnp.asarray(value, jnp.float32) for value in (1, loss, grad_norm, *by_tenth)))
    decays = {ema_name(decay): decay for decay in options.ema_decays}

    def changed():
        # optax raises decay rates to its own int32 counts, which strict promotion of dtypes would not let it do.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = options.averaged(params)
        ema_params = {
            name: _average(state.ema_params[name], averaged, ema_decay_at(state.step, decay))
            for name, decay in decays.items()
        }
        return params, ema_params, opt_state, jax.tree.map(jnp.add, totals, added)

    kept = _choose(good, changed, (state.params, state.ema_params, state.opt_state, totals), on_cpu)
    skipped_in_row = jnp.where(good, 0, state.skipped_in_row + 1)
    skipped = state.skipped + jnp.asarray(~good, jnp.int32)
    return TrainState(state.step + 1, *kept, skipped, skipped_in_row, state.teacher), grad_norm


def _promoted(state, optimizer, promotions, on_cpu):
    """Makes the student its own teacher where a stage begins; the learning rate goes on by the count of all updates."""

    def goes_on(x):
        return isinstance(x, optax.ScaleByScheduleState)

    def promoted():
        fresh = optimizer.init(state.params)
        opt_state = jax.tree.map(lambda new, old: old if goes_on(new) else new, fresh, state.opt_state, is_leaf=goes_on)
        return state.replace(
            teacher=state.params, ema_params=dict.fromkeys(state.ema_params, state.params), opt_state=opt_state
        )

    return _choose(jnp.any(state.step == promotions), promoted, state, on_cpu)


def _choose(changes, changed, unchanged, on_cpu):
    """Returns changed() or unchanged, pytrees; all devices must agree on `changes`, as they may meet in changed()."""
    if on_cpu:  # A choice in each array takes twice as long to compile as a branch, and XLA copies the state for it.
        return jax.lax.cond(changes, changed, lambda: unchanged)
    # On a GPU a branch would have the host wait for what decides.
    return jax.tree.map(lambda new, old: jnp.where(changes, new, old), changed(), unchanged)


def _average(ema, params, decay):
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
