"""Runs a sampler in history form, and computes how its samples change with each number that the sampler depends on.

The derivatives go forward with the samples, stage by stage. A number that first acts in stage i costs nothing before
it, and one that acts in the last row costs no network call at all, as the sample is linear in that row. So the whole
Jacobian of a table of S calls and P numbers costs about P S / 2 products of the network's Jacobian with a vector, and
one compiled function serves every table, as each stage is a call from the host.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from diffusion import keys, predictions
from diffusion.denoiser import Options, denoise
from diffusion.guidance import Guidance, Now
from diffusion.solvers.history import History
from diffusion.types import ApplyFn, Images, Params

DIRECTIONS = 16
"""How many directions go through the network at once; fewer are filled up with zeros."""


@struct.dataclass
class Asked:
    """A network and how it is asked, whatever the sampler: the fields of `diffusion.sample` of these names."""

    params: Params
    guidance: Guidance | None = None
    apply_fn: ApplyFn = struct.field(pytree_node=False, default=None)
    prediction: str = struct.field(pytree_node=False, default="eps")
    options: Options = struct.field(pytree_node=False, default=Options())


class Noises(NamedTuple):
    """What the samples are made from.

    Attributes:
      x: standard normal noise [B, *shape]; samples start from it times sqrt(a^2 + n^2) at the start of the grid.
      cond: a pytree with a leading axis B, or None.
      null: the condition that means "none", shaped as cond; None without guidance.
    """

    x: Images
    cond: Any = None
    null: Any = None


class _Stage(NamedTuple):
    """One network call: (t, signal, noise), and what guidance asks for in it."""

    level: Float[Array, "3"]
    scale: Float[Array, ""]
    inside: Float[Array, ""]
    index: Float[Array, ""]


class _State(NamedTuple):
    """What a network call reads: x, and what a guidance rule keeps between the calls."""

    x: Images
    memory: Images | None


def draw(key: jax.Array, ids: range, shape: tuple[int, ...]) -> Images:
    """Draws standard normal noise [len(ids), *shape]; that of a number i depends on the key and i only."""
    return _draw(keys.threefry(key), jnp.arange(ids.start, ids.stop), shape)


@partial(jax.jit, static_argnums=2)
@keys.pinned
def _draw(key, ids, shape):
    return jax.vmap(lambda i: keys.normal(jax.random.fold_in(key, i), shape))(ids)


def run(asked: Asked, history: History, noises: Noises) -> Images:
    """Returns the samples [B, *shape] of a sampler, as `diffusion.sample` does with its table."""
    return path(asked, history, noises)[0][-1]


def path(asked: Asked, history: History, noises: Noises) -> tuple[list[Images], Float[Array, "stages B *shape"]]:
    """Returns x before each network call and at the end, and the estimates D, as a trajectory of `diffusion.sample`."""
    stages, state = _stages(asked, history), _begin(asked, history, noises)
    estimates = jnp.zeros((len(stages), *state.x.shape), state.x.dtype)
    passed = [state.x]
    for i, stage in enumerate(stages):
        called = _call(asked, state, noises, stage)
        estimates = _keep(estimates, called.estimate, i)
        x = _row(called.seen, estimates, *_floats(history.keep[i], history.weights[i]))
        state = _State(x, called.memory)
        passed.append(x)
    return passed, estimates


def run_with_jacobian(
    asked: Asked, history: History, derivative: History, noises: Noises
) -> tuple[Images, Float[Array, "P B *shape"]]:
    """Returns the samples, and their derivatives by the P numbers that the sampler depends on.

    Args:
      asked: the network.
      history: the sampler.
      derivative: of its arrays by each number, with a first axis of length P.
      noises: what the samples are made from.
    """
    count, stages = len(derivative.t), _stages(asked, history)
    state = _begin(asked, history, noises)
    moves = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), state)
    # Where signal and noise do not add up to 1, as in a rectified flow, the start moves with the grid.
    start_moves = _start_moves(history, derivative)
    moves = moves._replace(x=jnp.multiply.outer(*_floats(start_moves, noises.x)))
    estimates = jnp.zeros((len(stages), *state.x.shape), state.x.dtype)
    estimate_moves = jnp.zeros((len(stages), count, *state.x.shape), state.x.dtype)
    moving = start_moves != 0
    for i, stage in enumerate(stages):
        # Only the directions that move x or the level by now go through the network.
        levels = np.stack([derivative.t[:, i], derivative.signal[:, i], derivative.noise[:, i]], axis=-1)
        moving = moving | np.any(levels, axis=1)
        called, moved = _call_along(asked, state, noises, stage, moves, levels, moving)
        estimates, estimate_moves = _keep(estimates, called.estimate, i), _keep(estimate_moves, moved.estimate, i)
        # The next x moves with the row of the sampler, with x and with the estimates so far.
        row = _floats(history.keep[i], history.weights[i], derivative.keep[:, i], derivative.weights[:, i])
        x = _row(called.seen, estimates, *row[:2])
        x_move = _row_along(called.seen, estimates, moved.seen, estimate_moves, *row)
        state, moves = _State(x, called.memory), _State(x_move, moved.memory)
        moving = moving | np.any(derivative.weights[:, i], axis=1) | (derivative.keep[:, i] != 0)
    return state.x, moves.x


def _stages(asked, history):
    """Returns what each network call is told."""
    t = np.asarray(history.t, np.float64)
    scales, inside = (np.ones(t.shape),) * 2 if asked.guidance is None else asked.guidance.scales(t)
    levels = np.stack([t, history.signal, history.noise], axis=-1)
    columns = (*_floats(levels, scales, inside), np.arange(len(t)))
    return [_Stage(*(column[i] for column in columns)) for i in range(len(t))]


def _floats(*arrays):
    """Returns the arrays in the precision of the samples."""
    return tuple(np.asarray(array, jnp.result_type(float)) for array in arrays)


def _begin(asked, history, noises):
    (scale,) = _floats(np.hypot(history.signal[0], history.noise[0]))
    x = scale * jnp.asarray(noises.x)
    return _State(x, None if asked.guidance is None else jnp.zeros_like(x))


def _start_moves(history, derivative):
    """Returns the derivative of the standard deviation at the start by each number."""
    signal, noise = history.signal[0], history.noise[0]
    moves = (signal * derivative.signal[:, 0] + noise * derivative.noise[:, 0]) / np.hypot(signal, noise)
    return np.where(np.abs(moves) > 1e-8, moves, 0.0)  # below is only the rounding of differences


class _Called(NamedTuple):
    """What a network call gives: the estimate D, the x that the solver goes on with, and the rule's memory."""

    estimate: Images
    seen: Images
    memory: Images | None


