"""Says by name what the backward pass of a network computes again instead of keeping it."""

import jax
from flax import linen as nn
from jax.extend.core import primitives

from diffusion.errors import InputError, nearest


def _is_convolution(primitive, *_, **__):
    return primitive is primitives.conv_general_dilated_p


POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _is_convolution
    ),
}
"""What is kept for the backward pass besides the inputs of each block: everything, nothing, or the results of
convolutions and dense layers, so that norms, activations, dropout and the weights of attention are computed again."""


def check_remat(remat: str | bool, field: str) -> None:
    """Raises InputError for what is no key of POLICIES; True stands for "full", and False for "none"."""
    if not isinstance(remat, bool) and remat not in POLICIES:
        raise InputError(f"{field} is {remat!r}; {nearest(str(remat), POLICIES)}")


def with_remat(block: type[nn.Module], remat: str | bool) -> type[nn.Module]:
    """Returns the module with the same parameters, results and gradients, and with this policy in the backward pass.

    Args:
      block: a module.
      remat: see `check_remat`.
    """
    if isinstance(remat, bool):
        remat = "full" if remat else "none"
    return block if remat == "none" else nn.remat(block, policy=POLICIES[remat])
