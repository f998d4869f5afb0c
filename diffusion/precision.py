"""Makes of a trained model one that computes in another precision."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.conditions import Prompts
from diffusion.errors import InputError, nearest
from diffusion.model import TRANSFORMER, UNET, UNET2D, UNET2D_CONDITION, Trained, make_model
from diffusion.models.layers import DTYPES

SECTIONS = {UNET: "model", TRANSFORMER: "transformer", UNET2D: "unet2d", UNET2D_CONDITION: "unet2d_condition"}
"""The section of the config that says the dtype of each network."""


def dtype_of(trained: Trained) -> str:
    """Returns what the network computes in, a key of DTYPES, or "" where its config does not say it."""
    section = SECTIONS.get(trained.config.network)
    return trained.config[section].dtype if section else ""


def holds(trained: Trained, dtype: str) -> bool:
    """Returns whether a model computes in a dtype and has its matrices in it, so that `in_dtype` has nothing to do."""
    matrices = [leaf for leaf in jax.tree.leaves(trained.params) if leaf.ndim > 1]
    return dtype_of(trained) == dtype and all(leaf.dtype == DTYPES[dtype] for leaf in matrices)


def in_dtype(trained: Trained, dtype: str) -> Trained:
    """Returns the model with arithmetic in a dtype, and with the matrices of its parameters in it; vectors are float32.

    Args:
      trained: a model with a network of the library.
      dtype: "float32", or "bfloat16", which takes half the memory.

    Raises:
      InputError: an unknown dtype, or a network of the user's own.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; {nearest(str(dtype), DTYPES)}")
    if not dtype_of(trained):
        raise InputError(
            f"dtype is {dtype}, and the network {trained.config.network} is your own, whose dtype is its own affair: "
            "leave it out, or give the network an option"
        )
    config = trained.config.copy_and_resolve_references()
    with config.unlocked():
        config[SECTIONS[config.network]].dtype = dtype
    model = trained.model
    text = model.conditions if isinstance(model.conditions, Prompts) else None
    made = make_model(config, model.space.image_shape, autoencoder=model.space.autoencoder, text=text)
    model = dataclasses.replace(model, apply_fn=made.apply_fn, split=made.split)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if leaf.ndim > 1 else jnp.float32), trained.params)
    return trained._replace(model=model, params=params, config=config)
