"""Samplers and grids by name: every program finds them here, whatever makes the table."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion import options, schedules, timesteps
from diffusion.adaptive import ADAPTIVE
from diffusion.commands import aliases, learned, own
from diffusion.errors import InputError, users_code
from diffusion.guidance import RULES
from diffusion.learning import paths
from diffusion.model import Model
from diffusion.sampling import check_prediction, check_variance
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import ESTIMATED_SOLVERS, SOLVERS, SamplerTable
from diffusion.solvers import make_table as make_checked_table
from diffusion.timesteps import GRIDS, MODEL_GRIDS, Tau

SAMPLERS = SOLVERS | ESTIMATED_SOLVERS

OWN_LENGTH = {"sections": timesteps.sections, "explicit": timesteps.explicit}
"""Grids that carry their own number of steps."""

TABLE_SUFFIX = ".json"

TAUS = GRIDS | OWN_LENGTH | MODEL_GRIDS | paths.GRIDS
"""All grids by name."""

Resources = Mapping[str, Callable[[Tau], Any]]
"""Options that cannot be written as text, as functions of the grid; `Source.resources` has those of a trained model."""


def make_tau(schedule: NoiseSchedule, text: str, num_steps: int, resources: Resources | None = None) -> Tau:
    """Returns the grid of a name, as "uniform", "karras:rho=5" or "explicit:times=1000,500,250".

    Args:
      schedule: the noise schedule.
      text: a key of GRIDS, OWN_LENGTH or `paths.GRIDS`, with its options.
      num_steps: S; grids of their own length ignore it, see `chosen_steps`.
      resources: what the last of these estimate on a trained model; see `Resources`.

    Raises:
      InputError: an unknown name or option, or a grid that the schedule cannot have.
    """
    text = aliases.grid(text)
    own = _name(text) in OWN_LENGTH
    leading = 1 if own else 2
    choice = options.parse("tau", text, TAUS, leading)
    if choice.name in paths.GRIDS:
        choice = _with_estimate(choice, resources)
    if missing := choice.missing(leading):
        example = {"times": "1000,500,250", "counts": "10,15,20"}.get(missing[0], "VALUE")
        raise InputError(f"tau {choice.name} needs {missing[0]}; write {choice.name}:{missing[0]}={example}")
    return choice.function(schedule, *[num_steps] * (not own), **choice.options)


def _with_estimate(choice, resources):
    """Gives a grid that needs an estimate the function that makes it."""
    (name,) = (
        name for name, default in options.defaults(choice.function, leading=2).items() if default is options.REQUIRED
    )
    if name in choice.options:
        raise InputError(f"tau {choice.name} takes no {name} as text, it is estimated; leave it out")
    if name not in (resources or {}):
        raise InputError(
            f"tau {choice.name} is found on a trained model; sample.py and evaluate.py do so for samples, and "
            "sample.py --dry_run prints the times, for --tau=explicit:times=..."
        )
    return choice._replace(options={**choice.options, name: resources[name]})


def parse_calls(texts: Sequence[str], most: int) -> tuple[int, ...]:
    """Returns the numbers of --calls; raises InputError unless they are whole, in 1..most, and each there once."""
    # What has more digits than any number of calls is no number that Python must read.
    plain = texts and all(text.strip().isdecimal() and text.isascii() and len(text) < 10 for text in texts)
    calls = tuple(map(int, texts)) if plain else ()
    if not calls or not all(1 <= count <= most for count in calls) or len(set(calls)) < len(calls):
        raise InputError(f"calls is {','.join(texts)[:40]!r}; give whole numbers in 1..{most}, each once, as 3,5,10")
    return calls


def chosen_steps(tau: str, given: Any, default: Any) -> Any:
    """Returns what --steps gives, or the default where it gives nothing; refuses steps beside a grid that has its own.

    Raises:
      InputError: both are given.
    """
    if given is not None and _name(tau) in OWN_LENGTH:
        raise InputError(f"tau {tau} has its own number of steps; leave out --steps")
    return default if given is None else given


def make_table(
    schedule: NoiseSchedule,
    sampler: str,
    num_steps: int,
    tau: str,
    *,
    eta: float | None = None,
    resources: Resources | None = None,
) -> SamplerTable:
    """Returns the table of a sampler by name.

    Args:
      schedule: the noise schedule.
      sampler: a key of SAMPLERS, with options after a colon ("ddim:eta=0.5", "dpm_solver_pp:order=3,variant=official"),
        or a name of another library, see `aliases`;
        a function of the user's own ("package.module:function:order=2"), which is imported, see `own.stored`; or the
        path of a table that `SamplerTable.to_json` wrote ("mine.json"), which has its own grid.
      num_steps, tau: see `make_tau`.
      eta: short for the option of that name; None leaves it to the text.
      resources: options that are estimated and not written; see `Resources`.

    Raises:
      InputError: an unknown name or option, a value out of its range, an option without its value; a function or a file
        that gives no table, or one for another schedule.
    """
    if is_file(sampler):
        return _read_table(sampler, schedule, eta)
    if is_own(sampler):
        return _own_table(schedule, sampler, make_tau(schedule, tau, num_steps, resources), eta)
    if sampler == learned.LEARNED:
        raise InputError(f"sampler {sampler} is a table learned for a trained model by learn.py; name a solver here")
    sampler = aliases.without_grid(sampler)
    if _name(sampler) in ADAPTIVE:
        raise InputError(f"sampler {sampler} has as many calls as an image needs: only sample.py draws with it")
    choice = options.parse("sampler", sampler, SAMPLERS, leading=2)
    if eta is not None:
        choice = _with_eta(choice, eta)
    for name, default in options.defaults(choice.function, leading=2).items():
        if default is options.REQUIRED and name in choice.options:
            raise InputError(f"sampler {choice.name} takes no {name} as text, it is estimated; leave it out")
    grid = make_tau(schedule, tau, num_steps, resources)
    given = dict(choice.options)
    for name in options.defaults(choice.function, leading=2):
        if name not in given and name in (resources or {}):
            given[name] = resources[name](grid)
    for name in choice.missing(leading=2):
        if name not in given:
            raise InputError(
                f"sampler {choice.name} needs {name}, which is estimated on a trained model and its data; sample.py "
                "and evaluate.py do so"
            )
    return choice.function(schedule, grid, **given)


def is_file(sampler: str) -> bool:
    """Whether a sampler is named by the file of its table."""
    return sampler.endswith(TABLE_SUFFIX)


def is_own(sampler: str) -> bool:
    """Whether a sampler is named as a function of the user's own."""
    return bool(options.own_name(sampler)) and _name(sampler) not in SAMPLERS


