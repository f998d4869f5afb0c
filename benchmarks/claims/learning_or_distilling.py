"""Learned tables beside distilled students at equal calls, with what each costs before the first sample is drawn."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.claims.report import Findings, new_figure
from diffusion.errors import InputError

SECONDS_A_CALL = 16e-3 / 64
"""Of the digits network and one image on 2 cores: claim step_cost, a step of 64 images."""

IMAGES = (1e3, 1e5, 1e7)
"""Of how many images the total cost is drawn."""


class Way(NamedTuple):
    """One way to few calls.

    Attributes:
      method: DDIM, learned table, or how a student was trained.
      calls: of a sample.
      distance, lowest, highest: to the data: mean and range of the seeds.
      seconds: of learning or training.
      origin: where the figures come from.
    """

    method: str
    calls: int
    distance: float
    lowest: float
    highest: float
    seconds: float
    origin: str

    def total(self, images: float) -> float:
        """Returns the seconds of learning and of drawing so many images."""
        return self.seconds + images * self.calls * SECONDS_A_CALL


def measure(path: str | os.PathLike) -> Findings:
    """The distance of each way beside its cost, and from how many images on it is the cheapest of no worse ones.

    Args:
      path: CSV file with a row for each way and number of calls, and the fields of `Way` as columns; add rows to it.

    Raises:
      InputError: there is no such file, or it has no such columns.
    """
    ways = read(Path(path))
    columns = ["calls", "method", "frechet_pixels", "its seeds", "seconds of learning"]
    columns += [f"seconds with {int(images):,} images" for images in IMAGES] + ["cheapest for its quality", "origin"]
    rows = []
    for way in sorted(ways, key=lambda way: (way.calls, way.method)):
        spread = f"{way.lowest:.4g} to {way.highest:.4g}"
        totals = [f"{way.total(images):,.0f}" for images in IMAGES]
        cells = way.calls, way.method, way.distance, spread, way.seconds, *totals
        rows.append((*cells, cheapest(way, ways), way.origin))
    facts = f"{1e3 * SECONDS_A_CALL:.2f} ms a call and image on a quiet machine; figures as recorded, drawn on"
    return Findings(columns, rows, _figure(ways), facts)


def read(path: Path) -> list[Way]:
    """Reads the ways of a CSV file."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; docs/claims/learning_or_distilling_data.csv has our figures")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        numbers = ("distance", "lowest", "highest", "seconds")
        ways = []
        for row in rows:
            values = [float(row[name]) for name in numbers]
            ways.append(Way(row["method"], int(row["calls"]), *values, row["origin"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} needs the columns {', '.join(Way._fields)} ({error})") from None
    if not ways:
        raise InputError(f"{path} has no rows")
    return ways


def cheapest(way: Way, ways: Sequence[Way]) -> str:
    """Says for which numbers of images no other way is as good, within its seeds, and costs less in total.

    Costs are straight lines in the number of images, so these numbers are one interval.
    """
    low, high = 0.0, np.inf
    for other in ways:
        if other is way or other.distance > way.highest:
            continue
        slope, offset = (way.calls - other.calls) * SECONDS_A_CALL, way.seconds - other.seconds
        if slope == 0 and offset > 0:
            return "never"
        if slope < 0:
            low = max(low, offset / -slope)
        elif slope > 0:
            high = min(high, -offset / slope)
    if low >= high:
        return "never"
    if high == np.inf:
        return f"from {low:,.0f} images on"
    return f"for {low:,.0f} to {high:,.0f} images"


def _figure(ways):
    figure = new_figure(11, 4.4)
    left, *rest = figure.subplots(1, 1 + len(IMAGES[1:]), sharey=True)
    methods = list(dict.fromkeys(way.method for way in ways))
    for number, method in enumerate(methods):
        of = sorted((way for way in ways if way.method == method), key=lambda way: way.calls)
        style = {"marker": "os^Dvp*"[number % 7], "color": f"C{number}"}
        means = np.array([way.distance for way in of])
        spread = [means - [way.lowest for way in of], np.array([way.highest for way in of]) - means]
        left.errorbar([way.calls for way in of], means, spread, label=method, capsize=3, **style)
        for axes, images in zip(rest, IMAGES[1:], strict=True):
            axes.plot([way.total(images) for way in of], means, label=method, **style)
            for way in of:
                axes.annotate(str(way.calls), (way.total(images), way.distance), (4, 4), textcoords="offset points")
            axes.set(xlabel="seconds in all", title=f"learning, and drawing {int(images):,} images")
    ticks = sorted({way.calls for way in ways})
    for axes in (left, *rest):
        axes.loglog()
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    left.set_xticks(ticks, map(str, ticks))
    left.minorticks_off()
    left.set(xlabel="network calls", ylabel="frechet_pixels", title="at equal calls")
    left.legend(fontsize="small")
    return figure
