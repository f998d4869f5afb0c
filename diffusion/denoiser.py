"""From a network's output to the denoised estimate D: prediction types, guidance, clipping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.errors import InputError, nearest
from diffusion.types import ApplyFn, Images, Params


class Reading(NamedTuple):
    """How a network is called and read: x_0 = from_x * x + from_output * network(input_scale * x, time).

    Each field is a scalar, or has one entry for each stage of a table.
    """

    from_x: Float[Array, "*stages"]
    from_output: Float[Array, "*stages"]
    input_scale: Float[Array, "*stages"]
    time: Float[Array, "*stages"]


def _edm(t, a, n, sigma_data=0.5):
    """EDM's preconditioning (arXiv:2206.00364, table 1) on x / a, whose noise level is sigma = n / a."""
    sigma = n / a
    total = (sigma**2 + sigma_data**2) ** 0.5
    log = np.log if isinstance(sigma, np.ndarray) else jnp.log
    return Reading(sigma_data**2 / total**2 / a, sigma * sigma_data / total, 1 / (total * a), log(sigma) / 4)


PREDICTIONS: dict[str, Callable[..., Reading]] = {
    "eps": lambda t, a, n: Reading(1 / a, -n / a, 1 + 0 * a, t),
    "x0": lambda t, a, n: Reading(0 * a, 1 + 0 * a, 1 + 0 * a, t),
    "v": lambda t, a, n: Reading(a / (a**2 + n**2), -n / (a**2 + n**2), 1 + 0 * a, t),
    "flow": lambda t, a, n: Reading(1 / (a + n), -n / (a + n), 1 + 0 * a, t),
    "edm": _edm,
}
"""What the network predicts: eps; x_0; v = a eps - n x_0; the velocity eps - x_0; or EDM's F. (t, a, n) -> Reading."""

CLIPS = ("none", "recompute", "keep_eps")
GUIDANCE_RULES = ("cfg", "cfg++")


class Denoised(NamedTuple):
    """One network evaluation.

    Attributes:
      x0: the estimate D, guided, thresholded and with known pixels put in.
      x: what tables must take for x, so that (x - a D) / n is the eps to go on with.
      log_variance_share: the second half of the network's channels if options ask for it, else None.
    """

    x0: Images
    x: Images
    log_variance_share: Images | None


class Options(NamedTuple):
    """Choices that are compiled in; see `diffusion.sample`.

    A network may return twice the channels whatever learned_variance says; without it the second half is left out.
    """

    clip: str = "none"
    dynamic_threshold: float | None = None
    guided: bool = False
    guidance_rule: str = "cfg"
    learned_variance: bool = False


