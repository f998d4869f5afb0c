"""Traces a few steps of a start, for TensorBoard or XProf."""

import warnings
from collections.abc import Callable
from pathlib import Path

import jax

from diffusion import files

PROFILED = range(10, 15)
"""The steps that --profile traces, where 0 is the first of the process."""


class Trace:
    """Writes the trace of the steps `PROFILED`. A disk that is full costs the trace and not the run.

    Args:
      folder: where it goes; None traces nothing.
      settle: waits until all steps that were started are done.
      say: prints a line.
    """

    def __init__(self, folder: Path | None, settle: Callable[[], None], say: Callable[[str], None]):
        self._folder, self._settle, self._say = folder, settle, say
        self._earlier: set[Path] | None = None  # the traces that were there, once this one has begun
        self._ended = folder is None

    def before(self, done: int) -> None:
        """Begins or ends the trace if it is time, before the next step; `done` counts the steps of this process."""
        if self._ended:
            return
        if done == PROFILED.start:
            self._settle()
            self._earlier = self._found()
            jax.profiler.start_trace(self._folder)
        elif done == PROFILED.stop:
            self.end()

    def end(self) -> None:
        """Ends the trace, also where the run is shorter; says what came of it."""
        if self._ended:
            return
        self._ended = True
        if self._earlier is None:
            self._say(f"no trace: a start of fewer than {PROFILED.start + 1} steps ends before it begins")
            return
        self._settle()
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # XLA's errors are RuntimeErrors, whatever failed
            # A part of a trace is of no use, and fills the disk that the next checkpoint needs.
            for folder in self._found() - self._earlier:
                files.remove_folder(folder, self._folder)
            reason = str(error).splitlines()[0][:200]
            warnings.warn(f"no trace: {self._folder} cannot be written ({reason}); look at the disk", stacklevel=3)
            return
        self._say(f"wrote a trace to {self._folder}")

    def _found(self):
        """Returns the folders of all traces that are there."""
        return set(self._folder.glob("plugins/profile/*"))
