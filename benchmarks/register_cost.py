"""What a table with a register for every stage costs: time of sampling over time of as many bare network calls.

    python benchmarks/register_cost.py [--batches=64,256] [--calls=5,10] [--pairs=31] [--network=digits]

Takes a full-history table, which keeps all earlier estimates, of S calls in S registers, and times it and S bare jitted
calls of the network in turns; prints the median of the ratios of neighbours with its quartiles, once of the seconds
that pass and once of the seconds that processors work, which other programs on the machine change less. The network is
that of the digits that ship, or with --network=small that of configs/small.py, untrained.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import diffusion
from diffusion import devices, pretrained, schedules, timesteps
from diffusion.learning.family import Family
from diffusion.model import Model, pixels
from diffusion.models import UNet, as_apply_fn
from diffusion.solvers import dpm_solver_pp
from diffusion.solvers.history import to_table

_BATCHES = flags.DEFINE_list("batches", ["64", "256"], "Images at a time.")
_CALLS = flags.DEFINE_list("calls", ["5", "10"], "Network calls S, and registers.")
_PAIRS = flags.DEFINE_integer("pairs", 31, "Timed pairs.")
_NETWORK = flags.DEFINE_enum("network", "digits", ["digits", "small"], "Which network.")


def main(_):
    devices.prepare()
    model, params = make_network(_NETWORK.value)
    print(f"network {_NETWORK.value}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {_PAIRS.value} pairs")
    for batch in map(int, _BATCHES.value):
        for calls in map(int, _CALLS.value):
            table = full_history(model.schedule, calls)
            passed, worked = np.percentile(ratios(model, params, table, batch, _PAIRS.value), [50, 25, 75], axis=0).T
            print(
                f"batch {batch}, {calls} calls, {table.num_registers} registers: "
                "{:.3f} (quartiles {:.3f} to {:.3f}) of the time that passes, ".format(*passed)
                + "{:.3f} ({:.3f} to {:.3f}) of that worked".format(*worked),
                flush=True,
            )


def make_network(name):
    if name == "digits":
        trained = pretrained.load("digits")
        return trained.model, trained.params
    network, shape = UNet(width=16, multipliers=(1, 2, 4, 8), num_blocks=1, attention_resolutions=(8,)), (32, 32, 3)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones((1,)))["params"]
    return Model(as_apply_fn(network), schedules.cosine(), pixels(shape), "v"), params


def full_history(schedule, calls):
    """A table whose every row has a weight for every earlier estimate."""
    family = Family(schedule, dpm_solver_pp, np.asarray(timesteps.uniform(schedule, calls), np.float64), {"order": 2})
    return to_table(family.history(np.full(family.size, 0.01)), "full history")


def ratios(model, params, table, batch, pairs):
    """Ratios [pairs, 2] of sampling to bare calls, of time passed and worked; the order changes with every pair."""
    network, shape = jax.jit(model.apply_fn), model.image_shape
    x, times = jax.random.normal(jax.random.key(1), (batch, *shape)), [jnp.full(batch, t) for t in table.t]

    def bare():
        for t in times:
            out = network(params, x, t)
        return out

    def run():
        options = {"prediction": model.prediction, "clip": "recompute"}
        return diffusion.sample(model.apply_fn, params, table, jax.random.key(2), batch, shape, **options)

    seconds(bare), seconds(run)  # compile
    result = []
    for number in range(pairs):
        taken = {function: seconds(function) for function in ((bare, run) if number % 2 else (run, bare))}
        result.append(taken[run] / taken[bare])
    return np.array(result)


def seconds(function):
    """Seconds [2] that pass, and that the processors work for this program."""
    clocks = time.perf_counter, time.process_time
    start = [clock() for clock in clocks]
    jax.block_until_ready(function())
    return np.array([clock() - begun for clock, begun in zip(clocks, start, strict=True)])


if __name__ == "__main__":
    app.run(main)
