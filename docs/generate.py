"""Writes the parts of the pages that follow from the source, so that they cannot grow stale.

A page says where such a part goes with a line `<!-- generated: KIND ARGUMENTS -->`; the kinds are the keys of KINDS.
"""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a flag takes, by absl's name for its type.
TAKES = {"int": "a whole number", "float": "a number", "bool": "on or off", "config object": "a file", "string": ""}
TAKES["comma separated list of strings"] = "a list with commas"

DASH = " \N{EN DASH} "  # a colon would stand beside the one in "0: unconditional"

# What reads as code in help texts and comments: `quoted`, --flag=value, name:option=3, folder/file.py, two_words.
CODE = r"(`[^`]*`|--\w[\w.]*\w(?:=[^\s,;]*\w)?|\b(?!arXiv)[A-Za-z]\w+(?:[./:=,]\w+)+|\b[A-Za-z]+_\w+)"

# Prints the flags of a program, which importing it defines; its main function does not run.
DUMP_FLAGS = """
import importlib, json, sys
from absl import flags
program = importlib.import_module(sys.argv[1])
bounds = lambda flag: [getattr(flag.parser, f"{side}_bound", None) for side in ("lower", "upper")]
print(json.dumps({"about": program.__doc__.partition("\\n\\n")[0], "flags": [
    {"module": module, "name": flag.name, "takes": flag.flag_type(), "default": flag.default, "help": flag.help,
     "bounds": bounds(flag)}
    for module, found in flags.FLAGS.flags_by_module_dict().items() for flag in found
    if module.partition(".")[0] == "diffusion"
]}))
"""


def fill(page: str) -> str:
    """Returns the text of a page with its generated parts in place."""
    marker = r"^<!-- generated: (\w+)(.*) -->$"
    return re.sub(marker, lambda match: KINDS[match[1]](page, *match[2].split()), page, flags=re.MULTILINE)


def public_modules() -> list[str]:
    """Returns the names of all modules of the library, but not of its programs, such as diffusion/commands/train.py."""
    programs = {path.name for path in ROOT.glob("*.py")}
    paths = [path for path in sorted((ROOT / "diffusion").glob("**/*.py")) if path.stat().st_size]
    paths = [path for path in paths if path.parent.name not in ("diffusion", "commands") or path.name not in programs]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [".".join(part).removesuffix(".__init__") for part in parts]
    return sorted(name for name in names if "._" not in name and name != "diffusion")


def modules(page: str, *names: str) -> str:
    """Returns a section for each of these modules that there is, each followed by the modules below it.

    A module below another one that is named itself, as in `diffusion.solvers diffusion.solvers.forms`, comes where its
    own name stands.

    A name that a package offers as its own is described there and not once more in the module that defines it. What the
    page itself describes, in a directive such as `autofunction:: diffusion.sample`, is left out as well.
    """
    by_hand = re.findall(r"^\.\. auto\w+:: diffusion\.(\w+)$", page, re.MULTILINE)
    below = [m for m in public_modules() if m not in names]
    rooms = [[name] * (name in public_modules()) + [m for m in below if m.startswith(f"{name}.")] for name in names]
    sections = []
    for name in dict.fromkeys(module for room in rooms for module in room):
        parent = importlib.import_module(name.rpartition(".")[0])
        offered = [] if parent.__name__ == "diffusion" else getattr(parent, "__all__", [])
        elsewhere = [thing for thing in offered if getattr(getattr(parent, thing), "__module__", "") == name]
        sections += [f"## {name}", "", "```{eval-rst}", f".. automodule:: {name}"]
        sections += [f"   :exclude-members: {', '.join(by_hand + elsewhere)}"] * bool(by_hand + elsewhere)
        sections += ["   :no-index:"] * (name.rpartition(".")[2] in offered)  # the package has a function of that name
        sections += ["```", ""]
    return "\n".join(sections)


