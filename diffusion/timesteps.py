"""A grid tau says which of the T training timesteps a sampler visits; each function here builds one kind of grid.

Every grid is a float64 or int64 array of length S + 1 that descends strictly from its start to 0, so that both ends of
each step stand in it. All but `strided` have exactly S steps for every S in 1..T. The authors of `quadratic` and
`leading` start below T and yet draw x from N(0, I), which leaves out the signal alpha_bar[tau[0]] that x holds there.

All but `sections` and `explicit` have an option start: every time is multiplied by it. On a schedule with next to no
signal at T, as the cosine one, the first estimate of x_0 made there is noise, and 0.985 helps every solver of few
steps.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from diffusion.errors import InputError, is_whole, require_range
from diffusion.schedules import NoiseSchedule

Tau = Int[np.ndarray, "S+1"] | Float[np.ndarray, "S+1"]


def uniform(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces S steps evenly from T to 0, round(T (S - i) / S), for every S."""
    steps = _count(schedule, num_steps)
    return _started(schedule, np.round(schedule.num_timesteps * np.arange(steps, -1, -1) / steps).astype(int), start)


def strided(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Steps down from T by ceil(T / S) timesteps at a time (Nichol & Dhariwal, arXiv:2102.09672).

    If S does not divide T this yields fewer than S steps: T = 1000 and S = 600 give stride 2 and 500 steps.
    """
    stride = -(-schedule.num_timesteps // _count(schedule, num_steps))
    return _started(schedule, np.append(np.arange(schedule.num_timesteps, 0, -stride), 0), start)


def linspace(schedule: NoiseSchedule, num_steps: int, start: float = 1.0, last: bool = True) -> Tau:
    """Rounds S evenly spaced reals, 1 to T inclusive (improved DDPM, arXiv:2102.09672, section 4); S = 1 takes T.

    Without last they are the first S of S + 1, so that 1 is not among them, as in some schedulers of diffusers.
    """
    steps = _count(schedule, num_steps)
    times = np.round(np.linspace(schedule.num_timesteps, 1, steps + (not last)))[:steps].astype(int)
    return _started(schedule, np.append(times, 0), start)


def quadratic(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces the square roots of the times evenly, so dense near 0: DDIM on CIFAR-10 (arXiv:2010.02502, D.2).

    The times are floor(linspace(0, sqrt(0.8 T), S)^2) + 1, so it starts at 0.8 T + 1, not at T. From S = 30 (at T =
    1000) the formula repeats timesteps; here a repeated one moves up to the next free timestep, which keeps S steps.
    S = 1 takes the top of the range.
    The authors' float arithmetic falls one timestep short of this formula in places (S = 16 and 26).
    """
    steps = _count(schedule, num_steps)
    top = 0.8 * schedule.num_timesteps
    # The small offset undoes the rounding of sqrt, which can leave the last square just below a whole number.
    wanted = np.floor(np.linspace(0, top**0.5, steps) ** 2 + 1e-9) + 1 if steps > 1 else np.array([np.floor(top) + 1])
    wanted = np.minimum(wanted.astype(int), schedule.num_timesteps)
    # The lowest times with tau_i >= wanted_i and tau_i >= tau_{i-1} + 1 follow from a running maximum of wanted_i - i.
    rank = np.arange(steps)
    ascending = np.maximum.accumulate(wanted - rank) + rank
    return _started(schedule, np.append(ascending[::-1], 0), start)


def leading(schedule: NoiseSchedule, num_steps: int, start: float = 1.0, offset: int = 0, last: bool = True) -> Tau:
    """Takes i (T // S) + 1 + offset for i < S, as diffusers' "leading" with this steps_offset (there counted from 0).

    It starts at T - T // S + 1 + offset or lower. With S = 1 it starts at t = 1 + offset, which serves to denoise and
    not to sample from noise. Without last they are those of S + 1 steps but for the lowest, as in `linspace`.
    """
    steps = _count(schedule, num_steps)
    stride = schedule.num_timesteps // (steps + (not last))
    times = np.arange(not last, steps + (not last))[::-1] * stride + 1 + offset
    return _started(schedule, np.append(times, 0), start)


def trailing(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Takes round(T - i T / S), diffusers' "trailing" without the errors of its float range: the grid of `uniform`."""
    return uniform(schedule, num_steps, start)


def log_snr(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces real times evenly in lambda from T to 1, then takes 0 (DPM-Solver, arXiv:2206.00927, section 3.4)."""
    top, bottom = _lambda_range(schedule)
    return _started(schedule, _from_lambda(schedule, np.linspace(top, bottom, _count(schedule, num_steps))), start)


def karras(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0, start: float = 1.0) -> Tau:
    """Spaces (noise / signal)^(1/rho) evenly from T to 1 in real times, then takes 0 (EDM, arXiv:2206.00364, Eq. 5)."""
    if not rho > 0:
        raise InputError(f"rho is {rho}; it must be above 0, and 7 is usual")
    top, bottom = _lambda_range(schedule)
    warped = np.linspace(np.exp(-top / rho), np.exp(-bottom / rho), _count(schedule, num_steps))
    return _started(schedule, _from_lambda(schedule, -rho * np.log(warped)), start)


def sections(schedule: NoiseSchedule, counts: str | Sequence[int]) -> Tau:
    """Cuts T into equal sections and spaces a number of timesteps evenly in each: improved DDPM's section string.

    "10,15,20" takes 10 timesteps from the first third (t near 0), 15 from the second, 20 from the last. "ddim25" is the
    fixed stride that gives exactly 25, starting at t = 1. This is what the authors' code (respace.py) does, with one
    exception: a last section of one step takes T and not its lowest timestep.

    Args:
      schedule: the noise schedule.
      counts: how many timesteps each section gives, as text or as numbers, t near 0 first; or "ddim" and one number.

    Raises:
      InputError: the string does not parse, a section is too small for its count, or no stride gives the count.
    """
    total = schedule.num_timesteps
    # "ddim25": one stride over all timesteps.
    if isinstance(counts, str) and counts.startswith("ddim"):
        steps = _parse_count(counts.removeprefix("ddim"), counts)
        stride = next((i for i in range(1, total) if len(range(0, total, i)) == steps), None)
        if stride is None:
            raise InputError(
                f"tau {counts!r}: no whole stride takes exactly {steps} of {total} timesteps; use 'uniform'"
            )
        return _descending(schedule, np.append(np.arange(0, total, stride)[::-1] + 1, 0))
    # "10,15,20": the first sections are longer by one timestep where T does not divide evenly.
    numbers = [_parse_count(part, counts) for part in (counts.split(",") if isinstance(counts, str) else counts)]
    if not 1 <= len(numbers) <= total:
        raise InputError(
            f"tau {counts!r} has {len(numbers)} sections for {total} timesteps; write for example '10,15,20'"
        )
    size, extra = divmod(total, len(numbers))
    ascending, start = [], 0
    for i, number in enumerate(numbers):
        length = size + (i < extra)
        if number > length:
            raise InputError(f"tau {counts!r}: section {i + 1} has {length} timesteps and cannot give {number}")
        stride = (length - 1) / (number - 1) if number > 1 else 1
        # The offsets are summed one by one, as the authors do: multiples round to other neighbours at ties.
        offsets = itertools.accumulate([stride] * (number - 1), initial=0.0)
        ascending += [start + round(offset) + 1 for offset in offsets]
        start += length
    if numbers[-1] == 1:
        ascending[-1] = total
    return _descending(schedule, np.array([*ascending[::-1], 0]))


def explicit(schedule: NoiseSchedule, times: Sequence[float]) -> Tau:
    """Makes a grid of times given one by one.

    Args:
      schedule: the noise schedule.
      times: strictly descending in (0, T], whole or real, with or without the final 0.

    Raises:
      InputError: a time lies outside the range or the list does not descend.
    """
    tau = np.asarray(times)
    if tau.ndim != 1 or tau.size == 0 or not np.issubdtype(tau.dtype, np.number) or not np.isfinite(tau).all():
        raise InputError(f"tau {times!r} is not a list of timesteps; give for example 1000,500,250")
    tau = tau if tau[-1] == 0 else np.append(tau, 0)
    return _descending(schedule, tau.astype(np.int64) if np.all(tau == np.round(tau)) else tau.astype(np.float64))


def below(schedule: NoiseSchedule, tau: Tau, start: float) -> Tau:
    """Starts a grid at another time, for sampling from a noised image: start, and then the times of the grid below it.

    Raises:
      InputError: start lies outside 0..T, or is 0.
    """
    tau = check(schedule, tau)
    if not 0 < start <= schedule.num_timesteps:
        raise InputError(f"start is {start}; it must lie above 0 and at most at T = {schedule.num_timesteps}")
    return explicit(schedule, [start, *tau[tau < start]])


GRIDS: dict[str, Callable[[NoiseSchedule, int], Tau]] = {
    "uniform": uniform,
    "strided": strided,
    "linspace": linspace,
    "quadratic": quadratic,
    "leading": leading,
    "trailing": trailing,
    "log_snr": log_snr,
    "karras": karras,
}
"""The grids that need only a number of steps, by name."""


def check(schedule: NoiseSchedule, tau) -> Tau:
    """Returns tau as an array if it is a grid of this schedule; every solver calls it first.

    Raises:
      InputError: fewer than two entries, not strictly descending, not ending at 0, or outside 0..T; or tau or the
        schedule is traced by JAX.
    """
    require_concrete("tau and the schedule", tau, schedule.alpha_bar, schedule.noise_var)
    return _descending(schedule, np.asarray(tau))


def require_concrete(what: str, *values) -> None:
    """Raises InputError if JAX traces one of the values that a solver, which is NumPy, computes with."""
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise InputError(
            f"{what} cannot be traced, as in jit or grad: solvers are NumPy. Build the table outside, or for "
            "derivatives by tau take diffusion.solvers.differentiable(solver, schedule, num_steps, ...)(tau)"
        )


def _descending(schedule, tau):
    """Returns tau if it descends strictly from a start of at most T to 0; every grid passes through here."""
    if tau.ndim != 1 or tau.size < 2 or not np.issubdtype(tau.dtype, np.number):
        raise InputError(f"tau has shape {tau.shape}; a grid has at least a start and 0")
    if not np.all(np.isfinite(tau)) or tau[0] > schedule.num_timesteps or tau[-1] != 0:
        raise InputError(f"tau goes from {tau[0]} to {tau[-1]}; it must start in 1..{schedule.num_timesteps}, end at 0")
    step = np.argmax(np.diff(tau) >= 0)
    if not np.all(np.diff(tau) < 0):
        raise InputError(f"tau is not strictly descending: {tau[step]} is followed by {tau[step + 1]}")
    return tau


def _started(schedule, tau, start):
    """Returns a grid of `GRIDS` with all times multiplied by its option start, the share of T from which on it runs."""
    require_range("start of tau", start, 0, 1, open_ends="low")
    return _descending(schedule, tau if start == 1 else tau * float(start))


def _count(schedule, num_steps):
    """Returns the number of steps as an int if it is whole and in 1..T."""
    if not is_whole(num_steps) or not 1 <= num_steps <= schedule.num_timesteps:
        raise InputError(f"steps is {num_steps}; it must be a whole number in 1..{schedule.num_timesteps}")
    return int(num_steps)


def _parse_count(text, counts):
    """Reads one count of a section string; an error quotes the whole string, counts."""
    try:
        count = int(text) if isinstance(text, str) else text
    except ValueError:
        count = 0
    if not is_whole(count) or count < 1:
        raise InputError(f"tau {counts!r}: {text!r} is not a count; write for example '10,15,20' or 'ddim25'")
    return int(count)


def _lambda_range(schedule):
    """Returns lambda at T and at 1, the ends of a grid spaced in log-SNR."""
    top = schedule.half_log_snr(schedule.num_timesteps)
    if np.isinf(top):
        raise InputError("this grid is spaced in log-SNR, which is infinite at zero terminal SNR; use 'uniform'")
    return float(top), float(schedule.half_log_snr(1))


def _from_lambda(schedule, half_log_snr):
    """Makes the grid through given values of lambda, from T to 1, and then 0."""
    tau = schedule.time_of(half_log_snr)
    # The ends are T and 1 by definition; rounding must not push them off the grid.
    tau[-1] = 1.0 if tau.size > 1 else tau[-1]
    tau[0] = schedule.num_timesteps
    return _descending(schedule, np.append(tau, 0.0))
