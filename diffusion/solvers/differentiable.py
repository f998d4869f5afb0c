"""Derivatives of any solver's table with respect to its grid tau, for learning when to step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import timesteps
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.table import SamplerTable


def differentiable(
    solver: Callable[..., SamplerTable], schedule: NoiseSchedule, num_steps: int, **options: Any
) -> Callable[[Float[Array, "S+1"]], SamplerTable]:
    """A solver as a function of tau that JAX can trace and differentiate once.

    Solvers are NumPy; the table is built by a callback, in float64, and its Jacobian by central differences of that
    build, which costs 2 S more builds of well under a millisecond each and needs no derivative by hand. Where the
    schedule has a kink (a whole timestep), a derivative is the mean of the two sides.

    Args:
      solver: from this package.
      schedule: the noise schedule.
      num_steps: S; it fixes the table's shape.
      options: the solver's.

    Returns:
      tau -> table. tau is real, strictly descending in (0, T] and then 0; the last entry has no derivative. A tau that
      is no grid raises the solver's InputError out of the callback.
    """
    example = solver(schedule, timesteps.uniform(schedule, num_steps), **options)
    flat, structure = jax.tree.flatten(example)

    def build(tau):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(solver(schedule, tau, **options))]

    def build_with_jacobian(tau):
        tau = np.asarray(tau, np.float64)
        columns = []
        for i in range(num_steps):
            # No further than a tenth of the way to a neighbour, and not past T.
            width = min(1e-3, 0.1 * (tau[i] - tau[i + 1]), 0.1 * (tau[i - 1] - tau[i]) if i else 1e-3)
            up, down = tau.copy(), tau.copy()
            up[i], down[i] = min(tau[i] + width, schedule.num_timesteps), tau[i] - width
            pairs = zip(build(up), build(down), strict=True)
            columns.append([(a - b) / (up[i] - down[i]) for a, b in pairs])
        columns.append([np.zeros_like(leaf) for leaf in flat])
        return build(tau), [np.stack(parts, axis=-1) for parts in zip(*columns, strict=True)]

    def call(function, results, tau):
        """function(tau) in float64 on the host, in tau's precision here."""

        dtype = tau.dtype

        def on_host(tau):
            return jax.tree.map(lambda leaf: leaf.astype(dtype), function(np.asarray(tau, np.float64)))

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), results)
        return jax.pure_callback(on_host, shapes, tau, vmap_method="sequential")

    @jax.custom_jvp
    def leaves(tau):
        return call(build, flat, tau)

    @leaves.defjvp
    def leaves_jvp(primals, tangents):
        (tau,), (direction,) = primals, tangents
        jacobians = [np.empty((*leaf.shape, num_steps + 1)) for leaf in flat]
        values, slopes = call(build_with_jacobian, (flat, jacobians), tau)
        return values, [jnp.tensordot(slope, direction, axes=1) for slope in slopes]

    return lambda tau: jax.tree.unflatten(structure, leaves(jnp.asarray(tau)))
