"""Laws of DPM-Solver and of singlestep DPM-Solver++."""

from itertools import pairwise

import numpy as np
import pytest
from reference import mixture_denoiser, refused
from trajectories import observed_order, run_table, start_states, uniform_lambdas, warped_lambdas

from diffusion import schedules, timesteps
from diffusion.solvers import ddim, dpm_solver, dpm_solver_pp_singlestep

LINEAR = schedules.linear()
both = pytest.mark.parametrize("solver", [dpm_solver, dpm_solver_pp_singlestep])
grids = pytest.mark.parametrize(
    "tau", [timesteps.uniform(LINEAR, 9), timesteps.log_snr(LINEAR, 7)], ids=["even", "log"]
)


class Point:
    """A time at lambda_t + share h with its levels, and the network there."""

    def __init__(self, half_log_snr):
        self.lam = half_log_snr
        self.a, self.n = LINEAR.at(LINEAR.time_of(half_log_snr))

    def x0(self, x):
        return mixture_denoiser(x, self.a, self.n)

    def eps(self, x):
        return (x - self.a * self.x0(x)) / self.n


def steps_between(tau):
    lambdas = LINEAR.half_log_snr(tau)
    return [(Point(start), Point(end), end - start) for start, end in pairwise(lambdas[:-1])]


@both
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lambdas", [uniform_lambdas, warped_lambdas], ids=["uniform", "warped"])
@pytest.mark.parametrize("schedule", [LINEAR, schedules.rectified_flow()], ids=["linear", "rectified_flow"])
def test_singlestep_solvers_have_their_order(schedule, lambdas, order, solver):
    measured, _ = observed_order(lambda tau: solver(schedule, tau, order), schedule, lambdas)
    assert abs(measured - order) < 0.2


@grids
def test_dpm_solver_2_is_the_published_algorithm(tau):
    x, r1 = start_states(LINEAR, tau), 0.5
    for t, s, h in steps_between(tau):
        mid, eps = Point(t.lam + r1 * h), t.eps(x)
        u = mid.a / t.a * x - mid.n * np.expm1(r1 * h) * eps
        x = s.a / t.a * x - s.n * np.expm1(h) * eps - s.n / (2 * r1) * np.expm1(h) * (mid.eps(u) - eps)
    table = dpm_solver(LINEAR, tau, 2)
    got = run_table(table, start_states(LINEAR, tau), stages=table.nfe - 1)
    np.testing.assert_allclose(got, x, rtol=1e-11, atol=1e-11)


@grids
def test_dpm_solver_3_is_the_published_algorithm(tau):
    x, r1, r2 = start_states(LINEAR, tau), 1 / 3, 2 / 3
    for t, s, h in steps_between(tau):
        p1, p2, eps = Point(t.lam + r1 * h), Point(t.lam + r2 * h), t.eps(x)
        u1 = p1.a / t.a * x - p1.n * np.expm1(r1 * h) * eps
        d1 = p1.eps(u1) - eps
        u2 = p2.a / t.a * x - p2.n * np.expm1(r2 * h) * eps - p2.n * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = p2.eps(u2) - eps
        x = s.a / t.a * x - s.n * np.expm1(h) * eps - s.n / r2 * (np.expm1(h) / h - 1) * d2
    table = dpm_solver(LINEAR, tau, 3)
    got = run_table(table, start_states(LINEAR, tau), stages=table.nfe - 1)
    np.testing.assert_allclose(got, x, rtol=1e-11, atol=1e-11)


@grids
def test_singlestep_dpm_solver_pp_2s_is_the_published_algorithm(tau):
    x, r1 = start_states(LINEAR, tau), 0.5
    for t, s, h in steps_between(tau):
        mid, x0 = Point(t.lam + r1 * h), t.x0(x)
        u = mid.n / t.n * x - mid.a * np.expm1(-r1 * h) * x0
        mixed = (1 - 1 / (2 * r1)) * x0 + 1 / (2 * r1) * mid.x0(u)
        x = s.n / t.n * x - s.a * np.expm1(-h) * mixed
    table = dpm_solver_pp_singlestep(LINEAR, tau, 2)
    got = run_table(table, start_states(LINEAR, tau), stages=table.nfe - 1)
    np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-12)


