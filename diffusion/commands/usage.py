"""Writes the help of a program: its flags in groups, and the fields of the config if it takes one."""

import shutil
import sys
import textwrap
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from diffusion.commands import config_files

_GROUPS: list[tuple[str, frozenset[str]]] = []
"""Each group's title, and the flags that there were when it began."""

_TAKES = {"int": "N", "float": "NUMBER", "comma separated list of strings": "A,B", "config object": "FILE"}
_COLUMN = 30


def group(title: str) -> None:
    """Begins a group of flags in the help of a program: those that are defined from here to the next group."""
    _GROUPS.append((title, frozenset(flags.FLAGS)))


def ours() -> list[flags.Flag]:
    """Returns the flags that the program defines, and not those of absl, in the order in which they were defined."""
    modules = flags.FLAGS.flags_by_module_dict()
    return [flag for module, found in modules.items() if module.startswith("diffusion.") for flag in found]


def groups() -> dict[str, list[flags.Flag]]:
    """Returns the flags of each group, in the order in which they were defined."""
    begins = [*(before for _, before in _GROUPS), frozenset(flags.FLAGS)]
    pairs = zip(_GROUPS, begins[1:], strict=True)
    return {title: [flag for flag in ours() if flag.name in after - before] for (title, before), after in pairs}


def called(program: str) -> str:
    """Returns how a program is called where this one was: "sample.py" in a clone, or "-m diffusion.sample"."""
    return f"-m diffusion.{program}" if Path(sys.argv[0]).parent.name == "diffusion" else f"{program}.py"


def text(program: str, about: str, config: ConfigDict | None = None, config_file: str = "") -> str:
    """Returns the help of a program.

    Args:
      program: how it is called, as "train.py".
      about: what it does; the first line stands for all where the terminal is small.
      config: what its fields are now, for a program that takes --config.
      config_file: where that config is from.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [about.strip(), "", f"usage: python {program} [--FLAG=VALUE ...]"]
    for title, members in groups().items():
        lines += ["", f"{title}:"]
        for flag in members:
            lines += _entry(_name(flag), _help(flag), width)
    if config is not None:
        lines += ["", f"fields of the config, as {config_file} has them; configs/default.py lists the same:"]
        lines += _fields(config, width)
    return "\n".join(lines)


def _fields(config, width):
    lines = []
    for name, written, about in config_files.fields():
        if not written:
            lines += ["", *textwrap.wrap(f"  {about}", width, subsequent_indent="  ")]
            continue
        value = config
        for part in name.split(".")[1:]:
            value = value[part]
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines += _entry(f"--{name}={shown}", about, width)
    return lines


def _name(flag):
    if flag.boolean:
        return f"--{flag.name}"
    return f"--{flag.name}={_TAKES.get(flag.flag_type(), 'TEXT')}"


def _help(flag):
    """Returns the help of a flag with its default, unless the text tells that."""
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    told = flag.default in (None, False, "", []) or "Default:" in flag.help
    return flag.help if told else f"{flag.help} Default: {default}."


def _entry(name, about, width):
    """Returns the lines of one entry: the name, and the text beside it, or below it where the name is long."""
    body = textwrap.wrap(" ".join(about.split()), max(width - _COLUMN, 30)) or [""]
    if len(name) + 4 > _COLUMN:
        return [f"  {name}", *(" " * _COLUMN + line for line in body)]
    return [f"{f'  {name}':{_COLUMN}}{body[0]}", *(" " * _COLUMN + line for line in body[1:])]
