"""Makes up command lines: every flag and config field of the programs with values that users and accidents write."""

import ast
import random
import re
from collections.abc import Iterator

from commands import ROOT, TINY

from diffusion.commands import config_files

INTS = [
    "-1",
    "0",
    "1",
    "2",
    "2147483648",
    "9223372036854775808",
    "1000000000000",
    "abc",
    "",
    "1.5",
    "nan",
    "1e9",
    "True",
]
FLOATS = ["-1", "0", "0.5", "1", "nan", "inf", "-inf", "1e300", "1e-300", "abc", "", "1,2"]
BOOLS = ["true", "false", "2", "x", ""]
LISTS = ["", "1", "1,1", "-1", "0", "abc", "nan", "1,,2", "2147483648", "1000000000", "5,10", "0.5", "1.5"]
TEXTS = [
    "",
    "x",
    "~nouser",
    "gs://bucket/x",
    "/dev/null",
    "a" * 300,
    "[x]",
    "\x1b[31mred",
    "nan",
    "../..",
    "\n",
    "é",
    "%s",
]
TEXTS += ["7", "0,1", "0-", "5-3", "true", "{}", ":", "=", "file.json", "ddim:eta=0,eta=1", "ddim:eta=", "ddim:"]
TEXTS += ["ddim:eta=nan", "ddim:steps=3", "linear:num_timesteps=0", "linear:num_timesteps=1e12", "cosine:max_beta=nan"]
TEXTS += ["explicit:times=", "explicit:times=5,5", "sections:counts=0", "uniform:x=1", "apg:eta=x"]  # fmt: skip

VALUES = {"integer": INTS, "float": FLOATS, "bool": BOOLS, "list": LISTS, "string": TEXTS}
OF_TYPES = {bool: "bool", int: "integer", float: "float", tuple: "list", str: "string"}
SMALL = {
    "train": [*TINY, "--config.train.num_steps=1"],
    "sample": ["--num=2", "--steps=2"],
    "evaluate": ["--num=65", "--steps=2", "--features=pixels"],
    "convert": [],
}
"""What makes a command that is right end soon."""


def command_lines(seed: int, run: str) -> list[tuple[str, list[str]]]:
    """Returns (program, arguments) for every value of every field and flag, shuffled.

    Args:
      seed: of the order.
      run: a run folder for the programs that take one.
    """
    found = [*_fields(), *(line for program in SMALL for line in _flags(program, run))]
    random.Random(seed).shuffle(found)
    return found


def _fields() -> Iterator[tuple[str, list[str]]]:
    """Yields a training for each value of each field of the config."""
    for field in config_files.fields():
        if field.default:
            for value in VALUES[OF_TYPES[type(ast.literal_eval(field.default))]]:
                yield "train", [*SMALL["train"], f"--{field.name}={value}"]


def _flags(program, run):
    """Yields a run of a program for each value of each flag that its code defines."""
    folder = ROOT / "diffusion" / "commands"
    shared = (folder / "shared_flags.py").read_text()
    shared = {"sample": shared, "evaluate": shared.partition("def define_sampler_flags")[0]}.get(program, "")
    code = (folder / f"{program}.py").read_text() + shared
    for kind, name in re.findall(r'DEFINE_(\w+)\(\s*"(\w+)"', code):
        if kind not in VALUES:  # --config, whose values are files
            continue
        others = [arg for arg in SMALL[program] if not arg.startswith(f"--{name}=")]
        if name != "workdir" and program != "train":
            others.append(f"--workdir={run}")
        for value in VALUES[kind]:
            yield program, [*others, f"--{name}={value}"]
