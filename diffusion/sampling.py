"""The denoiser and the one compiled scan that executes every sampler table."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion.errors import InputError, nearest
from diffusion.solvers.table import SamplerTable
from diffusion.types import ApplyFn, Images, Params

PREDICTIONS = {
    "eps": lambda a, n: (1 / a, -n / a),
    "x0": lambda a, n: (0 * a, 1 + 0 * a),
    "v": lambda a, n: (a / (a**2 + n**2), -n / (a**2 + n**2)),
}
"""What the network predicts: (signal, noise) -> (p, q) with x_0 = p x_t + q prediction."""

CLIPS = ("none", "recompute", "keep_eps")


class Trajectory(NamedTuple):
    """What a sampling run went through.

    Attributes:
      x: [stages + 1, N, *sample_shape], what the network saw in each stage, and the sample last.
      x0: [stages, N, *sample_shape], the denoised estimates after clipping.
    """

    x: Float[Array, "stages+1 N *shape"]
    x0: Float[Array, "stages N *shape"]


class _Stage(NamedTuple):
    """One row of a table, or all of them, as the scan reads it."""

    index: Int[Array, ""]
    t: Float[Array, ""]
    signal: Float[Array, ""]
    from_x: Float[Array, ""]
    from_output: Float[Array, ""]
    update: Float[Array, "R R+2"]


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
    cond: Any = None,
    x_init: Images | None = None,
    sample_ids: Int[Array, "N"] | None = None,
    return_trajectory: bool = False,
) -> Images | tuple[Images, Trajectory]:
    """Draws samples by running a table.

    Sample i depends on (key, sample_ids[i]) and cond[i] alone, never on the batch around it. One compilation serves all
    tables of the same shape: another eta, grid or solver compiles nothing. Pure, and so fit for jit, grad and vmap.

    Args:
      apply_fn: the network; hashable, and the same object at every call, or each call compiles again.
      params: its weights.
      table: from a function in `diffusion.solvers`.
      key: a JAX random key.
      num_samples: N.
      sample_shape: the shape of one sample, (H, W, C) for images.
      prediction: "eps", "x0" or "v", what the network was trained to predict.
      clip: what to do with an estimate of x_0 outside [-1, 1]. "none" (or None, False) leaves it, "recompute" (or True)
        clips it and lets eps follow from the clipped value, "keep_eps" clips it and keeps the eps predicted.
      cond: a pytree given to the network, each leaf with a leading axis N.
      x_init: the start instead of noise, [N, *sample_shape]; its dtype is the precision of the run.
      sample_ids: int [N], 0..N-1 if not given.
      return_trajectory: also return all intermediate states, which then stay in memory.

    Returns:
      Samples [N, *sample_shape], or (samples, Trajectory).

    Raises:
      InputError: an unknown option, shapes that do not agree, or an eps-model where the signal is zero.
    """
    clip = {None: "none", False: "none", True: "recompute"}.get(clip, clip)
    check_clip(clip)
    ids = jnp.arange(num_samples) if sample_ids is None else jnp.asarray(sample_ids)
    shape = (num_samples, *sample_shape)
    if ids.shape != (num_samples,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"sample_ids have shape {ids.shape}, type {ids.dtype}; give {num_samples} whole numbers")
    if x_init is not None:
        x_init = jnp.asarray(x_init)
        if x_init.shape != shape or not jnp.issubdtype(x_init.dtype, jnp.floating):
            raise InputError(
                f"x_init has shape {x_init.shape}, type {x_init.dtype}; give real numbers of shape {shape}"
            )
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != (num_samples,):
            raise InputError(
                f"cond has a leaf of shape {jnp.shape(leaf)}; its leading axis must be {num_samples} samples"
            )
    stages = _stages(table, prediction)
    return _run(apply_fn, params, stages, key, ids, cond, x_init, tuple(sample_shape), clip, return_trajectory)


def check_clip(clip: str) -> None:
    """Raises InputError unless clip is one of CLIPS."""
    if clip not in CLIPS:
        raise InputError(f"clip is {clip!r}; {nearest(str(clip), CLIPS)}")


def _stages(table, prediction):
    """The table in the form the scan reads, for one kind of prediction."""
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction is {prediction!r}; {nearest(str(prediction), PREDICTIONS)}")
    traced = isinstance(table.signal, jax.core.Tracer)
    if prediction == "eps" and not traced and not np.all(np.asarray(table.signal) > 0):
        raise InputError(
            f"{table.name} starts at zero signal, where eps says nothing about x_0; use a v or x0 model, or start lower"
        )
    from_x, from_output = PREDICTIONS[prediction](table.signal, table.noise)
    return _Stage(np.arange(table.nfe), table.t, table.signal, from_x, from_output, table.update)


@partial(jax.jit, static_argnames=("apply_fn", "shape", "clip", "return_trajectory"))
def _run(apply_fn, params, stages, key, ids, cond, x_init, shape, clip, return_trajectory):
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    dtype = jnp.result_type(float) if x_init is None else x_init.dtype
    # The network's t keeps its precision: bfloat16 has no 857.
    stages = stages._replace(**{f: getattr(stages, f).astype(dtype) for f in stages._fields if f not in ("index", "t")})

    def noise(stage_id):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, stage_id), shape, dtype))(keys)

    x = noise(0) if x_init is None else x_init
    registers = (x, *[jnp.zeros_like(x)] * (stages.update.shape[1] - 1))

    def step(registers, stage):
        x = registers[0]
        output = apply_fn(params, x, jnp.broadcast_to(stage.t, ids.shape), cond)
        if output.shape != x.shape:
            raise InputError(f"the network returned shape {output.shape} for x of shape {x.shape}; they must agree")
        raw = stage.from_x * x + stage.from_output * output.astype(dtype)
        x0 = raw if clip == "none" else jnp.clip(raw, -1, 1)
        # Tables read eps off (x - a x_0) / n. To keep the eps predicted, x must move as x_0 did.
        agreed = x + stage.signal * (x0 - raw) if clip == "keep_eps" else x
        columns = (agreed, *registers[1:], x0, noise(stage.index + 1))
        rows = [sum(w * c for w, c in zip(row, columns, strict=True)) for row in stage.update]
        return tuple(rows), (x, x0) if return_trajectory else None

    registers, passed = jax.lax.scan(step, registers, stages)
    if not return_trajectory:
        return registers[0]
    return registers[0], Trajectory(x=jnp.concatenate([passed[0], registers[0][None]]), x0=passed[1])
