"""Networks, in Flax Linen. Everything outside this folder sees them as an `ApplyFn` alone."""

import functools

from flax import linen as nn

from diffusion.models.unet import UNet
from diffusion.types import ApplyFn

__all__ = ["UNet", "as_apply_fn"]


@functools.lru_cache
def as_apply_fn(model: nn.Module) -> ApplyFn:
    """The model as a pure function (params, x, t, cond); equal models give the same function, so nothing recompiles.

    For training it also takes train=True and a dropout_key.
    """

    def apply_fn(params, x, t, cond=None, *, train=False, dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return model.apply({"params": params}, x, t, cond, train=train, rngs=rngs)

    return apply_fn
