"""Says what the config of a scheduler is here: a schedule, a prediction, a clip, a sampler and a grid.

Every argument of a class is mapped, or has only the values that `_SUPPORTED` lists, or has no effect beside those.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion import options, schedules, timesteps
from diffusion.errors import InputError, is_whole
from diffusion.interop.diffusers import arguments
from diffusion.interop.diffusers import scheduler_texts as told
from diffusion.interop.diffusers.state import fields_of, require
from diffusion.solvers import SOLVERS


class Sampling(NamedTuple):
    """What a scheduler is here.

    Attributes:
      schedule, prediction, clip, sampler, tau: as config.schedule, config.train.prediction and config.sample have them.
      steps: how many its pipeline makes unless told otherwise.
      time_scale, time_shift: what a time of ours is multiplied by, and what is added, to make theirs.
      sigma_min: of a consistency model, see `models.UNet2D`; 0 for any other.
    """

    schedule: str
    prediction: str
    clip: str
    sampler: str
    tau: str
    steps: int
    time_shift: float = -1.0
    time_scale: float = 1.0
    sigma_min: float = 0.0


class _Class(NamedTuple):
    """One class of schedulers.

    Attributes:
      defaults: its arguments.
      sampler: arguments -> the sampler's text.
      grid: arguments -> the grid's text.
      steps: of its pipeline.
      clip: what its clip_sample does, or its thresholding.
      levels: arguments -> (schedule, prediction).
      time_shift: see `Sampling`.
    """

    defaults: Mapping[str, Any]
    sampler: Callable[[Mapping[str, Any]], str]
    grid: Callable[[Mapping[str, Any]], str]
    steps: int = 50
    clip: str = "recompute"
    levels: Callable[[Mapping[str, Any]], tuple[str, str]] = lambda fields: (_schedule(fields), _prediction(fields))
    time_shift: float = -1.0


_SUPPORTED = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (None,),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "thresholding": (False, True),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "final_sigmas_type": ("zero",),
    "euler_at_final": (False,),
    "lambda_min_clipped": (-float("inf"), None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "solver_p": (None,),
    "shift_terminal": (None,),
    "sigma_data": (0.5,),
    "s_noise": (1.0, 1),
    "sigma_schedule": ("karras", "exponential"),
    "tau_func": (None,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
}
"""The values of the arguments that have not all of them here."""


def _choice(name, function, given):
    """Writes a choice with its options as text, without those at their defaults."""
    return options.write(options.Choice(name, function, given), leading=0)


_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def _schedule(fields):
    name = _SCHEDULES[fields["beta_schedule"]]
    given = {"num_timesteps": int(fields["num_train_timesteps"])}
    if name != "cosine":
        given |= {end: float(fields[end]) for end in ("beta_start", "beta_end")}
    given |= {"zero_snr": True} if fields.get("rescale_betas_zero_snr") else {}
    return _choice(name, schedules.SCHEDULES[name], given)


_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def _prediction(fields):
    return _PREDICTIONS[fields["prediction_type"]]


def _edm_levels(fields):
    require("", fields, {"prediction_type": ("epsilon",)})  # where there is one
    given = {"num_timesteps": int(fields["num_train_timesteps"])}
    given |= {name: float(fields[name]) for name in ("sigma_min", "sigma_max", "rho")}
    return _choice("edm", schedules.edm, given), "edm"


def _flow_levels(fields):
    given = {"num_timesteps": int(fields["num_train_timesteps"])}
    return _choice("rectified_flow", schedules.rectified_flow, given), "flow"


_DDPM_CLASS = _Class(arguments.DDPM, told.ddpm, told.grid, steps=1000)
_DDIM_CLASS = _Class(
    arguments.DDIM, lambda fields: told.spelled("ddim", end=told.end(fields)), told.grid, clip="keep_eps"
)

CLASSES = {
    "DDPMScheduler": _DDPM_CLASS,
    "DDPMParallelScheduler": _DDPM_CLASS,
    "DDIMScheduler": _DDIM_CLASS,
    "DDIMParallelScheduler": _DDIM_CLASS,
    "PNDMScheduler": _Class(arguments.PNDM, told.pndm, told.grid),
    "DPMSolverMultistepScheduler": _Class(arguments.MULTISTEP, told.multistep, told.inner_grid),
    "DPMSolverSinglestepScheduler": _Class(arguments.SINGLESTEP, told.singlestep, told.inner_grid),
    "UniPCMultistepScheduler": _Class(arguments.UNIPC, told.unipc, told.inner_grid),
    "DEISMultistepScheduler": _Class(arguments.DEIS, told.deis, told.inner_grid),
    "SASolverScheduler": _Class(arguments.SA, told.sa, told.inner_grid),
    "EulerDiscreteScheduler": _Class(arguments.EULER, lambda fields: "euler", told.exact_grid),
    "EulerAncestralDiscreteScheduler": _Class(arguments.ANCESTRAL, lambda fields: "euler_ancestral", told.exact_grid),
    "HeunDiscreteScheduler": _Class(arguments.HEUN, lambda fields: "heun", told.exact_grid),
    "KDPM2DiscreteScheduler": _Class(arguments.KDPM2, lambda fields: "dpm_solver:order=2", told.exact_grid),
    "KDPM2AncestralDiscreteScheduler": _Class(
        arguments.KDPM2, lambda fields: "dpm_solver:order=2,eta=1", told.exact_grid
    ),
    "DPMSolverSDEScheduler": _Class(arguments.SDE, lambda fields: "dpm_solver_pp_sde", told.exact_grid),
    "LMSDiscreteScheduler": _Class(arguments.LMS, lambda fields: "lms", told.exact_grid),
    "TCDScheduler": _Class(arguments.DISTILLED, told.tcd, told.original_grid, steps=4, clip="keep_eps"),
    "LCMScheduler": _Class(arguments.DISTILLED, lambda fields: "consistency", told.original_grid, steps=4),
    "EDMEulerScheduler": _Class(
        arguments.EDM, lambda fields: "euler", told.edm_grid, levels=_edm_levels, time_shift=0.0
    ),
    "EDMDPMSolverMultistepScheduler": _Class(
        arguments.EDM_DPM, told.multistep, told.edm_grid, levels=_edm_levels, time_shift=0.0
    ),
    "CMStochasticIterativeScheduler": _Class(
        arguments.CONSISTENCY, told.consistency, lambda fields: "uniform", steps=1, levels=_edm_levels, time_shift=0.0
    ),
    "FlowMatchEulerDiscreteScheduler": _Class(
        arguments.FLOW_EULER, lambda fields: "euler", told.flow_grid, levels=_flow_levels, time_shift=0.0
    ),
    "FlowMatchHeunDiscreteScheduler": _Class(
        arguments.FLOW_HEUN, lambda fields: "rk:order=2,basis=flow", told.flow_grid, levels=_flow_levels, time_shift=0.0
    ),
}
"""The schedulers by the names of their classes."""

_FOREIGN = {name for kind in CLASSES.values() for name in kind.defaults}
_FOREIGN |= {"tensor_format", "original_inference_steps", "timestep_scaling", "predict_epsilon"}
"""Arguments that a config may keep from another class, and that its own class does not read."""


def _check_sampler(schedule, sampler, steps):
    """Raises InputError if a solver does not take its options, as an order of 9."""
    chosen = options.parse("config.schedule", schedule, schedules.SCHEDULES, leading=0)
    levels = chosen.function(**chosen.options)
    solver = options.parse("sampler", sampler, SOLVERS, leading=2)
    solver.function(levels, timesteps.uniform(levels, steps), **solver.options)


def read_scheduler(where: str, config: Mapping[str, Any]) -> Sampling:
    """Returns what the config of a scheduler is here.

    Args:
      where: what errors call the config.
      config: as scheduler_config.json has it.

    Raises:
      InputError: a class, field or value that is not supported, which is named.
    """
    name = config["_class_name"]
    if name not in CLASSES:
        raise InputError(f"{where}: {name} is not supported; supported: {', '.join(CLASSES)}")
    kind = CLASSES[name]
    if config.get("predict_epsilon") is False and "prediction_type" not in config:  # as files of 2022 have it
        config = {**config, "prediction_type": "sample"}
    fields = fields_of(where, config, kind.defaults, _FOREIGN)
    allowed = dict(_SUPPORTED)
    if kind.defaults.get("variance_type", "") is None:
        allowed["variance_type"] = (None,)
    if fields.get("clip_sample"):
        allowed["clip_sample_range"] = (1.0, 1)
    if fields.get("thresholding"):  # whose bound is between 1 and this: it clips to [-1, 1], whatever the quantile
        allowed["sample_max_value"] = (1.0, 1)
    if name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        allowed |= {"sigma_min": (None,), "sigma_max": (None,)}
    if name == "FlowMatchEulerDiscreteScheduler":
        kinds = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        allowed |= dict.fromkeys(kinds, (False, None))
    if (
        name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
        or fields.get("algorithm_type") == "dpmsolver"
    ):
        allowed["final_sigmas_type"] = ("zero", "sigma_min")
    require(where, fields, allowed)
    if not is_whole(fields["num_train_timesteps"]):
        raise InputError(f"{where}: num_train_timesteps is {fields['num_train_timesteps']!r}; it must be whole")
    try:
        schedule, prediction = kind.levels(fields)
        sampler, tau = kind.sampler(fields), kind.grid(fields)
        steps = min(kind.steps, int(fields["num_train_timesteps"]))
        _check_sampler(schedule, sampler, min(steps, 50))
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix(': ')}") from None
    clips = any(fields.get(name) for name in ("clip_sample", "clip_denoised", "thresholding"))
    clip = kind.clip if clips else "none"
    found = Sampling(schedule, prediction, clip, sampler, tau, steps, kind.time_shift)
    if name != "CMStochasticIterativeScheduler":
        return found
    return found._replace(time_scale=1000.0, sigma_min=float(fields["sigma_min"]))  # told 250 log(sigma)
