"""A grid tau says which of the T training timesteps a sampler visits; each function here builds one kind of grid.

Every grid is a float64 or int64 array of length S + 1 that descends strictly from its start to 0, so that both ends of
each step stand in it. All but `strided` have exactly S steps for every S in 1..T. The authors of `quadratic` and
`leading` start below T and yet draw x from N(0, I), which leaves out the signal alpha_bar[tau[0]] that x holds there.

All but `explicit` have an option start: every time is multiplied by it. On a schedule with next to no signal at T, as
the cosine one, the first estimate of x_0 made there is noise, and 0.985 helps every solver of few steps.
"""

from collections.abc import Callable

from diffusion.timesteps.checks import Tau, check, require_concrete
from diffusion.timesteps.noise import ays, beta, karras, kl_optimal, log_snr, polyexponential, shifted
from diffusion.timesteps.whole import (
    below,
    explicit,
    leading,
    linspace,
    quadratic,
    sections,
    strided,
    trailing,
    uniform,
)

GRIDS: dict[str, Callable[..., Tau]] = {
    "uniform": uniform,
    "strided": strided,
    "linspace": linspace,
    "quadratic": quadratic,
    "leading": leading,
    "trailing": trailing,
    "log_snr": log_snr,
    "karras": karras,
    "polyexponential": polyexponential,
    "kl_optimal": kl_optimal,
    "beta": beta,
    "shifted": shifted,
}
"""The grids that need only a number of steps, by name."""

MODEL_GRIDS: dict[str, Callable[..., Tau]] = {"ays": ays}
"""Grids that were found for certain models, and fit no schedule but theirs."""

__all__ = [
    "GRIDS",
    "MODEL_GRIDS",
    "Tau",
    "ays",
    "below",
    "beta",
    "check",
    "explicit",
    "karras",
    "kl_optimal",
    "leading",
    "linspace",
    "log_snr",
    "polyexponential",
    "quadratic",
    "require_concrete",
    "sections",
    "shifted",
    "strided",
    "trailing",
    "uniform",
]
