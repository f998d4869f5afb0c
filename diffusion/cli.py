"""What the entry points share: flags, and the one line with exit code 2 that every user error ends in."""

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from jaxtyping import UInt8
from tqdm import tqdm

from diffusion.denoiser import Options, check_options
from diffusion.errors import InputError, nearest
from diffusion.experiment import Trained, load_trained, make_table
from diffusion.generate import generate
from diffusion.solvers import SOLVERS, SamplerTable
from diffusion.timesteps import GRIDS
from diffusion.training import run_folder

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
    sys.stdout.flush()
    # Not sys.exit: background threads of a failed save would report the same error once more while Python shuts down.
    os._exit(USER_ERROR)


class SamplingRun(NamedTuple):
    """A trained run and how to sample it: the flags where given, else the run's config.sample."""

    folder: run_folder.RunFolder
    trained: Trained
    table: SamplerTable
    sampler: str
    steps: int
    eta: float
    tau: str
    clip: str

    def title(self, num: int) -> str:
        """One line: which model draws how many images with what."""
        source = f"{self.folder.path}, step {self.trained.step:,}"
        return f"{source}: {num:,} images with {self.table.name} on {self.tau}, {self.table.nfe} network calls"


def define_sampling_flags() -> None:
    """The flags that `open_run` and `draw` read."""
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


def open_run() -> SamplingRun:
    """The run and the table that the flags ask for.

    Raises:
      InputError: a wrong flag, no such run, or a damaged checkpoint.
    """
    workdir = flags.FLAGS.workdir
    folder = run_folder.existing(workdir) if workdir else run_folder.newest("runs")
    trained = load_trained(folder)
    config = trained.config.sample
    given = {name: flags.FLAGS[name].value for name in ("sampler", "steps", "eta", "tau", "clip")}
    if given["sampler"] not in (None, config.sampler) and given["eta"] is None:
        given["eta"] = 0.0  # the eta in the config belongs to the sampler there
    chosen = {name: config[name] if value is None else value for name, value in given.items()}
    check_options(trained.model.prediction, Options(clip=chosen["clip"]))
    table = make_table(trained.model.schedule, chosen["sampler"], chosen["steps"], chosen["eta"], chosen["tau"])
    return SamplingRun(folder, trained, table, **chosen)


def draw(run: SamplingRun, num: int, mesh: Mesh) -> UInt8[np.ndarray, "num H W C"]:
    """Images 0..num - 1 of the run under --seed, with a progress bar where stderr is a terminal."""
    batches = []
    drawn = generate(
        run.trained.model,
        run.trained.params,
        run.table,
        range(num),
        seed=flags.FLAGS.seed,
        mesh=mesh,
        batch_size=flags.FLAGS.batch_size,
        clip=run.clip,
    )
    with tqdm(total=num, unit="image", disable=None) as progress:
        for images in drawn:
            batches.append(images)
            progress.update(len(images))
    return np.concatenate(batches)


def _guarded(main):
    _hide_background_errors()
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


def _hide_background_errors():
    """Keeps threads of orbax, tensorstore and tensorboardX from printing errors that the main thread raises as well."""
    libraries = ("orbax", "tensorstore", "tensorboardX")

    def hidden(trace, error):
        files = [frame.filename for frame in traceback.extract_tb(trace)]
        theirs = any(name in file for file in files for name in libraries) or "Event loop is closed" in str(error)
        return theirs and threading.current_thread() is not threading.main_thread()

    shown, shown_of_thread = sys.excepthook, threading.excepthook
    sys.excepthook = lambda kind, error, trace: hidden(trace, error) or shown(kind, error, trace)
    threading.excepthook = lambda args: hidden(args.exc_traceback, args.exc_value) or shown_of_thread(args)


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
    path = Path(chosen[-1].partition(":")[0])  # what follows a colon goes to get_config
    if not path.is_file():
        own = sorted(str(p) for p in Path(default_config).parent.glob("*.py") if p.stem not in ("__init__", "default"))
        fail(f"config file {str(path)!r} does not exist; {nearest(str(path), own)}")
    sys.argv[:] = [program, f"--config={chosen[-1]}", *others]  # config_flags reads sys.argv itself
    return list(sys.argv)


def _parse(argv: Sequence[str]) -> list[str]:
    overridden = {part for arg in argv if arg.startswith("--config.") for part in arg[2:].split("=")[0].split(".")}
    try:
        remaining = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        modules = flags.FLAGS.flags_by_module_dict()
        ours = [flag.name for module in (argv[0], __name__) for flag in modules.get(module, ())]
        fail(f"there is no flag --{error.flagname}; {nearest(error.flagname, ours)}")
    except flags.Error as error:
        fail(f"{error}; --help lists all flags")
    except (KeyError, AttributeError) as error:
        # A misspelt config field; the same exceptions out of a config file are a bug there and keep their traceback.
        name = re.search(r"\w+", str(error))[0]
        if name not in overridden:
            raise
        guess = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"did you mean {guess[1]!r}? " if guess else ""
        fail(f"the config has no field {name!r}; {hint}configs/default.py holds every field")
    if flags.FLAGS["verbosity"].using_default_value:
        # orbax logs every file at INFO, and at ERROR the traceback of every error that it raises as well.
        flags.FLAGS.verbosity = logging.FATAL
    if len(remaining) > 1:
        fail(f"unexpected argument {remaining[1]!r}; flags are written --name=value")
    return remaining
