"""Draws plots of results as PNG files."""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from diffusion.files import read, write_atomically
from diffusion.training.recorder import SHARED


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
    _write(figure, path)


def panels(
    path: str | os.PathLike,
    figures: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    xlabel: str,
    title: str = "",
) -> None:
    """Draws a panel for each figure, with a curve for each series, and writes the plot, whole or not at all.

    Args:
      path: of the PNG file.
      figures: name of the figure -> label -> (x, y) pairs, drawn in the order of x.
      xlabel, title: texts below each panel and above the plot.
    """
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), dpi=120, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, series) in zip(every, figures.items(), strict=False):
        for number, (label, points) in enumerate(series.items()):
            axes.plot(*zip(*sorted(points), strict=True), label=label, marker="os^Dv<>P*X"[number % 10], markersize=4)
        axes.set(xlabel=xlabel, title=long_name(name))
        axes.title.set_size("medium")
        axes.grid(alpha=0.3)
    for axes in list(every)[len(figures) :]:
        axes.set_axis_off()
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    _write(figure, path)


def long_name(figure: str) -> str:
    """Returns how a figure of `evaluation.features` is called on a plot, as "Fréchet distance, pixels"."""
    if figure in ("fid", "kid", "is"):
        return {"fid": "FID", "kid": "KID", "is": "Inception Score"}[figure]
    name, _, space = figure.partition("_")
    words = {"frechet": "Fréchet distance", "kernel": "kernel distance", "score": "class score"}.get(name, name)
    return f"{words}, {space}" if space else words


def losses(metrics: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draws the record of a training run, the loss and what is logged with it, and writes the plot.

    A picture ends no run: whatever goes wrong is a warning.

    Args:
      metrics: the run's metrics.csv; nothing is drawn before its first row.
      path: of the PNG file.
    """
    try:
        lines = read(metrics, within=os.path.dirname(metrics)).decode().splitlines()
        rows = [row for row in csv.DictReader(lines) if None not in row.values()]  # a line may be half written
        if rows:
            columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
            _write(_loss_figure(columns), path)
    except Exception as error:
        warnings.warn(f"no plot of the loss in {path}: {str(error).splitlines()[0][:200]}", stacklevel=2)


def _loss_figure(columns):
    """Returns the figure of `losses`; columns are those of metrics.csv."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    tenths = [name for name in columns if name.startswith("error_tenth_")]
    curves = tenths or [name for name in columns if name not in SHARED]  # else those of the objective
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    lines = [(left, "loss", "black", "")]
    labels = [name.removeprefix("error_tenth_") for name in curves]
    lines += [(right, *line) for line in zip(curves, colors, labels, strict=True)]
    steps = columns["step"]
    for axes, name, color, label in lines:
        marker = "." if len(steps) < 30 else ""  # a line needs two points to be seen
        axes.plot(steps, columns[name], color=color, label=label, marker=marker, linewidth=1)
    # Both axes alike: a logarithmic one where that shows more.
    about = "error in each tenth of the timesteps, 1 is next to the data" if tenths else "what it consists of"
    for axes, title in ((left, "loss"), (right, about)):
        found = np.concatenate([line.get_ydata() for line in axes.lines])
        if len(found := found[np.isfinite(found)]):
            scale_y(axes, found)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("training steps")
        axes.grid(alpha=0.3)
    right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _write(figure, path):
    """Writes a figure as PNG, whole or not at all."""
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