def flags(page: str, *programs: str) -> str:
    """Returns a section for each program, these first, with its own flags, and one for shared flags."""
    found = [path.name for path in sorted(ROOT.glob("*.py")) if path.name != "setup.py"]
    programs = [name for name in dict.fromkeys([*programs, *found]) if name in found]
    dumps = {program: _dump_flags(program) for program in programs}
    users, shown = {}, {}
    for program, dump in dumps.items():
        for flag in dump["flags"]:
            key = (flag["module"], flag["name"])
            users.setdefault(key, []).append(program)
            shown[key] = f"`--{flag['name']}`\n: {_markdown(flag['help'])} {_takes(flag)}\n\n"
    own = {program: [shown[key] for key in shown if users[key] == [program]] for program in programs}
    shared = {tuple(u): [shown[key] for key in shown if users[key] == u] for u in users.values() if len(u) > 1}
    sections = []
    for program, entries in own.items():
        groups = ["shared by " + " and ".join(group) for group in shared if program in group]
        links = ", and the ones ".join(f"[{group}](#{group.replace(' ', '-').replace('.', '')})" for group in groups)
        others = f"Its other flags are the ones {links}.\n" if groups else ""
        sections.append(f"## {program}\n\n{_markdown(dumps[program]['about'])}\n\n{''.join(entries)}{others}")
    sections += [f"## Shared by {' and '.join(group)}\n\n{''.join(entries)}" for group, entries in shared.items()]
    return "\n".join(sections)


def fields(page: str) -> str:
    """Returns every field of configs/default.py with its default and its comment, section by section."""
    from diffusion.commands import config_files

    sections = {"": ["## Outside the sections\n"]}
    for name, default, about in config_files.fields():
        about = _markdown(about)
        if not default:
            sections[name] = [f"\n## {name}\n\n{about[:1].upper()}{about[1:]}\n"]
        else:
            section = sections.get(name.rpartition(".")[0], sections[""])
            section.append(f"- `{name}` = `{default}`{DASH * bool(about)}{about}")
    return "\n".join(line for lines in sections.values() for line in lines)


def recipes(page: str) -> str:
    """Returns a table of the files in configs/ with the first paragraph of each one's docstring."""
    rows = ["| recipe | what it is |", "|---|---|"]
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem not in ("__init__", "default"):
            about = ast.get_docstring(ast.parse(path.read_text())).partition("\n\n")[0]
            rows.append(f"| `configs/{path.name}` | {_markdown(' '.join(about.split()))} |")
    return "\n".join(rows)


ORDERS = {
    "ddim": "1; the variance at any eta as well",
    "ddpm": "1",
    "sigma_hat": "1",
    "euler": "1",
    "euler_ancestral": "1",
    "dpm_solver": "`order` at eta 0",
    "dpm_solver_multistep": "`order`; official 3: 2",
    "dpm_solver_pp": "`order`; official and halved 3: 2",
    "dpm_solver_pp_singlestep": "`order` at eta 0",
    "dpm_solver_pp_sde": "2 at eta 0",
    "unipc": "`order` + 1, from exact start values",
    "sa_solver": "that of unipc at sde_eta 0",
    "er_sde": "1 at order 1; its moments on Gaussian data tend to the data's",
    "deis": "`order`, from exact start values",
    "lms": "`order`, from exact start values",
    "ipndm": "`order` on grids even in n / a, else 2",
    "plms": "2",
    "pndm": "2",
    "heun": "2",
    "edm": "2 without churn (euler: 1)",
    "restart": "2 between its noises",
    "rk": "`order`",
    "consistency": "none: each step draws a sample",
    "tcd": "1 at eta 0",
    "analytic_dpm": "1; its variance is exact on Gaussian data",
}
"""The order of convergence of each solver, as its tests measure it."""