def default_eta(sampler: str) -> float | None:
    """Returns what eta is where it is not given, or None where the sampler has none or the text names its own."""
    name = _name(sampler)
    if name not in SAMPLERS and not is_own(sampler):  # an unknown name is refused when its table is made
        return None
    allowed = options.defaults(SAMPLERS.get(name) or own.load("sampler", sampler), leading=2)
    return None if re.search(r"[:,]eta=", sampler) else allowed.get("eta")


def check_fits(table: SamplerTable, model: Model) -> None:
    """Raises InputError if the model cannot serve the table."""
    check_prediction(table, model.prediction)
    check_variance(table, model.learned_variance)
    learned.check_facts(table, model)


def describe() -> str:
    """Returns the samplers, grids and guidance rules with their options and a line on each."""
    schedule = schedules.linear()
    half = {"gamma": lambda tau: np.full(len(tau) - 1, 0.5)}  # a stand-in: the number of calls does not depend on it

    def calls(name):
        return f"{make_table(schedule, name, 10, 'uniform', resources=half).nfe:3} calls"

    sections = (
        ("samplers (network calls for 10 steps), --sampler", SAMPLERS, 2, calls),
        ("samplers that choose their own steps, --sampler", ADAPTIVE, 2, None),
        ("grids of --steps timesteps, --tau", GRIDS, 2, None),
        ("grids of their own length, --tau", OWN_LENGTH, 1, None),
        ("grids of --steps timesteps for certain models, --tau", MODEL_GRIDS, 2, None),
        ("grids found on the model by dynamic programming, --tau", paths.GRIDS, 2, None),
        ("rules of guidance, --guidance_rule", RULES, 2, None),
    )
    lines = []
    for title, table, leading, note in sections:
        lines.append(f"{title}:")
        for name, function in table.items():
            summary = (function.__doc__ or "").partition("\n")[0]
            lines.append(f"  {name:26} {f'{note(name)}  ' if note else ''}{summary}")
            given = options.defaults(function, leading)
            if table is paths.GRIDS:  # what has no default there is estimated
                given = {key: value for key, value in given.items() if value is not options.REQUIRED}
            settings = [f"{key}={_shown(value)}" for key, value in given.items()]
            lines += [f"  {'':26} options: {', '.join(settings)}"] * bool(settings)
        lines.append("")
    lines.append("options follow a colon: NAME:KEY=VALUE,...; a sampler can also be a function of your own, as")
    lines.append("package.module:function, or the file of a table, as mine.json")
    return "\n".join(lines)


