"""The error orders that the solvers' papers state, measured where the exact solution is known."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims.report import Findings, new_figure
from diffusion import sample, schedules, solvers, testbeds

SCHEDULE = schedules.linear()
WEIGHTS, MEANS, VARIANCES = (0.3, 0.5, 0.2), ((-0.8,), (0.1,), (0.9,)), (0.02, 0.05, 0.01)
TOP, BOTTOM = -2.0, 1.2
"""The lambdas between which errors are measured: smooth there, with all of the mixture's splitting."""
SHOWN = ("DDIM", "2M", "3M, published", "3M, exact", "UniPC-1", "UniPC-2", "UniPC-3")


class Method(NamedTuple):
    """A solver, its options, what its paper says, and its earlier evaluations.

    Attributes:
      solver, options: make the table.
      stated: the order, and where it is stated.
      history: evaluations of earlier steps that its full order needs.
    """

    solver: Callable
    options: dict[str, Any]
    stated: tuple[int, str]
    history: int = 0


_FULL = {"lower_order_final": False}
METHODS = {
    "DDIM": Method(solvers.ddim, {}, (1, "2206.00927, section 4.1")),
    "DPM-Solver-2": Method(solvers.dpm_solver, {"order": 2}, (2, "2206.00927, theorem 3.2")),
    "DPM-Solver-3": Method(solvers.dpm_solver, {"order": 3}, (3, "2206.00927, theorem 3.2")),
    "Heun": Method(solvers.heun, {}, (2, "2206.00364, section 3")),
    "2M": Method(
        solvers.dpm_solver_pp, {"order": 2, "variant": "official", **_FULL}, (2, "2211.01095, algorithm 2"), 1
    ),
    "3M, published": Method(
        solvers.dpm_solver_pp, {"order": 3, "variant": "official", **_FULL}, (3, "2211.01095's code, by its name"), 2
    ),
    "3M, exact": Method(solvers.dpm_solver_pp, {"order": 3, **_FULL}, (3, "exponential Adams-Bashforth"), 2),
    "DEIS-3": Method(solvers.deis, {"order": 3, **_FULL}, (3, "2204.13902, Adams-Bashforth"), 2),
    "UniPC-1": Method(solvers.unipc, {"order": 1, **_FULL}, (2, "2302.04867, section 3")),
    "UniPC-2": Method(solvers.unipc, {"order": 2, **_FULL}, (3, "2302.04867, section 3"), 1),
    "UniPC-3": Method(solvers.unipc, {"order": 3, **_FULL}, (4, "2302.04867, section 3"), 2),
}


def measure(*, steps: Sequence[int] = (10, 20, 40, 80, 160, 320), methods: Sequence[str] = tuple(METHODS)) -> Findings:
    """Errors and their slopes for each method, with exact start values and started by itself."""
    rows, errors = [], {}
    with jax.enable_x64(True):
        for name in methods:
            given, own = np.transpose([_errors(METHODS[name], count) for count in steps])
            order, source = METHODS[name].stated
            rows.append((name, order, source, _slope(steps, given), _slope(steps, own), float(own[steps.index(40)])))
            errors[name] = given
    columns = ["solver", "stated order", "where", "measured", "measured, started by itself", "error at S = 40"]
    figure = new_figure()
    axes = figure.subplots()
    for number, name in enumerate(name for name in methods if name in SHOWN):
        label = f"{name}: slope {_slope(steps, errors[name]):.2f}"
        axes.loglog(steps, errors[name], label=label, marker="os^Dv<>"[number], markersize=5)
    axes.set_xticks(list(steps), [str(count) for count in steps])
    axes.minorticks_off()
    axes.set(xlabel="steps S", ylabel="RMS error", title="Error orders on a mixture of Gaussians, exact start values")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    facts = (
        f"A mixture of three Gaussians in one dimension, linear schedule, lambda from {TOP:g} to {BOTTOM:g} in uneven "
        f"steps; RMS error of eleven states against DOP853; slopes over S = {_last_steps(steps)}; float64;"
    )
    return Findings(columns, rows, figure, facts)


def _errors(method, count):
    """RMS errors at lambda = BOTTOM of count steps: with exact start values, and started by the solver itself."""
    tau = _grid(count)
    extra = {"disable_corrector": range(method.history)} if method.solver is solvers.unipc else {}
    exact_start = [_exact(float(t)) for t in tau[: method.history + 1]]
    given = _run(method.solver(SCHEDULE, tau, **method.options, **extra), exact_start)
    bed, x = _testbed(), _exact(float(tau[0]))
    table = method.solver(SCHEDULE, tau, **method.options)
    shared = {"prediction": "x0", "x_init": x, "return_trajectory": True}
    _, passed = sample(bed.apply_fn, bed.params, table, jax.random.key(0), len(x), x.shape[1:], **shared)
    truth = _exact(float(tau[-2]))
    # The last step, from BOTTOM to t = 0, has one call; what that call sees is the state at BOTTOM.
    return [np.sqrt(np.mean((end - truth) ** 2)) for end in (given, np.asarray(passed.x[-2]))]


def _run(table, exact_start):
    """What the last call sees; the first calls see the exact states."""
    bed, network = _testbed(), jax.jit(_testbed().apply_fn)
    registers = np.zeros((table.num_registers, *exact_start[0].shape))
    for i in range(table.nfe - 1):
        if i < len(exact_start):
            registers[0] = exact_start[i]
        x0 = np.asarray(network(bed.params, jnp.asarray(registers[0]), jnp.full(len(registers[0]), table.t[i])))
        registers = np.tensordot(table.update[i], np.stack([*registers, x0, np.zeros_like(x0)]), axes=1)
    return registers[0]


def _grid(count):
    """Steps in lambda of smoothly changing length, the longest over three times the shortest; then 0."""
    u = np.linspace(0, 1, count + 1)
    return np.append(SCHEDULE.time_of(TOP + (BOTTOM - TOP) * (u + 0.55 * u * (1 - u))), 0.0)


@cache
def _testbed():
    return testbeds.mixture(SCHEDULE, WEIGHTS, MEANS, VARIANCES, prediction="x0")


@cache
def _exact(t):
    """Eleven states on the exact flow at t, [11, 1]; at TOP they cover the marginal."""
    top = float(SCHEDULE.time_of(TOP))
    x = np.linspace(-2.5, 2.5, 11)[:, None]
    if t >= top:
        return x
    bed = _testbed()
    return testbeds.ode_solution(bed.apply_fn, bed.params, SCHEDULE, x, top, t, prediction="x0", tolerance=1e-13)


def _last_steps(steps):
    return ", ".join(map(str, steps[-3:]))


def _slope(steps, errors):
    """Of log error over log S, with the sign changed, over the last three."""
    return float(-np.polyfit(np.log(steps[-3:]), np.log(errors[-3:]), 1)[0])
