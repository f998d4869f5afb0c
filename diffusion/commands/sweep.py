"""Plans a sweep over samplers, steps and etas, and keeps its rows in files."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from diffusion import sealed
from diffusion.commands import plots
from diffusion.commands.jobs import identity_of
from diffusion.commands.samplers import default_eta, is_file
from diffusion.errors import InputError
from diffusion.files import read, write_atomically


class Entry(NamedTuple):
    """Names one row of a sweep.

    Attributes:
      sampler: a name with its options, or the file of a table.
      steps: S; 0 for a file, whose table has its own grid.
      eta: None if the sampler has none, or sets it in its own options.
      guidance: the scale; None for that of the flags.
      added: what the flags add to the sampler, as "afs=score cache=2".
    """

    sampler: str
    steps: int
    eta: float | None
    guidance: float | None = None
    added: str = ""

    def label(self) -> str:
        """Returns what a table calls this row: the sampler, its eta, what is added, and the scale of the guidance."""
        parts = [self.sampler]
        parts += [] if self.eta is None else [f"eta={self.eta:g}"]
        parts += [self.added] if self.added else []
        parts += [] if self.guidance is None else [f"scale={self.guidance:g}"]
        return " ".join(parts)


def numbers(flag: str, texts: Sequence[str] | None, kind: Callable[[str], Any]) -> list[Any]:
    """Returns the numbers in the value of a flag, none if it is not given; raises InputError for anything else."""
    if texts is None:
        return []
    try:
        if texts:
            return [kind(text) for text in texts]
    except ValueError:
        pass
    example = "5,10,25" if kind is int else "0,0.5,1"
    raise InputError(f"{flag} is {','.join(texts)!r}; write numbers as {example}") from None


def plan(
    samplers: Sequence[str],
    steps: Sequence[int],
    etas: Sequence[float],
    scales: Sequence[float] = (),
    added: Mapping[str, str] = MappingProxyType({}),
) -> list[Entry]:
    """Returns every sampler with every number of steps, and with every eta unless it has none or sets its own.

    Each of these comes with every scale of the guidance, if any are given, and has what the flags add to all samplers.

    Raises:
      InputError: an entry comes twice, there are no entries, or etas are given and no sampler takes one.
    """
    if not samplers or not steps:
        raise InputError("the sweep names no sampler or no number of steps; write --samplers=ddim,unipc --steps=5,10")
    entries = []
    for sampler in samplers:
        default = default_eta(sampler)
        for eta in [None] if default is None else etas or [default]:
            entries += [Entry(sampler, count, eta) for count in ([0] if is_file(sampler) else steps)]
    words = " ".join(f"{name}={value}" for name, value in added.items())
    entries = [entry._replace(guidance=scale, added=words) for entry in entries for scale in scales or [None]]
    if etas and all(entry.eta is None for entry in entries):
        raise InputError(f"etas are given, but none of {', '.join(samplers)} takes one; leave them out")
    if len(set(entries)) < len(entries):
        raise InputError("the sweep names a sampler, a number of steps, an eta or a scale twice")
    return entries


_ROW = {"identity": str, "metrics": dict, "record": dict}

_COLUMNS = ("run", "checkpoint_step", "ema", "sampler", "eta", "grid", "steps", "nfe", "clip", "dynamic_threshold")
_COLUMNS += ("guidance_scale", "guidance_interval", "guidance_rescale", "guidance_rule", "guidance_model_sha256")
_COLUMNS += ("afs", "corrector", "noise", "cache", "labels", "features", "split", "num", "seed")


ROWS_LIMIT = 2**24
"""The most bytes of such a JSON file: a row has a few thousand, and reading takes up to ten times the memory."""


class Results:
    """Keeps rows in a JSON file, and as a table in a CSV file beside it; each is on disk as soon as it is added.

    The table follows from the JSON file, and is written again where it does not. Only one process may write to a
    folder at a time, see `files.locked`.

    Args:
      folder: an existing folder; rows found there are kept.
      name: of both files.
      columns: the entries of a record that the table shows.

    Raises:
      InputError: that file is damaged.
    """

    def __init__(self, folder: Path, name: str = "evaluation", columns: Sequence[str] = _COLUMNS):
        self._folder, self._columns = folder, columns
        self._json, self._table = folder / f"{name}.json", folder / f"{name}.csv"
        self.rows: list[dict[str, Any]] = _read_rows(self._json, folder) if self._json.exists() else []
        if self.rows and not self._has_table():
            self._write_table()

    def figures(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Returns the figures that are known of the same samples, by name."""
        row = self._find(record)
        return dict(row["metrics"]) if row else {}

    def _find(self, record):
        """Returns the row of the same samples, or None; how the paths of files are spelled makes no difference."""
        identity = identity_of(record)
        return next((row for row in self.rows if identity_of(row["record"]) == identity), None)

    def add(
        self,
        record: Mapping[str, Any],
        values: Mapping[str, float],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Appends a row, or adds to the row of the same samples; returns it.

        Args:
          record: everything that determines the samples.
          values: the figures by name.
          facts: how the measurement went, such as seconds and versions.
        """
        # The row of the same samples, or a new one.
        row = self._find(record)
        if row is None:
            row = {"identity": identity_of(record)[:16], "metrics": {}, "record": dict(record)}
            self.rows.append(row)
        # What is new goes into it, and both files are written again.
        row["metrics"].update(values)
        row.update(facts)
        sealed.write(self._json, {"rows": self.rows}, self._folder)
        self._write_table()
        return row

    def _has_table(self):
        """Says whether the table on disk is what follows from the rows."""
        wanted = self._csv().encode()
        try:
            return read(self._table, len(wanted), self._folder) == wanted
        except (OSError, InputError):
            return False

    def _write_table(self):
        write_atomically(self._table, self._csv().encode(), self._folder)

    def _csv(self):
        """Returns the rows as a table; a cell stays empty where a row has no such figure."""
        metrics = list(dict.fromkeys(name for row in self.rows for name in row["metrics"]))
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*self._columns, *metrics, "seconds", "identity"])
        for row in self.rows:
            facts = [row["record"].get(name, "") for name in self._columns]
            values = [row["metrics"].get(name, "") for name in metrics]
            writer.writerow([*facts, *values, row.get("seconds", ""), row["identity"]])
        return buffer.getvalue()


def _read_rows(path, folder):
    """Returns the rows of a JSON file; raises InputError unless they are what `Results.add` writes."""
    try:
        rows = sealed.read(path, ROWS_LIMIT, folder)["rows"]
        if not all(isinstance(row[name], kind) for row in rows for name, kind in _ROW.items()):
            raise TypeError
        values = [value for row in rows for value in row["metrics"].values()]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise TypeError
        return list(rows)
    except (InputError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; delete it, or name another folder with --out") from None


class Row(NamedTuple):
    """What was measured for an entry: its steps and network calls, and the value of each figure."""

    entry: Entry
    steps: int
    calls: int
    values: Sequence[float]

    def line(self, width: int) -> str:
        """Returns the row as a line of the printed table, whose labels take so many characters."""
        return f"{self.entry.label():{width}} {self.steps:5} {self.calls:5} " + " ".join(
            f"{x:18.4f}" for x in self.values
        )


def head(figures: Sequence[str], width: int) -> str:
    """Returns the first line of the printed table, for the lines of `Row.line`."""
    return f"{'sampler':{width}} {'steps':>5} {'calls':>5} " + " ".join(f"{figure:>18}" for figure in figures)


def plot(path: Path, title: str, rows: Sequence[Row], figures: Sequence[str]) -> None:
    """Plots figures against the scale of the guidance where that was swept, or else the first against network calls.

    Args:
      path: of the PNG file.
      title: above the plot.
      rows: what was measured.
      figures: the names of the values in each row, as `features.figure_names` has them.
    """
    if rows[0].entry.guidance is None:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            series.setdefault(row.entry.label(), []).append((row.calls, row.values[0]))
        plots.curves(path, series, xlabel="network calls", ylabel=plots.long_name(figures[0]), title=title)
        return
    panels = {figure: {} for figure in figures if not figure.endswith("_std")}
    for row in rows:
        label = f"{row.entry._replace(guidance=None).label()}, {row.calls} calls"
        for figure, value in zip(figures, row.values, strict=True):
            if figure in panels:
                panels[figure].setdefault(label, []).append((row.entry.guidance, value))
    plots.panels(path, panels, xlabel="guidance scale", title=title)
