"""Makes ideal denoisers E[x_0 | x_t] of known data, which stand in for a network.

The data lies in params, so that a jitted function does not hold it as a constant, and another data set or schedule of
the same shapes compiles nothing new.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from diffusion import predictions
from diffusion.errors import InputError, is_whole, require_range
from diffusion.images import to_floats
from diffusion.schedules import NoiseSchedule
from diffusion.types import ApplyFn, Params

_SMALLEST_NOISE_VAR = 1e-20
"""The least noise variance that `ideal` divides by.

There the estimate is the nearest image, and squared distances divided by it are still finite in float32.
"""


class Testbed(NamedTuple):
    """Stands in for a trained network.

    Attributes:
      apply_fn: takes x [B, *shape] and real t [B] in 0..T, works in x's precision, and ignores cond.
      params: the data distribution and the schedule.
    """

    __test__ = False  # pytest would take it for a test by its name

    apply_fn: ApplyFn
    params: Params


def gaussian(schedule: NoiseSchedule, mean, variance, prediction: str = "eps") -> Testbed:
    """Returns the denoiser of independent Gaussian pixels: E[x_0 | x] = mean + a v / (a^2 v + n^2) (x - a mean).

    Args:
      schedule: the noise schedule.
      mean: a number, or an array that broadcasts to one sample.
      variance: likewise, at least 0, in squared pixel units.
      prediction: a key of `diffusion.predictions.PREDICTIONS`.

    Raises:
      InputError: an unknown prediction or a negative variance.
    """
    mean, variance = moments(mean, variance)
    params = {"levels": _levels(schedule), "mean": mean, "variance": variance}
    return Testbed(_network(_gaussian, prediction), params)


def mixture(schedule: NoiseSchedule, weights, means, variances, prediction: str = "eps") -> Testbed:
    """Returns the denoiser of a mixture of Gaussians, each with independent pixels.

    Args:
      schedule: the noise schedule.
      weights: [K], above 0; how likely each component is, once divided by their sum.
      means: [K, *shape] for samples of shape *shape.
      variances: [K], or an array that broadcasts to means; above 0.
      prediction: a key of `diffusion.predictions.PREDICTIONS`.

    Raises:
      InputError: an unknown prediction, weights or variances that are not positive, or shapes that do not agree.
    """
    weights, means, variances = (np.asarray(v, np.float64) for v in (weights, means, variances))
    if weights.ndim != 1 or not np.all(weights > 0) or means.shape[:1] != weights.shape:
        raise InputError(f"weights {weights.shape} and means {means.shape}: give K positive weights and [K, ...] means")
    if variances.ndim == 1:
        variances = variances.reshape(-1, *[1] * (means.ndim - 1))
    mean, variance = moments(means, variances)
    if not np.all(variance > 0):
        raise InputError("a component of the mixture has variance 0; use `ideal` for points")
    log_weights = np.log(weights / weights.sum())
    params = {"levels": _levels(schedule), "log_weights": log_weights, "means": mean, "variances": variance}
    return Testbed(_network(_mixture, prediction), params)


def ideal(
    schedule: NoiseSchedule,
    images: UInt8[np.ndarray, "N *shape"] | Float[np.ndarray, "N *shape"],
    prediction: str = "eps",
    bandwidth: float = 0.0,
    block: int = 1024,
) -> Testbed:
    """Returns the denoiser of a finite set of images: E[x_0 | x] = sum_i softmax_i(-|x - a x_i|^2 / (2 n^2)) x_i.

    It is what a network of unlimited capacity would learn from the set, and its samples are the images themselves. The
    set is read block by block with a running softmax, so a call needs memory for the images, one block as floats and
    an array [B, block]. Towards t = 0 the estimate becomes the nearest image. In float32 the exponents are right to
    about 1e-4 / n^2, which matters only between images so much alike that this does not tell them apart.

    Args:
      schedule: the noise schedule.
      images: uint8, or floats in [-1, 1]; kept in their dtype.
      prediction: a key of `diffusion.predictions.PREDICTIONS`.
      bandwidth: std of a Gaussian around each image, in pixel units; above 0 the data is their mixture, a smooth
        density, and samples need not be images of the set.
      block: images at a time; affects only memory and speed.

    Raises:
      InputError: no images, another dtype, values outside [-1, 1], an unknown prediction, a bandwidth below 0, or a
        block below 1.
    """
    # Refuse what cannot work.
    images = np.asarray(images)
    if images.ndim < 2 or len(images) == 0:
        raise InputError(f"images have shape {images.shape}; give [N, ...] with at least one image")
    if not is_whole(block) or block < 1:
        raise InputError(f"block is {block}; it must be a whole number of at least 1")
    floats = np.issubdtype(images.dtype, np.floating) and np.all(np.abs(images) <= 1 + 1e-6)
    if not floats and images.dtype != np.uint8:
        span = f", from {images.min():g} to {images.max():g}" if np.issubdtype(images.dtype, np.number) else ""
        raise InputError(f"images have type {images.dtype}{span}; give uint8, or floats in [-1, 1]")
    require_range("bandwidth", bandwidth, 0)
    # Lay the images out in blocks; those that fill up the last block get weight 0.
    block = min(int(block), len(images))
    count = -(-len(images) // block)
    padded = np.resize(images.reshape(len(images), -1), (count * block, images[0].size))
    log_weights = np.where(np.arange(count * block) < len(images), 0.0, -np.inf).reshape(count, block)
    params = {
        "levels": _levels(schedule),
        "log_weights": log_weights,
        "images": padded.reshape(count, block, -1),
        "variance": np.float64(bandwidth) ** 2,
    }
    return Testbed(_network(_ideal, prediction), params)


def from_denoiser(schedule: NoiseSchedule, denoiser: Callable, prediction: str = "eps") -> Testbed:
    """Returns the testbed of any denoiser (x, signal, noise) -> x_0; signal and noise are [B, 1, ...].

    Raises:
      InputError: an unknown prediction.
    """

    def estimate(params, x, a, n):
        return _with_eps(x, denoiser(x, a, n), a, n)

    # Goes around the cache, which would keep every closure forever.
    return Testbed(_network.__wrapped__(estimate, prediction), {"levels": _levels(schedule)})


def moments(mean, variance) -> tuple[np.ndarray, np.ndarray]:
    """Returns both in float64; raises InputError if one is not finite or a variance is negative."""
    mean, variance = (np.asarray(v, np.float64) for v in (mean, variance))
    if not np.all(np.isfinite(mean)) or not np.all(variance >= 0) or not np.all(np.isfinite(variance)):
        raise InputError("mean and variance must be finite, and the variance at least 0")
    return mean, variance


def _levels(schedule):
    """Returns what `_level_at` interpolates: log(alpha_bar), exact near t = 0 in float32, or signal and noise."""
    if schedule.variance_preserving:
        with np.errstate(divide="ignore"):
            return {"log_alpha_bar": np.log(schedule.alpha_bar)}
    return {"signal": np.sqrt(schedule.alpha_bar), "noise": np.sqrt(schedule.noise_var)}


def _level_at(levels, t, x):
    """Returns signal and noise at real times t [B], as `NoiseSchedule.at` does, in x's dtype and to broadcast to x."""
    t = jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32))
    last = next(iter(levels.values())).shape[0] - 1
    lower = jnp.clip(jnp.floor(t).astype(int), 0, last - 1)
    weight = t - lower  # of the upper end

    def ends(values):
        values = jnp.asarray(values, t.dtype)
        return values[lower], values[lower + 1]

    if "signal" in levels:
        a, n = ((1 - weight) * low + weight * high for low, high in (ends(levels["signal"]), ends(levels["noise"])))
    else:
        low, high = ends(levels["log_alpha_bar"])
        finite = jnp.isfinite(high)
        log_power = low + weight * (jnp.where(finite, high, low) - low)
        # In an interval that ends at zero signal, where the log is infinite, alpha_bar itself is linear.
        power = jnp.where(finite, jnp.exp(log_power), (1 - weight) * jnp.exp(low))
        a, n = jnp.sqrt(power), jnp.sqrt(jnp.where(finite, -jnp.expm1(log_power), 1 - power))
    return tuple(v.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for v in (a, n))


