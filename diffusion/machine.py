"""Says how many cores and how much memory this process may use, by the machine's size and its container's limits."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container, as from Docker's --cpus and --memory, and of a cluster's job."""

OWN_GROUPS = Path("/proc/self/cgroup")
"""Names the groups that this process is in, below CGROUP."""


CPUS = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""What processors are called in it that compute in bfloat16, those of Intel and AMD and those of Arm."""


def cores() -> int:
    """Returns how many cores this process may use, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_numbers(folder / "cpu.max") for folder in _groups("")]
    quotas += [_numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in _groups("cpu")]
    return max(1, min([count, *(quota // period for quota, period in filter(None, quotas) if quota > 0)]))


def memory() -> int:
    """Returns how many bytes of memory this process may use."""
    limits = [_numbers(folder / "memory.max") for folder in _groups("")]
    limits += [_numbers(folder / "memory.limit_in_bytes") for folder in _groups("memory")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    own = [] if address_space == resource.RLIM_INFINITY else [address_space]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *own, *(limit for (limit,) in filter(None, limits))])


def computes_bfloat16() -> bool | None:
    """Returns whether the processor multiplies numbers in bfloat16, or None where the system does not say."""
    try:
        text = CPUS.read_text()
    except OSError:  # no Linux
        return None
    return bool(BFLOAT16 & set(text.split()))


def _groups(controller: str) -> Iterator[Path]:
    """Yields the folders that may limit this process: its own group, and all that hold it.

    Args:
      controller: "" for version 2 of cgroups, which has one tree; "cpu" or "memory" for version 1, which has several.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    top = CGROUP / controller
    yield top  # in a container this is its own group, whatever name the host gives it
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controller in controllers.split(","):
            inner = Path(name.lstrip("/"))
            yield from (top / folder for folder in (inner, *inner.parents) if folder != Path("."))


def _numbers(*files: Path) -> tuple[int, ...] | None:
    """Returns the numbers in some files, or None if a file is missing or says "max"."""
    try:
        return tuple(int(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):
        return None
