"""Starts the programs: parses their flags, and ends every user error in one line and exit code 2."""

import errno
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from diffusion import process
from diffusion.commands import compiling, config_files, recipes, usage
from diffusion.errors import InputError, nearest, printable
from diffusion.training.stop import Stopped

USER_ERROR = 2

# What the user can do about an error of the disk, by its errno.
_FULL = ("ENOSPC", "EDQUOT", "EFBIG")
_NO_PLACE = ("EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "ENOENT", "ENAMETOOLONG", "ELOOP")
_REMEDIES = {getattr(errno, name): "free some space and start again with the same command" for name in _FULL} | {
    getattr(errno, name): "check this path and its permissions, or name another with --workdir or --out"
    for name in _NO_PLACE
}
_REMEDIES[errno.EIO] = "the disk or the network it lies on fails; see to it and start again with the same command"


def start(main: Callable[[], int | None], *, about: str, default_config: str | None = None) -> None:
    """Parses the flags and calls main, or prints the help that --help and -h ask for; never returns.

    Args:
      main: returns an exit code, None for 0. Its InputErrors, errors of the disk and a full device become one line on
        stderr and exit code 2.
      about: what the program does, for its help.
      default_config: path of the config for a command line without --config.
    """
    process.ready(resumes=default_config is not None)  # again for who comes with python -m
    argv, config, chosen = _with_config(sys.argv, default_config), None, ""
    if default_config is not None:
        # Checked here, for a better message than that of config_flags, which is going to read the file again.
        chosen = argv[1].partition("=")[2]
        config = _read_config(chosen)
    if any(arg in ("-h", "-help", "--help", "--helpshort") for arg in argv[1:]):
        print(usage.text(usage.called(Path(argv[0]).stem), about, config, chosen))
        sys.exit(0)
    app.run(lambda _: _guarded(main), argv=argv, flags_parser=_parse)


def require_flag_files() -> None:
    """Fails if a --flagfile cannot be read; programs with --config read it when they define that flag."""
    for index, arg in enumerate(sys.argv[1:], start=1):
        if match := re.fullmatch(r"--?flagfile(?:=(.*))?", arg, flags=re.DOTALL):
            path = match[1] if match[1] is not None else "".join(sys.argv[index + 1 : index + 2])
            if not os.path.isfile(path):
                fail(f"--flagfile={path} names no file")


def fail(message: str) -> None:
    """Prints one line to stderr and exits with code 2."""
    print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: while Python shuts down, background threads of a failed save would report the same error once more.
    os._exit(USER_ERROR)


def _guarded(main):
    """Calls main and exits with its code; turns what the user can put right into one line."""
    process.begin()
    compiled = compiling.Compiled()
    _hide_background_errors()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {printable(str(message))}", file=sys.stderr)
    try:
        code = main() or 0
        if line := compiled.line():
            print(line)
        sys.stdout.flush()
        if code:  # the run was stopped, and nothing that its other threads still do is needed
            os._exit(code)
        sys.exit(0)
    except InputError as error:
        fail(error)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        place = f"{error.filename}: " if error.filename else ""
        fail(f"{place}{error.strerror}; {_REMEDIES[error.errno]}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(
            "the memory of the device is full; take a smaller batch_size, or train with more "
            "config.train.microbatches, with config.model.remat=full or config.model.dtype=bfloat16"
        )
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        fail("a path begins with ~ and the name of somebody who has no home here; write the whole path")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(process.INTERRUPTED)  # nothing is left to do, and a thread that is cut off would tell of it


def _hide_background_errors():
    """Keeps threads of orbax, tensorstore and tensorboardX from printing errors that the main thread raises as well."""
    libraries = ("orbax", "tensorstore", "tensorboardX")

    def hidden(trace, error):
        files = [frame.filename for frame in traceback.extract_tb(trace)]
        return any(name in file for file in files for name in libraries) or _is_late_callback(error)

    shown_of_thread, shown_unraisable = threading.excepthook, sys.unraisablehook

    def unraisable(args):
        if isinstance(args.exc_value, KeyboardInterrupt | Stopped):
            # The signal came in a callback, as of the garbage collector, which cannot pass it on: send it once more.
            number = (*args.exc_value.args, signal.SIGINT)[0]
            threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        elif not _is_late_callback(args.exc_value):
            shown_unraisable(args)

    threading.excepthook = lambda args: hidden(args.exc_traceback, args.exc_value) or shown_of_thread(args)
    sys.unraisablehook = unraisable


def _is_late_callback(error):
    """Tells whether tensorstore answered after a failed save had closed its event loop."""
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)


