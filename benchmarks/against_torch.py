"""Network call, training step and sampling of this library beside diffusers' UNet2DModel in torch, on a CPU.

    python benchmarks/against_torch.py [--networks=digits,2.2M,35.7M] [--batches=1,4,16,64] [--rounds=7] [--steps=25]
        [--operations=network,training,sampling] [--out=docs/speed.md]

35.7M is DDPM's network for CIFAR-10, 2.2M the same with a quarter of its width, and digits that of configs/digits.py.
Each side lives in a process of its own, and they work in turns, in an order that turns round as well, of one untimed
and one timed operation, so that a noisy machine slows all of them alike. Torch runs eagerly and under torch.compile, in
the memory layout that is faster for it.

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
_OUT = flags.DEFINE_string("out", None, "A page that takes the table. Default: it is only printed.")
_WORKER = flags.DEFINE_enum("worker", None, ["ours", "eager", "compile"], "Set by the command itself.")

HOW_TO_INSTALL = "torch is not installed: pip install torch==2.13.0, then pip install -e .[reference]"
LONGEST = 60.0
"""Seconds; an operation that takes longer on our side is left out, and said to be."""


def main(_):
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        sys.exit(HOW_TO_INSTALL)
    if _WORKER.value:
        network, batch = NETWORKS[_NETWORKS.value[0]], int(_BATCHES.value[0])
        serve(ours(network, batch) if _WORKER.value == "ours" else in_torch(_WORKER.value, network, batch))
        return
    pages.check(_OUT.value, *PLACE)
    print(machine(), flush=True)
    rows = [HEADER]
    for network in _NETWORKS.value:
        for batch in _BATCHES.value:
            rows += measure(network, batch)
    pages.write(_OUT.value, *PLACE, [*rows, "", f"{machine()}, {time.strftime('%B %Y')}."])


PLACE = ("measured", "against_torch")
HEADER = """| network, batch | operation | ours, ms | ours / eager | ours / compile | others used |
|---|---|---|---|---|---|"""


def measure(network, batch):
    """Rows of the table, one for each operation of a network at a batch; each is printed as soon as it is there."""
    workers = {side: Worker(side, network, batch) for side in _SIDES.value}
    rows = []
    for operation in _OPERATIONS.value:
        first = {side: worker.seconds(operation) for side, worker in workers.items()}  # compiles
        if first[_SIDES.value[0]] > LONGEST:
            print(f"{network}, {batch}: {operation} takes {first[_SIDES.value[0]]:.0f} s and is left out", flush=True)
            continue
        others = Others([worker.process.pid for worker in workers.values()])
        rounds = []
        for number in range(_ROUNDS.value):
            turn = list(workers) if number % 2 else list(workers)[::-1]
            rounds.append({side: workers[side].seconds(operation) for side in turn})
        rows.append(row(f"{network}, {batch}", operation, rounds, others.share()))
        print(rows[-1], flush=True)
    for worker in workers.values():
        worker.close()
    return rows


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
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


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
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(f"{network}, {batch}, {side}: {self._answer()}", flush=True)

    def seconds(self, operation):
        print(operation, file=self.process.stdin, flush=True)
        return float(self._answer())

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        sys.exit("a side of the benchmark stopped; its error is above")


def serve(side):
    """Answers operations from standard input with their seconds. `side` is (description, name -> function)."""
    description, operations = side
    print("=", description, flush=True)
    for line in sys.stdin:
        operation = operations[line.strip()]
        operation()  # threads awake, memory and caches its own again
        start = time.perf_counter()
        operation()
        print("=", time.perf_counter() - start, flush=True)


def ours(network, batch):
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
    model = network.ours()
    apply_fn = as_apply_fn(model)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), devices.batch_sharding(mesh)
    params = jax.device_put(init(model, shape), everywhere)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (batch, *shape)), split)
    t = jax.device_put(jnp.full((batch,), 500.0), split)
    schedule = schedules.linear()
    table = solvers.ddim(schedule, timesteps.uniform(schedule, _STEPS.value))
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
        operations["training"] = training_step(model, params, mesh, batch, shape)
    return f"{count:,} parameters, jax {jax.__version__}, {devices.describe(mesh)}", operations


def in_torch(side, network, batch):
    """diffusers' UNet2DModel in torch, eager or compiled, on all cores, in the faster memory layout."""
    import torch

    sys.modules["torchvision"] = None  # not needed, and one that was built for another torch fails to import
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    candidates = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model = torch_unet(network).to(memory_format=layout)
        x = torch.randn(batch, network.image[-1], *network.image[:2]).contiguous(memory_format=layout)
        t = torch.full((batch,), 500)
        run = torch_training_step(model, x)
        run()
        start = time.perf_counter()
        run()
        candidates[layout] = time.perf_counter() - start, model, x, t
    layout = min(candidates, key=lambda layout: candidates[layout][0])
    _, model, x, t = candidates[layout]
    count = sum(p.numel() for p in model.parameters())
    called = torch.compile(model) if side == "compile" else model
    operations = {
        "training": torch_training_step(called, x),
        "network": lambda: torch_network(called, x, t),
        "sampling": lambda: torch_sampling(called, x),
    }
    import diffusers

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{count:,} parameters, {versions}, {torch.get_num_threads()} threads, {layout}", operations


def torch_unet(network):
    """UNet2DModel in the layout of `network`; that of 35.7M has the config of google/ddpm-cifar10-32."""
    from diffusers import UNet2DModel

    sizes = [network.image[0] // 2**level for level in range(len(network.multipliers))]
    attention = ["Attn" if size in network.attention else "" for size in sizes]
    return UNet2DModel(
        sample_size=network.image[0],
        in_channels=network.image[-1],
        out_channels=network.image[-1],
        block_out_channels=[network.width * m for m in network.multipliers],
        layers_per_block=network.num_blocks,
        down_block_types=[f"{kind}DownBlock2D" for kind in attention],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attention)],
        attention_head_dim=None,
        norm_num_groups=min(32, network.width // 4),
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def torch_training_step(network, x):
    """A function that makes one step: noise, mse, gradient, clip, Adam, EMA."""
    import torch

    params = list(network.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4)
    ema = [p.detach().clone() for p in params]

    def run():
        t = torch.randint(1, 1001, (x.shape[0],))
        signal = torch.cos(t / 1000 * torch.pi / 2)[:, None, None, None]
        noise = torch.randn_like(x)
        predicted = network(signal * x + torch.sqrt(1 - signal**2) * noise, t).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 0.001)

    return run


def torch_network(network, x, t):
    import torch

    with torch.inference_mode():
        network(x, t)


def torch_sampling(network, x):
    """diffusers' DDIM loop."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(_STEPS.value)
    sample = torch.randn_like(x)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            sample = scheduler.step(network(sample, t).sample, t, sample).prev_sample


if __name__ == "__main__":
    app.run(main)