def samplers(page: str) -> str:
    """Returns a section for each sampler: calls, order, options, other names and papers; and one for the grids."""
    from diffusion import options, schedules, timesteps
    from diffusion.adaptive import ADAPTIVE
    from diffusion.commands.samplers import OWN_LENGTH, SAMPLERS, make_table
    from diffusion.solvers import names

    schedule, half = schedules.linear(), {"gamma": lambda tau: [0.5] * (len(tau) - 1)}
    sections, foreign = ["## Samplers"], [(other, ours) for other, ours in names.SAMPLERS.items() if other != ours]
    for name, function in SAMPLERS.items():
        counts = [make_table(schedule, name, steps, "uniform", resources=half).nfe for steps in (10, 20, 30)]
        called = [f"`{other}` = `{ours}`" for other, ours in foreign if ours.partition(":")[0] == name]
        facts = {"calls, by default": _formula(*counts), "order": ORDERS[name], "other names": ", ".join(called)}
        sections.append(_choice(name, function, options.defaults(function, 2), facts))
    for name, function in ADAPTIVE.items():
        called = [f"`{other}` = `{ours}`" for other, ours in foreign if ours.partition(":")[0] == name]
        facts = {"calls": "as many as each image needs", "order": "`order`", "other names": ", ".join(called)}
        sections.append(_choice(name, function, options.defaults(function, 2), facts))
    sections.append("\n## Grids of timesteps")
    for table, leading in ((timesteps.GRIDS | timesteps.MODEL_GRIDS, 2), (OWN_LENGTH, 1)):
        for name, function in table.items():
            called = [f"`{other}` = `{ours}`" for other, ours in names.GRIDS.items() if ours.partition(":")[0] == name]
            known = options.defaults(function, leading)
            sections.append(_choice(name, function, known, {"other names": ", ".join(called)}))
    sections.append("\n## Names that mean two things\n")
    sections += [f"- `{name}`: {' or '.join(map(_markdown, both))}" for name, both in names.AMBIGUOUS.items()]
    return "\n".join(sections)


def _formula(at_10, at_20, at_30):
    """Writes the number of network calls for S steps, from those for 10, 20 and 30."""
    factor, rest = (at_20 - at_10) // 10, 2 * at_10 - at_20
    if at_30 - at_20 != at_20 - at_10:
        return f"{at_10} for S = 10, {at_20} for S = 20"
    sign = f" {'+' if rest > 0 else '-'} {abs(rest)}" if rest else ""
    return f"{factor if factor > 1 else ''} S{sign}".strip()


def _choice(name, function, known, facts):
    """Returns the section of one function: its summary, options and papers, and further facts where there are any."""
    text, needed = inspect.getdoc(function), inspect.Parameter.empty
    shown = [
        f"`{key}`" + ("" if value is needed or value == () else f" ({_plain(value)})") for key, value in known.items()
    ]
    papers = [f"[arXiv:{found}](https://arxiv.org/abs/{found})" for found in re.findall(r"arXiv:(\d+\.\d+)", text)]
    facts = {**facts, "options": ", ".join(shown), "papers": ", ".join(dict.fromkeys(papers))}
    lines = [f"- {what}: {value}" for what, value in facts.items() if value]
    return "\n".join([f"\n### {name}\n", _markdown(text.partition("\n")[0]), "", *lines])


def _plain(value):
    """Returns a default as the command line has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


KINDS = {"modules": modules, "flags": flags, "fields": fields, "recipes": recipes, "samplers": samplers}


def _dump_flags(program):
    command = [sys.executable, "-c", DUMP_FLAGS, f"diffusion.commands.{program.removesuffix('.py')}"]
    # The parent's JAX may hold the accelerator.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{program} cannot be imported: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def _takes(flag):
    """Returns what a flag takes and its default, unless its help has told the default."""
    low, high = flag["bounds"]
    words = TAKES.get(flag["takes"], flag["takes"])
    words += f" from {low:,} to {high:,}" if None not in (low, high) else f", at least {low:,}" if low else ""
    default = flag["default"]
    if default is not None and "Default:" not in flag["help"]:
        text = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        words += f"{'; ' * bool(words)}default {'off' if default is False else 'on' if default is True else text}"
    return f"*{words[0].upper()}{words[1:]}.*" if words else ""


def _markdown(text):
    """Returns text as Markdown in which code is code and all other signs mean themselves."""
    parts = re.split(CODE, " ".join(text.split()))
    escaped = [re.sub(r"([\\`*_\[\]<>#|$~{}])", r"\\\1", part) for part in parts[::2]]
    code = [f"`{part.strip('`')}`" for part in parts[1::2]] + [""]
    return "".join(plain + span for plain, span in zip(escaped, code, strict=True))
