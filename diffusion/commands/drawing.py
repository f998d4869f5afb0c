"""Any number of images from a model: batches of one size, spread over devices."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, UInt8

from diffusion.errors import InputError
from diffusion.model import Model
from diffusion.sampling import sample
from diffusion.solvers import SamplerTable
from diffusion.types import Params


def generate(
    model: Model,
    params: Params,
    table: SamplerTable,
    sample_ids: Sequence[int],
    *,
    seed: int,
    mesh: Mesh,
    labels: Sequence[int] = (),
    batch_size: int = 64,
    **options: Any,
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yields the images of sample_ids in order, batch by batch.

    Image i depends on (seed, i) and its class alone. All batches run in one compiled shape: batch_size is rounded up to
    a multiple of the number of devices, and the last batch is filled up with repetitions that are not returned.

    Args:
      model, params: the network.
      table: the sampler.
      sample_ids: whole numbers in 0..2^32 - 1.
      seed: of the random key.
      mesh: its "data" axis shares each batch.
      labels: classes; image i has labels[i % len(labels)]. () for none.
      batch_size: images at a time.
      options: go to `diffusion.sample`.
    """
    ids = np.asarray(sample_ids, np.uint32)
    devices = mesh.shape["data"]
    size = -(-min(batch_size, len(ids)) // devices) * devices
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = jax.device_put(params, everywhere)
    if (guidance := options.get("guidance")) is not None:
        options["guidance"] = guidance.replace(reference_params=jax.device_put(guidance.reference_params, everywhere))
    key = jax.device_put(jax.random.key(seed), everywhere)
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        padded = np.pad(batch, (0, size - len(batch)), mode="edge")
        placed = jax.device_put({"sample_ids": padded, **_classes(model, padded, labels)}, split)
        images = _sample(model, params, table, key, **placed, **options)
        images = np.asarray(images)[: len(batch)]
        bad = ~np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if bad.any():
            raise InputError(f"image {batch[bad][0]} is not finite: the weights diverged, or {table.name} on this grid")
        yield model.space.decode(images)


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
    """Returns what the images look like before each network call, and at the end; arguments as `generate`."""
    ids = np.asarray(sample_ids, np.uint32)
    options |= {"sample_ids": ids, **_classes(model, ids, labels), "return_trajectory": True}
    _, passed = _sample(model, params, table, jax.random.key(seed), **options)
    return np.stack([model.space.decode(x) for x in passed.x])


def _sample(model, params, table, key, *, sample_ids, null_cond=None, guidance=None, **options):
    """Calls `sample`; guidance that has no null and needs one gets that of the model's conditions."""
    if guidance is None:
        options |= {} if null_cond is None else {"null_cond": null_cond}
    else:
        options["guidance"] = guidance if guidance.reference_fn is not None else guidance.replace(null=null_cond)
    shared = {"prediction": model.prediction, "sample_ids": sample_ids}
    return sample(model.apply_fn, params, table, key, len(sample_ids), model.space.shape, **shared, **options)


def labels_of(sample_ids: Sequence[int], labels: Sequence[int]) -> Int32[np.ndarray, "N"]:
    """Returns the classes of images with these numbers, which take the labels (at least one) in turn."""
    return np.asarray(labels, np.int32)[np.asarray(sample_ids) % len(labels)]


def _classes(model, ids, labels):
    """Returns cond and null_cond of these images."""
    if not labels:
        return {}
    return {"cond": labels_of(ids, labels), "null_cond": model.conditions.nulls(len(ids))}
