"""From a network's output to the denoised estimate D: reading, guidance, clipping, known pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.around import Steering
from diffusion.errors import InputError, nearest
from diffusion.guidance import Now, Pair, guide
from diffusion.predictions import Reading, check_known, sees_end
from diffusion.types import Images

CLIPS = ("none", "recompute", "keep_eps")

Network = Callable[[Images, Float[Array, "B"], Any], Images]
"""(x, time, cond) -> output: an `ApplyFn` with its parameters bound."""


class Denoised(NamedTuple):
    """One network evaluation.

    Attributes:
      x0: the estimate D, guided, thresholded and with known pixels put in.
      x: what the solver must take for x, so that (x - a D) / n is the eps to go on with.
      log_variance_share: the second half of the network's channels if options ask for it, else None.
      memory: what the guidance rule keeps for the next evaluation, or None without guidance.
      aux: what the network and the second network returned beside their predictions, see `Options`.
    """

    x0: Images
    x: Images
    log_variance_share: Images | None
    memory: Images | None
    aux: tuple[Any, Any] = (None, None)


class Options(NamedTuple):
    """Choices that are compiled in; see `diffusion.sample`.

    A network may return twice the channels whatever learned_variance says; without it the second half is left out. With
    has_aux every network returns (prediction, aux), as for `jax.grad`, and aux is passed on.
    """

    clip: str = "none"
    dynamic_threshold: float | None = None
    learned_variance: bool = False
    has_aux: bool = False


PLAIN = Options()
"""The estimate as the network gives it."""


def check_options(prediction: str, options: Options) -> None:
    """Raises InputError for a name or number that is not allowed."""
    check_known(prediction)
    if options.clip not in CLIPS:
        raise InputError(f"clip is {options.clip!r}; {nearest(str(options.clip), CLIPS)}")
    if options.dynamic_threshold is not None and not 0 < options.dynamic_threshold <= 1:
        raise InputError(f"dynamic_threshold is {options.dynamic_threshold}; it is a share of the pixels in 0..1")
    if sees_end(prediction) and (options.clip != "none" or options.dynamic_threshold is not None):
        raise InputError(
            f"a network that predicts {prediction} says where a step ends and makes no estimate of x_0 on the way, so "
            'there is nothing to clip; take clip "none" and no dynamic_threshold'
        )


def denoise(
    network: Network,
    x: Images,
    cond: Any,
    reading: Reading,
    options: Options = PLAIN,
    now: Now | None = None,
    known: tuple[Images, Images] | None = None,
    steering: Steering | None = None,
) -> Denoised:
    """Evaluates the network once and reads D off it; one batched call also when guided without a second network.

    Args:
      network: the network.
      x: [B, *shape] at one noise level.
      cond: a pytree with leading axis B, or None.
      reading: of this noise level, scalars.
      options: static choices.
      now: guidance in this call, or None for no guidance.
      known: (values, mask) of pixels to keep, both broadcastable to x; mask is 1 where known.
      steering: what else changes the estimate, or None.
    """

    def read(output):
        return reading.from_x * x + reading.from_output * output

    # Ask, and guide.
    if not options.has_aux:
        network, now = _with_aux(network, now)
    if now is None:
        output, share, aux = _ask(network, x, cond, reading, options)
        output_for_eps, memory, aux = None, None, (aux, None)
    else:
        output, reference, share, aux = _ask_twice(network, x, cond, reading, options, now)
        pair = Pair(output, reference, read, reading.from_output, now.index, now.memory)
        output, output_for_eps, memory = guide(now, pair)

    # Clip; the eps to go on with follows from the clipped estimate, or is the predicted one.
    raw, push = read(output), 0.0
    if steering is None:
        x0 = _threshold(raw, options)
    else:
        times = jnp.broadcast_to(reading.time, x.shape[:1])
        push = steering.push(x, times, cond, reading.signal, reading.noise)
        x0 = _threshold(steering.project(raw + push, times), options)
    x_for_eps = x + reading.signal * (x0 - raw - push) if options.clip == "keep_eps" else x
    if output_for_eps is not None:
        x_for_eps = jnp.where(now.inside > 0, x + reading.signal * (x0 - read(output_for_eps) - push), x_for_eps)

    if known is not None:
        values, mask = known
        x0 = mask * values + (1 - mask) * x0
        x_for_eps = mask * x + (1 - mask) * x_for_eps
    return Denoised(x0, x_for_eps, share, memory, aux)


def _ask(network, x, cond, reading, options):
    """Returns the output, in x's dtype, the variance channels or None where options do not ask for them, and aux."""
    inputs = reading.input_scale * x
    times = [jnp.broadcast_to(time, inputs.shape[:1]) for time in (reading.time, reading.end) if time is not None]
    output, aux = network(inputs, times[0] if len(times) == 1 else jnp.stack(times, axis=-1), cond)
    output, share = split_variance(output.astype(x.dtype), inputs.shape)
    if options.learned_variance and share is None:
        raise InputError(
            f"this sampler takes its variance from the network, which returned shape {output.shape}, a prediction "
            "alone; use a fixed variance, or a network of twice the channels"
        )
    return output, share if options.learned_variance else None, aux


def _ask_twice(network, x, cond, reading, options, now):
    """Returns the output, the reference that guidance pushes away from, the variance channels or None, and aux."""
    guidance = now.guidance
    if guidance.reference_fn is not None:
        output, share, aux = _ask(network, x, cond, reading, options)

        def weaker(x, time, cond):
            return guidance.reference_fn(guidance.reference_params, x, time, cond)

        null = cond if guidance.null is None else guidance.null
        reference, _, aux_of_reference = _ask(weaker, x, null, reading, PLAIN)
        return output, reference, share, (aux, aux_of_reference)
    # One call of twice the batch.
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, guidance.null)
    outputs, share, aux = _ask(network, jnp.concatenate([x, x]), both, reading, options)
    output, reference = jnp.split(outputs, 2)
    return output, reference, None if share is None else jnp.split(share, 2)[0], (aux, None)


def _with_aux(network, now):
    """Returns a network and guidance whose networks return (prediction, None)."""

    def bare(function):
        return lambda *arguments: (function(*arguments), None)

    if now is not None and now.guidance.reference_fn is not None:
        now = now._replace(guidance=now.guidance.replace(reference_fn=bare(now.guidance.reference_fn)))
    return bare(network), now


def split_variance(output: Images, shape: tuple[int, ...]) -> tuple[Images, Images | None]:
    """Splits a network's output into the prediction and, where it has twice the channels of x, its variance channels.

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


def log_variance_between(share: Images, log_small: Images, log_large: Images) -> Images:
    """Returns the log-variance of a step, f log beta + (1 - f) log beta_tilde with f = (share + 1) / 2.

    The share, -1 to 1, is the network's (improved DDPM, arXiv:2102.09672, Eq. 15). Shares beyond the ends extrapolate,
    as in the paper.
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
