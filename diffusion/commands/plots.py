"""Draws plots of results as PNG files."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from diffusion.files import write_atomically


def curves(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> None:
    """Draws a curve for each series over a logarithmic x axis and writes the plot, whole or not at all.

    Args:
      path: of the PNG file.
      series: label -> (x, y) pairs, x above 0; drawn in the order of x.
      xlabel, ylabel, title: texts beside the axes and above the plot.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        axes.semilogx(*zip(*sorted(points), strict=True), label=label, marker="os^Dv<>P*X"[number % 10], markersize=5)
    # A tick at each x that was measured, and nowhere else.
    ticks = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    # The other axis, and the texts.
    scale_y(axes, [y for points in series.values() for _, y in points])
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def scale_y(axes: Axes, values: Iterable[float]) -> None:
    """Makes the y axis logarithmic if all values are above 0 and the largest is 3 times the least, or more.

    Else the axis stays linear: an estimate of a distance can be negative. Either way at least two ticks have a number,
    written plainly.
    """
    low, high = min(values), max(values)
    if low <= 0 or high < 3 * low:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
