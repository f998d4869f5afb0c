"""What a device makes of the training step: images a second, the share of its peak, and memory, by batch and dtype.

    python benchmarks/throughput.py [--width=128] [--batches=128,512,1024] [--dtypes=float32,bfloat16] [--peak=989]
        [--together]

Model FLOPs are three times those of the forward pass, whatever is computed again; --peak is the device's, in TFLOP/s of
the dtype (989 for bfloat16 on an H100). A batch that does not fit is said to be too large, and the next one is timed.
Each batch runs in a process of its own, so that memory is its own, too. --together lets all of them compile side by
side, on a device whose memory has place for all, before one after the other is timed.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from train_step import init, training_step

from diffusion import devices
from diffusion.models import UNet, as_apply_fn

_WIDTH = flags.DEFINE_integer("width", 128, "Base width of DDPM's CIFAR-10 UNet.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images.")
_BATCHES = flags.DEFINE_list("batches", ["128", "256", "512", "1024"], "Images at a time.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the arithmetic.")
_REMAT = flags.DEFINE_bool("remat", False, "Compute activations again in the backward pass.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps.")
_PEAK = flags.DEFINE_float("peak", None, "TFLOP/s of all devices, for the share of it.", lower_bound=0)
_TOGETHER = flags.DEFINE_bool("together", False, "Compile all batches and dtypes side by side.")
_ONE = flags.DEFINE_bool("one", False, "Set by the command itself: time the first batch and dtype.")


def main(_):
    if _ONE.value:
        measure(int(_BATCHES.value[0]), _DTYPES.value[0])
        return
    cases = [(dtype, batch) for dtype in _DTYPES.value for batch in _BATCHES.value]
    for group in [cases] if _TOGETHER.value else [[case] for case in cases]:
        with contextlib.ExitStack() as files:
            # In files, as a process that fills a pipe which nobody reads yet would wait for ever.
            errors = {case: files.enter_context(tempfile.TemporaryFile("w+")) for case in group}
            report({case: start(*case, errors[case]) for case in group}, errors)


def report(processes, errors):
    """Prints what each process measures, one after the other once all have compiled; ends with the errors of one."""
    # The first line comes once a process has compiled; it then waits for one from us.
    ready = {case: process.stdout.readline() for case, process in processes.items()}
    for case, process in processes.items():
        rest, _ = process.communicate("go\n" if ready[case] else None)
        errors[case].seek(0)
        if process.returncode and "RESOURCE_EXHAUSTED" not in (text := errors[case].read()):
            sys.exit(text)
        print(rest.strip() or f"{case[0]}, batch {case[1]}: too large for the memory", flush=True)


def start(dtype, batch, errors):
    """A process that measures one case and writes its errors into a file."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--batches={batch}", f"--dtypes={dtype}", "--one"]
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if _TOGETHER.value else None
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    return subprocess.Popen(command, text=True, env=env, **pipes)


def measure(batch, dtype):
    devices.prepare()
    mesh = devices.training_mesh(batch)
    model = UNet(width=_WIDTH.value, dtype=dtype, remat=_REMAT.value)
    params = init(model, (_SIZE.value, _SIZE.value, 3))
    run = training_step(model, params, mesh, batch, (_SIZE.value, _SIZE.value, 3))
    run()  # compiles
    run()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    second = statistics.median(seconds)
    rate = 3 * batch * forward_flops(model, params) / second / 1e12
    share = f", {rate / _PEAK.value:.1%} of the peak" if _PEAK.value else ""
    print(
        f"{dtype}, batch {batch} on {devices.describe(mesh)}: {batch / second:,.1f} images/s, {second * 1e3:,.0f} ms "
        f"a step, {rate:.2f} TFLOP/s{share}, {devices.memory_in_use() / 2**30:.2f} GiB"
    )


def forward_flops(model, params):
    """Of one image, counted in the program as it is written."""
    x, t = jnp.zeros((1, _SIZE.value, _SIZE.value, 3)), jnp.ones((1,))
    return jax.jit(as_apply_fn(model)).lower(params, x, t).cost_analysis()["flops"]


if __name__ == "__main__":
    app.run(main)
