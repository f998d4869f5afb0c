"""Names that other libraries have for samplers and grids, on the command line: what they stand for is printed.

A scheduler of diffusers may be written with its arguments, as in
--sampler="DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++, use_karras_sigmas=True)".
"""

import ast
import re
from typing import Any

from diffusion.errors import InputError
from diffusion.interop.diffusers import schedulers
from diffusion.learning import paths
from diffusion.solvers import ESTIMATED_SOLVERS, SOLVERS
from diffusion.solvers import names as foreign
from diffusion.timesteps import GRIDS, MODEL_GRIDS

_CALL = re.compile(r"\s*(\w+Scheduler)\s*\((.*)\)\s*", re.DOTALL)
_OF_GRIDS = ("timestep_spacing", "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")


def meaning(sampler: str) -> foreign.Meaning:
    """Returns the sampler that a text stands for here, and the grid if the text says one; itself where it is ours.

    Raises:
      InputError: a name that means two things, or arguments of a scheduler that are not supported.
    """
    if call := _CALL.fullmatch(sampler):
        return _scheduler(call[1], call[2])
    name, colon, options = sampler.partition(":")
    if name in SOLVERS | ESTIMATED_SOLVERS:
        return foreign.Meaning(sampler)
    ours = {foreign.plain(known): known for known in SOLVERS | ESTIMATED_SOLVERS}
    found = foreign.meaning(name) or (
        foreign.Meaning(ours[foreign.plain(name)]) if foreign.plain(name) in ours else None
    )
    if found is None:
        return foreign.Meaning(sampler)
    joined = f"{found.sampler}{',' if ':' in found.sampler else ':'}{options}" if colon and options else found.sampler
    return found._replace(sampler=joined)


def chosen(sampler: str, tau: str, tau_given: bool) -> tuple[str, str]:
    """Returns the sampler and the grid that are meant, and prints what a name of another library stands for.

    Args:
      sampler: as the user wrote it.
      tau: the grid that is taken where the sampler's name says none.
      tau_given: whether the user asked for that grid.

    Raises:
      InputError: as `meaning`; or both the name and the user say a grid.
    """
    found = meaning(sampler)
    if found.tau and tau_given and tau != found.tau:
        raise InputError(f"sampler {sampler} takes the grid {found.tau}; leave out --tau, or write {found.sampler}")
    _say(sampler, found)
    return found.sampler, found.tau or tau


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
    if name in GRIDS | MODEL_GRIDS | paths.GRIDS or name in ("sections", "explicit"):
        return tau
    found = foreign.grid_meaning(name)
    if not found:
        return tau
    return f"{found}{',' if ':' in found else ':'}{options}" if colon and options else found


def _say(sampler: str, found: foreign.Meaning) -> None:
    if found.sampler != sampler:
        print(f"note: {sampler} stands for --sampler={found.sampler}" + f" --tau={found.tau}" * bool(found.tau))


def _scheduler(name: str, arguments: str) -> foreign.Meaning:
    """Reads a scheduler with its arguments."""
    if name not in schedulers.CLASSES:
        known = ", ".join(schedulers.CLASSES)
        raise InputError(f"sampler {name} is not known with its arguments; those that are: {known}")
    given: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in arguments.split(","))):
        key, equals, text = (side.strip() for side in part.partition("="))
        if not equals or not key.isidentifier():
            raise InputError(f"sampler {name}(...): {part!r} is no argument; write NAME=VALUE, with commas between")
        try:
            given[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[key] = text
    found = schedulers.read_scheduler(f"sampler {name}", {"_class_name": name, **given})
    return foreign.Meaning(found.sampler, found.tau if any(key in given for key in _OF_GRIDS) else "")
