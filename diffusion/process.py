"""Readies a process: exit codes, the signals that ask it to stop, and streams that nothing can break.

It imports only the standard library, and launchers run this file by its path before the seconds of imports.
"""

import contextlib
import ctypes
import io
import os
import select
import signal
import sys

INTERRUPTED = 130  # the shell's code for Ctrl-C
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, which asks a cluster to start the run again

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
"""What asks a run to stop, as Ctrl-C does: a cluster that takes the machine back, a lost terminal, a limit of time."""


def ready(*, resumes: bool = False) -> None:
    """Makes the streams safe, and has a signal end the process quietly with its code as long as nothing has begun.

    A signal that is ignored, as nohup and a shell's & have it, stays so.

    Args:
      resumes: whether the same command goes on where it was stopped, which PREEMPTED tells a cluster.
    """
    _fill_closed()
    sys.stdout, sys.stderr = _dropping(sys.stdout, 1), _dropping(sys.stderr, 2)
    codes = {signal.SIGINT: INTERRUPTED} | (dict.fromkeys(STOPPING, PREEMPTED) if resumes else {})
    for number, code in codes.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            # Not sys.exit: an import that is cut short may print what it likes on the way.
            signal.signal(number, lambda *_, code=code: os._exit(code))


def begin() -> None:
    """Gives signals their usual meaning, once a program has begun that cleans up by itself."""
    for number in (signal.SIGINT, *STOPPING):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def exit_if_aborted(code: int, line: str) -> None:
    """Has the process print a line and exit with a code where C++ would abort it, as JAX's network service does.

    Python's own handlers hear no abort: they run after the signal, and there is no after.
    """

    def handle(_):
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        os._exit(code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _KEPT.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


_KEPT: list[object] = []  # C knows only the address of a handler, so something in Python must hold it


def _fill_closed():
    """Opens /dev/null where stdin, stdout or stderr is closed; the next file opened would get what is printed."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, handle)
            if null > 2:
                os.close(null)


class _Dropping(io.RawIOBase):
    """Writes to a file descriptor, and drops what cannot be written: a pipe nobody reads, a full disk, no terminal."""

    def __init__(self, handle: int):
        self._handle = handle

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)

    def write(self, content) -> int:
        size = len(content)
        while len(content):
            try:
                content = content[os.write(self._handle, content) :]
            except BlockingIOError:
                select.select([], [self._handle], [])
            except OSError:
                break
        return size


def _dropping(stream, handle):
    """Returns a text stream to a file descriptor that raises no OSError, and that no character is beyond."""
    if hasattr(stream, "drops") or (stream is not None and not hasattr(stream, "buffer")):
        return stream  # one of ours, or a notebook's own
    unbuffered = getattr(stream, "write_through", False)
    written = _Dropping(handle)
    made = io.TextIOWrapper(
        written if unbuffered else io.BufferedWriter(written),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=handle == 2 or getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )
    made.drops = True
    return made
