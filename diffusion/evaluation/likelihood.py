"""Measures the likelihood under the probability flow, which is exact for the deterministic sampler, and no bound.

In s = log(n / a) and z = x / sqrt(a^2 + n^2) the probability flow is

    dz / ds = z / (1 + r^2) - D / sqrt(1 + r^2),      r = n / a = e^s,

bounded and smooth at both ends, whatever the schedule. The log-density falls along it by the divergence (Song et al.,
arXiv:2011.13456, Eq. 39), here d / (1 + r^2) - tr dD/d(x/a).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion import keys, predictions
from diffusion.data import Dataset
from diffusion.denoiser import denoise
from diffusion.errors import InputError, is_whole, nearest
from diffusion.evaluation.bound import in_batches
from diffusion.images import HALF_BIN, check_floats, to_floats
from diffusion.model import Trained
from diffusion.schedules import NoiseSchedule
from diffusion.types import ApplyFn, Images, Params

TRACES = ("exact", "rademacher", "gaussian")


class FlowLikelihood(NamedTuple):
    """Holds an entry for each sample; the mean of `bits` over a set has the standard error std / sqrt(N).

    Attributes:
      log_density: of x_0 as a point of the continuous space of pixels in [-1, 1], in nats.
      bits: -log2 of this density per dimension, or if dequantized of the probability of the 8-bit image, whose bins are
        2/255 wide.
    """

    log_density: Float[Array, "B"]
    bits: Float[Array, "B"]


def log_likelihood(  # noqa: PLR0913
    apply_fn: ApplyFn,
    params: Params,
    schedule: NoiseSchedule,
    x_0: Images,
    key: jax.Array | None = None,
    *,
    prediction: str = "eps",
    trace: str = "exact",
    probes: int = 1,
    steps: int = 100,
    t_min: float = 1.0,
    dequantize: bool = False,
    cond: Any = None,
    sample_ids: Int[Array, "B"] | None = None,
) -> FlowLikelihood:
    """Returns the density of x_0 under the probability flow, from noise of the std that `diffusion.sample` starts with.

    To be exact, it is the density of x_0 + (n / a)(t_min) eps. The flow is solved from t_min to T in equal steps of s
    by the classical Runge-Kutta method, with 4 network calls a step and an error of order steps^-4. With an exact
    denoiser, pixels of std 0.1 or more and 100 steps the error is below 1e-4 bits per dimension for every sample
    (tested, float64); check a network with twice the steps. t_min matters where n / a is not small against the finest
    detail v^(1/2) of the data: for Gaussian pixels it changes -log2 p by (1 - x^2 / v) (n / a)^2 / (2 v ln 2) to first
    order, which has mean 0.

    Args:
      apply_fn: the network; the same object at every call, or each call compiles again.
      params: its parameters.
      schedule: the noise schedule.
      x_0: floats [B, *shape] in pixel units; uint8 if dequantize. The arithmetic has the dtype of floats.
      key: a JAX random key; needed unless the trace is exact and nothing is dequantized. Sample i draws only
        from (key, sample_ids[i]).
      prediction: what the network predicts, as for `diffusion.sample`.
      trace: "exact" takes d derivatives along the axes at each call, for small d; "rademacher" and "gaussian" are the
        probes of Hutchinson's unbiased estimate, the same ones along the whole way (FFJORD, arXiv:1810.01367).
      probes: how many each sample has. Each adds one derivative a call; more of them make the estimate less noisy.
      steps: at least 1.
      t_min: real, in (0, T); a network trained on t >= 1 knows nothing below 1.
      dequantize: take uint8 images and spread each uniformly over its bin, v / 127.5 - 1 +- 1/255. The mean of bits is
        then an upper bound of -log2 of the probability of the 8-bit image (Theis et al., arXiv:1511.01844).
      cond: a pytree given to the network, or None.
      sample_ids: int [B], 0..B-1 if not given.

    Raises:
      InputError: an unknown option, images of the wrong type, a missing key, or zero signal at T.
    """
    predictions.check_known(prediction)
    _check(schedule, trace, probes, steps, t_min)
    if key is None and (dequantize or trace != "exact"):
        raise InputError(f"trace {trace!r} with dequantize={dequantize} draws random numbers; give a key")
    x_0 = _check_images(x_0, dequantize)
    ids = jnp.arange(len(x_0)) if sample_ids is None else jnp.asarray(sample_ids)
    of_samples = None if key is None else jax.vmap(partial(jax.random.fold_in, keys.threefry(key)))(ids)
    if dequantize:
        x_0 = _spread_over_bins(x_0, of_samples)
    levels, ratio, length = _way(schedule, prediction, steps, t_min)
    draws = None if trace == "exact" else _probes(of_samples, trace, int(probes), x_0)
    log_density = _log_density(apply_fn, params, x_0, levels, ratio, length, draws, cond)
    bits = -log_density / (x_0[0].size * np.log(2))
    return FlowLikelihood(log_density, bits - np.log2(2 * HALF_BIN) if dequantize else bits)


class FlowRow(NamedTuple):
    """Holds the likelihood of a data set under the flow, solved in some number of steps.

    Attributes:
      steps: how many of Runge-Kutta's method, with four network calls each.
      bits: mean of -log2 p per dimension of the dequantized images, an upper bound for the 8-bit images.
      standard_error: of this mean over the images; the noise of the trace and of the dequantization is part of it.
    """

    steps: int
    bits: float
    standard_error: float


def bits_table(
    trained: Trained, data: Dataset, key: jax.Array, *, steps: Sequence[int] = (25, 50), batch_size: int = 256
) -> list[FlowRow]:
    """Returns the likelihood of a data set under a trained model's flow, by Hutchinson's trace with one probe a sample.

    Args:
      trained: the model and its parameters.
      data: images; their labels condition a model with classes.
      key: a JAX random key; all rows share the noise of a sample.
      steps: numbers of steps; a row for each.
      batch_size: images at a time; affects only memory.

    Raises:
      InputError: as `log_likelihood`, before anything is computed.
    """
    model, rows = trained.model, []
    check_steps(model.schedule, steps)
    for num_steps in steps:
        options = {"prediction": model.prediction, "trace": "rademacher", "steps": num_steps, "dequantize": True}

        def measure(params, key, images, cond, ids, options=options):
            return log_likelihood(
                model.apply_fn, params, model.schedule, images, key, cond=cond, sample_ids=ids, **options
            )

        bits = in_batches(measure, trained, key, data, batch_size).bits
        error = bits.std(ddof=1) / len(bits) ** 0.5 if len(bits) > 1 else float("nan")
        rows.append(FlowRow(num_steps, float(bits.mean()), float(error)))
    return rows


def check_steps(schedule: NoiseSchedule, steps: Sequence[int]) -> None:
    """Raises InputError if a schedule has no flow in one of these numbers of steps, before the first is computed."""
    for num_steps in steps:
        _check(schedule, "rademacher", 1, num_steps, 1.0)


def _check(schedule, trace, probes, steps, t_min):
    """Raises InputError for an option that is not allowed."""
    if trace not in TRACES:
        raise InputError(f"trace is {trace!r}; {nearest(str(trace), TRACES)}")
    for name, value in (("probes", probes), ("steps", steps)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is {value}; it must be a whole number of at least 1")
    if not 0 < t_min < schedule.num_timesteps:
        raise InputError(f"t_min is {t_min}; it must lie between 0 and {schedule.num_timesteps}, ends excluded")
    if schedule.alpha_bar[-1] == 0:
        raise InputError("the signal is zero at T, where n / a is not finite; use a schedule that keeps some")


def _check_images(x_0, dequantize):
    """Returns x_0 as an array; raises InputError if it has the wrong type."""
    x_0 = jnp.asarray(x_0)
    if dequantize and x_0.dtype != jnp.uint8:
        raise InputError(f"x_0 has type {x_0.dtype}; dequantize takes uint8 images")
    if not dequantize and not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise InputError(f"x_0 has type {x_0.dtype}; give floats, or 8-bit images with dequantize=True")
    if not dequantize:
        check_floats("x_0", x_0)
    return x_0


@keys.pinned
def _spread_over_bins(x_0, of_samples):
    """Returns uint8 images as floats, each pixel at a uniformly random place in its bin."""
    dtype = jnp.result_type(float)
    shift = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0), x_0.shape[1:], dtype, -1, 1))(of_samples)
    return to_floats(x_0, dtype) + HALF_BIN * shift


@keys.pinned
def _probes(of_samples, trace, probes, x_0):
    """Returns random vectors [probes, B, *shape] with mean 0 and identity covariance."""
    draw = jax.random.rademacher if trace == "rademacher" else keys.normal

    def of_sample(key):
        # 0 is taken: it places the pixels in their bins.
        return jax.vmap(lambda i: draw(jax.random.fold_in(key, i), x_0.shape[1:], x_0.dtype))(1 + jnp.arange(probes))

    return jax.vmap(of_sample, out_axes=1)(of_samples)


def _way(schedule, prediction, steps, t_min):
    """Returns the noise levels of all steps, n / a at t_min, and the length of a step in s; float64."""
    s = np.linspace(-schedule.half_log_snr(t_min), -schedule.half_log_snr(schedule.num_timesteps), 2 * int(steps) + 1)
    t = schedule.time_of(-s)
    t[0], t[-1] = t_min, schedule.num_timesteps  # rounding must not pass the ends
    points = 2 * np.arange(int(steps))[:, None] + np.arange(3)
    t = t[points]
    signal, noise = schedule.at(t)
    # Each step has three noise levels, for its start, middle and end.
    return predictions.reading(prediction, t, signal, noise), np.exp(s[0]), (s[-1] - s[0]) / steps


@partial(jax.jit, static_argnames="apply_fn")
@keys.pinned
def _log_density(apply_fn, params, x_0, levels, ratio, length, probes, cond):
    """Returns log p(x_0) in nats, [B]."""
    levels, network = levels.astype(x_0.dtype), partial(apply_fn, params)
    spread, length = jnp.sqrt(1 + jnp.asarray(ratio, x_0.dtype) ** 2), jnp.asarray(length, x_0.dtype)

    def step(state, of_step):
        start, middle, end = (jax.tree.map(lambda leaf, i=i: leaf[i], of_step) for i in range(3))
        slope = partial(_slope, network, cond=cond, probes=probes)

        def moved(by, amount):
            return jax.tree.map(lambda value, change: value + amount * length * change, state, by)

        k1 = slope(state, start)
        k2 = slope(moved(k1, 0.5), middle)
        k3 = slope(moved(k2, 0.5), middle)
        k4 = slope(moved(k3, 1.0), end)
        # The weights of the classical Runge-Kutta method.
        total = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return moved(total, 1.0), None

    state = (x_0 / spread, jnp.zeros(len(x_0), x_0.dtype))
    (z, divergence), _ = jax.lax.scan(step, state, levels)
    # z ends as standard normal noise; its density there, along the way, and from z back to x_0.
    size = z[0].size
    log_prior = -0.5 * jnp.sum(z**2, axis=tuple(range(1, z.ndim))) - 0.5 * size * np.log(2 * np.pi)
    return log_prior + divergence - size * jnp.log(spread)


def _slope(network, state, level, cond, probes):
    """Returns d(z, integral of the divergence) / ds."""
    z = state[0]
    scale = jnp.sqrt(level.signal**2 + level.noise**2)
    # This is the formula's 1 / sqrt(1 + r^2).
    share = level.signal / scale

    def estimate(z):
        return denoise(network, scale * z, cond, level).x0

    x0, derivative = jax.linearize(estimate, z)
    trace = _exact_trace(derivative, z) if probes is None else _hutchinson(derivative, probes)
    return share**2 * z - share * x0, share**2 * z[0].size - share * trace


def _exact_trace(derivative, z):
    """Returns the trace of the Jacobian of each sample, [B], one axis after the other for all samples at once."""

    def diagonal(index):
        axis = jnp.zeros(z[0].size, z.dtype).at[index].set(1).reshape(1, *z.shape[1:])
        along = jnp.broadcast_to(axis, z.shape)
        return jnp.sum(axis * derivative(along), axis=tuple(range(1, z.ndim)))

    return jax.lax.map(diagonal, jnp.arange(z[0].size)).sum(axis=0)


def _hutchinson(derivative, probes):
    """Returns Hutchinson's estimate of that trace, the mean over the probes v of v . J v, [B]."""

    def one(probe):
        return jnp.sum(probe * derivative(probe), axis=tuple(range(1, probe.ndim)))

    return jax.lax.map(one, probes).mean(axis=0)
