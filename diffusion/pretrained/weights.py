"""Keeps a trained model in one safetensors file: the parameters of an EMA, its config, and what was measured."""

import json
import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from diffusion import keys
from diffusion.errors import InputError
from diffusion.files import digest, write_atomically
from diffusion.model import Trained, current_config, make_model

SUFFIX = ".safetensors"
_FORMAT, _ENTRY = "jax-fast-diffusion 1", "model"


def save(path: str | os.PathLike, trained: Trained, figures: dict[str, Any] | None = None) -> None:
    """Writes the parameters, config and figures to a file, whole or not at all.

    Args:
      path: ends in .safetensors; an existing file is replaced.
      trained: from `run_folder.load_trained`.
      figures: what was measured, as anything JSON can hold; `describe` returns it to whoever asks.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(trained.params, sep="/").items()}
    facts = {
        "format": _FORMAT,
        "config": trained.config.to_dict(),
        "image_shape": list(trained.model.image_shape),
        "class_names": [] if trained.model.conditions is None else list(trained.model.conditions.names),
        "step": trained.step,
        "ema": trained.ema,
        "figures": figures or {},
        "sha256": digest(arrays),
    }
    # One entry holds all facts: safetensors writes several in any order, and the same model should give the same file.
    write_atomically(path, safetensors.numpy.save(arrays, {_ENTRY: json.dumps(facts, sort_keys=True)}))


def load(path: str | os.PathLike) -> Trained:
    """Reads what `save` wrote.

    Raises:
      InputError: there is no such file, it is damaged, or `save` did not write it.
    """
    facts, arrays = _read(path)
    if digest(arrays) != facts["sha256"]:
        raise InputError(f"{path} is damaged: its weights are not those that were written; get it again")
    config = current_config(facts["config"])
    model = make_model(config, tuple(facts["image_shape"]), tuple(facts.get("class_names", ())))
    # Check that the config still describes the network whose parameters these are.
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    wanted = jax.eval_shape(model.init, keys.make(0))
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (params, wanted)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{path} holds weights of another network than its config describes; convert it again")
    return Trained(model, jax.tree.map(jax.numpy.asarray, params), config, facts["step"], facts["ema"])


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Returns everything but the parameters: config, image_shape, class_names, step, ema, figures, sha256."""
    return _read(path)[0]


def _read(path):
    """Returns the facts and the arrays of a file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}; name a run folder or a file that convert.py wrote")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        facts = json.loads(metadata.get(_ENTRY, "{}"))
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({str(error)[:100]}); it is damaged, or no file of convert.py"
        ) from error
    if facts.get("format") != _FORMAT:
        raise InputError(f"{path} is no file of convert.py; other weights need a converter")
    return facts, arrays
