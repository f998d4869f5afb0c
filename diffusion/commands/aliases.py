"""Names that other libraries have for samplers and grids, on the command line: what they stand for is printed.

A scheduler of diffusers may be written with its arguments, as in
--sampler="DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++, use_karras_sigmas=True)".
"""

import ast
import re
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from diffusion.adaptive import ADAPTIVE
from diffusion.errors import InputError
from diffusion.interop.diffusers import schedulers
from diffusion.learning import paths
from diffusion.solvers import ESTIMATED_SOLVERS, SOLVERS
from diffusion.solvers import names as foreign
from diffusion.timesteps import GRIDS, MODEL_GRIDS

_BEGUN = re.compile(r"\s*(\w+Scheduler)\s*\(")
_CALL = re.compile(_BEGUN.pattern + r"((?:[^()]|\([^()]*\))*)\)\s*")
_OF_GRIDS = ("timestep_spacing", "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
_OF_GRIDS += ("use_beta_sigmas", "shift", "rho", "sigma_schedule", "original_inference_steps")
"""The arguments of schedulers that say a grid."""

_OF_MODELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_OF_MODELS += ("rescale_betas_zero_snr", "clip_sample", "clip_sample_range", "clip_denoised", "sigma_max", "sigma_data")
"""Those that say what the model is, or how its estimates are clipped."""


def meaning(sampler: str) -> foreign.Meaning:
    """Returns the sampler that a text stands for here, and the grid if the text says one; itself where it is ours.

    Raises:
      InputError: a name that means two things, or arguments of a scheduler that are not supported.
    """
    if begun := _BEGUN.match(sampler):
        call = _CALL.fullmatch(sampler)
        if call is None:
            raise InputError(
                f"sampler {sampler} is no call of {begun[1]}; write {begun[1]}(NAME=VALUE, ...) and nothing after it, "
                "and the grid with --tau"
            )
        return _scheduler(call[1], call[2])
    name, colon, options = sampler.partition(":")
    if name in SOLVERS | ESTIMATED_SOLVERS | ADAPTIVE:
        return foreign.Meaning(sampler)
    found = foreign.meaning(name, {foreign.plain(known): known for known in SOLVERS | ESTIMATED_SOLVERS})
    if found is None:
        return foreign.Meaning(sampler)
    return found._replace(sampler=_with(found.sampler, options)) if colon and options else found


def _with(text, options):
    """Returns a name with its options, of which those of the user replace its own."""
    name, _, own = text.partition(":")
    asked = {part.partition("=")[0].strip() for part in options.split(",")}
    kept = [part for part in own.split(",") if part and part.partition("=")[0] not in asked]
    return f"{name}:{','.join([*kept, options])}"


def chosen(sampler: str, tau: str, tau_given: bool, tau_field: str = "--tau") -> tuple[str, str]:
    """Returns the sampler and the grid that are meant, and prints what a name of another library stands for.

    Args:
      sampler: as the user wrote it.
      tau: the grid that is taken where the sampler's name says none.
      tau_given: whether the user asked for that grid.
      tau_field: where the user did, for the error.

    Raises:
      InputError: as `meaning`; or both the name and the user say a grid.
    """
    found = meaning(sampler)
    if found.tau and tau_given and tau != found.tau:
        raise InputError(
            f"sampler {sampler} takes the grid {found.tau}; leave out {tau_field}, or write {found.sampler}"
        )
    _say(sampler, found)
    return found.sampler, found.tau or tau


def put_ours(section: ConfigDict, given: Collection[str], usual: str) -> None:
    """Puts what names of other libraries stand for in their places in config.sample; a run's record has ours only.

    Args:
      section: config.sample, which is changed.
      given: the fields that the command line sets, as "sample.tau".
      usual: the grid that nobody has asked for.

    Raises:
      InputError: as `chosen`.
    """
    tau = grid(section.tau)
    # A grid of the recipe belongs to the recipe's sampler, and one that the command line names brings its own.
    tau_given = "sample.tau" in given or ("sample.sampler" not in given and section.tau != usual)
    section.sampler, section.tau = chosen(section.sampler, tau, tau_given, "config.sample.tau")


def without_grid(sampler: str, say: bool = False) -> str:
    """Returns the sampler that is meant, where its name may say no grid.

    Args:
      sampler: as the user wrote it.
      say: whether to print what it stands for.

    Raises:
      InputError: as `meaning`; or the name says a grid.
    """
    found = meaning(sampler)
    if found.tau:
        raise InputError(
            f"sampler {sampler} names a grid as well; write {found.sampler}, and the grid as tau: {found.tau}"
        )
    if say:
        _say(sampler, found)
    return found.sampler


def grid(tau: str) -> str:
    """Returns the grid that a text stands for: another library's name for one of ours, or the text itself.

    Raises:
      InputError: a name that means two things.
    """
    name, colon, options = tau.partition(":")
    known = GRIDS | MODEL_GRIDS | paths.GRIDS
    if name in known or name in ("sections", "explicit"):
        return tau
    found = foreign.grid_meaning(name, {foreign.plain(ours): ours for ours in known})
    if not found:
        return tau
    return _with(found, options) if colon and options else found


def _say(sampler: str, found: foreign.Meaning) -> None:
    if found.sampler != sampler:
        print(f"note: {sampler} stands for --sampler={found.sampler}" + f" --tau={found.tau}" * bool(found.tau))


def _scheduler(name: str, arguments: str) -> foreign.Meaning:
    """Reads a scheduler with its arguments."""
    if name not in schedulers.CLASSES:
        known = ", ".join(schedulers.CLASSES)
        raise InputError(f"sampler {name} is not known with its arguments; those that are: {known}")
    given: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in re.split(r",(?![^\[(]*[\])])", arguments))):
        key, equals, text = (side.strip() for side in part.partition("="))
        if not equals or not key.isidentifier() or key in given:
            raise InputError(f"sampler {name}(...): {part!r} is no argument, or its second; write NAME=VALUE once each")
        if key in _OF_MODELS:
            raise InputError(
                f"sampler {name}(...): {key} is of the model, which is what it was trained as; leave it out"
            )
        try:
            given[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[key] = text
    found = schedulers.read_scheduler(f"sampler {name}", {"_class_name": name, **given})
    return foreign.Meaning(found.sampler, found.tau if any(key in given for key in _OF_GRIDS) else "")