@grids
def test_singlestep_dpm_solver_pp_3s_is_the_authors_algorithm(tau):
    x, r1, r2 = start_states(LINEAR, tau), 1 / 3, 2 / 3
    for t, s, h in steps_between(tau):
        p1, p2, x0 = Point(t.lam + r1 * h), Point(t.lam + r2 * h), t.x0(x)
        phi_1, phi_11, phi_12 = np.expm1(-h), np.expm1(-r1 * h), np.expm1(-r2 * h)
        phi_22, phi_2 = phi_12 / (r2 * h) + 1, phi_1 / h + 1
        u1 = p1.n / t.n * x - p1.a * phi_11 * x0
        u2 = p2.n / t.n * x - p2.a * phi_12 * x0 + r2 / r1 * p2.a * phi_22 * (p1.x0(u1) - x0)
        x = s.n / t.n * x - s.a * phi_1 * x0 + 1 / r2 * s.a * phi_2 * (p2.x0(u2) - x0)
    table = dpm_solver_pp_singlestep(LINEAR, tau, 3)
    got = run_table(table, start_states(LINEAR, tau), stages=table.nfe - 1)
    np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_last_step_has_one_call_and_the_others_as_many_as_the_order(order, solver):
    for steps in (1, 2, 20):
        table = solver(LINEAR, timesteps.uniform(LINEAR, steps), order)
        assert table.nfe == order * (steps - 1) + 1
        assert table.num_registers == (order if steps > 1 else 1)


def test_inner_evaluations_are_at_equal_parts_of_the_step_in_lambda():
    tau = timesteps.uniform(LINEAR, 8)
    for order in (2, 3):
        table = dpm_solver(LINEAR, tau, order)
        ends = LINEAR.half_log_snr(tau[:-1])
        wanted = np.concatenate([np.linspace(a, b, order, endpoint=False) for a, b in pairwise(ends)])
        np.testing.assert_allclose(LINEAR.half_log_snr(table.t[:-1]), wanted, atol=1e-11)


def test_a_step_from_zero_signal_has_order_one_and_the_rest_their_own():
    schedule = schedules.zero_terminal_snr(schedules.scaled_linear())
    tau = timesteps.uniform(schedule, 5)
    for order in (1, 2, 3):
        table = dpm_solver_pp_singlestep(schedule, tau, order)
        assert table.nfe == order * 3 + 2
        np.testing.assert_allclose(table.update[0, 0, [0, -2]], ddim(schedule, tau).update[0, 0, :2], atol=1e-15)
        later = dpm_solver_pp_singlestep(schedule, tau[1:], order)
        np.testing.assert_array_equal(table.update[1:], later.update)
    assert dpm_solver_pp_singlestep(schedule, [1000, 0], 3).num_registers == 1


def test_very_short_steps_do_not_lose_their_weights_to_cancellation():
    """(e^z - 1) / z - 1 is z / 2 for small z; the direct difference would be noise at z = 1e-9."""
    tau = np.array([500 + 2e-6, 500 + 1e-6, 500, 0])
    h = np.diff(LINEAR.half_log_snr(tau[:2]))[0]
    n = LINEAR.at(tau[1])[1]
    row = dpm_solver(LINEAR, tau, 3).update[2, 0]
    weight = row[-2] / -(LINEAR.at(tau[0])[0] / LINEAR.at(tau[0])[1])  # of eps at the third call
    np.testing.assert_allclose(weight, -n * h / 2 * 1.5, rtol=1e-5)


@both
def test_wrong_options_are_refused_in_one_line(solver):
    for order in (0, 4, 7, 1.5):
        with refused(f"order is {order}.*1..3"):
            solver(LINEAR, [500, 0], order)
    with refused("zero.*start tau lower"):
        dpm_solver(schedules.zero_terminal_snr(LINEAR), [1000, 500, 0], 2)
