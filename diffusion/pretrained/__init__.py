"""Loads the trained models that ship with the project."""

from pathlib import Path

from diffusion.errors import InputError, nearest
from diffusion.model import Trained
from diffusion.pretrained import weights

FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob(f"*{weights.SUFFIX}"))}
"""The file of each model, by name."""


def load(name: str = "digits") -> Trained:
    """Loads a trained model: its network, parameters, schedule and config.

    Args:
      name: a key of FILES. "digits": 8x8 grey digits, unconditional, cosine schedule, predicts eps.

    Raises:
      InputError: there is no such model.
    """
    if name not in FILES:
        raise InputError(f"pretrained model is {name!r}; {nearest(name, FILES)}")
    return weights.load(FILES[name])


def tables(name: str) -> Path:
    """Returns the folder of the tables that were learned for a model that ships; it need not exist."""
    return Path(__file__).parent / f"{name}-tables"
