"""The analytic first step (AFS): nobody needs a network to say what pure noise holds, so the first call is not made."""

import numpy as np

from diffusion.errors import InputError, nearest
from diffusion.solvers.table import SamplerTable, make_table

ESTIMATES = ("direction", "score")
"""What is taken for the network's first answer."""


def analytic_first(table: SamplerTable, estimate: str = "direction") -> SamplerTable:
    """Builds the table without its first network call, whose answer is taken analytically from the noise itself.

    Where x is nearly pure noise, its direction says what the network would. With the standard deviation
    std = (a^2 + n^2)^(1/2) of x there, a and n of the first level, the estimates are

    - "direction": eps = x / std, and so D = a / (std (std + n)) x, as in diff-sampler (arXiv:2312.00094, `afs=True`);
    - "score": the score of N(0, std^2 I), and so D = a / std^2 x, which is exact for data of N(0, I) (GENIE,
      arXiv:2210.05475, "analytical first step").

    All registers are then multiples of the noise when the first call is made, at the second time. `SamplerTable.start`
    holds these multiples, and x_init of `diffusion.sample` is what the network sees first.

    Args:
      table: from noise to images, with two network calls or more, whose first step is deterministic.
      estimate: one of ESTIMATES.

    Raises:
      InputError: an unknown estimate; the first step draws noise, makes nothing of x, or is the only one; or the table
        has an analytic first step already.
    """
    if estimate not in ESTIMATES:
        raise InputError(f"afs is {estimate!r}; {nearest(str(estimate), ESTIMATES)}")
    if table.tau[0] < table.tau[-1] or table.start is not None:
        why = "goes from images to noise" if table.start is None else "has one already"
        raise InputError(f"{table.name} cannot have an analytic first step: it {why}")
    first = np.asarray(table.update[0])
    if table.nfe < 2 or np.any(first[:, -1]):
        why = "has only one network call" if table.nfe < 2 else "draws noise in its first step"
        raise InputError(f"{table.name} {why}; an analytic first step is for deterministic samplers of more calls")
    a, n = table.signal[0], table.noise[0]
    std = np.hypot(a, n)
    slope = a / std**2 if estimate == "score" else a / (std * (std + n))
    start = std * (first[:, 0] + slope * first[:, -2])
    if not start[0] > 0:
        raise InputError(f"{table.name} makes nothing of x in its first step, which cannot be analytic")
    later = (v[1:] for v in (table.t, table.signal, table.noise, table.update))
    return make_table(f"{table.name}, afs {estimate}", table.tau, *later, start=start)
