"""Offers exact denoisers and exact flows, so that solvers and likelihoods can be judged without a model's error."""

from diffusion.testbeds.denoisers import Testbed, from_denoiser, gaussian, ideal, mixture
from diffusion.testbeds.flow import gaussian_flow, ode_solution

__all__ = ["Testbed", "from_denoiser", "gaussian", "gaussian_flow", "ideal", "mixture", "ode_solution"]
