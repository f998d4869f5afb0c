"""Writes the search for a table as JSON, and reads it, so that a search that was cut off goes on with the same bits."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.learning import starts
from diffusion.learning.least_squares import MAX_STEP, Fit
from diffusion.learning.tables import MAX_ITERATIONS, Bed, Search, Trial, family_of


def to_record(search: Search) -> dict[str, Any]:
    """Returns a search as what JSON can hold, every number to the last bit."""
    return {**search._asdict(), "trials": [_trial_record(trial) for trial in search.trials]}


def from_record(record: Mapping[str, Any]) -> Search:
    """Returns the search of a record; raises KeyError, TypeError or ValueError for anything else."""
    trials = tuple(_read_trial(trial) for trial in record["trials"])
    return Search(int(record["calls"]), tuple(record["groups"]), float(record["hand_made"]), trials)


def check(search: Search, bed: Bed, calls: int, groups: tuple[str, ...]) -> None:
    """Raises ValueError or InputError unless a search is one for this bed: a record can be a stranger's."""
    known = {(solver, grid) for solver, grid, _ in starts.hand_made(bed.schedule, calls)}
    if (search.calls, search.groups) != (calls, groups) or not search.trials or not np.isfinite(search.hand_made):
        raise ValueError("a search for another table")
    for trial in search.trials:
        if trial.start not in known or not trial.losses:
            raise ValueError("a trial that begins at no hand-made sampler")
        size = (family_of(bed, calls, groups, trial.start).size,)
        if not trial.fit.numbers.shape == trial.best.shape == size or trial.fit.errors.shape != (bed.count,):
            raise ValueError("a trial of another size")
        if not np.isfinite([trial.best_loss, trial.fit.damping]).all():
            raise ValueError("a trial that is not finite")
        # All numbers begin at 0, and each iteration moves them by MAX_STEP at most.
        if not np.all(np.abs([trial.fit.numbers, trial.best]) <= MAX_ITERATIONS * MAX_STEP):
            raise ValueError("a trial that is too far from its start")
        for numbers in (trial.fit.numbers, trial.best):
            family_of(bed, calls, groups, trial.start).history(numbers)


def _trial_record(trial):
    fit = {**trial.fit._asdict(), "numbers": trial.fit.numbers.tolist(), "errors": trial.fit.errors.tolist()}
    return {**trial._asdict(), "fit": fit, "best": trial.best.tolist()}


def _number(value):
    """Reads a float; JSON has no infinity, and so a null is one: a gain not yet known, the loss of what diverged."""
    return np.inf if value is None else float(value)


def _read_trial(record):
    fit = dict(record["fit"])
    fit |= {name: np.asarray(fit[name], np.float64) for name in ("numbers", "errors")}
    fit |= {name: _number(fit[name]) for name in ("objective", "damping", "gain")}
    return Trial(
        start=tuple(record["start"]),
        fit=Fit(**fit),
        best=np.asarray(record["best"], np.float64),
        best_loss=float(record["best_loss"]),
        losses=tuple((_number(train), _number(held)) for train, held in record["losses"]),
        stalled=int(record["stalled"]),
    )
