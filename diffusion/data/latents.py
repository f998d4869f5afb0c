"""Holds a data set as an autoencoder sees it: for each image, and for its mirror image, where its latents lie."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class Latents:
    """The moments of the latents of all images: means and then standard deviations, along the channels.

    Attributes:
      shards: in order, each [n, V, h, w, 2 C] with the same n but in the last, as arrays or as files mapped into
        memory; V is 2 where images may be mirrored, which an autoencoder has to see for itself, and else 1.
    """

    shards: Sequence[Float32[np.ndarray, "n V h w 2*C"]]

    def __len__(self) -> int:
        """Returns the number of images."""
        return sum(map(len, self.shards))

    def take(
        self, index: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"] | None
    ) -> Float[np.ndarray, "b h w 2*C"]:
        """Returns the moments of some images, or of the mirror images of those that are mirrored."""
        first = self.shards[0]
        result = np.empty((len(index), *first.shape[2:]), np.float32)
        which = np.zeros(len(index), int) if mirrored is None else mirrored.astype(int)
        shard, place = np.divmod(index, len(first))
        for number in np.unique(shard).tolist():
            chosen = shard == number
            result[chosen] = self.shards[number][place[chosen], which[chosen]]
        return result
