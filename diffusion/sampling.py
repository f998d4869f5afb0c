"""The one compiled scan that executes every sampler table."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from diffusion import adaptive, keys, predictions, watching
from diffusion.adaptive import Adaptive
from diffusion.arguments import (
    check_cache,
    check_conditions,
    check_guidance,
    check_ids,
    check_known,
    check_noise,
    check_start,
    check_steering,
    check_table,
    is_concrete,
)
from diffusion.around import Steering
from diffusion.brownian import Brownian
from diffusion.caching import Cache, Split, cached
from diffusion.denoiser import Options, check_options, denoise, log_variance_between
from diffusion.errors import InputError
from diffusion.guidance import Guidance, Now
from diffusion.predictions import Reading
from diffusion.solvers.steps import check_ends, ends
from diffusion.solvers.table import SamplerTable
from diffusion.types import ApplyFn, Images, Params


class Trajectory(NamedTuple):
    """What a sampling run went through.

    Attributes:
      x: [stages + 1, N, *sample_shape], what the network saw in each stage, and the sample last.
      x0: [stages, N, *sample_shape], the denoised estimates after guidance and clipping.
    """

    x: Float[Array, "stages+1 N *shape"]
    x0: Float[Array, "stages N *shape"]


class _Stage(NamedTuple):
    """One row of a table, or all of them, as the scan reads it."""

    index: Int[Array, ""]
    reading: Reading
    update: Float[Array, "R R+2"]
    log_variance: Float[Array, "2"] | None
    guidance: tuple[Float[Array, ""], Float[Array, ""]] | None  # scale, and whether to guide at all: 1 or 0
    whole: Bool[Array, ""] | None  # whether the deep features are computed; None where nothing is cached
    interval: Int[Array, "2"] | None  # of the brownian path that z comes from; None where z is drawn for the stage


@struct.dataclass
class _Inputs:
    """What every stage is given, whatever its row says; a pytree whose last four fields are compiled in."""

    params: Params
    key: jax.Array
    sample_ids: Int[Array, "N"]
    cond: Any
    guidance: Guidance | None
    known: tuple[Images, Images] | None
    x_init: Images | None
    start_std: Float[Array, ""]
    start_shares: Float[Array, "R-1"] | None
    from_images: Bool[Array, ""]
    steering: Steering | None
    brownian: Brownian | None
    watcher: Int[Array, ""] | None
    apply_fn: ApplyFn = struct.field(pytree_node=False)
    sample_shape: tuple[int, ...] = struct.field(pytree_node=False)
    options: Options = struct.field(pytree_node=False)
    split: Split | None = struct.field(pytree_node=False)


def sample(  # noqa: PLR0913
    apply_fn: ApplyFn,
    params: Params,
    table: SamplerTable | Adaptive,
    key: jax.Array,
    num_samples: int,
    sample_shape: tuple[int, ...],
    *,
    prediction: str = "eps",
    clip: str | bool | None = "none",
    dynamic_threshold: float | None = None,
    cond: Any = None,
    guidance: Guidance | None = None,
    known: tuple[Images, Images] | None = None,
    x_init: Images | None = None,
    sample_ids: Int[Array, "N"] | None = None,
    return_trajectory: bool = False,
    cache: Cache | None = None,
    steering: Steering | None = None,
    callback: watching.Callback | None = None,
    noise: Brownian | None = None,
    **short: Any,
) -> Images | tuple[Images, Trajectory | Int[Array, "N"]]:
    """Draws samples by running a table.

    Sample i depends on (key, sample_ids[i]) and cond[i] only, never on the batch around it. One compilation serves all
    tables of the same shape: another eta, grid, solver or guidance scale compiles nothing. Pure, and so fit for jit,
    grad and vmap.

    Args:
      apply_fn: the network; hashable, and the same object at every call, or each call compiles again.
      params: its weights.
      table: from a function in `diffusion.solvers`, or an adaptive solver from `diffusion.adaptive.adaptive`.
      key: a JAX random key. Whatever generator it is of, the package's own draws, see `diffusion.keys`.
      num_samples: N.
      sample_shape: the shape of one sample, (H, W, C) for images.
      prediction: what the network was trained to predict, a key of `diffusion.predictions.PREDICTIONS`.
      clip: what to do with an estimate of x_0 outside [-1, 1]. "none" (or None, False) leaves it, "recompute" (or True)
        clips it and lets eps follow from the clipped value, "keep_eps" clips it and keeps the eps predicted.
      dynamic_threshold: clip at this quantile of each sample's own |x_0| instead, where above 1, and scale back to
        [-1, 1] (Imagen, arXiv:2205.11487); 0.995 is usual.
      cond: a pytree given to the network, each leaf with a leading axis N.
      guidance: see `diffusion.guidance.Guidance`. Without a second network it needs cond and a null, and makes one call
        of twice the batch. A scale of 1 does nothing and costs nothing, except with the rule cfg++.
      known: (values, mask), broadcastable to the samples: keeps the pixels where mask is 1 and draws the others to fit
        (inpainting). The estimate of x_0 takes the known values, so x holds them with the noise of every step. The
        others follow them only in part; with a table of `diffusion.solvers.resampled` they do nearly as they should.
      x_init: the start instead of noise, [N, *sample_shape], as the network sees it first; its dtype is the precision
        of the run.
      sample_ids: int [N], 0..N-1 if not given.
      return_trajectory: also return all intermediate states, which then stay in memory; of an adaptive solver, the
        number of network calls of each sample.
      cache: in which calls the deep levels of the network are computed, for the others to take what they gave, see
        `diffusion.caching.Cache`; its split then takes the place of apply_fn. Other calls of as many compile nothing,
        and all calls is the same as none given.
      steering: a classifier that steers the network, or a function of its estimates, see `diffusion.around.Steering`.
      callback: (stage, x, x0), called on the host after each network call, as for previews; x0 is the estimate. It may
        raise, which ends the run. Other callbacks compile nothing, but sample must not be inside jit, grad or vmap.
      noise: draws the noise of the steps by time, so that other numbers of steps see the same, see
        `diffusion.brownian.Brownian`; None draws it for each call.
      short: guidance_scale, null_cond, guidance_interval, guidance_rescale and guidance_rule are short for a guidance
        with these fields: sample(..., cond=labels, null_cond=nulls, guidance_scale=3).

    Returns:
      Samples [N, *sample_shape], or (samples, Trajectory); of an adaptive solver (samples, int [N]).

    Raises:
      InputError: an unknown option, shapes that do not agree, a prediction that says nothing about x_0 where the signal
        is zero, guidance without conditions, or a callback that raises.
      TypeError: an unknown keyword.
    """
    # Check what was asked for.
    check_table(table)
    clip = {None: "none", False: "none", True: "recompute"}.get(clip, clip)
    options = Options(clip, dynamic_threshold, table.log_variance is not None)
    check_options(prediction, options)
    check_prediction(table, prediction)
    key = keys.threefry(key)
    ids = check_ids(sample_ids, num_samples)
    x_init = check_start(x_init, (num_samples, *sample_shape), table)
    known = check_known(known, (num_samples, *sample_shape))
    check_conditions(num_samples, cond)
    guidance = check_guidance(guidance, short, cond)
    check_rule(prediction, guidance)
    if (known is not None or steering is not None) and predictions.sees_end(prediction):
        what = "steering goes" if known is None else "known pixels go"
        raise InputError(f"{what} into estimates of x_0, which a network that predicts {prediction} makes none of")
    if steering is not None:
        check_steering(steering)

    shape = tuple(sample_shape)
    if isinstance(table, Adaptive):
        adaptive.check_alone(prediction, guidance, cache=cache, noise=noise, callback=callback)
        shared = None if guidance is None else guidance.replace(scale=1.0 * guidance.scale)
        given = (params, key, ids, cond, shared, known, x_init, table.start_std, None, False, steering)
        found = adaptive.solve(table, _Inputs(*given, None, None, apply_fn, shape, options, None), prediction)
        return found if return_trajectory else found[0]
    whole = check_cache(cache, table, guidance)
    intervals = check_noise(noise, table)

    # Lay out what each stage reads, and what all share.
    end = ends(table) if predictions.sees_end(prediction) else None
    reading = predictions.reading(prediction, table.t, table.signal, table.noise, end)
    scales = None if guidance is None else guidance.scales(table.t)
    stages = _Stage(np.arange(table.nfe), reading, table.update, table.log_variance, scales, whole, intervals)
    shared = None if guidance is None else guidance.replace(scale=None, interval=None, rescale=1.0 * guidance.rescale)
    start = (table.start_std, _start_shares(table), table.tau[0] < table.tau[-1])
    options = options._replace(has_aux=whole is not None)
    around = (steering, noise, None, apply_fn, shape, options, None if whole is None else cache.split)
    inputs = _Inputs(params, key, ids, cond, shared, known, x_init, *start, *around)
    if callback is None:
        return _run(inputs, stages, return_trajectory)
    with watching.watched(callback, inputs, stages) as number:
        return jax.block_until_ready(_run(inputs.replace(watcher=number), stages, return_trajectory))


def _start_shares(table):
    """Returns what the other registers begin with, as multiples of what register 0 does; None where that is 0."""
    return None if table.start is None else table.start[1:] / table.start[0]


def check_prediction(table: SamplerTable, prediction: str) -> None:
    """Raises InputError if a prediction says nothing about x_0 at one of a table's times, or suits no such table."""
    if all(map(is_concrete, (table.t, table.signal, table.noise))):
        predictions.check_signal(table.name, prediction, table.t, table.signal, table.noise)
        if predictions.sees_end(prediction) and isinstance(table, SamplerTable):
            check_ends(table)


