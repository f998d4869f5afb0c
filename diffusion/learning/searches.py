"""Writes the search for a table as JSON, and reads it, so that a search that was cut off goes on with the same bits."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.learning.least_squares import Fit
from diffusion.learning.tables import Search, Trial


def to_record(search: Search) -> dict[str, Any]:
    """Returns a search as what JSON can hold, every number to the last bit."""
    return {**search._asdict(), "trials": [_trial_record(trial) for trial in search.trials]}


def from_record(record: Mapping[str, Any]) -> Search:
    """Returns the search of a record; raises KeyError, TypeError or ValueError for anything else."""
    trials = tuple(_read_trial(trial) for trial in record["trials"])
    return Search(int(record["calls"]), tuple(record["groups"]), float(record["hand_made"]), trials)


def _trial_record(trial):
    fit = {**trial.fit._asdict(), "numbers": trial.fit.numbers.tolist(), "errors": trial.fit.errors.tolist()}
    if not np.isfinite(trial.fit.gain):  # before the first iteration; JSON has no infinity
        fit["gain"] = None
    return {**trial._asdict(), "fit": fit, "best": trial.best.tolist()}


def _read_trial(record):
    fit = dict(record["fit"])
    fit |= {name: np.asarray(fit[name], np.float64) for name in ("numbers", "errors")}
    fit["gain"] = np.inf if fit["gain"] is None else float(fit["gain"])
    return Trial(
        start=tuple(record["start"]),
        fit=Fit(**fit),
        best=np.asarray(record["best"], np.float64),
        best_loss=float(record["best_loss"]),
        losses=tuple((float(train), float(held)) for train, held in record["losses"]),
        stalled=int(record["stalled"]),
    )
