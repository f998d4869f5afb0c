"""Counts devices and processes, and lays a batch and a train state over them."""

import contextlib
import os
import re
import resource
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pooch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion import heap, jax_environment, machine, process
from diffusion.errors import InputError, require_range

HEARTBEAT = 30
"""After how many seconds without a sign of life a process of a run counts as lost."""

LOST = "another process of the run was lost; all checkpoints are whole: start all of them again with the same command"

_NO_ANSWER = re.compile(r"Gloo|NCCL|RCCL|coordination service|barrier|UNAVAILABLE|DEADLINE_EXCEEDED")

SHARDED_FROM = 1024
"""Arrays with fewer elements than this are not worth sharding."""


def prepare(opens: bool = True) -> None:
    """Gives a CPU one JAX device per core, and JAX a cache of compiled programs; call it before anything touches JAX.

    XLA's own threads scale badly inside one program. One program per core, each with its share of the batch, gave on
    two cores 1.64 times the network calls and 1.34 times the training steps at 64 images of 32x32, and 1.64 and 0.87
    times at 4 (benchmarks/devices.py, width 32, November 2026). Several GPUs use the same data-parallel mesh.

    Memory that the C library frees is kept, and its heap kept in order after compilations, see `diffusion.heap`.

    Compiled programs are kept in the user's cache (JAX_COMPILATION_CACHE_DIR overrides it), so that a command given
    again starts at once.

    Args:
      opens: whether to open the devices, which finds out whether they are there. False where `join_processes` follows.

    Raises:
      InputError: JAX_NUM_CPU_DEVICES is no number of devices, or there is no device as JAX_PLATFORMS asks for.
    """
    if (wrong := jax_environment.wrong_num_cpu_devices) is not None:
        raise InputError(f"JAX_NUM_CPU_DEVICES is {wrong!r}; give a whole number above 0, or unset it")
    heap.prepare()
    if "JAX_NUM_CPU_DEVICES" not in os.environ:  # JAX itself reads this variable
        jax.config.update("jax_num_cpu_devices", machine.cores())
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(pooch.os_cache("diffusion"), "compiled")
        with contextlib.suppress(OSError):  # the home may be read-only; then programs are compiled each time
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if opens:
        check_platform()


def check_platform() -> None:
    """Raises InputError if JAX finds no device of the kind that JAX_PLATFORMS asks for.

    It opens the devices, so in a run of several processes it comes after `join_processes`.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        raise InputError(
            f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device here{reason}; unset it, or install JAX for that "
            "device"
        ) from error


def join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects the processes of one run through `jax.distributed`, which waits 300 seconds for all to come.

    From then on this process ends with exit code PREEMPTED where another one is lost, and also if they do not come.

    Args:
      coordinator: HOST:PORT of process 0; None leaves it to jax.distributed, which knows Slurm, Open MPI, Kubernetes
        and cloud TPUs, and reads JAX_COORDINATOR_ADDRESS.
      num_processes: how many processes the run has.
      process_id: the number of this process, from 0.

    Raises:
      InputError: the cluster is not known, or a number is missing or out of range.
    """
    if coordinator is not None and not re.fullmatch(r"\S+:\d+", coordinator):
        raise InputError(f"--coordinator is {coordinator!r}; write HOST:PORT of process 0, like 10.0.0.1:1234")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise InputError(f"--process_id is {process_id}; --num_processes={num_processes} allows 0..{num_processes - 1}")
    if coordinator is not None:
        print(f"process {process_id} waits for all {num_processes} at {coordinator}, at most 300 s", flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # it would hear SIGTERM in place of StopRequest
    # JAX aborts a process that hears no more of the others, for which no step could end.
    process.exit_if_aborted(process.PREEMPTED, LOST)
    try:
        beat = {"heartbeat_timeout_seconds": HEARTBEAT}
        jax.distributed.initialize(coordinator, num_processes, process_id, **beat)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of the run did not find each other ({str(error).splitlines()[0]})") from error


def tells_of_lost(error: BaseException | None) -> bool:
    """Says whether an error, or one that led to it, is how XLA or JAX report that another process does not answer."""
    seen = []
    while error is not None and error not in seen:  # an error that is raised again can lead to itself
        if _NO_ANSWER.search(str(error)):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def data_mesh(batch_size: int | None = None) -> Mesh:
    """Returns a mesh with one axis, "data", over this process's devices, or over as many as divide the batch."""
    check_platform()
    local = jax.local_devices()
    count = max(n for n in range(1, len(local) + 1) if (batch_size or n) % n == 0)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=local[:count])


def training_mesh(batch_size: int, fsdp: int = 1, microbatches: int = 1) -> Mesh:
    """Returns a mesh with the axes "data" and "fsdp" over the devices of all processes; both divide the batch.

    Args:
      batch_size: examples in the whole batch. A single process uses as many of its devices as divide it.
      fsdp: number of devices that the state is sharded over; it is repeated over "data".
      microbatches: parts that each device's share of the batch is divided into.

    Raises:
      InputError: the batch cannot be divided so, or fsdp does not divide the number of devices.
    """
    require_range("fsdp", fsdp, 1)
    require_range("microbatches", microbatches, 1)
    require_range("batch_size", batch_size, 1)
    # Sort by process, so that each process has its rows of the batch in one piece.
    check_platform()
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) % fsdp:
        raise InputError(f"config.train.fsdp is {fsdp}; it must divide the number of devices, {len(devices)}")
    # Several processes must use all devices; a single one may leave some idle.
    fits = [n for n in range(fsdp, len(devices) + 1, fsdp) if batch_size % (n * microbatches) == 0]
    if not fits or (jax.process_count() > 1 and fits[-1] != len(devices)):
        of = f"fsdp = {fsdp}, microbatches = {microbatches} and {len(devices)} devices"
        multiple = microbatches * (len(devices) if jax.process_count() > 1 else fsdp)
        raise InputError(f"config.train.batch_size is {batch_size}; with {of} it must be a multiple of {multiple}")
    shape = (fits[-1] // fsdp, fsdp)
    return Mesh(np.reshape(devices[: fits[-1]], shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Returns where each array of a train state lies: its longest axis that "fsdp" divides is sharded over "fsdp".

    Args:
      mesh: from `training_mesh`.
      state: a pytree whose leaves have a shape.

    Returns:
      The same tree with a NamedSharding at each leaf.
    """
    ways = mesh.shape["fsdp"]

    def sharding(x):
        axes = [axis for axis in range(len(x.shape)) if x.shape[axis] % ways == 0]
        if ways == 1 or not axes or np.prod(x.shape) < SHARDED_FROM:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides a batch's leading axis over all devices of a `training_mesh`."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """Returns the rows of the whole batch that this process loads."""
    shares = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = [range(batch_size)[share] for (share,) in shares]
    return range(min(r.start for r in rows), max(r.stop for r in rows))


def describe(mesh: Mesh) -> str:
    """Describes a mesh, for example as "2 x cpu", "1 x NVIDIA H200" or "8 x cpu in 2 processes, fsdp 4"."""
    text = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    if jax.process_count() > 1:
        text += f" in {jax.process_count()} processes"
    return text + (f", fsdp {mesh.shape['fsdp']}" if mesh.shape.get("fsdp", 1) > 1 else "")


def memory_in_use() -> int:
    """Returns the most bytes that a local device has held; a CPU keeps no count, so there the most of this process."""
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    if peaks:
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if os.uname().sysname == "Darwin" else 1024)  # macOS counts bytes, Linux KiB
