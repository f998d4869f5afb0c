"""Devices: how many there are, and how a batch is laid over them."""

import os

import jax
from jax.sharding import AxisType, Mesh


def one_device_per_core() -> None:
    """Gives a CPU run one JAX device for each core. Call it before anything else touches JAX.

    XLA's own threads inside one program scale badly. One program a core, each with its share of the batch, gave on two
    cores 1.64 times the network calls and 1.34 times the training steps at 64 images of 32x32, and 1.30 and 0.92 times
    at 16 (benchmarks/devices.py, width 32, November 2026). It is the same data-parallel mesh that several GPUs use.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)


def data_mesh(batch_size: int | None = None) -> Mesh:
    """A mesh with one axis, "data", over all devices, or over as many as divide the batch."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if (batch_size or n) % n == 0)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def describe(mesh: Mesh) -> str:
    """For example "2 x cpu" or "1 x NVIDIA H200"."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