def _with_config(argv: Sequence[str], default_config: str | None) -> list[str]:
    """Moves --config=FILE to the front, because config_flags must read it before the flags that override its fields."""
    if default_config is None:
        return list(argv)
    # Separate --config from the other flags; if it is given twice, the last one counts.
    program, *rest = argv
    chosen = [default_config]
    others = []
    while rest:
        arg = rest.pop(0)
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg, flags=re.DOTALL):
            value = match[1] if match[1] is not None else (rest.pop(0) if rest else "")
            chosen.append(os.path.expanduser(value))
        else:
            others.append(arg)
    # If a field is given twice, the last one counts as well; ml_collections would join tuples.
    fields = [arg.partition("=")[0] if re.match(r"--?config\.[^=]+=", arg) else None for arg in others]
    last = {field: i for i, field in enumerate(fields)}
    others = [arg for i, arg in enumerate(others) if fields[i] is None or last[fields[i]] == i]
    chosen[-1] = recipes.find(chosen[-1])
    recipes.alias()
    if not chosen[-1]:
        fail(f"--config is empty; {nearest('', recipes.names())}")
    path = Path(chosen[-1].partition(":")[0])  # the text after a colon is an argument of get_config
    if not path.is_file() or path.suffix != ".py":
        fail(f"{str(path)!r} is no config file; {nearest(str(path), recipes.names())}")
    sys.argv[:] = [program, f"--config={chosen[-1]}", *others]  # config_flags reads sys.argv itself
    return list(sys.argv)


def _old_schedule(arg: str) -> str:
    """Returns today's form of an override such as --config.schedule.name=cosine, from when a schedule was a section."""
    field, _, value = arg.partition("=")
    *_, section, name = field.split(".")
    if name == "name":
        return f"--config.schedule={value}"
    return f"--config.schedule={'NAME' if section == 'schedule' else section}:{name}={value}"


def _read_config(chosen: str) -> ConfigDict:
    """Returns the checked config of FILE or FILE:ARGUMENT, without what the command line overrides."""
    try:
        return config_files.read(chosen)
    except InputError as error:
        fail(error)


def _fail_below_value(argv: Sequence[str]) -> None:
    """Ends the program if an override asks for a field inside a text, such as --config.schedule.name; else returns."""
    config = _read_config(argv[1].partition("=")[2])
    for arg in argv[2:]:
        parts, field = arg.partition("=")[0].split(".")[1:], config
        for depth, part in enumerate(parts):
            if isinstance(field, str | tuple):
                name = ".".join(["config", *parts[:depth]])
                kind = "text" if isinstance(field, str) else "list"
                wanted = f"; write {_old_schedule(arg)}" if name == "config.schedule" else ""
                fail(f"{name} is one {kind} and has no field {part!r}{wanted}")
            field = field.get(part) if hasattr(field, "get") else None


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags for absl's `app.run`; a mistake ends the program with a line that says what would be right."""
    overridden = [arg[2:].partition("=")[0] for arg in argv if arg.startswith("--config.")]
    try:
        remaining = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        ours = [flag.name for flag in usage.ours()]
        fields = ", and --config.FIELD" if "config" in ours else ""
        fail(f"there is no flag --{error.flagname}; {nearest(error.flagname, ours)}{fields}")
    except flags.Error as error:
        told = str(error).strip().splitlines()[-1]
        told = re.sub(r"invalid literal for int.*", "write a whole number", told)
        told = re.sub(r"\(?'Non-boolean argument.*", "write true or false", told)
        told = re.sub(
            r"Failed to parse .* as a ConfigDict.*",
            "it is a section; give its fields, as --config.train.num_steps=100",
            told,
        )
        told = re.sub(r"could not convert string to float.*", "write a number", told)
        fail(f"{told}; --help lists all flags")
    except (KeyError, AttributeError) as error:  # a misspelt field
        below = re.search(r"lookup: ([\w.]+)", str(error))  # the override looked inside a number
        name = below[1].rpartition(".")[2] if below else re.search(r"\w+", str(error))[0]
        written = [field for field in overridden if name in field.split(".")]
        if not written:
            raise
        hint = config_files.guess(written[0], _read_config(argv[1].partition("=")[2]))
        fail(f"the config has no field {name!r}; {hint}configs/default.py holds every field")
    except TypeError:
        _fail_below_value(argv)
        raise
    if flags.FLAGS["verbosity"].using_default_value:
        # orbax logs every file at INFO, and at ERROR it logs a traceback of each error that it also raises.
        flags.FLAGS.verbosity = logging.FATAL
    if empty := [flag.name for flag in usage.ours() if flag.present and flag.value == ""]:
        fail(f"--{empty[0]} is empty; give it a value, or leave it out")
    if len(remaining) > 1:
        fail(f"unexpected argument {remaining[1]!r}; flags are written --name=value")
    return remaining
