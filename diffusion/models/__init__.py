"""Holds the networks, written in Flax Linen, and takes in those of others; code outside sees each as an `ApplyFn`."""

import dataclasses
import functools

from flax import linen as nn

from diffusion.caching import Split
from diffusion.models import deep
from diffusion.models.clip_text import CLIPText
from diffusion.models.own import Network, adapt
from diffusion.models.transformer import Transformer
from diffusion.models.unet import UNet
from diffusion.models.unet2d import UNet2D
from diffusion.models.unet2d_condition import UNet2DCondition
from diffusion.types import ApplyFn

__all__ = [
    "CLIPText",
    "Network",
    "Transformer",
    "UNet",
    "UNet2D",
    "UNet2DCondition",
    "adapt",
    "as_apply_fn",
    "as_split",
]


def as_apply_fn(model: nn.Module) -> ApplyFn:
    """Returns the model as a pure function (params, x, t, cond).

    Equal models give the same function, so nothing recompiles. In training it also takes dropout_keys, typed JAX keys
    [B]: a sample's dropout depends only on its own key.
    """
    return _as_apply_fn(_hashable(model))


def as_split(model: nn.Module) -> Split:
    """Returns a model that calls `deep.reused` as the two functions that `diffusion.caching` takes.

    Equal models give the same functions, so nothing recompiles.
    """
    return _as_split(_hashable(model))


def _hashable(model):
    """Returns the model with tuples for lists, as JSON and configs have them, for the caches below."""
    lists = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")}
    return model.clone(**{name: tuple(v) for name, v in lists.items() if isinstance(v, list)})


@functools.lru_cache
def _as_apply_fn(model):
    def apply_fn(params, x, t, cond=None, *, dropout_keys=None):
        return model.apply({"params": params}, x, t, cond, dropout_keys=dropout_keys)

    return apply_fn


@functools.lru_cache
def _as_split(model):
    def whole(params, x, t, cond=None):
        prediction, found = model.apply({"params": params}, x, t, cond, mutable=[deep.FOUND])
        return prediction, found[deep.FOUND]

    def shallow(params, x, t, cond, features):
        return model.apply({"params": params, deep.GIVEN: features}, x, t, cond)

    return Split(whole, shallow)
