"""Writes metrics to disk: files that are the record of a run, and TensorBoard events to look at.

metrics.csv and skipped.jsonl hold what the seed and the config determine: a run that was killed and resumed writes the
same bytes. speed.csv holds what depends on the machine.
"""

import csv
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffusion.errors import InputError
from diffusion.files import write_atomically
from diffusion.training.step import TENTHS


class Row(NamedTuple):
    """Holds one row of metrics.csv: means over the steps since the last multiple of config.train.log_every.

    Attributes:
      step: number of training steps made.
      loss, grad_norm: means over the steps that were not skipped.
      learning_rate: of the last step.
      skipped: number of steps skipped so far because their gradient was not finite.
      errors: mean squared error of the network for each tenth of the timesteps, NaN where there was no sample.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: int
    errors: tuple[float, ...]

    def flat(self) -> list[float]:
        """Returns the row's numbers in the order of COLUMNS."""
        return [*self[:-1], *self.errors]


class Speed(NamedTuple):
    """Holds one row of speed.csv: pace since the last row, seconds in the loop so far, peak memory in GiB.

    Time spent on compiling and on drawing sheets of samples does not count.
    """

    step: int
    images_per_second: float
    seconds: float
    memory_gib: float


COLUMNS = (*Row._fields[:-1], *(f"error_tenth_{k}" for k in range(1, TENTHS + 1)))


class Recorder:
    """Appends rows to the record and flushes each, so that a killed run loses none; a context manager.

    Rows after `step` are dropped at the start: a run resumed at `step` writes them again.

    Args:
      folder: the run folder.
      step: the step the run starts from.

    Raises:
      InputError: a file of that name is there, but is no such record.
    """

    def __init__(self, folder: Path, step: int):
        metrics, speed = folder / "metrics.csv", folder / "speed.csv"
        timed = _read_csv(speed, Speed._fields, step)
        self._seconds = timed[-1][Speed._fields.index("seconds")] if timed else 0.0
        self._metrics = _reopen(metrics, [COLUMNS, *_read_csv(metrics, COLUMNS, step)], _line)
        self._speed = _reopen(speed, [Speed._fields, *timed], _line)
        self._skipped_path, self._step = folder / "skipped.jsonl", step
        self._skipped = None
        if self._skipped_path.exists():
            self._open_skipped()
        self._events = _Events(folder, step)

    def scalars(self, row: Row, images_per_second: float, seconds: float, memory_gib: float) -> None:
        """Writes one row to each file; `seconds` is the time since the last row."""
        self._seconds += seconds
        speed = Speed(row.step, images_per_second, self._seconds, memory_gib)
        self._metrics.write(_line(row.flat()))
        self._speed.write(_line(speed))
        for name, value in [*zip(COLUMNS, row.flat(), strict=True), *zip(Speed._fields, speed, strict=True)]:
            if name != "step" and math.isfinite(value):  # TensorBoard cannot draw NaN or infinity
                self._events.add(summary.scalar(name, value), row.step)
        self._events.flush()

    def skipped(self, step: int, **facts: Any) -> None:
        """Adds a line about a skipped step to skipped.jsonl."""
        if self._skipped is None:
            self._open_skipped()
        self._skipped.write(_json({"step": step, **facts}))

    def image(self, name: str, image: UInt8[np.ndarray, "H W C"], step: int) -> None:
        """Adds an image to TensorBoard's events."""
        self._events.add(summary.image(name, image, dataformats="HWC"), step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in (self._metrics, self._speed, self._skipped, self._events):
            if file is not None:
                file.close()

    def _open_skipped(self):
        self._skipped = _reopen(self._skipped_path, _read_skipped(self._skipped_path, self._step), _json)


class _Events:
    """Writes TensorBoard's file at once.

    SummaryWriter would write it in a thread, which ends in silence on a full disk, and then its queue holds up training
    for ever.
    """

    def __init__(self, folder, step):
        self._writer = EventsWriter(str(folder / "events"))
        if step:  # tells TensorBoard to forget what an earlier start wrote after this step
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, what, step):
        self._write(step, summary=what)

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()

    def _write(self, step, **content):
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


class Silent:
    """Takes the place of a Recorder in all processes of a run but the first, and writes nothing."""

    def scalars(self, *_): ...

    def skipped(self, *_, **__): ...

    def image(self, *_): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


def _reopen(path, rows, line):
    """Writes the file anew with these rows, and returns it open for more."""
    write_atomically(path, "".join(map(line, rows)).encode())
    return open(path, "a", newline="", buffering=1)


def _read_csv(path, columns, last_step):
    """Returns the rows up to last_step, without a last line that a kill cut short."""
    if not path.exists():
        return []
    try:
        # Check the header and the length of each row, then turn text into numbers.
        header, *lines = list(csv.reader(_whole_lines(path))) or [list(columns)]
        if tuple(header) != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
        for number, line in enumerate(lines, start=2):
            if len(line) != len(columns):
                raise ValueError(f"line {number} has {len(line)} entries")
        kinds = [int if name in ("step", "skipped") else float for name in columns]
        rows = [[kind(text) for kind, text in zip(kinds, line, strict=True)] for line in lines]
        return [row for row in rows if row[0] <= last_step]
    except ValueError as error:
        raise InputError(f"{path} is not a record of this program ({error}); move it away") from None


def _read_skipped(path, last_step):
    try:
        rows = [json.loads(line) for line in _whole_lines(path)] if path.exists() else []
        return [row for row in rows if row["step"] <= last_step]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a record of this program ({error}); move it away") from None


def _whole_lines(path):
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _line(row):
    return ",".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in row) + "\n"


def _json(row):
    return json.dumps(row) + "\n"
