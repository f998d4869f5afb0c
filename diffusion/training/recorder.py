"""Metrics on disk: metrics.csv, which is the record, and TensorBoard events for looking at."""

import csv
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from diffusion.errors import InputError
from diffusion.files import write_atomically

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "images_per_second", "seconds")


class Recorder:
    """Appends one row at a time, flushed, so that a killed run loses none; a context manager.

    Rows after `step` are dropped when it opens: a run resumed at `step` writes them again.

    Args:
      metrics: path of metrics.csv; the events go to its folder.
      step: the step the run starts from.

    Raises:
      InputError: metrics.csv is not one of ours.
    """

    def __init__(self, metrics: Path, step: int):
        kept = [row for row in _rows(metrics) if row[0] <= step]
        self._seconds = kept[-1][-1] if kept else 0.0
        write_atomically(metrics, "".join(_line(row) for row in [COLUMNS, *kept]).encode())
        self._file = open(metrics, "a", newline="", buffering=1)  # noqa: SIM115 - closed in __exit__
        self._events = SummaryWriter(str(metrics.parent), purge_step=step + 1 if step else None)

    def scalars(self, step, loss, grad_norm, learning_rate, images_per_second, seconds) -> None:
        """Writes one row. seconds are those since the last row; the file holds their sum over all starts of the run."""
        self._seconds += seconds
        values = (loss, grad_norm, learning_rate, images_per_second, self._seconds)
        self._file.write(_line((step, *values)))
        for name, value in zip(COLUMNS[1:], values, strict=True):
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """image: uint8 [H, W, C]."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._events.close()


def _rows(metrics):
    """Rows as dictionaries; a last one that a kill cut short is left out."""
    if not metrics.exists():
        return []
    try:
        header, *lines = list(csv.reader(metrics.read_text().splitlines())) or [list(COLUMNS)]
        if tuple(header) != COLUMNS:
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        if lines and len(lines[-1]) < len(COLUMNS):
            lines.pop()
        return [(int(step), *map(float, values)) for step, *values in _complete(lines)]
    except ValueError as error:
        raise InputError(f"{metrics} is not a record of this program ({error}); move it away") from None


def _complete(lines):
    for number, line in enumerate(lines, start=2):
        if len(line) != len(COLUMNS):
            raise ValueError(f"line {number} has {len(line)} entries")
        yield line


def _line(row):
    return ",".join(f"{value:.8g}" if isinstance(value, float) else str(value) for value in row) + "\n"
