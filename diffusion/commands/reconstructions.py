"""What evaluate.py does with an autoencoder: it measures how near reconstructions come to their originals."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from diffusion import data, files, pretrained
from diffusion.autoencoder import TrainedAutoencoder, code_numbers
from diffusion.commands import autoencoders, datasets, opening, sweep
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.evaluation import features
from diffusion.evaluation.reconstruction import psnr, ssim
from diffusion.evaluation.spaces import FeatureSpace
from diffusion.images import to_floats, write_png
from diffusion.interop import diffusers
from diffusion.objectives import choice
from diffusion.pretrained import weights
from diffusion.training import checkpoints, environment, run_folder
from diffusion.training.autoencoders import load_autoencoder

NAME = "reconstruction"
"""What the files are called: reconstruction.json, .csv and .png."""

SHOWN = 32
"""Images in the picture."""

_COLUMNS = ("run", "checkpoint_step", "ema", "weights_sha256", "split", "num", "features")


class Source(NamedTuple):
    """An autoencoder to measure.

    Attributes:
      name: the run folder or file, for people.
      home: where files about it go by default.
      trained: the autoencoder.
    """

    name: str
    home: Path
    trained: TrainedAutoencoder


def open_autoencoder(workdir: str | None, ema: str) -> Source | None:
    """Returns the autoencoder that --workdir names, or None if it names something else.

    The latents of a run's checkpoint that nobody has measured are measured now.

    Args:
      workdir: as the flag has it; None for the newest run.
      ema: which average of the parameters; "" for the first.

    Raises:
      InputError: it is damaged.
    """
    if workdir and workdir.endswith(weights.SUFFIX):
        if not _names_autoencoder(weights.describe(workdir)["config"]):
            return None
        return Source(workdir, opening.home_of(workdir), load_autoencoder(workdir, ema))
    if workdir and pretrained.name_of(workdir):
        return None
    if workdir and diffusers.is_folder(workdir):
        if not diffusers.is_autoencoder(workdir):
            return None
        return Source(workdir, opening.home_of(workdir), load_autoencoder(workdir, ema))
    folder = run_folder.existing(workdir) if workdir else run_folder.newest("runs")
    if folder is None or not is_autoencoder(folder):
        return None
    with checkpoints.opened(folder.checkpoints) as step:
        autoencoders.measure_latents(folder, None, step, ema)
        return Source(str(folder.path), folder.path, load_autoencoder(folder.path, ema, step))


def is_autoencoder(folder: run_folder.RunFolder) -> bool:
    """Tells whether a run trains an autoencoder; a run whose newest checkpoint cannot be read counts as none.

    Whoever opens the run finds out whether its files are as they were written, and says so.
    """
    try:
        return _names_autoencoder(folder.metadata(checkpoints.steps(folder.checkpoints)[-1])["config"])
    except (InputError, IndexError):
        return False


def _names_autoencoder(config):
    """Tells whether a config, which may come from anybody, names the objective of an autoencoder."""
    section = config.get("train")
    return isinstance(section, dict) and choice.is_autoencoder(section.get("objective"))


def measure(source: Source, real: Dataset, split: str, space: FeatureSpace | None, out: Path, batch_size: int) -> None:
    """Prints and writes how near the reconstructions of images come to them, with a picture of some of each.

    Args:
      source: the autoencoder.
      real: the images.
      split: which part of the data they are.
      space: in which the distance of both sets is measured, or None.
      out: the folder for the files.
      batch_size: images at a time.

    Raises:
      InputError: images of another size or number of channels, or a file that cannot be read or written.
    """
    name, _, trained = source
    shape = tuple(real.images.shape[1:])
    if shape != trained.autoencoder.image_shape:
        raise InputError(f"images have shape {shape}; {name} was trained on {trained.autoencoder.image_shape}")
    with files.locked(out, "measuring into", ".evaluation.lock"):
        files.remove_temporaries(out, rf"{NAME}\.(json|csv|png)", out)
        results = sweep.Results(out, NAME, _COLUMNS)
        print(f"{name}, step {trained.step:,}: {len(real.images):,} images, latents {trained.autoencoder.latent_shape}")
        start = time.perf_counter()
        figures, given_back = _figures(trained, real, space, batch_size)
        for figure, value in figures.items():
            print(f"{figure:24} {value:10.4f}")
        record = {"run": name, "checkpoint_step": trained.step, "ema": trained.ema, "weights_sha256": trained.sha256}
        record |= {"split": split, "num": len(real.images), "data": data.fingerprint(real)}
        record |= {"features": "" if space is None else space.name, "space": "" if space is None else space.key}
        facts = {"seconds": round(time.perf_counter() - start, 3), "config": trained.config.to_dict()}
        results.add(record, figures, {**facts, "versions": environment.versions()})
        shown = np.linspace(0, len(real.images) - 1, min(SHOWN, len(real.images))).astype(int)
        picture = autoencoders.comparison(np.asarray(real.images[shown]), given_back[shown])
        write_png(out / f"{NAME}.png", picture, within=out)
    print(f"wrote {NAME}.csv, {NAME}.json and {NAME}.png in {out}")


def _figures(trained, real, space, batch_size):
    """Returns the figures of the reconstructions by name, and these."""
    ratios, similarities, parts, codes = [], [], [], []
    with tqdm(total=len(real.images), unit="image", leave=False, disable=None) as progress:
        for start in range(0, len(real.images), batch_size):
            images = np.asarray(real.images[np.arange(start, min(start + batch_size, len(real.images)))])
            parts.append(np.concatenate(list(autoencoders.reconstructions(trained, images, batch_size))))
            ratios.append(psnr(images, parts[-1]))
            similarities.append(ssim(images, parts[-1]))
            if "quantizer" in trained.params:
                codes.append(np.asarray(code_numbers(trained.autoencoder, trained.params, to_floats(images))).ravel())
            progress.update(len(images))
    given_back = np.concatenate(parts)
    # A reconstruction without any error would have a ratio of infinity, which no mean survives.
    figures = {"psnr": float(np.minimum(np.concatenate(ratios), 100).mean())}
    figures["ssim"] = float(np.concatenate(similarities).mean())
    if codes:
        entries = len(trained.params["quantizer"]["embedding"])
        share = np.bincount(np.concatenate(codes), minlength=entries) / sum(map(len, codes))
        figures["codes_in_use"] = float((share > 0).mean())
        figures["codes_perplexity"] = float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
    if space is not None:
        reference = features.make_reference(space, real, datasets.cache_folder())
        figures |= features.measure(reference, space.extract(given_back), ["frechet"])
    return figures, given_back
