"""Network call, training step and sampling of this library beside diffusers' UNet2DModel in torch, on a CPU or GPU.

    python benchmarks/against_torch.py [--networks=digits,2.2M,35.7M] [--batches=1,4,16,64] [--rounds=7] [--steps=25]
        [--operations=network,training,sampling] [--device=gpu] [--dtype=bfloat16] [--out=docs/speed.md]

35.7M is DDPM's network for CIFAR-10, 2.2M the same with a quarter of its width, and digits that of configs/digits.py.
Each side lives in a process of its own, and they work in turns, in an order that turns round as well, of one untimed
operation and as many timed ones as take a third of a second or longer, so that a noisy machine slows all of them alike.
Torch runs eagerly and under torch.compile, in the memory layout that is faster for it. On a GPU torch.compile captures
CUDA graphs, except in training, and all that compiles does so before anything is timed. In bfloat16 both sides train
with weights of float32, and draw with weights of bfloat16.

A ratio is ours / torch, below 1 where ours is faster: the median of the paired ratios, with an interval that holds it
in 95 % of the cases. Where that is wider than a tenth, no ratio is printed. The last column is the share of the cores
that other programs used meanwhile. --out writes the rows into a page, between the marks "measured: against_torch" and
"measured: end". The digits and the 2.2M network take about half an hour on two cores, the 35.7M one longer.
"""

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time

import in_torch
import pages
from absl import app, flags
from networks import NETWORKS
from paired import OTHERS, Others, ratio

_NETWORKS = flags.DEFINE_list("networks", ["digits", "2.2M", "35.7M"], "Which networks.")
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "Images at a time.")
_STEPS = flags.DEFINE_integer("steps", 25, "DDIM steps of an operation of sampling.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each operation.", lower_bound=1)
_SIDES = flags.DEFINE_list("sides", ["ours", "eager", "compile"], "Which take part; ratios need ours.")
_OPERATIONS = flags.DEFINE_list("operations", ["network", "training", "sampling"], "What is timed.")
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where both sides work.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the arithmetic.")
_OUT = flags.DEFINE_string("out", None, "A page that takes the table. Default: it is only printed.")
_WORKER = flags.DEFINE_enum("worker", None, ["ours", "eager", "compile"], "Set by the command itself.")

HOW_TO_INSTALL = "torch is not installed: pip install torch==2.13.0, then pip install -e .[reference]"
TURN = 0.3
"""Seconds that a timed turn lasts at least."""

LONGEST = 60.0
"""Seconds; an operation that takes longer on our side is left out, and said to be."""


def main(_):
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        sys.exit(HOW_TO_INSTALL)
    if _WORKER.value:
        network, batch = NETWORKS[_NETWORKS.value[0]], int(_BATCHES.value[0])
        asked = network, batch, _STEPS.value, _DTYPE.value
        serve(ours(*asked) if _WORKER.value == "ours" else in_torch.side(*asked, _WORKER.value, _DEVICE.value))
        return
    pages.check(_OUT.value, *PLACE)
    print(machine(), flush=True)
    rows = [HEADER]
    for network in _NETWORKS.value:
        # Sides of several batches side by side would not fit the memory of most CPUs.
        together = [_BATCHES.value] if _DEVICE.value == "gpu" else [[batch] for batch in _BATCHES.value]
        for batches in together:
            rows += measure(network, batches)
    pages.write(_OUT.value, *PLACE, [*rows, "", f"{machine()}, {time.strftime('%B %Y')}."])


PLACE = ("measured", "against_torch")
HEADER = """| network, batch | operation | ours, ms | ours / eager | ours / compile | others used |
|---|---|---|---|---|---|"""


def measure(network, batches):
    """Rows of the table, one for each batch and operation of a network; each is printed as soon as it is there."""
    workers = {(batch, side): Worker(side, network, batch) for side in _SIDES.value for batch in batches}
    for worker in workers.values():
        worker.introduce()
    first = compile_all(workers)
    rows = []
    for batch in batches:
        sides = {side: workers[batch, side] for side in _SIDES.value}
        for operation in _OPERATIONS.value:
            if (seconds := first[batch, _SIDES.value[0], operation]) > LONGEST:
                print(f"{network}, {batch}: {operation} takes {seconds:.0f} s and is left out", flush=True)
                continue
            others = Others([worker.process.pid for worker in workers.values()])
            rounds = []
            for number in range(_ROUNDS.value):
                turn = list(sides) if number % 2 else list(sides)[::-1]
                rounds.append({side: sides[side].seconds(operation) for side in turn})
            rows.append(row(f"{network}, {batch}", operation, rounds, others.share()))
            print(rows[-1], flush=True)
    for worker in workers.values():
        worker.close()
    return rows