def _shown(default):
    return "..." if default is options.REQUIRED else default


def _name(text):
    return text.partition(":")[0]


def _own_table(schedule, sampler, grid, eta):
    """Calls a function of the user's own, and checks what it returns."""
    function, what = own.load("sampler", sampler), f"sampler {options.own_name(sampler)}"
    choice = options.parse_own("sampler", sampler, function, ("schedule", "tau"))
    if eta is not None:
        choice = _with_eta(choice, eta)
    with users_code(what):
        table = function(schedule, grid, **choice.options)
    if not isinstance(table, SamplerTable):
        raise InputError(
            f"{what} returns a {type(table).__name__}; it must return a SamplerTable, as forms.build makes"
        )
    fields = {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.name != "facts"}
    return checked(schedule, make_checked_table(**fields), what, "build it from the schedule that it is given")


def _with_eta(choice, eta):
    if "eta" in choice.options:
        said = ",".join(f"{key}={value}" for key, value in choice.options.items())
        raise InputError(
            f"sampler {choice.name}:{said} has its eta in its options; leave out --eta, or write the one you mean there"
        )
    if "eta" not in options.defaults(choice.function, leading=2):
        having = [name for name, function in SAMPLERS.items() if "eta" in options.defaults(function, leading=2)]
        raise InputError(f"sampler {choice.name} has no option 'eta'; those that have one: {', '.join(having)}")
    return choice._replace(options={**choice.options, "eta": eta})


def _read_table(path, schedule, eta):
    """Reads a table and compares its levels with the schedule's."""
    if eta is not None:
        raise InputError(f"--eta does nothing for the table in {path}; leave it out")
    table = learned.read_table(Path(path).expanduser())
    return checked(schedule, table, f"sampler file {path}", "make it again with the model's schedule")


def checked(schedule: NoiseSchedule, table: SamplerTable, what: str, remedy: str) -> SamplerTable:
    """Returns a table that goes from noise to images over the schedule's levels; refuses any other."""
    try:
        if table.tau[0] < table.tau[-1]:
            raise InputError(f"{table.name} goes from images to noise and draws none")
        timesteps.check(schedule, table.tau)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    # The network may be told another time than that of the level, as by a learned table, which says its schedule.
    of = table.facts.get("schedule")
    if of is None:
        same = _has_levels(table, table.t, schedule)
    else:
        levels_at = table.tau[:-1] if len(table.t) == len(table.tau) - 1 else table.t
        same = of == schedules.fingerprint(schedule) and _has_levels(table, levels_at, schedule)
    if not np.all((table.t > 0) & (table.t <= schedule.num_timesteps)) or not same:
        raise InputError(f"{what} holds a table for another noise schedule than the model's; {remedy}")
    return table


def _has_levels(table, t, schedule):
    """Whether a table's signal and noise are the schedule's at times t, give or take the rounding of float32."""
    ends = [schedule.at(np.minimum(t * (1 + way * 1e-6), schedule.num_timesteps)) for way in (-1, 1)]
    for found, near in zip((table.signal, table.noise), zip(*ends, strict=True), strict=True):
        slack = 1e-6 * np.abs(found) + 1e-9
        if np.any(found < np.minimum(*near) - slack) or np.any(found > np.maximum(*near) + slack):
            return False
    return True
