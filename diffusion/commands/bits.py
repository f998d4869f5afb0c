"""Measures how many bits per dimension a model needs for its data, for evaluate.py."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion import files, keys, sealed
from diffusion.commands import latents, samplers, students
from diffusion.commands.sources import Source
from diffusion.data import Dataset, fingerprint
from diffusion.errors import InputError, nearest
from diffusion.evaluation import bound, likelihood


def measure_bound(
    source: Source,
    out: Path,
    steps: Sequence[int],
    tau: str,
    load: Callable[[], tuple[Dataset, str]],
    batch_size: int,
    variances: Sequence[str] | None = None,
) -> None:
    """Prints and writes the variational bound of the data in bits per dimension, with each variance asked for.

    Args:
      source: the model.
      out: the folder that gets bound.json.
      steps: numbers of steps.
      tau: the grid, by name.
      load: returns the images and the name of their split.
      batch_size: images at a time; affects only memory.
      variances: as `bound.variational_bound` takes them; None for those that the model can be sampled with.

    Raises:
      InputError: the model has no such bound, or the grid has its own number of steps.
    """
    # What to measure, on which grids.
    _check(source, "--bound")
    model, clip = source.trained.model, source.settings["clip"]
    variances = _variances(model, variances)
    if tau.partition(":")[0] in samplers.OWN_LENGTH:
        raise InputError(f"--bound gives the number of steps, and tau {tau} has its own; name a grid, as uniform")
    grids = [samplers.make_tau(model.schedule, tau, count) for count in steps]
    images, split = load()
    rows = Rows(out / "bound.json", source, images, {"split": split, "grid": tau, "clip": clip})
    # A row for each variance and number of steps.
    print(f"{source.title()}: variational bound of {len(images.images):,} images of its data on {tau}, clip {clip}")
    print(f"{'variance':15} {'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for variance in variances:
        for grid in grids:
            asked = {"grids": [grid], "variances": [variance], "clip": clip, "batch_size": batch_size}
            row = rows.get(
                {"variance": variance, "steps": len(grid) - 1, "times": [float(t) for t in grid[:-1]]},
                lambda asked=asked: bound.bits_table(source.trained, images, keys.make(source.seed), **asked)[0],
            )
            print(f"{variance:15} {row['steps']:5} {row['bits']:19.4f} {row['standard_error']:15.4f}", flush=True)
    print(f"wrote {rows.path}")


def _variances(model, asked):
    """Returns the variances that are measured; raises InputError for one that the model has not."""
    if asked is None:
        return bound.variances_of(model)
    if not asked or len(set(asked)) < len(asked):
        raise InputError(f"variances is {','.join(asked)!r}; name each once, as small,large_published")
    for variance in asked:
        if variance not in bound.BOUND_VARIANCES:
            raise InputError(f"variances has {variance!r}; {nearest(variance, bound.BOUND_VARIANCES)}")
        if variance == "learned" and not model.learned_variance:
            raise InputError("variances has learned, and the model predicts none; train with objective=hybrid")
    return tuple(asked)


def measure_likelihood(
    source: Source, out: Path, steps: Sequence[int], load: Callable[[], tuple[Dataset, str]], batch_size: int
) -> None:
    """Prints and writes the likelihood of the data in bits per dimension under the flow that DDIM discretizes.

    The arguments and errors are those of `measure_bound`, and the file is likelihood.json.
    """
    _check(source, "--likelihood")
    likelihood.check_steps(source.trained.model.schedule, steps)
    images, split = load()
    rows = Rows(out / "likelihood.json", source, images, {"split": split})
    key = keys.make(source.seed)
    print(f"{source.title()}: likelihood of {len(images.images):,} images of its data under the probability flow")
    print(f"{'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for count in steps:
        row = rows.get(
            {"steps": count},
            lambda count=count: likelihood.bits_table(
                source.trained, images, key, steps=[count], batch_size=batch_size
            )[0],
        )
        print(f"{row['steps']:5} {row['bits']:19.4f} {row['standard_error']:15.4f}", flush=True)
    print(f"wrote {rows.path}")


def _check(source: Source, what: str) -> None:
    students.check_is_denoiser(source.trained.config, what)
    latents.check_pixels(source.trained.model, what)


class Rows:
    """Keeps rows in a JSON file with all that is needed to repeat them; each is on disk as soon as it is measured.

    Rows that are there of the same model and images are not measured again.
    """

    def __init__(self, path: Path, source: Source, images: Dataset, facts: Mapping[str, Any]):
        trained = source.trained
        self.path = path
        self._facts = {
            "run": source.name,
            "checkpoint_step": trained.step,
            "ema": trained.ema,
            "weights_sha256": source.sha256,
            "seed": source.seed,
            "num": len(images.images),
            "data": fingerprint(images),
            **facts,
        }
        self._rows: list[dict[str, Any]] = []
        files.make_folder(path.parent)
        files.remove_temporaries(path.parent, r"(bound|likelihood)\.json", path.parent)
        try:
            found = sealed.read(path, within=path.parent)
            known = [{name: math.nan if x is None else x for name, x in row.items()} for row in found.pop("rows")]
        except (
            InputError,
            OSError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # not there, damaged, or of an earlier version
            return
        if {**found, "run": source.name} == self._facts:
            self._rows = known

    def get(self, asked: Mapping[str, Any], measure: Callable[[], NamedTuple]) -> dict[str, Any]:
        """Returns the row with these entries, which is measured and written unless it is there."""
        for row in self._rows:
            if all(row.get(name) == value for name, value in asked.items()):
                return row
        row = json.loads(json.dumps(measure()._asdict()))
        self._rows.append(row)
        sealed.write(self.path, {**self._facts, "rows": self._rows}, self.path.parent)
        return row