def compile_all(workers):
    """Makes each operation for the first time; one side after the other, of each all batches at once.

    Returns (batch, side, operation) -> seconds of a call that needs no compilation.
    """
    first = {}
    for operation in _OPERATIONS.value:
        for side in _SIDES.value:
            asked = {which: worker for which, worker in workers.items() if which[1] == side}
            for worker in asked.values():
                worker.ask(operation)
            for which, worker in asked.items():
                first[*which, operation] = float(worker.answer())
    return first


def row(name, operation, rounds, share):
    """One row: our median, and ours over each of torch's."""
    seconds = {side: [each[side] for each in rounds] for side in rounds[0]}
    first = next(iter(seconds.values()))
    cells = [name, operation, f"{statistics.median(first) * 1e3:.3g}"]
    for side in ("eager", "compile"):
        known = "ours" in seconds and side in seconds
        cells.append(ratio(seconds["ours"], seconds[side]).text() if known else "")
    cells.append(f"{share:.0%}" + (" (too much)" if share > OTHERS else ""))
    return f"| {' | '.join(cells)} |"


def machine():
    """Cores, processor and Python's version."""
    model = "".join(line.split(":", 1)[1].strip() for line in processor_lines()[:1]) or platform.machine()
    cores = f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"
    if _DEVICE.value == "cpu":
        return cores
    import torch

    return f"{torch.cuda.get_device_name()}, {_DTYPE.value}, {cores}"


def processor_lines():
    try:
        with open("/proc/cpuinfo") as file:
            return [line for line in file if line.startswith("model name")]
    except OSError:
        return []


class Worker:
    """A process that holds one side; it answers the name of an operation with the seconds that it took."""

    def __init__(self, side, network, batch):
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--worker={side}"]
        command += [f"--networks={network}", f"--batches={batch}"]
        # Several processes share a GPU, of which JAX would else take three quarters at once.
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.name = f"{network}, {batch}, {side}"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def introduce(self):
        print(f"{self.name}: {self.answer()}", flush=True)

    def seconds(self, operation):
        self.ask(operation)
        return float(self.answer())

    def ask(self, operation):
        print(operation, file=self.process.stdin, flush=True)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        sys.exit(f"{self.name} stopped; its error is above")


def serve(side):
    """Answers operations from standard input with their seconds. `side` is (description, name -> function)."""
    description, operations = side
    print("=", description, flush=True)
    for line in sys.stdin:
        operation, times = operations[line.strip()], 1
        operation()  # threads awake, memory and caches its own again
        start = time.perf_counter()
        operation()
        while (passed := time.perf_counter() - start) < TURN:
            operation()
            times += 1
        print("=", passed / times, flush=True)


def ours(network, batch, steps, dtype):
    """This library, over one device per core."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from train_step import init, training_step

    import diffusion
    from diffusion import devices, schedules, solvers, timesteps
    from diffusion.models import as_apply_fn

    devices.prepare()
    mesh = devices.training_mesh(batch)
    shape = network.image
    model = network.ours(dtype=dtype)
    apply_fn = as_apply_fn(model)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), devices.batch_sharding(mesh)
    weights = init(model, shape)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype if leaf.ndim > 1 else leaf.dtype), weights)
    params = jax.device_put(params, everywhere)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (batch, *shape)), split)
    t = jax.device_put(jnp.full((batch,), 500.0), split)
    schedule = schedules.linear()
    table = solvers.ddim(schedule, timesteps.uniform(schedule, steps))
    keys = jax.device_put(jnp.arange(batch), split)

    def sampling(params, key, ids):
        return diffusion.sample(apply_fn, params, table, key, batch, shape, sample_ids=ids)

    bare, sampling = jax.jit(apply_fn), jax.jit(sampling)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    operations = {
        "network": lambda: jax.block_until_ready(bare(params, x, t)),
        "sampling": lambda: jax.block_until_ready(sampling(params, jax.random.key(2), keys)),
    }
    if "training" in _OPERATIONS.value:
        operations["training"] = training_step(model, weights, mesh, batch, shape)
    return f"{count:,} parameters, jax {jax.__version__}, {devices.describe(mesh)}", operations


if __name__ == "__main__":
    app.run(main)
