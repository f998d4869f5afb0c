"""A Langevin corrector: steps at one noise level that bring x to its distribution there, before the sampler goes on."""

import numpy as np

from diffusion.errors import InputError, is_whole, require_range
from diffusion.solvers.table import SamplerTable, check_calls, check_memoryless, make_table


def langevin(table: SamplerTable, snr: float = 0.16, steps: int = 1) -> SamplerTable:
    """Builds the table that makes Langevin steps before each step of its own (predictor-corrector, arXiv:2011.13456).

    A step at the level a, n moves x by its score (a D - x) / n^2 and adds noise,

        x' = x + step (a D - x) / n^2 + (2 step)^(1/2) z,    step = 2 snr^2 n^2.

    Small steps leave the distribution of x at this level as it is: that of N(0, v) becomes one of variance
    v / (1 - step / (2 v)). The paper's Algorithm 4 takes step = 2 (snr |z| / |score|)^2, with both norms averaged over
    the batch. Here their expectations stand, d^(1/2) and d^(1/2) / n for samples of d numbers, because no sample may
    depend on its batch; and so the corrector is a part of the table.

    Args:
      table: of one register and a fixed variance, from noise to images, as of ddim with any eta, ddpm or euler.
      snr: in 0..1, without 0, how long a step is; the paper takes 0.16, or 0.05 for large images.
      steps: Langevin steps before each step of the table, one network call each.

    Raises:
      InputError: the table keeps earlier evaluations, which would be of another x; its variance is the network's, it
        goes from images to noise, or a number is out of its range.
    """
    require_range("snr", snr, 0, 1, open_ends="low")
    if not is_whole(steps) or steps < 1:
        raise InputError(f"steps is {steps}; it must be a whole number of at least 1")
    check_memoryless(table, "have a Langevin corrector")
    check_calls(f"{table.name} with {steps:,} Langevin steps each", table.nfe * (steps + 1))
    signal, noise = np.asarray(table.signal), np.asarray(table.noise)
    step = 2 * snr**2  # in units of n^2
    x = np.full_like(signal, 1 - step)
    corrector = np.stack([x, step * signal, np.sqrt(2 * step) * noise], axis=-1)
    times = int(steps)
    update = np.stack([*[corrector] * times, table.update[:, 0]], axis=1).reshape(-1, 1, 3)
    levels = [np.repeat(np.asarray(values), times + 1) for values in (table.t, signal, noise)]
    name = f"{table.name}, langevin snr {snr:g}" + (f", {times} steps" if times > 1 else "")
    return make_table(name, table.tau, *levels, update, start=table.start)


CORRECTORS = {"langevin": langevin}
"""Correctors by name, as functions of a table."""
