"""Lets a Flax network keep its deep features in one call and take them in another, see `diffusion.caching`."""

from typing import Any

import jax
from flax import linen as nn

FOUND, GIVEN = "intermediates", "deep"
"""The collections of Flax variables that features are returned in and given in."""


def reused(module: nn.Module, h: Any, since: Any = None) -> Any:
    """Returns h, or what stands for it where a caller gives features; then all that only h needs is not computed.

    A caller that lets FOUND change gets the features. In any other call this does nothing.

    Args:
      module: the network, in its compact method; it calls this once.
      h: what the deep part returns, a pytree.
      since: what the deep part started from, where the change h - since is the feature in place of h.
    """
    if module.has_variable(GIVEN, "features"):
        features = module.get_variable(GIVEN, "features")
        return features if since is None else jax.tree.map(lambda a, b: a + b, since, features)
    if module.is_mutable_collection(FOUND):
        features = h if since is None else jax.tree.map(lambda a, b: a - b, h, since)
        module.sow(FOUND, "features", features, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return h
