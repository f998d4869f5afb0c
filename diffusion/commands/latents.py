"""Opens the autoencoder that a latent model works with, and encodes its training set."""

from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion import spaces
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.commands.datasets import cache_folder
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.model import Model, Trained
from diffusion.training.autoencoders import load_autoencoder
from diffusion.training.latents import encoded
from diffusion.training.run_folder import RunFolder


def open_autoencoder(config: ConfigDict, folder: RunFolder, teacher: Trained | None) -> TrainedAutoencoder | None:
    """Returns the autoencoder of a run that trains in latents, or None for one that trains in pixels.

    A run keeps a copy of its autoencoder, and goes on with that wherever the original is; so the autoencoder may be
    trained further meanwhile.

    Args:
      config: the whole config.
      folder: of the run, new or not.
      teacher: of a student, whose latents are those of its teacher, as `students.complete` sees to.

    Raises:
      InputError: there is no such autoencoder, it is damaged, or the run cannot work with it.
    """
    if teacher is not None:
        return teacher.model.space.autoencoder
    if not config.latents:
        return None
    begin = folder.latest_step()
    if begin is not None and folder.metadata(begin)["config"]["latents"] == config.latents:
        return folder.load_autoencoder()
    try:
        return load_autoencoder(config.latents)
    except InputError as error:
        raise InputError(f"config.latents: {str(error).replace('--workdir', 'it')}") from None


def identity(autoencoder: TrainedAutoencoder | None) -> dict[str, Any]:
    """Returns what the record of a run says of its autoencoder, {} for none; a resumed run must have the same one."""
    if autoencoder is None:
        return {}
    return {"autoencoder": {"sha256": autoencoder.sha256, "step": autoencoder.step, "ema": autoencoder.ema}}


def examples(model: Model, dataset: Dataset, flip: bool) -> Dataset:
    """Returns the images as training reads them: for a latent model, the latents of each, which take a while to make.

    Raises:
      InputError: an image cannot be read.
    """
    autoencoder = model.space.autoencoder
    if autoencoder is None:
        return dataset
    folder, count = cache_folder("latents"), len(dataset.images)
    with tqdm(total=count, unit="image", desc="encoding", disable=None, leave=False) as bar:

        def progress(done, total):
            if not done and jax.process_index() == 0:
                print(f"encoding {total:,} images into {folder}, once for this autoencoder")
            bar.update(done - bar.n)

        made = encoded(
            dataset,
            lambda images: spaces.moments(autoencoder, images),
            autoencoder.sha256,
            folder,
            flip=flip,
            progress=progress,
        )
    return dataset._replace(images=made)


def check_pixels(model: Model, what: str) -> None:
    """Raises InputError for a latent model, as what is called `what` goes by 8-bit pixels or their bounds."""
    if model.space.autoencoder is not None:
        raise InputError(
            f"{what} is for models of pixels in [-1, 1], and this one works in the latents of an autoencoder, which "
            "have no bounds: leave it out"
        )
