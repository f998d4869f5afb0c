"""Loads the trained models that ship with the project."""

from pathlib import Path

from diffusion.errors import InputError, nearest
from diffusion.model import Trained
from diffusion.pretrained import weights

FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob(f"*{weights.SUFFIX}"))}
"""The file of each model, by name."""

DEFAULT = "digits"
"""The model that is used where nothing has been trained."""

SHIPPED = "shipped"
"""What the programs call it; the other models are shipped-NAME."""


def name_of(text: str | None) -> str:
    """Returns the name of the model that a program's flag means, or "" for one that does not ship.

    Args:
      text: shipped, shipped-NAME, or None, which is the default as well; anything else, or a path that is there, is no
        model that ships.

    Raises:
      InputError: no model of this NAME ships.
    """
    if text and Path(text).exists():
        return ""
    text = (text or SHIPPED).rstrip("/")  # which completion in a shell adds
    if text == SHIPPED:
        return DEFAULT
    if not text.startswith(f"{SHIPPED}-"):
        return ""
    name = text.removeprefix(f"{SHIPPED}-")
    if name not in FILES:
        raise InputError(f"no model {text} ships, and there is no such folder; {nearest(name, FILES)}")
    return name


def load(name: str = DEFAULT) -> Trained:
    """Loads a trained model: its network, parameters, schedule and config.

    Args:
      name: a key of FILES. "digits": 8x8 grey digits, unconditional, cosine schedule, predicts eps. "cifar": 32x32
        colour pictures of ten classes, in latent space, cosine schedule, predicts v.

    Raises:
      InputError: there is no such model.
    """
    if name not in FILES:
        raise InputError(f"pretrained model is {name!r}; {nearest(name, FILES)}")
    return weights.load(FILES[name])


def tables(name: str) -> Path:
    """Returns the folder of the tables that were learned for a model that ships; it need not exist."""
    return Path(__file__).parent / f"{name}-tables"
