"""Ratios for a machine that others use as well: neighbours in time, an interval, and how much the others worked."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

WIDEST = 0.10
"""A ratio whose interval is wider than this share of it is not printed as a number."""

OTHERS = 0.10
"""Of the cores' time that other programs may use before it is said."""


class Ratio(NamedTuple):
    """Holds the median of paired ratios and an interval that has it in 95 % of the cases, by order statistics."""

    median: float
    low: float
    high: float

    def text(self) -> str:
        """Returns the median and its interval, or only how wide it is where that is too wide to say anything."""
        if self.high - self.low > WIDEST * self.median:
            return f"unclear ({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Returns the ratio of two lists of seconds, of which those at one place were measured one after the other.

    The interval is that of the median by the sign test: it needs 6 pairs, and with fewer it is from lowest to highest.
    """
    ratios = np.sort(np.divide(ours, theirs))
    outside = max(0, int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1)
    return Ratio(float(np.median(ratios)), float(ratios[outside]), float(ratios[-1 - outside]))


class Others:
    """Measures the share of the cores that programs other than ours use; 0 on a system that does not tell."""

    def __init__(self, processes: Sequence[int] = ()):
        """Takes the ids of the processes that work for us besides this one."""
        self._processes = [os.getpid(), *processes]
        self._start = self._ticks()

    def share(self) -> float:
        """Returns the share of the cores' time since the start, 0..1."""
        (all_start, busy_start, ours_start), (all_now, busy_now, ours_now) = self._start, self._ticks()
        if all_now <= all_start:
            return 0.0
        return max(0.0, (busy_now - busy_start - (ours_now - ours_start)) / (all_now - all_start))

    def _ticks(self):
        """Returns (all, busy, ours): time of all cores, of cores that worked, and of those that worked for us."""
        try:
            with open("/proc/stat") as file:
                times = [int(word) for word in file.readline().split()[1:9]]
            ours = 0
            for process in self._processes:
                with open(f"/proc/{process}/stat") as file:
                    # Fields 14 to 17 are user and system time, and those of children that have ended; the second
                    # field, a name, may have spaces.
                    ours += sum(map(int, file.read().rsplit(")", 1)[1].split()[11:15]))
        except OSError:
            return 0, 0, 0
        return sum(times), sum(times) - times[3] - times[4], ours
