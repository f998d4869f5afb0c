"""Draws any number of images from a model, in batches of one size that are spread over the devices."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, UInt8

from diffusion import keys
from diffusion.adaptive import Adaptive
from diffusion.conditions import Conditions, Prompts
from diffusion.errors import InputError, printable
from diffusion.guidance import Guidance
from diffusion.images import labelled_sheet, sheet
from diffusion.model import Model
from diffusion.sampling import sample
from diffusion.solvers import SamplerTable
from diffusion.types import Params

MAX_ROWS = 16
"""A sheet of images of more classes has no row for each."""


def generate(
    model: Model,
    params: Params,
    table: SamplerTable | Adaptive,
    sample_ids: Sequence[int],
    *,
    seed: int,
    **how: Any,
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yields the images of sample_ids in order, batch by batch.

    Image i depends only on (seed, i) and its class.

    Args:
      model, params, table, sample_ids: as for `draw`.
      seed: of the random key.
      how: the other arguments of `draw`.

    Raises:
      InputError: an image is not finite.
    """
    ids = np.asarray(sample_ids, np.uint32)
    done = 0
    for samples in draw(model, params, table, ids, key=keys.make(seed), **how):
        bad = ~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)
        if bad.any():
            first = ids[done : done + len(samples)][bad][0]
            raise InputError(f"image {first} is not finite: the weights diverged, or {_doubt(table)}")
        done += len(samples)
        yield model.space.decode(samples)


def _doubt(table):
    """Says why a sampler may have made what is not finite, where the weights are good."""
    if isinstance(table, Adaptive):
        return f"{table.max_calls:,} network calls are too few; give more max_calls, or a larger rtol"
    return f"{table.name} on this grid"


