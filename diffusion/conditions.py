"""What a model is told besides x and t, a class or a text, and the scales of guidance that it may be asked for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

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


class TextEncoder(NamedTuple):
    """Turns texts into what a network is told of them.

    Attributes:
      embed: texts -> the embeddings of their tokens, [N, tokens, width].
      left_out: a text -> the end of it that is too long for the encoder, or "".
      sha256: of its parameters, as 64 hex digits.
    """

    embed: Callable[[Sequence[str]], Float32[np.ndarray, "N M D"]]
    left_out: Callable[[str], str]
    sha256: str


AT_ONCE = 16
"""So many texts are encoded together at most."""

KEPT = 64
"""The embeddings of so many texts are kept: one takes 230 kB for Stable Diffusion 1."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """What a text-to-image model is told besides x and t: one of some prompts, which are its classes.

    So an image has the number of a prompt as its label, and all that goes by labels goes by prompts. A prompt is only
    encoded when a network is told it, for a job may have more of them than fit into the memory.

    Attributes:
      encoder: of the model.
      names: the prompts 0, 1, ....
      negative: the prompt that means "no prompt", which guidance pushes away from.
      picture_channels: of the picture that an inpainting model is told as well; 0 for any other.
      picture: that picture, the same for all prompts, see `diffusion.spaces.with_hole`.
      scales: as those of `Conditions`; no such model takes the guidance scale as an input.
    """

    encoder: TextEncoder
    names: tuple[str, ...] = ()
    negative: str = ""
    picture_channels: int = 0
    picture: Float32[np.ndarray, "h w C"] | None = None
    scales: ClassVar[None] = None
    _kept: dict[str, Float32[np.ndarray, "M D"]] = dataclasses.field(default_factory=dict, repr=False)

    def __eq__(self, other):
        def facts(prompts):
            return prompts.encoder.sha256, prompts.names, prompts.negative

        return isinstance(other, Prompts) and facts(self) == facts(other)

    def __hash__(self):
        return hash((self.encoder.sha256, self.names, self.negative))

    def replace(self, names: Sequence[str], negative: str = "") -> "Prompts":
        """Returns the prompts of the same encoder that are given here."""
        return dataclasses.replace(self, names=tuple(names), negative=negative)

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "N M D"]:
        """Returns what a network is told of texts, as its cond or null_cond; their embeddings."""
        kept, missing = self._kept, [text for text in dict.fromkeys(texts) if text not in self._kept]
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            # Filled up to a power of two, so that few sizes are compiled.
            filled = part + part[-1:] * ((1 << (len(part) - 1).bit_length()) - len(part))
            kept |= dict(zip(part, self.encoder.embed(filled), strict=False))
        found = np.stack([kept[text] for text in texts])
        for text in list(kept)[: max(0, len(kept) - KEPT)]:
            del kept[text]
        return found

    def nulls(self, count: int) -> Any:
        """Returns what a network is told for the negative prompt, for so many samples; see `told`."""
        return self._with_picture(np.repeat(self.encode([self.negative]), count, axis=0))

    def told(self, labels: Int32[Any, "N"], scale: float = 1.0) -> Any:
        """Returns what a network is told for the prompts with these numbers, whatever the scale.

        That is their embeddings [N, tokens, width]; for an inpainting model a pair of these and its picture for each.

        Raises:
          InputError: an inpainting model has no picture yet.
        """
        return self._with_picture(self.encode([self.names[label] for label in np.asarray(labels).tolist()]))

    def _with_picture(self, embeddings):
        if not self.picture_channels:
            return embeddings
        if self.picture is None:
            raise InputError(
                "this model draws a part of a picture anew, and has none: sample.py takes it by --init and --mask, and "
                "in Python `spaces.with_hole` makes it for Prompts(picture=)"
            )
        return embeddings, np.repeat(self.picture[None], len(embeddings), axis=0)


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
