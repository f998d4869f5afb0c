"""Exact trajectories of the probability flow, and a plain float64 loop that runs a table on a known denoiser."""

from itertools import pairwise

import numpy as np
from reference import mixture_denoiser
from scipy.integrate import solve_ivp

TOP, BOTTOM = -2.0, 1.2
"""The lambdas between which orders are measured: smooth there, with all of the mixture's splitting."""


def run_table(table, x, denoiser=mixture_denoiser, z=None, first=0, stages=None, history=()):
    """Register 0 after the given number of stages, from stage `first` with x and the history in the registers.

    z is [nfe, *x.shape], zero if not given; denoiser is called as (x, signal, noise).
    """
    registers = np.zeros((table.num_registers, *np.shape(x)))
    registers[0] = x
    for i, old in enumerate(history):
        registers[i + 1] = old
    for i in range(first, table.nfe if stages is None else stages):
        x0 = denoiser(registers[0], table.signal[i], table.noise[i])
        noise = np.zeros_like(x0) if z is None else z[i]
        registers = np.tensordot(table.update[i], np.stack([*registers, x0, noise]), axes=1)
    return registers[0]


def uniform_lambdas(steps):
    return np.linspace(TOP, BOTTOM, steps + 1)


def warped_lambdas(steps):
    """Steps of smoothly changing length, the longest over three times the shortest."""
    u = np.linspace(0, 1, steps + 1)
    return TOP + (BOTTOM - TOP) * (u + 0.55 * u * (1 - u))


def uniform_rhos(steps):
    """Even in rho = noise / signal."""
    return -np.log(np.linspace(np.exp(-TOP), np.exp(-BOTTOM), steps + 1))


def grid(schedule, lambdas):
    """The times of these lambdas, then 0."""
    return np.append(schedule.time_of(lambdas), 0.0)


def exact_states(schedule, tau, x, denoiser=mixture_denoiser):
    """The flow through x at tau[0], at each tau of finite lambda: [len(tau), *x.shape], by DOP853."""
    signal, noise = schedule.at(tau)
    states = [x / signal[0]]
    rhos = np.log(noise / signal)

    def slope(log_rho, y):  # d(x / a) = eps d rho; a and n enter the denoiser by their ratio alone
        return y - denoiser(y, 1.0, np.exp(log_rho))

    for start, end in pairwise(rhos):
        solution = solve_ivp(slope, (start, end), states[-1], method="DOP853", rtol=1e-13, atol=1e-13)
        states.append(solution.y[:, -1])
    return signal[:, None] * np.array(states)


def start_states(schedule, tau):
    """Eleven x that cover the marginal at tau[0]."""
    signal, noise = schedule.at(tau[0])
    return np.hypot(signal, noise) * np.linspace(-2.5, 2.5, 11)


def observed_order(build, schedule, lambdas, steps=(40, 80, 160), exact_history=0, denoiser=mixture_denoiser):
    """The slope of log error over log steps at the last grid point before 0, where the last step has one call.

    exact_history: how many earlier evaluations of eps the solver keeps; they and x are then set from the exact solution
    and the first steps, of lower order by design, are left out.
    """
    errors = []
    for number in steps:
        tau = grid(schedule, lambdas(number))
        table = build(tau)
        k = exact_history
        points = np.append(tau[: k + 1], tau[-2])
        exact = exact_states(schedule, points, start_states(schedule, tau), denoiser)
        signal, noise = (v[:, None] for v in schedule.at(points))
        eps = (exact - signal * denoiser(exact, signal, noise)) / noise
        got = run_table(table, exact[k], denoiser, first=k, stages=table.nfe - 1, history=eps[:k][::-1])
        errors.append(np.sqrt(np.mean((got - exact[-1]) ** 2)))
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0], errors
