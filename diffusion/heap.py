"""Keeps the heap of the C library fast for programs that compute on a CPU, where that library is glibc."""

import ctypes
import functools
import resource

import jax

# Parameters of glibc's mallopt (malloc.h).
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1

COMPILATION = "/jax/core/compile/backend_compile_duration"
"""What JAX reports at the end of a compilation, or of reading a program from the cache."""

COMPILED_FOR = 1.0
"""Seconds of a compilation after which holes are filled; a shorter one leaves few."""

LARGEST_HOLE, SMALLEST_HOLE = 2**23, 32
"""Bytes of the holes that are filled; a larger one is worth having."""


class _Usage(ctypes.Structure):
    """What glibc's mallinfo2 returns; `top` is what is free at the end of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("heap", "holes", "small", "maps", "mapped", "_", "small_free", "used", "free", "top")
    ]


def prepare() -> None:
    """Lets the process keep the memory that it frees, and on a CPU fill the holes in it after each long compilation.

    XLA allocates a program's working memory anew at every call. glibc takes so large a block from the system and gives
    it back each time, and the system fills every page with zeros: a quarter of a million page faults in one training
    step, a tenth to a fifth of its time. So there is one heap for all threads, no block straight from the system, and
    no memory given back. The price is that the process stays as large as it was at its peak.

    What that leaves behind of a compilation, `fill_holes` takes care of.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
        mallopt(parameter, value)
    _listen()


@functools.cache
def _listen():
    """Hears of compilations, once in a process."""

    def hear(event, seconds, **_):
        if event == COMPILATION and seconds >= COMPILED_FOR and jax.default_backend() == "cpu":
            fill_holes()

    jax.monitoring.register_event_duration_secs_listener(hear)


def fill_holes() -> None:
    """Gives the system back what is free in the heap, and takes the holes that are left out of use.

    A compiler leaves a hundred thousand holes of all sizes. A training step asks for a hundred thousand blocks, of
    which ten thousand have 64 to 256 KiB. For these glibc looks through the holes of about that size, one by one, for
    the smallest that is large enough; and blocks from small holes lie all over the memory. The same program took 1.25
    times as long in the process that had compiled it as in one that had it from the cache
    (benchmarks/after_compiling.py). So each hole is allocated and never used. Without its pages that costs addresses
    and hardly any memory, and what the process asks for from now on comes from the end of the heap.

    Nothing happens where addresses are limited (`ulimit -v`), or where memory is not from glibc 2.33 or later.
    """
    libc = _glibc()
    if libc is None or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc.malloc_trim(0)
    usage, end = libc.mallinfo2(), libc.sbrk(0)
    if end is None or end >= 2**63:  # the process has no such heap
        return
    # What lies between start and end, but not in the free part at its end, is a hole. Other threads work meanwhile, so
    # no more is taken than was free before.
    start, end, left = end - usage.heap, end - usage.top, usage.free - usage.top
    size, spared = left, []
    while size >= SMALLEST_HOLE and left > 0:
        while left > 0 and (block := libc.malloc(size)):
            if not start <= block < end:  # no hole of this size is left
                libc.free(block)
                break
            left -= size
            if size > LARGEST_HOLE:  # out of the way, or smaller blocks would be cut from it
                spared.append(block)
        size -= max(16, size // 8)  # glibc's sizes are multiples of 16
    for block in spared:
        libc.free(block)


@functools.cache
def _glibc():
    """Returns the C library with the types of what is called, or None where memory is not from glibc 2.33 or later."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Usage
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        malloc, own = (ctypes.cast(x.malloc, ctypes.c_void_p).value for x in (libc, ctypes.CDLL("libc.so.6")))
    except (AttributeError, OSError, TypeError):
        return None
    return libc if malloc == own else None  # another allocator may be loaded before it
