"""Fetches models from the Hugging Face Hub, by the package huggingface_hub, with its cache and its token."""

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from diffusion.errors import InputError

_ID = re.compile(r"(?P<model>(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

_OWN = "runs"
"""The folder of runs; nobody's models are looked for under this name."""


def is_id(name: str | os.PathLike) -> bool:
    """Tells whether a name is the id of a model on the Hub, as google/ddpm-cifar10-32, by its form and the disk only.

    A revision may follow, as google/ddpm-cifar10-32@main. What is on the disk, or would be in a folder that is there,
    is no id.
    """
    found = _ID.fullmatch(os.fspath(name))
    if found is None or os.fspath(name).endswith(".safetensors") or found["owner"] == _OWN:
        return False
    return not Path(name).exists() and not Path(found["owner"]).exists()


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Returns the folder of a model of the Hub with its files of these names, which are fetched if they are not there.

    Without a network it is the folder as an earlier call left it.

    Args:
      name: its id, see `is_id`.
      patterns: of names, as of fnmatch; a model need not have any of them.

    Raises:
      InputError: there is no such model, it cannot be reached and is not in the cache, or the package is missing.
    """
    found = _ID.fullmatch(name)
    try:
        hub, errors = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.errors"))
    except ImportError:
        raise InputError(
            f"there is no folder {name}; as a model of the Hugging Face Hub it needs the package huggingface_hub: run "
            "`pip install 'jax-fast-diffusion[hub]'`, or download it elsewhere and name its folder"
        ) from None
    try:
        return Path(hub.snapshot_download(found["model"], revision=found["revision"], allow_patterns=list(patterns)))
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{name} is no folder here, and the Hugging Face Hub cannot be reached; its cache lacks this model, or a "
            f"part of it: run `hf download {found['model']}` where there is a network, or name a folder"
        ) from None
    # The bases are all errors of the package for HTTP, of which there is another in each version, and OSError.
    except (*errors.HfHubHTTPError.__bases__, errors.HFValidationError) as error:
        raise InputError(f"{name} is no folder here, and {_reason(error, errors)}") from None


def _reason(error, errors):
    """Says why the Hub does not give a model, and what helps."""
    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for consent on the Hugging Face Hub: give it there, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model of this name on the Hugging Face Hub has no such revision; leave it out for the newest"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return "the Hugging Face Hub has no such model; check the name, and run `hf auth login` for a private one"
    return f"the Hugging Face Hub does not give it ({' '.join(str(error).split())[:200]}); try again, or name a folder"
