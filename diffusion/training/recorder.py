"""Metrics on disk: metrics.csv, which is the record, and TensorBoard events for looking at."""

import csv
import io
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
        kept = [row for row in _rows(metrics) if int(row["step"]) <= step]
        self._seconds = float(kept[-1]["seconds"]) if kept else 0.0
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(metrics, buffer.getvalue().encode())
        self._file = open(metrics, "a", newline="", buffering=1)  # noqa: SIM115 - closed in __exit__
        self._csv = csv.writer(self._file)
        self._events = SummaryWriter(str(metrics.parent), purge_step=step + 1 if step else None)

    def scalars(self, step, loss, grad_norm, learning_rate, images_per_second, seconds) -> None:
        """Writes one row. seconds are those since the last row; the file holds their sum over all starts of the run."""
        self._seconds += seconds
        values = (loss, grad_norm, learning_rate, images_per_second, self._seconds)
        self._csv.writerow((step, *(f"{value:.8g}" for value in values)))
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
    if not metrics.exists():
        return []
    with open(metrics, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
            raise InputError(f"{metrics} has other columns than {', '.join(COLUMNS)}; move it away")
        # A row cut short by a kill lacks its last fields.
        return [row for row in reader if None not in row.values()]
