"""What a step costs: sampling takes S network calls and next to nothing besides (DDIM, arXiv:2010.02502, figure 4)."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims.report import Findings, model_facts, new_figure
from diffusion import sample, solvers, timesteps
from diffusion.model import Trained


def measure(
    name: str,
    trained: Trained,
    *,
    batches: Sequence[int] = (1, 8, 64),
    steps: int = 25,
    lengths: Sequence[int] = (10, 20, 50, 100),
    repeats: int = 15,
) -> Findings:
    """Seconds of the compiled scan and of a Python loop, over those of as many bare jitted network calls."""
    model = trained.model
    rows, figure = [], new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    for number, batch in enumerate(batches):
        timed = _contenders(trained, batch, steps)
        bare, loop, scan = _rounds(timed.values(), repeats).T
        ratios = [np.percentile(seconds / bare, [25, 50, 75]) for seconds in (scan, loop)]
        runs = _rounds([partial(_scan, trained, _table(model, count), batch) for count in lengths], repeats)
        growth = statistics.median(runs[:, -1] / runs[:, 0])
        milliseconds = [1e3 * float(np.median(seconds)) / steps for seconds in (bare, scan)]
        rows.append((batch, *milliseconds, *map(_quartiles, ratios), growth))
        for offset, (label, (low, mid, high)) in enumerate(zip(("compiled scan", "Python loop"), ratios, strict=True)):
            options = {"color": f"C{offset}", "marker": "os"[offset], "label": None if number else label}
            spread = [[mid - low], [high - mid]]
            left.errorbar([number + 0.12 * (2 * offset - 1)], [mid], spread, linestyle="", capsize=4, **options)
        right.plot(lengths, np.median(runs, axis=0), marker="os^Dv"[number % 5], label=f"batch {batch}")
    left.axhline(1, color="grey", linestyle="--", label="bare network calls")
    left.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    left.set(ylabel="seconds / seconds of bare calls", ylim=(0, None), title=f"{steps} steps: median and quartiles")
    left.set_xlim(-0.5, len(batches) - 0.5)
    right.loglog()
    right.set_xticks(list(lengths), [str(count) for count in lengths])
    right.minorticks_off()
    right.set(xlabel="steps S", ylabel="seconds", title="Sampling time, compiled scan")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    columns = ["batch", "ms a bare call", "ms a step of the scan", "scan / bare (quartiles)"]
    columns += ["Python loop / bare (quartiles)", f"time of {lengths[-1]} steps / {lengths[0]} steps"]
    facts = f"{model_facts(name, trained)}; DDPM with {steps} steps, medians of {repeats} rounds, each in turn;"
    return Findings(columns, rows, figure, facts)


def _contenders(trained, batch, steps) -> dict[str, Callable]:
    """Bare calls, a Python loop of jitted steps, and the scan; each draws or computes with the same calls."""
    table = _table(trained.model, steps)
    x = jax.random.normal(jax.random.key(1), (batch, *trained.model.image_shape))
    network = jax.jit(trained.model.apply_fn)
    times = [jnp.full(batch, t) for t in table.t]

    def bare():
        for t in times:
            out = network(trained.params, x, t)
        return out

    return {
        "bare": bare,
        "loop": partial(python_loop, trained, table, batch),
        "scan": partial(_scan, trained, table, batch),
    }


def python_loop(trained: Trained, table: solvers.SamplerTable, num: int) -> jax.Array:
    """The samples of `diffusion.sample` by one jitted call a step, as loops over timesteps are often written."""
    model = trained.model
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(num))
    x = _noise(keys, 0, model.image_shape)
    for i in range(table.nfe):
        coefficients = np.float32([table.signal[i], table.noise[i], *table.update[i, 0]])
        x = _step(model.apply_fn, trained.params, x, table.t[i], coefficients, keys, i)
    return x


@partial(jax.jit, static_argnames="apply_fn")
def _step(apply_fn, params, x, t, coefficients, keys, i):
    """One step of a one-register table whose network predicts eps, x_0 clipped."""
    signal, noise, keep, add, sigma = coefficients
    eps = apply_fn(params, x, jnp.full(len(x), t))
    x0 = jnp.clip((x - noise * eps) / signal, -1, 1)
    return keep * x + add * x0 + sigma * _noise(keys, i + 1, x.shape[1:])


@partial(jax.jit, static_argnames="shape")
def _noise(keys, stage, shape):
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stage), shape))(keys)


def _scan(trained, table, num):
    model, key = trained.model, jax.random.key(0)
    options = {"prediction": model.prediction, "clip": "recompute"}
    return sample(model.apply_fn, trained.params, table, key, num, model.image_shape, **options)


def _table(model, steps):
    return solvers.ddpm(model.schedule, timesteps.uniform(model.schedule, steps))


def _rounds(functions, repeats):
    """Seconds [repeats, functions] of runs in turn, after one run of each that compiles."""
    functions = list(functions)

    def seconds(function):
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    for function in functions:
        seconds(function)
    return np.array([[seconds(function) for function in functions] for _ in range(repeats)])


def _quartiles(ratio):
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
