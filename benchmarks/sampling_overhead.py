"""What the scan costs beside the network: seconds of sampling over seconds of as many bare jitted network calls.

    python benchmarks/sampling_overhead.py [--batch=64] [--steps=25] [--width=32] [--size=32] [--repeats=9]
        [--samplers=ddim,unipc]

Runs both in turns in one process and prints the median ratio with its quartiles; 1.00 means that the scan, the table's
arithmetic and the noise cost nothing. The memory figures show that only the registers are carried.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

import diffusion
from diffusion import schedules, solvers, timesteps
from diffusion.models import UNet, as_apply_fn

_BATCH = flags.DEFINE_integer("batch", 64, "Images at a time.")
_STEPS = flags.DEFINE_integer("steps", 25, "Sampling steps.")
_WIDTH = flags.DEFINE_integer("width", 32, "Base width of DDPM's CIFAR-10 UNet.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed pairs.")
_SAMPLERS = flags.DEFINE_list("samplers", ["ddim", "ddpm", "dpm_solver_pp", "unipc", "deis", "ipndm"], "Which.")


def main(_):
    batch, steps = _BATCH.value, _STEPS.value
    shape = (_SIZE.value, _SIZE.value, 3)
    model = UNet(width=_WIDTH.value)
    apply_fn = as_apply_fn(model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones((1,)))["params"]
    schedule = schedules.linear()
    network = jax.jit(apply_fn)
    x, t = jax.random.normal(jax.random.key(1), (batch, *shape)), jnp.full((batch,), 500.0)

    def bare(calls):
        for _ in range(calls):
            out = network(params, x, t)
        return out

    def run(table):
        return diffusion.sample(apply_fn, params, table, jax.random.key(2), batch, shape, clip="recompute")

    device = jax.devices()[0].device_kind
    print(f"UNet of width {_WIDTH.value}, batch {batch}, {shape}, {steps} steps, {device}, jax {jax.__version__}")
    for name in _SAMPLERS.value:
        table = solvers.SOLVERS[name](schedule, timesteps.uniform(schedule, steps))
        seconds(bare, 1), seconds(run, table)  # compile
        pairs = [(seconds(bare, table.nfe), seconds(run, table)) for _ in range(_REPEATS.value)]
        low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        bare_seconds, run_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        longer = solvers.SOLVERS[name](schedule, timesteps.uniform(schedule, 4 * steps))
        memory = [working_memory(apply_fn, params, one, batch, shape) / 2**20 for one in (table, longer)]
        print(
            f"{name:16} {table.num_registers} registers: {table.nfe} bare calls {bare_seconds:.3f} s, sampling "
            f"{run_seconds:.3f} s, ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f}); working memory "
            f"{memory[0]:.1f} MiB, {memory[1]:.1f} with four times the steps"
        )


def seconds(function, argument):
    start = time.perf_counter()
    jax.block_until_ready(function(argument))
    return time.perf_counter() - start


def working_memory(apply_fn, params, table, batch, shape):
    """Bytes that the compiled sampler needs besides its arguments and results."""
    run = jax.jit(lambda params, key: diffusion.sample(apply_fn, params, table, key, batch, shape))
    return run.lower(params, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    app.run(main)
