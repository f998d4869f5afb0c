"""Keeps a trained autoencoder in one safetensors file, with the scaling of its latents."""

import os
from pathlib import Path
from typing import Any

import jax

from diffusion import keys
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.errors import InputError
from diffusion.pretrained import weights
from diffusion.records import autoencoder_from_record


def save(
    path: str | os.PathLike, trained: TrainedAutoencoder, figures: dict[str, Any] | None = None, dtype: str = "float32"
) -> None:
    """Writes an autoencoder to a file, from which `load_autoencoder` reads it.

    Args:
      path: ends in .safetensors; an existing file is replaced.
      trained: from `load_autoencoder`.
      figures: what was measured.
      dtype: as for `weights.save`.

    Raises:
      InputError: a parameter is not finite, or not in dtype.
    """
    facts = {**trained.facts(), "class_names": [], "figures": figures or {}}
    weights.write(path, trained.params, facts, dtype)


def load(path: str | os.PathLike, ema: str = "") -> TrainedAutoencoder:
    """Reads what `save` wrote.

    Args:
      path: the file.
      ema: the EMA that it should hold; "" for any.

    Raises:
      InputError: there is no such file, it is damaged, or holds no autoencoder.
    """
    header, facts = weights.read_facts(path)
    config, autoencoder = autoencoder_from_record(facts, str(path))
    params = weights.read_params(path, header, facts, jax.eval_shape(autoencoder.init, keys.make(0)))
    if ema and ema != facts["ema"]:
        raise InputError(f"ema is {ema}; {Path(path).name} holds only that of {facts['ema']}")
    return TrainedAutoencoder(autoencoder, params, config, facts["step"], facts["ema"], facts["sha256"])
