"""What a compilation costs the program that it made: training steps before and after the heap's holes are filled.

    python benchmarks/after_compiling.py [--network=2.2M] [--batch=64] [--steps=15]

Times the training step in the process that has just compiled it, with the heap as the compiler left it, and again
after `heap.fill_holes`. Last comes a process that has the program from the cache, where filling changes nothing. It
takes about three minutes on two cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags
from networks import NETWORKS
from train_step import init, training_step

from diffusion import devices, heap

_NETWORK = flags.DEFINE_enum("network", "2.2M", list(NETWORKS), "Which network.")
_BATCH = flags.DEFINE_integer("batch", 64, "Images at a time.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 15, "Timed steps of each kind.", lower_bound=2)
_WORKER = flags.DEFINE_bool("worker", False, "Set by the command itself.")


def main(_):
    if _WORKER.value:
        measure()
        return
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        for process in ("the process that compiles it", "a process that has it from the cache"):
            print(f"{_NETWORK.value}, {_BATCH.value} images, in {process}:", flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker"], env=env, check=True)


def measure():
    """Prints the seconds of a step with the holes and without."""
    fill, heap.fill_holes = heap.fill_holes, lambda: None
    devices.prepare()
    network, mesh = NETWORKS[_NETWORK.value], devices.training_mesh(_BATCH.value)
    model = network.ours()
    step = training_step(model, init(model, network.image), mesh, _BATCH.value, network.image)
    step()
    report("as it is left", step)
    start = time.perf_counter()
    fill()
    print(f"  filled in {time.perf_counter() - start:.2f} s")
    report("holes filled ", step)


def report(name, step):
    seconds = []
    step()
    for _ in range(_STEPS.value):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    low, *_, high = statistics.quantiles(seconds)
    middle = statistics.median(seconds)
    print(f"  {name}: {1e3 * middle:.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f}), {resident():.1f} GiB")


def resident():
    """GiB of memory that this process holds; 0 on a system that does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0


if __name__ == "__main__":
    app.run(main)
