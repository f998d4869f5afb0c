"""Solvers: functions (schedule, tau, options) -> SamplerTable, and what can be done with a table."""

from collections.abc import Callable

from diffusion.solvers.ddim import ddim, ddpm
from diffusion.solvers.table import SamplerTable, from_json, gaussian_moments, make_table, one_register, reverse

SOLVERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
}

__all__ = [
    "SOLVERS",
    "SamplerTable",
    "ddim",
    "ddpm",
    "from_json",
    "gaussian_moments",
    "make_table",
    "one_register",
    "reverse",
]