def _level_of_ratio(levels, log_ratio, x):
    """Returns signal and noise where log(n / a) has the given values [B], for networks that take that as their time."""
    log_ratio = jnp.asarray(log_ratio, jnp.promote_types(x.dtype, jnp.float32))
    if "signal" not in levels:
        a, n = jnp.sqrt(jax.nn.sigmoid(-2 * log_ratio)), jnp.sqrt(jax.nn.sigmoid(2 * log_ratio))
    else:
        signal, noise = (jnp.asarray(levels[name], log_ratio.dtype) for name in ("signal", "noise"))
        ratio = jnp.exp(log_ratio)
        lower = jnp.clip(jnp.searchsorted(noise / signal, ratio, side="right") - 1, 0, signal.size - 2)
        d_signal, d_noise = signal[lower + 1] - signal[lower], noise[lower + 1] - noise[lower]
        weight = (ratio * signal[lower] - noise[lower]) / (d_noise - ratio * d_signal)
        a, n = signal[lower] + weight * d_signal, noise[lower] + weight * d_noise
    return tuple(v.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for v in (a, n))


@cache
def _network(estimate, prediction):
    """Returns the apply_fn of estimate(params, x, a, n) -> (x_0, eps), the same object for the same arguments."""
    predictions.check_known(prediction)
    kind = predictions.PREDICTIONS[prediction]
    if kind.sees_end:
        raise InputError(f"a testbed is a denoiser, and {prediction} says where a step ends; take another prediction")

    def apply_fn(params, x, t, cond=None):
        a, n = _level_of_ratio(params["levels"], 4 * t, x) if kind.sees_log_sigma else _level_at(params["levels"], t, x)
        # Such a network is given a scaled x; the denoiser needs x itself.
        x = x if kind.input_scale is None else x / kind.input_scale(a, n)
        return predictions.target(prediction, a, n, *estimate(params, x, a, n)).astype(x.dtype)

    return apply_fn


