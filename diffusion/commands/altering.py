"""Reads --afs and --corrector, which change a solver's table, and --noise, which says how its noise is drawn."""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from diffusion import options, solvers
from diffusion.brownian import Brownian
from diffusion.commands import students, usage
from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SamplerTable
from diffusion.solvers.afs import ESTIMATES

NOISES = ("calls", "brownian")
"""Fresh noise for each network call, or that of one path whatever the number of steps."""

FLAGS = ("afs", "corrector", "noise")


def define_flags() -> None:
    """Defines the flags of this module."""
    usage.group("Added to the sampler")
    flags.DEFINE_enum(
        "afs", None, ESTIMATES, "Analytic first step: make no network call for the first estimate, but take this one."
    )
    flags.DEFINE_string(
        "corrector",
        None,
        "Steps at every noise level before the sampler's own, as langevin:snr=0.16,steps=1; a network call each.",
    )
    help_of_noise = "Noise of the steps: new in each of the calls; or brownian, so that other --steps see the same."
    flags.DEFINE_enum("noise", "calls", NOISES, help_of_noise)


def settings(given: Any) -> dict[str, str]:
    """Returns what the flags ask for, for the record; nothing for what is left as it is."""
    return {name: given[name].value for name in FLAGS if given[name].value != given[name].default}


def with_first(given: Any, config: ConfigDict, table: SamplerTable) -> SamplerTable:
    """Returns the table with the analytic first step that --afs asks for.

    Args:
      given: all flags.
      config: of the model.
      table: the sampler.

    Raises:
      InputError: a model or a table that cannot have one.
    """
    if given.afs is None:
        return table
    _check(config, table, "--afs")
    return solvers.analytic_first(table, given.afs)


def with_corrector(given: Any, config: ConfigDict, table: SamplerTable) -> SamplerTable:
    """Returns the table with the steps of --corrector; arguments and errors as of `with_first`."""
    if given.corrector is None:
        return table
    choice = options.parse("corrector", given.corrector, solvers.CORRECTORS, leading=1)
    _check(config, table, "--corrector")
    return choice.function(table, **choice.options)


def noise(given: Any, schedule: NoiseSchedule, table: SamplerTable) -> Brownian | None:
    """Returns the noise that --noise asks for; None for that of `sample` itself.

    Raises:
      InputError: the table draws no noise, or none of a brownian path.
    """
    if given.noise == "calls":
        return None
    found = Brownian(schedule.num_timesteps)
    found.intervals(table)
    return found


def _check(config, table, flag):
    students.check_is_denoiser(config, flag)
    if table.facts:
        raise InputError(f"{flag} is for solvers, and {table.name} is learned as it is; leave it out")
