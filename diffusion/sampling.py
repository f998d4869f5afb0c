"""The one compiled scan that executes every sampler table."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion.denoiser import PREDICTIONS, Options, Reading, check_options, denoise, log_variance_between
from diffusion.errors import InputError, require_range
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
    signal: Float[Array, ""]
    reading: Reading
    update: Float[Array, "R R+2"]
    log_variance: Float[Array, "2"] | None
    guidance: tuple[Float[Array, ""], Float[Array, ""]] | None  # scale, and whether to guide at all: 1 or 0


def sample(
    apply_fn: ApplyFn,
    params: Params,
    table: SamplerTable,
    key: jax.Array,
    num_samples: int,
    sample_shape: tuple[int, ...],
    *,
    prediction: str = "eps",
    clip: str | bool | None = "none",
    dynamic_threshold: float | None = None,
    cond: Any = None,
    guidance_scale: float = 1.0,
    null_cond: Any = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    guidance_rule: str = "cfg",
    known: tuple[Images, Images] | None = None,
    x_init: Images | None = None,
    sample_ids: Int[Array, "N"] | None = None,
    return_trajectory: bool = False,
) -> Images | tuple[Images, Trajectory]:
    """Draws samples by running a table.

    Sample i depends on (key, sample_ids[i]) and cond[i] alone, never on the batch around it. One compilation serves all
    tables of the same shape: another eta, grid, solver or guidance scale compiles nothing. Pure, and so fit for jit,
    grad and vmap.

    Args:
      apply_fn: the network; hashable, and the same object at every call, or each call compiles again.
      params: its weights.
      table: from a function in `diffusion.solvers`.
      key: a JAX random key.
      num_samples: N.
      sample_shape: the shape of one sample, (H, W, C) for images.
      prediction: what the network was trained to predict: "eps", "x0", "v", "flow" or "edm".
      clip: what to do with an estimate of x_0 outside [-1, 1]. "none" (or None, False) leaves it, "recompute" (or True)
        clips it and lets eps follow from the clipped value, "keep_eps" clips it and keeps the eps predicted.
      dynamic_threshold: clip at this quantile of each sample's own |x_0| instead, where above 1, and scale back to
        [-1, 1] (Imagen, arXiv:2205.11487); 0.995 is usual.
      cond: a pytree given to the network, each leaf with a leading axis N.
      guidance_scale: w of classifier-free guidance, output_null + w (output_cond - output_null) (arXiv:2207.12598; its
        w is ours less 1). Needs null_cond and makes one call of twice the batch. 1 does nothing and costs nothing,
        but for cfg++.
      null_cond: the condition that means "none", shaped as cond; for the UNet here, labels of num_classes.
      guidance_interval: (low, high), guides only where low <= t <= high (arXiv:2404.07724).
      guidance_rescale: 0..1, how far to bring the guided output back to the spread of the conditional one
        (arXiv:2305.08891); 0.7 is usual.
      guidance_rule: "cfg", or "cfg++" (arXiv:2406.08070), which goes on with the eps of the unguided output.
      known: (values, mask), broadcastable to the samples: keeps the pixels where mask is 1 and draws the others to fit
        (inpainting). The estimate of x_0 takes the known values, so x holds them with the noise of every step.
      x_init: the start instead of noise, [N, *sample_shape]; its dtype is the precision of the run.
      sample_ids: int [N], 0..N-1 if not given.
      return_trajectory: also return all intermediate states, which then stay in memory.

    Returns:
      Samples [N, *sample_shape], or (samples, Trajectory).

    Raises:
      InputError: an unknown option, shapes that do not agree, an eps-model where the signal is zero, or guidance
        without conditions.
    """
    clip = {None: "none", False: "none", True: "recompute"}.get(clip, clip)
    guided = not (isinstance(guidance_scale, int | float) and guidance_scale == 1 and guidance_rule == "cfg")
    options = Options(clip, dynamic_threshold, guided, guidance_rule, table.log_variance is not None)
    check_options(prediction, options)
    shape = (num_samples, *sample_shape)
    ids = jnp.arange(num_samples) if sample_ids is None else jnp.asarray(sample_ids)
    if ids.shape != (num_samples,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"sample_ids have shape {ids.shape}, type {ids.dtype}; give {num_samples} whole numbers")
    x_init = _check_start(x_init, shape, table)
    _check_conditions(num_samples, cond, null_cond if guided else None, guided)
    if _is_concrete(guidance_rescale):
        require_range("guidance_rescale", guidance_rescale, 0, 1)
    known = _check_known(known, shape)
    stages = _stages(table, prediction)
    if guided:
        stages = stages._replace(guidance=_guidance(table, guidance_scale, guidance_interval))
    start_std = (table.signal[0] ** 2 + table.noise[0] ** 2) ** 0.5
    inputs = (cond, null_cond if guided else None, 1.0 * guidance_rescale, known, x_init, start_std)
    return _run(apply_fn, params, stages, key, ids, inputs, shape[1:], options, return_trajectory)


def _check_start(x_init, shape, table):
    if x_init is None:
        if _is_concrete(table.tau) and table.tau[0] < table.tau[-1]:
            raise InputError(f"{table.name} goes from images to noise; give the images as x_init")
        return None
    x_init = jnp.asarray(x_init)
    if x_init.shape != shape or not jnp.issubdtype(x_init.dtype, jnp.floating):
        raise InputError(f"x_init has shape {x_init.shape}, type {x_init.dtype}; give real numbers of {shape}")
    return x_init


def _check_conditions(num_samples, cond, null_cond, guided):
    if guided and (cond is None or null_cond is None):
        raise InputError("guidance needs a class-conditional model: give cond and null_cond, or guidance_scale 1")
    if guided and jax.tree.map(jnp.shape, cond) != jax.tree.map(jnp.shape, null_cond):
        raise InputError("cond and null_cond differ in structure or shape; give one null for each condition")
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != (num_samples,):
            raise InputError(
                f"cond has a leaf of shape {jnp.shape(leaf)}; its leading axis must be {num_samples} samples"
            )


def check_prediction(table: SamplerTable, prediction: str) -> None:
    """Raises InputError if the prediction says nothing about x_0 at the table's first time."""
    needs_signal = prediction in ("eps", "edm")
    if needs_signal and _is_concrete(table.signal) and not np.all(np.asarray(table.signal) > 0):
        raise InputError(
            f"{table.name} starts at zero signal, where {prediction} says nothing about x_0; use a v, x0 or flow "
            "model, or start lower"
        )


