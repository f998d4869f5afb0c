"""Forecasts how long a training would take on this machine, before it is compiled."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion import keys, predictions
from diffusion.devices import batch_sharding
from diffusion.model import Model
from diffusion.training.state import Trainee

LONG = 3 * 86400
"""Seconds above which a training is worth a word before it starts."""

_GRADIENT = 3  # a gradient costs about three forward passes
_SHARE = 0.5  # of the speed of matrix products that training reached on CPUs: 0.45 with 35.7M parameters, 0.7 with 3.6M
_SLOWEST = 1e10  # operations a second; what even a slow machine does within `LONG` needs no measuring


def training_seconds(model: Model | Trainee, batch_size: int, num_steps: int, mesh: Mesh) -> float:
    """Returns roughly how many seconds a training takes, by its operations and a short measurement of the devices.

    Trainings that are short on any machine give 0, without a measurement.

    Args:
      model: what is trained; its network is traced and not run.
      batch_size: images in a step.
      num_steps: steps still to be made.
      mesh: the devices, all of this process.
    """
    params = jax.eval_shape(model.init, keys.make(0))
    images = float(batch_size) * num_steps * _GRADIENT
    # No weight of a network is used more often than once for each pixel; attention is left out of this bound.
    most = 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) * math.prod(model.image_shape[:-1]) * images
    if most < LONG * _SLOWEST:
        return 0.0
    inputs = [jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)]
    if isinstance(model, Model):  # an autoencoder is told no time
        inputs.append(jax.ShapeDtypeStruct((1, 2) if predictions.sees_end(model.prediction) else (1,), jnp.float32))
    cost = jax.jit(model.apply_fn).lower(params, *inputs).cost_analysis() or {}
    return cost.get("flops", 0.0) * images / (_SHARE * _product_speed(mesh))


def _product_speed(mesh: Mesh) -> float:
    """Measures the operations a second of float32 matrix products on all devices of the mesh together."""
    size = 512 if mesh.devices.flat[0].platform == "cpu" else 4096
    count = mesh.size
    a = jax.device_put(np.full((count, size, size), 1 / size, np.float32), batch_sharding(mesh))

    @jax.jit
    def products(a, repetitions):
        return jax.lax.fori_loop(0, repetitions, lambda _, b: b @ a, a)

    products(a, 1).block_until_ready()
    repetitions, seconds = 1, 0.0
    while seconds < 0.05:
        repetitions *= 2
        start = time.perf_counter()
        products(a, repetitions).block_until_ready()
        seconds = time.perf_counter() - start
    return 2 * size**3 * count * repetitions / seconds
