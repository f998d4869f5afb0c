"""The training step that the benchmarks time, or look at: that of train.py, on random images."""

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

DECAYS = [0.999]


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
    step, start = _make(model, mesh, image)
    state = start(jax.tree.map(jnp.copy, params))
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


def lowered_step(model: UNet, mesh: Mesh, batch: int, image: tuple[int, int, int]) -> jax.stages.Lowered:
    """The program of that step, for which no array is made; the arguments are those of `training_step`."""
    step, start = _make(model, mesh, image)
    state = jax.eval_shape(lambda: start(init(model, image)))
    shardings, split = devices.state_sharding(mesh, state), devices.batch_sharding(mesh)
    state = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state, shardings)
    images = jax.ShapeDtypeStruct((batch, *image), jnp.uint8, sharding=split)
    ballots = jax.ShapeDtypeStruct((mesh.size,), jnp.float32, sharding=split)
    return jax.jit(step, donate_argnums=0).lower(state, images, None, ballots)


def _make(model, mesh, image):
    """The step, and what makes a state of parameters."""
    optimizer, schedule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)), schedules.linear()
    whole = Model(as_apply_fn(model), schedule, pixels(image))
    objective = partial(simple_loss, schedule=schedule)
    step = make_train_step(whole, objective, optimizer, mesh, jax.random.key(1), StepOptions(DECAYS))
    return step, lambda params: init_state(params, optimizer, DECAYS)
