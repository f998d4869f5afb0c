"""Says of each stage of a table to which time it goes, for networks that are told so."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError


def ddim_rows(
    signal: Float[np.ndarray, "steps"],
    noise: Float[np.ndarray, "steps"],
    signal_end: Float[np.ndarray, "steps"],
    noise_end: Float[np.ndarray, "steps"],
) -> Float[np.ndarray, "steps 3"]:
    """Returns what DDIM steps of eta = 0 take of x, of D and of z, from levels where they begin to where they end."""
    keep = noise_end / noise
    return np.stack([keep, signal_end - keep * signal, 0 * keep], axis=-1)


def check_ends(table: Any) -> None:
    """Raises InputError unless each stage of a table goes to one time that a network can be told; see `ends`.

    Args:
      table: a `SamplerTable` of concrete arrays.
    """
    signal, noise, update = (np.asarray(x) for x in (table.signal, table.noise, table.update))
    if not np.allclose(signal + noise, 1, rtol=0, atol=1e-6):
        raise InputError(
            f"{table.name} has levels of another schedule than rectified_flow, on which a network that predicts "
            "mean_flow is trained; make it with the model's schedule"
        )
    expected = ddim_rows(signal, noise, np.append(signal[1:], 1), np.append(noise[1:], 0))
    row = update[:, 0]
    one_register = update.shape[1] == 1
    if not one_register or not np.all(np.all(np.abs(row - expected) < 1e-6, axis=1) | (row[:, 0] == 0)):
        raise InputError(
            f"{table.name} combines estimates of x_0, and a network that predicts mean_flow makes none on the way: it "
            "goes from one time to the next in one call; take ddim with eta 0, or consistency, with any grid and "
            "number of steps"
        )


def ends(table: Any) -> Float[np.ndarray, "stages"]:
    """Returns the time to which each stage of a table goes; its arrays may be traced, and then are not checked.

    A DDIM step goes to the time of the next stage, the last one to 0. A stage that goes on from D and new noise, and
    not from x, has the network draw a whole sample, and so goes to 0 as well.
    """
    following = jnp.concatenate([table.t[1:], jnp.zeros_like(table.t[:1])])
    return jnp.where(table.update[:, 0, 0] == 0, 0, following)
