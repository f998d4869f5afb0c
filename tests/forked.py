"""Runs programs of the package in forked processes, which share one import of JAX; for suites of many short runs."""

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a program did: its exit code (None if it ran past its time), and what it printed."""

    code: int | None
    out: str
    err: str
    gib: float

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


def run(program: str, args: list[str], cwd: Path, seconds: float = 60) -> Outcome:
    """Runs diffusion/commands/<program>.py with these arguments in a fork of this process, and waits for its end.

    This process must not have touched a device before: JAX starts its threads then, which a fork does not have.
    """
    out, err = cwd / ".stdout", cwd / ".stderr"
    pid = os.fork()
    if pid == 0:
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
    texts = [path.read_text(errors="replace") for path in (out, err)]
    out.unlink(), err.unlink()
    return Outcome(code, *texts, usage.ru_maxrss / 2**20)


def _become(program, args, cwd, out, err):
    """Turns the fork into the program; never returns."""
    code = 70
    try:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.chdir(cwd)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = [f"{program}.py", *args]
        __import__(f"diffusion.commands.{program}", fromlist=["launch"]).launch()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
