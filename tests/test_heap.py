"""The heap after a compilation: no block comes from a hole, no memory is held for one, and computing goes on."""

import subprocess
import sys

import pytest

from diffusion import heap

HOLES = """
import ctypes, resource
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
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
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
def test_a_hole_that_is_worth_having_is_kept():
    code = """
import ctypes
from diffusion import heap
libc = heap._glibc()
heap.prepare()
blocks = [libc.malloc(size) for size in (2**26, 2**22)]
libc.free(blocks[0])
heap.fill_holes()
print(libc.malloc(2**25) < blocks[1], libc.malloc(2**25) < blocks[1])
"""
    assert python(code) == ["True", "False"]


@pytest.mark.usefixtures("glibc")
def test_no_more_is_taken_than_was_free():
    """Wherever blocks come from: here the address test is blind, as for a thread with a heap of its own."""
    code = (
        HOLES
        + """
taken = []
class Blind:
    def __getattr__(self, name):
        return getattr(libc, name)
    def malloc(self, size):
        taken.append(size)
        return 2**40
    def sbrk(self, _):
        return 2**41
    def mallinfo2(self):
        return heap._Usage(heap=2**41, free=10_000_000, top=0)
    def free(self, block):
        pass
    def malloc_trim(self, _):
        pass
heap._glibc = Blind
heap.fill_holes()
print(sum(taken))
"""
    )
    assert 10_000_000 <= int(python(code)[0]) < 20_000_000


@pytest.mark.usefixtures("glibc")
def test_limited_addresses_are_left_alone():
    limit = "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))"
    assert python(HOLES + f"{limit}\nheap.fill_holes()\nprint(libc.malloc(100_000) < last)") == ["True"]


def test_only_a_long_compilation_fills_them():
    code = """
import jax
jax.config.update("jax_enable_compilation_cache", False)
from diffusion import heap
filled = []
heap.fill_holes = lambda: filled.append(1)
heap.prepare(), heap.prepare()
print(jax.jit(lambda x: x + 1)(1), len(filled))
heap.COMPILED_FOR = 0
print(jax.jit(lambda x: x + 2)(1), len(filled) > 0)
"""
    assert python(code) == ["2", "0", "3", "True"]


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.prepare()
    heap.fill_holes()
