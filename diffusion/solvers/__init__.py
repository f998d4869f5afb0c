"""Solvers: functions (schedule, tau, options) -> SamplerTable, and what can be done with a table."""

from collections.abc import Callable

from diffusion.solvers.adams import deis, ipndm, lms, plms, pndm
from diffusion.solvers.ddim import ddim, ddpm
from diffusion.solvers.differentiable import differentiable
from diffusion.solvers.exponential import dpm_solver_pp, unipc
from diffusion.solvers.heun import edm, heun
from diffusion.solvers.onestep import analytic_dpm, consistency, euler, euler_ancestral, sigma_hat
from diffusion.solvers.singlestep import dpm_solver, dpm_solver_pp_singlestep
from diffusion.solvers.table import SamplerTable, from_json, gaussian_moments, make_table, one_register, reverse

SOLVERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "sigma_hat": sigma_hat,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpm_solver": dpm_solver,
    "dpm_solver_pp": dpm_solver_pp,
    "dpm_solver_pp_singlestep": dpm_solver_pp_singlestep,
    "unipc": unipc,
    "deis": deis,
    "lms": lms,
    "ipndm": ipndm,
    "plms": plms,
    "pndm": pndm,
    "heun": heun,
    "edm": edm,
    "consistency": consistency,
}
"""Solvers that need nothing but a schedule and a grid; options have defaults."""

ESTIMATED_SOLVERS: dict[str, Callable[..., SamplerTable]] = {"analytic_dpm": analytic_dpm}
"""Solvers that also need gamma, which `diffusion.learning.analytic` estimates from a network and its data."""

__all__ = [
    "ESTIMATED_SOLVERS",
    "SOLVERS",
    "SamplerTable",
    "analytic_dpm",
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "differentiable",
    "dpm_solver",
    "dpm_solver_pp",
    "dpm_solver_pp_singlestep",
    "edm",
    "euler",
    "euler_ancestral",
    "from_json",
    "gaussian_moments",
    "heun",
    "ipndm",
    "lms",
    "make_table",
    "one_register",
    "plms",
    "pndm",
    "reverse",
    "sigma_hat",
    "unipc",
]
