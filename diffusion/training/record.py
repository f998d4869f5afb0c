"""Keeps the files of lines that are a run's record, and finds out whether they are still what was written."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion import files

_LIMIT = 2**31
"""The most bytes that a record is believed to have."""


class Kind(NamedTuple):
    """Says how the lines of a file are read.

    Attributes:
      header: the first line, with its end; "" for none.
      step_of: line -> the step that it is about; raises ValueError, LookupError or TypeError for what is no such line.
    """

    header: str
    step_of: Callable[[str], int]


def table(columns: Sequence[str], whole: Sequence[str]) -> Kind:
    """Returns the kind of a CSV file of numbers; the first column is the step, those in `whole` have no fractions."""
    kinds = [int if name in whole else float for name in columns]

    def step_of(line):
        step, *_ = [kind(text) for kind, text in zip(kinds, line.split(","), strict=True)]
        return step

    return Kind(",".join(columns) + "\n", step_of)


def json_lines() -> Kind:
    """Returns the kind of a file with an object a line, which has an entry "step"."""
    return Kind("", lambda line: int(json.loads(line)["step"]))


class Record:
    """Appends lines to a file and flushes each, and knows the SHA-256 of all of it.

    What an earlier start wrote up to a step stays, and what it wrote later is dropped, as the run makes these steps
    again. A file that is not what was written is named in a warning and kept under another name; the record then goes
    on with those of its lines that can be read. The same goes for a file beside which there is no checkpoint.

    Args:
      folder: the run folder.
      name: of the file.
      kind: of its lines.
      step: the step the run starts from.
      sealed: what `seal` returned of each file when that step was saved; None for a file that nobody vouches for.

    Raises:
      InputError: the file is a link, or no regular file.
      OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path, name: str, kind: Kind, step: int, sealed: Mapping[str, Any] | None):
        self.name = name
        path = self._path = folder / name
        content = _checked(path, kind, step, sealed) or kind.header.encode()
        files.write_atomically(path, content, folder)
        files.sync(folder)
        self._file = files.open_to_append(path, folder)
        self._hash, self._bytes = hashlib.sha256(content), len(content)
        rows = content.decode().splitlines()
        self.last = rows[-1] if len(rows) > bool(kind.header) else None

    def write(self, line: str) -> None:
        """Appends a line, which ends in a line feed."""
        content = line.encode()
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)
            raise
        self._hash.update(content)
        self._bytes += len(content)

    def seal(self) -> dict[str, Any]:
        """Puts the file on disk, and returns its bytes and SHA-256."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()


def _checked(path, kind, step, sealed):
    """Returns what stays of the file; keeps the file under another name if that is not all that it should hold."""
    wanted = (sealed or {}).get(path.name)
    known = isinstance(wanted, dict) and type(wanted.get("bytes")) is int and wanted["bytes"] >= 0
    size, digest = (wanted["bytes"], wanted.get("sha256")) if known else (None, None)
    try:
        found = files.read(path, _LIMIT, within=path.parent)
    except FileNotFoundError:
        if size is not None and size > len(kind.header):
            warnings.warn(f"{path} is missing, and with it the rows up to step {step:,}", stacklevel=4)
        return b""
    kept, rows, bad = _sift(found, kind, step)
    reason = f"holds {bad} lines that this program has not written" if bad else ""
    if size is not None:
        kept, sifted = found[:size], kept
        if hashlib.sha256(kept).hexdigest() != digest:
            kept, reason = sifted, f"is not what was written up to step {step:,}"
    elif sealed is not None and step == 0 and rows:
        reason = reason or "is of a run that has no checkpoint any more"
    if reason:
        aside = files.keep_aside(path, path.parent)
        goes_on = f"; the record goes on with its rows up to step {step:,} that can be read" if step else ""
        warnings.warn(f"{path} {reason}, and is kept as {aside.name}{goes_on}", stacklevel=4)
    return kept


def _sift(content, kind, step):
    """Returns (content up to a step, number of rows, number of lines that are no rows); a kill may cut the last one."""
    lines = content.split(b"\n")[:-1]
    if kind.header and lines:
        if lines[0] != kind.header[:-1].encode():
            return b"", 0, len(lines)
        del lines[0]
    kept, last, bad = [kind.header.encode()], -1, 0
    for line in lines:
        try:
            at = kind.step_of(line.decode())
            if at <= last:
                raise ValueError("steps ascend")
        except (ValueError, LookupError, TypeError, RecursionError):
            bad += 1
            continue
        last = at
        if at <= step:
            kept.append(line + b"\n")
    return b"".join(kept), len(lines) - bad, bad