def check_rule(prediction: str, guidance: Guidance | None) -> None:
    """Raises InputError if a rule of guidance measures or moves estimates of x_0 where a network makes none."""
    if guidance is not None and predictions.sees_end(prediction) and guidance.rule.partition(":")[0] != "cfg":
        raise InputError(
            f"guidance_rule is {guidance.rule!r}, which works on estimates of x_0; a network that predicts "
            f"{prediction} makes none on the way: take cfg"
        )


def check_variance(table: SamplerTable, learned_variance: bool) -> None:
    """Raises InputError if the table takes its variance from a model that predicts none."""
    if table.log_variance is not None and not learned_variance:
        raise InputError(
            f"{table.name} takes its variance from the model, which predicts none; use ddpm:variance=small or large, "
            "or train with config.train.objective=hybrid"
        )


@partial(jax.jit, static_argnames="return_trajectory")
@keys.pinned
def _run(inputs: _Inputs, stages: _Stage, return_trajectory: bool):
    sample_keys = jax.vmap(lambda i: jax.random.fold_in(inputs.key, i))(inputs.sample_ids)
    dtype = jnp.result_type(float) if inputs.x_init is None else inputs.x_init.dtype
    stages, known = _in_precision(stages, dtype), jax.tree.map(lambda leaf: leaf.astype(dtype), inputs.known)

    def fresh(stage_id):
        return jax.vmap(lambda k: keys.normal(jax.random.fold_in(k, stage_id), inputs.sample_shape, dtype))(sample_keys)

    def estimate(x, stage, memory, features):
        network, guidance = _networks(inputs, stage.whole, features)
        now = None if guidance is None else Now(guidance, *stage.guidance, stage.index, memory)
        return denoise(network, x, inputs.cond, stage.reading, inputs.options, now, known, inputs.steering)

    def step(state, stage):
        registers, memory, features, path = state
        x = registers[0]
        d = estimate(x, stage, memory, features)
        if inputs.watcher is not None:
            watching.tell(inputs.watcher, stage.index, x, d.x0)
        if inputs.brownian is None:
            z = fresh(stage.index + 1)
        else:
            z, path = inputs.brownian.step(sample_keys, stage.interval, path, dtype)
        if inputs.options.learned_variance:
            z = jnp.exp(0.5 * log_variance_between(d.log_variance_share, *stage.log_variance)) * z
        # The row of the table: every new register is a sum of the old ones, D and z.
        seen = d.x
        if seen is not x:  # clipping or guidance moved it; the inverse of a sampler begins with the images themselves
            seen = jnp.where(inputs.from_images & (stage.index == 0), x, seen)
        columns = (seen, *registers[1:], d.x0, z)
        rows = [sum(w * c for w, c in zip(row, columns, strict=True)) for row in stage.update]
        return (tuple(rows), d.memory, d.aux, path), (x, d.x0) if return_trajectory else None

    x = jnp.asarray(inputs.start_std, dtype) * fresh(0) if inputs.x_init is None else inputs.x_init
    empty = jnp.zeros_like(x)
    shares = inputs.start_shares
    others = [empty] * (stages.update.shape[1] - 1) if shares is None else [share * x for share in shares.astype(dtype)]
    memory = None if inputs.guidance is None else empty
    features = (None, None)
    if inputs.split is not None:  # the first call is whole, so that what its features begin with does not matter
        found = jax.eval_shape(estimate, x, jax.tree.map(lambda leaf: leaf[0], stages), memory, features).aux
        features = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
    path = None
    if inputs.brownian is not None:
        path = inputs.brownian.at(sample_keys, stages.interval[0, 0], inputs.sample_shape)
    (registers, *_), passed = jax.lax.scan(step, ((x, *others), memory, features, path), stages)
    if not return_trajectory:
        return registers[0]
    return registers[0], Trajectory(x=jnp.concatenate([passed[0], registers[0][None]]), x0=passed[1])


def _networks(inputs, whole, features):
    """Returns the network and the guidance of one call; with a cache their networks also return their features."""
    if inputs.split is None:
        return partial(inputs.apply_fn, inputs.params), inputs.guidance
    ours, theirs = features
    network, guidance = partial(cached(inputs.split, whole, ours), inputs.params), inputs.guidance
    if guidance is not None and guidance.reference_fn is not None:
        guidance = guidance.replace(reference_fn=cached(guidance.reference_split, whole, theirs))
    return network, guidance


def _in_precision(stages, dtype):
    """Casts the coefficients; the number of a stage and the network's time keep their precision."""
    kept = {name: getattr(stages, name) for name in ("index", "whole", "interval")}
    bare = stages._replace(reading=None, **dict.fromkeys(kept))
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), bare)
    return cast._replace(reading=stages.reading.astype(dtype), **kept)
