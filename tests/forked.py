"""Runs programs of the package in forked processes, which share one import of JAX; for suites of many short runs.

As a program it is the process that is forked: it reads requests, one JSON line each, and answers in the same way.
"""

import importlib
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

IMPORTED = ("optax", "orbax.checkpoint", "matplotlib.pyplot", "grain", "sklearn.datasets", "flax.linen", "tensorboardX")
IMPORTED += ("PIL.Image", "scipy.linalg", "safetensors", "pooch", "tqdm", "diffusion", "diffusion.training.loop")
IMPORTED += ("diffusion.commands.experiment", "diffusion.commands.jobs", "diffusion.commands.sweep")


class Outcome(NamedTuple):
    """What a program did.

    Attributes:
      code: its exit code; below 0 the signal that ended it, None if it ran past its time.
      out, err: what it printed.
      gib: the most memory that it had, that of the process it was forked from included.
      operations: how many times it opened for writing, renamed, removed or synced something below the watched folder.
    """

    code: int | None
    out: str
    err: str
    gib: float
    operations: int = 0

    @property
    def fault(self) -> str:
        """Says what no program may do, such as end in a traceback, or "" if it did nothing of the kind."""
        if "Traceback (most recent call last)" in self.err:
            return "traceback"
        if self.code not in (None, 0, 2, 75, 130):
            return f"exit code {self.code}"
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.code == 2 and len(errors) != 1:
            return f"{len(errors)} lines of error"
        return ""


class Programs:
    """Runs programs in forks of a process of its own, so that the caller may use devices; a context manager.

    Args:
      env: environment variables of that process, over those of this one.

    Attributes:
      env: as given.
    """

    def __init__(self, env: dict[str, str]):
        self.env = env
        root = str(Path(__file__).parents[1])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": root, **env}
        self._process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)

    def run(self, program: str, args, cwd: Path, seconds: float = 60, **watched) -> Outcome:
        """Runs a program as `run` does."""
        request = {"program": program, "args": list(map(str, args)), "cwd": str(cwd), "seconds": seconds, **watched}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(30)


def run(
    program: str,
    args: list[str],
    cwd: Path,
    seconds: float = 60,
    *,
    env: dict[str, str] | None = None,
    watch: str = "",
    kill_at: int = 0,
) -> Outcome:
    """Runs diffusion/commands/<program>.py with these arguments in a fork of this process, and waits for its end.

    This process must not have touched a device before: JAX starts its threads then, which a fork does not have.

    Args:
      program: train, sample, evaluate or convert.
      args: its arguments.
      cwd: its working directory.
      seconds: after which it is killed.
      env: environment variables for it alone.
      watch: the folder below which its operations are counted.
      kill_at: the number of the operation, from 1, just before which it kills itself; 0 for none.
    """
    cwd = Path(cwd)
    out, err = cwd / ".stdout", cwd / ".stderr"
    count = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        os.environ.update(env or {})
        if watch:
            _watch(watch, kill_at, count)
        _become(program, args, cwd, out, err)
    end, status, usage = time.monotonic() + seconds, None, None
    while time.monotonic() < end and status is None:
        done, found, usage = os.wait4(pid, os.WNOHANG)
        status = found if done else None
        time.sleep(0.01)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        _, _, usage = os.wait4(pid, 0)
    code = None if status is None else os.waitstatus_to_exitcode(status)
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    out.unlink(missing_ok=True), err.unlink(missing_ok=True)
    return Outcome(code, *texts, usage.ru_maxrss / 2**20, int.from_bytes(count[:], "little"))


def _become(program, args, cwd, out, err):
    """Turns the fork into the program; never returns."""
    code = 70
    try:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.chdir(cwd)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = [f"{program}.py", *args]
        importlib.import_module(f"diffusion.commands.{program}").launch()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


# Events of sys.audit that change files: how many of their arguments are paths, and where the folders begin to which
# these are relative.
_CHANGES = {"os.rename": (2, 2), "os.link": (2, 2), "os.symlink": (2, 2), "os.remove": (1, 1), "os.rmdir": (1, 1)}
_CHANGES |= {"os.mkdir": (1, 2), "os.truncate": (1, 9), "os.fsync": (1, 9), "fcntl.flock": (1, 9), "os.chmod": (1, 2)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _watch(root, kill_at, count):
    """Counts what this process does to files below a folder, and kills it just before operation number kill_at."""
    sync = os.fsync

    def fsync(handle):
        sys.audit("os.fsync", handle)
        sync(handle)

    def hook(event, args):
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike) and args[2] & _WRITING:
            paths = [args[0]]
        elif event in _CHANGES:
            number, folders = _CHANGES[event]
            paths = [_absolute(args[i], *args[folders + i : folders + i + 1]) for i in range(number)]
        else:
            return
        if any(os.path.abspath(os.fsdecode(path)).startswith(root + os.sep) for path in paths):
            count[:] = (int.from_bytes(count[:], "little") + 1).to_bytes(8, "little")
            if int.from_bytes(count[:], "little") == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    sys.addaudithook(hook)


def _absolute(path, folder=-1):
    """Returns the path behind a name, or a file descriptor, in a folder that a descriptor names."""
    try:
        if isinstance(path, int) or hasattr(path, "fileno"):
            return os.readlink(f"/proc/self/fd/{path if isinstance(path, int) else path.fileno()}")
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
            return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    except OSError:
        return os.devnull
    return path


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
