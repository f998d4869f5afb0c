"""What the samplers and grids of diffusers, k-diffusion and their web UIs are called here.

A name is looked up without its case and signs, so "DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras" and
"sample_dpmpp_2m_sde" are one name, the last without its grid. Names of this package always mean themselves.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from diffusion.errors import InputError


class Meaning(NamedTuple):
    """What a name stands for: a sampler and, where the name says so, a grid; both as text with their options."""

    sampler: str
    tau: str = ""


_2M, _2S = "dpm_solver_pp:order=2", "dpm_solver_pp_singlestep:order=2"

SAMPLERS: dict[str, str] = {
    # k-diffusion's functions and what ComfyUI and stable-diffusion-webui make of their names
    "euler": "euler",
    "euler_ancestral": "euler_ancestral",
    "euler_a": "euler_ancestral",
    "heun": "heun",
    "dpm_2": "dpm_solver:order=2",
    "dpm_2_ancestral": "dpm_solver:order=2,eta=1",
    "dpm_2_a": "dpm_solver:order=2,eta=1",
    "dpm_adaptive": "adaptive",
    "dpm_fast": "dpm_solver:order=3,calls=fast",
    "dpmpp_2s": _2S,
    "dpmpp_2s_ancestral": f"{_2S},eta=1",
    "dpmpp_2s_a": f"{_2S},eta=1",
    "dpmpp_sde": "dpm_solver_pp_sde",
    "dpmpp_2m": f"{_2M},variant=official",
    "dpmpp_2m_sde": f"{_2M},sde_eta=1,variant=official",
    "dpmpp_2m_sde_heun": f"{_2M},sde_eta=1",
    "dpmpp_3m_sde": "dpm_solver_pp:order=3,sde_eta=1,variant=halved,lower_order_final=false",
    "uni_pc_bh2": "unipc:order=3,variant=bh2",
    "res_multistep": _2M,
    "lcm": "consistency",
    # diffusers' classes, with their defaults
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm:variance=small",
    "CMStochasticIterativeScheduler": "consistency:sigma_min=0.002",
    "DEISMultistepScheduler": "deis:order=2,lower_order_final=false,end=1",
    "DPMSolverMultistepScheduler": f"{_2M},variant=official",
    "DPMSolverSDEScheduler": "dpm_solver_pp_sde",
    "DPMSolverSinglestepScheduler": f"{_2S},variant=midpoint,calls=grid",
    "EDMDPMSolverMultistepScheduler": f"{_2M},variant=official",
    "EDMEulerScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "rk:order=2,basis=flow",
    "HeunDiscreteScheduler": "heun",
    "IPNDMScheduler": "ipndm",
    "KDPM2AncestralDiscreteScheduler": "dpm_solver:order=2,eta=1",
    "KDPM2DiscreteScheduler": "dpm_solver:order=2",
    "LCMScheduler": "consistency",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm:end=1",
    "SASolverScheduler": "sa_solver:predictor_order=2,corrector_order=2",
    "TCDScheduler": "tcd:end=1",
    "UniPCMultistepScheduler": "unipc:order=2,variant=bh2",
}
"""The samplers by the names of others, as those write them."""

GRIDS: dict[str, str] = {
    "exponential": "log_snr",
    "sgm_uniform": "linspace:last=false,rounded=false",
    "normal": "linspace:rounded=false",
    "simple": "trailing:floored=true",
    "align_your_steps": "ays",
}
"""The grids ("schedulers") by the names that ComfyUI and stable-diffusion-webui have for them."""

AMBIGUOUS: dict[str, tuple[str, ...]] = {
    "uni_pc": ("unipc:order=3,variant=bh1 (ComfyUI, stable-diffusion-webui)", "unipc:order=2,variant=bh2 (diffusers)"),
    "dpm_solver++": ("dpm_solver_pp (multistep)", "dpm_solver_pp_singlestep"),
    "beta": ("beta (the paper, ComfyUI)", "beta:of=sigma (diffusers, stable-diffusion-webui)"),
}
"""Names that mean two things."""


def plain(name: str) -> str:
    """Returns a name without its case and signs, and without what marks a class or function as a sampler."""
    text = re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))
    return text.removesuffix("scheduler").removeprefix("sample")


_SAMPLERS = {plain(name): meaning for name, meaning in SAMPLERS.items()}
_GRIDS = {plain(name): name for name in (*GRIDS, "karras", "polyexponential", "kl_optimal", "beta")}
_AMBIGUOUS = {plain(name): (name, meanings) for name, meanings in AMBIGUOUS.items()}


def grid_meaning(name: str, ours: Mapping[str, str] = MappingProxyType({})) -> str:
    """Returns what a grid of another library is called here, or "" if the name is not known.

    Args:
      name: "SGM Uniform", "Karras", ..., without options.
      ours: names of this package by their `plain` form.

    Raises:
      InputError: the name means two things.
    """
    _refuse_ambiguous(plain(name), name)
    found = _GRIDS.get(plain(name), "")
    return GRIDS.get(found, found) or ours.get(plain(name), "")


def meaning(name: str, ours: Mapping[str, str] = MappingProxyType({})) -> Meaning | None:
    """Returns what the sampler of another library is here, or None if the name is not known.

    Args:
      name: "dpmpp_2m_sde_karras", "DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", ..., without options.
      ours: names of this package by their `plain` form, which may end in a grid, too: "LMS Karras".

    Raises:
      InputError: the name means two things.
    """
    found, known = plain(name), {**ours, **_SAMPLERS}
    for text in dict.fromkeys((found, found.removeprefix("k"))):
        _refuse_ambiguous(text, name)
        if text in known:
            return Meaning(known[text])
        for ending, grid in _GRIDS.items():
            base = text.removesuffix(ending)
            if base != text and base in known:
                if not name.startswith(ours.get(base, name + " ")):  # written as ours, it is ours
                    _refuse_ambiguous(base, name)
                _refuse_ambiguous(ending, name, known[base])
                return Meaning(known[base], GRIDS.get(grid, grid))
    return None


def _refuse_ambiguous(text: str, name: str, sampler: str = "") -> None:
    """Raises InputError if a part of a name means two things; for that of a grid, the sampler is the other part."""
    if text in _AMBIGUOUS:
        known, meanings = _AMBIGUOUS[text]
        what = "" if text == plain(name) else f"{known!r} in "
        one, other = (meaning.partition(" ")[0] for meaning in meanings)
        remedy = f"write --sampler={sampler} --tau={one}, or --tau={other}" if sampler else "write the one you mean"
        raise InputError(f"{what}{name!r} means two things: {' and '.join(meanings)}; {remedy}")
