"""What one device per core gains on a CPU: seconds of a training step and of a network call, one device over all.

    python benchmarks/devices.py [--width=32] [--batch=64] [--size=32] [--repeats=7]

The two run in turns in one process. With a GPU there is nothing to compare and it says so.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec
from train_step import init, training_step

from diffusion import devices
from diffusion.models import UNet, as_apply_fn

_BATCH = flags.DEFINE_integer("batch", 64, "Images at a time.")
_WIDTH = flags.DEFINE_integer("width", 32, "Base width of DDPM's CIFAR-10 UNet.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed pairs.")


def main(_):
    devices.prepare()
    if len(jax.devices()) == 1 or jax.devices()[0].platform != "cpu":
        print(f"{jax.devices()}: nothing to compare")
        return
    model = UNet(width=_WIDTH.value)
    params = init(model, (_SIZE.value, _SIZE.value, 3))
    meshes = {"one device": devices.training_mesh(1), "one per core": devices.training_mesh(_BATCH.value)}
    print(f"UNet of width {_WIDTH.value}, batch {_BATCH.value}, {_SIZE.value}x{_SIZE.value}x3, jax {jax.__version__}")
    for name, make in (("network call", network_call), ("training step", training_step)):
        shape = (_BATCH.value, (_SIZE.value, _SIZE.value, 3))
        runs = {label: make(model, params, mesh, *shape) for label, mesh in meshes.items()}
        for run in runs.values():
            run()  # compile
        pairs = [[seconds(run) for run in runs.values()] for _ in range(_REPEATS.value)]
        one, many = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name}: one device {one:.3f} s, {meshes['one per core'].size} devices {many:.3f} s, ratio {ratio:.2f}")


def network_call(model, params, mesh, batch, image):
    everywhere, split = NamedSharding(mesh, PartitionSpec()), devices.batch_sharding(mesh)
    apply_fn = jax.jit(as_apply_fn(model))
    placed = jax.device_put(params, everywhere)
    x = jax.device_put(jnp.zeros((batch, *image)), split)
    t = jax.device_put(jnp.full((batch,), 500.0), split)
    return lambda: apply_fn(placed, x, t)


def seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    app.run(main)
