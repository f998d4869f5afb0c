"""Names the array types, and the one signature through which all code outside models/ sees a network."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PyTree

Params = PyTree[Float[Array, "..."]]
"""A network's parameters: any pytree of float arrays."""

Images = Float[Array, "B *shape"]
"""A batch of images, NHWC, pixels in [-1, 1] when clean; *shape is (H, W, C)."""

Timesteps = Int[Array, ""] | Int[Array, "B"]
"""Timesteps in 0..T, one for the batch or one for each sample; 0 is clean data."""


class ApplyFn(Protocol):
    """Computes a network's prediction, which has the shape of x, as a pure function.

    t is in 1..T, integer or real; cond is a pytree whose leaves have a leading axis B, or None.
    """

    def __call__(self, params: Params, x: Images, t: Float[Array, "B"], cond: Any = None) -> Images: ...
