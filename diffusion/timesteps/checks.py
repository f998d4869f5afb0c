"""Checks that a grid is one, which every grid passes and every solver repeats."""

import jax
import numpy as np
from jaxtyping import Float, Int

from diffusion.errors import InputError, is_whole, require_range
from diffusion.schedules import NoiseSchedule

Tau = Int[np.ndarray, "S+1"] | Float[np.ndarray, "S+1"]


def check(schedule: NoiseSchedule, tau) -> Tau:
    """Returns tau as an array if it is a grid of this schedule; every solver calls it first.

    Raises:
      InputError: fewer than two entries, not strictly descending, not ending at 0, or outside 0..T; or tau or the
        schedule is traced by JAX.
    """
    require_concrete("tau and the schedule", tau, schedule.alpha_bar, schedule.noise_var)
    return descending(schedule, np.asarray(tau))


def require_concrete(what: str, *values) -> None:
    """Raises InputError if JAX traces one of the values that a solver, which is NumPy, computes with."""
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise InputError(
            f"{what} cannot be traced, as in jit or grad: solvers are NumPy. Build the table outside, or for "
            "derivatives by tau take diffusion.solvers.differentiable(solver, schedule, num_steps, ...)(tau)"
        )


def descending(schedule, tau):
    """Returns tau if it descends strictly from a start of at most T to 0; every grid passes through here."""
    if tau.ndim != 1 or tau.size < 2 or not np.issubdtype(tau.dtype, np.number):
        raise InputError(f"tau has shape {tau.shape}; a grid has at least a start and 0")
    if not np.all(np.isfinite(tau)) or tau[0] > schedule.num_timesteps or tau[-1] != 0:
        raise InputError(f"tau goes from {tau[0]} to {tau[-1]}; it must start in 1..{schedule.num_timesteps}, end at 0")
    step = np.argmax(np.diff(tau) >= 0)
    if not np.all(np.diff(tau) < 0):
        raise InputError(f"tau is not strictly descending: {tau[step]} is followed by {tau[step + 1]}")
    return tau


def started(schedule, tau, start):
    """Returns a grid of `GRIDS` with all times multiplied by its option start, the share of T from which on it runs."""
    require_range("start of tau", start, 0, 1, open_ends="low")
    return descending(schedule, tau if start == 1 else tau * float(start))


def count(schedule, num_steps):
    """Returns the number of steps as an int if it is whole and in 1..T."""
    if not is_whole(num_steps) or not 1 <= num_steps <= schedule.num_timesteps:
        raise InputError(f"steps is {num_steps}; it must be a whole number in 1..{schedule.num_timesteps}")
    return int(num_steps)
