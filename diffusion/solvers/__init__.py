"""Solvers turn a schedule, a grid tau and options into a SamplerTable; here are all of them, and the tools to add one.

`diffusion.solvers.forms` shows with two complete examples how a solver is written.
"""

from collections.abc import Callable

from diffusion.solvers.adams import deis, ipndm, lms, plms, pndm
from diffusion.solvers.afs import analytic_first
from diffusion.solvers.ddim import ddim, ddpm, split_noise
from diffusion.solvers.differentiable import differentiable
from diffusion.solvers.exponential import dpm_solver_multistep, dpm_solver_pp
from diffusion.solvers.forms import (
    Form,
    Level,
    Stage,
    build,
    check_order,
    columns,
    eps_levels,
    eps_of,
    eps_weight,
    first_order,
    grid_levels,
    levels,
    newest,
    runge_kutta,
    step_orders,
)
from diffusion.solvers.heun import edm, heun, restart
from diffusion.solvers.langevin import CORRECTORS, langevin
from diffusion.solvers.moments import gaussian_moments
from diffusion.solvers.onestep import analytic_dpm, consistency, euler, euler_ancestral, sigma_hat, tcd
from diffusion.solvers.predictor_corrector import sa_solver, unipc
from diffusion.solvers.resampling import resampled
from diffusion.solvers.rungekutta import rk
from diffusion.solvers.singlestep import dpm_solver, dpm_solver_pp_singlestep
from diffusion.solvers.stochastic import dpm_solver_pp_sde, er_sde
from diffusion.solvers.table import SamplerTable, from_json, make_table, reverse

SOLVERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "sigma_hat": sigma_hat,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpm_solver": dpm_solver,
    "dpm_solver_multistep": dpm_solver_multistep,
    "dpm_solver_pp": dpm_solver_pp,
    "dpm_solver_pp_singlestep": dpm_solver_pp_singlestep,
    "dpm_solver_pp_sde": dpm_solver_pp_sde,
    "unipc": unipc,
    "sa_solver": sa_solver,
    "er_sde": er_sde,
    "deis": deis,
    "lms": lms,
    "ipndm": ipndm,
    "plms": plms,
    "pndm": pndm,
    "heun": heun,
    "edm": edm,
    "restart": restart,
    "rk": rk,
    "consistency": consistency,
    "tcd": tcd,
}
"""Solvers that need only a schedule and a grid; all their options have defaults."""

ESTIMATED_SOLVERS: dict[str, Callable[..., SamplerTable]] = {"analytic_dpm": analytic_dpm}
"""Solvers that also need gamma, which `diffusion.learning.analytic` estimates from a network and its data."""

__all__ = [
    "CORRECTORS",
    "ESTIMATED_SOLVERS",
    "SOLVERS",
    "Form",
    "Level",
    "SamplerTable",
    "Stage",
    "analytic_dpm",
    "analytic_first",
    "build",
    "check_order",
    "columns",
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "differentiable",
    "dpm_solver",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "dpm_solver_pp_sde",
    "dpm_solver_pp_singlestep",
    "edm",
    "eps_levels",
    "eps_of",
    "eps_weight",
    "er_sde",
    "euler",
    "euler_ancestral",
    "first_order",
    "from_json",
    "gaussian_moments",
    "grid_levels",
    "heun",
    "ipndm",
    "langevin",
    "levels",
    "lms",
    "make_table",
    "newest",
    "plms",
    "pndm",
    "resampled",
    "restart",
    "reverse",
    "rk",
    "runge_kutta",
    "sa_solver",
    "sigma_hat",
    "split_noise",
    "step_orders",
    "tcd",
    "unipc",
]
