"""Solvers: functions (schedule, tau, options) -> SamplerTable, and what can be done with a table."""

from collections.abc import Callable

from diffusion.solvers.ddim import ddim, ddpm
from diffusion.solvers.table import SamplerTable, gaussian_moments, make_table, one_register

SOLVERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
}

__all__ = ["SOLVERS", "SamplerTable", "ddim", "ddpm", "gaussian_moments", "make_table", "one_register"]
