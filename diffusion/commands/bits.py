"""Measures how many bits per dimension a model needs for its data, for evaluate.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion import files, keys
from diffusion.commands import latents, samplers, students
from diffusion.commands.sources import Source
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.evaluation import bound, likelihood


def measure_bound(
    source: Source, out: Path, steps: Sequence[int], tau: str, load: Callable[[], tuple[Dataset, str]]
) -> None:
    """Prints and writes the variational bound of the data in bits per dimension, with each variance the model has.

    Args:
      source: the model.
      out: the folder that gets bound.json.
      steps: numbers of steps.
      tau: the grid, by name.
      load: returns the images and the name of their split.

    Raises:
      InputError: the model has no such bound, or the grid has its own number of steps.
    """
    # What to measure, on which grids.
    _check(source, "--bound")
    model, clip = source.trained.model, source.settings["clip"]
    if tau.partition(":")[0] in samplers.OWN_LENGTH:
        raise InputError(f"--bound gives the number of steps, and tau {tau} has its own; name a grid, as uniform")
    grids = [samplers.make_tau(model.schedule, tau, count) for count in steps]
    images, split = load()
    # A row for each variance and number of steps.
    print(f"{source.title()}: variational bound of {len(images.images):,} images of its data on {tau}, clip {clip}")
    rows = bound.bits_table(source.trained, images, keys.make(source.seed), grids=grids, clip=clip)
    print(f"{'variance':10} {'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for row in rows:
        print(f"{row.variance:10} {row.steps:5} {row.bits:19.4f} {row.standard_error:15.4f}")
    _write(source, out / "bound.json", images, rows, split=split, grid=tau, clip=clip)


def measure_likelihood(
    source: Source, out: Path, steps: Sequence[int], load: Callable[[], tuple[Dataset, str]]
) -> None:
    """Prints and writes the likelihood of the data in bits per dimension under the flow that DDIM discretizes.

    The arguments and errors are those of `measure_bound`, and the file is likelihood.json.
    """
    _check(source, "--likelihood")
    images, split = load()
    print(f"{source.title()}: likelihood of {len(images.images):,} images of its data under the probability flow")
    rows = likelihood.bits_table(source.trained, images, keys.make(source.seed), steps=steps)
    print(f"{'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for row in rows:
        print(f"{row.steps:5} {row.bits:19.4f} {row.standard_error:15.4f}")
    _write(source, out / "likelihood.json", images, rows, split=split)


def _check(source: Source, what: str) -> None:
    students.check_is_denoiser(source.trained.config, what)
    latents.check_pixels(source.trained.model, what)


def _write(source: Source, path: Path, images: Dataset, rows: Sequence[Any], **facts: Any) -> None:
    """Writes the rows to a JSON file, with everything that is needed to repeat them."""
    trained = source.trained
    record = {"run": source.name, "checkpoint_step": trained.step, "ema": trained.ema, "weights_sha256": source.sha256}
    record |= {"seed": source.seed, "num": len(images.images), **facts, "rows": [row._asdict() for row in rows]}
    files.make_folder(path.parent)
    files.remove_temporaries(path.parent, r"(bound|likelihood)\.json", path.parent)
    files.write_json(path, record, path.parent)
    print(f"wrote {path}")
