"""Devices: how many there are, and how a batch is laid over them."""

import os

import jax
from jax.sharding import AxisType, Mesh


def one_device_per_core() -> None:
    """Gives a CPU run one JAX device for each core. Call it before anything else touches JAX.

    XLA's own threads inside one program scale badly; one program a core, each with its share of the batch, is 1.3 to
    1.7 times faster (benchmarks/devices.py), and is the same data-parallel mesh that several GPUs use.
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
