"""What a model is told besides x and t, and the scales of guidance that it may be asked for."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from diffusion.errors import InputError


class Conditions(NamedTuple):
    """What a model is told besides x and t: one of some classes, as an int label.

    Attributes:
      names: of the classes 0, 1, ....
      null: the label that means "no class".
      scales: the lowest and highest guidance scale of a model that takes the scale as an input and so is guided in one
        call; None for any other.
    """

    names: tuple[str, ...]
    null: int
    scales: tuple[float, float] | None = None

    def nulls(self, count: int) -> Int32[np.ndarray, "count"]:
        """Returns "no class" for so many samples."""
        return np.full(count, self.null, np.int32)

    def told(self, labels: Int32[Any, "N"], scale: float = 1.0) -> Any:
        """Returns what the network is given for labels: these, or (labels, scales) where it takes the scale as well.

        Raises:
          InputError: the network was not trained with this scale.
        """
        if self.scales is None:
            return labels
        self.check_scale(scale)
        return labels, np.full(len(labels), scale, np.float32)

    def check_scale(self, scale: Any) -> None:
        """Raises InputError if a model that takes the scale as an input was not trained with this one."""
        low, high = self.scales
        if not np.ndim(scale) == 0 or not low <= scale <= high:
            raise InputError(
                f"guidance_scale is {scale}; this student takes the scale as an input and was trained with scales from "
                f"{low:g} to {high:g}: give one of these"
            )


def known_scales(scales: Any) -> tuple[float, float]:
    """Returns the lowest and highest guidance scale that a student learns.

    Raises:
      InputError: they are no range of finite numbers from 0 on that holds 1, which stands for no guidance.
    """
    if np.shape(scales) != (2,) or not (0 <= scales[0] <= 1 <= scales[1] < np.inf) or scales[0] == scales[1]:
        shown = ",".join(f"{scale:g}" for scale in np.ravel(scales))
        raise InputError(
            f"scales of objective guidance_distillation are {shown}; give the lowest and the highest, with 1, no "
            "guidance, among them, as scales=1,4"
        )
    return float(scales[0]), float(scales[1])