def draw(
    model: Model,
    params: Params,
    table: SamplerTable | Adaptive,
    sample_ids: Sequence[int],
    *,
    key: jax.Array,
    mesh: Mesh,
    labels: Sequence[int] = (),
    batch_size: int = 64,
    **options: Any,
) -> Iterator[Float[np.ndarray, "B *shape"]]:
    """Yields the samples of sample_ids in order, in the space that the model works in, batch by batch.

    Sample i depends only on (key, i) and its class. All batches have the same shape, so one compilation serves them:
    batch_size is rounded up to a multiple of the number of devices, and the last batch is filled up with repetitions
    that are not returned.

    Args:
      model, params: the model and its network's parameters.
      table: the sampler.
      sample_ids: whole numbers in 0..2^32 - 1.
      key: the random key.
      mesh: each batch is split over its "data" axis.
      labels: classes; sample i has labels[i % len(labels)]. () for none.
      batch_size: samples at a time.
      options: go to `diffusion.sample`, where x_init is a function of the numbers of a batch; and calls, a list that
        takes the number of network calls of each sample of an adaptive solver. A model that takes the
        guidance scale as an input is told that of `guidance`.
    """
    ids = np.asarray(sample_ids, np.uint32)
    devices = mesh.shape["data"]
    size = -(-min(batch_size, len(ids)) // devices) * devices
    # Every device holds the parameters and the key; the batch is split.
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = jax.device_put(params, everywhere)
    if (guidance := options.get("guidance")) is not None:
        options["guidance"] = guidance.replace(reference_params=jax.device_put(guidance.reference_params, everywhere))
    key = jax.device_put(key, everywhere)
    x_init, calls = options.pop("x_init", None), options.pop("calls", None)
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        padded = np.pad(batch, (0, size - len(batch)), mode="edge")
        placed = {"sample_ids": padded, **conditions_of(model, padded, labels, options.get("guidance"))}
        placed |= {} if x_init is None else {"x_init": x_init(padded)}
        placed = jax.device_put(placed, split)
        found = _sample(model, params, table, key, return_trajectory=calls is not None, **placed, **options)
        # Only real samples count from here, not what filled the batch up.
        if calls is not None:
            found, counts = found
            calls += np.asarray(counts)[: len(batch)].tolist()
        yield np.asarray(found)[: len(batch)]


def frames(
    model: Model,
    params: Params,
    table: SamplerTable,
    sample_ids: Sequence[int],
    *,
    seed: int,
    labels: Sequence[int] = (),
    **options: Any,
) -> UInt8[np.ndarray, "stages+1 N H W C"]:
    """Returns what the images look like before each network call, and at the end; takes the arguments of `generate`."""
    ids = np.asarray(sample_ids, np.uint32)
    if "x_init" in options:
        options["x_init"] = options["x_init"](ids)
    told = conditions_of(model, ids, labels, options.get("guidance"))
    options |= {"sample_ids": ids, **told, "return_trajectory": True}
    _, passed = _sample(model, params, table, keys.make(seed), **options)
    return np.stack([model.space.decode(x) for x in passed.x])


def working_memory(
    model: Model, params: Params, table: SamplerTable, count: int, *, labels: Sequence[int] = (), **options: Any
) -> int:
    """Returns how many bytes the compiled program takes for so many images, the parameters left out.

    The other arguments are those of `generate`. Compiles, and draws nothing.
    """
    ids = np.arange(count, dtype=np.uint32)
    if "x_init" in options:
        options["x_init"] = options["x_init"](ids)
    guidance = options.pop("guidance", None)
    options.pop("calls", None)
    given = {"sample_ids": ids, **conditions_of(model, ids, labels, guidance)}

    def run(params, second, given):
        # Both networks are arguments: what a program closes over is written into it.
        told = {} if guidance is None else {"guidance": guidance.replace(reference_params=second)}
        return _sample(model, params, table, keys.make(0), **given, **told, **options)

    second = None if guidance is None else guidance.reference_params
    found = jax.jit(run).lower(params, second, given).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def _sample(model, params, table, key, *, sample_ids, null_cond=None, guidance=None, **options):
    """Calls `sample`; guidance without a second network gets the null condition it needs from the model."""
    if model.guides_itself:
        null_cond = guidance = None  # the network has been told the scale, and guides itself
    if guidance is None:
        options |= {} if null_cond is None else {"null_cond": null_cond}
    else:
        needed = guidance.null is None and guidance.reference_fn is None
        options["guidance"] = guidance.replace(null=null_cond) if needed else guidance
    shared = {"prediction": model.prediction, "sample_ids": sample_ids}
    # In float32 also under `jax_enable_x64`, which would draw other noise and so other images.
    with jax.enable_x64(False):
        return sample(model.apply_fn, params, table, key, len(sample_ids), model.space.shape, **shared, **options)


def labels_of(sample_ids: Sequence[int], labels: Sequence[int]) -> Int32[np.ndarray, "N"]:
    """Returns the class of each image: number i has labels[i % len(labels)]; there must be at least one label."""
    return np.asarray(labels, np.int32)[np.asarray(sample_ids) % len(labels)]


def picture(
    images: UInt8[np.ndarray, "N H W C"],
    ids: Sequence[int],
    conditions: Conditions | Prompts | None,
    labels: Sequence[int],
) -> UInt8[np.ndarray, "H W C"]:
    """Returns a sheet of images, which has a row with the name of each class where these are not too many.

    Args:
      images: the images.
      ids: their numbers.
      conditions: of the model.
      labels: classes that the images take in turn; () for none.
    """
    chosen = labels_of(ids, labels).tolist() if labels else []
    if not 1 <= len(set(chosen)) <= MAX_ROWS:
        return sheet(images)
    return labelled_sheet(images, [printable(conditions.names[label]) for label in chosen])


def conditions_of(model: Model, ids: Sequence[int], labels: Sequence[int], guidance: Guidance | None) -> dict[str, Any]:
    """Returns cond and null_cond of the images with these numbers, or nothing if there are no labels."""
    if not labels:
        return {}
    cond = model.conditions.told(labels_of(ids, labels), 1.0 if guidance is None else guidance.scale)
    return {"cond": cond, "null_cond": model.conditions.nulls(len(ids))}
