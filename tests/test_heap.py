"""The heap after a compilation: no block comes from a hole, no memory is held for one, and computing goes on."""

import subprocess
import sys

import pytest

from diffusion import heap

HOLES = """
import ctypes, sys
from diffusion import heap
libc = heap._glibc()
heap.prepare()
sizes = [20_000 + 997 * k % 400_000 for k in range(3_000)]
blocks = [libc.malloc(size) for size in sizes]
for size, block in zip(sizes, blocks):
    ctypes.memset(block, 1, size)
for block in blocks[::2]:  # those between are still in use, so each is a hole of its own
    libc.free(block)
last = max(blocks)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture
def glibc():
    if heap._glibc() is None:
        pytest.skip("the C library is none of glibc 2.33 or later")


@pytest.mark.usefixtures("glibc")
def test_blocks_come_from_holes_until_these_are_filled():
    code = HOLES + "print(libc.malloc(100_000) < last)\nheap.fill_holes()\nprint(libc.malloc(100_000) < last)"
    assert python(code) == ["True", "False"]


@pytest.mark.usefixtures("glibc")
def test_filled_holes_hold_no_memory():
    freed = "sum(sizes[::2])"
    lost = float(python(HOLES + f"heap.fill_holes()\nprint((before - resident()) / {freed})")[0])
    assert lost > 0.9  # a page of each hole has its length


@pytest.mark.usefixtures("glibc")
def test_only_a_long_compilation_fills_them():
    code = """
import jax
from diffusion import heap
filled = []
heap.fill_holes = lambda: filled.append(1)
heap.prepare(), heap.prepare()
for seconds in (0.01, 5.0):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", seconds)
    print(len(filled))
"""
    assert python(code) == ["0", "1"]


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.prepare()
    heap.fill_holes()
