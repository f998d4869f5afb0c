"""Feature spaces by name, for what measures samples and for what learns from features."""

from diffusion.commands.datasets import cache_folder
from diffusion.data import Dataset
from diffusion.errors import InputError, nearest
from diffusion.evaluation import features
from diffusion.evaluation.spaces import FeatureSpace

SPACES = ("classifier", "inception", "pixels")


def open_space(name: str, real: Dataset, *, inception: str | None = None, seed: int = 0) -> FeatureSpace:
    """Returns the space of that name.

    Args:
      name: one of SPACES.
      real: what the classifier is trained on, unless the cache has it.
      inception: file of the standard weights; None downloads them.
      seed: of the classifier.

    Raises:
      InputError: an unknown name, or no such weights.
    """
    if name not in SPACES:
        raise InputError(f"features is {name!r}; {nearest(name, SPACES)}")
    if inception and name != "inception":
        raise InputError(f"--inception goes with --features=inception, not {name}")
    if name == "inception":
        try:
            return features.inception(inception)
        except InputError as error:
            raise InputError(
                f"{error}; --inception=FILE names the file, and --features=classifier needs none"
            ) from None
    return features.classifier(real, cache_folder(), seed=seed) if name == "classifier" else features.pixels()
