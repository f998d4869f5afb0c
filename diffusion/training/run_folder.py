"""The run folder: what is where, and what a resumed run may change."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import files, keys
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.errors import InputError, nearest
from diffusion.model import Trained, check_finite
from diffusion.objectives import choice
from diffusion.pretrained import autoencoders, weights
from diffusion.records import config_from_record, from_record
from diffusion.training import checkpoints, environment, saving
from diffusion.training.state import ema_name

# Fields that do not change what is being trained, so a resumed run may have other values.
_FREE = (
    "config.teacher",  # the record holds the digest of its parameters
    "config.latents",  # and that of the autoencoder's
    "config.train.num_steps",
    "config.train.log_every",
    "config.train.save_every",
    "config.train.grid_every",
    "config.train.keep",
    "config.train.keep_best",
    "config.train.microbatches",
    "config.train.fsdp",
    "config.model.remat",
    "config.transformer.remat",
    "config.data.path",
    "config.data.labels",  # class_names and the fingerprint hold what it decides
    "config.data.max_memory",
    "config.data.max_decoded",
    "config.data.workers",
    "config.sample.",
)


_WRITTEN = r"(config|environment|latents)\.json|(metrics|speed)\.csv|skipped\.jsonl|loss\.png|autoencoder\.safetensors"
"""The files of a run that are written whole, as a regular expression."""


class RunFolder:
    """Paths of one run.

    Attributes:
      path: the folder itself.
      checkpoints: one sub-folder for each saved step.
      config: config.json, the config of the newest start; what the program reads is the copy in each checkpoint.
      autoencoder: autoencoder.safetensors, the copy that a latent model keeps of its autoencoder.
      environment: environment.json, versions and machine of every start.
      grids: sheets of samples drawn in training.
      profile: where --profile writes its trace.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.autoencoder = self.path / f"autoencoder{weights.SUFFIX}"
        self.environment = self.path / "environment.json"
        self.grids = self.path / "grids"
        self.profile = self.path / "profile"

    def latest_step(self) -> int | None:
        """Returns the newest checkpoint whose files are as they were written, or None; names damaged ones on stderr.

        Raises:
          InputError: all are damaged.
        """
        return checkpoints.newest_good(self.checkpoints)

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint, with the config in today's form."""
        saved = checkpoints.metadata(self.checkpoints, step)
        config = config_from_record(saved, f"checkpoint {self.checkpoints / str(step)}")
        return {**saved, "config": config.to_dict()}

    def sheet(self, step: int) -> Path:
        """Returns where the sheet of samples drawn after a step lies."""
        return self.grids / f"step_{step:08d}.png"

    def locked(self) -> contextlib.AbstractContextManager[files.Lock]:
        """Makes the folder and keeps other processes from training in it, see `files.locked`.

        Raises:
          InputError: also if checkpoints could not be read there.
        """
        checkpoints.require_plain_path(self.path)
        return files.locked(self.path, "training in")

    def clear(self) -> None:
        """Removes what killed starts left, also that of a run that has come to its end; the caller must hold the lock.

        Raises:
          InputError: a part of the folder that is written to is a link.
        """
        for folder in (self.checkpoints, self.grids, self.profile / "plugins" / "profile"):
            files.refuse_links(folder, self.path)
        files.remove_temporaries(self.path, _WRITTEN, self.path)
        files.remove_temporaries(self.grids, r"step_\d+\.png", self.path)
        saving.remove_unfinished(self.checkpoints)

    def load_autoencoder(self) -> TrainedAutoencoder:
        """Returns the autoencoder in whose latents the run's model works.

        Raises:
          InputError: it is gone or damaged.
        """
        if not self.autoencoder.exists():
            raise InputError(
                f"{self.autoencoder} is gone, the autoencoder of this latent model; put it back, or write it again: "
                f"`python convert.py --workdir=AUTOENCODER --out={self.autoencoder}`"
            )
        return autoencoders.load(self.autoencoder)

    def create(self, config: ConfigDict, start: dict[str, Any], autoencoder: TrainedAutoencoder | None = None) -> None:
        """Clears away what killed starts left, writes config.json, and adds this start to environment.json.

        The caller must hold the lock. A latent model gets a copy of its autoencoder.
        """
        self.clear()
        files.make_folder(self.grids, self.path)
        if autoencoder is not None and not self.autoencoder.exists():
            files.refuse_links(self.autoencoder, self.path)
            autoencoders.save(self.autoencoder, autoencoder)
        environment.append(self.environment, start, within=self.path)
        files.write_atomically(self.config, (config.to_json(indent=2, sort_keys=True) + "\n").encode(), self.path)


