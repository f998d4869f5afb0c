"""Every objective by the name that a config gives it."""

from collections.abc import Callable

from diffusion import options
from diffusion.conditions import known_scales
from diffusion.errors import InputError
from diffusion.objectives.autoencoding import kl_terms, vq_terms
from diffusion.objectives.consistency import consistency_distillation_loss, consistency_loss
from diffusion.objectives.guided import guidance_distillation_loss
from diffusion.objectives.losses import OBJECTIVES, Loss, Terms
from diffusion.objectives.mean_flow import mean_flow_distillation_loss, mean_flow_loss
from diffusion.objectives.progressive import progressive_loss

STUDENTS: dict[str, Callable[..., Loss]] = {
    "progressive": progressive_loss,
    "consistency": consistency_loss,
    "consistency_distillation": consistency_distillation_loss,
    "mean_flow": mean_flow_loss,
    "mean_flow_distillation": mean_flow_distillation_loss,
    "guidance_distillation": guidance_distillation_loss,
}
"""Functions (batch, schedule, prediction, weights, course, options) -> Loss, which make networks for few calls."""

AUTOENCODERS: dict[str, Callable[..., Terms]] = {"kl_autoencoder": kl_terms, "vq_autoencoder": vq_terms}
"""Functions (batch, parts, options) -> Terms, which train autoencoders."""

TAUGHT = ("progressive", "consistency_distillation", "mean_flow_distillation", "guidance_distillation")
"""The objectives that need a teacher."""

MEAN_FLOW = ("mean_flow", "mean_flow_distillation")
"""Those whose network predicts mean velocities."""

GUIDED = "guidance_distillation"
"""The one whose network takes the guidance scale as an input."""

BY_SHARE = ("progressive", "consistency", "consistency_distillation")
"""Those that go by the share of the run that is done, so that its length shapes each of its steps."""


def parse(text: str) -> options.Choice:
    """Reads the objective of a config, as "simple", "hybrid:vlb_weight=0.01" or "progressive:start=64,end=4".

    Raises:
      InputError: an unknown name or option, or scales that are no range.
    """
    leading = 2 if is_autoencoder(text) else 5 if is_student(text) else 4
    chosen = options.parse("config.train.objective", text, OBJECTIVES | STUDENTS | AUTOENCODERS, leading)
    scales(chosen)
    return chosen


def sampling_objective(text: str) -> options.Choice:
    """Reads an objective whose models draw samples; raises as `parse`, and for the objective of an autoencoder."""
    chosen = parse(text)
    if chosen.name in AUTOENCODERS:
        raise InputError(
            "this is an autoencoder, which draws no samples: evaluate.py measures what it gives back, and a model of "
            "its latents is trained by itself"
        )
    return chosen


def scales(objective: options.Choice) -> tuple[float, float] | None:
    """Returns the lowest and highest guidance scale that a network takes as an input, or None where it takes none.

    Raises:
      InputError: they are no range that holds 1.
    """
    if objective.name != GUIDED:
        return None
    return known_scales(objective.complete(leading=5)["scales"])


def is_student(text: str) -> bool:
    """Tells whether an objective makes a network for few calls, which is no denoiser any more."""
    return str(text).partition(":")[0] in STUDENTS


def is_autoencoder(text: str) -> bool:
    """Tells whether an objective trains an autoencoder, which draws no samples."""
    return str(text).partition(":")[0] in AUTOENCODERS


def goes_by_share(text: str) -> bool:
    """Tells whether the length of a run shapes each of its steps, whatever the learning rate does."""
    return str(text).partition(":")[0] in BY_SHARE
