"""RePaint's resampling makes each step of a sampler several times, so that known and drawn pixels come to agree."""

import numpy as np

from diffusion.errors import InputError, is_whole
from diffusion.schedules import transition_var
from diffusion.solvers.table import SamplerTable, check_calls, check_memoryless, make_table


def resampled(table: SamplerTable, repeats: int = 10) -> SamplerTable:
    """Builds the table that makes each step `repeats` times and noises x again in between (RePaint, arXiv:2201.09865).

    After a step from t to s the jump back is a step of the forward process, x_t = (a_t / a_s) x_s + std z. It costs no
    network call, as it is part of the row before it; a row's own noise and that of the jump are one draw of the sum of
    their variances. The jump length is 1 step of the grid, and `repeats` is the paper's r, or U of its Algorithm 1.

    It is meant for `known` of `diffusion.sample`. A step draws the unknown pixels with known ones whose noise is
    independent of theirs, and so without repeats the two do not fit well: see there. Without known pixels the samples
    have the same distribution where the table's own steps are exact, and cost `repeats` times the calls.

    Args:
      table: of one register, from noise to images, as of ddim with any eta, ddpm, analytic_dpm, euler or sigma_hat.
      repeats: at least 1, which is the table itself; the paper takes 10.

    Raises:
      InputError: the table keeps earlier evaluations, which would be of another x after a jump; its variance is the
        network's, it goes from images to noise, or repeats is below 1.
    """
    if not is_whole(repeats) or repeats < 1:
        raise InputError(f"repeats is {repeats}; it must be a whole number of at least 1")
    check_memoryless(table, "be resampled")
    check_calls(f"{table.name} resampled {repeats:,} times", table.nfe * repeats)
    rows = table.update[:, 0]
    a_t, n_t = np.asarray(table.signal), np.asarray(table.noise)
    a_s, n_s = np.append(a_t[1:], 1.0), np.append(n_t[1:], 0.0)
    grow, variance = a_t / a_s, transition_var(a_t**2, n_t**2, a_s**2, n_s**2)
    back = grow[:, None] * rows
    back[:, -1] = np.sqrt(back[:, -1] ** 2 + variance)
    times = int(repeats)
    update = np.stack([*[back] * (times - 1), rows], axis=1).reshape(-1, 1, 3)
    levels = [np.repeat(np.asarray(values), times) for values in (table.t, table.signal, table.noise)]
    return make_table(f"{table.name}, resampled {times} times", table.tau, *levels, update, start=table.start)
