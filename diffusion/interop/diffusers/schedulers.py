"""Says what the config of a scheduler is here: a schedule, a prediction, a clip, a sampler and a grid.

Every argument of a class is mapped, or has only the values that `_SUPPORTED` lists, or has no effect beside those.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion import options, schedules, timesteps
from diffusion.errors import InputError, is_whole
from diffusion.interop.diffusers import arguments
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
      clip: what its clip_sample does.
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
    "thresholding": (False,),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "final_sigmas_type": ("zero",),
    "euler_at_final": (False,),
    "lambda_min_clipped": (-float("inf"), None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "solver_p": (None,),
    "shift_terminal": (None,),
    "sigma_data": (0.5,),
    "s_noise": (1.0, 1),
    "sigma_schedule": ("karras", "exponential"),
    "shift": (1.0, 1),
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


def _with(name, **given):
    """Writes a name with the options that are given."""
    settings = ",".join(f"{key}={str(value).lower()}" for key, value in given.items() if value is not None)
    return f"{name}:{settings}" if settings else name


def _grid(fields):
    """Returns the grid of schedulers that take S timesteps."""
    if fields.get("use_karras_sigmas"):
        return "karras"
    if fields.get("use_exponential_sigmas") or fields.get("use_lu_lambdas"):
        return "log_snr"
    spacing = fields["timestep_spacing"]
    return _with(spacing, offset=fields["steps_offset"] or None if spacing == "leading" else None)


def _inner_grid(fields):
    """Returns the grid of those that space S + 1 timesteps and leave out the last, which is at the data."""
    grid = _grid(fields)
    if fields["timestep_spacing"] == "trailing" or grid in ("karras", "log_snr"):
        return grid
    return f"{grid}{',' if ':' in grid else ':'}last=false"


def _end(fields):
    """Returns the option of solvers whose last step goes to timestep 0 of theirs, not to the data."""
    return None if fields["set_alpha_to_one"] else 1


def _ddpm(fields):
    kind = {"fixed_large": "large", "learned_range": "learned"}.get(fields["variance_type"], "small")
    return _with("ddpm", variance=kind)


def _pndm(fields):
    return _with("plms" if fields["skip_prk_steps"] else "pndm", end=_end(fields))


_VARIANTS = {"midpoint": "official", "heun": "exact"}


def _multistep(fields):
    """Returns DPM-Solver++ and its stochastic kind; in the eps basis only what DEIS and DDIM are as well."""
    order, kind, solver = (fields[name] for name in ("solver_order", "algorithm_type", "solver_type"))
    final = None if fields["lower_order_final"] and order < 3 else False  # there it is lowered below 15 steps only
    if kind == "dpmsolver" and (order == 1 or (order == 2 and solver == "heun")):
        return "ddim" if order == 1 else "deis:order=2,lower_order_final=false"
    if kind not in ("dpmsolver++", "sde-dpmsolver++") or solver not in _VARIANTS or order not in (1, 2, 3):
        raise InputError(
            f"algorithm_type is {kind!r} with solver_type {solver!r} and solver_order {order}, which is not supported; "
            "supported: dpmsolver++ and sde-dpmsolver++ of order 1 to 3 with midpoint or heun, and dpmsolver of order "
            "1, or 2 with heun"
        )
    noise = 1 if kind.startswith("sde") else None
    return _with("dpm_solver_pp", order=order, sde_eta=noise, variant=_VARIANTS[solver], lower_order_final=final)


def _singlestep(fields):
    order, kind = fields["solver_order"], fields["algorithm_type"]
    if kind not in ("dpmsolver", "dpmsolver++") or order not in (1, 2, 3):
        raise InputError(
            f"algorithm_type is {kind!r} with solver_order {order}, which is not supported; supported: dpmsolver and "
            "dpmsolver++ of order 1 to 3"
        )
    return _with("dpm_solver_pp_singlestep" if kind == "dpmsolver++" else "dpm_solver", order=order)


_OTHERS = ("midpoint", "heun", "logrho")
"""Solver types of other classes, which UniPC there takes for bh2."""


def _unipc(fields):
    kept = fields["lower_order_final"] or None
    skipped = ",".join(map(str, fields["disable_corrector"])) or None
    return _with(
        "unipc",
        order=fields["solver_order"],
        variant="bh2" if fields["solver_type"] in _OTHERS else fields["solver_type"],
        lower_order_final=None if kept else False,
        disable_corrector=skipped,
    )


def _deis(fields):
    return _with("deis", order=fields["solver_order"], lower_order_final=False)


def _edm_levels(fields):
    require("", fields, {"prediction_type": ("epsilon",)})  # where there is one
    given = {"num_timesteps": int(fields["num_train_timesteps"])}
    given |= {name: float(fields[name]) for name in ("sigma_min", "sigma_max", "rho")}
    return _choice("edm", schedules.edm, given), "edm"


def _edm_grid(fields):
    return "log_snr" if fields["sigma_schedule"] == "exponential" else _with("karras", rho=float(fields["rho"]))


def _flow_levels(fields):
    given = {"num_timesteps": int(fields["num_train_timesteps"])}
    return _choice("rectified_flow", schedules.rectified_flow, given), "flow"


def _consistency(fields):
    return _with("consistency", sigma_min=float(fields["sigma_min"]))


_DDPM_CLASS = _Class(arguments.DDPM, _ddpm, _grid, steps=1000)
_DDIM_CLASS = _Class(arguments.DDIM, lambda fields: _with("ddim", end=_end(fields)), _grid, clip="keep_eps")

CLASSES = {
    "DDPMScheduler": _DDPM_CLASS,
    "DDPMParallelScheduler": _DDPM_CLASS,
    "DDIMScheduler": _DDIM_CLASS,
    "DDIMParallelScheduler": _DDIM_CLASS,
    "PNDMScheduler": _Class(arguments.PNDM, _pndm, _grid),
    "DPMSolverMultistepScheduler": _Class(arguments.MULTISTEP, _multistep, _inner_grid),
    "DPMSolverSinglestepScheduler": _Class(arguments.SINGLESTEP, _singlestep, _inner_grid),
    "UniPCMultistepScheduler": _Class(arguments.UNIPC, _unipc, _inner_grid),
    "DEISMultistepScheduler": _Class(arguments.DEIS, _deis, _inner_grid),
    "EulerDiscreteScheduler": _Class(arguments.EULER, lambda fields: "euler", _grid),
    "EulerAncestralDiscreteScheduler": _Class(arguments.ANCESTRAL, lambda fields: "euler_ancestral", _grid),
    "HeunDiscreteScheduler": _Class(arguments.HEUN, lambda fields: "heun", _grid),
    "KDPM2DiscreteScheduler": _Class({**arguments.LMS, **arguments.STABLE}, lambda fields: "dpm_solver:order=2", _grid),
    "LMSDiscreteScheduler": _Class(arguments.LMS, lambda fields: "lms", _grid),
    "EDMEulerScheduler": _Class(arguments.EDM, lambda fields: "euler", _edm_grid, levels=_edm_levels, time_shift=0.0),
    "EDMDPMSolverMultistepScheduler": _Class(
        arguments.EDM_DPM, _multistep, _edm_grid, levels=_edm_levels, time_shift=0.0
    ),
    "CMStochasticIterativeScheduler": _Class(
        arguments.CONSISTENCY, _consistency, lambda fields: "uniform", steps=1, levels=_edm_levels, time_shift=0.0
    ),
    "FlowMatchEulerDiscreteScheduler": _Class(
        arguments.FLOW_EULER, lambda fields: "euler", lambda fields: "linspace", levels=_flow_levels, time_shift=0.0
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
    if name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        allowed |= {"sigma_min": (None,), "sigma_max": (None,)}
    if name == "FlowMatchEulerDiscreteScheduler":
        allowed |= {"use_karras_sigmas": (False, None), "use_exponential_sigmas": (False, None)}
    if fields.get("algorithm_type") == "dpmsolver":
        allowed["final_sigmas_type"] = ("zero", "sigma_min")  # it knows no other end there; here it goes to the data
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
    clip = kind.clip if fields.get("clip_sample") or fields.get("clip_denoised") else "none"
    if sampler.startswith("dpm_solver") and "singlestep" in name.lower():
        steps = max(1, steps // fields["solver_order"])  # theirs counts network calls
    found = Sampling(schedule, prediction, clip, sampler, tau, steps, kind.time_shift)
    if name != "CMStochasticIterativeScheduler":
        return found
    return found._replace(time_scale=1000.0, sigma_min=float(fields["sigma_min"]))  # told 250 log(sigma)
