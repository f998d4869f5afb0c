"""Training step, network call and 25-step DDIM of this library beside diffusers' UNet2DModel in torch, on CPU.

    python benchmarks/against_torch.py [--width=128] [--batch=16] [--repeats=5] [--steps=25] [--sampling_repeats=3]

Width 128 is DDPM's CIFAR-10 UNet of 35.7M parameters, width 32 one of 2.2M. Each side lives in a process of its own,
and they work in turns of one untimed and one timed operation, so that a noisy machine slows all of them alike. Torch
runs eagerly and under torch.compile, in the memory layout that is faster for it. The table has medians, and medians of
the paired ratios ours/torch: below 1, ours is faster. About 15 minutes for width 128 on two cores.
"""

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time

from absl import app, flags

_WIDTH = flags.DEFINE_integer("width", 128, "Base width of DDPM's CIFAR-10 UNet.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images at a time.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images.")
_STEPS = flags.DEFINE_integer("steps", 25, "DDIM steps.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds of training steps and network calls.")
_SAMPLING_REPEATS = flags.DEFINE_integer("sampling_repeats", 3, "Timed rounds of sampling; 0 leaves it out.")
_SIDES = flags.DEFINE_list("sides", ["ours", "eager", "compile"], "Which take part; ratios need ours.")
_OPERATIONS = flags.DEFINE_list("operations", ["training", "network", "sampling"], "What is timed.")
_WORKER = flags.DEFINE_enum("worker", None, ["ours", "eager", "compile"], "Set by the command itself.")

HOW_TO_INSTALL = "torch is not installed: pip install torch==2.13.0, then pip install -e .[reference]"


def main(_):
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        sys.exit(HOW_TO_INSTALL)
    if _WORKER.value:
        serve(ours() if _WORKER.value == "ours" else in_torch(_WORKER.value))
        return
    print(f"{machine()}; width {_WIDTH.value}, batch {_BATCH.value}, {_SIZE.value}x{_SIZE.value}x3, float32")
    workers = {side: Worker(side) for side in _SIDES.value}
    for operation in _OPERATIONS.value:
        repeats = _SAMPLING_REPEATS.value if operation == "sampling" else _REPEATS.value
        if repeats:
            for worker in workers.values():
                worker.seconds(operation)  # compile
            rounds = [{side: worker.seconds(operation) for side, worker in workers.items()} for _ in range(repeats)]
            report(operation, rounds)


def report(operation, rounds):
    """One line: every side's median seconds, and ours over torch's as a median of paired ratios."""
    cells = [f"{side} {statistics.median(r[side] for r in rounds):8.3f} s" for side in rounds[0]]
    if "ours" in rounds[0]:
        for side in rounds[0].keys() - {"ours"}:
            cells.append(f"ours/{side} {statistics.median(r['ours'] / r[side] for r in rounds):.2f}")
    print(f"{operation:10}", *cells, sep="  ", flush=True)


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

    def __init__(self, side):
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--worker={side}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(f"{side}: {self._answer()}", flush=True)

    def seconds(self, operation):
        print(operation, file=self.process.stdin, flush=True)
        return float(self._answer())

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


def ours():
    """This library, over one device per core."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from train_step import init, training_step

    import diffusion
    from diffusion import devices, schedules, solvers, timesteps
    from diffusion.models import UNet, as_apply_fn

    devices.prepare()
    mesh = devices.training_mesh(_BATCH.value)
    shape = (_SIZE.value, _SIZE.value, 3)
    model = UNet(width=_WIDTH.value)
    apply_fn = as_apply_fn(model)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), devices.batch_sharding(mesh)
    params = jax.device_put(init(model, _SIZE.value), everywhere)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (_BATCH.value, *shape)), split)
    t = jax.device_put(jnp.full((_BATCH.value,), 500.0), split)
    schedule = schedules.linear()
    table = solvers.ddim(schedule, timesteps.uniform(schedule, _STEPS.value))
    keys = jax.device_put(jnp.arange(_BATCH.value), split)

    def sampling(params, key, ids):
        return diffusion.sample(apply_fn, params, table, key, _BATCH.value, shape, sample_ids=ids)

    network, sampling = jax.jit(apply_fn), jax.jit(sampling)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    operations = {
        "network": lambda: jax.block_until_ready(network(params, x, t)),
        "sampling": lambda: jax.block_until_ready(sampling(params, jax.random.key(2), keys)),
    }
    if "training" in _OPERATIONS.value:
        operations["training"] = training_step(model, params, mesh, _BATCH.value, _SIZE.value)
    return f"{count:,} parameters, jax {jax.__version__}, {devices.describe(mesh)}", operations


def in_torch(side):
    """diffusers' UNet2DModel in torch, eager or compiled, on all cores, in the faster memory layout."""
    import torch

    sys.modules["torchvision"] = None  # not needed, and one that was built for another torch fails to import
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    candidates = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model = torch_unet().to(memory_format=layout)
        x = torch.randn(_BATCH.value, 3, _SIZE.value, _SIZE.value).contiguous(memory_format=layout)
        t = torch.full((_BATCH.value,), 500)
        run = torch_training_step(model, x)
        run()
        start = time.perf_counter()
        run()
        candidates[layout] = time.perf_counter() - start, model, x, t
    layout = min(candidates, key=lambda layout: candidates[layout][0])
    _, model, x, t = candidates[layout]
    count = sum(p.numel() for p in model.parameters())
    network = torch.compile(model) if side == "compile" else model
    operations = {
        "training": torch_training_step(network, x),
        "network": lambda: torch_network(network, x, t),
        "sampling": lambda: torch_sampling(network, x),
    }
    import diffusers

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{count:,} parameters, {versions}, {torch.get_num_threads()} threads, {layout}", operations


def torch_unet():
    """UNet2DModel in the layout of DDPM's CIFAR-10 network (the config of google/ddpm-cifar10-32)."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=_SIZE.value,
        block_out_channels=[_WIDTH.value * m for m in (1, 2, 2, 2)],
        layers_per_block=2,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=None,
        norm_num_groups=min(32, _WIDTH.value // 4),
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
