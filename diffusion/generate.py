"""Any number of images from a model: batches of one size, spread over devices."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8

from diffusion.experiment import Model
from diffusion.files import to_uint8
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
    batch_size: int = 64,
    clip: str = "recompute",
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yields the images of sample_ids in order, batch by batch.

    Image i depends on (seed, i) alone. All batches run in one compiled shape: batch_size is rounded up to a multiple of
    the number of devices, and the last batch is filled up with repetitions that are not returned. A conditional model
    draws class i % num_classes for image i.

    Args:
      model, params: the network.
      table: the sampler.
      sample_ids: whole numbers in 0..2^32 - 1.
      seed: of the random key.
      mesh: its "data" axis shares each batch.
      batch_size: images at a time.
      clip: see `diffusion.sample`.
    """
    ids = np.asarray(sample_ids, np.uint32)
    devices = mesh.shape["data"]
    size = -(-min(batch_size, len(ids)) // devices) * devices
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = jax.device_put(params, everywhere)
    key = jax.device_put(jax.random.key(seed), everywhere)
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        padded = jax.device_put(np.pad(batch, (0, size - len(batch)), mode="edge"), split)
        cond = padded % model.num_classes if model.num_classes else None
        images = sample(
            model.apply_fn,
            params,
            table,
            key,
            size,
            model.image_shape,
            prediction=model.prediction,
            clip=clip,
            cond=cond,
            sample_ids=padded,
        )
        yield to_uint8(images)[: len(batch)]
