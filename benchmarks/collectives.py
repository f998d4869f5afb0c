"""What devices say to each other in one training step: the collectives of the compiled program, counted on CPU devices.

    python benchmarks/collectives.py [--networks=2.2M] [--devices=8] [--fsdp=1,2,8] [--batch=64]

Nothing runs: the step is compiled for so many devices of a CPU, and the operations between devices are counted in its
text, with the bytes of their results on each device. fsdp=1 is plain data parallelism. An operation that overlaps with
others is one whose beginning and end are two operations in the text, as on accelerators.
"""

import re
from collections import defaultdict

import jax
import numpy as np
from absl import app, flags
from networks import NETWORKS
from train_step import lowered_step

from diffusion import devices

_NETWORKS = flags.DEFINE_list("networks", ["2.2M"], "Which networks, see networks.py.")
_DEVICES = flags.DEFINE_integer("devices", 8, "CPU devices.", lower_bound=1)
_FSDP = flags.DEFINE_list("fsdp", ["1", "2", "8"], "Over how many of them the state is sharded.")
_BATCH = flags.DEFINE_integer("batch", 64, "Images in a step.", lower_bound=1)

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
SHAPE = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")


def main(_):
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    print("| network | fsdp | collectives of a step | MiB on each device |")
    print("|---|---|---|---|")
    for name in _NETWORKS.value:
        network = NETWORKS[name]
        for fsdp in map(int, _FSDP.value):
            mesh = devices.training_mesh(_BATCH.value, fsdp)
            found = collectives(lowered_step(network.ours(), mesh, _BATCH.value, network.image).compile().as_text())
            counts = ", ".join(f"{len(sizes)} {kind}" for kind, sizes in found.items()) or "none"
            size = ", ".join(f"{sum(sizes) / 2**20:.1f}" for sizes in found.values())
            print(f"| {name} | {fsdp} | {counts} | {size} |", flush=True)


def collectives(text):
    """The bytes of each collective's result on a device, by kind of collective."""
    found = defaultdict(list)
    for shapes, kind, _ in COLLECTIVE.findall(text):
        found[kind].append(sum(_bytes(bits, sides) for _, bits, sides in SHAPE.findall(shapes)))
    return dict(sorted(found.items()))


def _bytes(bits, sides):
    return int(bits or 8) // 8 * int(np.prod([int(side) for side in sides.split(",") if side]))


if __name__ == "__main__":
    app.run(main)
