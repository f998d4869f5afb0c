"""A network small enough to compile at once, and the train step, state and mesh of tests on training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from configs import default
from diffusion import autoencoder as autoencoders
from diffusion import devices, keys, schedules, sealed
from diffusion.model import Conditions, Model
from diffusion.objectives.losses import simple_loss
from diffusion.spaces import pixels
from diffusion.training.step import StepOptions, init_state, make_train_step

SCHEDULE = schedules.linear(100)
KEY = jax.random.key(7)
SHAPE = (8, 8, 1)
BATCH = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH, *SHAPE)).astype(np.uint8)


def apply_fn(params, x, t, cond=None, *, dropout_keys=None):
    """tanh of an affine map of each pixel."""
    return jnp.tanh(x * params["gate"]["scale"] + params["gate"]["bias"] * t[:, None, None, None] / 100)


def make_model(apply_fn, schedule, shape, prediction="eps", num_classes=0, learned_variance=False):
    """A model of pixels around any network."""
    conditions = Conditions(tuple(map(str, range(num_classes))), num_classes) if num_classes else None
    return Model(apply_fn, schedule, pixels(shape), prediction, conditions, learned_variance=learned_variance)


MODEL = make_model(apply_fn, SCHEDULE, SHAPE)


def make_params():
    rng = np.random.default_rng(1)
    return {"gate": {name: jnp.asarray(rng.normal(0, 0.3, SHAPE), jnp.float32)[None] for name in ("bias", "scale")}}


def training_mesh(num_devices, fsdp=1):
    """Over the first so many devices, as `devices.training_mesh` over all."""
    grid = np.reshape(jax.devices()[:num_devices], (num_devices // fsdp, fsdp))
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


simple = partial(simple_loss, schedule=SCHEDULE)


def make_step(num_devices, optimizer, *, fsdp=1, objective=simple, ema_decays=(0.9,), frozen=None, **options):
    """A mesh, and state -> (state, metrics) on IMAGES."""
    mesh = training_mesh(num_devices, fsdp)
    step = make_train_step(MODEL, objective, optimizer, mesh, KEY, StepOptions(ema_decays, **options), frozen)
    ballots = jax.device_put(np.zeros(mesh.size, np.float32), devices.batch_sharding(mesh))

    def on_images(state, images=IMAGES):
        return step(state, jax.device_put(images, devices.batch_sharding(mesh)), None, ballots)

    return mesh, on_images


def start(optimizer, mesh, ema_decays=(0.9,)):
    """The state before the first step, laid over the mesh."""
    state = init_state(make_params(), optimizer, ema_decays)
    return jax.device_put(state, devices.state_sharding(mesh, state))


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def made_autoencoder(channels=(8, 8), seed=0):
    """An untrained autoencoder of the digits, as a run would have it."""
    config = default.get_config()
    config.train.objective, config.train.ema_decays, config.autoencoder.channels = "kl_autoencoder", (0.9,), channels
    made = autoencoders.make_autoencoder(config.autoencoder, (8, 8, 1))
    params = made.init(keys.make(seed))
    return autoencoders.TrainedAutoencoder(made, params, config, 3, "0.9", sealed.digest(params))
