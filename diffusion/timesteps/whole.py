"""Grids of whole timesteps, by rules for the times themselves."""

import itertools
from collections.abc import Sequence

import numpy as np

from diffusion.errors import InputError, is_whole
from diffusion.schedules import NoiseSchedule
from diffusion.timesteps.checks import Tau, check, count, descending, started


def uniform(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces S steps evenly from T to 0, round(T (S - i) / S), for every S."""
    steps = count(schedule, num_steps)
    return started(schedule, np.round(schedule.num_timesteps * np.arange(steps, -1, -1) / steps).astype(int), start)


def strided(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Steps down from T by ceil(T / S) timesteps at a time (Nichol & Dhariwal, arXiv:2102.09672).

    If S does not divide T this yields fewer than S steps: T = 1000 and S = 600 give stride 2 and 500 steps.
    """
    stride = -(-schedule.num_timesteps // count(schedule, num_steps))
    return started(schedule, np.append(np.arange(schedule.num_timesteps, 0, -stride), 0), start)


def linspace(
    schedule: NoiseSchedule, num_steps: int, start: float = 1.0, last: bool = True, rounded: bool = True
) -> Tau:
    """Rounds S evenly spaced reals, 1 to T inclusive (improved DDPM, arXiv:2102.09672, section 4); S = 1 takes T.

    Without last they are the first S of S + 1, so that 1 is not among them, as in some schedulers of diffusers. Those
    of k-diffusion's kind do not round.
    """
    steps = count(schedule, num_steps)
    times = np.linspace(schedule.num_timesteps, 1, steps + (not last))[:steps]
    whole = np.round(times - 1).astype(int) + 1  # a half goes to the even number of those that count from 0
    return started(schedule, np.append(whole if rounded else times, 0), start)


def quadratic(schedule: NoiseSchedule, num_steps: int, start: float = 1.0) -> Tau:
    """Spaces the square roots of the times evenly, so dense near 0: DDIM on CIFAR-10 (arXiv:2010.02502, D.2).

    The times are floor(linspace(0, sqrt(0.8 T), S)^2) + 1, so it starts at 0.8 T + 1, not at T. From S = 30 (at T =
    1000) the formula repeats timesteps; here a repeated one moves up to the next free timestep, which keeps S steps.
    S = 1 takes the top of the range.
    The authors' float arithmetic falls one timestep short of this formula in places (S = 16 and 26).
    """
    steps = count(schedule, num_steps)
    top = 0.8 * schedule.num_timesteps
    # The small offset undoes the rounding of sqrt, which can leave the last square just below a whole number.
    wanted = np.floor(np.linspace(0, top**0.5, steps) ** 2 + 1e-9) + 1 if steps > 1 else np.array([np.floor(top) + 1])
    wanted = np.minimum(wanted.astype(int), schedule.num_timesteps)
    # The lowest times with tau_i >= wanted_i and tau_i >= tau_{i-1} + 1 follow from a running maximum of wanted_i - i.
    rank = np.arange(steps)
    ascending = np.maximum.accumulate(wanted - rank) + rank
    return started(schedule, np.append(ascending[::-1], 0), start)


def leading(schedule: NoiseSchedule, num_steps: int, start: float = 1.0, offset: int = 0, last: bool = True) -> Tau:
    """Takes i (T // S) + 1 + offset for i < S, as diffusers' "leading" with this steps_offset (there counted from 0).

    It starts at T - T // S + 1 + offset or lower. With S = 1 it starts at t = 1 + offset, which serves to denoise and
    not to sample from noise. Without last they are those of S + 1 steps but for the lowest, as in `linspace`.
    """
    steps = count(schedule, num_steps)
    stride = schedule.num_timesteps // (steps + (not last))
    times = np.arange(not last, steps + (not last))[::-1] * stride + 1 + offset
    return started(schedule, np.append(times, 0), start)


def trailing(schedule: NoiseSchedule, num_steps: int, start: float = 1.0, floored: bool = False, among: int = 0) -> Tau:
    """Takes round(T - i T / S), diffusers' "trailing" without the errors of its float range: the grid of `uniform`.

    If floored it takes T - floor(i T / S), which ComfyUI and stable-diffusion-webui call "simple". Given `among`, the
    timesteps are K (T // K) and others of K such steps, S <= K of them from the first on: the grid of models that were
    distilled on K = 50 timesteps, LCM and TCD.
    """
    if among:
        steps, total = count(schedule, num_steps), schedule.num_timesteps
        if not is_whole(among) or not steps <= among <= total:
            raise InputError(f"among is {among}; it must be a whole number in {steps}..{total}")
        chosen = among - np.arange(steps) * among // steps
        return started(schedule, np.append(chosen * (total // among), 0), start)
    if not floored:
        return uniform(schedule, num_steps, start)
    steps, total = count(schedule, num_steps), schedule.num_timesteps
    return started(schedule, np.append(total - np.arange(steps) * total // steps, 0), start)


def sections(schedule: NoiseSchedule, counts: str | Sequence[int], start: float = 1.0) -> Tau:
    """Cuts T into equal sections and spaces a number of timesteps evenly in each: improved DDPM's section string.

    "10,15,20" takes 10 timesteps from the first third (t near 0), 15 from the second, 20 from the last. "ddim25" is the
    fixed stride that gives exactly 25, starting at t = 1. This is what the authors' code (respace.py) does, with one
    exception: a last section of one step takes T and not its lowest timestep.

    Args:
      schedule: the noise schedule.
      counts: how many timesteps each section gives, as text or as numbers, t near 0 first; or "ddim" and one number.
      start: the share of T that T becomes; all times are multiplied by it.

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
        return started(schedule, np.append(np.arange(0, total, stride)[::-1] + 1, 0), start)
    # "10,15,20": the first sections are longer by one timestep where T does not divide evenly.
    numbers = [_parse_count(part, counts) for part in (counts.split(",") if isinstance(counts, str) else counts)]
    if not 1 <= len(numbers) <= total:
        raise InputError(
            f"tau {counts!r} has {len(numbers)} sections for {total} timesteps; write for example '10,15,20'"
        )
    size, extra = divmod(total, len(numbers))
    ascending, first = [], 0
    for i, number in enumerate(numbers):
        length = size + (i < extra)
        if number > length:
            raise InputError(f"tau {counts!r}: section {i + 1} has {length} timesteps and cannot give {number}")
        stride = (length - 1) / (number - 1) if number > 1 else 1
        # The offsets are summed one by one, as the authors do: multiples round to other neighbours at ties.
        offsets = itertools.accumulate([stride] * (number - 1), initial=0.0)
        ascending += [first + round(offset) + 1 for offset in offsets]
        first += length
    if numbers[-1] == 1:
        ascending[-1] = total
    return started(schedule, np.array([*ascending[::-1], 0]), start)


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
    return descending(schedule, tau.astype(np.int64) if np.all(tau == np.round(tau)) else tau.astype(np.float64))


def below(schedule: NoiseSchedule, tau: Tau, start: float) -> Tau:
    """Starts a grid at another time, for sampling from a noised image: start, and then the times of the grid below it.

    Raises:
      InputError: start lies outside 0..T, or is 0.
    """
    tau = check(schedule, tau)
    if not 0 < start <= schedule.num_timesteps:
        raise InputError(f"start is {start}; it must lie above 0 and at most at T = {schedule.num_timesteps}")
    return explicit(schedule, [start, *tau[tau < start]])


def _parse_count(text, counts):
    """Reads one count of a section string; an error quotes the whole string, counts."""
    try:
        count = int(text) if isinstance(text, str) else text
    except ValueError:
        count = 0
    if not is_whole(count) or count < 1:
        raise InputError(f"tau {counts!r}: {text!r} is not a count; write for example '10,15,20' or 'ddim25'")
    return int(count)