def _with_eps(x, x0, a, n):
    """Returns (x_0, eps) with eps = (x - a x_0) / n, or without noise its mean, 0."""
    return x0, jnp.where(n > 0, (x - a * x0) / jnp.where(n > 0, n, 1), 0)


def _component(x, a, n, mean, variance):
    """Returns (x_0, eps, x - a mean, variance of x) of a Gaussian; nothing cancels at small n."""
    total = a**2 * variance + n**2
    total = jnp.where(total > 0, total, 1)
    rest = x - a * mean
    return mean + a * variance / total * rest, n / total * rest, rest, total


def _gaussian(params, x, a, n):
    mean, variance = (_beside(params[name], x) for name in ("mean", "variance"))
    return _component(x, a, n, mean, variance)[:2]


def _mixture(params, x, a, n):
    # What each component alone would estimate, [B, K, *shape].
    x, a, n = x[:, None], a[:, None], n[:, None]
    means = _beside(params["means"], x)
    variances = _beside(params["variances"], x)
    x0, eps, rest, total = _component(x, a, n, means, variances)
    # Weigh the components by how likely each is to have made x.
    pixels = tuple(range(2, x.ndim))
    distance = jnp.sum(rest**2 / total + jnp.log(total), axis=pixels, keepdims=True)
    log_weights = jnp.asarray(params["log_weights"], x.dtype).reshape(1, -1, *[1] * len(pixels))
    shares = jax.nn.softmax(log_weights - distance / 2, axis=1)
    return jnp.sum(shares * x0, axis=1), jnp.sum(shares * eps, axis=1)


def _beside(values, x):
    """Returns values in x's dtype, with axes of length 1 in front up to x's rank."""
    values = jnp.asarray(values, x.dtype)
    return values.reshape((1,) * (x.ndim - values.ndim) + values.shape)


def _ideal(params, x, a, n):
    flat, a_row, n_row = (v.reshape(v.shape[0], -1) for v in (x, a, n))
    around = jnp.asarray(params["variance"], x.dtype)
    noise_var = jnp.maximum(a_row**2 * around + n_row**2, _SMALLEST_NOISE_VAR)
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def absorb(carry, block):
        """Adds a block to the running softmax, which keeps the largest exponent so far and sums relative to it."""
        top, total, weighted = carry
        log_weights, images = block
        points = to_floats(images, x.dtype) if images.dtype == jnp.uint8 else images.astype(x.dtype)
        # The exponents, less |x|^2 / 2, which is the same for all images.
        squares = jnp.sum(points**2, axis=1)[None]
        logits = a_row * (product(flat, points.T) - a_row * squares / 2) / noise_var + log_weights.astype(x.dtype)[None]
        new_top = jnp.maximum(top, logits.max(axis=1, keepdims=True))
        shares, kept = jnp.exp(logits - new_top), jnp.exp(top - new_top)
        return (
            new_top,
            kept * total + shares.sum(axis=1, keepdims=True),
            kept * weighted + product(shares, points),
        ), None

    start = (jnp.full_like(noise_var, -jnp.inf), jnp.zeros_like(noise_var), jnp.zeros_like(flat))
    (_, total, weighted), _ = jax.lax.scan(absorb, start, (params["log_weights"], params["images"]))
    # The Gaussians around the images have one variance, so the mean of the images is all they need. Without a bandwidth
    # it is the estimate.
    mean = (weighted / total).reshape(x.shape)
    x0, eps, *_ = _component(x, a, n, mean, around)
    return x0, jnp.where(around > 0, eps, _with_eps(x, mean, a, n)[1])
