"""Grids tau: which of the T training timesteps a sampler visits.

Every grid is a float64 or int64 array of length S + 1 that descends strictly from its start to 0, so that both ends of
each step stand in it. All but `strided` have exactly S steps for every S in 1..T. Sampling a grid that starts below T
from N(0, I), as the authors of `quadratic` and `leading` do, leaves out the signal alpha_bar[tau[0]] that x holds
there.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from diffusion.errors import InputError, is_whole
from diffusion.schedules import NoiseSchedule

Tau = Int[np.ndarray, "S+1"] | Float[np.ndarray, "S+1"]


def uniform(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """round(T (S - i) / S): evenly spaced from T to 0, always S steps."""
    steps = _count(schedule, num_steps)
    return _descending(schedule, np.round(schedule.num_timesteps * np.arange(steps, -1, -1) / steps).astype(int))


def strided(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """One update every ceil(T / S) timesteps, counted from T (Nichol & Dhariwal, arXiv:2102.09672).

    Where S does not divide T this yields fewer than S steps: T = 1000 and S = 600 give stride 2 and 500 steps.
    """
    stride = -(-schedule.num_timesteps // _count(schedule, num_steps))
    return _descending(schedule, np.append(np.arange(schedule.num_timesteps, 0, -stride), 0))


def linspace(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """S reals from 1 to T inclusive, rounded (improved DDPM's text, arXiv:2102.09672, section 4); S = 1 is T alone."""
    ascending = np.round(np.linspace(schedule.num_timesteps, 1, _count(schedule, num_steps))).astype(int)
    return _descending(schedule, np.append(ascending, 0))


def quadratic(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """floor(linspace(0, sqrt(0.8 T), S)^2) + 1, dense near 0 (DDIM's choice on CIFAR-10, arXiv:2010.02502, D.2).

    It starts at 0.8 T + 1, not at T. From S = 30 (at T = 1000) the formula repeats timesteps; a repeated one moves up
    to the next free timestep here, which keeps S steps. S = 1 is the top of the range alone.
    The authors' float arithmetic falls one timestep short of this formula in places (S = 16 and 26).
    """
    steps = _count(schedule, num_steps)
    top = 0.8 * schedule.num_timesteps
    # The small offset undoes the rounding of sqrt, which can leave the last square just below a whole number.
    wanted = np.floor(np.linspace(0, top**0.5, steps) ** 2 + 1e-9) + 1 if steps > 1 else np.array([np.floor(top) + 1])
    wanted = np.minimum(wanted.astype(int), schedule.num_timesteps)
    # tau_i >= tau_{i-1} + 1 is the running maximum of wanted_i - i.
    rank = np.arange(steps)
    ascending = np.maximum.accumulate(wanted - rank) + rank
    return _descending(schedule, np.append(ascending[::-1], 0))


def leading(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """i (T // S) + 1 for i < S, as diffusers' "leading" with steps_offset 0 (there counted from 0).

    It starts at T - T // S + 1 or lower; with S = 1 that is t = 1, of use for denoising and not for sampling from
    noise.
    """
    steps = _count(schedule, num_steps)
    stride = schedule.num_timesteps // steps
    return _descending(schedule, np.append(np.arange(steps)[::-1] * stride + 1, 0))


def trailing(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """round(T - i T / S), diffusers' "trailing" without the rounding of its float range: the same grid as `uniform`."""
    return uniform(schedule, num_steps)


def log_snr(schedule: NoiseSchedule, num_steps: int) -> Tau:
    """Real times evenly spaced in lambda from T to 1, then 0 (DPM-Solver, arXiv:2206.00927, section 3.4)."""
    top, bottom = _lambda_range(schedule)
    return _from_lambda(schedule, np.linspace(top, bottom, _count(schedule, num_steps)))


def karras(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0) -> Tau:
    """Real times, (noise / signal)^(1/rho) evenly spaced from T to 1, then 0 (EDM, arXiv:2206.00364, Eq. 5)."""
    if not rho > 0:
        raise InputError(f"rho is {rho}; it must be above 0, and 7 is usual")
    top, bottom = _lambda_range(schedule)
    warped = np.linspace(np.exp(-top / rho), np.exp(-bottom / rho), _count(schedule, num_steps))
    return _from_lambda(schedule, -rho * np.log(warped))


def sections(schedule: NoiseSchedule, spec: str | Sequence[int]) -> Tau:
    """Improved DDPM's section string: T in equal sections with a number of evenly spaced timesteps each.

    "10,15,20" takes 10 timesteps from the first third (t near 0), 15 from the second, 20 from the last. "ddim25" is the
    fixed stride that gives exactly 25, starting at t = 1. As in the authors' code (respace.py), except that a last
    section of one step takes T and not its lowest timestep.

    Raises:
      InputError: the string does not parse, a section is too small for its count, or no stride gives the count.
    """
    total = schedule.num_timesteps
    if isinstance(spec, str) and spec.startswith("ddim"):
        steps = _parse_count(spec.removeprefix("ddim"), spec)
        stride = next((i for i in range(1, total) if len(range(0, total, i)) == steps), None)
        if stride is None:
            raise InputError(f"tau {spec!r}: no whole stride takes exactly {steps} of {total} timesteps; use 'uniform'")
        return _descending(schedule, np.append(np.arange(0, total, stride)[::-1] + 1, 0))
    counts = [_parse_count(part, spec) for part in (spec.split(",") if isinstance(spec, str) else spec)]
    if not 1 <= len(counts) <= total:
        raise InputError(f"tau {spec!r} has {len(counts)} sections for {total} timesteps; write for example '10,15,20'")
    size, extra = divmod(total, len(counts))
    ascending, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if count > length:
            raise InputError(f"tau {spec!r}: section {i + 1} has {length} timesteps and cannot give {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # Summed one by one as the authors do: multiples round to other neighbours at ties.
        offsets = itertools.accumulate([stride] * (count - 1), initial=0.0)
        ascending += [start + round(offset) + 1 for offset in offsets]
        start += length
    if counts[-1] == 1:
        ascending[-1] = total
    return _descending(schedule, np.array([*ascending[::-1], 0]))


def explicit(schedule: NoiseSchedule, seq: Sequence[float]) -> Tau:
    """A grid given time by time: strictly descending in (0, T], with or without the final 0.

    Raises:
      InputError: a time lies outside the range or the list does not descend.
    """
    tau = np.asarray(seq)
    if tau.ndim != 1 or tau.size == 0 or not np.issubdtype(tau.dtype, np.number) or not np.isfinite(tau).all():
        raise InputError(f"tau {seq!r} is not a list of timesteps; give for example 1000,500,250")
    tau = tau if tau[-1] == 0 else np.append(tau, 0)
    return _descending(schedule, tau.astype(np.int64) if np.all(tau == np.round(tau)) else tau.astype(np.float64))


def below(schedule: NoiseSchedule, tau: Tau, start: float) -> Tau:
    """The part of a grid at or below a start time, for sampling from a noised image.

    Raises:
      InputError: no time of the grid but 0 is left.
    """
    tau = check(schedule, tau)
    if not tau[-2] <= start <= schedule.num_timesteps:
        raise InputError(f"start is {start}; it must lie in {tau[-2]}..{schedule.num_timesteps}, the grid's own range")
    return tau[tau <= start]


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


def check(schedule: NoiseSchedule, tau) -> Tau:
    """Returns tau as an array if it is a grid of this schedule; every solver calls it first.

    Raises:
      InputError: fewer than two entries, not strictly descending, not ending at 0, or outside 0..T.
    """
    return _descending(schedule, np.asarray(tau))


def _descending(schedule, tau):
    if tau.ndim != 1 or tau.size < 2 or not np.issubdtype(tau.dtype, np.number):
        raise InputError(f"tau has shape {tau.shape}; a grid has at least a start and 0")
    if not np.all(np.isfinite(tau)) or tau[0] > schedule.num_timesteps or tau[-1] != 0:
        raise InputError(f"tau goes from {tau[0]} to {tau[-1]}; it must start in 1..{schedule.num_timesteps}, end at 0")
    step = np.argmax(np.diff(tau) >= 0)
    if not np.all(np.diff(tau) < 0):
        raise InputError(f"tau is not strictly descending: {tau[step]} is followed by {tau[step + 1]}")
    return tau


def _count(schedule, num_steps):
    if not is_whole(num_steps) or not 1 <= num_steps <= schedule.num_timesteps:
        raise InputError(f"steps is {num_steps}; it must be a whole number in 1..{schedule.num_timesteps}")
    return int(num_steps)


def _parse_count(text, spec):
    try:
        count = int(text) if isinstance(text, str) else text
    except ValueError:
        count = 0
    if not is_whole(count) or count < 1:
        raise InputError(f"tau {spec!r}: {text!r} is not a count; write for example '10,15,20' or 'ddim25'")
    return int(count)


def _lambda_range(schedule):
    """lambda at T and at 1."""
    top = schedule.half_log_snr(schedule.num_timesteps)
    if np.isinf(top):
        raise InputError("this grid is spaced in log-SNR, which is infinite at zero terminal SNR; use 'uniform'")
    return float(top), float(schedule.half_log_snr(1))


def _from_lambda(schedule, half_log_snr):
    tau = schedule.time_of(half_log_snr)
    # The ends are T and 1 by definition; do not let rounding push them off the grid.
    tau[-1] = 1.0 if tau.size > 1 else tau[-1]
    tau[0] = schedule.num_timesteps
    return _descending(schedule, np.append(tau, 0.0))
