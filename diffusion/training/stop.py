"""Lets signals ask a run to stop, and decides the exit codes with which it answers."""

import concurrent.futures
import signal
import threading
from collections.abc import Callable
from typing import Any

from diffusion.process import INTERRUPTED, PREEMPTED, STOPPING

PATIENCE = 10.0
"""How many seconds after a signal a run still waits for a batch, which a process that hangs may never bring."""


class Stopped(BaseException):
    """Reports that a stop was asked for while there was nothing to save.

    It is no Exception, so that nothing takes it for an error. The signal is its argument.
    """


class StopRequest:
    """Listens for Ctrl-C and the signals `STOPPING`; a context manager for the main thread.

    At first a signal raises `Stopped`, since nothing can be lost. After `defer` it only sets `received`, so that the
    step in progress ends and is saved; a second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self._signal: int | None = None
        self._deferred = self._waiting = self._nudged = False
        self._nudge: threading.Timer | None = None

    @property
    def received(self) -> bool:
        """Says whether a signal has come."""
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """Returns the exit code after a stop; it is PREEMPTED also if another process of the run got the signal."""
        return INTERRUPTED if self._signal == signal.SIGINT else PREEMPTED

    def defer(self) -> None:
        """Makes signals wait for the end of the step from now on."""
        self._deferred = True

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), called in another thread so that this one can answer signals meanwhile.

        XLA compiles for minutes, during which the thread that called it hears no signal.

        Raises:
          Stopped: a signal came first; the function goes on running, and must be left to do so until the process ends.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()

        def work():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        while not future.done():
            if self.received:
                raise Stopped(self._signal)
            concurrent.futures.wait([future], timeout=0.1)
        return future.result()

    def wait_for(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), which is short unless what it waits for hangs.

        Raises:
          Stopped: a signal came `PATIENCE` seconds ago, and it has not returned.
        """
        self._waiting = True
        try:
            return function(*args)
        finally:
            self._waiting = False

    def __enter__(self):
        # A process that a shell starts in the background ignores Ctrl-C, one under nohup SIGHUP, and should go on so.
        heard = [s for s in (signal.SIGINT, *STOPPING) if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._receive) for s in heard}
        return self

    def __exit__(self, *_):
        if self._nudge is not None:
            self._nudge.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self._nudged:
            self._nudged = False
            if self._waiting:
                raise Stopped(number)
            return
        again, self._signal = self.received, number
        if not self._deferred:
            raise Stopped(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not again:
            self._nudge = threading.Timer(PATIENCE, self._send_again, (number,))
            self._nudge.daemon = True
            self._nudge.start()

    def _send_again(self, number):
        self._nudged = True
        signal.pthread_kill(threading.main_thread().ident, number)
