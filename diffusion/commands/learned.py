"""Keeps learned tables beside the model that they were learned for, and says where one is used otherwise."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion import files, pretrained
from diffusion.commands.opening import Opened
from diffusion.commands.usage import called
from diffusion.errors import InputError, printable
from diffusion.guidance import Guidance
from diffusion.model import Model
from diffusion.schedules import fingerprint
from diffusion.solvers import SamplerTable, from_json

LEARNED = "learned"
"""What --sampler calls the table that was learned for the model and the number of steps asked for."""

FOLDER = "tables"

BINDING = ("schedule", "prediction", "shape")
"""The facts in which a table and the model must agree; the others are how it is best used."""


def facts_of(
    model: Model,
    weights: str,
    clip: str,
    guidance: Guidance,
    threshold: float | None = None,
    weaker: str | None = None,
) -> dict[str, Any]:
    """Returns what a table is learned for, for `SamplerTable.facts`.

    Args:
      model: the network.
      weights: SHA-256 of its parameters.
      clip, guidance, threshold: how it is asked; threshold is the quantile of dynamic thresholding.
      weaker: SHA-256 of the parameters of the model that guidance pushes away from, if there is one.
    """
    return {
        "schedule": fingerprint(model.schedule),
        "prediction": model.prediction,
        "shape": list(model.space.shape),
        "clip": clip,
        "threshold": threshold,
        **_guidance_facts(guidance, weaker),
        "weights": weights,
    }


def _guidance_facts(guidance, weaker):
    """Returns what a table must know of guidance; guidance that does not act is none."""
    guidance, weaker = (guidance, weaker) if guidance.acts() else (Guidance(), None)
    return {
        "guidance_scale": float(guidance.scale),
        "guidance_rule": guidance.rule,
        "guidance_interval": None if guidance.interval is None else list(guidance.interval),
        "guidance_rescale": float(guidance.rescale),
        "guidance_model": weaker,
    }


def name_of(calls: int, guidance: Guidance, weaker: str | None = None) -> str:
    """Returns the file name of a table: 5.json, or 5-guidance2.json for a guided model.

    Where guidance has more to say than its scale, a few digits that follow from all of it end the name, as in
    5-guidance2-1f3a9c.json.

    Args:
      calls: network calls.
      guidance, weaker: as for `facts_of`.
    """
    if not guidance.acts():
        return f"{calls}.json"
    facts, plain = _guidance_facts(guidance, weaker), _guidance_facts(Guidance(scale=guidance.scale), None)
    more = "" if facts == plain else f"-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]}"
    return f"{calls}-guidance{guidance.scale:g}{more}.json"


def find(opened: Opened, calls: int, guidance: Guidance, weaker: str | None = None) -> SamplerTable:
    """Returns the table that was learned for a model, with its guidance if there is one of that kind.

    Args:
      opened: the model.
      calls: network calls.
      guidance, weaker: how the model is asked, as for `facts_of`.

    Raises:
      InputError: none of so many calls has been learned, or the file is damaged.
    """
    if found := paths_of(opened, calls, guidance, weaker):
        return read_table(found[0])
    folders = _folders(opened)
    having = sorted({int(p.stem) for folder in folders for p in folder.glob("*.json") if p.stem.isdecimal()})
    known = f"those of {', '.join(map(str, having))} calls are there" if having else "none has been learned yet"
    scale = f" --guidance_scale={guidance.scale:g}" if guidance.acts() else ""
    raise InputError(
        f"no table of {calls} calls has been learned for this model ({known}); learn one with: python "
        f"{called('learn')} --workdir={opened.workdir} --calls={calls}{scale}"
    )


def paths_of(opened: Opened, calls: int, guidance: Guidance, weaker: str | None = None) -> list[Path]:
    """Returns the files of the tables that `find` chooses from, the best first."""
    # One for this guidance anywhere comes before one for another.
    names = (name_of(calls, guidance, weaker), f"{calls}-guidance*.json", f"{calls}.json")
    return [path for name in names for folder in _folders(opened) for path in sorted(folder.glob(name))]


def _folders(opened):
    """Returns where the tables of a model lie: its own, and those that ship with it."""
    return [opened.home / FOLDER] + [pretrained.tables(opened.shipped)] * bool(opened.shipped)


def read_table(path: Path) -> SamplerTable:
    """Reads a table of `SamplerTable.to_json`; raises InputError if it cannot be read or is none."""
    try:
        return from_json(files.read(path).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"sampler file {path} cannot be read ({error}); write it with SamplerTable.to_json, or name a sampler"
        ) from None
    except InputError as error:
        raise InputError(f"sampler file {path}: {error}") from None


def check_facts(table: SamplerTable, model: Model) -> None:
    """Raises InputError if a table was learned for a model of another schedule, prediction or shape."""
    ours = facts_of(model, "", "", Guidance())
    for name in BINDING:
        theirs = table.facts.get(name, ours[name])
        if theirs != ours[name]:
            raise InputError(
                f"{table.name} was learned for a model of another {name}, {_shown(theirs)} and not {ours[name]}; "
                "learn one for this model with learn.py"
            )


def notes(table: SamplerTable, facts: dict[str, Any]) -> Iterator[str]:
    """Yields in what a table was learned for another use than the present one."""
    for name, ours in facts.items():
        theirs = table.facts.get(name, ours)
        if theirs == ours:
            continue
        if name == "weights":
            yield f"{table.name} was learned for other parameters than these, as of an earlier step: learn it again"
        else:
            yield f"{table.name} was learned at {name} {_shown(theirs)}, and is used at {_shown(ours)}"


def _shown(value):
    return printable(str(value)[:40])
