"""What every claim ends in: a table, a figure, and the words on how they came about."""

import csv
import io
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from diffusion.errors import InputError
from diffusion.files import write_atomically
from diffusion.images import to_uint8
from diffusion.model import Trained

BEGIN, END = "<!-- measured: this part is written by the command above -->", "<!-- measured: end -->"


class Findings(NamedTuple):
    """What was found of a claim.

    Attributes:
      columns: names of the table's columns.
      rows: texts and numbers; None is an empty cell.
      figure: the picture.
      facts: how it was measured, one line.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figure: Figure
    facts: str


def markdown(findings: Findings) -> str:
    """The table, numbers to three digits, and below it the facts with the machine and the month."""
    lines = [findings.columns, ["---"] * len(findings.columns), *findings.rows]
    table = "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)
    return f"{table}\n\n{findings.facts} {machine()}, jax {jax.__version__}, {time.strftime('%B %Y')}."


def write(out: Path, claim: str, findings: Findings) -> list[Path]:
    """Writes images/CLAIM.png and CLAIM.csv, and the table into CLAIM.md if it exists; returns what was written."""
    page = out / f"{claim}.md"
    text = _with_table(page, markdown(findings)) if page.exists() else None
    (out / "images").mkdir(parents=True, exist_ok=True)
    image, table = out / "images" / f"{claim}.png", out / f"{claim}.csv"
    buffer = io.BytesIO()
    findings.figure.savefig(buffer, format="png", bbox_inches="tight")
    write_atomically(image, buffer.getvalue())
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows([findings.columns, *findings.rows])
    write_atomically(table, rows.getvalue().encode())
    if text is None:
        return [image, table]
    write_atomically(page, text.encode())
    return [image, table, page]


def machine() -> str:
    """The processor, as "2 cores of an AMD EPYC", or what JAX calls the accelerator."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{os.cpu_count()} cores of an {name}"


def model_facts(name: str, trained: Trained) -> str:
    """The model in a few words."""
    return f"{name[0].upper()}{name[1:]}, step {trained.step:,}, EMA {trained.ema}"


def new_figure(width: float = 7, height: float = 4.5) -> Figure:
    """An empty figure of so many inches, at 150 pixels each."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def show_pictures(axes, images: Float[np.ndarray, "rows columns H W C"], column_labels, row_labels, title="") -> None:
    """Draws rows of pictures with a name for each column and row into one axes."""
    rows, columns, height, width, channels = images.shape
    margin = max(1, height // 16)
    canvas = np.full((rows * (height + margin), columns * (width + margin), channels), 255, np.uint8)
    for i, line in enumerate(to_uint8(images)):
        for j, image in enumerate(line):
            top, left = i * (height + margin), j * (width + margin)
            canvas[top : top + height, left : left + width] = image
    canvas = canvas[:-margin, :-margin]
    axes.imshow(canvas[..., 0] if channels == 1 else canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks((np.arange(columns) + 0.5) * (width + margin) - margin / 2 - 0.5, column_labels)
    axes.set_yticks((np.arange(rows) + 0.5) * (height + margin) - margin / 2 - 0.5, row_labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


def _text(cell):
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float | np.floating) else str(cell)


def _with_table(page, table):
    """The page's text with this table between its markers."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{page} has no place for its table; write the lines {BEGIN} and {END} where it goes")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
