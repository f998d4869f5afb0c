"""Measures how likely a model finds images: the variational bound in bits per dimension, for any number of steps."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from diffusion import devices, keys
from diffusion.data import Dataset
from diffusion.denoiser import Options, check_options, denoise, log_variance_between
from diffusion.errors import InputError, nearest
from diffusion.images import to_floats
from diffusion.model import Model, Trained
from diffusion.objectives.bound import BoundSteps, bound_steps, mean_bits, step_bits
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.ddim import VARIANCES
from diffusion.timesteps import Tau
from diffusion.types import ApplyFn, Images, Params

CLIPS = ("none", "recompute")


class Bound(NamedTuple):
    """Holds an upper bound of -log2 p(x_0) per dimension for each image; it is an estimate, as noise goes into it.

    Attributes:
      total: prior plus the sum of the terms.
      terms: [S, B], one for each step in the order in which they are taken, from tau[0] down; the last step's is the
        cost of the 8-bit pixels.
      prior: KL divergence of x at tau[0] from the noise that sampling starts with.
    """

    total: Float[Array, "B"]
    terms: Float[Array, "S B"]
    prior: Float[Array, "B"]


def variational_bound(  # noqa: PLR0913
    apply_fn: ApplyFn,
    params: Params,
    schedule: NoiseSchedule,
    tau,
    x_0: Images,
    key: jax.Array,
    *,
    prediction: str = "eps",
    variance: str = "small",
    clip: str = "recompute",
    cond: Any = None,
    sample_ids: Int[Array, "B"] | None = None,
) -> Bound:
    """Returns the bound of the sampler `ddpm(schedule, tau, variance)` (DDPM, arXiv:2006.11239, Eq. 5).

    Each term is estimated with one draw of noise, which depends only on (key, sample id, step). The steps belong to the
    respaced process, whose one-step alpha is alpha_bar_t / alpha_bar_s (improved DDPM, arXiv:2102.09672, Eq. 19). One
    compilation serves all grids of the same length and all fixed variances.

    Args:
      apply_fn: the network; the same object at every call, or each call compiles again.
      params: its parameters.
      schedule: the noise schedule.
      tau: a grid from `diffusion.timesteps`.
      x_0: 8-bit images as floats in [-1, 1], uint8 / 127.5 - 1; the arithmetic has their dtype.
      key: a JAX random key.
      prediction: what the network predicts, as for `diffusion.sample`.
      variance: "small" (the posterior's beta_tilde), "large" (beta) or "learned", see `solvers.ddpm`. Sampling injects
        no noise in its last step, but a likelihood needs a variance there: "small" takes that of the step before (or
        beta, if there is only one step), "large" takes beta, and "learned" a value in between. "large_published" is
        "large" with the last step of "small", as in the code, and so the published figures, of DDPM and improved DDPM.
      clip: "recompute" clips the estimate of x_0 to [-1, 1], "none" does not.
      cond: as the network takes it, or None.
      sample_ids: int [B], 0..B-1 if not given.

    Raises:
      InputError: an unknown option, images that are not of 8 bits, or a network without the variance asked for.
    """
    for name, value, known in (("variance", variance, BOUND_VARIANCES), ("clip", clip, CLIPS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}; {nearest(str(value), known)}")
    # Build the steps, and a key for each image.
    options = Options(clip, learned_variance=variance == "learned")
    check_options(prediction, options)
    steps = bound_steps(schedule, tau, prediction)
    x_0 = _check_images(x_0)
    ids = jnp.arange(len(x_0)) if sample_ids is None else jnp.asarray(sample_ids)
    of_samples = jax.vmap(partial(jax.random.fold_in, keys.threefry(key)))(ids)
    terms = _terms(apply_fn, params, steps, _SHARES[variance], x_0, of_samples, cond, options)
    prior = mean_bits(_prior(steps.reading.signal[0], steps.reading.noise[0], x_0))
    return Bound(prior + terms.sum(axis=0), terms, prior)


_SHARES = {"small": (-1.0, -1.0), "large": (1.0, 1.0), "large_published": (1.0, -1.0), "learned": (0.0, 0.0)}
"""Where a variance lies between the two log-variances, from -1 to 1, in all steps but the last, and in the last; that
of "learned" is the network's."""

BOUND_VARIANCES = tuple(_SHARES)


def _check_images(x_0):
    """Returns x_0 as an array, unless its values are seen not to be 8-bit pixels."""
    x_0 = jnp.asarray(x_0)
    if not isinstance(x_0, jax.core.Tracer):
        values = (np.asarray(x_0, np.float64) + 1) * 127.5
        if not np.all((np.abs(values - np.round(values)) < 0.01) & (np.abs(values - 127.5) < 127.51)):
            raise InputError(
                "x_0 holds values that are no 8-bit pixels in [-1, 1]; give diffusion.images.to_floats(uint8 images)"
            )
    return x_0


def _prior(signal, noise, x_0):
    """Returns the KL divergence of N(a x_0, n^2) from N(0, a^2 + n^2) for each pixel, in nats."""
    share = signal**2 / (signal**2 + noise**2)
    return 0.5 * (share * jnp.square(x_0) - (share + np.log1p(-share)))


@partial(jax.jit, static_argnames=("apply_fn", "options"))
@keys.pinned
def _terms(apply_fn, params, steps: BoundSteps, share, x_0, of_samples, cond, options):
    """Returns the terms [S, B]; one step is computed after the other, to hold the activations of only one."""
    num, network = steps.from_x0.shape[0], partial(apply_fn, params)
    cast = jax.tree.map(lambda leaf: leaf.astype(x_0.dtype), steps._replace(reading=None))
    steps = cast._replace(reading=steps.reading.astype(x_0.dtype))

    def term(_, inputs):
        index, step = inputs
        eps = jax.vmap(lambda k: keys.normal(jax.random.fold_in(k, index), x_0.shape[1:], x_0.dtype))(of_samples)
        x_t = step.reading.signal * x_0 + step.reading.noise * eps
        d = denoise(network, x_t, cond, step.reading, options)
        of_step = jnp.where(index == num - 1, share[1], share[0])
        where = d.log_variance_share if options.learned_variance else jnp.full_like(x_0, of_step)
        log_variance = log_variance_between(where, step.log_small, step.log_large)
        return None, step_bits(step, x_0, d.x0, log_variance, last=index == num - 1)

    return jax.lax.scan(term, None, (np.arange(num), steps))[1]


class BitsRow(NamedTuple):
    """Holds the bound of a data set with one variance and number of steps.

    Attributes:
      variance, steps: which sampler.
      bits: mean bound in bits per dimension.
      standard_error: of this mean over the images; noise is part of it.
      prior: the part of bits that belongs to no step.
      times, terms: where each step starts, and its part of bits; the last step's is the cost of the 8-bit pixels.
    """

    variance: str
    steps: int
    bits: float
    standard_error: float
    prior: float
    times: tuple[float, ...]
    terms: tuple[float, ...]


def bits_table(
    trained: Trained,
    data: Dataset,
    key: jax.Array,
    *,
    grids: Sequence[Tau],
    variances: Sequence[str] | None = None,
    clip: str = "recompute",
    batch_size: int = 256,
) -> list[BitsRow]:
    """Returns the bound of a trained model on a data set, a row for each variance and grid.

    Args:
      trained: the model and its parameters.
      data: images; their labels condition a model with classes.
      key: a JAX random key; all rows share the noise of a (sample, step).
      grids: from `diffusion.timesteps`.
      variances: None for all that the model has.
      clip: see `variational_bound`.
      batch_size: images at a time; affects only memory.
    """
    model = trained.model
    rows = []
    for variance in variances or variances_of(model):
        for grid in grids:
            bound = _bound(trained, data, grid, key, variance, clip, batch_size)
            count = len(bound.total)
            error = bound.total.std(ddof=1) / count**0.5 if count > 1 else float("nan")
            terms = tuple(bound.terms.mean(axis=1).tolist())
            facts = (float(bound.total.mean()), float(error), float(bound.prior.mean()), tuple(map(float, grid[:-1])))
            rows.append(BitsRow(variance, len(grid) - 1, *facts, terms))
    return rows


def variances_of(model: Model) -> tuple[str, ...]:
    """Returns the names of the variances for which a model has a bound."""
    return VARIANCES if model.learned_variance else ("small", "large")


def _bound(trained, data, grid, key, variance, clip, batch_size):
    """Returns the bound of every image, as float64 arrays [..., N]."""
    model = trained.model
    options = {"prediction": model.prediction, "variance": variance, "clip": clip}

    def bound(params, key, images, cond, ids):
        return variational_bound(
            model.apply_fn, params, model.schedule, grid, to_floats(images), key, cond=cond, sample_ids=ids, **options
        )

    return in_batches(bound, trained, key, data, batch_size)


def in_batches(measure, trained: Trained, key: jax.Array, data: Dataset, batch_size: int):
    """Returns what measure gives for a whole data set, as a tree of float64 arrays [..., N].

    Calls measure(params, key, images uint8, cond, ids) -> tree of arrays [..., B] batch by batch; the devices of this
    process share each batch.
    """
    mesh = devices.data_mesh()
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params, key = jax.device_put((trained.params, key), everywhere)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    parts = []
    for start in range(0, len(data.images), batch_size):
        # Fill up the last batch, so that all have the one shape that is compiled.
        ids = np.minimum(np.arange(start, start + batch_size), len(data.images) - 1)
        cond = None if trained.model.conditions is None else data.labels[ids]
        part = measure(params, key, *jax.device_put((data.images[ids], cond, ids), split))
        parts.append(jax.tree.map(lambda x: np.asarray(x, np.float64)[..., : len(data.images) - start], part))  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)