def check_variance(table: SamplerTable, learned_variance: bool) -> None:
    """Raises InputError if the table takes its variance from a model that predicts none."""
    if table.log_variance is not None and not learned_variance:
        raise InputError(
            f"{table.name} takes its variance from the model, which predicts none; use ddpm:variance=small or large, "
            "or train with config.train.objective=hybrid"
        )


def _stages(table, prediction):
    """The table in the form the scan reads, for one kind of prediction."""
    check_prediction(table, prediction)
    reading = PREDICTIONS[prediction](table.t, table.signal, table.noise)
    return _Stage(np.arange(table.nfe), table.signal, reading, table.update, table.log_variance, None)


def _guidance(table, scale, interval):
    """For each stage the scale and whether it is inside the interval; 1 and 0 outside."""
    if interval is None:
        return scale * np.ones(table.nfe), np.ones(table.nfe)
    low, high = interval
    if not low <= high:
        raise InputError(f"guidance_interval is {interval}; give (low, high) in timesteps")
    inside = 1.0 * ((table.t >= low) & (table.t <= high))
    return 1.0 + inside * (scale - 1.0), inside


def _check_known(known, shape):
    """(values, mask) broadcast to the samples."""
    if known is None:
        return None
    try:
        values, mask = (jnp.broadcast_to(jnp.asarray(part), shape) for part in known)
    except (ValueError, TypeError):
        raise InputError(f"known must be (values, mask), each of a shape that broadcasts to {shape}") from None
    return values, mask


def _is_concrete(array):
    return not isinstance(array, jax.core.Tracer)


@partial(jax.jit, static_argnames=("apply_fn", "shape", "options", "return_trajectory"))
def _run(apply_fn, params, stages, key, ids, inputs, shape, options, return_trajectory):
    cond, null_cond, rescale, known, x_init, start_std = inputs
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    dtype = jnp.result_type(float) if x_init is None else x_init.dtype
    # The network's time keeps its precision: bfloat16 has no 857.
    index, time = stages.index, stages.reading.time
    stages = jax.tree.map(lambda leaf: leaf.astype(dtype), stages)
    stages = stages._replace(index=index, reading=stages.reading._replace(time=time))
    known = jax.tree.map(lambda leaf: leaf.astype(dtype), known)

    def noise(stage_id):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, stage_id), shape, dtype))(keys)

    x = jnp.asarray(start_std, dtype) * noise(0) if x_init is None else x_init
    registers = (x, *[jnp.zeros_like(x)] * (stages.update.shape[1] - 1))

    def step(registers, stage):
        guidance = (*stage.guidance, jnp.asarray(rescale, dtype), null_cond) if options.guided else None
        x = registers[0]
        d = denoise(apply_fn, params, x, cond, stage.reading, stage.signal, options, guidance, known)
        z = noise(stage.index + 1)
        if options.learned_variance:
            z = jnp.exp(0.5 * log_variance_between(d.log_variance_share, *stage.log_variance)) * z
        columns = (d.x, *registers[1:], d.x0, z)
        rows = [sum(w * c for w, c in zip(row, columns, strict=True)) for row in stage.update]
        return tuple(rows), (x, d.x0) if return_trajectory else None

    registers, passed = jax.lax.scan(step, registers, stages)
    if not return_trajectory:
        return registers[0]
    return registers[0], Trajectory(x=jnp.concatenate([passed[0], registers[0][None]]), x0=passed[1])
