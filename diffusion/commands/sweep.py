"""A sweep over samplers, steps and etas: which rows it has, and the files that keep them."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.commands.samplers import default_eta, is_file
from diffusion.errors import InputError
from diffusion.files import write_atomically, write_json


class Entry(NamedTuple):
    """One sampler on S = steps steps; eta is None where the sampler has none, or names its own in its options."""

    sampler: str
    steps: int
    eta: float | None

    def label(self) -> str:
        """What a curve over steps is called: the sampler and its eta."""
        return self.sampler if self.eta is None else f"{self.sampler} eta={self.eta:g}"


def plan(samplers: Sequence[str], steps: Sequence[int], etas: Sequence[float]) -> list[Entry]:
    """Every sampler with every number of steps, and with every eta if it has that option and does not name its own.

    Raises:
      InputError: an entry comes twice, there is none, or etas are given and no sampler takes one.
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
_COLUMNS += ("guidance_scale", "labels", "features", "split", "num", "seed")


class Results:
    """Rows in evaluation.json, and as a table in evaluation.csv. Each row is on disk as soon as it is added.

    For one process at a time, see `files.locked`.

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
        """The row of the same samples where all of these have been measured, or None."""
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
          record: what determines the samples.
          metrics: names of what was measured.
          values: what came out; a metric can yield several.
          facts: how the run went, as seconds and versions.
        """
        identity = _identity(record)
        row = next((row for row in self.rows if row["identity"] == identity), None)
        if row is None:
            row = {"identity": identity, "measured": [], "metrics": {}, "record": dict(record)}
            self.rows.append(row)
        row["measured"] = sorted({*row["measured"], *metrics})
        row["metrics"].update(values)
        row.update(facts)
        write_json(self._folder / "evaluation.json", {"rows": self.rows})
        write_atomically(self._folder / "evaluation.csv", self._csv().encode())
        return row

    def _csv(self):
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
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
