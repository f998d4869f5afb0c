"""Says what is wrong with starting a sampler from pure noise."""

from collections.abc import Iterator

import numpy as np

from diffusion import predictions
from diffusion.adaptive import Adaptive
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SamplerTable

MAX_SIGNAL = 1e-3
"""The share of signal in the power of x at the start above which pure noise is no start: DDPM's schedule has 4e-5."""

MAX_GAIN = 100
"""A step that multiplies the network's errors by more than this leaves nothing of an image but those errors."""


def start_notes(
    table: SamplerTable | Adaptive, schedule: NoiseSchedule, prediction: str, clip: str, *, noise: bool = True
) -> Iterator[str]:
    """Yields what is wrong with where this sampler starts, a line for each.

    Args:
      table, schedule: the sampler, and the noise schedule.
      prediction: what the network predicts.
      clip: what bounds its estimates of x_0, if anything does.
      noise: whether it starts from pure noise, and not from a noised picture.
    """
    start = float(table.tau[0])
    powers = [float(power) for power in schedule.powers(start)]
    share = powers[0] / sum(powers)
    if noise and share > MAX_SIGNAL:
        below = "" if start == schedule.num_timesteps else f", below T = {schedule.num_timesteps}"
        remedy = "use a schedule with less signal at T" if not below else "start higher"
        yield (
            f"tau starts at {start:g}{below}, where x holds signal, {share:.2g} of its power; samples start from pure "
            f"noise, which leaves it out, and so are off in mean and spread: {remedy}"
        )
    if isinstance(table, Adaptive):  # its steps are short where an error would grow
        return
    gain = np.abs(table.update[:, 0]).max()
    if gain > MAX_GAIN:
        yield (
            f"one step of {table.name} multiplies the network's errors by {gain:,.0f}, as the signal at t = "
            f"{start:g} is {table.signal[0]:.1e}: expect noise; start lower, or take another sampler"
        )
    if clip != "none":
        return
    first = predictions.reading(prediction, *(np.float64(level[0]) for level in (table.t, table.signal, table.noise)))
    gain = abs(table.update[0, 0, -2] * first.from_output)
    if gain > MAX_GAIN:
        yield (
            f"nothing bounds estimates of x_0, and the first step multiplies the network's errors by {gain:,.0f}, as "
            f"the signal at t = {start:g} is {table.signal[0]:.1e}: expect noise; use a model that predicts v, a "
            "schedule with more signal at T, or start lower"
        )
