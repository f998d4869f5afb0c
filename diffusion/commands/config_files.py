"""Reads config files and checks them, so that a field in a file is as safe as one on the command line."""

import ast
import io
import re
import runpy
import tokenize
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion.commands import recipes
from diffusion.errors import InputError, nearest

_EVERY = "configs/default.py holds every field"
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a list of numbers"}


def read(chosen: str) -> ConfigDict:
    """Runs a config file and returns its config, every field of which is known and has a value of the right kind.

    Args:
      chosen: FILE, or FILE:ARGUMENT for a get_config that takes an argument.

    Raises:
      InputError: the file fails, has no get_config, returns no config, or has a field that is missing, misspelt or of
        another kind; the message names file, line and field.
    """
    path, colon, argument = chosen.partition(":")
    try:
        functions = runpy.run_path(path)
        if "get_config" not in functions:
            raise InputError(f"config file {path} has no function get_config; see configs/images.py for an example")
        config = functions["get_config"](*[argument] * bool(colon))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config file {path}, line {_line(path, error)}: {_told(error)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"config file {path}: get_config returns {_shown(config)} and no config; end it with `return config`"
        )
    check(config, f"config file {path}: ")
    return config


def check(config: ConfigDict, where: str = "") -> None:
    """Raises InputError unless a config has the fields of configs/default.py, each with a value of the same kind.

    Args:
      config: the whole config.
      where: begins the message, as "config file mine.py: ".
    """
    known = recipes.defaults()
    for name, field in leaves(config):
        section, _, last = name.rpartition(".")
        inside = _at(known, section)
        if not isinstance(inside, ConfigDict) or last not in inside:
            raise InputError(f"{where}there is no field {name}; {guess(name, known)}{_EVERY}")
        if not _fits(field, inside[last]):
            kind = _KINDS.get(type(inside[last]), "a section")
            raise InputError(f"{where}{name} is {_shown(field)}; it must be {kind}, as {_shown(inside[last])}")
    for name, _ in leaves(known):
        section, _, last = name.rpartition(".")
        inside = _at(config, section)
        if not isinstance(inside, ConfigDict) or last not in inside:
            raise InputError(f"{where}field {name} is missing; begin with `config = default.get_config()`")


def leaves(config: ConfigDict, prefix: str = "config") -> Iterator[tuple[str, Any]]:
    """Yields the full name and the value of every field that is no section, or is an empty one."""
    for name, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def same(a: Any, b: Any) -> bool:
    """Tells whether two values of a field are the same; a file has lists where a config has tuples."""
    return list(a) == list(b) if isinstance(a, tuple | list) else a == b


def fields_named(name: str, config: ConfigDict) -> list[str]:
    """Returns the fields of a config with this last name, as config.SECTION.NAME."""
    return [full for full, _ in leaves(config) if full.rpartition(".")[2] == name]


class Field(NamedTuple):
    """Describes a field: its full name, its default as written in configs/default.py ("" for a section), a comment."""

    name: str
    default: str
    about: str


def fields() -> list[Field]:
    """Returns all fields and sections of configs/default.py, in its order, each section before its fields."""
    source = (recipes.FOLDER / "default.py").read_text()
    comments = _comments(source)
    body = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "get_config").body
    found = []
    for node in body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if name.startswith("config."):
            value = "" if isinstance(node.value, ast.Call) else ast.get_source_segment(source, node.value)
            found.append(Field(name, value, _comment_of(node, comments)))
    return found


def guess(name: str, known: ConfigDict) -> str:
    """Returns the question "did you mean ...?" with the field that is nearest to a name, or ""."""
    last = name.rpartition(".")[2]
    if elsewhere := fields_named(last, known):
        return f"did you mean {elsewhere[0]!r}? "
    every = [full for full, _ in leaves(known)]
    sections = {full.rpartition(".")[0] for full in every} - {"config"}
    return nearest(name, [*every, *sections]).partition("valid:")[0]


def _at(config: ConfigDict, section: str) -> Any:
    """Returns the section of a full name such as config.model, or None if there is none."""
    for part in section.split(".")[1:]:
        config = config.get(part) if isinstance(config, ConfigDict) else None
    return config


def _fits(value: Any, example: Any) -> bool:
    """Whether a value is of the kind of the example: a whole number does for a number, and a list for a tuple."""
    if isinstance(example, tuple):
        return isinstance(value, tuple | list) and all(_fits(item, example[0]) for item in value)
    if isinstance(example, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(example)


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _line(path: str, error: BaseException) -> int | str:
    """Returns the line of a config file in which an error arose."""
    if isinstance(error, SyntaxError) and error.lineno and Path(error.filename or path) == Path(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else "?"


def _told(error: BaseException) -> str:
    """Says in one line what went wrong in a config file."""
    known, words = recipes.defaults(), " ".join(str(error).split())
    if isinstance(error, AttributeError) and "'str' object has no attribute" in words:  # as in version 0.1
        return "a schedule is one text, as config.schedule = 'linear:beta_end=0.02'"
    if isinstance(error, SyntaxError):
        return str(error.msg)
    trace = traceback.extract_tb(error.__traceback__)
    if trace and "ml_collections" in trace[-1].filename:
        # A name that the config lacks, as in config.trian.num_steps = 1.
        if isinstance(error, AttributeError | KeyError):
            name = re.search(r"\w+", words)[0]
            return f"the config has no field {name!r}; {guess(f'config.{name}', known)}{_EVERY}"
        # A value of another kind, as in config.train.num_steps = "many".
        if match := re.match(r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type", words):
            name = (fields_named(match[1], known) or [f"config.{match[1]}"])[0]
            kind = _KINDS.get(type(_at(known, name)), "a section with fields")
            return f"{name} is {match[2][:60]}; it must be {kind}"
    return f"{type(error).__name__}: {words[:200]}"


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Returns {line: (text, whether the comment has the line to itself)}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token for token in tokens if token.type == tokenize.COMMENT]
    return {token.start[0]: (token.string[1:].strip(), token.line.lstrip().startswith("#")) for token in found}


def _comment_of(node: ast.AST, comments: dict[int, tuple[str, bool]]) -> str:
    """Returns the comments above a statement and on its lines."""
    first = node.lineno
    while comments.get(first - 1, ("", False))[1]:
        first -= 1
    return " ".join(comments[line][0] for line in range(first, node.end_lineno + 1) if line in comments)
