"""Laws of the dialect that solvers are written in: the examples of its manual run, and are the methods they claim."""

import inspect
import re
import textwrap
from itertools import pairwise

import numpy as np
import pytest
from reference import gaussian_denoiser, refused
from trajectories import observed_order, uniform_lambdas, warped_lambdas

from diffusion import gaussian, schedules, solvers, timesteps
from diffusion.solvers import Stage, build, columns, ddim, grid_levels, lms, split_noise, step_orders
from diffusion.solvers import forms as manual

LINEAR = schedules.linear()
SCHEDULES = {
    "linear": LINEAR,
    "edm": schedules.edm(),
    "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear()),
}


def examples():
    """The functions that the indented blocks of the manual define, by name, and the source of each block."""
    text = inspect.getdoc(manual)
    blocks = re.findall(r":\n\n((?:(?: {4}[^\n]*)?\n)+)", text)
    found, sources = {}, []
    for block in map(textwrap.dedent, blocks):
        names = {}
        exec(block, names)
        found |= {k: v for k, v in names.items() if k.startswith("my_")}
        sources.append(block)
    return found, sources


EXAMPLES, SOURCES = examples()


def test_the_manual_shows_a_one_step_and_a_two_step_solver_in_under_ten_lines_each():
    assert list(EXAMPLES) == ["my_ddim", "my_adams"]
    for source in SOURCES:
        body = source[source.index("def ") :].strip().splitlines()
        assert len(body) < 10


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_one_step_example_is_deterministic_ddim(schedule, steps):
    tau = timesteps.uniform(schedule, steps)
    got, wanted = EXAMPLES["my_ddim"](schedule, tau), ddim(schedule, tau, eta=0.0)
    for field in ("tau", "t", "signal", "noise"):
        np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field))
    np.testing.assert_allclose(got.update, wanted.update, rtol=0, atol=1e-14)


@pytest.mark.parametrize("lambdas", [uniform_lambdas, warped_lambdas], ids=["uniform", "warped"])
@pytest.mark.parametrize("schedule", [LINEAR, SCHEDULES["edm"]], ids=["linear", "edm"])
def test_the_two_step_example_has_order_two_on_the_flow_of_gaussian_data(schedule, lambdas):
    def denoiser(x, a, n):
        return gaussian_denoiser(x, a, n, 0.3, 0.25)

    for name, order in (("my_ddim", 1), ("my_adams", 2)):
        measured, _ = observed_order(
            lambda tau, n=name: EXAMPLES[n](schedule, tau), schedule, lambdas, denoiser=denoiser
        )
        assert abs(measured - order) < 0.2, name


@pytest.mark.parametrize("grid", ["uniform", "karras", "log_snr"])
def test_the_two_step_example_is_linear_multistep_of_order_two(grid):
    for steps in (2, 9):
        tau = timesteps.GRIDS[grid](LINEAR, steps)
        got, wanted = EXAMPLES["my_adams"](LINEAR, tau), lms(LINEAR, tau, order=2)
        np.testing.assert_allclose(got.update, wanted.update, rtol=1e-11, atol=1e-12)


def test_the_two_step_example_is_refused_where_eps_says_nothing():
    with refused("my_adams starts at t = 1000, where the signal is zero.*start tau lower"):
        EXAMPLES["my_adams"](SCHEDULES["zero_snr"], [1000, 500, 0])


def test_rows_not_given_become_zero():
    x, kept, _, D, z = columns(3)
    at, to = grid_levels(LINEAR, [500, 0])
    table = build("one row", [500, 0], [Stage(at, [2 * x - kept + 3 * D + 4 * z])], 3)
    np.testing.assert_array_equal(table.update, [[[2, -1, 0, 3, 4], [0] * 5, [0] * 5]])
    assert (table.t, table.signal, table.noise) == (500, at.signal, at.noise)
    assert (to.t, to.signal, to.noise, to.rho) == (0, 1, 0, 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_split_of_the_noise_by_levels_is_the_jitted_one(schedule, eta):
    tau = timesteps.uniform(schedule, 20)
    wanted = np.array(gaussian.split_noise(schedule, tau[:-1], tau[1:], eta)).T
    got = [split_noise(at, to, eta) for at, to in pairwise(grid_levels(schedule, tau))]
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)


def test_orders_grow_from_one_and_fall_to_one_unless_the_method_reaches_zero():
    grid = grid_levels(LINEAR, timesteps.uniform(LINEAR, 6))
    assert step_orders(grid, 3, 3, lower_order_final=True) == [1, 2, 3, 3, 2, 1]
    assert step_orders(grid, 3, 3, lower_order_final=False) == [1, 2, 3, 3, 3, 1]
    assert step_orders(grid, 3, 3, lower_order_final=False, full_at_zero=True) == [1, 2, 3, 3, 3, 3]
    assert step_orders(grid, [1, 2, 1, 2, 3, 1], 3, lower_order_final=True) == [1, 2, 1, 2, 3, 1]


def test_a_start_at_zero_signal_counts_for_no_order():
    grid = grid_levels(SCHEDULES["zero_snr"], timesteps.uniform(SCHEDULES["zero_snr"], 6))
    assert step_orders(grid, 3, 3, lower_order_final=False) == [1, 1, 2, 3, 3, 1]


def test_every_exported_name_exists_and_they_are_sorted():
    assert all(hasattr(solvers, name) for name in solvers.__all__)
    assert solvers.__all__ == sorted(solvers.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
