"""Reads --batch_size, and finds the size of a batch that fits the memory."""

from jax.sharding import Mesh

from diffusion import machine
from diffusion.commands.samplings import Sampling
from diffusion.errors import InputError

AUTO = "auto"

MOST = 1024
"""Images at a time; no machine is faster with more."""

PROBE = 4
"""Images in the program whose memory is looked at."""

CPU_SHARE = 0.5
"""Of the machine's memory, how much a batch may take: other programs have theirs in it, too."""


def size(text: str, sampling: Sampling, mesh: Mesh, most: int) -> int:
    """Returns how many images to draw at a time; prints what is found for auto.

    Args:
      text: as --batch_size has it, a whole number or auto.
      sampling: what is drawn.
      mesh: over which a batch is split.
      most: how many images there are.
    """
    if text != AUTO:
        return int(text)
    devices = mesh.shape["data"]
    probe = min(PROBE, -(-most // devices))
    need, room = sampling.memory(probe) / probe, _room(mesh)
    fits = max(1, int(room / need))
    chosen = min(2 ** (fits.bit_length() - 1) * devices, MOST, most)
    takes = f"{need / 2**20:,.1f} MiB an image by the compiled program"
    print(f"batch_size: {chosen} images at a time ({takes}; {room / 2**20:,.0f} MiB for each of {devices} device(s))")
    if room < need:
        print("note: that is more than there is for one image; it may end for want of memory")
    return chosen


def fixed(text: str, what: str) -> int:
    """Returns the number in the flag; raises InputError for auto, which is found for samples only."""
    if text == AUTO:
        raise InputError(f"batch_size is {AUTO}, which is found for samples; {what} takes a whole number")
    return int(text)


def _room(mesh):
    """Returns how many bytes a batch may take on each device."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return CPU_SHARE * machine.memory() / mesh.size
    found = device.memory_stats()
    if found is None or not {"bytes_limit", "bytes_in_use"} <= found.keys():
        raise InputError(f"batch_size is {AUTO}, and {device.device_kind} does not say its memory; give a whole number")
    return found["bytes_limit"] - found["bytes_in_use"]