def newest(root: str | os.PathLike) -> RunFolder | None:
    """Returns the run below root whose last checkpoint was written last; None if there is none."""
    runs = [RunFolder(path) for path in Path(root).glob("*")]
    runs = [run for run in runs if checkpoints.steps(run.checkpoints)]
    return max(runs, key=lambda run: checkpoints.newest_commit(run.checkpoints), default=None)


def existing(path: str | os.PathLike) -> RunFolder:
    """Returns the run in a folder.

    Raises:
      InputError: it holds no checkpoint.
    """
    folder = RunFolder(path)
    if not checkpoints.steps(folder.checkpoints):
        runs = [str(run) for run in folder.path.parent.glob("*") if run.is_dir()] if not folder.path.exists() else []
        guess = nearest(str(path), runs).partition("valid:")[0]
        raise InputError(
            f"{path} holds no checkpoint; {guess}--workdir names a run folder such as runs/digits, a folder of "
            "diffusers, which has model_index.json or the config.json of a network, or a model of the Hugging Face "
            "Hub, as google/ddpm-cifar10-32"
        )
    return folder


def load_trained(
    folder: RunFolder,
    ema: str = "",
    step: int | None = None,
    networks: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Trained:
    """Reads the model of a run from a checkpoint.

    Args:
      folder: the run.
      ema: which of its EMAs, by decay; "" is the first.
      step: which checkpoint; None is the newest good one.
      networks: see `make_model`.

    Raises:
      InputError: it is damaged, or does not fit its own config; there is no such step or EMA.
    """
    with checkpoints.opened(folder.checkpoints, step) as found:
        return _load(folder, found, ema, networks)


def _load(folder, step, ema, networks):
    if step is None:
        raise InputError(f"{folder.path} holds no checkpoint; --workdir names a run folder such as runs/digits")
    where = f"checkpoint {folder.checkpoints / str(step)}"
    saved = checkpoints.metadata(folder.checkpoints, step)
    autoencoder = folder.load_autoencoder() if config_from_record(saved, where).latents else None
    config, model = from_record(saved, where, networks, autoencoder)
    names = [ema_name(decay) for decay in config.train.ema_decays]
    if not names or (ema and ema not in names):
        raise InputError(f"{folder.path} has no EMA of {ema}; {nearest(ema, names)}")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(model.init, keys.make(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    ema = ema or names[0]
    params = checkpoints.load_ema(folder.checkpoints, step, ema, like)
    check_finite(params, where)
    return Trained(model, params, config, step, ema)


def check_resumable(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: RunFolder, defaults: Mapping[str, Any] | None = None
) -> None:
    """Refuses to resume a checkpoint that was trained otherwise than the run about to resume it.

    Args:
      saved, wanted: the metadata of the checkpoint, and of the run.
      folder: the run's folder, for the error.
      defaults: the values of fields that did not exist when the checkpoint was saved.

    Raises:
      InputError: they would train different things; the fields are named.
    """
    old, new = dict(_flatten(defaults or {})) | dict(_flatten(saved)), dict(_flatten(wanted))
    # A decay to 0 at the end shapes the learning rate of each step, and some objectives go by the share that is done.
    decays = old.get("config.optimizer.decay") in ("cosine", "linear")
    shaped = decays or choice.goes_by_share(old.get("config.train.objective"))
    different = [
        _difference(field, new.get(field, "missing"), old.get(field, "missing"))
        for field in sorted(old | new)
        if old.get(field) != new.get(field)
        and (not field.startswith(_FREE) or (shaped and field == "config.train.num_steps"))
    ]
    if different:
        raise InputError(
            f"{folder.path} is another run: {'; '.join(different)}. Name another folder with --workdir, or give the "
            f"fields their old values{' (the length shapes every step of this run)' if shaped else ''}"
        )


def _difference(field, new, old):
    """Says how a field differs; a digest says nothing to people."""
    if all(re.fullmatch(r"[0-9a-f]{64}", str(value)) for value in (new, old)):
        return f"{field} differs (by its SHA-256)"
    return f"{field} is {new!r}, the run has {old!r}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value  # JSON has lists for tuples