def check_options(prediction: str, options: Options) -> None:
    """Raises InputError for a name or number that is not allowed."""
    for name, value, known in (
        ("prediction", prediction, PREDICTIONS),
        ("clip", options.clip, CLIPS),
        ("guidance_rule", options.guidance_rule, GUIDANCE_RULES),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; {nearest(str(value), known)}")
    if options.dynamic_threshold is not None and not 0 < options.dynamic_threshold <= 1:
        raise InputError(f"dynamic_threshold is {options.dynamic_threshold}; it is a share of the pixels in 0..1")


def denoise(
    apply_fn: ApplyFn,
    params: Params,
    x: Images,
    cond: Any,
    reading: Reading,
    signal: Float[Array, ""],
    options: Options,
    guidance: tuple[Any, Any, Any, Any] | None = None,
    known: tuple[Images, Images] | None = None,
) -> Denoised:
    """Evaluates the network once and reads D off it; one batched call also when guided.

    Args:
      apply_fn, params: the network.
      x: [B, *shape] at one noise level.
      cond: a pytree with leading axis B, or None.
      reading, signal: of this noise level, scalars.
      options: static choices.
      guidance: if options.guided, (scale, inside, rescale, null_cond), scalars but for the last; inside is 0 where this
        noise level is not to be guided, and 1 elsewhere.
      known: (values, mask) of pixels to keep, both broadcastable to x; mask is 1 where known.
    """

    def read(output):
        return reading.from_x * x + reading.from_output * output

    scale, inside, rescale, null_cond = guidance or (None,) * 4
    output, unguided, share = _call(apply_fn, params, x, cond, null_cond, reading, options)
    output_for_eps = output
    if options.guided:
        # CFG++ (arXiv:2406.08070): the guided D, but the eps of the output without condition.
        output_for_eps = output + inside * (unguided - output)
        guided = unguided + scale * (output - unguided)
        # Guidance widens the output; rescale brings its spread back (arXiv:2305.08891, Eq. 15-16).
        ratio = _spread(output) / jnp.maximum(_spread(guided), 1e-12)
        output = guided * (rescale * ratio + (1 - rescale))
    raw = read(output)
    x0 = _threshold(raw, options)
    x_for_eps = x
    if options.guidance_rule == "cfg++" and options.guided:
        x_for_eps = x + signal * (x0 - read(output_for_eps))
    elif options.clip == "keep_eps":
        x_for_eps = x + signal * (x0 - raw)
    if known is not None:
        values, mask = known
        x0 = mask * values + (1 - mask) * x0
        x_for_eps = mask * x + (1 - mask) * x_for_eps
    return Denoised(x0, x_for_eps, share)


def _call(apply_fn, params, x, cond, null_cond, reading, options):
    """(output, output without condition or None, variance channels or None), all in x's dtype."""
    inputs, time = reading.input_scale * x, reading.time
    if options.guided:
        inputs = jnp.concatenate([inputs, inputs])
        cond = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null_cond)
    output = apply_fn(params, inputs, jnp.broadcast_to(time, inputs.shape[:1]), cond)
    output, share = split_variance(output.astype(x.dtype), inputs.shape)
    if options.learned_variance and share is None:
        raise InputError(
            f"this sampler takes its variance from the network, which returned shape {output.shape}, a prediction "
            "alone; use a fixed variance, or a network of twice the channels"
        )
    share = share if options.learned_variance else None
    if not options.guided:
        return output, None, share
    output, unguided = jnp.split(output, 2)
    return output, unguided, None if share is None else jnp.split(share, 2)[0]


def split_variance(output: Images, shape: tuple[int, ...]) -> tuple[Images, Images | None]:
    """A network's output as the prediction and, where it has twice the channels of x, what it says of its variance.

    Args:
      output: [B, ..., C] or [B, ..., 2 C].
      shape: of x, [B, ..., C].

    Raises:
      InputError: any other shape.
    """
    if output.shape == (*shape[:-1], 2 * shape[-1]):
        return tuple(jnp.split(output, 2, axis=-1))
    if output.shape != shape:
        raise InputError(
            f"the network returned shape {output.shape} for x of shape {shape}; expected the same, or twice the "
            "channels where it predicts its variance"
        )
    return output, None


def log_variance_between(share, log_small, log_large):
    """Log-variance of a step from a network's share of -1 to 1: f log beta + (1 - f) log beta_tilde, f = (share + 1)/2.

    Improved DDPM (arXiv:2102.09672), Eq. 15. Shares beyond the ends extrapolate, as in the paper.
    """
    f = (share + 1) / 2
    return f * log_large + (1 - f) * log_small


def _threshold(x0, options):
    if options.dynamic_threshold is not None:
        # Imagen (arXiv:2205.11487, section 2.3): clip at a quantile of the sample's own pixels, scale back to [-1, 1].
        pixels = jnp.abs(x0).reshape(x0.shape[0], -1)
        limit = jnp.maximum(jnp.quantile(pixels, options.dynamic_threshold, axis=-1), 1.0)
        limit = limit.reshape(-1, *[1] * (x0.ndim - 1))
        return jnp.clip(x0, -limit, limit) / limit
    return x0 if options.clip == "none" else jnp.clip(x0, -1, 1)


def _spread(x):
    return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
