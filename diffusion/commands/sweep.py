"""Plans a sweep over samplers, steps and etas, and keeps its rows in files."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion import keys
from diffusion.commands.samplers import default_eta, is_file
from diffusion.errors import InputError
from diffusion.files import write_atomically, write_json


class Entry(NamedTuple):
    """Names one row of a sweep.

    Attributes:
      sampler: a name with its options, or the file of a table.
      steps: S; 0 for a file, whose table has its own grid.
      eta: None if the sampler has none, or sets it in its own options.
    """

    sampler: str
    steps: int
    eta: float | None

    def label(self) -> str:
        """Returns what the curve of this row is called in a plot: the sampler and its eta."""
        return self.sampler if self.eta is None else f"{self.sampler} eta={self.eta:g}"


def plan(samplers: Sequence[str], steps: Sequence[int], etas: Sequence[float]) -> list[Entry]:
    """Returns every sampler with every number of steps, and with every eta unless it has none or sets its own.

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
    if etas and all(entry.eta is None for entry in entries):
        raise InputError(f"etas are given, but none of {', '.join(samplers)} takes one; leave them out")
    if len(set(entries)) < len(entries):
        raise InputError("the sweep names a sampler, a number of steps or an eta twice")
    return entries


_ROW = ("identity", "measured", "metrics", "record")
_COLUMNS = ("run", "checkpoint_step", "ema", "sampler", "eta", "grid", "steps", "nfe", "clip", "dynamic_threshold")
_COLUMNS += ("guidance_scale", "guidance_interval", "guidance_rescale", "guidance_rule", "guidance_model_sha256")
_COLUMNS += ("labels", "features", "split", "num", "seed")


class Results:
    """Keeps rows in evaluation.json, and as a table in evaluation.csv; each is on disk as soon as it is added.

    Only one process may write to a folder at a time, see `files.locked`.

    Args:
      folder: an existing folder; rows found in its evaluation.json are kept.

    Raises:
      InputError: that file is damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        path = folder / "evaluation.json"
        try:
            self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
            if not all(set(_ROW) <= set(row) for row in self.rows):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged; delete it, or name another folder with --out") from None

    def find(self, record: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any] | None:
        """Returns the row of the same samples if all of these metrics are in it, else None."""
        identity = _identity(record)
        for row in self.rows:
            if row["identity"] == identity and set(metrics) <= set(row["measured"]):
                return row
        return None

    def add(
        self,
        record: Mapping[str, Any],
        metrics: Sequence[str],
        values: Mapping[str, float],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Appends a row, or adds to the row of the same samples; returns it.

        Args:
          record: everything that determines the samples.
          metrics: names of what was measured.
          values: the figures by name; one metric can yield several.
          facts: how the measurement went, such as seconds and versions.
        """
        # The row of the same samples, or a new one.
        identity = _identity(record)
        row = next((row for row in self.rows if row["identity"] == identity), None)
        if row is None:
            row = {"identity": identity, "measured": [], "metrics": {}, "record": dict(record)}
            self.rows.append(row)
        # What is new goes into it, and both files are written again.
        row["measured"] = sorted({*row["measured"], *metrics})
        row["metrics"].update(values)
        row.update(facts)
        write_json(self._folder / "evaluation.json", {"rows": self.rows})
        write_atomically(self._folder / "evaluation.csv", self._csv().encode())
        return row

    def _csv(self):
        """Returns the rows as a table; a cell stays empty where a row has no such figure."""
        metrics = list(dict.fromkeys(name for row in self.rows for name in row["metrics"]))
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*_COLUMNS, *metrics, "seconds", "identity"])
        for row in self.rows:
            facts = [row["record"].get(name, "") for name in _COLUMNS]
            values = [row["metrics"].get(name, "") for name in metrics]
            writer.writerow([*facts, *values, row.get("seconds", ""), row["identity"]])
        return buffer.getvalue()


def _identity(record):
    """Returns 16 hex digits that are the same for equal records."""
    # Rows of earlier versions, which had the same generator, do not name it.
    if record.get("generator") == keys.GENERATOR:
        record = {name: value for name, value in record.items() if name != "generator"}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
