"""Checks what networks after those of diffusers have in common: choices by name, and what they are given."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Array

from diffusion.errors import InputError, nearest, require_range


def check_choices(network: Any, section: str, allowed: Mapping[str, Collection[str]]) -> None:
    """Raises InputError unless each of these fields of a network has one of the values that it may have.

    Args:
      network: has the fields.
      section: of the config, what errors call it.
      allowed: the values of each field.
    """
    for name, values in allowed.items():
        if (value := getattr(network, name)) not in values:
            raise InputError(f"{section}.{name} is {value!r}; {nearest(value, values)}")
    require_range(f"{section}.dropout", network.dropout, 0, 1, open_ends="high")
    require_range(f"{section}.mid_block_scale_factor", network.mid_block_scale_factor, 0, open_ends="low")


def check_input(network: Any, section: str, x: Array, t: Array) -> None:
    """Raises InputError if a network cannot take x or t, or is to be told what it is not made for.

    Args:
      network: has block_out_channels, between which an image halves, and sees_end and sees_scale.
      section: as for `check_choices`.
      x: [B, H, W, C].
      t: [B].
    """
    if network.sees_end or network.sees_scale:
        raise InputError(f"network {section} cannot be told where a step ends or a guidance scale; take network unet")
    halvings = len(network.block_out_channels) - 1
    if x.shape[1] % 2**halvings or x.shape[2] % 2**halvings:
        raise InputError(
            f"an input of {x.shape[1]}x{x.shape[2]} cannot be halved {halvings} times; use sizes that make it "
            f"a multiple of {2**halvings}, or fewer {section}.block_out_channels"
        )
    if t.ndim != 1:
        raise InputError(f"t has shape {t.shape}; this network takes [B]")
