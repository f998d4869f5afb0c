"""The heap after a compilation: no block comes from a small hole, no memory is held for one, and large ones stay."""

import resource
import subprocess
import sys

import pytest

from diffusion import heap

HOLES = """
import ctypes, resource
from diffusion import heap
libc = heap._glibc()
heap.prepare()
sizes = [20_000 + 997 * k % 400_000 for k in range(400)]
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


@pytest.fixture
def glibc():
    if heap._glibc() is None or any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in heap.ADDRESSES):
        pytest.skip("the C library is none of glibc 2.33 or later, or addresses are limited")


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
def test_a_hole_that_is_worth_having_is_kept_whole():
    code = (
        HOLES
        + """
large = [libc.malloc(size) for size in (2**26, 2**22)]
for k in range(1, 6):
    small = [libc.malloc(size) for size in sizes]
    for block in [large[0], *small[::2]]:
        libc.free(block)
    heap.fill_holes()
    large[0] = libc.malloc(2**26 - k * 2**20)  # what it leaves serves small blocks
    print(large[0] < large[1])
"""
    )
    assert python(code) == ["True"] * 5


@pytest.mark.usefixtures("glibc")
def test_no_more_is_taken_than_was_free():
    """Wherever blocks come from: here those up to 9 MB seem to come from the heap without end."""
    code = """
from diffusion import heap
free, taken = 10_000_000, {}
class Endless:
    def malloc(self, size):
        taken[len(taken)] = size
        return 2**40 + len(taken) if size < 9_000_000 else 2**42
    def free(self, block):
        del taken[len(taken) - 1]
    def sbrk(self, _):
        return 2**41
    def mallinfo2(self):
        return heap._Usage(heap=2**41, free=free, top=0)
    def malloc_trim(self, _):
        pass
heap._glibc = Endless
heap.fill_holes()
print(sum(taken.values()))
"""
    assert 9_000_000 < int(python(code)[0]) <= 10_000_000


@pytest.mark.usefixtures("glibc")
@pytest.mark.parametrize("limit", ["AS", "DATA"])
def test_limited_addresses_are_left_alone(limit):
    code = f"""
import resource
hard = resource.getrlimit(resource.RLIMIT_{limit})[1]
resource.setrlimit(resource.RLIMIT_{limit}, (2**40 if hard == resource.RLIM_INFINITY else hard, hard))
heap.fill_holes()
print(libc.malloc(100_000) < last)
"""
    assert python(HOLES + code) == ["True"]


@pytest.mark.usefixtures("glibc")
def test_only_a_long_compilation_fills_them_and_once():
    code = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
from diffusion import heap
filled, compiled = [], []
heap.fill_holes = lambda: filled.append(1)
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event == heap.COMPILATION))
heap.prepare(), heap.prepare()
for heap.COMPILED_FOR in (1e9, 0):
    filled.clear(), compiled.clear()
    jax.jit(lambda x: x + heap.COMPILED_FOR)(1)
    print(sum(compiled) > 0, len(filled) == (0 if heap.COMPILED_FOR else sum(compiled)))
"""
    assert python(code) == ["True"] * 4


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.fill_holes()
