"""The training step that the benchmarks time: that of train.py, on random images."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion import devices, schedules
from diffusion.model import Model
from diffusion.models import UNet, as_apply_fn
from diffusion.objectives.losses import simple_loss
from diffusion.spaces import pixels
from diffusion.training.step import StepOptions, init_state, make_train_step


def init(model: UNet, image: tuple[int, int, int]):
    """Parameters for images [H, W, C]."""
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *image)), jnp.ones((1,)))["params"]


def training_step(model: UNet, params, mesh: Mesh, batch: int, image: tuple[int, int, int]) -> Callable[[], None]:
    """A function that makes one step and waits for it: noise, mse, gradient, clip, Adam, EMA.

    Args:
      model, params: the network and the weights to start from, which are copied.
      mesh: from `devices.training_mesh`.
      batch, image: images at a time, and their shape [H, W, C].
    """
    optimizer, decays = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)), [0.999]
    schedule = schedules.linear()
    whole, objective = (
        Model(as_apply_fn(model), schedule, pixels(image)),
        partial(simple_loss, schedule=schedule),
    )
    step = make_train_step(whole, objective, optimizer, mesh, jax.random.key(1), StepOptions(decays))
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, decays)
    state = jax.device_put(state, devices.state_sharding(mesh, state))
    split = devices.batch_sharding(mesh)
    images = np.random.default_rng(0).integers(0, 256, (batch, *image)).astype(np.uint8)
    images = jax.device_put(images, split)
    ballots = jax.device_put(np.zeros(mesh.size, np.float32), split)

    def run():
        nonlocal state
        state, metrics = step(state, images, None, ballots)
        jax.block_until_ready((state, metrics))

    return run