def _ask(asked, noises, stage, state, level):
    """Asks the network once; a function of the state and the level (t, signal, noise)."""
    reading = predictions.reading(asked.prediction, *level)
    now = None
    if asked.guidance is not None:
        shared = asked.guidance.replace(scale=None, interval=None)
        shared = shared.replace(null=noises.null) if shared.reference_fn is None else shared
        now = Now(shared, stage.scale, stage.inside, stage.index, state.memory)
    network = partial(asked.apply_fn, asked.params)
    d = denoise(network, state.x, noises.cond, reading, asked.options, now)
    return _Called(d.x0, d.x, d.memory)


@jax.jit
def _call(asked, state, noises, stage):
    return _ask(asked, noises._replace(x=None), stage, state, stage.level)


def _call_along(asked, state, noises, stage, moves, levels, active):
    """Asks the network once, and along those directions that are active; the answer does not move along the others."""
    chosen = np.flatnonzero(active)
    called, moved = None, None
    for begin in range(0, max(len(chosen), 1), DIRECTIONS):
        part = chosen[begin : begin + DIRECTIONS]
        index = np.pad(part, (0, DIRECTIONS - len(part)))
        called, along = _call_part(asked, state, noises, stage, moves, *_floats(levels[index]), index)
        if moved is None:
            moved = jax.tree.map(lambda leaf: jnp.zeros((len(active), *leaf.shape[1:])), along)
        if len(part):
            moved = _scatter(moved, along, np.pad(part, (0, DIRECTIONS - len(part)), constant_values=len(active)))
    return called, moved


@jax.jit
def _call_part(asked, state, noises, stage, moves, levels, index):
    noises = noises._replace(x=None)
    called, along = jax.linearize(partial(_ask, asked, noises, stage), state, stage.level)
    return called, jax.vmap(along)(jax.tree.map(lambda leaf: leaf[index], moves), levels)


@jax.jit
def _scatter(moved, along, places):
    """Puts the derivatives of a part of the directions in their places; a place beyond the end is dropped."""
    return jax.tree.map(lambda all_of, part: all_of.at[places].set(part, mode="drop"), moved, along)


@jax.jit
def _keep(kept, new, i):
    """Writes the estimate of stage i beside the others, along the first axis."""
    return kept.at[i].set(new)


@jax.jit
def _row(seen, estimates, keep, weights):
    return keep * seen + jnp.tensordot(weights, estimates, axes=1)


@jax.jit
def _row_along(seen, estimates, seen_moves, estimate_moves, keep, weights, keep_moves, weight_moves):
    by_row = jnp.tensordot(weight_moves, estimates, axes=1) + jnp.multiply.outer(keep_moves, seen)
    return by_row + keep * seen_moves + jnp.tensordot(weights, estimate_moves, axes=1)
