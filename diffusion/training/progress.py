"""Shows how far a training is: a progress bar with the pace and the time left, or lines where there is no terminal."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from tqdm import tqdm

COMPILING_EVERY = 30
"""Seconds between lines on a compilation, where there is no progress bar."""


class Progress:
    """Measures the pace of the steps, without compilation and drawing, and shows it; a context manager.

    Args:
      start: the number of steps made before.
      num_steps: the number of the last step.
      shown: whether to print anything; one process of a run does.
    """

    def __init__(self, start: int, num_steps: int, shown: bool):
        self._num_steps, self._shown = num_steps, shown
        self._idle = 0.0
        self._ends: deque[float] = deque(maxlen=50)
        self._restart()
        # The bar shows this pace and not tqdm's own, which counts compilation and the drawing of sheets.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        disable = None if shown else True
        self._bar = tqdm(total=num_steps, initial=start, dynamic_ncols=True, disable=disable, bar_format=layout)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._bar.write(line)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Shows that the first step is being compiled, with the seconds that it has taken; they do not count."""
        begin, done = self._now(), threading.Event()

        def tick():
            while not done.wait(1.0):
                seconds = round(self._now() - begin)
                if not self._bar.disable:
                    self._bar.set_postfix_str(f"compiling, {seconds} s")
                elif seconds % COMPILING_EVERY == 0:
                    self.say(f"compiling, {seconds} s")

        if self._bar.disable:
            self.say("compiling the training step")
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
            self.say(f"first step after {self._now() - begin:.1f} s, compilation included")
        finally:
            done.set()
            ticker.join()
        self._bar.set_postfix_str("measuring the pace", refresh=False)
        self._bar.update()
        self._restart()

    def step(self, step: int) -> None:
        """Counts a step that was just made."""
        self._steps += 1
        self._ends.append(self._now())
        if len(self._ends) > 1:
            pace = (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
            self._bar.set_postfix_str(f"{pace:.3g} steps/s, {self.left(step, pace)} left", refresh=False)
        self._bar.update()

    @contextlib.contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Leaves the time inside out of the pace; the bar says what is done in it."""
        before = time.monotonic()
        self._bar.set_postfix_str(doing)
        yield
        self._idle += time.monotonic() - before

    def take(self) -> tuple[float, float]:
        """Returns (seconds, steps a second) since the last call; the pace is 0 if no step but the first was made."""
        seconds = self._now() - self._mark
        pace = self._steps / seconds if self._steps else 0.0
        self._restart()
        return seconds, pace

    def left(self, step: int, pace: float) -> str:
        """Returns the time from a step to the last one at so many steps a second: 12:03, 1:02:03, 12.5 days."""
        seconds = (self._num_steps - step) / pace
        return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else tqdm.format_interval(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def _restart(self):
        self._mark, self._steps = self._now(), 0

    def _now(self):
        return time.monotonic() - self._idle
