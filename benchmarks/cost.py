"""What training and sampling should cost on an accelerator, computed from counted FLOPs and bytes; nothing is timed.

    python benchmarks/cost.py [--networks=2.2M,35.7M] [--batches=1,128] [--steps=25] [--out=docs/cost.md]

FLOPs are counted by XLA in the program as it is written, bytes in the program as it is compiled here: what each fused
operation reads and writes. In bfloat16 these are half as many, but for parameters, averages and the optimizer's state,
which stay float32. An operation takes at least FLOPs over the peak of the device, and at least bytes over its
bandwidth; the expected time is the larger of the two. --out writes the table into a page, between the marks "computed:
cost" and "computed: end".

    python benchmarks/cost.py --memory --networks=35.7M --batches=16

prints instead how much memory the compiled training step needs under each policy of config.model.remat.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pages
from absl import app, flags
from networks import NETWORKS
from train_step import init, lowered_step

from diffusion import devices
from diffusion.models import as_apply_fn
from diffusion.models.remat import POLICIES

_NETWORKS = flags.DEFINE_list("networks", ["2.2M", "35.7M"], "Which networks, see networks.py.")
_BATCHES = flags.DEFINE_list("batches", ["1", "128"], "Images at a time.")
_STEPS = flags.DEFINE_integer("steps", 25, "Network calls of a sampling.")
_MEMORY = flags.DEFINE_bool("memory", False, "Print the memory of the training step under each remat policy.")
_OUT = flags.DEFINE_string("out", None, "A page that takes the table. Default: it is only printed.")


class Device(NamedTuple):
    """What a device can do at most.

    Attributes:
      name: what it is called.
      flops: products and sums of matrices a second, in bfloat16.
      bandwidth: bytes a second, from and to its memory.
    """

    name: str
    flops: float
    bandwidth: float


DEVICES = (
    Device("H100 SXM", 989e12, 3.35e12),  # NVIDIA's data sheet, without sparsity
    Device("TPU v5e", 197e12, 819e9),  # cloud.google.com/tpu/docs/v5e
)
PLACE = ("computed", "cost")
HEADER = """| network | operation, batch | GFLOP | GB | {} |
|---|---|---|---|{}"""


def main(_):
    jax.config.update("jax_num_cpu_devices", 1)
    if _MEMORY.value:
        print_memory()
        return
    pages.check(_OUT.value, *PLACE)
    rows = [HEADER.format(" | ".join(f"{device.name}, ms" for device in DEVICES), "---|" * len(DEVICES))]
    print(rows[0])
    for name in _NETWORKS.value:
        for batch in map(int, _BATCHES.value):
            call = count(lowered_call(NETWORKS[name], batch))
            step = count(lowered_step(NETWORKS[name].ours(), devices.training_mesh(1), batch, NETWORKS[name].image))
            sampling = Count(*(_STEPS.value * number for number in call))
            for operation, counted in (("training step", step), (f"{_STEPS.value} network calls", sampling)):
                rows.append(row(name, f"{operation}, {batch}", counted))
                print(rows[-1], flush=True)
    pages.write(_OUT.value, *PLACE, rows)


class Count(NamedTuple):
    """What a program does: operations on numbers, and bytes that it reads and writes in bfloat16."""

    flops: float
    moved: float


def count(lowered):
    """Counts a program of one device that was written for float32."""
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    stay = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Count(lowered.cost_analysis()["flops"], (compiled.cost_analysis()["bytes accessed"] + stay) / 2)


def lowered_call(network, batch):
    """The program of one network call."""
    model = network.ours()
    params = jax.eval_shape(lambda: init(model, network.image))
    x, t = (jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in (network.image, ()))
    return jax.jit(as_apply_fn(model)).lower(params, x, t)


def row(name, operation, counted):
    """One row; a time is followed by what limits it."""
    cells = []
    for device in DEVICES:
        times = {"FLOPs": counted.flops / device.flops, "bytes": counted.moved / device.bandwidth}
        limit = max(times, key=times.get)
        cells.append(f"{1e3 * times[limit]:,.2f} ({limit})")
    return f"| {name} | {operation} | {counted.flops / 1e9:,.1f} | {counted.moved / 1e9:,.2f} | {' | '.join(cells)} |"


def print_memory():
    """Prints what each policy keeps for the backward pass, and the memory of the compiled training step."""
    print("| network, batch | remat | kept for the backward pass, MiB | working memory, MiB | GFLOP |")
    print("|---|---|---|---|---|")
    for name in _NETWORKS.value:
        for batch in map(int, _BATCHES.value):
            for remat in POLICIES:
                network, model = NETWORKS[name], NETWORKS[name].ours(remat=remat)
                lowered = lowered_step(model, devices.training_mesh(1), batch, network.image)
                memory = lowered.compile().memory_analysis().temp_size_in_bytes
                cells = [f"{size / 2**20:,.0f}" for size in (kept(model, batch, network.image), memory)]
                flops = lowered.cost_analysis()["flops"] / 1e9
                print(f"| {name}, {batch} | {remat} | {' | '.join(cells)} | {flops:,.0f} |", flush=True)


def kept(model, batch, image):
    """Bytes that a network call leaves for its backward pass, besides the parameters."""
    params = jax.eval_shape(lambda: init(model, image))

    def backward(params):
        call = partial(as_apply_fn(model), x=jnp.zeros((batch, *image)), t=jnp.ones(batch))
        return jax.vjp(lambda params: call(params), params)[1]

    sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (jax.eval_shape(backward, params), params)
    ]
    return sizes[0] - sizes[1]


if __name__ == "__main__":
    app.run(main)
