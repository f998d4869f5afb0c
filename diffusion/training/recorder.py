"""Writes metrics to disk: files that are the record of a run, and TensorBoard events to look at.

metrics.csv and skipped.jsonl hold what the seed and the config determine: a run that was killed and resumed writes the
same bytes. speed.csv holds what depends on the machine.
"""

import json
import math
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from diffusion import files
from diffusion.training.record import Record, json_lines, table
from diffusion.training.state import TENTH_NAMES


class Row(NamedTuple):
    """Holds one row of metrics.csv: means over the steps since the last multiple of config.train.log_every.

    Attributes:
      step: number of training steps made.
      loss, grad_norm: means over the steps that were not skipped.
      learning_rate: of the last step.
      skipped: number of steps skipped so far because their gradient was not finite.
      errors: mean squared error of the network for each tenth of the timesteps, NaN where there was no sample; or the
        means of an objective's own curves.
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


SHARED = Row._fields[:-1]
"""The columns that metrics.csv has for every run."""

COLUMNS = (*SHARED, *TENTH_NAMES)

_SPEED, _EVENTS = "speed.csv", "TensorBoard's events"


class Recorder:
    """Appends rows to the record and flushes each, so that a killed run loses none; a context manager.

    Rows after `step` are dropped at the start: a run resumed at `step` writes them again. See `Record` for a file that
    is not what was written. speed.csv and the events are no part of the record: an error of the disk there is told
    once, and the run goes on without them.

    Args:
      folder: the run folder.
      step: the step the run starts from.
      sealed: what `seal` returned when that step was saved; {} if nobody knows.
      curves: the names of the columns after those that every run has.

    Raises:
      InputError: a file of these names is a link, or no regular file.
      OSError: metrics.csv or skipped.jsonl cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        sealed: Mapping[str, Any] | None = None,
        curves: Sequence[str] = TENTH_NAMES,
    ):
        self._folder, self._step, self._sealed = folder, step, sealed or {}
        self._given_up: set[str] = set()
        self._columns = (*SHARED, *curves)
        self._metrics = Record(folder, "metrics.csv", table(self._columns, ("step", "skipped")), step, self._sealed)
        self._skipped: Record | None = None
        if os.path.lexists(folder / "skipped.jsonl") or "skipped.jsonl" in self._sealed:
            self._open_skipped()
        self._seconds = 0.0
        self._speed: Record | None = None
        self._events: _Events | None = None
        self._attempt(_SPEED, self._open_speed)
        self._attempt(_EVENTS, self._open_events)

    def scalars(self, row: Row, images_per_second: float, seconds: float, memory_gib: float) -> None:
        """Writes one row to each file; `seconds` is the time since the last row."""
        self._seconds += seconds
        speed = Speed(row.step, images_per_second, self._seconds, memory_gib)
        self._metrics.write(_line(row.flat()))
        self._attempt(_SPEED, lambda: self._speed.write(_line(speed)))
        values = dict([*zip(self._columns, row.flat(), strict=True), *zip(Speed._fields, speed, strict=True)])
        self._attempt(_EVENTS, lambda: self._events.add_scalars(values, row.step))

    def skipped(self, step: int, **facts: Any) -> None:
        """Adds a line about a skipped step to skipped.jsonl."""
        if self._skipped is None:
            self._open_skipped()
        self._skipped.write(json.dumps({"step": step, **facts}) + "\n")

    def image(self, name: str, image: UInt8[np.ndarray, "H W C"], step: int) -> None:
        """Adds an image to TensorBoard's events."""
        self._attempt(_EVENTS, lambda: self._events.add(summary.image(name, image, dataformats="HWC"), step))

    def seal(self) -> dict[str, Any]:
        """Puts the record on disk, and returns the bytes and the SHA-256 of each of its files."""
        return {record.name: record.seal() for record in (self._metrics, self._skipped) if record is not None}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name, file in ((_SPEED, self._speed), (_EVENTS, self._events)):
            if file is not None:
                self._attempt(name, file.close)
        for record in (self._metrics, self._skipped):
            if record is not None:
                record.close()

    def _open_skipped(self):
        self._skipped = Record(self._folder, "skipped.jsonl", json_lines(), self._step, self._sealed)

    def _open_speed(self):
        self._speed = Record(self._folder, _SPEED, table(Speed._fields, ("step",)), self._step, sealed=None)
        if self._speed.last is not None:
            self._seconds = float(self._speed.last.split(",")[Speed._fields.index("seconds")])

    def _open_events(self):
        self._events = _Events(self._folder, self._step)

    def _attempt(self, name: str, write: Callable[[], Any]) -> None:
        """Writes what the run can do without; after an error nothing more of that name is written."""
        if name in self._given_up:
            return
        try:
            write()
        except OSError as error:
            self._given_up.add(name)
            warnings.warn(f"{name} cannot be written ({error.strerror}); the run goes on without", stacklevel=3)


class _Events:
    """Writes TensorBoard's file at once.

    SummaryWriter would write it in a thread, which ends in silence on a full disk, and then its queue holds up training
    for ever.
    """

    def __init__(self, folder, step):
        seconds, rest = divmod(time.time_ns(), 10**9)  # two starts in one second have a file each
        name = f"events.out.tfevents.{seconds}.{socket.gethostname()}.{rest}"
        self._file = files.create(folder / name, folder)
        self._write(0, file_version="brain.Event:2")
        if step:  # tells TensorBoard to forget what an earlier start wrote after this step
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def add(self, what, step):
        self._write(step, summary=what)

    def add_scalars(self, values, step):
        for name, value in values.items():
            if name != "step" and math.isfinite(value):  # TensorBoard cannot draw NaN or infinity
                self.add(summary.scalar(name, value), step)
        self._file.flush()

    def close(self):
        self._file.close()

    def _write(self, step, **content):
        # A record is its length, the length's checksum, the event, and the event's checksum.
        event = Event(wall_time=time.time(), step=step, **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, event))
        self._file.write(length + next(sums) + event + next(sums))


class Silent:
    """Takes the place of a Recorder in all processes of a run but the first, and writes nothing."""

    def scalars(self, *_): ...

    def skipped(self, *_, **__): ...

    def image(self, *_): ...

    def seal(self) -> dict[str, Any]:
        return {}

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


def _line(row):
    return ",".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in row) + "\n"
