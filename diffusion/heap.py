"""Keeps the heap of the C library fast for programs that compute on a CPU, where that library is glibc."""

import ctypes
import functools
import resource

import jax

# Parameters of glibc's mallopt (malloc.h).
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1

ADDRESSES = resource.RLIMIT_AS, resource.RLIMIT_DATA
"""What limits the heap's length."""

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
    no memory given back but after a compilation.

    What that leaves behind of a compilation, `fill_holes` takes care of.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
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
    """Gives the system back what is free in the heap, and takes the small holes that are left out of use.

    A compiler leaves a hundred thousand holes of all sizes. A training step asks for a hundred thousand blocks, of
    which ten thousand have 64 to 256 KiB. For these glibc looks through the holes of about that size, one by one, for
    the smallest that is large enough; and blocks from small holes lie all over the memory. The same program took 1.3
    times as long in the process that had compiled it as in one that had it from the cache
    (benchmarks/after_compiling.py). So each hole is allocated and never used. Without its pages that costs addresses
    and hardly any memory, and what the process asks for from now on comes from large holes and the end of the heap.

    Nothing happens where addresses are limited (`ulimit -v`, `ulimit -d`), or where memory is not from glibc 2.33 or
    later. A thread that had a heap of its own before `prepare` fills none.
    """
    libc = _glibc()
    if libc is None or any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in ADDRESSES):
        return
    libc.malloc_trim(0)
    end, usage = libc.sbrk(0), libc.mallinfo2()
    if end is None or end >= 2**63 or libc.sbrk(0) != end:  # no such heap, or another thread makes it larger just now
        return
    # What lies between start and end, but not in the free part at its end, is a hole. Other threads work meanwhile, so
    # no more is taken than was free before.
    start, end, left = end - usage.heap, end - usage.top, usage.free - usage.top

    def take(size):
        """Returns a hole of this size, or None where there is none."""
        block = libc.malloc(size)
        if block is None or start <= block < end:
            return block
        libc.free(block)
        return None

    spared, missed, size = [], left, left
    while size >= SMALLEST_HOLE:
        while size <= left and (block := take(size)):
            if size > LARGEST_HOLE:  # the whole of it is set aside, or smaller blocks would be cut from it
                libc.free(block)
                taken, block = _largest(take, libc.free, size, missed)
                spared.append(block)
                left -= taken
            else:
                left -= size
        missed, size = size, size - max(16, size // 8)  # glibc's sizes are multiples of 16
    for block in spared:
        libc.free(block)
    libc.malloc_trim(0)  # what looking for large holes has added at the end


def _largest(take, free, fits, too_large):
    """Returns the size of the largest hole, between one that fits and one that is too large, and the block there."""
    while too_large - fits > 2**16:
        middle = (fits + too_large) // 2
        if (block := take(middle)) is None:
            too_large = middle
        else:
            free(block)
            fits = middle
    return fits, take(fits)


@functools.cache
def _glibc():
    """Returns the C library with the types of what is called, or None where memory is not from glibc 2.33 or later."""
    libc = ctypes.CDLL(None)
    try:
        libc.mallinfo2.restype = _Usage
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        malloc, own = (ctypes.cast(x.malloc, ctypes.c_void_p).value for x in (libc, ctypes.CDLL("libc.so.6")))
    except (AttributeError, OSError):
        return None
    return libc if malloc == own else None  # another allocator may be loaded before it
