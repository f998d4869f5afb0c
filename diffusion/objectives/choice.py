"""Every objective by the name that a config gives it."""

from collections.abc import Callable

from diffusion import options
from diffusion.errors import InputError
from diffusion.objectives.autoencoding import kl_terms, vq_terms
from diffusion.objectives.consistency import consistency_distillation_loss, consistency_loss
from diffusion.objectives.losses import OBJECTIVES, Loss, Terms
from diffusion.objectives.progressive import progressive_loss

STUDENTS: dict[str, Callable[..., Loss]] = {
    "progressive": progressive_loss,
    "consistency": consistency_loss,
    "consistency_distillation": consistency_distillation_loss,
}
"""Functions (batch, schedule, prediction, weights, course, options) -> Loss, which make networks for few calls."""

AUTOENCODERS: dict[str, Callable[..., Terms]] = {"kl_autoencoder": kl_terms, "vq_autoencoder": vq_terms}
"""Functions (batch, parts, options) -> Terms, which train autoencoders."""

TAUGHT = ("progressive", "consistency_distillation")
"""The objectives that need a teacher."""


def parse(text: str) -> options.Choice:
    """Reads the objective of a config, as "simple", "hybrid:vlb_weight=0.01" or "progressive:start=64,end=4".

    Raises:
      InputError: an unknown name or option.
    """
    leading = 2 if is_autoencoder(text) else 5 if is_student(text) else 4
    return options.parse("config.train.objective", text, OBJECTIVES | STUDENTS | AUTOENCODERS, leading)


def name_of_sampler(text: str) -> str:
    """Returns the name of an objective whose models draw samples.

    Raises:
      InputError: an unknown name or option, or the objective of an autoencoder.
    """
    name = parse(text).name
    if name in AUTOENCODERS:
        raise InputError(
            "this is an autoencoder, which draws no samples: evaluate.py measures what it gives back, and a model of "
            "its latents is trained by itself"
        )
    return name


def is_student(text: str) -> bool:
    """Tells whether an objective makes a network for few calls, which is no denoiser any more."""
    return str(text).partition(":")[0] in STUDENTS


def is_autoencoder(text: str) -> bool:
    """Tells whether an objective trains an autoencoder, which draws no samples."""
    return str(text).partition(":")[0] in AUTOENCODERS
