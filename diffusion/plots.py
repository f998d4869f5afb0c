"""Figures of results, as PNG files."""

import io
import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from diffusion.files import write_atomically


def curves(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draws one line for each series, both axes logarithmic, and writes it, whole or not at all.

    Args:
      path: of a PNG.
      series: label -> (x, y) pairs, positive numbers; drawn in the order of x.
      xlabel, ylabel, title: what stands on the axes and above.
      baseline: a label and a y for a dashed line across.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.loglog(x, y, label=label, marker="os^Dv<>P*X"[number % 10], markersize=5)
    if baseline:
        axes.axhline(baseline[1], color="grey", linestyle="--", label=baseline[0])
    ticks = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
