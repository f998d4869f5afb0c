"""What the entry points share: flags, and the one line with exit code 2 that every user error ends in."""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import ConfigDict

from diffusion.errors import InputError
from diffusion.solvers import SOLVERS
from diffusion.timesteps import GRIDS

USER_ERROR = 2
INTERRUPTED = 130  # the shell's code for Ctrl-C

# What a full disk, a missing permission or a file in a folder's place looks like.
_DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG")
}


def run(main: Callable[[], int | None], *, default_config: str | None = None) -> None:
    """Parses the flags and runs main; never returns.

    Args:
      main: returns an exit code, None for 0. Its InputErrors and disk errors become one line on stderr and exit code 2.
      default_config: path of the config used where the command line has no --config.
    """
    app.run(lambda _: _guarded(main), argv=_with_config(sys.argv, default_config), flags_parser=_parse)


def fail(message: str) -> None:
    """Prints one line to stderr and exits with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


class SamplingOptions(NamedTuple):
    """How to sample a run: the flags where given, else the run's config.sample."""

    sampler: str
    steps: int
    eta: float
    tau: str
    clip: str


def define_sampling_flags() -> None:
    """The flags that `sampling_options` reads, and --workdir and --seed."""
    flags.DEFINE_string("workdir", None, "Run folder. Default: the newest in runs/.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i alone.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("steps", None, "Sampling steps, 1..T. Default: the run's config.sample.steps (25).")
    flags.DEFINE_string("sampler", None, f"{', '.join(SOLVERS)}. Default: the run's config.sample.sampler (ddim).")
    flags.DEFINE_float("eta", None, "DDIM's eta, 0 (deterministic) to 1 (DDPM). Default: config.sample.eta (0).")
    flags.DEFINE_string(
        "tau",
        None,
        f"Timesteps to visit: {', '.join(GRIDS)}, sections:10,15,20, sections:ddim25 or explicit:1000,500,250. "
        "Default: config.sample.tau (uniform).",
    )
    flags.DEFINE_string(
        "clip",
        None,
        "Clipping of x_0 to [-1, 1]: none, recompute or keep_eps. Default: config.sample.clip (recompute).",
    )
    flags.DEFINE_integer("batch_size", 64, "Images at a time; does not change any image.", lower_bound=1)


def sampling_options(config: ConfigDict) -> SamplingOptions:
    """The flags over config.sample."""
    given = {name: flags.FLAGS[name].value for name in SamplingOptions._fields}
    if given["sampler"] not in (None, config.sampler) and given["eta"] is None:
        given["eta"] = 0.0  # the eta in the config belongs to the sampler there
    return SamplingOptions(*(config[name] if value is None else value for name, value in given.items()))


def _guarded(main):
    try:
        sys.exit(main())
    except InputError as error:
        fail(error)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        fail(f"{place}{error.strerror}; free some space or name another folder with --workdir or --out")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _with_config(argv: Sequence[str], default_config: str | None) -> list[str]:
    """Moves --config=FILE to the front, where config_flags needs it to know the fields that other flags override."""
    if default_config is None:
        return list(argv)
    program, *rest = argv
    chosen = [default_config]
    others = []
    while rest:
        arg = rest.pop(0)
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg, flags=re.DOTALL):
            value = match[1] if match[1] is not None else (rest.pop(0) if rest else "")
            chosen.append(value)
        else:
            others.append(arg)
    sys.argv[:] = [program, f"--config={chosen[-1]}", *others]  # config_flags reads sys.argv itself
    return list(sys.argv)


def _parse(argv: Sequence[str]) -> list[str]:
    overridden = {part for arg in argv if arg.startswith("--config.") for part in arg[2:].split("=")[0].split(".")}
    try:
        remaining = flags.FLAGS(list(argv))
    except flags.Error as error:
        fail(str(error) if "Did you mean" in str(error) else f"{error}; --help lists all flags")
    except (KeyError, AttributeError) as error:
        # A misspelt config field; the same exceptions out of a config file are its author's bug and keep their traceback.
        name, _, hint = str(error).replace("\\n", "\n").replace("\\'", "'").strip("\"'").partition("\n")
        if name.strip("'\"") not in overridden:
            raise
        hint = (hint.split(" instead of")[0].strip() + "?").replace("??", "?") if hint else ""
        fail(f"the config has no field {name!r}. {hint} configs/default.py holds every field".replace('"', ""))
    except OSError:
        path = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), "")
        if os.path.isfile(path):
            raise
        fail(f"config file {path!r} does not exist; the project's own are in configs/")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # orbax logs every file at INFO
    if len(remaining) > 1:
        fail(f"unexpected argument {remaining[1]!r}; flags are written --name=value")
    return remaining
