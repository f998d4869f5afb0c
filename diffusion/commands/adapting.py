"""Reads --sampler=adaptive, which is no table: each image takes as many network calls as its error asks for."""

from typing import Any

from diffusion import adaptive, options
from diffusion.adaptive import ADAPTIVE, Adaptive
from diffusion.commands import samplers, students
from diffusion.commands.sources import Source
from diffusion.errors import InputError
from diffusion.sampling import check_prediction

FOR_TABLES = ("steps", "eta", "afs", "corrector", "noise", "cache", "resample", "gif")
"""The flags of sample.py that say something of a number of calls, which an adaptive solver does not know before."""

START = 2
"""Steps of the grid whose start is taken."""


def is_adaptive(sampler: str) -> bool:
    """Whether a sampler is named that chooses its own steps."""
    return sampler.partition(":")[0] in ADAPTIVE


def grid(given: Any, tau: str) -> str:
    """Returns a grid with a start of its own: that of the model, unless it starts the lower the fewer its steps are.

    Args:
      given: all flags.
      tau: what --tau or the model names.

    Raises:
      InputError: --tau names such a grid.
    """
    if tau.partition(":")[0] != "leading":
        return tau
    if given.tau is not None:
        raise InputError(f"tau {tau} starts where its number of steps says, and adaptive has none; take uniform")
    return "uniform"


def solver(given: Any, source: Source, sampler: str, tau: str) -> Adaptive:
    """Returns the adaptive solver that the flags ask for.

    Args:
      given: all flags of sample.py.
      source: the model.
      sampler: by name, with options.
      tau: the grid whose start is the solver's.

    Raises:
      InputError: an option or a flag that it does not have, or a model that it cannot serve.
    """
    for name in FOR_TABLES:
        if not given[name].using_default_value:
            raise InputError(f"--{name} is for samplers with a number of steps, and {sampler} has none; leave it out")
    model = source.trained.model
    students.check_is_denoiser(source.trained.config, f"sampler {sampler}")
    adaptive.check_alone(model.prediction, source.guidance if source.guidance.acts() else None)
    choice = options.parse("sampler", sampler, ADAPTIVE, leading=2)
    grid = samplers.make_tau(model.schedule, tau, START, source.resources())
    found = choice.function(model.schedule, grid, **choice.options)
    check_prediction(found, model.prediction)
    return found
