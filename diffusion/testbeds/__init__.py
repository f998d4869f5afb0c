"""Exact denoisers and exact solutions of the probability flow: solvers and likelihoods judged with no model error."""

from diffusion.testbeds.denoisers import Testbed, from_denoiser, gaussian, ideal, mixture
from diffusion.testbeds.flow import gaussian_flow, ode_solution

__all__ = ["Testbed", "from_denoiser", "gaussian", "gaussian_flow", "ideal", "mixture", "ode_solution"]
